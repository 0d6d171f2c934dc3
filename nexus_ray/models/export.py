"""The Hugging Face form of a trained model: what plain `transformers` and vLLM load.

Invariant: the folder appears whole or not at all (written beside, renamed last).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from nexus_ray.models.build import no_progress_bars

NOT_TOKENIZER = ("config.json", "generation_config.json", "manifest.json", "*.safetensors", "*.bin", "*.index.json")


def export_model(
    model: Any,
    tokenizer_dir: str | Path,
    out_dir: str | Path,
    *,
    state_dict: dict[str, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write safetensors, config, generation config and tokenizer to the local folder `out_dir`, replacing it.

    `state_dict` holds the weights where the model's own are partitioned or of lower precision; `dtype` is what they
    are saved in (default: as they are). Returns `out_dir`.
    """
    inner = getattr(model, "module", model)
    out_dir = Path(out_dir)
    beside = out_dir.with_name(f".{out_dir.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    weights = _cast(inner.state_dict() if state_dict is None else state_dict, dtype)
    saved_as = next(tensor.dtype for tensor in weights.values() if tensor.is_floating_point())
    with no_progress_bars(), _os_errors():
        inner.save_pretrained(beside, state_dict=weights)  # empties `weights` as it goes
    shutil.copytree(tokenizer_dir, beside, ignore=shutil.ignore_patterns(*NOT_TOKENIZER), dirs_exist_ok=True)
    _record_dtype(beside / "config.json", saved_as)
    shutil.rmtree(out_dir, ignore_errors=True)
    beside.rename(out_dir)
    return out_dir


@contextmanager
def _os_errors() -> Iterator[None]:
    """The OSError behind what safetensors reports of a failed write."""
    try:
        yield
    except SafetensorError as error:
        if found := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
        raise


def _cast(state_dict: dict[str, torch.Tensor], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Detached copies on the CPU in `dtype`; tensors that share memory (tied ones) still do."""
    done: dict[tuple[int, torch.Size], torch.Tensor] = {}
    result = {}
    for name, tensor in state_dict.items():
        key = (tensor.data_ptr(), tensor.shape)
        if key not in done:
            done[key] = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        result[name] = done[key]
    return result


def _record_dtype(config_file: Path, dtype: torch.dtype) -> None:
    """`save_pretrained` notes the live model's precision; note that of the saved weights instead."""
    config = json.loads(config_file.read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
