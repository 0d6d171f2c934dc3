"""Tokenizers that come with a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nexus_ray.config.tree import ModelConfig
from nexus_ray.errors import ConfigError
from nexus_ray.hub import hub_answers


def load_tokenizer(config: ModelConfig, *, field: str) -> Any:
    """The `transformers` tokenizer of a folder or hub id; `field` is the config path that names it, for messages.

    Raises ConfigError if none can be read.
    """
    from transformers import AutoTokenizer

    folder = Path(config.source).expanduser().is_dir()
    try:
        return AutoTokenizer.from_pretrained(
            config.source, revision=config.revision or "main", local_files_only=folder or not hub_answers()
        )
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{field}={config.source!r}: no tokenizer can be read there ({reason}); name a folder with config, "
            f"weights and tokenizer, or a Hugging Face id that this machine can reach"
        ) from None
