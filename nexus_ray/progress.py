"""Show how training goes: a bar in a terminal, plain lines elsewhere. Never raises on account of the terminal.

The roadmap driver feeds it the lines of `metrics.jsonl`; a line carries its step, so a resumed stage starts in the
middle of its bar.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.errors import ConsoleError
from rich.markup import escape
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar

_TERMINAL_TROUBLE = (OSError, ValueError, ConsoleError)
"""What a closed pipe, a closed file, an encoding without our characters or a strange terminal raise."""
_SMOOTHING = 0.1
"""Weight of the newest step in the mean step time behind the remaining time."""


def clock(seconds: float) -> str:
    """`1:02:05`, `2:05`."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


class Terminal(Console):
    """A console that reports a closed pipe; rich's own answer to one is to end the process."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError("the terminal has gone")


class Progress:
    """Progress of a run, stage after stage.

    with Progress(log_every_steps=10) as progress:
        progress.stage("stories", total_steps=400)
        progress.update({"step": 1, "train/loss": 8.1, "perf/tokens_per_second": 9000.0, ...})
        progress.message("evaluating 3 domains")
    """

    def __init__(
        self, *, log_every_steps: int = 10, stream: TextIO | None = None, console: Terminal | None = None
    ) -> None:
        """`log_every_steps`: steps between plain lines. `stream`: default standard output. `console`: for tests."""
        self._every = max(1, log_every_steps)
        self._stream = stream or sys.stdout
        self._console = console or self._make_console()
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._name, self._total, self._step, self._printed = "", 0, 0, -1
        self._step_seconds: float | None = None
        self._drawn = -1.0
        self._mute = False

    def _make_console(self) -> Terminal | None:
        """A console if there is a terminal that can redraw a line; None means plain lines."""
        try:
            console = Terminal(file=self._stream)
            able = console.is_terminal and not console.is_dumb_terminal and console.width >= 40
            return console if able and not os.environ.get("CI") else None
        except _TERMINAL_TROUBLE:
            return None

    def stage(self, name: str, total_steps: int) -> None:
        """Begin a stage (or continue one: the first update says at which step)."""
        self._end_bar()
        self._name, self._total, self._step, self._printed, self._step_seconds = name, total_steps, 0, -1, None
        if self._console is None:
            self._write(f"{name}: {total_steps} steps")
            return
        try:
            self._bar = Bar(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TextColumn("{task.fields[figures]}"),
                console=self._console,
                auto_refresh=False,  # no thread of its own, whose errors nobody could catch
                expand=True,
            )
            self._task = self._bar.add_task(escape(name), total=total_steps, figures="starting")
            self._bar.start()
        except _TERMINAL_TROUBLE:
            self._fall_back()

    def update(self, line: Mapping[str, Any]) -> None:
        """Take in one line of metrics."""
        self._step = int(_number(line.get("step")) or self._step)
        if seconds := _number(line.get("perf/step_seconds")):
            before = seconds if self._step_seconds is None else self._step_seconds
            self._step_seconds = (1 - _SMOOTHING) * before + _SMOOTHING * seconds
        if self._bar is not None and self._task is not None:
            try:
                self._bar.update(self._task, completed=self._step, figures=self._figures(line), refresh=self._fresh())
            except _TERMINAL_TROUBLE:
                self._fall_back()
        elif self._console is None and self._due():
            self._printed = self._step
            self._write(f"{self._name}  step {self._step}/{self._total}  {self._figures(line)}")

    def message(self, text: str) -> None:
        """A line above the bar, or a plain line."""
        if self._console is None:
            self._write(text)
            return
        try:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        except _TERMINAL_TROUBLE:
            self._fall_back()
            self._write(text)

    def close(self) -> None:
        """Leave the terminal as it was; may be called twice."""
        self._end_bar()

    def _fresh(self) -> bool:
        """Whether it is time to draw again: four times a second, and at the end."""
        now = time.monotonic()
        if now - self._drawn < 0.25 and self._step < self._total:
            return False
        self._drawn = now
        return True

    def _due(self) -> bool:
        if self._step == self._printed:
            return False
        return self._step == 1 or self._step >= self._total or self._step - max(0, self._printed) >= self._every

    def _figures(self, line: Mapping[str, Any]) -> str:
        parts = []
        if (loss := _number(line.get("train/loss"))) is not None:
            parts.append(f"loss {loss:.4f}")
        if (replay := _number(line.get("train/replay_fraction"))) is not None:
            parts.append(f"replay {replay:.1%}")
        if (speed := _number(line.get("perf/tokens_per_second"))) is not None:
            parts.append(f"{speed:,.0f} tokens/s")
        if self._step_seconds is not None:
            parts.append(f"ETA {clock(self._step_seconds * (self._total - self._step))}")
        return "  ".join(parts)

    def _write(self, text: str) -> None:
        """One plain line; whatever the stream cannot show is replaced, and a closed stream is left alone."""
        if self._mute:
            return
        try:
            encoding = getattr(self._stream, "encoding", None) or "utf-8"
            self._stream.write(text.encode(encoding, errors="replace").decode(encoding) + "\n")
            self._stream.flush()
        except (OSError, ValueError, LookupError):
            self._mute = True

    def _fall_back(self) -> None:
        """The terminal misbehaves: plain lines from here on."""
        self._end_bar()
        self._console = None

    def _end_bar(self) -> None:
        bar, self._bar, self._task = self._bar, None, None
        if bar is not None:
            try:
                bar.stop()
            except (*_TERMINAL_TROUBLE, IndexError):  # IndexError: a bar whose start failed half-way
                self._console = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.close()
