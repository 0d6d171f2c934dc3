"""The main job: stages in turn, and at each transition every domain is scored, replay planned, the gate asked.

A stage is finished when its `stage.json` exists, which is written last; running the same command again goes on after
the last finished stage, or at the newest checkpoint of the unfinished one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any

from nexus_ray.config import RunConfig, detect_hardware, fingerprint, parse_config, resolve, stage_config, to_yaml
from nexus_ray.config.source import parse_yaml
from nexus_ray.config.tree import exact_fraction
from nexus_ray.corpora.prepare import PreparedData, PreparedDomain, check_prepared, find_prepared, prepare
from nexus_ray.corpora.sources.synthesis import own_pin, pinned, present_pin
from nexus_ray.errors import ConfigError, DataError, ForgettingError, Interrupted, Paused, Stopped
from nexus_ray.evaluate.scores import DomainScore, scores_from_bytes
from nexus_ray.evaluate.transfer import score_document, stage_forgetting
from nexus_ray.jobs import base_scores, check_model, score_base, stage_job
from nexus_ray.models.local import with_local_model
from nexus_ray.progress import Progress
from nexus_ray.record import MetricsTail, RunRecordWriter
from nexus_ray.steer import Steering
from nexus_ray.storage import Storage
from nexus_ray.stream.curriculum import stage_segments
from nexus_ray.stream.plan import Plan
from nexus_ray.stream.plan_file import PlanFile
from nexus_ray.stream.rows import StageStream
from nexus_ray.tracking import Tracker
from nexus_ray.train.launch import fit
from nexus_ray.train.lineage import Earlier
from nexus_ray.train.loop import StageJob
from nexus_ray.train.watch import Evaluated, Watcher, raise_answer
from nexus_ray.watching import Watching

SCRATCH = "scratch"
"""Folder, inside a run, of the from-scratch models that forward transfer is measured against."""


@dataclass(frozen=True)
class RunOutcome:
    """What a run came to."""

    folder: Storage
    fingerprint: str
    scores: dict[str, Any]
    """The content of `scores.json`."""
    stages: list[dict[str, Any]]
    """The content of every `stage.json`."""
    end: Evaluated | None = None
    """What a watched run came to, on all held-out documents."""


def run_roadmap(
    config: RunConfig,
    *,
    progress: Progress | None = None,
    report: Callable[[Storage], Any] | None = None,
    watcher: Watcher | None = None,
    lock_s: float = 1.0,
) -> RunOutcome:
    """Run, or go on with, all stages of a config on the connected Ray cluster.

    `report` is called with the run's folder at the end, however it ends. `watcher` is asked after every evaluation,
    and after every stage but the last, whether to go on. `lock_s` is how long to wait for another process that runs it.

    Raises ConfigError if the run's folder belongs to another config, ForgettingError if the gate stops the run,
    Interrupted after a requested stop (a checkpoint was written), Paused or Stopped as the watcher answered.
    """
    config = _pinned(resolve(config, detect_hardware()))
    progress = progress or Progress(log_every_steps=config.tracking.log_every_steps)
    with _Roadmap(config, progress, report, watcher).record(lock_s) as roadmap:
        return roadmap.run()


def evaluate_run(
    config: RunConfig, *, progress: Progress | None = None, report: Callable[[Storage], Any] | None = None
) -> RunOutcome:
    """Score the exported models of a run's finished stages again and write `scores.json` anew."""
    config = _pinned(resolve(config, detect_hardware()))
    return _Roadmap(config, progress or Progress(log_every_steps=config.tracking.log_every_steps), report).rescore()


def _pinned(config: RunConfig) -> RunConfig:
    """The config with each ledger held to the prefix that the run reads; its record knows it from the first start."""
    folder = Storage(config.storage).child(config.name)
    if folder.exists("run.json") and folder.exists("config.yaml"):
        earlier = parse_config(parse_yaml(folder.read_text("config.yaml"), where=folder.path("config.yaml")))
        config = pinned(config, lambda domain, source: own_pin(earlier.domains.get(domain)))
    return pinned(config, present_pin)


