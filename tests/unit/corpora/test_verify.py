"""Damaged shards: each kind is found, and the message names the file and the way out."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from nexus_ray.corpora.manifest import TokenManifest
from nexus_ray.corpora.verify import check_shard, check_tokenizer, usable, verify_shard
from nexus_ray.errors import DataError
from tests.unit.corpora.test_tokens import corpus, tokenise  # noqa: F401

WAY_OUT = r"; restore the file, delete .* and prepare again, or set data.on_corrupt: quarantine"


@pytest.fixture
def manifest(corpus: tuple, tmp_path: Path) -> TokenManifest:  # noqa: F811
    return tokenise(corpus, tmp_path / "tokens")


def file_of(manifest: TokenManifest, number: int) -> Path:
    return manifest.folder.local_path / manifest.shards[number].file


def test_intact(manifest: TokenManifest) -> None:
    for shard in manifest.shards:
        verify_shard(manifest, shard)
    assert usable(manifest, "stop") is manifest


def test_truncated_missing_and_replaced(manifest: TokenManifest) -> None:
    shard, path = manifest.shards[1], file_of(manifest, 1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(DataError, match=rf"tokens-00001.parquet .* bytes instead of \d+: it was cut short.*{WAY_OUT}"):
        check_shard(manifest, shard)
    path.write_bytes(whole[:-100] + bytes(100))
    with pytest.raises(DataError, match=rf"tokens-00001.parquet .*is no readable Parquet.*{WAY_OUT}"):
        check_shard(manifest, shard)
    path.unlink()
    with pytest.raises(DataError, match=rf"tokens-00001.parquet .*cannot be found.*{WAY_OUT}"):
        check_shard(manifest, shard)


def test_a_flipped_bit_is_found_by_the_digest(manifest: TokenManifest) -> None:
    path = file_of(manifest, 0)
    data = bytearray(path.read_bytes())
    data[500] ^= 4
    path.write_bytes(data)
    check_shard(manifest, manifest.shards[0])  # the cheap check does not read pages
    with pytest.raises(DataError, match=rf"row group 0 \(rows 0 to \d+\) is damaged; .*SHA-256.*{WAY_OUT}"):
        verify_shard(manifest, manifest.shards[0])


def test_damaged_table(manifest: TokenManifest) -> None:
    path = manifest.folder.local_path / manifest.shards[0].table
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError, match=r"documents-00000.parquet .*cut short"):
        check_shard(manifest, manifest.shards[0])


def test_another_tokenizer(manifest: TokenManifest) -> None:
    check_tokenizer(manifest, manifest.tokenizer)
    with pytest.raises(
        DataError, match=r"were tokenised with tokenizer \w+, this run's is other; run `nexus-ray prepare`"
    ):
        check_tokenizer(manifest, "other")
    with pytest.raises(DataError, match=r"tokens-00000.parquet .* was tokenised with tokenizer .*, not with other"):
        check_shard(replace(manifest, tokenizer="other"), manifest.shards[0])


def test_quarantine_reads_every_page(manifest: TokenManifest) -> None:
    path = file_of(manifest, 1)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0xFF
    path.write_bytes(data)
    assert usable(manifest, "stop") is manifest, "the run stops when it comes to the page"
    assert usable(manifest, "quarantine").quarantined == ("tokens-00001.parquet",)


def test_quarantine_sets_aside_and_counts(manifest: TokenManifest) -> None:
    file_of(manifest, 1).write_bytes(b"")
    with pytest.raises(DataError, match=r"tokens-00001.parquet"):
        usable(manifest, "stop")
    left = usable(manifest, "quarantine")
    assert left.quarantined == ("tokens-00001.parquet",) and len(left.shards) == len(manifest.shards) - 1
    assert left.fingerprint != manifest.fingerprint and left.tokens < manifest.tokens
    shutil.rmtree(manifest.folder.local_path)
    with pytest.raises(DataError, match=r"all \d+ train shards of domain code are corrupt, the first: "):
        usable(manifest, "quarantine")
