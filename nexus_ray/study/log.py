"""The durable record of a study in `<storage>/<name>-study/`, and the one place that writes it.

    study.yaml, base.yaml   the study file and its base run; `nexus-ray tune .../study.yaml` goes on from them alone
    study.json              fingerprints, to tell an extended study from another one; how much it reads of ledgers
    trials.jsonl            events, one a line with a checksum: planned, started, prepared, reported, continued, paused,
                            promoted, stopped, finished, failed, lost, retried, extended, timed

Invariant: an event is on disk before `write` returns; a torn last line is cut off by the next writer; one process
writes at a time. What became of each trial is `History` over the events.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any

import yaml

from nexus_ray.config import RunConfig
from nexus_ray.config.domains import SynthesisSource
from nexus_ray.config.faults import report
from nexus_ray.config.study import StudyConfig, rung_shares
from nexus_ray.corpora.sources.synthesis import Pin, pinned, present_pin
from nexus_ray.errors import ConfigError, DataError
from nexus_ray.storage import Storage
from nexus_ray.study.extend import contradictions
from nexus_ray.study.history import Event, History
from nexus_ray.study.load import Study, points_to_check
from nexus_ray.study.records import Trial, canonical
from nexus_ray.synthesis.append_log import LogWriter, read_log

NAME = "trials"
LOST = "trials it speaks of may be run again or judged anew"


class StudyLog:
    """The log of a study, open for writing, as a context manager.

    Entering raises ConfigError if the study there is another one (with what to do), DataError if somebody else is
    writing, or if the log is damaged.
    """

    def __init__(self, study: Study, *, clock: Callable[[], float] = time.time) -> None:
        self._study = study
        self._clock = clock
        self._stack = ExitStack()
        self._writer = LogWriter(study.folder, NAME)
        self.events: list[Event] = []
        """What was in the log when it was opened."""

    def __enter__(self) -> StudyLog:
        folder = self._study.folder
        self._stack.enter_context(self._writer)
        try:
            changed = self._check(folder)
            self.events = list(read_log(folder, NAME, lost=LOST))
            if changed is not None and self.events:
                self.write({"event": "extended", "config": _data(self._study.config)})
            if changed is not None or _description(folder).get("pins") != self._study.pins:
                self._describe(folder)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def write(self, event: Event) -> None:
        """Add an event; it is safe once this returns."""
        self._writer.write({**event, "time": round(self._clock(), 3)})
        self._writer.flush()

    def _check(self, folder: Storage) -> str | None:
        """The study's fingerprint if its description has to be written, now or again; None if it stands."""
        own = study_fingerprint(self._study)
        if not folder.exists("study.json"):
            return own
        there = _description(folder)
        if there["fingerprint"] == own:
            return None
        faults = list(
            contradictions(
                StudyConfig.model_validate(there["config"]),
                self._study.config,
                old_base=there["base_fingerprint"],
                new_base=self._study.base_fingerprint,
            )
        )
        if faults:
            raise ConfigError(report(faults, where=f"{folder.uri} holds a study that this file contradicts"))
        return own

    def _describe(self, folder: Storage) -> None:
        config = _data(self._study.config)
        folder.write_text(_yaml(self._study.base), "base.yaml")
        folder.write_text(_yaml({**config, "base": "base.yaml", "common": {}}), "study.yaml")  # base.yaml has `common`
        description = {
            "name": self._study.config.name,
            "fingerprint": study_fingerprint(self._study),
            "base_fingerprint": self._study.base_fingerprint,
            "config": config,
            "pins": self._study.pins,
        }
        folder.write_json(description, "study.json")


def as_recorded(study: Study, folder: Storage) -> Study:
    """The study, whose record lies in `folder`, with every ledger held to the prefix that it has read."""
    return replace(study, pins=_description(folder).get("pins", {}) if folder.exists("study.json") else {})


def held(study: Study, folder: Storage) -> Study:
    """The same, and a ledger that it has not read yet held to what is there now: trials that read more than others
    would not compare. Raises DataError if no point finds all its ledgers; one that does not fails by itself."""
    study = as_recorded(study, folder)
    pins = dict(study.pins)

    def find(domain: str, source: SynthesisSource) -> Pin:
        ledger = source.ledger or ""
        if ledger not in pins:
            pins[ledger] = present_pin(domain, source)
        return pins[ledger]

    missing: DataError | None = None
    sound = False
    for config in _configs(study) if _reads_ledgers(study) else ():
        try:
            pinned(config, find)
            sound = True
        except DataError as error:
            missing = missing or error
    if missing is not None and not sound:
        raise missing
    return replace(study, pins=pins)


def _reads_ledgers(study: Study) -> bool:
    return "synthesis" in canonical([study.base, _data(study.config)])


def _configs(study: Study) -> Iterator[RunConfig]:
    return (study.config_of(point, study.config.seeds[0]) for point in points_to_check(study))


def study_fingerprint(study: Study) -> str:
    """12 hex digits that change with every setting that changes what is run or decided."""
    data = _data(study.config)
    for path in ("base", "common", "max_concurrent"):
        del data[path]
    return hashlib.sha256(canonical([data, study.base_fingerprint]).encode()).hexdigest()[:12]


def read_study(folder: Storage) -> tuple[StudyConfig, list[Trial]]:
    """A study and its trials from its folder, while it runs or afterwards. Raises DataError if there is none."""
    if not folder.exists("study.json"):
        raise DataError(f"{folder.uri} holds no study (no study.json); name the folder `<storage>/<name>-study`")
    config = StudyConfig.model_validate(_description(folder)["config"])
    history = History(rung_shares(config.stopping), config.seeds)
    history.apply_all(read_log(folder, NAME, lost=LOST))
    return config, history.records()


def _description(folder: Storage) -> dict[str, Any]:
    try:
        return dict(folder.read_json("study.json"))
    except ValueError:
        raise DataError(
            f"{folder.path('study.json')} is no JSON; restore it, or delete it: it is written anew, and "
            "ledgers are read as far as they go then"
        ) from None


def _data(config: StudyConfig) -> dict[str, Any]:
    return config.model_dump(mode="json")


def _yaml(data: dict[str, Any]) -> str:
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)
