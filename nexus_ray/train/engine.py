"""DeepSpeed behind few verbs: build, backward, step, and exact access to fp32 weights and Adam moments.

All quirks of DeepSpeed 0.19 live here. Nothing compiles at first use on a CPU: the optimizer is PyTorch's AdamW, and
DeepSpeed's shared-memory operator, which Ray never lets it use, is not built.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nexus_ray.config.tree import TrainingConfig
from nexus_ray.models.build import parameter_groups

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class BatchShape:
    """How a global batch is cut: `rows` sequences over `world` workers, in micro-batches of `micro` rows."""

    rows: int
    world: int
    micro: int

    @property
    def rows_per_rank(self) -> int:
        """Rows of one worker; the last worker's part is padded where the batch does not divide."""
        return -(-self.rows // self.world)

    @property
    def accumulation(self) -> int:
        """Forward passes of one worker per optimizer step."""
        return -(-self.rows_per_rank // self.micro)

    def rank_rows(self, rank: int) -> tuple[int, int]:
        """First and last-plus-one row of the global batch that `rank` trains on."""
        return min(rank * self.rows_per_rank, self.rows), min((rank + 1) * self.rows_per_rank, self.rows)


def deepspeed_config(training: TrainingConfig, shape: BatchShape) -> dict[str, Any]:
    """The JSON that DeepSpeed is initialised with; `precision` and `zero_stage` must be resolved (no `auto`)."""
    stage = training.zero_stage
    zero: dict[str, Any] = {"stage": stage}
    if stage in (2, 3):
        zero |= {"contiguous_gradients": True, "overlap_comm": False}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 10_000}
    if training.offload_optimizer:
        zero |= {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
    micro = min(shape.micro, shape.rows_per_rank)
    return {
        "train_batch_size": micro * shape.accumulation * shape.world,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": shape.accumulation,
        "gradient_clipping": training.clip_norm if stage else 0.0,  # stage 0 is clipped here, where the norm is known
        "zero_optimization": zero,
        "bf16": {"enabled": training.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


def import_deepspeed(*, use_gpu: bool) -> Any:
    """DeepSpeed, quiet, on the accelerator of the config, without the operator it would compile."""
    if not use_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    return deepspeed


class Engine:
    """A model and its optimizer under DeepSpeed; every method but `grad_norm` is collective."""

    def __init__(
        self,
        model: nn.Module,
        training: TrainingConfig,
        shape: BatchShape,
        *,
        use_gpu: bool,
        lr_factors: Mapping[str, float] | None = None,
    ) -> None:
        deepspeed = import_deepspeed(use_gpu=use_gpu)
        self.training = training
        self.shape = shape
        self.stage = int(training.zero_stage)
        groups = parameter_groups(model, training.weight_decay, lr_factors)
        self.names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.group_names = [[self.names[parameter] for parameter in group["params"]] for group in groups]
        optimizer = torch.optim.AdamW(
            groups,
            lr=training.learning_rate,
            betas=(training.beta1, training.beta2),
            eps=training.epsilon,
            fused=not training.offload_optimizer,
        )
        if training.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=deepspeed_config(training, shape), dist_init_required=False
        )
        if training.compile:
            self.engine.compile()
        self.engine.module_state_dict = partial(_trained_state, self.engine.module)
        self.grad_norm: float | None = None
        self.pull = 0.0
        """Strength of the pull towards `start`, per unit of learning rate."""
        self.start: list[list[Tensor]] = []

    @property
    def module(self) -> nn.Module:
        return self.engine.module

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        """The innermost optimizer, whose state holds the (sharded) moments."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def backward(self, weighted_nll: Tensor, global_targets: float) -> None:
        """Accumulate the gradient of `weighted_nll / global_targets`, summed over micro-batches and workers.

        DeepSpeed divides by accumulation steps and by workers; both are undone, so that the update is that of the
        token mean over the whole global batch however it is cut.
        """
        scale = self.shape.accumulation * self.shape.world / global_targets
        self.engine.backward(weighted_nll * scale)

    def step(self, *, last: bool, learning_rate: float) -> None:
        """Count a micro-batch; the last one of a global batch clips and updates."""
        if last:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate * group["lr_factor"]
            if self.pull:
                self._pull(learning_rate)
            if self.stage == 0:
                limit = self.training.clip_norm or float("inf")
                parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
                self.grad_norm = float(nn.utils.clip_grad_norm_(parameters, limit, foreach=True))
        self.engine.step()
        if last and self.stage:
            norm = self.engine.get_global_grad_norm()
            self.grad_norm = None if norm is None else float(norm)

    def masters(self) -> list[list[Tensor]]:
        """The fp32 tensors that the optimizer updates, by parameter group: this worker's share of them."""
        if self.stage < 3:
            return [list(group["params"]) for group in self.optimizer.param_groups]
        groups: list[list[Tensor]] = [[] for _ in self.optimizer.param_groups]
        for index, flat in enumerate(self.optimizer.fp32_partitioned_groups_flat):
            groups[self.optimizer.sub_group_to_group_id[index]].append(flat)
        return groups

    def copied_masters(self) -> list[list[Tensor]]:
        return [[tensor.detach().clone() for tensor in group] for group in self.masters()]

    def pull_to(self, start: list[list[Tensor]], strength: float) -> None:
        """From now on pull the weights towards `start` (another engine's `copied_masters`) at every step."""
        self.start, self.pull = start, strength

    def _pull(self, learning_rate: float) -> None:
        """Decoupled, like AdamW's decay, and before the update: weights -= rate x pull x (weights - start)."""
        with torch.no_grad():
            for group, weights, starts in zip(self.optimizer.param_groups, self.masters(), self.start, strict=True):
                step = learning_rate * group["lr_factor"] * self.pull
                for weight, start in zip(weights, starts, strict=True):
                    weight.lerp_(start, step)

    # --- state -----------------------------------------------------------------------------------------------

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        for parameter, name in self.names.items():
            yield name, parameter

    def reset_optimizer(self) -> None:
        """Moments and step count back to zero: exactly a fresh AdamW."""
        for state in self.torch_optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()

    def settings(self) -> list[dict[str, Any]]:
        """Learning rate, betas, epsilon and weight decay of each parameter group."""
        return [{key: value for key, value in g.items() if key != "params"} for g in self.optimizer.param_groups]

    def set_settings(self, settings: list[dict[str, Any]]) -> None:
        for group, values in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(values)

    def set_state(self, states: Mapping[str, dict[str, Tensor]], *, optimizer_step: float) -> None:
        """Load fp32 weights and moments by parameter name, whatever the worker count and ZeRO stage.

        `states[name]` holds `fp32` and both moments in full shape. What it lacks (of parameters that were frozen, or
        not there, when it was saved) starts as in a fresh optimizer. The weights must already have been in the model
        when it was handed to DeepSpeed.
        """
        if self.stage == 0:
            self._set_plain(states, optimizer_step)
        else:
            self._set_sharded(states, optimizer_step)

    def _set_plain(self, states: Mapping[str, dict[str, Tensor]], optimizer_step: float) -> None:
        for name, parameter in self.trainable():
            moments = {key: value.to(parameter.device).clone() for key, value in _moments(states, name, parameter)}
            self.torch_optimizer.state[parameter] = {"step": torch.tensor(float(optimizer_step)), **moments}

    def _set_sharded(self, states: Mapping[str, dict[str, Tensor]], optimizer_step: float) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        self._prime()
        for name, parameter in self.trainable():
            if name in states:
                safe_set_full_fp32_param(parameter, full_shape(states[name]["fp32"], parameter).to(parameter.device))
            for key, value in _moments(states, name, parameter):
                safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)
        for state in self.torch_optimizer.state.values():
            state["step"] = torch.tensor(float(optimizer_step))

    def _prime(self) -> None:
        """One update with learning rate 0, because DeepSpeed makes optimizer state only at the first one."""
        device = next(self.module.parameters()).device
        ids = torch.zeros(1, 2, dtype=torch.long, device=device)
        decay = [group["weight_decay"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = group["weight_decay"] = 0.0  # the pull is no part of `engine.step` and does nothing here
        for _ in range(self.shape.accumulation):
            self.engine.backward(self.engine(input_ids=ids, use_cache=False).logits.float().sum() * 0.0)
            self.engine.step()
        for group, value in zip(self.optimizer.param_groups, decay, strict=True):
            group["weight_decay"] = value
        if self.stage < 3:
            # DeepSpeed links moments to parameters after its first *group's* step, when later groups have none yet.
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def full_state_dict(self) -> dict[str, Tensor] | None:
        """Weights in full shape on rank 0 (None elsewhere), in the training precision."""
        if self.stage == 3:
            return self.engine._zero3_consolidated_16bit_state_dict()
        return self.module.state_dict() if self.engine.global_rank == 0 else None


def _trained_state(module: nn.Module, *, exclude_frozen_parameters: bool = False, **kwargs: Any) -> dict[str, Tensor]:
    """`DeepSpeedEngine.module_state_dict`, which forgets that a frozen weight may also go by the name of one tied to
    it."""
    state = module.state_dict(**kwargs)
    frozen = {p.data_ptr() for p in module.parameters() if not p.requires_grad} if exclude_frozen_parameters else set()
    return {name: value for name, value in state.items() if not value.numel() or value.data_ptr() not in frozen}


def _moments(
    states: Mapping[str, dict[str, Tensor]], name: str, parameter: nn.Parameter
) -> Iterator[tuple[str, Tensor]]:
    """Both moments of a parameter in full shape; zeros where there are none."""
    state = states.get(name, {})
    shape = getattr(parameter, "ds_shape", parameter.shape)
    for key in MOMENTS:
        yield key, full_shape(state[key], parameter) if key in state else torch.zeros(shape)


def full_shape(value: Tensor, parameter: Tensor) -> Tensor:
    """A converted tensor in the parameter's shape: ZeRO-3's come flat, with padding behind."""
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return value.flatten()[: shape.numel()].view(shape)
