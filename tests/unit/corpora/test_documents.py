"""Documents: once each, in order, split by their text alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus_ray.corpora import documents as module
from nexus_ray.corpora.build import append_documents
from nexus_ray.corpora.documents import (
    DocumentManifest,
    DocumentWriter,
    document_id,
    held_out_threshold,
    iter_documents,
    load_documents,
    load_index,
)
from nexus_ray.corpora.sources import RawDocument
from nexus_ray.errors import DataError
from nexus_ray.storage import Storage
from tests.corpus import sentences


def manifest_of(folder: Path, texts: list[str]) -> DocumentManifest:
    empty = DocumentManifest("code", str(folder), "settings", "test", None, None, ())
    return append_documents(empty, [RawDocument(text, {"index": index}) for index, text in enumerate(texts)])


def texts_of(manifest: DocumentManifest, **settings: object) -> list[str]:
    return [row["text"] for row in iter_documents(manifest, **settings)]


def test_empty_and_repeated_texts_are_dropped_and_counted(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, ["a", " \n", "b", "a", "", "ü"])
    assert texts_of(manifest) == ["a", "b", "ü"]
    assert manifest.stats == {"documents_in": 6, "empty_dropped": 2, "exact_duplicates": 1, "documents": 3}
    rows = list(iter_documents(manifest))
    assert rows[1] == {"id": document_id("b"), "text": "b", "domain": "code", "provenance": '{"index": 2}'}
    assert load_documents(Storage(str(tmp_path))) == manifest
    assert load_index(manifest).sizes.tolist() == [1, 1, 2]


def test_large_corpora_become_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GROUP_BYTES", 300)
    monkeypatch.setattr(module, "FILE_BYTES", 1000)
    texts = sentences(60)
    manifest = manifest_of(tmp_path, texts)
    assert len(manifest.files) > 2 and texts_of(manifest) == texts
    index = load_index(manifest)
    for number in (0, 17, 59):
        file = manifest.files[index.files[number]].file
        [row] = [
            row
            for batch in module.read_rows(manifest.folder, file, int(index.rows[number]), int(index.rows[number]) + 1)
            for row in batch.to_pylist()
        ]
        assert row["text"] == texts[number]


def test_append_keeps_what_was_there(tmp_path: Path) -> None:
    first = manifest_of(tmp_path, sentences(20))
    before = {
        file: (tmp_path / file).read_bytes() for file in Storage(str(tmp_path)).list() if file.endswith("parquet")
    }
    second = append_documents(first, [RawDocument(text, {}) for text in [*sentences(3), *sentences(4, seed=1)]])
    assert {file: (tmp_path / file).read_bytes() for file in before} == before
    assert second.prefix(1).fingerprint == first.fingerprint != second.fingerprint
    assert second.batches[1].stats["exact_duplicates"] == 3
    assert texts_of(second) == [*sentences(20), *sentences(4, seed=1)]
    assert load_index(second, first_batch=1).files.tolist() == [1, 1, 1, 1]
    with pytest.raises(DataError, match="none of the 3 documents to append is new"):
        append_documents(second, [RawDocument(text, {}) for text in sentences(3)])


@given(st.lists(st.text(st.characters(codec="utf-8")), max_size=30), st.sampled_from([0.0, 0.05, 0.3, 0.95]))
def test_split_depends_on_the_text_alone(texts: list[str], fraction: float) -> None:
    writer = DocumentWriter(Storage("/nowhere"), "x", "code")
    for text in texts:
        writer.add(RawDocument(text, {}))
    held_out = np.array(writer.ids, np.uint64) < np.uint64(held_out_threshold(fraction))
    kept = list(dict.fromkeys(text for text in texts if text.strip()))
    assert len(held_out) == len(kept)
    for text, side in zip(kept, held_out, strict=True):
        assert side == (int(document_id(text), 16) / 2**64 < fraction)


def test_split_is_even_and_nested() -> None:
    ids = np.array([int(document_id(text), 16) for text in sentences(20_000)], np.uint64)
    small, large = ids < np.uint64(held_out_threshold(0.05)), ids < np.uint64(held_out_threshold(0.1))
    assert abs(small.mean() - 0.05) < 0.006 and not (small & ~large).any()


def test_half_a_surrogate_pair(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"domain code: \{'index': 0\} holds half a surrogate pair at character 2"):
        manifest_of(tmp_path, ["ab\ud800"])


def test_damaged_files_are_named(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, sentences(20))
    for name, use in ((manifest.files[0].file, texts_of), (manifest.batches[0].index, load_index)):
        data = bytearray((tmp_path / name).read_bytes())
        data[len(data) // 3] ^= 1
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=rf"{name}.* cannot be read .*; delete {tmp_path} and it is built again"):
            use(manifest)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match=r"manifest.json cannot be used"):
        load_documents(manifest.folder)
