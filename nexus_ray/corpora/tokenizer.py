"""The tokenizer of a run: trained here on chosen domains, or taken from a model; kept as a Hugging Face folder.

Invariant: the end-of-document token is one that the tokenizer itself names as EOS, never one guessed from a pad token.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nexus_ray.config.tree import ModelConfig, RunConfig, TokenizerConfig
from nexus_ray.corpora.chat_template import DEFAULT_TEMPLATE, TEMPLATE_FILE, check_template
from nexus_ray.corpora.conversations import contents
from nexus_ray.corpora.documents import DocumentManifest, held_out_threshold, iter_documents, load_index
from nexus_ray.corpora.manifest import MANIFEST_FILE, stable_hash
from nexus_ray.corpora.reader import NO_LOSS
from nexus_ray.errors import ConfigError, DataError
from nexus_ray.hub import hub_answers
from nexus_ray.storage import Storage

EOS = "<|endoftext|>"
VERSION = 1
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    TEMPLATE_FILE,
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True)
class TokenizerManifest:
    """What is known of a tokenizer without loading it."""

    fingerprint: str
    """Hash of `tokenizer.json` and the EOS id."""
    vocab_size: int
    eos_id: int
    eos_token: str
    source: str
    """For people: how it came about."""


@dataclass(frozen=True)
class TrainingPart:
    """One domain's share in training a tokenizer: the training documents of its first batch."""

    documents: DocumentManifest
    held_out_fraction: float
    chat: bool = False
    """Whether its documents are conversations, of which the tokenizer sees what is said."""


def trained_domains(config: RunConfig) -> tuple[str, ...]:
    """Domains whose training documents the tokenizer is trained on; none for a ready-made tokenizer."""
    tokenizer = config.model.tokenizer
    if tokenizer.source != "train":
        return ()
    return tuple(tokenizer.train_on) or tuple(config.stages[0].domains)


def pretrained_name(model: ModelConfig) -> str:
    """Directory or hub id of a ready-made tokenizer. Raises ConfigError if the model has none."""
    if model.tokenizer.source != "model":
        return model.tokenizer.source
    if model.source != "scratch":
        return model.source
    if model.init_from:
        return model.init_from
    raise ConfigError(
        "model.tokenizer.source=model, but model.source=scratch has no tokenizer; set model.tokenizer.source to train, "
        "or to a directory or hub id"
    )


def chosen_template(config: TokenizerConfig, *, chat: bool) -> str | None:
    """The chat template to put into the tokenizer's folder; None to leave it as it comes.

    `chat` tells whether the run has conversations; only then does a tokenizer trained here get one unasked. Raises
    ConfigError if the file cannot be used.
    """
    setting = config.chat_template
    if setting is None:
        return DEFAULT_TEMPLATE if chat and config.source == "train" else None
    if setting == "default":
        return DEFAULT_TEMPLATE
    where = f"model.tokenizer.chat_template={setting!r}"
    try:
        text = Path(setting).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{where} cannot be read ({error}); name a file with a Jinja template, or `default`"
        ) from None
    check_template(text, where)
    return text


def folder_name(model: ModelConfig, parts: Sequence[TrainingPart], *, template: str | None = None) -> str:
    """Name of the tokenizer's folder, known before the work is done. `template` is that of `chosen_template`."""
    config = model.tokenizer
    chat = [] if template is None else [template]
    if config.source == "train":
        trained_on = [
            [part.documents.prefix(1).fingerprint, part.held_out_fraction, *(["chat"] if part.chat else [])]
            for part in parts
        ]
        settings = [VERSION, config.vocab_size, config.sample_bytes, trained_on, *chat]
        return f"bpe{config.vocab_size}-{stable_hash(settings)}"
    name = pretrained_name(model)
    folder = Path(name).expanduser()
    files = [folder / file for file in _FILES if (folder / file).is_file()]
    content = [[file.name, hashlib.sha256(file.read_bytes()).hexdigest()] for file in files]
    return f"{Path(name).name}-{stable_hash([VERSION, content or [name, model.revision], *chat])}"


def find_tokenizer(folder: Storage) -> TokenizerManifest | None:
    """The manifest of a tokenizer folder; None if it is not finished."""
    if not folder.exists(MANIFEST_FILE):
        return None
    try:
        return TokenizerManifest(**folder.read_json(MANIFEST_FILE))
    except (ValueError, TypeError) as error:
        raise DataError(f"{folder.path(MANIFEST_FILE)} cannot be used ({error}); delete {folder.uri}") from None


def check_init_tokenizer(model: ModelConfig, tokenizer: Storage) -> None:
    """Raise ConfigError if weights to start from came with another tokenizer than the one trained here.

    A folder that holds no model is not judged: building the model says so.
    """
    if model.init_from is None or model.tokenizer.source != "train":
        return
    export = Storage(model.init_from)
    if not export.exists("config.json"):
        return
    theirs = _digest(export) if export.exists("tokenizer.json") else "none"
    ours = _digest(tokenizer)
    if theirs != ours:
        raise ConfigError(
            f"model.init_from={model.init_from!r} came with another tokenizer than model.tokenizer.source='train' "
            f"makes here (SHA-256 of tokenizer.json: {theirs} there, {ours} here), so its embeddings would stand for "
            f"other tokens; set model.tokenizer: {{source: model}} to use the one it came with, or give "
            f"model.tokenizer and the domains it is trained on as in the run that made it"
        )


def _digest(folder: Storage) -> str:
    return hashlib.sha256(folder.read_bytes("tokenizer.json")).hexdigest()[:16]


