"""Orthogonal-subspace fine-tuning (OSFT, Nayak et al. 2025, arXiv 2504.07097) that no optimizer can make leak.

Each target `W` (O x I) is taken apart once, `W = U S V`, in float32. The top k of its d = min(O, I) directions, with
d - k = ceil(ratio d) as in mini_trainer, are preserved: an update `dW` may have no part in the columns of `U_high`
(what they write) or in the rows of `V_high` (what they read). Published code trains the factors of the low part and
projects them after each step; here the update is written in coordinates that cannot express anything else:

    square W:      dW = U_low M V_low                          M is r x r, r = d - k
    tall (O > I):  dW = (N - U_high U_high^T N) V_low          N is O x r
    wide (O < I):  dW = U_low (N - N V_high^T V_high)          N is r x I

Same reach: a projected `U_low'` is any matrix with columns orthogonal to `U_high`, a projected `V_low'` any with rows
orthogonal to `V_high`. On the shorter side that complement has r dimensions, which `V_low` (or `U_low`) spans exactly;
so `U_low' S' V_low' - U_low S V_low` is `X V_low` for an X whose columns are orthogonal to `U_high`, and every such X
occurs: it is the projected N above (or `U_low M`, where the longer side has r dimensions left as well). An r x r core
for a tall W would reach less: none of the outputs that W does not write to yet.

No leak: gradients, AdamW's elementwise rescaling, its weight decay (which pulls towards the start), clipping and
bfloat16 act on M or N only, and every value of these is an allowed update. A projection of gradients alone leaks,
because rescaling rotates them back (a quarter to a half of the update's norm). The core starts at zero and `W` stays as
it was, so that the model starts as exactly the one it came from.

Legend: B tokens, O outputs, I inputs, r trainable directions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_ray.config.tree import exact_fraction
from nexus_ray.errors import ConfigError
from nexus_ray.models.targets import Targets, find_targets

TYPICAL_TOKENS = 4096
"""Tokens of a micro-batch, about; decides once per matrix how its update is applied."""
_CORE, _BASES = "osft_core", ("osft_left", "osft_right")


def add_osft(model: nn.Module, *, unfreeze_rank_ratio: float, targets: Targets = None) -> nn.Module:
    """Freeze `model` and give each target a trainable update outside its preserved directions, in place.

    `unfreeze_rank_ratio` in (0, 1] is the share of each matrix's directions, those of its lowest singular values, that
    may change; at 1 all may. `targets` as in `find_targets`. A later stage merges and calls this again: a smaller ratio
    then preserves what that stage learned as well. The singular value decompositions run where the weights are.

    Every worker must hold the same bases: they are buffers, saved with the weights, and broadcast them where workers do
    not run the same build of LAPACK on the same number of threads.

    Raises:
        ConfigError: naming `continual.osft.*`.
    """
    if not 0 < unfreeze_rank_ratio <= 1:
        raise ConfigError(
            f"continual.osft.unfreeze_rank_ratio={unfreeze_rank_ratio} is outside (0, 1]; use 0.1 to 0.3 to keep much, "
            f"more to learn more"
        )
    found = find_targets(model, targets, field="continual.osft.targets")
    for name, linear in found.items():
        if not torch.isfinite(linear.weight).all():
            raise ConfigError(f"continual.osft.targets: {name} holds values that are not finite; restore the model")
    model.requires_grad_(False)
    for name, linear in found.items():
        _replace(model, name, OsftLinear(linear, unfreeze_rank_ratio))
    return model


def core_size(model: nn.Module, *, unfreeze_rank_ratio: float, targets: Targets = None) -> int:
    """Parameters that `add_osft` would train, and its refusals; nothing is changed or allocated.

    Raises:
        ConfigError: as `add_osft`.
    """
    found = find_targets(model, targets, field="continual.osft.targets")
    return sum(
        _trainable_rank(linear.weight, unfreeze_rank_ratio)
        * (_trainable_rank(linear.weight, unfreeze_rank_ratio) if rows == columns else max(rows, columns))
        for linear in found.values()
        for rows, columns in [linear.weight.shape]
    )


def merge_osft(model: nn.Module) -> nn.Module:
    """Plain linear layers of weight `W + dW`, added in float32, in place; all of the model trainable. Idempotent."""
    layers = dict(_layers(model))
    for name, layer in layers.items():
        plain = nn.Linear(layer.weight.shape[1], layer.weight.shape[0], bias=layer.bias is not None, device="meta")
        layer.weight.data.copy_(layer.merged())
        plain.weight, plain.bias = layer.weight, layer.bias
        _replace(model, name, plain.train(layer.training))
    return model.requires_grad_(True) if layers else model


def merged_state(model: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Names and weights of the merged model; `model` stays as it is.

    `state_dict` holds parameters by `model`'s names where its own are partitioned or of lower precision; the bases are
    the model's own.
    """
    state = dict(model.state_dict() if state_dict is None else state_dict)
    for name, layer in _layers(model):
        weight, core = state[f"{name}.weight"], state.pop(f"{name}.{_CORE}")
        update = layer.update(core.detach().to(layer.osft_left.device)).to(weight.device)
        state[f"{name}.weight"] = (weight.float() + update).to(weight.dtype)
        for basis in _BASES:
            state.pop(f"{name}.{basis}", None)
    return state


