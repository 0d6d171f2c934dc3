"""A study's trials on Ray Tune: every turn is a Tune trial, whose process is the driver of a real Ray Train run.

How Tune is driven, and why. Tune's `Searcher` asks the study's own course what to run next, so that Tune places,
starts, restarts and counts the processes, and decides nothing: its schedulers end a trial by killing its actor, which
leaks the placement group of the Train run inside and then hangs (ray-project/ray#54305), and its pause needs a Tune
checkpoint, which a Train run inside does not give. So a trial that is paused at a rung *ends* its turn, with its own
checkpoint, and a promoted one gets another turn, which goes on from there exactly. What Tune writes is thrown away; the
study's log alone says how a study goes on.

What every first trial would wait for is there before it is handed out: what it reads is made, its first model scored,
and one process for each place started. Tune has a process only as a trial, so the first trials that it gets are of
nothing but `nexus_ray.tune.trial.load`; then it uses their processes again. They are let go one after the other: of
several that are free Tune keeps only one.

A trial's process asks Tune for a hundredth of a CPU, since its work is done by its training workers: those are placed
by Ray Train, and no more turns run at once than always find room for theirs (`nexus_ray.study.placement`).
"""

from __future__ import annotations

import os
import secrets
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from nexus_ray.config import RunConfig
from nexus_ray.corpora.prepare import PreparedData, prepare
from nexus_ray.errors import ConfigError, DataError, Interrupted, TrainingError
from nexus_ray.jobs import score_ahead
from nexus_ray.models.local import with_local_model
from nexus_ray.session import LOCAL_HEAD
from nexus_ray.storage import Storage
from nexus_ray.study.course import Job
from nexus_ray.study.placement import DRIVER_CPUS
from nexus_ray.study.turns import Turns, Wanted
from nexus_ray.train.stop import STOP_FILE
from nexus_ray.tune.box import Box, Line, Loaded
from nexus_ray.tune.trial import how_it_failed, load, run_turn

