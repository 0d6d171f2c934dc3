"""How a study goes on: synchronous halving at concurrency 1, the same after any kill, nothing ever run twice."""

from __future__ import annotations

import json
import math
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nexus_ray.study.course import Course, share_spent
from nexus_ray.study.history import Event
from nexus_ray.study.load import Study
from nexus_ray.study.records import Objectives, Point, Report
from tests.studies import Killed, Lab, Log, Score, a_study, smooth

ASHA: dict[str, Any] = {"rule": "asha", "eta": 3, "rungs": [0.2, 0.5]}
MEDIAN: dict[str, Any] = {"rule": "median", "rungs": [0.2, 0.5], "grace": 3}
BOUND: dict[str, Any] = {"kind": "new_under_forgetting", "max_forgetting": 0.8}
CURVES = json.loads(Path(__file__).with_name("curves.json").read_text())
shared = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=15)


def decisions(events: list[Event]) -> list[Event]:
    return [event for event in events if event["event"] not in ("started", "reported")]


def statuses(course: Course) -> dict[str, str]:
    return {trial.id: trial.status for trial in course.trials()}


def merit(score: Score, point: Point, seeds: list[int], share: float, *, bound: float) -> tuple[float, ...]:
    scores = [score(point, seed, share) for seed in seeds]
    new, forgetting = (sum(getattr(s, name) for s in scores) / len(scores) for name in ("new", "forgetting"))
    return (1, new) if forgetting <= bound else (0, -forgetting)


