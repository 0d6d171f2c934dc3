"""A small job that writes from documents: the way back to them, through an earlier job too, and novelty beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from nexus_ray.config.tree import SynthesisSource
from nexus_ray.corpora.documents import DocumentManifest, document_id
from nexus_ray.corpora.sources import RawDocument
from nexus_ray.corpora.sources.synthesis import SynthesisCorpus
from nexus_ray.errors import DataError
from nexus_ray.report.lineage import document_lineage, row_lineage, show_lineage
from nexus_ray.storage import Storage
from nexus_ray.synthesis.ledger import Ledger
from nexus_ray.synthesis.rows import Answer, Row
from nexus_ray.synthesis.setup import AnswerJudge, JobSpec, PlanOrder, open_job
from tests.jobs import FILTERS, RECIPE, job_config
from tests.unit.synthesis.build import write_domain

TEXTS = [
    "The miller had hidden a box of bright marbles under the floor of the old mill.",
    "Rivers carry sediment from mountains to the sea and build fertile plains there.",
    "Engineers today leave room beside the channel where water may spread for weeks.",
]
LINES = {"name": "retell", "messages": [{"role": "user", "content": "Retell: {{ source }}"}], "order": "product"}


def write_recipe(folder: Path, domain: str, **changes: Any) -> None:
    documents = {"domain": domain, **changes.pop("documents", {})}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**LINES, "documents": documents, **changes}))


def opened(
    folder: Path, name: str, documents: dict[str, DocumentManifest], *, prompts: int | None = None, **filters: Any
) -> JobSpec:
    settings = {"filters": {**FILTERS, **filters}, "unseen": [], "num_candidates": 1, "prompts": prompts}
    config = job_config(folder, "http://127.0.0.1:1", name=name, **settings)
    domains = {key: one.model_copy(update={"held_out_fraction": 0.0}) for key, one in config.domains.items()}
    return open_job(config.model_copy(update={"domains": domains}), "sentences", documents)


def finished(spec: JobSpec) -> Ledger:
    """The job with answers that name their prompt's place."""
    ledger = Ledger(spec.ledger, spec.job)
    ledger.plan(spec.requests())
    judge = AnswerJudge(spec)
    with ledger.write(0) as log:
        for place, (id, request) in enumerate(log.pending().items()):
            answer = Answer(id, f"It was told {place} times at {spec.ledger.uri[-20:]}.", "stop", 1, 1)
            log.answered(answer)
            log.judged(id, judge.rows(request, answer))
    with ledger.committer(PlanOrder(spec)) as committer:
        committer.commit()
    return ledger


@pytest.fixture
def real(tmp_path: Path) -> DocumentManifest:
    job_config(tmp_path, "http://127.0.0.1:1")  # writes a recipe, which is written over
    write_recipe(tmp_path, "real")
    shared = Storage(str(tmp_path)).child("runs", "_shared", "documents")
    write_domain(shared.child("other-0"), ["Another text."], domain="other")
    raw = [RawDocument(text, {"source": "files", "file": "real.txt", "line": n}) for n, text in enumerate(TEXTS)]
    return write_domain(shared.child("real-0"), raw, domain="real")


def test_a_row_leads_to_its_documents_with_file_and_licence(tmp_path: Path, real: DocumentManifest) -> None:
    ledger = finished(opened(tmp_path, "first", {"real": real}))
    [row, *_] = ledger.rows()
    found = row_lineage(Storage(str(tmp_path / "runs" / "first")), row.id)
    assert found["parents"] == [document_id(TEXTS[0])] and found["parent_rows"] == []
    [parent] = found["parent_documents"]
    assert parent["provenance"] == {"source": "files", "file": "real.txt", "line": 0}
    assert (parent["domain"], parent["license"], parent["attribution"]) == ("real", "CC0-1.0", "A. Author")
    assert parent["source"] == "files of real" and parent["row"] is None
    json.dumps(found)


