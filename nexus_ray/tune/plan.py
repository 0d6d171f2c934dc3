"""`nexus-ray tune --dry-run`: a study in lines, without Ray. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import islice

from nexus_ray.config.study import rung_shares
from nexus_ray.study.load import MOST_CHECKED, Study, run_tokens, rung_tokens, shown
from nexus_ray.study.placement import DRIVER_CPUS, Need
from nexus_ray.study.records import Point
from nexus_ray.study.search import searcher
from nexus_ray.study.space import Space

MOST_SHOWN = 40
"""Points that are listed."""


def plan_lines(study: Study, need: Need, trials: int | None) -> Iterator[str]:
    """What a study will do; `trials` at once, None where a cluster decides."""
    config, seeds = study.config, study.config.seeds
    points = searcher(config, study.space).total([])
    yield f"study {config.name}: {points} points x {len(seeds)} seeds, search {config.search.kind}"
    yield f"record  {study.folder.uri}"
    yield f"shared  {study.folder.uri.rpartition('/')[0]}/_shared"
    for name, knob in study.space.knobs.items():
        when = f"  when {knob.when}" if knob.when else ""
        yield f"  {name}: {knob_text(study.space, name)}{when}"
    base = study.config_of(None, seeds[0])
    full = run_tokens(base)
    yield f"base    {full:,} tokens a trial; data.fraction {base.data.fraction:.4g}"
    yield from _rungs(study, points)
    yield f"goal    {_goal(study)}"
    workers = f"{need.workers} worker(s) x {need.cpus_per_worker} CPUs"
    gpus = f", {need.gpus_per_worker:g} GPUs each" if need.gpus_per_worker else ""
    at_once = "as many at once as the cluster holds" if trials is None else f"{trials} at once on this machine"
    yield f"trial   {workers}{gpus}, 1 CPU for data, {DRIVER_CPUS} for its driver; {at_once}"
    yield from _points(study, points)


def knob_text(space: Space, name: str) -> str:
    """What a knob can be, in words: its values, or its range."""
    knob, values = space.knobs[name], space.values(name)
    if values is not None:
        return ", ".join(str(value) for value in values)
    low, high = knob.range
    return f"{knob.kind} [{low:g}, {high:g}]"


def expected_share(study: Study, points: int) -> Fraction:
    """Tokens that promotion spends, as a share of all points' full budgets, if all budgets are equal."""
    stopping = study.config.stopping
    if stopping.rule != "asha":
        return Fraction(1)
    spent, before, left = Fraction(0), Fraction(0), points
    for share in (*rung_shares(stopping), Fraction(1)):
        spent += left * (share - before)
        before, left = share, max(1, left // stopping.eta)
    return spent / points


def _rungs(study: Study, points: int) -> Iterator[str]:
    stopping = study.config.stopping
    shares = rung_shares(stopping)
    base = study.config_of(None, study.config.seeds[0])
    rungs = ", ".join(
        f"{float(share):.3g} ({tokens:,} tokens)" if tokens is not None else f"{float(share):.3g}"
        for share, tokens in zip(shares, rung_tokens(base, shares) if shares else (), strict=True)
    )
    yield f"rule    {stopping.rule}" + (f", rungs at {rungs}" if rungs else "")
    budgets = [study.budget(point) for point in islice(_known(study, points), MOST_CHECKED)] or [run_tokens(base)]
    total = sum(budgets) * points // len(budgets) * len(study.config.seeds)
    share = expected_share(study, points) if len(set(budgets)) == 1 else Fraction(1)
    promised = f", of which promotion spends {float(share):.0%}" if share < 1 else ""
    about = "" if len(budgets) == points else "about "
    yield f"tokens  {about}{total:,} at full budgets{promised}"


def _goal(study: Study) -> str:
    rule = study.config.objective
    if rule.kind == "new_under_forgetting":
        return f"best new-domain score with forgetting at most {rule.max_forgetting:g} bits per byte"
    weights = rule.weights
    return f"{weights.new:g} x new - {weights.forgetting:g} x forgetting - {weights.cost:g} x cost / 1e15"


def _known(study: Study, points: int) -> Iterator[Point]:
    """The points that are known beforehand."""
    search, space = study.config.search, study.space
    if search.kind == "grid":
        yield from space.grid()
    elif search.kind == "random":
        yield from (space.sample(search.seed, index) for index in range(points))


def _points(study: Study, points: int) -> Iterator[str]:
    for number, point in enumerate(_known(study, points)):
        if number == MOST_SHOWN:
            yield f"  and {points - MOST_SHOWN} more"
            return
        yield f"  {point.id}  {study.budget(point):>12,} tokens  {shown(point)}"
