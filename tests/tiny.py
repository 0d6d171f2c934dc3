"""The smallest useful model, tokenizer, rows and token shards, for tests."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from nexus_ray.config.tree import Architecture, ModelConfig
from nexus_ray.corpora.manifest import ROW_GROUP_TOKENS, Shard, TokenManifest
from nexus_ray.corpora.reader import PAD

VOCAB_SIZE = 300
EOS_ID = 0
TEXTS = (
    "To be, or not to be, that is the question.",
    "def add(a, b):\n    return a + b\n",
    "The river rises in the hills and flows to the sea.",
)


def tiny_model_config(**changes: Any) -> ModelConfig:
    """Two layers of 32; grouped key-value heads. Keyword arguments replace `ModelConfig` fields."""
    architecture = Architecture(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, max_seq_len=128)
    return ModelConfig(**{"architecture": architecture, **changes})


def tiny_model(*, seed: int = 0, vocab_size: int = VOCAB_SIZE, **changes: Any) -> Any:
    """A float32 Llama of 40,000 parameters."""
    from nexus_ray.models.build import build_model

    return build_model(tiny_model_config(**changes), vocab_size=vocab_size, eos_id=EOS_ID, seed=seed)


def tiny_tokenizer(folder: Path) -> Path:
    """A byte-level BPE of `VOCAB_SIZE` entries in the form `AutoTokenizer` loads; entry 0 is the end of a document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return folder


def random_documents(
    count: int, *, seed: int = 0, low: int = 2, high: int = 40, vocab_size: int = VOCAB_SIZE
) -> list[NDArray[np.int32]]:
    """Documents of random tokens, `low` to `high` long with the closing end-of-document token."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(low, high + 1, size=count)
    bodies = [generator.integers(1, vocab_size, size=length - 1) for length in lengths]
    return [np.append(body, EOS_ID).astype(np.int32) for body in bodies]


def pack_row(documents: Sequence[NDArray[np.int32]], seq_len: int) -> NDArray[np.int32]:
    """Whole documents side by side in one wire-format row, int32 [1, S+1]."""
    row = np.full(seq_len + 1, PAD, dtype=np.int32)
    column = 0
    for tokens in documents:
        row[column : column + len(tokens)] = tokens
        row[column] = ~tokens[0]
        column += len(tokens)
    return row[None]


def write_tokens(
    root: Path,
    documents: Sequence[NDArray[np.int32]],
    *,
    domain: str = "tiny",
    split: str = "held_out",
    shards: int = 1,
    vocab_size: int = VOCAB_SIZE,
) -> TokenManifest:
    """Token shards of `documents`, dealt out in order to `shards` files; a text has three bytes per token."""
    folder = root / split
    folder.mkdir(parents=True)
    parts = np.array_split(np.arange(len(documents)), shards)
    written = [_write_shard(folder, number, [documents[i] for i in part]) for number, part in enumerate(parts)]
    return TokenManifest(
        domain=domain,
        split=split,
        root=str(root),
        tokenizer="tiny",
        vocab_size=vocab_size,
        eos_id=EOS_ID,
        shards=tuple(written),
    )


def _write_shard(folder: Path, number: int, documents: Sequence[NDArray[np.int32]]) -> Shard:
    lengths = np.asarray([len(tokens) for tokens in documents], dtype=np.int32)
    table = {
        "id": [f"{number}-{i}" for i in range(len(documents))],
        "offset": np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64),
        "tokens": lengths,
        "bytes": 3 * (lengths - 1),
        "predicted_bytes": 3 * (lengths - 2),
    }
    tokens = np.concatenate(list(documents)).astype(np.int32)
    file = folder / f"tokens-{number:05}.parquet"
    pq.write_table(
        pa.table({"tokens": tokens}),
        file,
        row_group_size=ROW_GROUP_TOKENS,
        use_dictionary=False,
        compression="none",
        write_page_checksum=True,
    )
    pq.write_table(pa.table(table), folder / f"documents-{number:05}.parquet")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return Shard(file.name, len(tokens), len(documents), file.stat().st_size, digest, batch=0)
