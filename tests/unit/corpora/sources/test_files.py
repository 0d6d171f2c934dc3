"""Files: listing, formats, and messages that name file and place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nexus_ray.config.tree import FilesSource
from nexus_ray.corpora.sources.base import matcher
from nexus_ray.corpora.sources.files import FilesCorpus
from nexus_ray.errors import DataError


def texts(*paths: str | Path, **settings: object) -> list[str]:
    config = FilesSource.model_validate({"kind": "files", "paths": [str(path) for path in paths], **settings})
    source = FilesCorpus("code", config)
    return [document.text for item in source.items() for document in source.read(item)]


def test_folders_globs_and_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deep/c.txt", "deep/d.md", ".hidden", "deep/.git/e.txt", "f[1].txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    assert texts(tmp_path) == ["a.txt", "b.txt", "deep/c.txt", "deep/d.md", "f[1].txt"]
    assert texts(f"{tmp_path}/*.txt") == ["a.txt", "b.txt", "f[1].txt"]
    assert texts(f"{tmp_path}/**/c.txt", f"{tmp_path}/deep") == ["deep/c.txt", "deep/d.md"]
    assert texts(tmp_path / "f[1].txt", f"file://{tmp_path}/a.txt") == ["f[1].txt", "a.txt"]


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("a/*.py", "a/b.py", True),
        ("a/*.py", "a/b/c.py", False),
        ("a/**/*.py", "a/b/c.py", True),
        ("a/**/*.py", "a/c.py", True),
        ("a/**", "a/b/c.py", True),
        ("a/[!b]?.py", "a/cc.py", True),
        ("a/[!b]?.py", "a/bc.py", False),
        ("a.b", "aXb", False),
    ],
)
def test_patterns(pattern: str, name: str, expected: bool) -> None:
    assert bool(matcher([pattern]).fullmatch(name)) is expected


def test_text_is_cut_at_matches(tmp_path: Path) -> None:
    path = tmp_path / "play.md"
    path.write_text("# Play\n### I\none\n### II\ntwo\n")
    assert texts(path, split_on="(?m)^### ") == ["# Play\n", "### I\none\n", "### II\ntwo\n"]
    assert texts(path, split_on="nowhere") == [path.read_text()]


RECORDS = [{"text": "one", "lang": "en", "n": 1}, {"text": "zwei", "lang": "de", "n": 2}, {"text": None, "lang": "en"}]


def test_record_formats(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps(record) for record in RECORDS) + "\n\n"
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(lines)
    (tmp_path / "c.json").write_text(json.dumps(RECORDS))
    (tmp_path / "d.json").write_text(json.dumps({str(i): record for i, record in enumerate(RECORDS)}))
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "e.parquet")
    for name in ("a.jsonl", "b.jsonl.gz", "c.json", "d.json", "e.parquet"):
        assert texts(tmp_path / name) == ["one", "zwei", ""], name
        assert texts(tmp_path / name, where={"lang": "de"}) == ["zwei"], name
        assert texts(tmp_path / name, where={"n": "1"}) == ["one"], name
    assert texts(tmp_path / "a.jsonl", format="text") == [lines]


def test_provenance_leads_back(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(json.dumps({"Zürich": {"text": "a"}}))
    source = FilesCorpus("code", FilesSource(kind="files", paths=[str(tmp_path)]))
    [item] = source.items()
    [document] = source.read(item)
    assert document.provenance == {"source": "files", "file": str(tmp_path / "d.json"), "place": "record 'Zürich'"}


@pytest.mark.parametrize(
    ("name", "content", "settings", "message"),
    [
        ("x.txt", b"ab\xff", {}, r"x.txt: byte 2 \(0xff\) is not UTF-8; save the file as UTF-8"),
        ("x.jsonl", b'{"text": "a"}\n{"text"', {}, r"x.jsonl, line 2: no valid JSON .*; mend it, or set source.format"),
        (
            "x.jsonl",
            b'{"body": "a"}',
            {},
            r"line 1: no field 'text' \(domains.code.source.text_field\); the fields are body",
        ),
        ("x.jsonl", b'{"text": 3}', {}, "holds a int, not text; name another field"),
        ("x.jsonl", b"[1]", {}, "a list is no record"),
        ("x.json", b'"text"', {}, "a JSON str without records; it must be a list of mappings"),
        ("x.parquet", b"PAR1 is not enough", {}, "x.parquet cannot be read as Parquet"),
    ],
)
def test_bad_content(tmp_path: Path, name: str, content: bytes, settings: dict, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        texts(tmp_path / name, **settings)


def test_parquet_without_the_field(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="no field 'text'"):
        texts(tmp_path / "x.parquet")


def test_nothing_matches(tmp_path: Path) -> None:
    for pattern in (tmp_path / "missing.txt", f"{tmp_path}/*.md", tmp_path / "no" / "folder" / "*"):
        with pytest.raises(DataError, match=r"domains.code.source.paths: .* matches no file"):
            texts(pattern)


def test_listing_changes_with_the_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    source = FilesCorpus("code", FilesSource(kind="files", paths=[str(tmp_path)]))
    before = source.listing()
    assert source.listing() == before
    (tmp_path / "a.txt").write_text("other")
    assert source.listing() != before
