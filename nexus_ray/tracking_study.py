"""Mirror a study to Weights & Biases: one group, a W&B run per trial, a summary with all trials and the page.

Written by the study's driver once the turn of a trial has ended, from the trial's own run record; the trial's process
is given a config without W&B (`nexus_ray.tune.trial`). As in `tracking.py` nothing here may stop a study.

Invariant: a trial is written again only when it has gone on since, and then takes the place of what was written: an
online run is added to, an offline directory replaced.

Lineage: every data manifest of the run is an artifact (type `dataset`), the checkpoint one of type `model` that names
them and holds the checkpoint's own manifest, not its weights. Online the run is said to have *used* its data. Offline
the client refuses that, so the edge from data to checkpoint is also in the model's metadata (`inputs`), in every mode.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nexus_ray.config.tree import WandbConfig
from nexus_ray.storage import Storage
from nexus_ray.study.records import Trial
from nexus_ray.tracking import Mirror, public_value, public_values

_OBJECTIVES = ("new", "forgetting", "cost")


class StudyTracker(Mirror):
    """W&B runs of a study's trials.

        tracker = StudyTracker(settings, study_dir, name="sweep")
        tracker.trial(trial, config=config.model_dump(mode="json"), run_dir=storage.child(run_name))
        tracker.finish(trials, page="report.html")

    No method raises. A trial that is as it was when it was written, by an earlier driver perhaps, is passed over.
    """

    def __init__(self, settings: WandbConfig, folder: Storage | str | Path, *, name: str) -> None:
        super().__init__(settings, folder, group=name)
        self._known: dict[str, dict[str, Any] | None] = {}

    def lacks(self, trial: Trial) -> bool:
        """Whether a trial has not been written as it is now."""
        return self.active and not _is_state(trial, self._written(f"trial-{trial.id}"))

    def trial(self, trial: Trial, *, config: Mapping[str, Any], run_dir: Storage | None = None) -> None:
        """Write an ended trial: its config by path, reports over tokens, final objectives, and from its run record
        the score matrix, the report page and the lineage."""
        label = f"trial-{trial.id}"
        if not self.lacks(trial):
            return
        before = self._written(label)
        values = {
            **public_values(config),
            "trial": trial.id,
            "point": trial.point.id,
            "knobs": public_value(dict(trial.point.params)),
        }
        self._open(label, job_type="trial", name=f"{self._group}/{trial.id}", config=values)
        if self._run is None:
            return
        self._quietly(lambda: self._drop_earlier(label), "replace what was written of a trial before")
        sent = before["reports"] if before and before["mode"] == self._mode == "online" else 0
        self._quietly(lambda: self._log_reports(trial, sent), "log a trial")
        if run_dir is not None:
            self._quietly(lambda: self._log_record(trial, run_dir), "log a trial's run record")
        self._close(exit_code=int(trial.status == "failed"))
        if self.active:
            self._known[label] = state = {"reports": len(trial.reports), "status": trial.status, "mode": self._mode}
            self._quietly(lambda: self._storage.write_json(state, "wandb", "written", label), "note a written trial")

    def finish(self, trials: Sequence[Trial], page: str | None = None) -> None:
        """Write the study's summary: all trials as a table (for parallel coordinates), and the file `page` of its
        folder if it is there."""
        if self.active:
            self._open("summary", job_type="study", name=f"{self._group}/summary", config={"study": self._group})
        if self._run is not None:
            self._quietly(lambda: self._drop_earlier("summary"), "replace an earlier summary")
            self._quietly(lambda: self._log_table(trials), "log the table of trials")
            if page is not None:
                name = f"study-{self._identity}"
                self._quietly(lambda: self._log_page(self._storage, page, name), "store the study's page")
        self._close()
        self._copy_out()

    # --- inside ------------------------------------------------------------------------------------------------

    def _written(self, label: str) -> dict[str, Any] | None:
        """How much was written of a trial: reports, status and in which mode; None if nothing, or nobody can tell."""
        if label not in self._known:
            try:
                self._known[label] = self._storage.read_json("wandb", "written", label)
            except (OSError, ValueError):  # missing, unreachable or torn: it is written anew
                self._known[label] = None
        return self._known[label]

    def _drop_earlier(self, label: str) -> None:
        """Delete offline directories of the W&B run that is open now: with those, `wandb sync` would send it twice."""
        now = Path(self._run.dir).parent.name
        for name in self._storage.list("wandb"):
            if name.startswith("offline-run-") and name.endswith(f"-{self._identity}-{label}") and name != now:
                self._storage.delete("wandb", name)
                if self._folder is not None:  # from where it would be copied out once more
                    shutil.rmtree(self._folder / "wandb" / name, ignore_errors=True)

    def _log_reports(self, trial: Trial, sent: int) -> None:
        """Log all reports but the first `sent`."""
        for report in trial.reports[sent:]:
            objectives = {f"objectives/{key}": getattr(report.objectives, key) for key in _OBJECTIVES}
            signals = {f"signals/{key}": value for key, value in report.signals.items()}
            self._run.log({"tokens": report.tokens, "step": report.step, **objectives, **signals})
        summary: dict[str, Any] = {"status": trial.status, "seed": trial.seed, "reason": public_value(trial.reason)}
        if trial.final is not None:
            summary |= {key: getattr(trial.final, key) for key in _OBJECTIVES}
        self._run.summary.update({key: value for key, value in summary.items() if value is not None})

    def _log_record(self, trial: Trial, run_dir: Storage) -> None:
        if run_dir.exists("scores.json"):
            self._log_scores(run_dir.read_json("scores.json"))
        self._log_page(run_dir, "report.html", f"report-{self._identity}-{trial.id}")
        if run_dir.exists("run.json"):
            self._log_lineage(trial, run_dir, run_dir.read_json("run.json"))

    def _log_page(self, folder: Storage, file: str, name: str) -> None:
        if folder.exists(file):
            with tempfile.TemporaryDirectory(prefix="nexus-ray-wandb-") as place:
                (page := Path(place) / file).write_bytes(folder.read_bytes(file))
                self._log_report(page, name)

    def _log_lineage(self, trial: Trial, run_dir: Storage, record: Mapping[str, Any]) -> None:
        inputs = []
        for domain, manifest in (record.get("data") or {}).items():
            name = _artifact_name(f"data-{domain}-{manifest.get('train')}")
            values = public_values({"domain": domain, **manifest})
            data = self._manifest(name, "dataset", "manifest.json", values)
            if self._mode == "online":
                self._run.use_artifact(data)  # which stores it too; stored by the run, it would be its output
            else:
                self._run.log_artifact(data)
            inputs.append(name)
        keys = ("name", "fingerprint", "commit", "tokenizer", "stages", "outcome")
        facts = {key: record[key] for key in keys if key in record}
        values = public_values(
            {**facts, "run": run_dir.uri, "inputs": inputs, "checkpoint": _checkpoint(run_dir, record)}
        )
        name = _artifact_name(f"model-{self._identity}-{trial.id}")
        self._run.log_artifact(self._manifest(name, "model", "checkpoint.json", values))

    def _manifest(self, name: str, kind: str, file: str, values: Mapping[str, Any]) -> Any:
        """An artifact of one JSON file, which is its metadata as well."""
        artifact = self._wandb.Artifact(name, type=kind, metadata=dict(values))
        with artifact.new_file(file) as handle:
            json.dump(values, handle, indent=1, sort_keys=True)
        return artifact

    def _log_table(self, trials: Sequence[Trial]) -> None:
        knobs = list(dict.fromkeys(knob for trial in trials for knob in trial.point.params))
        rows = []
        for trial in trials:
            last = trial.reports[-1] if trial.reports else None
            measured = [None if last is None else getattr(last.objectives, key) for key in _OBJECTIVES]
            own = [_cell(public_value(trial.point.params.get(knob))) for knob in knobs]
            rows.append([trial.id, trial.seed, trial.status, *own, None if last is None else last.tokens, *measured])
        columns = ["trial", "seed", "status", *knobs, "tokens", *_OBJECTIVES]
        self._run.log({"trials": self._wandb.Table(columns=columns, data=rows, allow_mixed_types=True)})


def _is_state(trial: Trial, written: Mapping[str, Any] | None) -> bool:
    return written is not None and (written["reports"], written["status"]) == (len(trial.reports), trial.status)


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
