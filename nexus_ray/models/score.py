"""Log-likelihoods of packed rows: the one place that turns rows of tokens into model inputs and losses.

Invariant: what a row scores depends on that row alone. Attention and positions stay inside each segment (one
document's part of a row), and how a batch is presented to the model never depends on the other rows in it.

Wire format of a row (int32, S+1 wide): `PAD` is no token; `t >= 0` is token t continuing its segment; `~t` (= -t-1)
is token t starting a segment. With the bit `NO_LOSS` set in t it is token t - NO_LOSS, which is no target. Column c is
the input whose target is column c+1.

Legend: B rows, S input columns, V vocabulary entries.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from nexus_ray.corpora.reader import NO_LOSS, PAD

IGNORE = -100
"""Target value of a column that predicts nothing."""


@dataclass(frozen=True)
class Rows:
    """Decoded rows, int64 tensors of shape [B, S]."""

    input_ids: torch.Tensor
    """Token ids; 0 in padding columns."""
    targets: torch.Tensor
    """The next token of the same segment, or `IGNORE`."""
    position_ids: torch.Tensor
    """Positions counted from the start of each segment; 0 in padding columns."""
    segment_ids: torch.Tensor
    """Number of the segment inside its row, ascending from 0; -1 in padding columns."""

    def to(self, device: torch.device | str) -> Rows:
        """The same rows on `device`."""
        return Rows(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))

    def __len__(self) -> int:
        return len(self.input_ids)


def decode_rows(rows: np.ndarray | torch.Tensor) -> Rows:
    """Model inputs and targets of wire-format rows, int32 [B, S+1], on the device the rows are on.

    A segment starts at every `~t`, at column 0 and after padding. A column's target is the token of the next column
    unless that starts a segment, is padding or carries `NO_LOSS`.
    """
    wire_BT = torch.as_tensor(rows).long()
    pad_BT = wire_BT == int(PAD)
    starts_BT = (wire_BT < 0) | F.pad(pad_BT[:, :-1], (1, 0), value=True)
    flagged_BT = torch.where(wire_BT < 0, ~wire_BT, wire_BT).masked_fill_(pad_BT, 0)
    tokens_BT = flagged_BT & ~NO_LOSS
    ignored_BT = starts_BT | (flagged_BT != tokens_BT)
    columns_S = torch.arange(wire_BT.shape[1] - 1, device=wire_BT.device)
    starts_BS, pad_BS = starts_BT[:, :-1], pad_BT[:, :-1]
    first_BS = torch.where(starts_BS, columns_S, 0).cummax(dim=1).values
    real_starts_BS = starts_BS & ~pad_BS
    return Rows(
        input_ids=tokens_BT[:, :-1].contiguous(),
        targets=tokens_BT[:, 1:].masked_fill(ignored_BT[:, 1:], IGNORE),
        position_ids=columns_S - first_BS,
        segment_ids=(real_starts_BS.cumsum(dim=1) - 1).masked_fill_(pad_BS, -1),
    )


def attention_inputs(
    rows: Rows, attention: str = "sdpa", dtype: torch.dtype = torch.float32, *, single_segment: bool = False
) -> dict[str, Any]:
    """Keyword arguments of a causal LM's forward pass that keep attention inside each segment.

    `sdpa` gets a boolean mask [B, 1, S, S], `eager` and any CPU the same as an additive mask in `dtype`
    (`transformers` hands four-dimensional masks through unchanged). `flash_attention_2` gets no mask but all rows as
    one sequence [1, B*S], whose segments it derives from the positions. Padding columns attend to themselves, so that
    no softmax is empty.

    `single_segment=True` is the caller's promise that no row of the whole run holds more than one segment (a padded
    tail aside); the faster built-in causal mask is used then. It must not be decided batch by batch: another kernel
    rounds otherwise, and results would depend on how rows are spread over workers.
    """
    if single_segment:
        return {"input_ids": rows.input_ids}
    if attention == "flash_attention_2":
        return {"input_ids": rows.input_ids.reshape(1, -1), "position_ids": rows.position_ids.reshape(1, -1)}
    mask = segment_mask(rows.position_ids)
    if attention == "eager" or mask.device.type == "cpu":  # on a CPU, sdpa would convert a boolean one in every layer
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
    return {"input_ids": rows.input_ids, "position_ids": rows.position_ids, "attention_mask": mask}


def segment_mask(position_ids: torch.Tensor) -> torch.Tensor:
    """Boolean mask [B, 1, S, S], True where a query column (dim 2) may attend to a key column (dim 3)."""
    columns_S = torch.arange(position_ids.shape[1], device=position_ids.device)
    first_BS = columns_S - position_ids
    # A key column belongs to the query's segment and is not later, exactly if it lies in [first, query].
    mask_BSS = (columns_S >= first_BS[:, :, None]) & (columns_S <= columns_S[:, None])
    return mask_BSS[:, None]


def token_nll(model: Any, rows: Rows, *, single_segment: bool = False) -> torch.Tensor:
    """Negative log-likelihood of each target in nats, float32 [B, S]; 0 where a column has no target.

    `model` is a `transformers` causal LM or a wrapper that holds one as `.module` (DeepSpeed, DDP); `rows` are on its
    device. The log-softmax is taken in float32 whatever the model's precision. Differentiable.
    """
    return target_nll(row_logits(model, rows, single_segment=single_segment), rows.targets)


def row_logits(model: Any, rows: Rows, *, single_segment: bool = False) -> torch.Tensor:
    """Logits [B, S, V] (or [1, B*S, V] under `flash_attention_2`) of `rows`, in the model's precision."""
    inner = getattr(model, "module", model)
    inputs = attention_inputs(rows, inner.config._attn_implementation, inner.dtype, single_segment=single_segment)
    return model(**inputs, use_cache=False).logits


def target_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Float32 cross entropy [B, S] of `targets` [B, S] under `logits` (any shape that flattens to [B*S, V])."""
    flat = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(), targets.reshape(-1), ignore_index=IGNORE, reduction="none"
    )
    return flat.view_as(targets)
