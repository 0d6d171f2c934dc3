"""Models from a config: a small Llama from scratch, or any Hugging Face causal LM.

Invariant: building a model is a pure function of (config, vocabulary, seed); the global random state stays as it was.
Nothing here reaches the network for `model.source: scratch`, a directory, or what the local hub cache holds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from nexus_ray.config.tree import Architecture, ModelConfig
from nexus_ray.errors import ConfigError
from nexus_ray.hub import hub_answers

_RECURRENT = ("mamba", "rwkv", "recurrent_gemma", "xlstm")


def build_model(
    config: ModelConfig, *, vocab_size: int, eos_id: int, seed: int, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The model a run starts from, on the CPU, in `dtype`, without dropout.

    `vocab_size` and `eos_id` are the tokenizer's; a pretrained model may have more embeddings than its tokenizer has
    entries, never fewer. `seed` initialises a model from scratch.

    Raises:
        ConfigError: the source is unknown, unreachable or unfit; the message names the field and the way out.
    """
    if config.init_from is not None:
        model = _load_weights(config, "model.init_from", config.init_from, dtype)
        _check_same_shape(config, model.config, vocab_size)
    elif config.source == "scratch":
        model = _from_scratch(config, vocab_size=vocab_size, eos_id=eos_id, seed=seed, dtype=dtype)
    else:
        model = _load_weights(config, "model.source", config.source, dtype)
    _check_vocabulary(config, model, vocab_size)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def check_init_from(config: ModelConfig, *, vocab_size: int) -> None:
    """Raise ConfigError if `model.init_from` is no model of the configured shape; reads no weights."""
    if config.init_from is not None:
        _check_same_shape(config, _load_config(config, "model.init_from", config.init_from), vocab_size)


def llama_config(architecture: Architecture, *, vocab_size: int, eos_id: int | None = None) -> LlamaConfig:
    """The `transformers` config of a model from scratch. No BOS or PAD: an id nobody trains must not be special."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=architecture.hidden_size,
        intermediate_size=architecture.feed_forward_size,
        num_hidden_layers=architecture.num_layers,
        num_attention_heads=architecture.num_heads,
        num_key_value_heads=architecture.num_kv_heads or architecture.num_heads,
        max_position_embeddings=architecture.max_seq_len,
        rope_parameters={"rope_type": "default", "rope_theta": architecture.rope_theta},
        tie_word_embeddings=architecture.tie_embeddings,
        attention_dropout=0.0,
        bos_token_id=None,
        pad_token_id=None,
        eos_token_id=eos_id,
    )


def model_config(config: ModelConfig) -> PretrainedConfig:
    """The `transformers` config that a pretrained `model.source` comes with; reads no weights."""
    return _load_config(config, "model.source", config.source)


def context_length(config: ModelConfig) -> int | None:
    """Longest sequence in tokens that the model's positions (or its sliding window) are made for; None if unbounded."""
    if config.source == "scratch":
        return config.architecture.max_seq_len
    text = model_config(config).get_text_config()
    limits = [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    if getattr(text, "use_sliding_window", True):
        # A packed row's mask knows segments but no window: rows longer than it would attend further than the model may.
        limits.append(getattr(text, "sliding_window", None))
    known = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    return min(known) if known else None


def count_parameters(config: ModelConfig, vocab_size: int) -> int:
    """Number of parameters, tied ones once. `vocab_size` matters for a model from scratch only. Allocates nothing."""
    if config.source != "scratch":
        return sum(parameter.numel() for parameter in meta_model(config, vocab_size).parameters())
    a = config.architecture
    kv_size = a.hidden_size // a.num_heads * (a.num_kv_heads or a.num_heads)
    attention = 2 * a.hidden_size**2 + 2 * a.hidden_size * kv_size
    block = attention + 3 * a.hidden_size * a.feed_forward_size + 2 * a.hidden_size
    embeddings = vocab_size * a.hidden_size * (1 if a.tie_embeddings else 2)
    return embeddings + a.num_layers * block + a.hidden_size


def meta_model(config: ModelConfig, vocab_size: int) -> PreTrainedModel:
    """The model's modules without storage (on PyTorch's `meta` device), to count and name parameters."""
    shape = llama_config(config.architecture, vocab_size=vocab_size) if config.source == "scratch" else None
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            shape or model_config(config), trust_remote_code=config.trust_remote_code
        )