# --- the meter -----------------------------------------------------------------------------------------------------


def preserved(weight: Tensor, unfreeze_rank_ratio: float) -> tuple[Tensor, Tensor]:
    """`U_high` [O, k] and `V_high` [k, I] of a weight [O, I], orthonormal, float32."""
    left, _, right = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    kept = min(weight.shape) - _trainable_rank(weight, unfreeze_rank_ratio)
    return left[:, :kept].contiguous(), right[:kept].contiguous()


@torch.no_grad()
def leak(start: Tensor, now: Tensor, left_high: Tensor, right_high: Tensor) -> float:
    """Norm of the update's part in preserved directions over the norm of the update; 0 for no update.

    `start` and `now` [O, I] are a weight before and after any kind of training, the bases those of `preserved`. The
    part that has no column in `left_high` and no row in `right_high` is allowed, all else leaks. Weights that are
    stored in bfloat16 leak by their rounding, which may exceed the update itself.
    """
    update = now.double() - start.double()
    left, right = left_high.double(), right_high.double()
    allowed = update - left @ (left.T @ update)
    allowed = allowed - (allowed @ right.T) @ right
    size = update.norm()
    return float((update - allowed).norm() / size) if size else 0.0


@torch.no_grad()
def model_leak(model: nn.Module) -> float:
    """`leak` over all layers of a model under OSFT, norms summed in squares; from the weights as merged in float32."""
    leaked, moved = 0.0, 0.0
    for _, layer in _layers(model):
        update = layer.merged().double() - layer.weight.double()
        leaked += float((update - layer.allowed(update)).norm() ** 2)
        moved += float(update.norm() ** 2)
    return math.sqrt(leaked / moved) if moved else 0.0


# --- the layer -----------------------------------------------------------------------------------------------------