def halved(study: Study, score: Score, seeds: list[int], *, bound: float) -> set[str]:
    """Successive halving written out: the ids of the points that are run to the end. Evaluations at 18ths."""
    alive = list(study.space.grid())
    for share in (4 / 18, 9 / 18):
        alive.sort(key=lambda point: merit(score, point, seeds, share, bound=bound), reverse=True)
        alive = alive[: max(1, len(alive) // 3)]
    return {point.id for point in alive}


@pytest.mark.parametrize("seeds", [[0], [3, 4]])
@pytest.mark.parametrize("bound", [0.8, 0.5])
def test_at_concurrency_one_it_is_successive_halving_over_means(tmp_path: Path, seeds: list[int], bound: float) -> None:
    objective = {"kind": "new_under_forgetting", "max_forgetting": bound, "rung_slack": 0.0}
    study = a_study(tmp_path, stopping=ASHA, seeds=seeds, objective=objective)
    lab = Lab(study, smooth)
    course = lab.run(Log())
    finished = {trial.point.id for trial in course.trials() if trial.status == "finished"}
    assert finished == halved(study, smooth, seeds, bound=bound)
    assert len(course.trials()) == 12 * len(seeds)
    full = {point.id: study.budget(point) for point in study.space.grid()}
    expected = (12 * 4 / 18 + 4 * 5 / 18 + 1 * 9 / 18) / 12
    assert share_spent(course.trials(), full) == pytest.approx(expected)
    assert sum(lab.tokens.values()) / sum(full.values()) / len(seeds) == pytest.approx(expected), (
        "nothing trained twice"
    )
    paused = [trial for trial in course.trials() if trial.status == "paused"]
    assert all(trial.reason and trial.decisions for trial in paused) and len(paused) == 11 * len(seeds)


@pytest.mark.parametrize(
    ("stopping", "search"),
    [
        (ASHA, {"kind": "grid"}),
        (MEDIAN, {"kind": "grid"}),
        ({"rule": "none"}, {"kind": "random", "trials": 3}),
        (ASHA, {"kind": "random", "trials": 4}),
    ],
)
def test_killed_after_any_event_it_ends_as_if_undisturbed(
    tmp_path: Path, stopping: dict[str, Any], search: dict[str, Any]
) -> None:
    knobs = {"continual.replay_ratio": {"choice": [0.0, 0.25]}, "continual.warmup_steps": {"choice": [1, 5, 20]}}
    if stopping["rule"] != "none":
        stopping = {**stopping, "rungs": [0.3, 0.6]}
    study = a_study(tmp_path, stopping=stopping, search=search, seeds=[0, 1], objective=BOUND, space=knobs)
    failing = frozenset({f"{study.space.sample(0, 1).id}-s1", f"{next(study.space.grid()).id}-s0"})
    whole = Log()
    ended = Lab(study, smooth, steps=4, failing=failing).run(whole)
    for room in range(len(whole.events)):
        log, lab = Log(room=room), Lab(study, smooth, steps=4, failing=failing)
        with pytest.raises(Killed):
            lab.run(log)
        assert log.events == whole.events[:room]
        done = {trial.id for trial in lab.course(log).trials() if trial.status in ("finished", "failed", "stopped")}
        lab.started.clear()
        log.room = None
        again = lab.run(log)
        assert not done & set(lab.started), "an ended trial was run again"
        assert decisions(log.events) == decisions(whole.events)
        assert again.trials() == ended.trials()


@shared
@given(
    kills=st.lists(st.integers(1, 40), max_size=6),
    slots=st.integers(1, 5),
    lingers=st.integers(0, 4),
    seeds=st.sampled_from([[0], [0, 1]]),
    stopping=st.sampled_from([ASHA, MEDIAN, {"rule": "none"}]),
    fails=st.sets(st.integers(0, 23), max_size=5),
)
def test_kills_failures_and_many_at_once(
    tmp_path: Path,
    kills: list[int],
    slots: int,
    lingers: int,
    seeds: list[int],
    stopping: dict[str, Any],
    fails: set[int],
) -> None:
    study = a_study(tmp_path, stopping=stopping, seeds=seeds, objective=BOUND)
    ids = [f"{point.id}-s{seed}" for point in study.space.grid() for seed in seeds]
    failing = frozenset(ids[place] for place in fails if place < len(ids))
    lab, log = Lab(study, smooth, failing=failing, lingers=lingers), Log()
    for room in kills:
        log.room = len(log.events) + room
        before = list(log.events)
        try:
            lab.run(log, slots=slots)
        except Killed:
            assert log.events[: len(before)] == before
    log.room = None
    course = lab.run(log, slots=slots)
    assert statuses(course).keys() == set(ids), "every trial was begun"
    assert {trial for trial, status in statuses(course).items() if status == "failed"} <= failing
    assert "running" not in statuses(course).values() and "planned" not in statuses(course).values()
    for event in ("finished", "failed"):
        named = [e["trial"] for e in log.events if e["event"] == event]
        assert len(named) == len(set(named))
    answered = [(e["trial"], e["rung"]) for e in log.events if e["event"] in ("continued", "paused")]
    assert len(answered) == len(set(answered)), "a rung was decided twice"
    for place, event in enumerate(log.events):
        if event["event"] in ("finished", "failed"):
            later = [e for e in log.events[place + 1 :] if e.get("trial") == event["trial"]]
            assert not later, "something happened to an ended trial"
    if len(failing) < len(ids):
        assert "finished" in statuses(course).values()


def test_a_logged_answer_stands_until_the_point_is_promoted(tmp_path: Path) -> None:
    study = a_study(tmp_path, stopping=ASHA)
    log = Log()
    course = Lab(study, smooth).course(log)
    job = course.next()
    assert job is not None and not job.resumes
    report = Report(200, 180_000, Objectives(-2.0, 0.1, 1.0))
    assert course.report(job.trial, report) == "pause"
    count = len(log.events)
    assert course.report(job.trial, Report(200, 180_000, Objectives(-9.0, 9.0, 1.0))) == "pause"
    assert len(log.events) == count, "a repeated step is not recorded again"
    log.write({"event": "promoted", "point": job.point.id, "rung": 0, "reason": "by hand"})
    assert Lab(study, smooth).course(log).report(job.trial, report) == "continue"


def test_wide_first_and_hasty_only_where_a_worker_would_idle(tmp_path: Path) -> None:
    study = a_study(tmp_path, stopping=ASHA)
    alone, many = Log(), Log()
    Lab(study, smooth).run(alone)
    reasons = [event["reason"] for event in alone.events if event["event"] == "promoted"]
    assert reasons and all(reason.startswith("sure") for reason in reasons)
    planned = [place for place, event in enumerate(alone.events) if event["event"] == "planned"]
    assert max(planned) < min(place for place, e in enumerate(alone.events) if e["event"] == "promoted")
    course = Lab(study, smooth).course(many)
    jobs = [job for _ in range(12) if (job := course.next())]
    assert len(jobs) == 12 and course.next() is None
    for job in jobs[:6]:
        course.report(job.trial, Report(200, 200_000, smooth(job.point, 0, 0.2)))
    assert course.next() is None, "those that arrived are still ending"
    for job in jobs[:6]:
        course.left(job.trial)
    hasty = [course.next() for _ in range(3)]
    assert [job is not None and job.resumes for job in hasty] == [True, True, False], "6 // 3 of those that arrived"
    assert [e["reason"][:6] for e in many.events if e["event"] == "promoted"] == ["likely", "likely"]


@pytest.mark.parametrize("slots", [3, 4])
@pytest.mark.parametrize(("stopping", "ends"), [(ASHA, "paused"), (MEDIAN, "stopped")])
def test_no_trial_is_handed_out_while_its_turn_ends(
    tmp_path: Path, slots: int, stopping: dict[str, Any], ends: str
) -> None:
    """Turns that take up to two evaluations of all others to end: nothing is trained twice, and all is run."""
    study = a_study(tmp_path, stopping=stopping, seeds=[0, 1])
    lab = Lab(study, smooth, lingers=2 * slots)
    course = lab.run(Log(), slots=slots)
    assert course.active == frozenset() and set(statuses(course).values()) == {"finished", ends}
    assert lab.tokens == {trial.id: trial.reports[-1].tokens for trial in course.trials()}, "trained twice"


def test_a_place_is_filled_in_haste_only_while_others_train(tmp_path: Path) -> None:
    course = Lab(a_study(tmp_path, stopping=ASHA), smooth).course(Log())
    jobs = [job for _ in range(12) if (job := course.next())]
    for place, job in enumerate(jobs):
        if place < 7:
            course.report(job.trial, Report(200, 200_000, smooth(job.point, 0, 0.2)))
        if place not in (6, 11):
            course.left(job.trial)  # the first six at their rung, four cut off before it
    assert course.active == {jobs[6].trial, jobs[11].trial}
    hasty = course.next()
    assert hasty is not None and hasty.resumes, "the last one trains"
    course.report(hasty.trial, Report(450, 450_000, smooth(hasty.point, 0, 0.5)))
    course.left(jobs[11].trial)
    assert course.next() is None, "what is left was told to end, and will give its place back by itself"


def test_a_trial_that_was_cut_off_waits_for_the_next_process(tmp_path: Path) -> None:
    log = Log()
    lab = Lab(a_study(tmp_path), smooth)
    course = lab.course(log)
    first = course.next()
    assert first is not None
    course.left(first.trial)
    second = course.next()
    assert second is not None and second.trial != first.trial
    again = lab.course(log).next()
    assert again is not None and again.trial == first.trial


def test_a_restarted_turn_whose_point_was_promoted_meanwhile_runs(tmp_path: Path) -> None:
    """Told to pause, it died before it ended; started anew, it is told to go on, and nobody else is given its trial."""
    study = a_study(tmp_path, stopping={"rule": "asha", "eta": 2, "rungs": [0.2]})
    course = Lab(study, smooth).course(Log())
    jobs = [job for _ in range(12) if (job := course.next())]
    scores = {job.trial: smooth(job.point, 0, 0.2) for job in jobs}
    jobs.sort(key=lambda job: scores[job.trial].forgetting - scores[job.trial].new)
    best = jobs[0]
    early = Report(200, 200_000, scores[best.trial])
    assert course.report(best.trial, early) == "pause"
    for job in jobs[1:]:
        course.report(job.trial, Report(200, 200_000, scores[job.trial]))
    assert course.next() is None, "promoted, but all turns are still ending"
    assert course.report(best.trial, early) == "continue"
    assert statuses(course)[best.trial] == "running"


def median_rule(study: Study, score: Score, seeds: list[int], *, grace: int) -> dict[str, int]:
    """The median rule written out, points one after the other: rungs that each passed. A point stops where more than
    half of all that reached the rung before, stopped or not, are better. Evaluations at 18ths."""
    reached: list[list[tuple[float, ...]]] = [[], []]
    passed = {}
    for point in study.space.grid():
        passed[point.id] = 0
        for number, share in enumerate((4 / 18, 9 / 18)):
            own = merit(score, point, seeds, share, bound=math.inf)
            before = list(reached[number])
            reached[number].append(own)
            if len(before) >= grace and sum(other > own for other in before) > len(before) / 2:
                break
            passed[point.id] += 1
    return passed


@pytest.mark.parametrize("seeds", [[0], [0, 1]])
@pytest.mark.parametrize("order", range(4))
def test_the_median_is_of_all_that_reached_the_rung(tmp_path: Path, seeds: list[int], order: int) -> None:
    """Half of the later points pass, not ever fewer: those that were stopped stay in the comparison."""

    def ranked(point: Point, seed: int, share: float) -> Objectives:
        place = random.Random(f"{order} {point.id} {share > 0.3}").random()
        return Objectives(place + seed / 1000, 0.0, share)

    objective = {"kind": "new_under_forgetting", "max_forgetting": 9.0}
    study = a_study(tmp_path, stopping=MEDIAN, seeds=seeds, objective=objective)
    log = Log()
    course = Lab(study, ranked).run(log)
    expected = median_rule(study, ranked, seeds, grace=MEDIAN["grace"])
    stopped = {event["point"]: event["rung"] for event in log.events if event["event"] == "stopped"}
    assert stopped == {point: rungs for point, rungs in expected.items() if rungs < 2}
    finished = {trial.point.id for trial in course.trials() if trial.status == "finished"}
    assert finished == {point for point, rungs in expected.items() if rungs == 2}


def test_points_that_failed_do_not_count_in_the_median(tmp_path: Path) -> None:
    study = a_study(tmp_path, stopping={**MEDIAN, "grace": 1})
    points = list(study.space.grid())
    log = Log()
    course = Lab(study, smooth).course(log)
    jobs = [job for _ in points if (job := course.next())]
    for job, new in zip(jobs, [-1.0, -3.0, -2.0], strict=False):
        if new == -2.0:
            course.fail(jobs[0].trial, "after the rung")
        course.report(job.trial, Report(200, 200_000, Objectives(new, 0.0, 1.0)))
    judged = [(event["event"], event["reason"][:11]) for event in log.events if "rung" in event]
    assert judged == [("continued", "0 of 0 befo"), ("stopped", "1 of 1 befo"), ("continued", "0 of 1 befo")]


def test_a_point_that_the_run_refuses_fails_and_the_study_goes_on(tmp_path: Path) -> None:
    """A sequence length between two that are sound, of which a batch holds no whole number."""

    def score(point: Point, seed: int, share: float) -> Objectives:
        return Objectives(-2.0, 0.1, share)

    space = {"training.seq_len": {"int_uniform": [100, 200]}, "continual.warmup_steps": {"choice": [1, 5]}}
    common = {"training.global_batch_tokens": 6000, "training.token_budget": 450_000}
    search = {"kind": "optuna", "trials": 8, "startup": 3}
    study = a_study(tmp_path, space=space, search=search, common=common, seeds=[0, 1])
    whole = Log()
    course = Lab(study, score, steps=4).run(whole)
    trials = course.trials()
    failed = [trial for trial in trials if trial.status == "failed"]
    assert len(trials) == 16 and failed, "no point was refused"
    assert all("training.seq_len" in str(trial.reason) for trial in failed)
    assert {trial.status for trial in trials} <= {"failed", "finished"}
    budgets = [event["budget"] for event in whole.events if event["event"] == "planned"]
    assert budgets == [study.base_tokens] * 8
    first = next(place for place, event in enumerate(whole.events) if event["event"] == "failed")
    for room in (first, first + 1):
        log = Log(room=room)
        with pytest.raises(Killed):
            Lab(study, score, steps=4).run(log)
        log.room = None
        assert Lab(study, score, steps=4).run(log).trials() == trials
        assert decisions(log.events) == decisions(whole.events)


def test_a_trial_that_takes_the_study_along_twice_fails(tmp_path: Path) -> None:
    log = Log()
    lab = Lab(a_study(tmp_path), smooth)
    first = lab.course(log).next()
    assert first is not None
    for times in (1, 2):
        course = lab.course(log)
        job = course.next()
        assert job is not None and job.trial == first.trial, "what was cut off goes on first"
        assert course.lost(job.trial) == (times == 2)
        course.left(job.trial)
    assert statuses(lab.course(log))[first.trial] == "failed"
    assert "died 2 times" in str(lab.course(log).trials()[0].reason)
    course = lab.run(log)
    assert set(statuses(course).values()) == {"finished", "failed"} and first.trial not in lab.started
    course = lab.course(log)
    course.retry([first.trial])
    assert not course.lost(first.trial), "asked for, it starts with none"


def test_one_replicates_luck_decides_nothing(tmp_path: Path) -> None:
    """Seed noise as large as the effect: over four seeds the better half goes on, whatever single seeds say."""

    def noisy(point: Point, seed: int, share: float) -> Objectives:
        ratio = float(point.params["continual.replay_ratio"])
        luck = random.Random(f"{point.id}{seed}").choice([-1.0, 1.0]) if seed < 3 else 0.0
        rest = -sum(random.Random(f"{point.id}{s}").choice([-1.0, 1.0]) for s in range(3)) if seed == 3 else luck
        return Objectives(ratio + rest, 0.0, share)

    seeds = [0, 1, 2, 3]
    study = a_study(tmp_path, stopping={"rule": "asha", "eta": 2, "rungs": [0.5]}, seeds=seeds)
    course = Lab(study, noisy).run(Log())
    finished = {
        trial.point.id: trial.point.params["continual.replay_ratio"] for trial in course.trials() if trial.final
    }
    assert len(finished) == 6 and min(finished.values()) >= 0.05  # type: ignore[type-var]
    for point in study.space.grid():
        per_point = [status for trial, status in statuses(course).items() if trial.startswith(point.id)]
        assert len(set(per_point)) == 1, "replicates go on or stay together"


def test_a_failed_replicate_leaves_its_point_in_the_running(tmp_path: Path) -> None:
    objective = {"kind": "new_under_forgetting", "max_forgetting": 0.75, "rung_slack": 0.0}
    for stopping in (ASHA, MEDIAN):
        study = a_study(tmp_path, stopping=stopping, seeds=[0, 1], objective=objective)
        best = next(p for p in study.space.grid() if p.id in halved(study, smooth, [0], bound=0.75))
        course = Lab(study, smooth, failing=frozenset({f"{best.id}-s1"})).run(Log())
        assert statuses(course)[f"{best.id}-s0"] == "finished"
        assert statuses(course)[f"{best.id}-s1"] == "failed"


def test_a_trial_that_always_fails_leaves_the_others_untouched(tmp_path: Path) -> None:
    study = a_study(tmp_path)
    bad = f"{list(study.space.grid())[4].id}-s0"
    log = Log()
    lab = Lab(study, smooth, failing=frozenset({bad}))
    course = lab.run(log)
    assert {trial for trial, status in statuses(course).items() if status != "finished"} == {bad}
    assert {trial.reason for trial in course.trials() if trial.id == bad} == {"it always does"}
    assert lab.started.count(bad) == 1
    lab.failing = frozenset()
    lab.started.clear()
    course = lab.course(log)
    course.retry([bad, lab.study.space.sample(0, 0).id + "-s0"])
    lab.run(log)
    assert lab.started == [bad], "asked for, it runs again; finished ones do not"


def test_a_trial_that_failed_at_its_pause_and_is_run_again_pauses_there(tmp_path: Path) -> None:
    """Its checkpoint could not be written, say. What it was told stands, and it may be promoted like the others."""
    study, log = a_study(tmp_path, stopping=ASHA), Log()
    course, lab = Lab(study, smooth).course(log), Lab(study, smooth)
    job = course.next()
    assert job is not None
    at_rung = Report(200, 200_000, smooth(job.point, job.seed, 4 / 18))
    assert course.report(job.trial, at_rung) == "pause"
    course.fail(job.trial, "the disk is full")
    course.left(job.trial)
    course.retry([job.trial])
    again = course.next()
    assert again is not None and again.trial == job.trial and course.report(job.trial, at_rung) == "pause"
    assert statuses(course)[job.trial] == "paused"
    course.left(job.trial)
    lab.saved[job.trial] = 4
    assert statuses(lab.run(log)) == statuses(Lab(study, smooth).run(Log())), "as if it had never failed"


def test_scores_that_are_no_numbers_fail_a_trial(tmp_path: Path) -> None:
    def broken(point: Point, seed: int, share: float) -> Objectives:
        bad = point.params["continual.warmup_steps"] == 1 and share > 0.3
        return Objectives(math.nan if bad else -2.0, 0.1, share)

    course = Lab(a_study(tmp_path), broken).run(Log())
    failed = [trial for trial in course.trials() if trial.status == "failed"]
    assert len(failed) == 3 and all("not finite" in str(trial.reason) for trial in failed)


def test_a_signal_stops_a_point_at_once(tmp_path: Path) -> None:
    study = a_study(tmp_path, stopping={**ASHA, "max_signal": {"grad_norm": 5.0}}, seeds=[0, 1])
    log = Log()
    course = Lab(study, smooth).course(log)
    first, second = course.next(), course.next()
    assert first and second and first.point == second.point
    calm = Report(50, 50_000, Objectives(-2.0, 0.1, 1.0), {"grad_norm": 4.9})
    wild = Report(50, 50_000, Objectives(-2.0, 0.1, 1.0), {"grad_norm": 50.0})
    assert course.report(first.trial, calm) == "continue"
    assert course.report(second.trial, wild) == "stop"
    assert course.report(first.trial, Report(100, 100_000, calm.objectives)) == "stop"
    assert course.active == {first.trial, second.trial}
    course.left(first.trial)
    course.left(second.trial)
    assert course.active == frozenset()
    ended = Lab(study, smooth).run(log)
    assert set(statuses(ended).values()) == {"stopped", "paused", "finished"}


def test_a_study_is_extended_with_trials_seeds_and_a_wider_space(tmp_path: Path) -> None:
    def grown(**changes: Any) -> Study:
        return a_study(
            tmp_path, **{"search": {"kind": "random", "trials": 5, "seed": 3}, "objective": BOUND, **changes}
        )

    log = Log()
    small = Lab(grown(), smooth)
    before = small.run(log).trials()
    more = {"kind": "random", "trials": 9, "seed": 3}
    wide = {
        "continual.replay_ratio": {"choice": [0.0, 0.05, 0.1, 0.25]},
        "continual.warmup_steps": {"choice": [1, 5, 20, 50, 80]},
    }
    lab = Lab(grown(search=more, space=wide), smooth)
    course = lab.run(log)
    assert course.trials()[:5] == before and len(course.trials()) == 9
    assert not {trial.id for trial in before} & set(lab.started)
    replicated = Lab(grown(search=more, space=wide, seeds=[0, 7]), smooth)
    course = replicated.run(log)
    assert len(course.trials()) == 18 and {trial[-2:] for trial in replicated.started} == {"s7"}
    assert set(statuses(course).values()) == {"finished"}


def test_new_seeds_of_a_halved_study_follow_their_points(tmp_path: Path) -> None:
    log = Log()
    first = Lab(a_study(tmp_path, stopping=ASHA), smooth).run(log)
    finished = {trial.point.id for trial in first.trials() if trial.status == "finished"}
    lab = Lab(a_study(tmp_path, stopping=ASHA, seeds=[0, 1, 2]), smooth)
    course = lab.run(log)
    now = {trial.id for trial in course.trials() if trial.status == "finished"}
    assert {f"{point}-s{seed}" for point in finished for seed in (0, 1, 2)} <= now
    assert not any(trial.endswith("-s0") and trial[:8] in finished for trial in lab.started)


@pytest.mark.parametrize(("kind", "names"), [("held_out", ("r01", "r05", "r25")), ("training", None)])
def test_on_recorded_curves_a_third_of_the_tokens_finds_the_best(
    tmp_path: Path, kind: str, names: tuple[str, ...] | None
) -> None:
    """Curves of runs of configs/experiments/replay (held-out scores) and methods (training loss as the score)."""
    curves = {run: curve for run, curve in CURVES[kind].items() if names is None or run.startswith(names)}
    shares = [0.2, 0.4, 0.6, 0.8, 1.0] if kind == "held_out" else [k / 10 for k in range(1, 11)]

    def recorded(point: Point, seed: int, share: float) -> Objectives:
        curve = curves[str(point.params["run"])]
        place = max((k for k, known in enumerate(shares) if known <= share + 1e-9), default=0)
        new, forgetting = curve[place] if kind == "held_out" else (curve[place], 0.0)
        return Objectives(new, forgetting, share)

    bound = 0.5
    study = a_study(
        tmp_path,
        space={"run": {"options": {run: {} for run in curves}}},
        stopping={"rule": "asha", "eta": 3, "rungs": [0.2, 0.4]},
        objective={"kind": "new_under_forgetting", "max_forgetting": bound},
    )
    course = Lab(study, recorded, steps=10).run(Log())
    full = {point.id: study.budget(point) for point in study.space.grid()}
    assert share_spent(course.trials(), full) <= 0.4
    finals = {p.id: merit(recorded, p, [0], 1.0, bound=bound) for p in study.space.grid()}
    found = max(finals[trial.point.id] for trial in course.trials() if trial.status == "finished")
    assert found == max(finals.values())


def test_reports_stand_in_order(tmp_path: Path) -> None:
    course = Lab(a_study(tmp_path, stopping=ASHA), smooth).run(Log())
    for trial in course.trials():
        assert all(one.step < other.step for one, other in pairwise(trial.reports))
        assert (trial.final is None) == (trial.status != "finished")