def apply_freeze(model: torch.nn.Module, patterns: list[str]) -> list[str]:
    """Stop training the parameters whose name a pattern matches anywhere; returns their names in model order.

    Raises:
        ConfigError: a pattern matches no parameter, or nothing would be left to train.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in parameters):
            some = ", ".join(list(parameters)[:3] + list(parameters)[-1:])
            raise ConfigError(
                f"training.freeze: {pattern!r} matches no parameter; names look like {some} "
                f"(tied output embeddings go by the name of the input embeddings)"
            )
    frozen = [name for name in parameters if any(re.search(pattern, name) for pattern in patterns)]
    if len(frozen) == len(parameters):
        raise ConfigError(f"training.freeze={patterns} matches every parameter; leave something to train")
    for name in frozen:
        parameters[name].requires_grad_(False)
    return frozen


def parameter_groups(
    model: torch.nn.Module, weight_decay: float, lr_factors: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """AdamW groups of the trainable parameters: decay on matrices (embeddings too), none on norms and biases.

    `lr_factors` gives parameters, by name, a learning rate that is this share of the others'; groups say theirs
    under `lr_factor`.
    """
    groups: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            size = getattr(parameter, "ds_shape", parameter.shape)
            groups.setdefault(((lr_factors or {}).get(name, 1.0), len(size) >= 2), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decayed else 0.0, "lr_factor": factor}
        for (factor, decayed), parameters in sorted(groups.items(), key=lambda item: (-item[0][0], not item[0][1]))
    ]


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Silences the bars that `transformers` draws while it reads and writes weights."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _from_scratch(
    config: ModelConfig, *, vocab_size: int, eos_id: int, seed: int, dtype: torch.dtype
) -> PreTrainedModel:
    shape = llama_config(config.architecture, vocab_size=vocab_size, eos_id=eos_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _attending(
            config,
            lambda attention: AutoModelForCausalLM.from_config(
                shape, attn_implementation=attention, dtype=torch.float32
            ),
        )
    return model.to(dtype)


def _load_weights(config: ModelConfig, field: str, source: str, dtype: torch.dtype) -> Any:
    if base := _adapter_base(source):
        from nexus_ray.models.lora import load_adapter, merge_lora

        return merge_lora(load_adapter(_load_weights(config, field, base, dtype), source), keep_base=False)
    shape = _load_config(config, field, source)  # first: it fails fast, and knows the exact revision
    for name in ("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout", "dropout"):
        if getattr(shape, name, None):
            setattr(shape, name, 0.0)

    def load(attention: str) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(
            source, config=shape, dtype=dtype, attn_implementation=attention, **_hub_arguments(config, field, source)
        )

    try:
        with torch.random.fork_rng(devices=[]), no_progress_bars():
            torch.manual_seed(0)
            return _attending(config, load)
    except OSError as error:
        raise _unreadable(field, source, error) from error


def _attending(config: ModelConfig, build: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    """Build with the configured attention; its refusal becomes a message about `model.attention`."""
    try:
        return build(config.attention)
    except (ImportError, ValueError) as error:
        if "attention" not in str(error).lower() and "flash" not in str(error).lower():
            raise
        raise ConfigError(
            f"model.attention={config.attention} does not work here: {_first_line(error)}; use sdpa or eager"
        ) from error


def _hub_arguments(config: ModelConfig, field: str, source: str) -> dict[str, Any]:
    local = Path(source).expanduser().is_dir()
    return {
        "revision": (config.revision if field == "model.source" else None) or "main",
        "trust_remote_code": config.trust_remote_code,
        "local_files_only": local or not hub_answers(),
    }


def _adapter_base(source: str) -> str | None:
    """Where the base of an exported adapter is; None if `source` is no folder of an adapter."""
    file = Path(source).expanduser() / "base.json"
    return str(json.loads(file.read_text())["reference"]) if file.is_file() else None


def _load_config(config: ModelConfig, field: str, source: str) -> PretrainedConfig:
    if base := _adapter_base(source):
        return _load_config(config, field, base)
    _check_source(field, source)
    try:
        shape = AutoConfig.from_pretrained(source, **_hub_arguments(config, field, source))
    except OSError as error:
        raise _unreadable(field, source, error) from error
    except (ValueError, KeyError) as error:
        remedy = "use a causal language model that this transformers version knows"
        if "remote_code" in str(error):
            remedy = "it brings its own Python code: set model.trust_remote_code: true if you trust that"
        raise ConfigError(f"{field}={source} cannot be used: {_first_line(error)}; {remedy}") from error
    text = shape.get_text_config()
    layers = getattr(text, "layer_types", None) or []
    if text.model_type.startswith(_RECURRENT) or any("linear" in kind or "mamba" in kind for kind in layers):
        raise ConfigError(
            f"{field}={source} is a recurrent model ({text.model_type}): its state would leak between the documents "
            f"of a packed row; use a model with attention in every layer"
        )
    return shape


def _check_source(field: str, source: str) -> None:
    """A path must be an exported model; anything else must look like a hub id."""
    folder = Path(source).expanduser()
    looks_local = source.startswith(("/", "./", "../", "~")) or source.count("/") > 1
    if folder.exists() or looks_local or field == "model.init_from":
        if not (folder / "config.json").is_file():
            reason = "has no config.json" if folder.is_dir() else "is not a folder"
            raise ConfigError(
                f"{field}={source} {reason}; name a folder that a model was saved to (such as a run's "
                f"stages/00-NAME/model)" + ("" if field == "model.init_from" else ", a Hugging Face id, or `scratch`")
            )
    elif not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", source):
        raise ConfigError(f"{field}={source} is neither a folder nor a Hugging Face id (`name` or `owner/name`)")


def _unreadable(field: str, source: str, error: Exception) -> ConfigError:
    if not Path(source).expanduser().is_dir() and not hub_answers():
        reason = f"{huggingface_hub.constants.ENDPOINT} cannot be reached and the local cache does not hold it."
    else:
        reason = _first_line(error)
    return ConfigError(
        f"{field}={source} could not be loaded: {reason} Check the name and the network (or HF_TOKEN for "
        f"a gated model; HF_HUB_OFFLINE=1 reads only what is cached), name a local folder, or use `scratch`"
    )


def _check_vocabulary(config: ModelConfig, model: PreTrainedModel, vocab_size: int) -> None:
    embeddings = model.get_input_embeddings().weight.shape[0]
    if vocab_size > embeddings:
        field = "model.init_from" if config.init_from else "model.source"
        raise ConfigError(
            f"{field}={config.init_from or config.source} has {embeddings} embeddings, fewer than the tokenizer's "
            f"{vocab_size} entries; use the model's own tokenizer (model.tokenizer.source: model)"
        )


def _check_same_shape(config: ModelConfig, found: PretrainedConfig, vocab_size: int) -> None:
    """Weights of `init_from` must belong to the architecture that the config describes."""
    if config.source != "scratch":
        return
    expected = llama_config(config.architecture, vocab_size=vocab_size)
    names = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    for name in (*names, "num_attention_heads", "num_key_value_heads", "tie_word_embeddings", "rope_parameters"):
        here, there = getattr(expected, name), getattr(found, name, None)
        if here != there:
            raise ConfigError(
                f"model.init_from={config.init_from} has {name}={there}, the config says {here}; "
                f"use the model.architecture and tokenizer of the run it comes from"
            )


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    line = text[0] if text else type(error).__name__
    return line if line.endswith(".") else line + "."
