"""Two checks before a grown model is trained: it starts as its base, and its first step does not throw it off.

Invariant: the model that is checked is left exactly as it was: weights, gradients, flags, training mode, random state.

Legend: B rows, S input columns, V vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.func import functional_call
from transformers import PreTrainedModel

from nexus_ray.errors import ConfigError
from nexus_ray.models.score import IGNORE, Rows, attention_inputs, decode_rows, row_logits, target_nll

MAX_DRIFT = 0.05
"""Default bound of the first step's drift, in nats per token of old text."""
_PROBE_SHAPE = (2, 17)


@dataclass(frozen=True)
class Drift:
    """What one optimizer step did to old text; losses in nats per token."""

    loss_before: float
    loss_after: float

    @property
    def nats(self) -> float:
        """Growth of the loss; negative where the step helped."""
        return self.loss_after - self.loss_before


def probe_rows(model: PreTrainedModel) -> Rows:
    """Two short rows of fixed tokens that any model with this vocabulary can read, on its device."""
    count = _PROBE_SHAPE[0] * _PROBE_SHAPE[1]
    tokens = (torch.arange(count) * 7919 + 1) % model.config.vocab_size
    return decode_rows(tokens.view(_PROBE_SHAPE).to(model.device))


def still_logits(model: PreTrainedModel, rows: Rows) -> torch.Tensor:
    """`row_logits` without dropout, without a graph and with nothing marked as trained, which may round otherwise."""
    with _evaluating(model), torch.no_grad():
        return row_logits(model, rows)


def check_identity(base_logits_BSV: torch.Tensor, model: PreTrainedModel, rows: Rows) -> None:
    """Raise ConfigError unless `model` says of `rows` exactly, bit for bit, what its base said (`still_logits`)."""
    logits_BSV = still_logits(model, rows)
    if torch.equal(logits_BSV, base_logits_BSV.to(logits_BSV.device)):
        return
    if not torch.isfinite(base_logits_BSV).all():
        raise ConfigError("the base model's logits are not finite; check its weights before it is grown")
    if logits_BSV.shape != base_logits_BSV.shape:
        detail = f"their shape is {list(logits_BSV.shape)}, the base's {list(base_logits_BSV.shape)}"
    else:
        difference = (logits_BSV.float() - base_logits_BSV.float().to(logits_BSV.device)).abs().max().item()
        detail = f"they differ by up to {difference:.3g}"
    raise ConfigError(
        f"the grown {model.config.model_type} does not start as its base: its logits must be equal bit for bit, but "
        f"{detail}; use a released transformers version and deterministic kernels (model.attention: eager), or another "
        f"method (continual.use_lora)"
    )


def first_step_drift(
    model: PreTrainedModel,
    parameters: Sequence[str],
    *,
    old_rows: Rows,
    new_rows: Rows,
    learning_rate: float,
    weight_decay: float = 0.0,
) -> Drift:
    """How the loss on `old_rows` moves when `parameters` take one AdamW step on `new_rows`.

    The step is taken by float32 copies of these parameters; `model` itself is not touched.
    """
    weights = dict(model.named_parameters())
    copies = {name: weights[name].detach().float().clone().requires_grad_() for name in parameters}
    optimizer = torch.optim.AdamW(copies.values(), lr=learning_rate, weight_decay=weight_decay)
    with _evaluating(model):
        with torch.no_grad():
            before = _mean_loss(model, {}, old_rows).item()
        loss = _mean_loss(model, copies, new_rows)
        for copy, gradient in zip(
            copies.values(), torch.autograd.grad(loss, list(copies.values()), materialize_grads=True), strict=True
        ):
            copy.grad = gradient
        optimizer.step()
        with torch.no_grad():
            after = _mean_loss(model, copies, old_rows).item()
    return Drift(before, after)


def check_start(
    model: PreTrainedModel,
    parameters: Sequence[str],
    base_logits_BSV: torch.Tensor,
    *,
    old_rows: Rows,
    **settings: Any,
) -> Drift:
    """Both checks: `base_logits_BSV` are the base's `still_logits` of `old_rows`, the rest is `check_drift`'s."""
    check_identity(base_logits_BSV, model, old_rows)
    return check_drift(model, parameters, old_rows=old_rows, **settings)


def check_drift(
    model: PreTrainedModel,
    parameters: Sequence[str],
    *,
    old_rows: Rows,
    new_rows: Rows,
    learning_rate: float,
    max_drift: float = MAX_DRIFT,
    weight_decay: float = 0.0,
) -> Drift:
    """`first_step_drift`, refused where it is too large.

    Raises:
        ConfigError: one step at `learning_rate` moves the loss on `old_rows` by more than `max_drift` nats per token.
    """
    drift = first_step_drift(
        model,
        parameters,
        old_rows=old_rows,
        new_rows=new_rows,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
    )
    if not drift.nats <= max_drift:  # true of NaN as well
        raise ConfigError(
            f"one step at training.learning_rate={learning_rate:g} moves the loss on old text from "
            f"{drift.loss_before:.4f} to {drift.loss_after:.4f} nats per token, by {drift.nats:+.4f}, more than "
            f"{max_drift:g} allowed; use a lower training.learning_rate, or other or fewer blocks "
            f"(continual.expansion.positions, continual.expand_blocks)"
        )
    return drift


def _mean_loss(model: PreTrainedModel, copies: dict[str, torch.Tensor], rows: Rows) -> torch.Tensor:
    """Mean loss in nats per target of `rows`, float32, with `copies` in place of the model's parameters."""
    weights = {name: copy.to(model.get_parameter(name).dtype) for name, copy in copies.items()}
    logits = functional_call(model, weights, kwargs=_inputs(model, rows)).logits
    return target_nll(logits, rows.targets).sum() / (rows.targets != IGNORE).sum().clamp(min=1)


def _inputs(model: PreTrainedModel, rows: Rows) -> dict[str, Any]:
    return attention_inputs(rows, model.config._attn_implementation, model.dtype) | {"use_cache": False}


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode with all weights frozen, and each module's and parameter's own state again afterwards.

    Frozen, because `torch.matmul` may choose its kernel, and so the last bit, by the weight's `requires_grad`.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
