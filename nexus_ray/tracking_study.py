"""Mirror a study to Weights & Biases: one group, a W&B run per trial, a summary with all trials and the page.

Written by the study's driver after a trial has ended, from the trial's own run record, so that it costs training
nothing; trials themselves keep their mirror off. As in `tracking.py` nothing here may stop a study.

Lineage: every data manifest of the run is an artifact (type `dataset`), the checkpoint one of type `model` that names
them and holds the checkpoint's own manifest, not its weights. Offline the client refuses to record that a run *used*
an artifact, so the edge from data to checkpoint is in the model's metadata (`inputs`), the same in every mode.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nexus_ray.config.tree import WandbConfig
from nexus_ray.storage import Storage
from nexus_ray.study.records import Trial
from nexus_ray.tracking import Mirror, public_values

_OBJECTIVES = ("new", "forgetting", "cost")


class StudyTracker(Mirror):
    """W&B runs of a study's trials, each written once.

        tracker = StudyTracker(settings, study_dir, name="sweep")
        tracker.trial(trial, config=config.model_dump(mode="json"), run_dir=storage.child(run_name))
        tracker.finish(trials, page="study.html")

    No method raises. A trial that was written before (by a driver that was killed later) is not written again.
    """

    def __init__(self, settings: WandbConfig, folder: Storage | str | Path, *, name: str) -> None:
        super().__init__(settings, folder, group=name)

    def trial(self, trial: Trial, *, config: Mapping[str, Any], run_dir: Storage | None = None) -> None:
        """Write an ended trial: its config by path, reports over tokens, final objectives, and from its run record
        the score matrix, the report page and the lineage."""
        label = f"trial-{trial.id}"
        if not self.active or self._written(label):
            return
        values = {
            **public_values(config),
            "trial": trial.id,
            "point": trial.point.id,
            "knobs": dict(trial.point.params),
        }
        self._open(label, job_type="trial", name=f"{self._group}/{trial.id}", config=values)
        if self._run is None:
            return
        self._quietly(lambda: self._log_reports(trial), "log a trial")
        if run_dir is not None:
            self._quietly(lambda: self._log_record(trial, run_dir), "log a trial's run record")
        self._close(exit_code=int(trial.status == "failed"))
        if self.active:
            self._quietly(lambda: self._storage.write_text(label, "wandb", "written", label), "note a written trial")

    def finish(self, trials: Sequence[Trial], page: str | Path | None = None) -> None:
        """Write the study's summary: all trials as a table (for parallel coordinates) and the study's page."""
        if self.active:
            self._open("summary", job_type="study", name=f"{self._group}/summary", config={"study": self._group})
        if self._run is not None:
            self._quietly(lambda: self._log_table(trials), "log the table of trials")
            if page is not None and Path(page).is_file():
                self._quietly(lambda: self._log_report(Path(page), f"study-{self._identity}"), "store the study's page")
        self._close()
        self._copy_out()

    # --- inside ------------------------------------------------------------------------------------------------

    def _written(self, label: str) -> bool:
        try:
            return self._storage.exists("wandb", "written", label)
        except OSError:
            return False

    def _log_reports(self, trial: Trial) -> None:
        for report in trial.reports:
            objectives = {f"objectives/{key}": getattr(report.objectives, key) for key in _OBJECTIVES}
            signals = {f"signals/{key}": value for key, value in report.signals.items()}
            self._run.log({"tokens": report.tokens, "step": report.step, **objectives, **signals})
        summary: dict[str, Any] = {"status": trial.status, "seed": trial.seed, "reason": trial.reason}
        if trial.final is not None:
            summary |= {key: getattr(trial.final, key) for key in _OBJECTIVES}
        self._run.summary.update({key: value for key, value in summary.items() if value is not None})

    def _log_record(self, trial: Trial, run_dir: Storage) -> None:
        if run_dir.exists("scores.json"):
            self._log_scores(run_dir.read_json("scores.json"))
        with tempfile.TemporaryDirectory(prefix="nexus-ray-wandb-") as folder:
            if run_dir.exists("report.html"):
                (page := Path(folder) / "report.html").write_bytes(run_dir.read_bytes("report.html"))
                self._log_report(page, f"report-{self._identity}-{trial.id}")
            if run_dir.exists("run.json"):
                self._log_lineage(trial, run_dir, run_dir.read_json("run.json"))

    def _log_lineage(self, trial: Trial, run_dir: Storage, record: Mapping[str, Any]) -> None:
        inputs = []
        for domain, manifest in (record.get("data") or {}).items():
            name = _artifact_name(f"data-{domain}-{manifest.get('train')}")
            self._log_manifest(name, "dataset", "manifest.json", public_values({"domain": domain, **manifest}))
            inputs.append(name)
        keys = ("name", "fingerprint", "commit", "tokenizer", "stages", "outcome")
        facts = {key: record[key] for key in keys if key in record}
        values = public_values(
            {**facts, "run": run_dir.uri, "inputs": inputs, "checkpoint": _checkpoint(run_dir, record)}
        )
        self._log_manifest(_artifact_name(f"model-{self._identity}-{trial.id}"), "model", "checkpoint.json", values)

    def _log_manifest(self, name: str, kind: str, file: str, values: Mapping[str, Any]) -> None:
        artifact = self._wandb.Artifact(name, type=kind, metadata=dict(values))
        with artifact.new_file(file) as handle:
            json.dump(values, handle, indent=1, sort_keys=True)
        self._run.log_artifact(artifact)

    def _log_table(self, trials: Sequence[Trial]) -> None:
        knobs = list(dict.fromkeys(knob for trial in trials for knob in trial.point.params))
        rows = []
        for trial in trials:
            last = trial.reports[-1] if trial.reports else None
            measured = [None if last is None else getattr(last.objectives, key) for key in _OBJECTIVES]
            own = [_cell(trial.point.params.get(knob)) for knob in knobs]
            rows.append([trial.id, trial.seed, trial.status, *own, None if last is None else last.tokens, *measured])
        columns = ["trial", "seed", "status", *knobs, "tokens", *_OBJECTIVES]
        self._run.log({"trials": self._wandb.Table(columns=columns, data=rows, allow_mixed_types=True)})


def _cell(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)


def _artifact_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "-", text)[:120]


def _checkpoint(run_dir: Storage, record: Mapping[str, Any]) -> dict[str, Any]:
    """What the last stage's last checkpoint says of itself, without its lists of files and parameters."""
    stages = record.get("stages") or []
    if not stages:
        return {}
    stage = f"{stages[-1]['index']:02d}-{stages[-1]['name']}"
    found = run_dir.list("stages", stage, "checkpoints")
    for name in sorted(found, reverse=True):
        if run_dir.exists("stages", stage, "checkpoints", name, "MANIFEST.json"):
            manifest = run_dir.read_json("stages", stage, "checkpoints", name, "MANIFEST.json")
            info = {key: value for key, value in (manifest.get("info") or {}).items() if key != "parameters"}
            return {"name": name, "uri": run_dir.child("stages", stage, "checkpoints", name).uri, **info}
    return {}
