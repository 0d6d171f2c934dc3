"""The W&B mirror writes what it should offline, and never gets in the way of training."""

from __future__ import annotations

import builtins
import json
import logging
import struct
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event

from nexus_ray.tracking import (
    Tracker,
    flatten,
    has_login,
    public_config,
    public_value,
    redact_addresses,
    redact_text,
)
from tests.record_fixture import demo_config

SCORES = {
    "domains": ["a", "b"],
    "stages": ["base", "one"],
    "bits_per_byte": [[3.0, 4.0], [2.0, None]],
    "forgetting": {"mean": None, "max": 0.1},
    "backward_transfer": None,
}


def _config(mode: str, storage: Path) -> Any:
    return demo_config("demo", str(storage), tracking={"wandb": {"mode": mode}})


def _use(tracker: Tracker) -> None:
    for index, name in enumerate(("one", "two")):
        with tracker.stage(name, index) as stage:
            for step in range(1, 4):
                stage.log({"tokens": 8 * step, "train/loss": 1 / step, "stage": name, "data/batch_hash": "ab"})
    tracker.finish(SCORES)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No login, and an address nobody listens on: anything that wanted the network would fail."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")


def test_offline_writes_one_run_per_stage_and_the_scores(
    tmp_path: Path, no_network: None, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker(_config("offline", tmp_path), tmp_path / "demo")
    _use(tracker)
    folder = tmp_path / "demo" / "wandb"
    identity = json.loads((folder / "identity.json").read_text())["identity"]
    found = sorted(path.name for path in folder.glob("offline-run-*/run-*.wandb"))
    assert found == [f"run-{identity}-00-one.wandb", f"run-{identity}-01-two.wandb"]
    assert len(list(folder.glob("offline-run-*/files/media/table/scores/*.table.json"))) == 1
    assert tracker.active and caplog.records == []
    assert capfd.readouterr() == ("", "")

    again = Tracker(_config("offline", tmp_path), tmp_path / "demo")  # a rerun keeps the ids
    with again.stage("two", 1):
        pass
    again.finish(None)
    names = {path.name for path in folder.glob("offline-run-*/run-*.wandb")}
    assert names == set(found)


def test_online_without_a_login_warns_once_and_writes_offline(
    tmp_path: Path, no_network: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        _use(Tracker(_config("online", tmp_path), tmp_path / "demo"))
    assert [record.name for record in caplog.records] == ["nexus_ray.tracking"]
    assert "no W&B login" in caplog.text and "wandb sync" in caplog.text
    assert len(list((tmp_path / "demo" / "wandb").glob("offline-run-*"))) == 2


def test_disabled_touches_nothing(tmp_path: Path) -> None:
    _use(Tracker(_config("disabled", tmp_path), tmp_path / "demo"))
    assert not (tmp_path / "demo").exists()


def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "demo").write_text("a file where the run's folder should be")
    tracker = Tracker(_config("offline", tmp_path), tmp_path / "demo")
    _use(tracker)
    assert not tracker.active and len(caplog.records) == 1
    assert "W&B is off for the rest of this run" in caplog.text


def test_a_missing_package_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "wandb":
            raise ImportError("No module named 'wandb'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    _use(Tracker(_config("offline", tmp_path), tmp_path / "demo"))
    assert len(caplog.records) == 1 and "No module named 'wandb'" in caplog.text


class _Broken:
    """A wandb whose runs start and then fail at the given call."""

    def __init__(self, at: str) -> None:
        self.at, self.calls = at, 0

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == self.at:
                self.calls += 1
                raise RuntimeError(f"{name} broke")
            return self

        return call

    class Settings:
        model_fields: dict[str, Any] = {}  # noqa: RUF012


@pytest.mark.parametrize("at", ["init", "define_metric", "log", "finish", "Table"])
def test_any_failure_inside_is_one_warning(tmp_path: Path, at: str, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker(_config("offline", tmp_path), tmp_path / "demo")
    tracker._wandb, tracker._folder, tracker._identity = _Broken(at), tmp_path, "x"
    _use(tracker)
    assert tracker._wandb.calls >= 1
    assert len(caplog.records) == 1 and f"{at} broke" in caplog.text and not tracker.active


def _scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """By tag, from TensorBoard event files: a length of 8 bytes, its checksum of 4, the event, its checksum of 4."""
    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(folder.glob("events.out.*")):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += size + 16
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_event_files_hold_every_number_over_tokens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = demo_config("demo", str(tmp_path), tracking={"tensorboard": True})
    _use(Tracker(config, tmp_path / "demo"))
    board = tmp_path / "demo" / "tensorboard"
    assert sorted(path.name for path in board.iterdir()) == ["00-one", "01-two", "scores"]
    found = _scalars(board / "01-two")
    assert list(found) == ["train/loss"] and [step for step, _ in found["train/loss"]] == [8, 16, 24]
    assert [value for _, value in found["train/loss"]] == pytest.approx([1, 1 / 2, 1 / 3])
    assert _scalars(board / "scores") == {"bits_per_byte/a": [(0, 3.0), (1, 2.0)], "bits_per_byte/b": [(0, 4.0)]}
    assert caplog.records == []


def test_event_files_that_cannot_be_written_are_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "tensorboard").write_text("in the way")
    _use(Tracker(demo_config("demo", str(tmp_path), tracking={"tensorboard": True}), tmp_path / "demo"))
    assert ["tracking.tensorboard" in record.message for record in caplog.records] == [True]


def test_an_error_of_training_passes_through(tmp_path: Path) -> None:
    tracker = Tracker(_config("disabled", tmp_path), tmp_path / "demo")
    with pytest.raises(ZeroDivisionError), tracker.stage("one", 0):
        raise ZeroDivisionError


def test_credentials_go_and_what_is_around_them_stays() -> None:
    value = {"a": ['cannot read "s3://b/x?access_key=hunter2": no such file', ("s3://K:hunter2@b", 3, None)]}
    assert public_value(value) == {
        "a": ['cannot read "s3://b/x?access_key=(hidden)": no such file', ["s3://(hidden)@b", 3, None]]
    }
    cells = '<td>s3://b?token=hunter2</td><td>s3://b<b>a@b</b>, "u":"x?a=1\\u0026key=hunter2"</td>'
    assert redact_addresses(cells) == cells.replace("hunter2", "(hidden)")


def test_no_secret_is_sent(tmp_path: Path) -> None:
    config = _config("offline", Path("s3://KEY:hunter2@bucket"))
    sent = json.dumps(
        public_config(config.model_copy(update={"storage": "s3://KEY:hunter2@bucket/runs?secret_key=abc"}))
    )
    assert "hunter2" not in sent and "abc" not in sent and "(hidden)" in sent
    assert public_config(config)["training.token_budget"] == 1_000_000


def test_redaction_leaves_ordinary_text_alone() -> None:
    plain = "max_tokens: 5\ntoken_budget: 7\nurl: https://host/path?page=2\nat: me@host.org\ntoken: null"
    assert redact_text(plain) == plain
    assert redact_text("  hf_token: abc") == "  hf_token: (hidden)"


def test_flatten() -> None:
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1, {"e": 2}]}) == {"a.b": 1, "a.c": {}, "d": [1, {"e": 2}]}


def test_login_is_looked_up_without_asking(tmp_path: Path) -> None:
    assert has_login({"WANDB_API_KEY": "x"})
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 0123\n")
    assert has_login({"NETRC": str(tmp_path / "netrc")})
    assert not has_login({"NETRC": str(tmp_path / "netrc"), "WANDB_BASE_URL": "https://wandb.example.org"})
    assert not has_login({"NETRC": str(tmp_path / "none")})