QUIET_TUNE = {
    "RAY_AIR_NEW_OUTPUT": "0",  # whose tables come even when nothing is to be said
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the study has its own record
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is the driver's, which has checkpoints written
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
RETRIES = 1
"""How often a turn whose process died is tried again on a cluster, where Ray frees what the dead one held."""
POLL_S = 0.2

Say = Callable[[str], None]


class TrialLost(Interrupted):
    """A trial's process died, and the study with it; the same command goes on. To whoever concludes a study it is one
    that was interrupted: what it has come to so far is written all the same."""

    exit_code = 1


def run_trials(
    turns: Turns,
    folder: Storage,
    *,
    slots: int,
    say: Say,
    report: Callable[[Storage], Any] | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Run a study's turns on the connected cluster, at most `slots` at once, until none is left.

    `folder` is the study's; `report` is called with the folder of a run at the end of each turn; `meanwhile` is called
    in this thread again and again.

    Raises:
        Interrupted: after Ctrl-C or SIGTERM, once every running trial has written a checkpoint.
        TrialLost: a trial's process died on a head of this machine.
    """
    first = turns.upcoming()
    if first is None:
        return
    import ray
    import ray.tune  # here, since two threads that import parts of a package with cycles trip over each other
    from ray.data._internal.stats import get_or_create_stats_actor
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    import nexus_ray.train.trainer  # noqa: F401

    name = f"nexus-study-{secrets.token_hex(6)}"
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    get_or_create_stats_actor()  # Ray Data's, for the cluster; one that a turn has started ends with that turn
    box = ray.remote(num_cpus=0)(Box).options(name=name, scheduling_strategy=here).remote()
    work = _Work(turns, folder, box, name=name, slots=max(1, min(slots, turns.most())), say=say, report=report)
    with _asked_to_stop() as asked, _environment():
        parts = (work.serve, work.tune, partial(work.ahead, first))
        threads = [threading.Thread(target=work.guarded, args=(each,), daemon=True) for each in parts]
        for thread in threads:
            thread.start()
        told = False
        while threads[1].is_alive() and work.error is None:
            threads[1].join(POLL_S)
            meanwhile()
            if asked.is_set():
                if not told:
                    say("stopping: running trials end after their step, with a checkpoint; again ends at once")
                    told = True
                turns.close()
                _stop_runs(turns)
        work.done.set()
        if work.error is not None:
            raise work.error
        threads[0].join()  # in the middle of a call to Ray it would keep Ray from ending
        ray.kill(box)
    if asked.is_set():
        raise Interrupted("the study was stopped, running trials with a checkpoint; the same command goes on there")


class _Work:
    """What the threads share."""

    def __init__(
        self,
        turns: Turns,
        folder: Storage,
        box: Any,
        *,
        name: str,
        slots: int,
        say: Say,
        report: Callable[[Storage], Any] | None,
    ) -> None:
        self.turns, self.folder, self.box, self.name = turns, folder, box, name
        self.slots, self.say, self.report = slots, say, report
        self.done = threading.Event()
        self.lock = threading.Lock()
        self.waiting: dict[int, int] = {}  # the letter of each place whose process waits
        self.let: set[int] = set()  # places that were let go
        self.more = 0  # places that may be let go
        self.error: BaseException | None = None

    def guarded(self, action: Callable[[], None]) -> None:
        """Run a thread's work; what goes wrong ends the study in the main thread."""
        try:
            action()
        except BaseException as error:  # raised again by `run_trials`
            if not self.done.is_set():
                self.error = error

    def serve(self) -> None:
        """Answer trials, one message after the other."""
        import ray

        waiting = self.box.take.remote()
        while not self.done.is_set():
            ready, _ = ray.wait([waiting], timeout=1.0)
            if ready:
                number, message = ray.get(waiting)
                if isinstance(message, Wanted):
                    give = partial(self.guarded, partial(self.give, number, message.trial))  # takes its time
                    threading.Thread(target=give, daemon=True).start()
                elif isinstance(message, Loaded):
                    self.loaded(number, message.place)
                else:
                    self.box.answer.remote(number, self.turns.answer(message))
                waiting = self.box.take.remote()

    def ahead(self, first: str) -> None:
        """Make what the first trial reads, and then let it be handed out; what is wrong with it, its own turn says."""
        with suppress(ConfigError, DataError, TrainingError):
            self.make(first, lambda: not self.done.is_set() and self.turns.upcoming() is not None)
        self.let_go(1)

    def loaded(self, number: int, place: int) -> None:
        """Answer the process of a place, once it may be let go."""
        with self.lock:
            self.waiting[place] = number
        self.let_go(0)

    def let_go(self, more: int) -> None:
        """Let so many more places go, once their processes have loaded, for a trial to begin in each."""
        with self.lock:
            self.more += more
            for place, number in list(self.waiting.items()):
                if place not in self.let:
                    if self.more < 1:
                        continue
                    self.more -= 1
                    self.let.add(place)
                self.box.answer.remote(number, None)
                del self.waiting[place]

    def give(self, number: int, trial: str) -> None:
        """Answer a trial that asks what to run, once all that it reads is there."""
        try:
            self.make(trial, lambda: not self.done.is_set() and self.turns.wants(trial))
        except (ConfigError, DataError, TrainingError) as error:
            self.turns.fail(trial, str(error))
            self.box.answer.remote(number, None)
            return
        self.box.answer.remote(number, self.turns.begin(trial))

    def make(self, trial: str, wanted: Callable[[], bool]) -> None:
        """Make what a trial reads, as far as it is not there. It is made in this process: inside of Tune's placement
        group a data task would wait without end for a CPU."""
        if not wanted():
            return
        config = with_local_model(self.turns.config(trial), progress=self.say)
        data = prepare(config, progress=self.say)
        scored = False
        try:
            if wanted() and not _is_scored(config):
                scored = self.score(config, data, wanted)
        finally:
            made = data.made
            self.turns.prepared(trial, documents=made.documents, tokens=made.tokens, scored=int(scored))

    def score(self, config: RunConfig, data: PreparedData, wanted: Callable[[], bool]) -> bool:
        """Score a trial's first model for all that start alike, unless that was done; returns whether it was now.

        What goes wrong with the machine (a worker's death, say) is left to the trial, which would do it again.
        """
        try:
            return score_ahead(config, data, run=self.folder, say=self.say, wanted=wanted)
        except Exception as error:
            if how_it_failed(error) == "failed":
                raise
            self.say(f"the base model could not be scored ahead of its trial ({type(error).__name__}: {error})")
            return False

    def lost(self, trial: str) -> None:
        """The process of a turn has died, again and again where Tune tries again.

        On a local head what it held of the cluster is not freed before the head ends: so the study ends with it. The
        next process begins with that trial; where it takes the study along once more, it has failed.
        """
        if LOCAL_HEAD not in os.environ:
            self.turns.lost(trial)
            return
        failed = self.turns.lost_with_study(trial)
        self.error = TrialLost(
            f"the process of trial {trial} died, for want of memory perhaps, and what it held cannot be freed while "
            f"this Ray runs; the same command goes on with the study{', without that trial' if failed else ''} "
            f"(fewer at once: max_concurrent)"
        )

    def tune(self) -> None:
        """Ray Tune's own loop."""
        from ray import tune

        line, report, place = self.name, self.report, self.folder.child("control")

        def turn(settings: dict[str, Any]) -> dict[str, Any]:
            own = Line(line, settings["trial"])
            return run_turn(own, report=report) if own.trial else load(own, settings["place"])

        place.delete("tune")
        tuner = tune.Tuner(
            tune.with_resources(turn, {"CPU": DRIVER_CPUS}),
            tune_config=tune.TuneConfig(
                search_alg=_searcher(self),
                num_samples=-1,
                max_concurrent_trials=self.slots,
                reuse_actors=True,
                trial_name_creator=_trial_name,
                trial_dirname_creator=_trial_name,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=place.uri,
                failure_config=tune.FailureConfig(max_failures=0 if LOCAL_HEAD in os.environ else RETRIES),
                verbose=0,
            ),
        )
        tuner.fit()
        place.delete("tune")


def _trial_name(trial: Any) -> str:
    return f"{trial.config['trial'] or 'place'}-{trial.trial_id}"


def _searcher(work: _Work) -> Any:
    """The study's course as Tune sees it."""
    from ray.tune.search import Searcher

    class Course(Searcher):
        def __init__(self) -> None:
            super().__init__(metric=None, mode=None)
            self.trials: dict[str, str] = {}
            self.loading = 0

        def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
            if self.loading < work.slots:
                self.loading += 1
                return {"trial": "", "place": self.loading - 1}
            job = work.turns.next()
            if job == "wait":
                return None
            work.let_go(1 if isinstance(job, Job) else work.slots)
            if not isinstance(job, Job):
                return Searcher.FINISHED
            self.trials[trial_id] = job.trial
            return {"trial": job.trial}

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            trial = self.trials.pop(trial_id, None)
            if error and trial is not None:
                work.lost(trial)

        def save(self, checkpoint_path: str) -> None:
            """Nothing: the study's log has it."""

        def restore(self, checkpoint_path: str) -> None:
            """Nothing either."""

        def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
            """Nothing."""

        def __deepcopy__(self, memo: dict[int, Any]) -> Course:
            return self

        def __reduce__(self) -> tuple[type[Searcher], tuple[()]]:
            return Searcher, ()  # Tune pickles it into a file that nobody reads

    return Course()


def _is_scored(config: RunConfig) -> bool:
    """Whether a run has the scores of its first model, from an earlier turn."""
    return Storage(config.storage).child(config.name, "base").exists("stage.json")


def _stop_runs(turns: Turns) -> None:
    """Ask every running trial to stop: again and again, since a stage that begins forgets earlier requests."""
    for trial in turns.running():
        config = turns.config(trial)
        run = Storage(config.storage).child(config.name)
        if not run.exists(*STOP_FILE):
            run.write_text("the study stops", *STOP_FILE)


@contextmanager
def _asked_to_stop() -> Iterator[threading.Event]:
    """Set by Ctrl-C and SIGTERM; a second Ctrl-C ends at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def handler(number: int, frame: Any) -> None:
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def _environment() -> Iterator[None]:
    added = {key: value for key, value in QUIET_TUNE.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            del os.environ[key]
