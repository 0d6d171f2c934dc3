"""Studies: `nexus-ray tune STUDY.yaml` runs the same roadmap many times with other settings, on Ray Tune.

Invariant: nothing starts before every config that can be checked is sound and one trial fits the cluster; what is
logged is never decided again. The same command goes on with a study that was stopped or killed.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nexus_ray.config import RunConfig
from nexus_ray.errors import ConfigError, Interrupted
from nexus_ray.session import Demand, check_job_storage, ray_session, stage_demands
from nexus_ray.storage import Storage
from nexus_ray.study.history import ENDED
from nexus_ray.study.load import Study, load_study, points_to_check
from nexus_ray.study.log import StudyLog, held
from nexus_ray.study.placement import Need, concurrent_trials, need_of
from nexus_ray.study.records import Status, Trial
from nexus_ray.study.turns import Turns
from nexus_ray.tracking_study import StudyTracker
from nexus_ray.tune.plan import plan_lines

MIRROR_EVERY_S = 10.0
"""How often a running study looks for ended trials to write to W&B."""

Say = Callable[[str], None]


def run_study(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    dry_run: bool = False,
    retry: bool = False,
    say: Say = print,
    report: Callable[[Storage], Any] | None = None,
    summarise: Callable[[Storage], str] | None = None,
) -> int:
    """Run a study file, or go on with it. Returns 0, or 1 if a trial failed.

    `overrides` (`path=value`) apply to all trials. `retry` runs failed trials again. `report` writes the page of a run,
    `summarise` what a study came to, into the folder that it is given; it returns the page's path.

    Raises:
        ConfigError: the study file, a config or the cluster does not fit; nothing has started.
        DataError: a ledger that it reads is not there.
        Interrupted: the study was asked to stop, or lost a trial's process (TrialLost); the same command goes on.
    """
    study = load_study(path, overrides)
    config = study.config_of(None, study.config.seeds[0])
    check_job_storage(str(study.base.get("storage", "runs")))
    need = study_need(study)
    if dry_run:
        for line in plan_lines(study, need, None if _elsewhere(config) else local_trials(study, need)):
            say(line)
        return 0
    Storage(config.storage).check_writable()
    study = held(study, study.folder)
    demands = stage_demands(config) if _elsewhere(config) else [local_demand(need, local_trials(study, need))]
    with ray_session(config, demands):
        slots = concurrent_trials(need, _nodes(), study.config.max_concurrent)
        with StudyLog(study) as log:
            turns = Turns(study, events=log.events, write=log.write, say=say)
            if retry:
                turns.retry()
            return _run(study, turns, slots, say=say, report=report, summarise=summarise)


def _run(
    study: Study,
    turns: Turns,
    slots: int,
    *,
    say: Say,
    report: Callable[[Storage], Any] | None,
    summarise: Callable[[Storage], str] | None,
) -> int:
    from nexus_ray.tune.driver import run_trials

    config = study.config_of(None, study.config.seeds[0])
    say(f"study {study.config.name} in {study.folder.uri}: {slots} trial{'s' if slots > 1 else ''} at once")
    tracker = StudyTracker(config.tracking.wandb, study.folder, name=study.config.name)
    mirror = Mirroring(study, turns, tracker)

    def conclude(statuses: Sequence[Status]) -> None:
        page = None
        if summarise is not None and any(trial.reports for trial in turns.trials()):
            page = summarise(study.folder)
            say(f"results: {page}")
        mirror.wait()
        mirror.write(statuses)
        tracker.finish(turns.trials(), None if page is None else page.rpartition("/")[2])

    try:
        run_trials(turns, study.folder, slots=slots, say=say, report=report, meanwhile=mirror.begin)
    except Exception:
        try:
            conclude(ENDED)
        except Exception as error:  # what ended the study is raised below, and matters more
            say(f"results could not be written: {error}")
        raise
    conclude((*ENDED, "paused"))
    return _outcome(turns.trials(), say)


class Mirroring:
    """Writes a study's trials to W&B while it runs: in a thread of its own, so that waiting for a network never delays
    the driver's answer to Ctrl-C. One thread at a time."""

    def __init__(self, study: Study, turns: Turns, tracker: StudyTracker) -> None:
        self._study, self._turns, self._tracker = study, turns, tracker
        self._thread: threading.Thread | None = None
        self._began = -math.inf

    def begin(self) -> None:
        """Start to write what has ended since, every `MIRROR_EVERY_S` seconds, unless that still goes on."""
        now = time.monotonic()
        busy = self._thread is not None and self._thread.is_alive()
        if busy or not self._tracker.active or now - self._began < MIRROR_EVERY_S:
            return
        self._began = now
        self._thread = threading.Thread(target=self.write, args=(ENDED,), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written any more."""
        if self._thread is not None:
            self._thread.join()

    def write(self, statuses: Sequence[Status]) -> None:
        """Write all trials of these statuses whose turns are over and that were not written as they are now."""
        trials = [trial for trial in self._turns.trials() if trial.status in statuses and self._tracker.lacks(trial)]
        running = self._turns.running()  # a trial is stopped while its process still writes the checkpoint
        for trial in trials:
            if trial.id not in running and self._study.refusal(trial.point) is None:
                own = self._study.config_of(trial.point, trial.seed)
                self._tracker.trial(trial, config=own.model_dump(mode="json"), run_dir=run_folder(own))


def _outcome(trials: Sequence[Trial], say: Say) -> int:
    failed = [trial for trial in trials if trial.status == "failed"]
    for trial in failed:
        say(f"failed: {trial.id}: {trial.reason}")
    if left := [trial.id for trial in trials if trial.status == "running"]:
        raise Interrupted(f"{', '.join(left)} did not end; the same command goes on with it")
    return 1 if failed else 0


def run_folder(config: RunConfig) -> Storage:
    """Where a trial's run lies."""
    return Storage(config.storage).child(config.name)


# --- room ------------------------------------------------------------------------------------------------------------


def study_need(study: Study) -> Need:
    """What the hungriest of a study's trials takes."""
    configs = [study.config_of(point, study.config.seeds[0]) for point in points_to_check(study)]
    return need_of(demand for config in configs for demand in stage_demands(config))


def local_trials(study: Study, need: Need) -> int:
    """Trials at once on a head of this machine: as many as its cores have room for the training threads of."""
    fitting = max(1, study.hardware.cpus // (need.workers * need.cpus_per_worker))
    return min(fitting, study.config.max_concurrent or fitting)


def local_demand(need: Need, trials: int) -> Demand:
    """What a local head must be made for, so that so many trials, their drivers and data tasks find room."""
    workers = need.workers * trials
    gpus = need.gpus_per_worker * workers
    more = -(-(trials - 1) // need.cpus_per_worker)  # the head's own spare CPUs are those of one trial
    return Demand(workers + more, need.cpus_per_worker, gpus)


def _nodes() -> list[dict[str, float]]:
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _elsewhere(config: RunConfig) -> bool:
    """Whether trials run on a cluster that is there already."""
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    if address and address != "local":
        return True
    import ray

    return bool(ray.is_initialized())


__all__ = ["ConfigError", "local_demand", "local_trials", "run_folder", "run_study", "study_need"]