class _Roadmap:
    def __init__(
        self,
        config: RunConfig,
        progress: Progress,
        report: Callable[[Storage], Any] | None,
        watcher: Watcher | None = None,
    ) -> None:
        self.written, self.progress, self.report, self.watcher = config, progress, report, watcher
        self.config = with_local_model(config, progress=progress.message)
        self.fingerprint = fingerprint(config)
        self.folder = Storage(config.storage).child(config.name)
        self.results: list[dict[str, Any]] = []
        self.scores: list[dict[str, DomainScore]] = []
        self.document: dict[str, Any] | None = None
        self.watching: Watching | None = None

    # --- the record -------------------------------------------------------------------------------------------

    @contextmanager
    def record(self, lock_s: float) -> Iterator[_Roadmap]:
        """The run's record around its work: who may write, how it ended, the report."""
        self.folder.check_writable()
        with self.folder.lock("run", lock_s):
            self._claim()
            self.writer = RunRecordWriter(self.folder, self.config, self.fingerprint)
            self.tracker = Tracker(self.config, self.folder)
            try:
                yield self
            except Interrupted:
                self.writer.finish("interrupted")
                raise
            except Paused:
                self.writer.finish("paused")
                raise
            except (ForgettingError, Stopped) as error:
                self.writer.finish("stopped", error)
                raise
            except BaseException as error:
                self.writer.finish("failed", error)
                raise
            else:
                self.writer.finish("done")
            finally:
                page = self._report()
                self.tracker.finish(self.document, report=page)
                self.progress.close()

    def _claim(self) -> None:
        """The folder is new, or this very config's."""
        if self.folder.exists("run.json"):
            other = self.folder.read_json("run.json").get("fingerprint")
            if other != self.fingerprint:
                raise ConfigError(
                    f"name={self.config.name!r}: {self.folder.uri} holds a run of another config (fingerprint {other}, "
                    f"this one is {self.fingerprint}). Choose another name (name=...), delete that folder, or run its "
                    f"own {self.folder.uri}/config.yaml to go on with it"
                )
            return
        self.folder.write_text(to_yaml(self.written), "config.yaml")

    def _report(self) -> str | None:
        if self.report is None or not self.scores:
            return None
        try:
            page = str(self.report(self.folder))
        except Exception as error:  # a page is no reason to lose a run; it can be written again
            self.progress.message(
                f"no report ({type(error).__name__}: {error}); `nexus-ray report {self.folder.uri}` tries again"
            )
            return None
        self.progress.message(f"report: {page}")
        return page

    # --- the work ---------------------------------------------------------------------------------------------

    def run(self) -> RunOutcome:
        self.progress.message(f"run {self.config.name} ({self.fingerprint}) in {self.folder.uri}")
        self.data = self._prepare()
        self.plan = PlanFile(self.folder, self.config)
        check_model(self.config, self.data)
        self.writer.data(self.data)
        self._base()
        if self.watcher is not None:
            self.watching = Watching(self.config, self.watcher, vocab_size=self.data.vocab_size)
        for index in range(len(self.config.stages)):
            self._stage(index)
            self._write_scores()
            if self.watching is not None:
                self.watching.ask_after(index, self.scores[-1], self.results[-1]["forgetting"])
        if self.config.evaluation.forward_transfer:
            self._write_scores(self._from_scratch())
        document = self._write_scores(self._scratch_scores())
        end = None
        if self.watching is not None:
            last = len(self.config.stages) - 1
            end = self.watching.evaluated(last, self.scores[-1], self.results[-1]["forgetting"])
        return RunOutcome(self.folder, self.fingerprint, document, self.results, end)

    def _prepare(self) -> PreparedData:
        say = self.progress.message
        data = prepare(self.config, progress=say)
        data = check_prepared(data, self.config.data.on_corrupt, progress=say)
        domains = {name: self._scored_before(domain) for name, domain in data.domains.items()}
        return replace(data, domains=domains)

    def _scored_before(self, domain: PreparedDomain) -> PreparedDomain:
        """The domain with the held-out documents that this run's earlier scores are of, should it have grown since."""
        known = self.folder.read_json("run.json").get("data", {}).get(domain.name, {}).get("held_out")
        if known is None or known == domain.held_out.fingerprint:
            return domain
        for shards in range(len(domain.held_out.shards)):
            before = domain.held_out.prefix(shards)
            if before.fingerprint == known:
                return replace(domain, held_out=before)
        raise DataError(
            f"domain {domain.name!r}: its held-out shards at {domain.held_out.root} are not those that this run's "
            f"scores are of (fingerprint {domain.held_out.fingerprint} instead of {known}); restore them, or start "
            f"under another name"
        )

    def _base(self) -> None:
        """Scores before any training; those of another run that starts alike, if there is one."""
        folder = self.folder.child("base")
        if not folder.exists("stage.json"):
            result = base_scores(self.config, self.data, run=self.folder, folder=folder, say=self.progress.message)
            folder.write_json(result, "stage.json")
        self.scores.append(scores_from_bytes(folder.read_bytes("evaluation.npz")))
        self.writer.model(folder.read_json("stage.json")["parameters"])

    def _stage(self, index: int) -> None:
        """One stage and its transition: train or skip, then ask the gate."""
        config = stage_config(self.config, index)
        name = self.config.stages[index].name
        folder = self._stage_folder(index)
        attempt = self.plan.attempts(index)
        if folder.exists("stage.json"):
            result = folder.read_json("stage.json")
            self.progress.message(f"stage {name}: finished before, skipped")
        else:
            result = self._train(config, index, attempt, folder)
        while True:
            self.scores.append(scores_from_bytes(folder.read_bytes("evaluation.npz")))
            verdict = self._gate(config, index, result)
            if verdict == "retry":
                self.scores.pop()
                attempt = self.plan.attempts(index) + 1
                self._set_aside(folder, attempt - 1)
                result = self._train(config, index, attempt, folder)
                continue
            break
        self.results.append(result)
        if verdict == "stop":
            self._write_scores()
            worst, value = max(result["forgetting"].items(), key=lambda item: item[1])
            raise ForgettingError(
                f"continual.max_forgetting={config.continual.max_forgetting}: after stage {name!r}, domain {worst!r} "
                f"has lost {value:.4f} bits per byte against its best score. Raise continual.replay_ratio, lower "
                f"training.learning_rate, set continual.on_forgetting: retry or warn, or allow more"
            )

    def _set_aside(self, folder: Storage, attempt: int) -> None:
        """Keep what a rejected attempt left, next to its stage."""
        kept = self.folder.child("stages", f"{folder.name}.attempt{attempt}")
        for name in ("stage.json", "evaluation.npz", "samples.json"):
            if folder.exists(name):
                kept.write_bytes(folder.read_bytes(name), name)
        folder.delete("stage.json")
        folder.delete()

    def _train(self, config: RunConfig, index: int, attempt: int, folder: Storage) -> dict[str, Any]:
        name = config.stages[index].name
        config = self._with_more_replay(config, attempt)
        manifests = {domain: prepared.train for domain, prepared in self.data.domains.items()}
        say = self.progress.message
        steering = Steering.of(config, index, attempt, manifests=manifests, plan=self.plan, scores=self.scores, say=say)
        stream = self.plan.stream(config, index, attempt, manifests)
        job = self._job(config, name, index, folder, attempt=attempt, stream=stream, history=self._history(index))
        if self.watching is not None:
            watch = self.watching.stage(config, index, scores=self.scores, run=self.folder, folder=folder)
            job = replace(job, watch=watch)
        self._say_plan(config, index, stream)
        if config.continual.keep.interpolate:
            job.hooks.selection()  # type: ignore[attr-defined]  # before the stage is trained, not after
        began = time.time()
        with (
            self.tracker.stage(name, index) as track,
            MetricsTail(self.folder, index, attempt, (self.progress.update, track.log)),
        ):
            self.progress.stage(name, stream.steps)
            result = steering.train(job, partial(fit, on_signal=self._say_stopping))
        raise_answer(result.get("held", "continue"), f"at step {result.get('step')} of stage {name!r}")
        result = {
            "name": name,
            "index": index,
            "kind": config.stages[index].kind,
            "attempt": attempt,
            "tokens": result["steps"] * config.training.global_batch_tokens,
            "seconds": round(time.time() - began, 2),
            "replay_fraction": self.plan.stream(config, index, attempt, manifests).replayed_share(result["steps"]),
            **result,
            "model": folder.child("model").uri,
        }
        forgot = self._forgetting(folder)
        folder.write_json({**result, "forgetting": forgot, "gate": None}, "stage.json")
        return folder.read_json("stage.json")

    def _say_stopping(self) -> None:
        self.progress.message("stopping after this step, with a checkpoint; a second Ctrl-C ends at once")

    def _with_more_replay(self, config: RunConfig, attempt: int) -> RunConfig:
        """The config of a repeated attempt: the replay ratio doubled each time, up to one half (or where it was)."""
        if not attempt:
            return config
        ratio = exact_fraction(config.continual.replay_ratio)
        more = max(ratio, min(Fraction(1, 2), max(ratio, Fraction(1, 100)) * 2**attempt))
        continual = config.continual.model_copy(update={"replay_ratio": float(more)})
        return config.model_copy(update={"continual": continual})

    def _history(self, index: int) -> tuple[Earlier, ...]:
        """The stages before, which this one builds on."""
        return tuple(Earlier(stage_config(self.config, k), self._stage_folder(k)) for k in range(index))

    def _stage_folder(self, index: int) -> Storage:
        return self.folder.child("stages", f"{index:02d}-{self.config.stages[index].name}")

    def _job(self, config: RunConfig, name: str, index: int, folder: Storage, **named: Any) -> StageJob:
        return stage_job(
            config, self.data, name, index, run=self.folder, folder=folder, fingerprint=self.fingerprint, **named
        )

    def _say_plan(self, config: RunConfig, index: int, stream: StageStream) -> None:
        segment = stream.plan.segment_at(stream.first_row)
        shares = ", ".join(f"{name} {count / segment.cycle:.1%}" for name, count in segment.weights.items())
        replay = f"; replay of {', '.join(segment.replay)}" if segment.replay else ""
        if not segment.replay and config.continual.replay_ratio and index == 0:
            replay = "; nothing to replay yet, replay ratio 0"
        warmup = config.continual.warmup_steps
        clipped = f"; continual.warmup_steps={warmup} clipped to the stage" if warmup > stream.steps else ""
        self.progress.message(
            f"stage {config.stages[index].name}: {stream.steps} steps of {config.training.global_batch_tokens} tokens; "
            f"{shares}{replay}{clipped}"
        )

    # --- scores -----------------------------------------------------------------------------------------------

    def _trained(self, rows: int) -> list[list[str]]:
        return [list(stage.domains) for stage in self.config.stages[:rows]]

    def _forgetting(self, folder: Storage) -> dict[str, float]:
        rows = [*self.scores, scores_from_bytes(folder.read_bytes("evaluation.npz"))]
        return stage_forgetting(
            domains=self.config.evaluated_domains,
            trained_by_stage=self._trained(len(self.config.stages)),
            scores_by_stage=rows,
            anchors=self.config.anchors,
        )

    def _gate(self, config: RunConfig, index: int, result: dict[str, Any]) -> str:
        """ "pass", "warn", "stop" or "retry"; recorded in the stage's `stage.json`."""
        limit = config.continual.max_forgetting
        if limit is None:
            return "pass"
        over = {name: value for name, value in result["forgetting"].items() if value > limit}
        action: str = config.continual.on_forgetting if over else "pass"
        if action == "control":  # the budget is spent, and the next stage pays back what this one lost too much
            action = "warn"
        can_retry = result["attempt"] < config.continual.max_retries and index > 0
        if action == "retry" and not can_retry:
            action = "stop"
        result["gate"] = {"limit": limit, "over": over, "action": action}
        folder = self.folder.child("stages", f"{index:02d}-{config.stages[index].name}")
        folder.write_json(result, "stage.json")
        if over:
            listed = ", ".join(f"{name} {value:+.4f}" for name, value in over.items())
            self.progress.message(f"forgetting above {limit} bits per byte: {listed}; {action}")
        return action

    def _write_scores(self, from_scratch: Mapping[str, DomainScore] | None = None) -> dict[str, Any]:
        document = score_document(
            domains=self.config.evaluated_domains,
            stages=["base", *(stage.name for stage in self.config.stages)][: len(self.scores)],
            trained_by_stage=self._trained(len(self.config.stages)),
            scores_by_stage=self.scores,
            anchors=self.config.anchors,
            from_scratch=from_scratch,
            samples=self.config.evaluation.bootstrap_samples,
            seed=self.config.seed,
        )
        self.folder.write_json(document, "scores.json")
        self.document = document
        self.writer.stages(self.results)
        return document

    def _from_scratch(self) -> dict[str, DomainScore]:
        """Train a fresh model, with the stage's budget, on each stage's new domains alone."""
        for index, stage in enumerate(self.config.stages):
            folder = self.folder.child(SCRATCH, f"{index:02d}-{stage.name}")
            fresh = index == 0 and self.config.model.source == "scratch" and self.config.model.init_from is None
            if fresh or folder.exists("stage.json"):
                continue  # such a first stage is its own comparison
            self.progress.message(f"from scratch on {', '.join(stage.domains)}, for forward transfer")
            alone = self.config.model_copy(
                update={
                    "stages": [stage.model_copy(update={"replay": {}})],
                    "model": self.config.model.model_copy(update={"init_from": None}),
                }
            )
            config = stage_config(alone, 0)
            manifests = {name: self.data.domains[name].train for name in stage.domains}
            plan = Plan(config.seed, config.training.seq_len, config.data.shuffle_window_rows)
            plan = plan.append(stage_segments(config, 0, manifests, start_row=0))
            stream = StageStream(plan, manifests, 0, config.training.rows_per_step, config.training.steps)
            name, domains = f"{SCRATCH}-{stage.name}", tuple(stage.domains)
            job = self._job(config, name, 0, folder, stream=stream, export=False, domains=domains)
            self.progress.stage(job.stage, stream.steps)
            with MetricsTail(self.folder, 0, 0, (self.progress.update,), stage=job.stage):
                result = fit(job)
            folder.write_json({"name": job.stage, "index": index, **result}, "stage.json")
            folder.delete("checkpoints")
        return self._scratch_scores()

    def _scratch_scores(self) -> dict[str, DomainScore]:
        found: dict[str, DomainScore] = {}
        for name in self.folder.list(SCRATCH):
            folder = self.folder.child(SCRATCH, name)
            if folder.exists("stage.json"):
                found |= scores_from_bytes(folder.read_bytes("evaluation.npz"))
        return found

    def rescore(self) -> RunOutcome:
        """`evaluate_run`: the exported models, on the present held-out documents."""
        if not self.folder.exists("run.json"):
            raise ConfigError(f"name={self.config.name!r}: there is no run at {self.folder.uri}; train it first")
        found = find_prepared(self.config)
        if found is None:
            raise ConfigError(
                f"storage={self.config.storage!r}: the prepared corpora are gone; run `nexus-ray prepare`"
            )
        self.data = check_prepared(found, self.config.data.on_corrupt, progress=self.progress.message)
        self.writer = RunRecordWriter(self.folder, self.config, self.fingerprint, existing=True)
        self._base_again()
        for index in range(len(self.config.stages)):
            folder = self._stage_folder(index)
            if not folder.exists("stage.json"):
                break
            self._rescore_stage(index, folder)
        document = self._write_scores(self._scratch_scores())
        self._report()
        self.progress.close()
        return RunOutcome(self.folder, self.fingerprint, document, self.results)

    def _base_again(self) -> None:
        folder = self.folder.child("base")
        say = self.progress.message
        folder.write_json(score_base(self.config, self.data, run=self.folder, folder=folder, say=say), "stage.json")
        self._base()

    def _rescore_stage(self, index: int, folder: Storage) -> None:
        config = stage_config(self.config, index)
        model = config.model.model_copy(update={"source": folder.child("model").uri, "init_from": None})
        config = config.model_copy(update={"model": model})
        self.progress.message(f"scoring stage {config.stages[index].name}")
        job = self._job(config, config.stages[index].name, index, folder, export=False)
        result = {**folder.read_json("stage.json"), "scores": fit(job)["scores"]}
        result["forgetting"] = self._forgetting(folder)
        folder.write_json(result, "stage.json")
        self.scores.append(scores_from_bytes(folder.read_bytes("evaluation.npz")))
        self.results.append(result)