def test_a_parent_that_a_job_wrote_leads_into_its_ledger(tmp_path: Path, real: DocumentManifest) -> None:
    first = finished(opened(tmp_path, "first", {"real": real}))
    corpus = SynthesisCorpus("earlier", SynthesisSource(kind="synthesis", ledger=first.folder.uri))
    raw = [document for item in corpus.listing() for document in corpus.read(item)]
    shared = Storage(str(tmp_path)).child("runs", "_shared", "documents")
    earlier = write_domain(shared.child("real-1"), raw, domain="real")
    second = finished(opened(tmp_path, "second", {"real": earlier}))
    [row, *_] = second.rows()
    [parent] = row_lineage(second.folder, row.id)["parent_documents"]
    assert parent["provenance"]["ledger"] == first.folder.uri and parent["document"] == document_id(raw[0].text)
    assert parent["row"]["text"] == raw[0].text and parent["row"]["answer"] == raw[0].text
    [grandparent] = parent["row"]["parent_documents"]
    assert grandparent["document"] == document_id(TEXTS[0]) and grandparent["provenance"]["file"] == "real.txt"
    first.folder.delete("plan.json")
    [parent] = row_lineage(second.folder, row.id)["parent_documents"]
    assert parent["row"] is None and parent["provenance"]["row"]


def test_the_command_takes_the_id_of_a_document(tmp_path: Path, real: DocumentManifest) -> None:
    ledger = finished(opened(tmp_path, "first", {"real": real}))
    said: list[str] = []
    for place in (str(tmp_path / "runs" / "first"), ledger.folder.uri):
        show_lineage(place, document_id(TEXTS[1]), out=tmp_path / "out.jsonl", say=said.append)
        assert json.loads(said[-2])["provenance"]["line"] == 1
        assert json.loads((tmp_path / "out.jsonl").read_text())["domain"] == "real"
    with pytest.raises(DataError, match="document 0123456789abcdef is in no domain that was built in"):
        document_lineage(ledger.folder, "0123456789abcdef")


def judged(spec: JobSpec, texts: dict[int, str]) -> list[str]:
    """Reasons of one row for each prompt, in order, in a fresh memory; rows that pass are remembered."""
    memory, reasons = PlanOrder(spec), []
    prompts = spec.prompts()
    for place, text in texts.items():
        row = Row(text, f"r{place}", 0, prompts[place])
        memory.group([row])
        verdict = memory.judge(row)
        reasons.append(verdict.reason)
        if verdict.outcome == "pass":
            memory.remember(row)
    return reasons


COPY = "novelty: close to a text of the prompts"


@pytest.mark.parametrize("grounded", [True, False])
def test_a_row_that_repeats_what_its_prompt_showed_is_no_news(
    tmp_path: Path, real: DocumentManifest, grounded: bool
) -> None:
    write_recipe(tmp_path, "real", documents={"grounded": grounded})
    spec = opened(tmp_path, "first", {"real": real}, novelty={})
    fresh = "Nobody had ever seen so many herons on one roof."
    assert judged(spec, {0: TEXTS[0].lower(), 1: f"And {TEXTS[1]}", 2: fresh}) == [COPY, COPY, ""]
    assert judged(spec, {2: TEXTS[0]}) == [COPY], "prompts without a row have shown theirs"
    assert judged(spec, {0: TEXTS[1]}) == [""], "what a later prompt shows decides nothing here"
    shorter = opened(tmp_path, "first", {"real": real}, prompts=1, novelty={})
    assert judged(shorter, {0: TEXTS[1]}) == [""], "so that a plan may be extended"
    off = opened(tmp_path, "off", {"real": real})
    assert judged(off, {0: TEXTS[0]}) == [""]


def test_an_example_that_the_assistant_is_said_to_have_given_is_shown_too(
    tmp_path: Path, real: DocumentManifest
) -> None:
    turns = [{"role": "user", "content": "A sentence."}, {"role": "assistant", "content": "Ten owls sat in a row."}]
    write_recipe(tmp_path, "real", messages=[*turns, {"role": "user", "content": "Retell: {{ source }}"}])
    spec = opened(tmp_path, "first", {"real": real}, novelty={})
    assert judged(spec, {0: "Ten owls sat in one row!"}) == [COPY]


def test_the_other_direction_is_measured_for_a_job(tmp_path: Path, real: DocumentManifest) -> None:
    """Also with the filter off, when something is there to be found."""
    config = job_config(tmp_path, "http://127.0.0.1:1", filters={**FILTERS, "contamination": None}, unseen=["real"])
    held_out = config.domains["real"].model_copy(update={"held_out_fraction": 0.9999})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    domains = {**config.domains, "real": held_out}
    spec = open_job(config.model_copy(update={"domains": domains}), "sentences", {"real": real})
    [line] = spec.overlap([("r1", "It is told so. " + TEXTS[1]), ("r2", "Nothing of it.")])
    assert line["unseen"] == "real" and (line["items"], line["touched"], line["rows"]) == (3, 1, 1)
