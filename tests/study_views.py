"""A study that never ran: trials with known effects, replicates and early stops."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from nexus_ray.report.study import Decision, StudyView
from nexus_ray.study.advice import best_ratio, fit_laws
from nexus_ray.study.front import Goal
from nexus_ray.study.laws import Measurement
from nexus_ray.study.records import Objectives, Point, Report, Status, Trial, Value

BUDGET = 1_000_000
RATIO, RANK, WARMUP, METHOD = "continual.replay_ratio", "continual.lora_rank", "continual.warmup_steps", "method"


def trial(
    params: dict[str, Value], seed: int, new: float, forgetting: float, cost: float = 1.0, status: Status = "finished"
) -> Trial:
    """One trial with reports at a quarter, half and all of the budget (at a quarter alone if stopped)."""
    shares = (0.25, 0.5, 1.0) if status == "finished" else (0.25,)
    reports = tuple(
        Report(
            int(500 * share),
            int(BUDGET * share),
            Objectives(new - 0.4 * (1 / share - 1) ** 0.5, forgetting * share**0.2, cost * share),
        )
        for share in shares
    )
    return Trial(Point(params), seed, status, reports, "below the median" if status == "stopped" else None)


def truth(params: dict[str, Value]) -> tuple[float, float]:
    """New-domain score and forgetting without noise; the warm-up has no effect."""
    ratio = float(params[RATIO])  # type: ignore[arg-type]
    new, lost = -1.9 - 0.5 * ratio, 1.2 / (1 + 40 * ratio) ** 0.6
    if params[METHOD] == "lora":
        new, lost = new - 0.35 + 0.006 * float(params[RANK]), lost * 0.5  # type: ignore[arg-type]
    return new, lost


def points() -> list[dict[str, Value]]:
    """A full grid in which the rank is conditional on LoRA."""
    out: list[dict[str, Value]] = []
    for method, ratio, warmup in itertools.product(("full", "lora"), (0.0, 0.05, 0.25), (0, 20)):
        common: dict[str, Value] = {METHOD: method, RATIO: ratio, WARMUP: warmup}
        out += [{**common, RANK: rank} for rank in (4, 16)] if method == "lora" else [common]
    return out


def study_trials(seeds: Sequence[int] = (0, 1, 2), *, noise: float = 0.004, stop_below: float = -9.0) -> list[Trial]:
    """All points with all seeds; those with a score below `stop_below` were stopped at a quarter of the budget."""
    out = []
    for params, seed in itertools.product(points(), seeds):
        generator = np.random.default_rng([seed, len(out)])
        (new, lost), common = truth(params), 0.02 * seed  # a seed moves all points alike
        status: Status = "stopped" if new < stop_below else "finished"
        moved = new + common + noise * generator.normal(), lost + noise * generator.normal()
        out.append(trial(params, seed, *moved, cost=1e12 * (0.7 if params[METHOD] == "lora" else 1.0), status=status))
    return out


def law_measurements(seed: int = 0, *, budgets: Sequence[float] = (4e5, 1e6), noise: float = 1.0) -> list[Measurement]:
    """Runs of a world that follows none of the laws exactly."""
    generator, out = np.random.default_rng(seed), []
    for tokens, ratio, replicate in itertools.product(budgets, (0.0, 0.01, 0.05, 0.1, 0.25), range(3)):
        new = law_truth(tokens, ratio)[0] * (1 + 0.001 * noise * generator.normal())
        old = law_truth(tokens, ratio)[1] * (1 + 0.015 * noise * generator.normal())
        out.append(Measurement(tokens, ratio, new, old, replicate))
    return out


def law_truth(tokens: float, ratio: float) -> tuple[float, float]:
    """(loss on the new domain, forgetting)"""
    size = tokens / 1e6
    new = 1.6 + 1.15 * ((1 - ratio) * size) ** -0.32 + 0.05 * ratio**1.5
    return new, 4.0 * size**0.25 / (1 + 300 * ratio * size**0.5) ** 0.42 - 0.05


def _overrides(params: Mapping[str, Value]) -> dict[str, Value]:
    """The named option `method` stands for a config path."""
    own = {path: value for path, value in params.items() if path != METHOD}
    return {**own, "continual.use_lora": params[METHOD] == "lora"}


def full_view(*, seeds: Sequence[int] = (0, 1, 2)) -> StudyView:
    """A study with everything: replicates, early stops, decisions, laws."""
    trials = study_trials(seeds, stop_below=-2.33)
    decisions = [Decision(t.id, BUDGET // 4, "stopped" if t.status == "stopped" else "continued") for t in trials]
    laws = fit_laws(law_measurements(), draws=60)
    return StudyView(
        "sweep",
        trials,
        Goal(max_forgetting=0.5),
        base="configs/experiments/replay/run.yaml",
        overrides={t.point.id: _overrides(t.point.params) for t in trials},
        space={RATIO: "0, 0.05 or 0.25", RANK: "4 or 16, with method lora"},
        decisions=decisions,
        laws=laws,
        advice=[best_ratio(laws, tokens=2.5e6, max_forgetting=0.4)],
    )


def write_page(folder: Path, view: StudyView) -> Path:
    """The page of a study, for a browser."""
    from nexus_ray.report.study_page import render_study

    (page := folder / "study.html").write_text(render_study(view))
    return page
