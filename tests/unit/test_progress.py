"""Progress: a bar in a terminal, plain lines elsewhere, and no crash anywhere."""

from __future__ import annotations

import io
from typing import Any

import pytest

from nexus_ray.progress import Progress, Terminal, clock


def _line(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "train/loss": 3.25,
        "train/replay_fraction": 0.1,
        "perf/tokens_per_second": 12_345.6,
        "perf/step_seconds": 0.5,
    }


def test_plain_lines_come_every_so_many_steps() -> None:
    stream = io.StringIO()
    with Progress(log_every_steps=10, stream=stream) as progress:
        progress.stage("stories", 25)
        for step in range(1, 26):
            progress.update(_line(step))
        progress.message("evaluating [3] domains")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "stories: 25 steps"
    assert [line.split()[2] for line in lines[1:-1]] == ["1/25", "11/25", "21/25", "25/25"]
    assert lines[2] == "stories  step 11/25  loss 3.2500  replay 10.0%  12,346 tokens/s  ETA 0:07"
    assert lines[-1] == "evaluating [3] domains"


def test_a_resumed_stage_starts_in_the_middle() -> None:
    stream = io.StringIO()
    progress = Progress(log_every_steps=10, stream=stream)
    progress.stage("stories", 100)
    for step in range(41, 55):
        progress.update(_line(step))
    assert [line.split()[2] for line in stream.getvalue().splitlines()[1:]] == ["41/100", "51/100"]


def test_a_bar_in_a_terminal() -> None:
    stream = io.StringIO()
    console = Terminal(file=stream, force_terminal=True, width=110, color_system=None)
    with Progress(console=console) as progress:
        progress.stage("stories [x]", 2)
        progress.update(_line(1))
        progress.message("checkpoint saved")
        progress.update(_line(2))
        progress.stage("code", 2)
    text = stream.getvalue()
    for word in (
        "stories [x]",
        "2/2",
        "loss 3.2500",
        "replay 10.0%",
        "12,346 tokens/s",
        "ETA",
        "checkpoint saved",
        "code",
    ):
        assert word in text


@pytest.mark.parametrize(
    "line", [{}, {"step": None}, {"step": 3, "train/loss": None}, {"step": 3, "train/loss": float("nan")}]
)
def test_odd_lines(line: dict[str, Any]) -> None:
    for console in (None, Terminal(file=io.StringIO(), force_terminal=True)):
        progress = Progress(stream=io.StringIO(), console=console)
        progress.update(line)
        progress.stage("stories", 0)
        progress.update(line)
        progress.close()
        progress.close()


class _Hostile(io.StringIO):
    """A stream that fails at every write, as a closed pipe does."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError(), ValueError("I/O operation on closed file"), OSError(5, "io")])
@pytest.mark.parametrize("terminal", [True, False])
def test_a_broken_stream_is_left_alone(error: Exception, terminal: bool) -> None:
    stream = _Hostile(error)
    console = Terminal(file=stream, force_terminal=True, width=100) if terminal else None
    with Progress(stream=stream, console=console) as progress:
        progress.stage("stories", 2)
        progress.update(_line(1))
        progress.message("hello")
        progress.update(_line(2))


def test_what_an_encoding_lacks_is_replaced() -> None:
    raw = io.BytesIO()
    progress = Progress(stream=io.TextIOWrapper(raw, encoding="ascii"))
    progress.stage("café", 1)
    assert raw.getvalue() == b"caf?: 1 steps\n"


@pytest.mark.parametrize(("variable", "value"), [("TERM", "dumb"), ("TERM", ""), ("COLUMNS", "many"), ("COLUMNS", "3")])
def test_odd_terminals(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv(variable, value)
    with Progress(stream=Terminal()) as progress:
        progress.stage("stories", 1)
        progress.update(_line(1))


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (-3, "0:00"), (65, "1:05"), (3725, "1:02:05")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
