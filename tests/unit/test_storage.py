"""Storage: atomic writes, appends, copies and locks, on a local disk and on a filesystem behind a URI."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
from pathlib import Path

import pytest
from pyarrow.fs import LocalFileSystem

from nexus_ray.errors import ConfigError, DataError
from nexus_ray.storage import Storage


class RemoteStorage(Storage):
    """Takes the code path of object stores, on local files: `remote:///folder`."""

    def _open(self):
        return LocalFileSystem(), self.uri.removeprefix("remote://")


@pytest.fixture(params=["local", "remote"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    root = tmp_path / "root"
    root.mkdir()
    return Storage(str(root)) if request.param == "local" else RemoteStorage(f"remote://{root}")


def test_local_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Storage("runs").local_path == tmp_path / "runs"
    assert Storage("runs").child("a", "b").uri == str(tmp_path / "runs/a/b")
    assert Storage(f"file://{tmp_path}") == Storage(str(tmp_path))
    assert not Storage("s3://bucket/x").is_local
    with pytest.raises(ConfigError, match="no folder of this machine"):
        _ = Storage("s3://bucket/x").local_path


def test_only_the_uri_is_pickled(storage: Storage) -> None:
    storage.write_text("a", "f")
    again = pickle.loads(pickle.dumps(storage))
    assert again == storage and hash(again) == hash(storage) and again._opened is None
    assert again.read_text("f") == "a"


def test_write_read_list_delete(storage: Storage) -> None:
    folder = storage.child("a")
    assert folder.list() == [] and not folder.exists()
    if not storage.is_local:
        storage.filesystem.create_dir(folder.path())  # object stores have no folders to make
    folder.write_json({"ä": [1, 2.5, None]}, "x.json")
    folder.write_text("two", "x.json.2")
    assert folder.read_json("x.json") == {"ä": [1, 2.5, None]}
    assert folder.list() == ["x.json", "x.json.2"] and folder.size("x.json.2") == 3
    with pytest.raises(FileNotFoundError):
        folder.size("nothing")
    folder.delete("x.json")
    folder.delete("x.json")
    assert storage.list("a") == ["x.json.2"]
    storage.delete("a")
    assert not storage.exists("a")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(str(tmp_path))
    storage.write_text("old", "f")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        ConfigError, match=r"storage: .* cannot be written \(No space left on device\); free some space"
    ):
        storage.write_text("new", "f")
    assert storage.read_text("f") == "old" and storage.list() == ["f"]


def test_nan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        Storage(str(tmp_path)).write_json({"x": float("nan")}, "f")


def test_append_line(storage: Storage) -> None:
    for number in range(3):
        storage.append_line(f"line {number}", "log")
    assert storage.read_text("log") == "line 0\nline 1\nline 2\n"


def test_trees_are_copied(storage: Storage, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "a").write_text("1")
    (source / "deep" / "b").write_text("2")
    storage.upload(source, "tree")
    storage.upload(source / "a", "single", "a")
    storage.download(tmp_path / "back", "tree")
    storage.download(tmp_path / "one" / "a", "single", "a")
    assert (tmp_path / "back" / "deep" / "b").read_text() == "2"
    assert (tmp_path / "one" / "a").read_text() == "1"


def test_check_writable_names_reason_and_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"storage: .*/file/runs cannot be written .*; set storage to a folder"):
        Storage(str(tmp_path / "file" / "runs")).check_writable()
    storage = Storage(str(tmp_path / "runs"))
    storage.check_writable()
    assert storage.list() == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(ConfigError, match="free disk, less than 256 MiB; free some space"):
        storage.check_writable()


def test_unknown_scheme() -> None:
    with pytest.raises(ConfigError, match="use a local path, or a URI that pyarrow knows"):
        _ = Storage("nowhere://bucket/x").filesystem


def test_lock_excludes_others(storage: Storage) -> None:
    with storage.lock("name", 1.0):
        refused = pytest.raises(DataError, match=rf"no lock after 0 s: .*held by process {os.getpid()} ")
        with refused, storage.lock("name", 0.0):
            pass
        with storage.lock("other", 0.0):
            pass
    with storage.lock("name", 0.0):
        pass


def _take_lock_and_die(storage: Storage) -> None:
    with storage.lock("name", 1.0):
        os._exit(9)


def test_lock_of_a_dead_process_is_taken_over(storage: Storage) -> None:
    process = multiprocessing.get_context("fork").Process(target=_take_lock_and_die, args=(storage,))
    process.start()
    process.join(20)
    assert process.exitcode == 9 and storage.exists("name.lock")
    with storage.lock("name", 1.0):
        pass
