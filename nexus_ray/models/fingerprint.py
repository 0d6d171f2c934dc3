"""Fingerprints of weights: of those a run starts from, and of those in memory."""

from __future__ import annotations

import hashlib
import json
import re
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from nexus_ray.config.tree import ModelConfig
from nexus_ray.models.build import model_config

_WEIGHTS = ("*.safetensors", "*.bin", "config.json")
_HASHED_AT_ONCE = 1 << 24
ADAPTER_PARAMETER = r"\.(lora_\w+|osft_core)(\.|$)"
"""Matches the names of parameters that `lora` and `osft` add to a model."""


def model_fingerprint(config: ModelConfig, *, vocab_size: int, eos_id: int, seed: int) -> str:
    """Twelve hex digits of all that determines the initial weights: architecture and seed, files, or hub revision."""
    source = config.init_from or config.source
    if source == "scratch":
        content = {"architecture": config.architecture.model_dump(), "vocab": vocab_size, "eos": eos_id, "seed": seed}
    elif Path(source).expanduser().is_dir():
        content = {"files": _hash_files(Path(source).expanduser())}
    else:
        commit = getattr(model_config(config), "_commit_hash", None) or config.revision
        content = {"source": source, "revision": commit}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _hash_files(folder: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern)):
        state = path.stat()
        digests[path.name] = _hash_file(path, state.st_size, state.st_mtime_ns)
    return digests


@lru_cache(maxsize=1024)
def _hash_file(path: Path, size: int, changed: int) -> str:
    """Read once by this process while size and time of change stand."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def base_sha256(model: nn.Module) -> str:
    """64 hex digits of the parameters' names, shapes and values, those of adapters left out.

    The same before and after adapters are put on, whatever the device. Values are hashed as float32, which holds those
    of bfloat16 and float16 exactly: a model that was stored in bfloat16 hashes alike when loaded in float32. To be
    taken before ZeRO-3 partitions the weights.
    """
    named = {plain_name(name): p for name, p in model.named_parameters() if not re.search(ADAPTER_PARAMETER, name)}
    digest = hashlib.sha256()
    for name, parameter in sorted(named.items()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        for part in parameter.detach().reshape(-1).split(_HASHED_AT_ONCE):
            exact = part.float() if part.is_floating_point() else part
            digest.update(exact.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def plain_name(name: str) -> str:
    """What the base model calls a parameter that an adapted one calls `name`."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")
