"""Texts that people write: judged before they count, refused with a reason, overruled by name, each accepted once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nexus_ray.config.filters import SafetyFilter
from nexus_ray.corpora.parts import PartRow
from nexus_ray.errors import DataError
from nexus_ray.storage import Storage
from nexus_ray.synthesis.decisions import REFUSALS_FILE
from nexus_ray.synthesis.ledger import Ledger
from nexus_ray.synthesis.rows import Answer
from nexus_ray.synthesis.setup import AnswerJudge, JobSpec, PlanOrder, open_job
from tests.jobs import job_config
from tests.unit.synthesis.build import write_domain
from tests.unit.synthesis.filters.test_safety_model import bert

SECRET = "The harbour master counted eleven grey boats before the storm came in from the north that evening."
HELD_OUT = 0.9999  # of the documents: all but certainly the one there is
FILTERS = {"personal": {"action": "flag"}, "language": None, "repetition": None, "novelty": None, "near": None}
FLAGGED = [f"Write to number{place}@firm.org about rain and snow." for place in range(10)]


def job(folder: Path, **filters: Any) -> tuple[JobSpec, Ledger, list[PartRow]]:
    """A job with ten flagged rows, and `real` documents whose text must not occur in rows."""
    settings = {"filters": {**FILTERS, "diversity": None, **filters}, "unseen": ["real"]}
    config = job_config(folder, "http://127.0.0.1:1", prompts=1, num_candidates=1, **settings)
    real = config.domains["real"].model_copy(update={"held_out_fraction": HELD_OUT})
    config = config.model_copy(update={"domains": {**config.domains, "real": real}})
    documents = write_domain(Storage(str(folder)).child("runs/_shared/documents/real-0"), [SECRET], domain="real")
    spec = open_job(config, "sentences", {"real": documents})
    ledger = Ledger(spec.ledger, spec.job)
    ledger.plan(spec.requests())
    judge = AnswerJudge(spec)
    with ledger.write(0) as log:
        for id, request in log.pending().items():
            answer = Answer(id, "\n".join(f"{n}. {text}" for n, text in enumerate(FLAGGED, 1)), "stop", 1, 1)
            log.answered(answer)
            log.judged(id, judge.rows(request, answer))
    with ledger.committer(PlanOrder(spec)) as committer:
        committer.commit()
    return spec, ledger, queue(ledger)


def queue(ledger: Ledger) -> list[PartRow]:
    with ledger.review() as review:
        return list(review.queue())


def decide(ledger: Ledger, row: PartRow, action: Any, text: str) -> None:
    with ledger.review() as review:
        review.decide(row.id, action, who="ann", text=text)


def fold(spec: JobSpec, ledger: Ledger) -> list[str]:
    """Texts that the fold accepts."""
    with ledger.committer(PlanOrder(spec)) as committer:
        entry = committer.fold_decisions()
    return [row.text for row in list(ledger.rows())[-entry.accepted.rows :]] if entry and entry.accepted else []


def test_held_out_text_in_an_edit_is_refused_and_waits_with_the_reason(tmp_path: Path) -> None:
    spec, ledger, rows = job(tmp_path)
    assert len(rows) == 10 and rows[0].reason == "personal: email"
    decide(ledger, rows[0], "edit", f"It rained. {SECRET}")
    for _ in range(2):
        assert fold(spec, ledger) == []
        [first, *others] = queue(ledger)
        assert first.id == rows[0].id and first.text == rows[0].text and len(others) == 9
        assert first.reason.startswith("contamination: 13 words in a row of real/")
        assert first.reason.endswith("(in the new text; the row: personal: email)")
        assert first.provenance["refused"]["text"] == f"It rained. {SECRET}"
        assert first.provenance["refused"]["scores"]["contamination.share"] == 1.0
    decide(ledger, rows[0], "edit", "It rained on the whole of the coast.")
    assert fold(spec, ledger) == ["It rained on the whole of the coast."]
    assert len(queue(ledger)) == 9 and ledger.folder.read_json(REFUSALS_FILE) == []


def test_a_reviewer_may_overrule_the_filters_by_name(tmp_path: Path) -> None:
    spec, ledger, rows = job(tmp_path)
    decide(ledger, rows[0], "edit", SECRET)
    fold(spec, ledger)
    decide(ledger, rows[0], "override", SECRET)
    assert fold(spec, ledger) == [SECRET]
    row = list(ledger.rows())[-1]
    review = row.provenance["review"]
    assert (review["action"], review["who"], review["flagged"]) == ("override", "ann", "personal: email")
    assert review["overruled"].startswith("contamination: 13 words in a row of real/")
    assert row.provenance["scores"]["contamination.share"] == 1.0 and rows[0].id not in {r.id for r in queue(ledger)}


def test_an_accepted_edit_has_scores_of_its_own(tmp_path: Path) -> None:
    spec, ledger, rows = job(tmp_path)
    decide(ledger, rows[0], "edit", "Snow fell.\nIt fell on the hills and on the sea.")
    fold(spec, ledger)
    row = list(ledger.rows())[-1]
    old, new = rows[0].provenance["scores"], row.provenance["scores"]
    assert "personal.email" in old and "personal.email" not in new
    assert (old["length.words"], new["length.words"]) == (9.0, 11.0)


def test_the_same_correction_in_two_rows_is_accepted_once(tmp_path: Path) -> None:
    spec, ledger, rows = job(tmp_path)
    for row in rows[3:1:-1]:
        decide(ledger, row, "edit", "Write to the office about rain and snow.")
    assert fold(spec, ledger) == ["Write to the office about rain and snow."]
    waiting = {row.id: row.reason for row in queue(ledger)}
    assert rows[2].id not in waiting and waiting[rows[3].id].startswith("exact: as another edit"), "in plan order"
    decide(ledger, rows[5], "edit", "Write to the OFFICE about rain and snow.")
    assert fold(spec, ledger) == [], "one that was taken up earlier counts too"


def test_a_kept_row_is_not_written_again_but_a_row_may_stay_what_it_was(tmp_path: Path) -> None:
    spec, ledger, rows = job(tmp_path)
    decide(ledger, rows[0], "edit", f"{rows[1].text} ")
    decide(ledger, rows[4], "edit", f"{rows[4].text} ")
    assert fold(spec, ledger) == [f"{rows[4].text} "]
    assert queue(ledger)[0].reason.startswith("exact: as an accepted row (in the new text")


def test_personal_data_in_an_edit_is_masked_where_the_config_masks(tmp_path: Path) -> None:
    settings = {"personal": {"action": "mask"}, "safety": {"action": "flag", "extra_words": ["firm", "EMAIL"]}}
    spec, ledger, rows = job(tmp_path, **settings)
    decide(ledger, rows[0], "edit", "Write to ann@home.org about the rain.")
    assert fold(spec, ledger) == ["Write to [EMAIL] about the rain."]


def test_the_driver_asks_the_classifier_on_its_cpu(tmp_path: Path) -> None:
    """Whatever the workers have: the process that folds may have no GPU."""
    model = bert(tmp_path / "model", bias=50.0)
    spec, ledger, rows = job(tmp_path)
    asking = {"max_classifier": 0.5, "classifier": {**model.model_dump(), "device": "cuda"}}
    safety = SafetyFilter.model_validate(asking)
    spec = replace(spec, filters=spec.filters.model_copy(update={"safety": safety}))
    decide(ledger, rows[0], "edit", "It rained on the whole of the coast.")
    assert fold(spec, ledger) == [] and queue(ledger)[0].reason.startswith("safety_classifier: harmful")


def test_without_filters_edits_wait_and_other_decisions_do_not(tmp_path: Path) -> None:
    spec, ledger, rows = job(tmp_path)
    decide(ledger, rows[0], "edit", SECRET)
    with ledger.review() as review:
        review.decide(rows[1].id, "accept", who="ann")
    with ledger.committer() as committer:
        entry = committer.fold_decisions()
    assert entry is not None and entry.accepted is not None and entry.accepted.rows == 1 and len(queue(ledger)) == 8
    assert fold(spec, ledger) == [] and len(queue(ledger)) == 9


def test_a_broken_file_of_refusals_names_the_way_out(tmp_path: Path) -> None:
    spec, ledger, rows = job(tmp_path)
    decide(ledger, rows[0], "edit", SECRET)
    fold(spec, ledger)
    ledger.folder.write_text("[{}]", REFUSALS_FILE)
    with pytest.raises(DataError, match="delete it and the edits are judged again"):
        queue(ledger)
    ledger.folder.delete(REFUSALS_FILE)
    assert fold(spec, ledger) == [] and queue(ledger)[0].reason.startswith("contamination")
