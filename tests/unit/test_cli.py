"""The command line: verbs, exit codes, errors without tracebacks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nexus_ray import cli
from nexus_ray.errors import ConfigError, DataError, Interrupted, TrainingError
from tests.configs import write_two_stages

ROOT = Path(__file__).resolve().parents[2]
VERBS = ("prepare", "train", "roadmap", "evaluate", "report", "compare", "doctor")


class TaskError(Exception):
    """Shaped like Ray's task errors: the real one is in `cause`."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("ray::task() failed\nTraceback ...")
        self.cause = cause


class DualTaskError(TaskError, DataError):
    """Ray's task errors also inherit the class of their cause."""


class GroupError(Exception):
    """Shaped like ray.train.WorkerGroupError."""

    def __init__(self, worker_failures: dict[int, Exception]) -> None:
        super().__init__("Training failed due to worker errors")
        self.worker_failures = worker_failures


class ControllerError(Exception):
    def __init__(self, controller_failure: Exception) -> None:
        super().__init__("Training failed due to controller error")
        self.controller_failure = controller_failure


def run_verb(monkeypatch: pytest.MonkeyPatch, error: BaseException | None) -> int:
    def verb(args: Any) -> int:
        if error is not None:
            raise error
        return 0

    monkeypatch.setitem(cli.VERBS, "schema", verb)
    return cli.main(["schema"])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, 0),
        (ConfigError("x"), 2),
        (DataError("x"), 1),
        (TrainingError("x"), 1),
        (Interrupted("x"), 130),
        (KeyboardInterrupt(), 130),
        (RuntimeError("x"), 1),
    ],
)
def test_exit_codes(monkeypatch: pytest.MonkeyPatch, error: BaseException | None, code: int) -> None:
    assert run_verb(monkeypatch, error) == code


@pytest.mark.parametrize(
    "wrapped",
    [
        TaskError(DataError("shard 3 is torn")),
        DualTaskError(DataError("shard 3 is torn")),
        GroupError({0: RuntimeError("gloo"), 1: TaskError(DataError("shard 3 is torn"))}),
        ControllerError(GroupError({0: DataError("shard 3 is torn")})),
    ],
)
def test_errors_wrapped_by_ray_show_their_own_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrapped: Exception
) -> None:
    assert run_verb(monkeypatch, wrapped) == 1
    assert capsys.readouterr().err == "nexus-ray: shard 3 is torn\n"


def test_an_unexpected_error_is_one_line_and_a_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_verb(monkeypatch, ZeroDivisionError("by zero\nmore")) == 1
    err = capsys.readouterr().err
    assert "failed with ZeroDivisionError: by zero" in err and "Traceback" not in err and "more" not in err
    log = Path(err.partition("full log: ")[2].split()[0])
    assert "Traceback" in log.read_text() and "by zero\nmore" in log.read_text()
    log.unlink()


def test_nexus_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("NEXUS_DEBUG", "1")
    run_verb(monkeypatch, DataError("x"))
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["roadmp"], ["no verb 'roadmp'", "did you mean 'roadmap'?"]),
        ([], ["VERB"]),
        (["roadmap"], ["CONFIG"]),
        (["roadmap", "x.yaml", "--dryrun"], ["unknown option --dryrun", "roadmap --help"]),
        (["compare"], ["RUN"]),
    ],
)
def test_usage_faults_exit_2(capsys: pytest.CaptureFixture[str], argv: list[str], words: list[str]) -> None:
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert all(word in err for word in words)


def test_overrides_may_stand_around_options() -> None:
    for argv in (["c.yaml", "a=1", "--dry-run", "b=2"], ["--dry-run", "c.yaml", "a=1", "b=2"]):
        args = cli._parse(["roadmap", *argv])
        assert (args.config, args.overrides, args.dry_run) == ("c.yaml", ["a=1", "b=2"], True)


def test_help_and_version_exit_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0 and cli.main(["roadmap", "--help"]) == 0 and cli.main(["--version"]) == 0
    assert "path=value" in capsys.readouterr().out


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schema"]) == 0
    assert "properties" in json.loads(capsys.readouterr().out)


def test_the_roadmap_verb_checks_storage_starts_ray_and_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import nexus_ray.roadmap as roadmap
    import nexus_ray.session as session

    seen: list[Any] = []

    @contextmanager
    def fake_session(config: Any, demands=None) -> Iterator[None]:
        seen.append("ray")
        yield
        seen.append("end")

    monkeypatch.setattr(session, "ray_session", fake_session)
    monkeypatch.setattr(roadmap, "run_roadmap", lambda config, **_: seen.append(config.training.precision))
    assert cli.main(["roadmap", str(write_two_stages(tmp_path)), "training.precision=fp32"]) == 0
    assert seen == ["ray", "fp32", "end"]


@pytest.mark.parametrize("verb", VERBS)
def test_job_scripts_run_as_files(verb: str, tmp_path: Path) -> None:
    script = ROOT / "jobs" / f"{verb}.py"
    run = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.returncode == 0, run.stderr
    assert f"nexus-ray {verb}" in run.stdout
