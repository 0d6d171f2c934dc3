"""Turns of a study's trials: who is next, what they are answered, what becomes of broken ones, what is timed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from nexus_ray.errors import Interrupted
from nexus_ray.session import LOCAL_HEAD
from nexus_ray.storage import Storage
from nexus_ray.study.course import Job
from nexus_ray.study.history import Event
from nexus_ray.study.turns import Ended, Told, Turns, Wanted, overheads
from nexus_ray.study.turns import made as work_done
from nexus_ray.train.watch import Evaluated
from nexus_ray.tune.box import Box
from nexus_ray.tune.driver import _Work
from tests.studies import a_study

ASHA = {"rule": "asha", "eta": 2, "rungs": [0.25]}
SPACE = {"continual.replay_ratio": {"choice": [0.0, 0.05]}}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def turns(folder: Path, events: list[Event], **changes: Any) -> tuple[Turns, list[Event], Clock, list[str]]:
    log, clock, said = list(events), Clock(), []
    study = a_study(folder, space=SPACE, **changes)
    return Turns(study, events=events, write=log.append, say=said.append, clock=clock), log, clock, said


def evaluated(share: float, new: float = -2.0) -> Evaluated:
    return Evaluated(int(900 * share), int(900_000 * share), new, 0.1, 1e12 * share, {"grad_norm": 1.0})


def begun(made: Turns) -> Job:
    job = made.next()
    assert isinstance(job, Job)
    return job


def test_a_turn_is_answered_and_timed(tmp_path: Path) -> None:
    made, log, clock, said = turns(tmp_path, [], stopping=ASHA)
    first = begun(made)
    clock.now += 30.0
    made.prepared(first.trial, documents=8, tokens=98, scored=1)
    made.prepared(first.trial, documents=0, tokens=0, scored=0)
    config = made.begin(first.trial)
    assert config is not None and config.name == f"s-{first.trial}" and config.continual.replay_ratio == 0.0
    assert made.answer(Told(first.trial, evaluated(0.25))) == "pause"
    clock.now = 150.0
    made.answer(Ended(first.trial, "paused", first_step=139.0, last_step=148.0))
    clock.now = 152.0
    second = begun(made)
    assert second.trial != first.trial
    clock.now = 153.0
    assert made.begin(second.trial) and made.begin(second.trial), "asked again by a process that was started anew"
    clock.now = 160.0
    assert made.answer(Told(second.trial, evaluated(0.25, new=-1.0))) == "continue"
    made.answer(Ended(second.trial, "finished", end=evaluated(1.0), first_step=155.0, last_step=159.5))
    timed = [event for event in log if event["event"] == "timed"]
    assert timed[0] == {
        "event": "timed", "trial": first.trial, "seconds": 50.0,
        "to_begin_s": 30.0, "to_first_step_s": 9.0, "after_last_step_s": 2.0,
    }  # fmt: skip
    assert timed[1]["since_last_end_s"] == 2.0 and timed[1]["to_first_step_s"] == 2.0
    assert overheads(log)["to_first_step_s"] == {"median": 5.5, "most": 9.0}
    assert overheads(log)["to_begin_s"] == {"median": 15.5, "most": 30.0}
    assert [event["event"] for event in log].count("prepared") == 1, "of what was there, nothing is said"
    assert work_done(log) == {"documents": 8, "tokens": 98, "scored": 1}
    assert made.next() == "over"
    assert any("paused at rung 0" in line for line in said) and any("finished" in line for line in said)


def test_nothing_to_begin_is_told_from_nothing_to_begin_now(tmp_path: Path) -> None:
    made, *_ = turns(tmp_path, [])
    first, second = begun(made), begun(made)
    assert made.next() == "wait"
    made.answer(Ended(first.trial, "finished", end=evaluated(1.0)))
    assert made.next() == "wait"
    made.answer(Ended(second.trial, "finished", end=evaluated(1.0)))
    assert made.next() == "over"


def test_a_closed_study_begins_nothing_and_what_was_interrupted_goes_on_first(tmp_path: Path) -> None:
    made, log, *_ = turns(tmp_path, [])
    first, second = begun(made), begun(made)
    assert made.begin(first.trial) and made.wants(second.trial)
    made.close()
    assert not made.wants(second.trial)
    assert made.begin(second.trial) is None, "the study was stopped while its data was made"
    assert made.next() == "wait" and made.running() == [first.trial]
    made.answer(Ended(first.trial, "interrupted"))
    assert made.next() == "over"
    again, *_ = turns(tmp_path, log)
    job = begun(again)
    assert job.trial == first.trial and job.resumes


def test_broken_and_lost_turns_fail_their_trials(tmp_path: Path) -> None:
    made, log, *_ = turns(tmp_path, [])
    first = begun(made)
    made.answer(Ended(first.trial, "broken", "ActorDiedError: out of memory"))
    made.lost(first.trial)
    assert log[-2]["event"] == "failed" and log[-2]["reason"] == "ActorDiedError: out of memory"
    second = begun(made)
    assert second.trial != first.trial
    made.lost(second.trial)
    assert "its process died" in log[-2]["reason"]
    made.retry()
    assert {begun(made).trial, begun(made).trial} == {first.trial, second.trial}


def test_a_trial_has_one_turn_at_a_time(tmp_path: Path) -> None:
    """Its point is promoted while its first turn still writes its checkpoint: the second begins when that is over."""
    made, log, *_ = turns(tmp_path, [], stopping=ASHA)
    first, second = begun(made), begun(made)
    assert made.answer(Told(first.trial, evaluated(0.25, new=-1.0))) == "pause"
    assert made.answer(Told(second.trial, evaluated(0.25))) == "pause"
    assert made.next() == "wait" and made.running() == [first.trial, second.trial]
    assert [event["event"] for event in log].count("promoted") == 1
    made.answer(Ended(second.trial, "paused"))
    assert made.next() == "wait", "the one that goes on is still ending"
    made.answer(Ended(first.trial, "paused"))
    again = begun(made)
    assert again.trial == first.trial and again.resumes


def test_a_sibling_told_to_stop_later_gives_its_place_back(tmp_path: Path) -> None:
    stopping = {**ASHA, "max_signal": {"grad_norm": 0.5}}
    made, *_ = turns(tmp_path, [], stopping=stopping, seeds=[0, 1])
    first, second = begun(made), begun(made)
    assert first.point == second.point
    assert made.answer(Told(first.trial, evaluated(0.1))) == "stop", "the point is stopped with both"
    assert made.answer(Told(second.trial, evaluated(0.1))) == "stop"
    for job in (first, second):
        made.answer(Ended(job.trial, "stopped"))
    others = [begun(made), begun(made)]
    assert made.next() == "wait"
    for job in others:
        made.answer(Told(job.trial, evaluated(0.1)))
        made.answer(Ended(job.trial, "stopped"))
    assert made.next() == "over" and made._course.active == frozenset()


def work(made: Turns, folder: Path) -> _Work:
    place = Storage(str(folder))
    return _Work(made, place, None, name="box", slots=1, say=lambda text: None, report=None)


def test_a_process_that_dies_on_a_local_head_ends_the_study_and_at_last_its_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LOCAL_HEAD, "1")
    made, log, *_ = turns(tmp_path, [])
    for times in (1, 2):
        first = begun(made)
        assert first.trial == made.trials()[0].id, "it goes on first"
        driver = work(made, tmp_path)
        driver.lost(first.trial)
        assert isinstance(driver.error, Interrupted) and driver.error.exit_code == 1, "concluded as if interrupted"
        assert ("without that trial" in str(driver.error)) == (times == 2)
        assert made.next() == "over", "nothing begins in a study that ends"
        assert [event["event"] for event in log].count("lost") == times
        made, log, *_ = turns(tmp_path, log)
    assert made.trials()[0].status == "failed" and "died 2 times" in str(made.trials()[0].reason)
    assert begun(made).trial != made.trials()[0].id


def test_only_deaths_that_end_the_study_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LOCAL_HEAD, "1")
    made, log, *_ = turns(tmp_path, [])
    first, second = begun(made), begun(made)
    made.answer(Told(first.trial, evaluated(0.5, new=float("nan"))))
    made.lost_with_study(first.trial)  # ended before it died
    made.lost_with_study(second.trial)  # died in a study that is ending
    assert "lost" not in [event["event"] for event in log] and made.running() == []
    monkeypatch.delenv(LOCAL_HEAD)
    made, log, *_ = turns(tmp_path, log)
    again = begun(made)
    driver = work(made, tmp_path)
    driver.lost(again.trial)
    assert driver.error is None and made.trials()[1].status == "failed", "on a cluster the others go on"


def test_a_turn_that_ends_twice_counts_once(tmp_path: Path) -> None:
    """Its process died between saying so and being told that it was heard."""
    made, log, *_ = turns(tmp_path, [])
    first = begun(made)
    for _ in range(2):
        made.answer(Ended(first.trial, "finished", end=evaluated(1.0)))
    made.lost(first.trial)
    assert [event["event"] for event in log].count("finished") == 1
    assert "failed" not in [event["event"] for event in log]
    assert made.answer(Told(first.trial, evaluated(0.5))) == "stop"


def test_scores_that_are_not_finite_fail_a_trial(tmp_path: Path) -> None:
    made, log, *_ = turns(tmp_path, [])
    first = begun(made)
    assert made.answer(Told(first.trial, evaluated(0.5, new=float("nan")))) == "stop"
    made.answer(Ended(first.trial, "stopped"))
    assert [event["event"] for event in log][-2:] == ["failed", "timed"]


def test_a_letter_is_kept_until_it_is_answered() -> None:
    async def exchange() -> list[Any]:
        box = Box()
        asked = [asyncio.ensure_future(box.ask(Wanted(name))) for name in ("a", "b")]
        letters = [await box.take(), await box.take()]
        assert not any(each.done() for each in asked)
        for number, message in reversed(letters):
            await box.answer(number, message.trial.upper())
        await box.answer(99, "nobody asked")
        return [await each for each in asked]

    assert asyncio.run(exchange()) == ["A", "B"]


@pytest.mark.parametrize("outcome", ["failed", "stopped"])
def test_other_ends_are_recorded(tmp_path: Path, outcome: Any) -> None:
    made, log, *_ = turns(tmp_path, [])
    first = begun(made)
    made.answer(Ended(first.trial, outcome, "why"))
    said = [event["event"] for event in log]
    assert said[-1] == "timed" and (("failed" in said) == (outcome == "failed"))
