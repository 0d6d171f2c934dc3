"""Rows are a copy of the shard's tokens: every token but a document's first is a target exactly once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nexus_ray.corpora.reader import PAD, TokenReader
from nexus_ray.errors import DataError
from tests.shards import EOS, random_documents, write_manifest


def expected_rows(shards: list[list[list[int]]], seq_len: int) -> list[list[int]]:
    """The wire format, written the slow way."""
    rows = []
    for documents in shards:
        flat = [~t if i == 0 else t for document in documents for i, t in enumerate([*document, EOS])]
        for start in range(0, len(flat) - 1, seq_len):
            row = flat[start : start + seq_len + 1]
            rows.append(row + [int(PAD)] * (seq_len + 1 - len(row)))
    return rows


@given(st.integers(1, 40), st.integers(1, 3), st.integers(8, 70), st.integers(0, 100))
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_hold_every_token_once_in_order(
    tmp_path_factory: pytest.TempPathFactory, count: int, shards: int, seq_len: int, seed: int
) -> None:
    documents = random_documents(count, seed=seed)
    shards = min(shards, count)
    manifest = write_manifest(tmp_path_factory.mktemp("rows"), "d", documents, shards=shards)
    reader = TokenReader(manifest, seq_len)
    parts = np.array_split(np.arange(count), shards)
    expected = expected_rows([[documents[i] for i in part] for part in parts], seq_len)
    assert reader.num_rows == len(expected) == manifest.rows(seq_len)
    order = np.random.default_rng(seed).permutation(len(expected))
    assert reader.read(order).tolist() == [expected[i] for i in order]


def test_rows_cross_row_groups(tmp_path: Path) -> None:
    documents = [list(range(1, 200)) for _ in range(1000)]
    reader = TokenReader(write_manifest(tmp_path, "d", documents), 100)
    expected = expected_rows([documents], 100)
    rows = np.asarray([0, 654, 655, 656, 1310, 1311, 1999])
    assert reader.read(rows).tolist() == [expected[i] for i in rows]


def test_a_grown_manifest_leaves_earlier_rows_alone(tmp_path: Path) -> None:
    first = write_manifest(tmp_path, "d", random_documents(30, seed=1))
    more = write_manifest(tmp_path, "d", random_documents(20, seed=2), first_shard=1, batch=1)
    grown = first.extended(more.shards, batches=2, stats={})
    rows = np.arange(first.rows(32))
    assert np.array_equal(TokenReader(first, 32).read(rows), TokenReader(grown, 32).read(rows))


def test_a_truncated_shard_names_itself_and_the_way_out(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, "plays", random_documents(30, seed=1))
    file = tmp_path / "train" / "tokens-00000.parquet"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DataError, match=r"tokens-00000.parquet of domain 'plays'.*data.on_corrupt: quarantine"):
        TokenReader(manifest, 16).read(np.arange(2))


def test_a_flipped_byte_is_found_by_the_page_checksum(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, "plays", random_documents(300, seed=1))
    file = tmp_path / "train" / "tokens-00000.parquet"
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match="CRC"):
        TokenReader(manifest, 16).read(np.arange(2))


def test_tokens_beyond_the_vocabulary_mean_another_tokenizer(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, "plays", random_documents(30, seed=1), vocab_size=100)
    with pytest.raises(DataError, match="another tokenizer"):
        TokenReader(manifest, 16).read(np.arange(20))
