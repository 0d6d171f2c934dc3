"""Token shards: every document whole, closed by one EOS, and the same bytes however the work is cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus_ray.config.tree import ModelConfig
from nexus_ray.corpora.documents import DocumentManifest, document_id, iter_documents
from nexus_ray.corpora.manifest import ROW_GROUP_TOKENS, TokenManifest
from nexus_ray.corpora.tokenizer import EOS, TokenizerManifest, TrainingPart, build_tokenizer
from nexus_ray.corpora.tokens import Encoder, _groups, load_encoder, plan_shards, write_shard
from nexus_ray.errors import DataError
from nexus_ray.storage import Storage
from tests.corpus import sentences
from tests.unit.corpora.test_documents import manifest_of

FRACTION = 0.2
TEXTS = [*sentences(400), f"a {EOS} inside", "ünïcödé 漢字 🙂", f"{EOS}"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[DocumentManifest, Storage, TokenizerManifest]:
    root = tmp_path_factory.mktemp("corpus")
    documents = manifest_of(root / "documents", TEXTS)
    folder = Storage(str(root / "tokenizer"))
    model = ModelConfig.model_validate({"tokenizer": {"vocab_size": 320}})
    part = TrainingPart(documents, FRACTION)
    return documents, folder, build_tokenizer(model, [part], folder, progress=lambda message: None)


def tokenise(corpus: tuple, root: Path, split: str = "train", shard_tokens: int = 2048) -> TokenManifest:
    documents, folder, tokenizer = corpus
    empty = TokenManifest(
        "code", split, str(root), tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eos_id, (), batches=0
    )
    specs = plan_shards(documents, empty, held_out_fraction=FRACTION, shard_tokens=shard_tokens, tokenizer=folder)
    made = [write_shard(spec) for spec in reversed(specs)][::-1]
    assert not any(shard.eos_in_text for shard in made)
    return empty.extended([written.shard for written in made], batches=1, stats={})


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_documents_come_back_whole_and_in_order(corpus: tuple, tmp_path: Path, split: str) -> None:
    documents, folder, tokenizer = corpus
    manifest = tokenise(corpus, tmp_path, split)
    encoder = load_encoder(folder)
    found = []
    for shard in manifest.shards:
        tokens = pq.read_table(manifest.folder.path(shard.file)).column("tokens").to_numpy()
        for row in pq.read_table(manifest.folder.path(shard.table)).to_pylist():
            ids = tokens[row["offset"] : row["offset"] + row["tokens"]]
            assert ids[-1] == tokenizer.eos_id and tokenizer.eos_id not in ids[:-1]
            text = encoder._tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False)
            first = encoder._tokenizer.id_to_token(int(ids[0]))
            assert row["id"] == document_id(text) and row["bytes"] == len(text.encode())
            assert row["predicted_bytes"] == row["bytes"] - len(first)
            found.append(text)
    assert found == [row["text"] for row in iter_documents(documents, split=split, held_out_fraction=FRACTION)]
    assert manifest.documents == len(found)
    assert manifest.text_bytes == sum(len(text.encode()) for text in found)


def test_both_splits_together_are_the_corpus(corpus: tuple, tmp_path: Path) -> None:
    counts = [tokenise(corpus, tmp_path / split, split).documents for split in ("train", "held_out")]
    assert sum(counts) == len(TEXTS) and min(counts) > 0


def test_same_bytes_again_and_format(corpus: tuple, tmp_path: Path) -> None:
    first, second = tokenise(corpus, tmp_path / "a"), tokenise(corpus, tmp_path / "b")
    assert first.shards == second.shards and len(first.shards) > 2 and first.fingerprint == second.fingerprint
    metadata = pq.read_metadata(first.folder.path(first.shards[0].file))
    column = metadata.row_group(0).column(0)
    assert column.compression == "UNCOMPRESSED" and not column.has_dictionary_page
    assert metadata.schema.column(0).physical_type == "INT32" and metadata.num_rows == first.shards[0].tokens


def test_row_groups_are_exact(corpus: tuple, tmp_path: Path) -> None:
    _documents, folder, tokenizer = corpus
    long = manifest_of(tmp_path / "long", ["x y " * 50_000, "end"])
    manifest = tokenise((long, folder, tokenizer), tmp_path / "tokens", shard_tokens=2**24)
    metadata = pq.read_metadata(manifest.folder.path(manifest.shards[0].file))
    sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    assert len(sizes) > 1 and set(sizes[:-1]) == {ROW_GROUP_TOKENS} and 0 < sizes[-1] <= ROW_GROUP_TOKENS


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 100))
def test_shards_are_consecutive_and_bounded(sizes: list[int], limit: int) -> None:
    array = np.array(sizes, np.int64)
    groups = _groups(np.arange(len(sizes)), array, limit)
    assert [i for group in groups for i in group.tolist()] == list(range(len(sizes)))
    assert all(0 < array[group].sum() < limit + 50 for group in groups)


def test_changed_documents_are_noticed(corpus: tuple, tmp_path: Path) -> None:
    documents, folder, tokenizer = corpus
    empty = TokenManifest("code", "train", str(tmp_path), "t", tokenizer.vocab_size, tokenizer.eos_id, (), batches=0)
    [spec] = plan_shards(documents, empty, held_out_fraction=FRACTION, shard_tokens=2**24, tokenizer=folder)
    with pytest.raises(DataError, match="documents for shard 0 of train where 1 were counted"):
        write_shard(replace(spec, expected=1))


def test_tokenizers_that_are_not_byte_level() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "▁Zürich": 1, "▁lies": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    [encoded, empty] = Encoder(tokenizer.to_str().encode()).encode(["Zürich lies", ""])
    assert encoded.ids.tolist() == [1, 2] and encoded.first_bytes == len("Zürich".encode())
    assert empty.ids.size == 0 and empty.first_bytes == 0


def test_a_text_that_is_not_its_id(corpus: tuple, tmp_path: Path) -> None:
    _, folder, tokenizer = corpus
    documents = manifest_of(tmp_path / "documents", sentences(5))
    path = tmp_path / "documents" / documents.files[0].file
    table = pq.read_table(path)
    pq.write_table(table.set_column(1, "text", [["other"] * 5]), path)
    with pytest.raises(DataError, match=r"the text of document \w{16} \(code\) does not fit its id"):
        tokenise((documents, folder, tokenizer), tmp_path / "tokens")