class OsftLinear(nn.Module):
    """`F.linear` with weight `W + dW`; holds `weight` and `bias` (frozen) under the names they had.

    The bases stay float32 when the model is cast: rounded ones are no longer orthogonal to what they must not touch.
    In lower precision the forward pass rounds them, and so sees the update only to that precision; merges do not.

    `dW = left right` has rank r. Adding it to `W` first costs O I r per call, however many tokens there are; applying
    it beside `W` costs r (O + I) per token. The choice is made by `O I / (O + I) <= TYPICAL_TOKENS`, from the weight's
    shape alone: by the batch, the same rows would round otherwise when split among workers or accumulation steps.
    Either way the backward pass computes no gradient of O x I. Merge before generating text: a token at a time, the
    first way does r times the work of a plain layer.
    """

    osft_left: Tensor
    osft_right: Tensor

    def __init__(self, linear: nn.Linear, unfreeze_rank_ratio: float) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        outputs, inputs = linear.weight.shape
        self.rank = _trainable_rank(linear.weight, unfreeze_rank_ratio)
        self.tall, self.wide = outputs > inputs, outputs < inputs
        self.adds_first = outputs * inputs <= TYPICAL_TOKENS * (outputs + inputs)
        left, _, right = torch.linalg.svd(linear.weight.detach().float(), full_matrices=False)
        kept = min(outputs, inputs) - self.rank
        self.register_buffer(_BASES[0], (left[:, :kept] if self.tall else left[:, kept:]).contiguous())
        self.register_buffer(_BASES[1], (right[:kept] if self.wide else right[kept:]).contiguous())
        shape = (outputs if self.tall else self.rank, inputs if self.wide else self.rank)
        self.osft_core = nn.Parameter(torch.zeros(shape, device=linear.weight.device))
        self.train(linear.training)

    def extra_repr(self) -> str:
        return f"in_features={self.weight.shape[1]}, out_features={self.weight.shape[0]}, rank={self.rank}"

    def factors(self, core: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`left` [O, r] and `right` [r, I], whose product is the update."""
        core, left, right = core.to(dtype), self.osft_left.to(dtype), self.osft_right.to(dtype)
        if self.tall:
            return core - left @ (left.T @ core), right
        if self.wide:
            return left, core - (core @ right.T) @ right
        return left @ core, right

    @torch.no_grad()
    def update(self, core: Tensor | None = None) -> Tensor:
        """`dW` [O, I] in float32."""
        left, right = self.factors(self.osft_core if core is None else core, torch.float32)
        return left @ right

    @torch.no_grad()
    def merged(self) -> Tensor:
        """`W + dW` [O, I] in float32."""
        return self.weight.float() + self.update()

    def allowed(self, update: Tensor) -> Tensor:
        """The part of an update [O, I] outside the preserved directions, in its precision."""
        left, right = self.osft_left.to(update.dtype), self.osft_right.to(update.dtype)
        columns = left @ (left.T @ update)
        columns = update - columns if self.tall else columns
        rows = (columns @ right.T) @ right
        return columns - rows if self.wide else rows

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.factors(self.osft_core, x.dtype)
        if self.adds_first:
            return _LowRankUpdate.apply(x, self.weight, self.bias, left, right)
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, right), left)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OsftLinear:
        exact = {name: getattr(self, name) for name in _BASES}
        super()._apply(fn, recurse)
        for name, basis in exact.items():
            cast = getattr(self, name)
            if cast.dtype != basis.dtype:
                setattr(self, name, basis.to(cast.device))
        return self


class _LowRankUpdate(torch.autograd.Function):
    """`F.linear(x, W + left right, bias)` that neither keeps the sum nor computes its gradient (`W` is frozen)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, left, right)
        return F.linear(x, torch.addmm(weight, left, right), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, left, right = ctx.saved_tensors
        grad_BO, x_BI = grads[0].reshape(-1, weight.shape[0]), x.reshape(-1, weight.shape[1])
        grad_x = grad_left = grad_right = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_BO @ torch.addmm(weight, left, right)).view_as(x)
        if ctx.needs_input_grad[3]:
            grad_left = grad_BO.T @ (x_BI @ right.T)
        if ctx.needs_input_grad[4]:
            grad_right = (grad_BO @ left).T @ x_BI
        return grad_x, None, None, grad_left, grad_right


def _trainable_rank(weight: Tensor, unfreeze_rank_ratio: float) -> int:
    return math.ceil(exact_fraction(unfreeze_rank_ratio) * min(weight.shape))


def _layers(model: nn.Module) -> Iterator[tuple[str, OsftLinear]]:
    yield from [(name, module) for name, module in model.named_modules() if isinstance(module, OsftLinear)]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
