"""Token manifests: an append-only chain of fingerprints, and row counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus_ray.corpora.manifest import Shard, TokenManifest, load_manifest, save_manifest, stable_hash
from nexus_ray.errors import DataError
from nexus_ray.storage import Storage


@st.composite
def shards(draw: st.DrawFn) -> tuple[Shard, ...]:
    sizes = draw(st.lists(st.tuples(st.integers(2, 10_000), st.integers(0, 2)), max_size=6))
    found, batch = [], 0
    for number, (tokens, step) in enumerate(sizes):
        batch += step
        digest = stable_hash([number, tokens], digits=64)
        found.append(Shard(f"tokens-{number:05d}.parquet", tokens, 1, tokens * 4, digest, batch, tokens * 3))
    return tuple(found)


def manifest_of(some: tuple[Shard, ...], root: str = "/nowhere") -> TokenManifest:
    batches = max((shard.batch for shard in some), default=-1) + 1
    return TokenManifest("code", "train", root, "tok", 300, 0, some, base="b", batches=batches)


@given(shards(), st.data())
def test_a_prefix_is_what_was_there_before(some: tuple[Shard, ...], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(some)))
    whole = manifest_of(some)
    prefix = whole.prefix(count)
    assert prefix == manifest_of(some[:count]) and prefix.fingerprint == manifest_of(some[:count]).fingerprint
    assert prefix.extended(some[count:], batches=whole.batches, stats={}).fingerprint == whole.fingerprint
    assert (prefix.fingerprint == whole.fingerprint) == (count == len(some))


@given(shards(), st.integers(1, 512))
def test_rows_cover_every_target(some: tuple[Shard, ...], seq_len: int) -> None:
    manifest = manifest_of(some)
    expected = sum(len(range(0, shard.tokens - 1, seq_len)) for shard in some)
    assert manifest.rows(seq_len) == expected
    assert manifest.tokens == sum(shard.tokens for shard in some)
    assert manifest.text_bytes == 3 * manifest.tokens


@given(shards())
def test_json_round_trip(some: tuple[Shard, ...]) -> None:
    manifest = manifest_of(some)
    assert TokenManifest.from_json(manifest.to_json(), root="/nowhere") == manifest


def test_fingerprint_depends_on_settings_and_content() -> None:
    shard = Shard("tokens-00000.parquet", 5, 1, 20, "aa", 0)
    manifest = manifest_of((shard,))
    assert manifest.fingerprint == replace(manifest, root="/elsewhere", domain="other").fingerprint
    for other in (replace(manifest, base="c"), manifest_of((replace(shard, sha256="ab"),))):
        assert other.fingerprint != manifest.fingerprint


def test_prefix_longer_than_the_manifest() -> None:
    with pytest.raises(DataError, match="has 0 shards, and 3 were asked for"):
        manifest_of(()).prefix(3)


def test_quarantine_is_counted() -> None:
    some = tuple(Shard(f"tokens-{i:05d}.parquet", 5, 1, 20, str(i), 0) for i in range(3))
    left = manifest_of(some).without(["tokens-00001.parquet"])
    assert [shard.sha256 for shard in left.shards] == ["0", "2"] and left.quarantined == ("tokens-00001.parquet",)


def test_save_and_load(tmp_path: Path) -> None:
    manifest = manifest_of((Shard("tokens-00000.parquet", 5, 1, 20, "aa", 0),), str(tmp_path))
    with pytest.raises(DataError, match="does not exist; run `nexus-ray prepare`"):
        load_manifest(manifest.folder)
    save_manifest(manifest)
    assert load_manifest(manifest.folder) == manifest
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert load_manifest(Storage(str(moved)).child("train")).root == str(moved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": None, "shards": []}, "changed by hand or torn"),
        ({"format": 99}, "has format 99 and this version reads 1; delete the folder"),
        ({"shards": [{"file": "x"}]}, "is incomplete"),
    ],
)
def test_broken_manifests_are_refused(change: dict, message: str) -> None:
    data = manifest_of((Shard("tokens-00000.parquet", 5, 1, 20, "aa", 0),)).to_json()
    with pytest.raises(DataError, match=message):
        TokenManifest.from_json({**data, **change}, root="/nowhere")


def test_no_json(tmp_path: Path) -> None:
    Storage(str(tmp_path)).write_text("{", "train", "manifest.json")
    with pytest.raises(DataError, match="is no JSON"):
        load_manifest(Storage(str(tmp_path)).child("train"))