def build_tokenizer(
    model: ModelConfig,
    parts: Sequence[TrainingPart],
    folder: Storage,
    *,
    progress: Callable[[str], None],
    template: str | None = None,
) -> TokenizerManifest:
    """Train or fetch the tokenizer into `folder`, with the chat template of `chosen_template` if there is one.

    Raises ConfigError if it has no EOS or cannot be loaded.
    """
    if model.tokenizer.source == "train":
        domains = ", ".join(part.documents.domain for part in parts)
        progress(f"tokenizer: training {model.tokenizer.vocab_size} entries on {domains}")
        files, eos_token = train_bpe(model.tokenizer, parts), EOS
        source = f"byte-level BPE trained on {domains}"
    else:
        progress(f"tokenizer: loading {pretrained_name(model)}")
        files, eos_token = _fetch_pretrained(model)
        source = pretrained_name(model)
    if template is not None:
        files = _with_template(files, template)
    manifest = _manifest(files["tokenizer.json"], eos_token, source)
    for name, data in files.items():
        folder.write_bytes(data, name)
    folder.write_json(asdict(manifest), MANIFEST_FILE)
    return manifest


def _with_template(files: dict[str, bytes], template: str) -> dict[str, bytes]:
    """The tokenizer's files with this chat template as the only one."""
    kept = {name: data for name, data in files.items() if not name.endswith(".jinja")}
    settings = json.loads(kept["tokenizer_config.json"])
    settings.pop("chat_template", None)
    kept["tokenizer_config.json"] = (json.dumps(settings, indent=1, ensure_ascii=False) + "\n").encode()
    return {**kept, TEMPLATE_FILE: template.encode()}


def _manifest(data: bytes, eos_token: str, source: str) -> TokenizerManifest:
    from tokenizers import Tokenizer

    vocabulary = Tokenizer.from_str(data.decode()).get_vocab(with_added_tokens=True)
    if eos_token not in vocabulary:
        raise ConfigError(
            f"model.tokenizer.source: {source} names {eos_token!r} as its end-of-document token, which is not in its "
            f"vocabulary; mend its tokenizer_config.json, or set model.tokenizer.source: train"
        )
    if max(vocabulary.values()) >= NO_LOSS:
        raise ConfigError(f"model.tokenizer.source: {source} has a token of number {NO_LOSS} or more; use another")
    eos_id = vocabulary[eos_token]
    fingerprint = stable_hash([hashlib.sha256(data).hexdigest(), eos_id])
    return TokenizerManifest(fingerprint, max(vocabulary.values()) + 1, eos_id, eos_token, source)


# --- training ----------------------------------------------------------------------------------------------------


def train_bpe(config: TokenizerConfig, parts: Sequence[TrainingPart]) -> dict[str, bytes]:
    """Files of a byte-level BPE, the same for the same documents: any text can be encoded, no byte is unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=2,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    budget = config.sample_bytes // len(parts)
    tokenizer.train_from_iterator((text for part in parts for text in sample_texts(part, budget)), trainer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
    }
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": (json.dumps(settings, indent=1) + "\n").encode(),
        "special_tokens_map.json": (json.dumps({"eos_token": EOS}, indent=1) + "\n").encode(),
    }


def sample_texts(part: TrainingPart, budget: int) -> Iterator[str]:
    """Training texts of the first batch, at most `budget` bytes: all of them, or those a hash picks evenly."""
    documents = part.documents.prefix(1)
    index = load_index(documents)
    train = ~index.held_out(part.held_out_fraction)
    total = int(index.sizes[train].sum())
    first = held_out_threshold(part.held_out_fraction)
    last = first + (2**64 - first) * min(budget, total) // max(total, 1)
    left = budget
    for row in iter_documents(documents, split="train", held_out_fraction=part.held_out_fraction):
        size = len(row["text"].encode())
        if int(row["id"], 16) < last and size <= left:
            left -= size
            yield contents(row["text"]) if part.chat else row["text"]


# --- ready-made tokenizers -----------------------------------------------------------------------------------------


def _fetch_pretrained(model: ModelConfig) -> tuple[dict[str, bytes], str]:
    """Files and EOS of a tokenizer from a directory or the hub. Raises ConfigError."""
    name = pretrained_name(model)
    tokenizer = _load_pretrained(model, name)
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ConfigError(
            f"model.tokenizer.source: {name} has no fast tokenizer (tokenizer.json); convert it, or set "
            f"model.tokenizer.source: train"
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"model.tokenizer.source: {name} has no EOS token, which closes every document (a pad token is no "
            f"substitute); add eos_token to its tokenizer_config.json, or set model.tokenizer.source: train"
        )
    with tempfile.TemporaryDirectory(prefix="nexus-ray-") as folder:
        tokenizer.save_pretrained(folder)
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    if "tokenizer.json" not in files:
        raise ConfigError(f"model.tokenizer.source: {name} saves no tokenizer.json; set model.tokenizer.source: train")
    return files, str(tokenizer.eos_token)


def _load_pretrained(model: ModelConfig, name: str) -> Any:
    from transformers import AutoTokenizer

    cached_only = not Path(name).expanduser().is_dir() and not hub_answers()
    try:
        return AutoTokenizer.from_pretrained(
            name,
            revision=model.revision or "main",
            trust_remote_code=model.trust_remote_code,
            local_files_only=cached_only,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        field = "model.source" if model.tokenizer.source == "model" else "model.tokenizer.source"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if cached_only:
            reason = "the hub cannot be reached and the local cache does not hold it"
        train = ", or set model.tokenizer.source: train" if model.source == "scratch" else ""
        raise ConfigError(
            f"{field}={name!r}: no tokenizer can be loaded ({reason}); give a directory with tokenizer.json, or "
            f"a hub id (with the network, or from the cache){train}"
        ) from None
