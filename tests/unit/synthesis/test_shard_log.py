"""Shard logs: what a crash can leave is mended, what it cannot is an error, and one process writes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow.fs import LocalFileSystem

from nexus_ray.errors import ConfigError, DataError
from nexus_ray.storage import Storage
from nexus_ray.synthesis import append_log
from nexus_ray.synthesis.append_log import LogWriter, decode_line, encode_line, read_log
from nexus_ray.synthesis.rows import PASS, Answer, Failure, Prompt, Request, Row, Sampling, Verdict
from nexus_ray.synthesis.shard_log import ATTEMPTS, Judged, ShardLog, read_state

REQUESTS = {f"{n:032x}": Request(Prompt(f"p{n}"), Sampling(), 0) for n in range(5)}
IDS = list(REQUESTS)


class RemoteStorage(Storage):
    """Takes the code path of object stores, on local files: `remote:///folder`."""

    def _open(self):
        return LocalFileSystem(), self.uri.removeprefix("remote://")

    def write_bytes(self, data: bytes, *parts: str) -> None:
        Path(self.path(*parts)).parent.mkdir(parents=True, exist_ok=True)  # object stores have no folders to make
        super().write_bytes(data, *parts)


@pytest.fixture(params=["local", "remote"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(str(tmp_path)) if request.param == "local" else RemoteStorage(f"remote://{tmp_path}")


def opened(folder: Storage) -> ShardLog:
    return ShardLog(folder, 3, REQUESTS, attempts=ATTEMPTS)


def answer(id: str, text: str = "one\ntwo") -> Answer:
    return Answer(id, text, "stop", 3, 4, "m")


def row(id: str, item: int, text: str) -> Row:
    return Row(text, id, item, REQUESTS[id].prompt)


# --- lines -------------------------------------------------------------------------------------------------------


@given(st.dictionaries(st.text(), st.text() | st.integers() | st.lists(st.text()), min_size=1))
def test_lines_are_read_as_they_were_written(value: dict[str, object]) -> None:
    line = encode_line(value)
    assert line.count(b"\n") == 1 and line.endswith(b"\n")
    read = decode_line(line[:-1])
    assert {name: read[name] for name in value if name != "crc"} == {k: v for k, v in value.items() if k != "crc"}


@given(st.integers(0, 200), st.integers(1, 255))
def test_a_changed_byte_is_noticed(place: int, change: int) -> None:
    line = bytearray(encode_line({"event": "answered", "text": "ä" * 30}))[:-1]
    line[place % len(line)] ^= change
    with pytest.raises(ValueError):
        decode_line(bytes(line))


@pytest.mark.parametrize("kept", range(1, 40, 3))
def test_a_torn_last_line_is_passed_over_and_cut(tmp_path: Path, kept: int) -> None:
    folder = Storage(str(tmp_path))
    with LogWriter(folder, "log/x") as writer:
        writer.write({"n": 1})
    whole = (tmp_path / "log/x.jsonl").read_bytes()
    torn = encode_line({"n": 2, "text": "abcdefgh"})[:kept]
    assert not torn.endswith(b"\n")
    (tmp_path / "log/x.jsonl").write_bytes(whole + torn)
    assert [line["n"] for line in read_log(folder, "log/x")] == [1]
    assert (tmp_path / "log/x.jsonl").read_bytes() == whole + torn, "a reader changes nothing"
    with LogWriter(folder, "log/x") as writer:
        assert (tmp_path / "log/x.jsonl").read_bytes() == whole
        writer.write({"n": 3})
    assert [line["n"] for line in read_log(folder, "log/x")] == [1, 3]


def test_a_line_damaged_elsewhere_is_an_error(folder: Storage, tmp_path: Path) -> None:
    with LogWriter(folder, "log/x") as writer:
        for n in range(3):
            writer.write({"text": f"secret {n}"})
    [file] = [file for file in (tmp_path / "log").rglob("*.jsonl") if file.stat().st_size]
    file.write_bytes(file.read_bytes().replace(b"secret 1", b"secret 7"))
    with pytest.raises(DataError, match=r"line 2, is damaged \(its checksum does not fit\); restore the file") as error:
        list(read_log(folder, "log/x"))
    assert "secret" not in str(error.value)


def test_a_missing_segment_is_an_error(tmp_path: Path) -> None:
    folder = RemoteStorage(f"remote://{tmp_path}")
    with LogWriter(folder, "log/x") as writer:
        for n in range(3):
            writer.write({"n": n})
            writer.flush()
    assert [line["n"] for line in read_log(folder, "log/x")] == [0, 1, 2]
    sorted((tmp_path / "log/x").iterdir())[2].unlink()
    with pytest.raises(DataError, match=r"lacks segment 000001-\w{8}-000002.jsonl"):
        list(read_log(folder, "log/x"))


def test_one_writer_on_a_disk(tmp_path: Path) -> None:
    folder = Storage(str(tmp_path))
    refused = pytest.raises(DataError, match=r"no lock after 0 s: .*is held by process")
    with LogWriter(folder, "log/x"), refused, LogWriter(folder, "log/x", lock_s=0.0):
        pass


def test_the_latest_writer_wins_in_an_object_store(tmp_path: Path) -> None:
    """The machine of the first one may be gone for ever, or come back: what it wrote before is kept."""
    folder = RemoteStorage(f"remote://{tmp_path}")
    first = LogWriter(folder, "log/x").__enter__()
    first.write({"n": 1})
    first.flush()
    with LogWriter(folder, "log/x") as second:
        second.write({"n": 2})
        second.flush()
        first.write({"n": 3})
        with pytest.raises(DataError, match="was taken over by a later writer"):
            first.flush()
        with pytest.raises(DataError, match="is closed, after an error"):
            first.write({"n": 4})
    assert [line["n"] for line in read_log(folder, "log/x")] == [1, 2]


def test_lines_reach_the_system_at_once_and_are_synced_in_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    folder = Storage(str(tmp_path))
    with LogWriter(folder, "log/x") as writer:
        monkeypatch.setattr(append_log, "GROUP_S", 1e9)
        monkeypatch.setattr("os.fsync", synced.append)
        for n in range(append_log.GROUP_LINES):
            assert synced == []
            writer.write({"n": n})
            assert len(list(read_log(folder, "log/x"))) == n + 1
        assert len(synced) == 1
        monkeypatch.setattr(append_log, "GROUP_S", 0.0)
        writer.write({"n": 0})
        assert len(synced) == 2


def test_a_full_disk_closes_the_log_with_nothing_behind_the_torn_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Storage(str(tmp_path))
    with LogWriter(folder, "log/x") as writer:
        writer.write({"n": 1})

        class Full:
            def write(self, data: bytes) -> int:
                with open(tmp_path / "log/x.jsonl", "ab") as file:
                    file.write(data[:5])
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(writer, "_file", Full())
        with pytest.raises(ConfigError, match="No space left on device"):
            writer.write({"n": 2})
        with pytest.raises(DataError, match="is closed"):
            writer.write({"n": 3})
    with LogWriter(folder, "log/x") as writer:
        writer.write({"n": 4})
    assert [line["n"] for line in read_log(folder, "log/x")] == [1, 4]


# --- events ------------------------------------------------------------------------------------------------------


def test_what_is_logged_is_not_pending(folder: Storage) -> None:
    with opened(folder) as log:
        assert list(log.pending()) == IDS
        log.sent(IDS[:4])
        log.answered(answer(IDS[1]))
        log.answered(answer(IDS[0]))
        log.failed(Failure(IDS[2], "http 400", retriable=False))
        log.failed(Failure(IDS[3], "http 500", retriable=True))
        log.judged(IDS[1], [])
    with opened(folder) as log:
        assert list(log.pending()) == IDS[3:], "what failed in a way that may pass is asked again"
        assert log.unjudged() == [answer(IDS[0])], "an answer whose rows were not judged is judged, not asked for"
        assert log.state.rows == {IDS[1]: ()} and not log.is_complete


def test_rows_and_verdicts_are_kept(folder: Storage) -> None:
    scores = {"b": 0.5, "a": math.inf, "c": math.nan}
    rows = [
        (row(IDS[0], 1, "two"), Verdict("reject", "length: 3", scores)),
        (row(IDS[0], 0, "one\ntwo"), PASS),
    ]
    with opened(folder) as log:
        log.answered(answer(IDS[0]))
        log.judged(IDS[0], rows)
    second, first = read_state(folder, 3).rows[IDS[0]]
    assert first == Judged(0, "one\ntwo", PASS)
    assert (second.item, second.text, second.verdict.reason) == (1, "two", "length: 3")
    assert second.verdict.scores["a"] == math.inf and math.isnan(second.verdict.scores["c"])


def test_resent_is_what_was_in_flight(folder: Storage) -> None:
    with opened(folder) as log:
        log.sent(IDS[:3])
        log.answered(answer(IDS[0]))
        log.failed(Failure(IDS[1], "http 500", retriable=True))
    with opened(folder) as log:
        assert log.state.in_flight == {IDS[2]}
        log.sent(IDS[1:4])
        log.answered(answer(IDS[2]))
    state = read_state(folder, 3)
    assert (state.sent, state.resent, state.in_flight) == (6, 1, {IDS[1], IDS[3]})


def test_failures_that_may_pass_are_given_up_after_some(folder: Storage) -> None:
    for _ in range(ATTEMPTS):
        with opened(folder) as log:
            assert IDS[0] in log.pending()
            log.failed(Failure(IDS[0], "timeout", retriable=True))
    with opened(folder) as log:
        assert IDS[0] not in log.pending()
        log.answered(answer(IDS[0]))
        assert not log.state.gave_up(IDS[0], ATTEMPTS), "an answer that comes nevertheless counts"


def test_the_first_answer_counts(folder: Storage) -> None:
    with opened(folder) as log:
        log.answered(answer(IDS[0], "first"))
        log.answered(answer(IDS[0], "second"))
        log.judged(IDS[0], [(row(IDS[0], 0, "first"), PASS)])
    state = read_state(folder, 3)
    assert state.answers[IDS[0]].text == "first" and state.rows[IDS[0]][0].text == "first"
    with LogWriter(folder, "log/00003") as writer:
        writer.write({"event": "judged", "id": IDS[1], "of": "0" * 16, "rows": []})
    assert IDS[1] not in read_state(folder, 3).rows, "verdicts on another answer than the one that counts"


def test_misuse_is_refused(folder: Storage) -> None:
    with opened(folder) as log:
        with pytest.raises(DataError, match="is not in shard 3, which has 5 requests"):
            log.sent(["f" * 32])
        with pytest.raises(DataError, match="is not in shard 3"):
            log.answered(answer("f" * 32))
        with pytest.raises(DataError, match="is judged before it is answered"):
            log.judged(IDS[0], [])
        log.answered(answer(IDS[0]))
        with pytest.raises(DataError, match="is answered already"):
            log.sent([IDS[0]])
        with pytest.raises(DataError, match="share an item"):
            log.judged(IDS[0], [(row(IDS[0], 0, "one"), PASS), (row(IDS[0], 0, "two"), PASS)])


def test_an_event_of_another_version_is_an_error(folder: Storage) -> None:
    with LogWriter(folder, "log/00003") as writer:
        writer.write({"event": "praised"})
    with pytest.raises(DataError, match="holds an event that this version cannot read"):
        read_state(folder, 3)


def test_a_damaged_log_is_not_held_after_the_error(tmp_path: Path) -> None:
    folder = Storage(str(tmp_path))
    with LogWriter(folder, "log/00003") as writer:
        writer.write({"event": "praised"})
    for _ in range(2):
        with pytest.raises(DataError, match="cannot read"), opened(folder):
            pass
