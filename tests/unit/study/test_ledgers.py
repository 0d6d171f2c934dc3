"""A study on rows that a synthesis job still writes: all trials read the prefix that the first start found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nexus_ray.config import Hardware, RunConfig
from nexus_ray.corpora.parts import load_manifest
from nexus_ray.errors import DataError
from nexus_ray.report.study_folder import study_view
from nexus_ray.storage import Storage
from nexus_ray.study.load import Study, load_study
from nexus_ray.study.log import StudyLog, as_recorded, held
from tests.ledger_job import run_job
from tests.studies import BASE, a_study, write_study

JOB = {"generator": {"kind": "openai", "model": "m"}, "recipe": "recipe.yaml"}
OWN: dict[str, Any] = {
    "domains": {**BASE["domains"], "own": {"source": {"kind": "synthesis"}}},  # type: ignore[dict-item]
    "synthesis": {"own": JOB},
    "stages": [{"name": "one", "domains": {"own": 1}}],
}


def source(study: Study) -> Any:
    point = next(study.space.grid())
    config: RunConfig = study.config_of(point, 0)
    return config.domains["own"].source


def test_the_ledger_of_the_base_run_is_read_as_far_as_it_was_at_the_first_start(tmp_path: Path) -> None:
    place = Storage(str(tmp_path / "runs")).child("base", "synthesis", "own")
    study = a_study(tmp_path, base=OWN)
    assert source(study).ledger == place.uri, "not in a folder of the trial"
    with pytest.raises(DataError, match="nothing has been written to the synthesis ledger"):
        held(study, study.folder)

    run_job(place, 0, lambda id: None, prompts=(2,))
    before = load_manifest(place)
    first = held(study, study.folder)
    with StudyLog(first):
        assert source(first).entries == len(before.entries) > 0

    run_job(place, 0, lambda id: None, prompts=(2, 4))
    assert len(load_manifest(place).entries) > len(before.entries)
    again = held(a_study(tmp_path, base=OWN), study.folder)
    with StudyLog(again) as log:
        assert not [event for event in log.events if event["event"] == "extended"]
    pins = (len(before.entries), before.prefix(len(before.entries)).fingerprint)
    assert (source(again).entries, source(again).fingerprint) == pins
    other = a_study(tmp_path, base=OWN, name="other")
    assert source(held(other, other.folder)).entries == len(load_manifest(place).entries)


def test_the_folder_alone_knows_what_was_read(tmp_path: Path) -> None:
    place = Storage(str(tmp_path / "runs")).child("base", "synthesis", "own")
    run_job(place, 0, lambda id: None, prompts=(2,))
    study = a_study(tmp_path, base=OWN)
    with StudyLog(held(study, study.folder)):
        pass
    place.delete()
    _, shown = study_view(study.folder)
    alone = load_study(study.folder.local_path / "study.yaml", hardware=Hardware(cpus=2))
    assert source(shown) == source(as_recorded(alone, study.folder)) and source(shown).ledger == place.uri


def test_what_a_study_file_says_of_the_prefix_stands(tmp_path: Path) -> None:
    place = Storage(str(tmp_path / "elsewhere"))
    run_job(place, 0, lambda id: None)
    own = {"source": {"kind": "synthesis", "ledger": place.uri, "entries": 1}}
    study = a_study(tmp_path, base={**OWN, "domains": {**OWN["domains"], "own": own}})
    assert source(held(study, study.folder)).entries == 1


def test_a_ledger_named_from_where_one_stands_stays_so(tmp_path: Path) -> None:
    own = {"source": {"kind": "synthesis", "ledger": "runs/other/synthesis/own"}}
    study = a_study(tmp_path, base={**OWN, "domains": {**OWN["domains"], "own": own}})
    assert study.base["domains"]["own"]["source"]["ledger"] == "runs/other/synthesis/own"


def test_every_ledger_of_the_space_has_its_own_prefix_and_one_that_is_missing_fails_alone(tmp_path: Path) -> None:
    places = {name: Storage(str(tmp_path / name)) for name in ("first", "second", "missing")}
    run_job(places["first"], 0, lambda id: None, prompts=(2,))
    run_job(places["second"], 1, lambda id: None)
    choice = [place.uri for place in places.values()]
    study = load_study(
        write_study(tmp_path, base=OWN, space={"domains.own.source.ledger": {"choice": choice}}),
        hardware=Hardware(cpus=2),
    )
    pinned = held(study, study.folder)
    found = {each.ledger: each for each in (pinned.config_of(p, 0).domains["own"].source for p in study.space.grid())}
    for name in ("first", "second"):
        entries = load_manifest(places[name]).entries
        assert found[places[name].uri].entries == len(entries)
        assert found[places[name].uri].fingerprint == load_manifest(places[name]).prefix(len(entries)).fingerprint
    assert found[places["missing"].uri].entries is None
    with StudyLog(pinned):
        assert set(as_recorded(study, study.folder).pins) == {places["first"].uri, places["second"].uri}
    run_job(places["missing"], 2, lambda id: None, prompts=(2,))
    later = held(study, study.folder)
    with StudyLog(later) as log:
        assert later.pins == {**pinned.pins, places["missing"].uri: later.pins[places["missing"].uri]}
        assert not log.events
    assert as_recorded(study, study.folder) == later
