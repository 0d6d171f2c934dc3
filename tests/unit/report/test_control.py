"""Control on the report: its curves, a mark at every action, the actions in words, and the plan that was followed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nexus_ray.report import control, curves
from nexus_ray.report.page import mixtures, render_report
from nexus_ray.report.record import load_run
from tests.record_fixture import BATCH, HOSTILE, write_record

STAGE = {"stage": "encyclopedia", "stage_index": 1, "attempt": 0}


def line(step: int, lost: float, ratio: float, action: dict[str, Any] | None = None) -> dict[str, Any]:
    forgetting = {"forgetting": {"shakespeare": lost}, "error": {"shakespeare": 0.01}}
    return {
        **STAGE,
        "step": step,
        **forgetting,
        "limit": 0.3,
        "replay_ratio": ratio,
        "lr_factor": 1.0,
        "action": action,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of 40 steps a stage, whose second raised its replay after 10 and 20 steps."""
    made = write_record(tmp_path / "run", steps=40)
    more = {"kind": "replay", "step": 10, "replay_ratio": 0.3, "lr_factor": 1.0, "reason": f"it forgets {HOSTILE}"}
    lines = [
        line(10, 0.1, 0.1),
        line(10, 0.4, 0.1, more),
        line(20, 0.5, 0.3, {**more, "step": 20, "replay_ratio": 0.5, "reason": "and goes on"}),
        line(30, 0.2, 0.5),
    ]
    text = "".join(json.dumps(each) + "\n" for each in lines)
    (made / "control.jsonl").write_text(text + '{"torn": ')
    plan = [json.loads(each) for each in (made / "plan.jsonl").read_text().splitlines()]
    [own] = [each for each in plan if each["stage_index"] == 1]
    for step, weights in ((10, {"encyclopedia": 7, "shakespeare": 3}), (20, {"encyclopedia": 1, "shakespeare": 1})):
        plan.append({**own, "start_row": step * 32, "rows": (40 - step) * 32, "weights": weights})
    (made / "plan.jsonl").write_text("".join(json.dumps(each) + "\n" for each in plan))
    return made


def test_the_last_line_of_a_step_counts_and_every_action_is_marked(folder: Path) -> None:
    record = load_run(folder)
    forgetting, put = control.charts(record)
    lost, limit = forgetting.series
    start = 40 * BATCH
    assert list(lost.x) == [start + step * BATCH for step in (10, 20, 30)] and list(lost.y) == [0.4, 0.5, 0.2]
    assert list(lost.marks) == [(start + 10 * BATCH, 0.4), (start + 20 * BATCH, 0.5)]
    assert list(limit.y) == [0.3] * 3 and [list(s.y) for s in put.series] == [[0.1, 0.3, 0.5], [1.0] * 3]
    assert [(a["stage"], a["step"], a["replay_ratio"]) for a in control.actions(record)] == [
        ("encyclopedia", 10, 0.3),
        ("encyclopedia", 20, 0.5),
    ]


def test_the_curves_of_training_carry_the_marks(folder: Path) -> None:
    record = load_run(folder)
    replay = next(chart for chart in curves.training(record) if chart.title == "Replay share")
    assert [x for x, _ in control.marked(record, replay).series[-1].marks] == [50 * BATCH, 60 * BATCH]


def test_the_page_shows_them_and_escapes_reasons(folder: Path) -> None:
    text = render_report(load_run(folder))
    assert "Forgetting under control" in text and "and goes on" in text
    assert HOSTILE not in text and "it forgets &lt;script&gt;" in text


def test_what_a_stage_read_follows_the_plan_as_it_was_changed(folder: Path) -> None:
    [_, mix, _] = mixtures(load_run(folder))
    shares = {name: share for name, share, _ in mix["parts"]}
    assert shares["shakespeare"] == pytest.approx((10 * 0.1 + 10 * 0.3 + 20 * 0.5) / 40)


def test_without_control_there_is_no_such_part(tmp_path: Path) -> None:
    record = load_run(write_record(tmp_path / "run", steps=40))
    assert control.charts(record) == [] and "The forgetting budget" not in render_report(record)


def test_lines_that_were_replaced_wholly_count_nothing() -> None:
    rows = [(0, 300), (100, 200), (50, 250)]
    segments = [{"start_row": start, "rows": count} for start, count in rows]
    assert [taken for _, taken in control.effective_rows(segments)] == [50, 0, 250]
