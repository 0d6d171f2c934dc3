"""The fingerprint of the weights a run starts from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from nexus_ray.config.tree import ModelConfig
from nexus_ray.models.build import model_config

_WEIGHTS = ("*.safetensors", "*.bin", "config.json")


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
        with path.open("rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests
