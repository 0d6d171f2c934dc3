"""A study in the terminal and on its page: finished, unfinished, hostile."""

from __future__ import annotations

import dataclasses
import io
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from nexus_ray.errors import ConfigError
from nexus_ray.report.study import StudyView, advice_text, headline, letters, print_study
from nexus_ray.report.study_page import compare_study, render_study
from nexus_ray.report.study_plots import Axis
from nexus_ray.study.front import Goal
from nexus_ray.study.records import Point, Trial
from tests.study_views import RATIO, full_view, study_trials, trial


@pytest.fixture(scope="module")
def view() -> StudyView:
    return full_view()


@pytest.fixture(scope="module")
def page(view: StudyView) -> str:
    return render_study(view)


class _Tags(HTMLParser):
    """Every tag must be closed; SVG marks that take the keyboard must say what they are."""

    VOID = frozenset(("meta", "link", "input", "line", "path", "circle", "rect", "br"))

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.silent = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.silent += tag == "g" and "tabindex" in given and not (given.get("aria-label") or given.get("data-tip"))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_has_every_part_and_loads_nothing(page: str) -> None:
    for part in ("next", "front", "winner", "parallel", "effects", "curves", "laws", "trials"):
        assert f'<section id="{part}">' in page
    assert "default-src 'none'" in page and not re.search(r'(src|href)="(?!data:)', page)
    tags = _Tags()
    tags.feed(page)
    assert tags.open == [] and tags.silent == 0
    assert page.count('class="chart scatter"') == 1 and page.count('class="chart parallel"') == 1
    assert page.count('class="chart dots"') == 8  # four knobs on two objectives


def test_the_best_trial_can_be_repeated_from_the_page(view: StudyView, page: str) -> None:
    assert view.front is not None
    best = view.representative(view.front.winner.id)
    command = view.command(best)
    assert command.startswith("nexus-ray roadmap configs/experiments/replay/run.yaml continual.replay_ratio=0.25")
    assert "continual.use_lora=false" in command and "seed=0" in command and "method=" not in command
    assert command in page and best.id in command
    awkward = dataclasses.replace(view, common={"stages": [{"name": "a b"}], "x": True, "y": "1e3"})
    words = dict(word.split("=", 1) for word in shlex.split(awkward.command(best))[3:])
    assert yaml.safe_load(words["stages"]) == [{"name": "a b"}] and yaml.safe_load(words["y"]) == "1e3"


def test_front_members_have_letters_in_page_and_terminal(view: StudyView, page: str) -> None:
    assert view.front is not None
    console = Console(file=io.StringIO(), width=200)
    print_study(view, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    marks = letters(view.front)
    assert list(marks.values()) == sorted(marks.values()) and len(marks) == len(view.front.on_front())
    for mark in marks.values():
        assert re.search(rf"^{mark} +method=", text, re.M) and f"<b>{mark}</b>" in page
    for words in (
        "54 trials (48 finished, 6 stopped)",
        "effects on forgetting, marginal means",
        "next: Widen",
        "again: nexus-ray",
    ):
        assert words in text
    assert "2,500,000 tokens are 2.5 times the longest fitted budget" in text and headline(view) in text


def test_one_seed_is_said_plainly() -> None:
    view = StudyView("one", study_trials((0,)), Goal(max_forgetting=0.5))
    page = render_study(view)
    assert "there is no interval, and no difference can be told from noise" in page
    assert "there is no second seed to tell its lead from noise" in headline(view)
    assert "unknown: one seed" in page and "no interval" in page


def test_unfinished_failed_and_empty_studies(tmp_path: Path) -> None:
    running = dataclasses.replace(trial({"a": 1}, 0, -2.0, 0.1, status="stopped"), status="running")
    failed = Trial(Point({"a": 2}), 0, "failed", reason="out of memory")
    page = render_study(StudyView("young", [running, failed, Trial(Point({"a": 3}), 0)]))
    assert "No trial has finished yet" in page and "out of memory" in page and 'id="front"' not in page
    assert "No data yet" in render_study(StudyView("new", [Trial(Point({}), 0)]))
    with pytest.raises(ConfigError, match="has no trial yet"):
        compare_study(StudyView("none", []), tmp_path / "study.html")
    path = compare_study(StudyView("young", [running]), tmp_path / "study.html", console=Console(file=io.StringIO()))
    assert Path(path).read_text().startswith("<!DOCTYPE html>")


def test_text_of_the_study_is_escaped_and_secrets_are_hidden() -> None:
    evil = '"><script>alert(1)</script>'
    rows = [trial({evil: evil, "b": float(b)}, seed, -2.0 + b, 0.1 + b) for b in (0, 1) for seed in (0, 1)]
    failed = Trial(Point({evil: evil, "b": 3.0}), 0, "failed", reason=evil)
    view = StudyView(evil, [*rows, failed], space={evil: evil}, common={"storage": "s3://KEY:hunter2@bucket"})
    page = render_study(view)
    assert "<script>alert" not in page and "hunter2" not in page
    tags = _Tags()
    tags.feed(page)
    assert tags.open == [] and tags.silent == 0


def test_no_feasible_point_and_no_ratio_are_said(view: StudyView) -> None:
    hopeless = StudyView("strict", study_trials(), Goal(max_forgetting=0.001))
    assert "No point keeps forgetting below 0.001" in headline(hopeless)
    advice = dataclasses.replace(view.advice[0], ratio=None, interval=None, warnings=("none",))
    assert "no replay ratio. Careful: none" in advice_text(advice)


def test_axes_of_parallel_coordinates() -> None:
    assert Axis("r", (0.01, 0.1, 1.0)).place(0.1) == pytest.approx(0.5)  # a factor of ten: logarithmic
    assert Axis("r", (0.0, 0.5, 1.0)).place(0.5) == 0.5 and Axis("c", (1, 2), upside_down=True).place(1) == 1.0
    assert Axis("m", ("a", True, None)).place(None) == 1.0 and Axis("m", (3,)).place(3) == 0.5
    assert Axis("r", tuple(range(101))).labels()[0] == (0.0, "0")


def test_names_of_knobs_are_short_unless_two_end_alike() -> None:
    view = StudyView("s", [trial({"a.rank": 1, "b.rank": 2, RATIO: 0.1}, 0, -2.0, 0.1)])
    assert view.label(view.trials[0].point.params) == "a.rank=1, b.rank=2, replay_ratio=0.1"
