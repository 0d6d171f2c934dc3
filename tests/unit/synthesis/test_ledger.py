"""The ledger: plan, parts, manifest, people's decisions, figures, lineage, and answers taken over."""

from __future__ import annotations

import json
import pickle
import random
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from nexus_ray.corpora.parts import PartRow
from nexus_ray.errors import ConfigError, DataError
from nexus_ray.storage import Storage
from nexus_ray.synthesis import plan as plan_module
from nexus_ray.synthesis.ledger import Ledger
from nexus_ray.synthesis.plan import Plan, load_plan, shard_size
from nexus_ray.synthesis.rows import PASS, Answer, Message, Prompt, Request, Row, Sampling, Verdict
from tests.ledger_job import JOB, SHARD_REQUESTS, Duplicates, decide_all, judged, phase, reply, requests, run_job, work


@pytest.fixture
def folder(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path)).child("synthesis", "stories")


def work_off(ledger: Ledger, prompts: int, seed: int = 0) -> Counter[str]:
    """Plan and finish a job without people; returns how often each request was asked."""
    asked: Counter[str] = Counter()
    ledger.plan(requests(prompts), shard_requests=SHARD_REQUESTS)
    with ledger.committer(Duplicates()) as committer:
        for shard in ledger.open_shards():
            with ledger.write(shard) as log:
                work(log, random.Random(seed), lambda id: asked.update([id]))
        committer.commit()
    return asked


# --- plan --------------------------------------------------------------------------------------------------------


def test_requests_come_back_as_they_were_planned(folder: Storage) -> None:
    turns = (Message("system", "Be brief."), Message("user", "Wörter\n"))
    prompt = Prompt(turns, recipe="r", parameters={"b": "1", "a": "2"}, parents=("x", "y"), source="Ein Text.")
    given = [Request(prompt, Sampling(stop=("\n\n",), temperature=0.3), index) for index in range(2)]
    ledger = Ledger(folder, JOB)
    plan = ledger.plan(given)
    assert (plan.requests, len(plan.shards)) == (2, 1)
    planned = pickle.loads(pickle.dumps(ledger)).requests(0)
    assert list(planned.values()) == given and list(planned) == [request.id(JOB.revision) for request in given]


def test_a_shard_does_not_divide_a_prompt(folder: Storage) -> None:
    plan = Ledger(folder, JOB).plan(requests(4, candidates=3), shard_requests=4)
    assert [shard.rows for shard in plan.shards] == [6, 6]


def test_a_plan_grows_at_its_end_only(folder: Storage) -> None:
    ledger = Ledger(folder, JOB)
    first = ledger.plan(requests(3), shard_requests=4)
    files = {file: folder.read_bytes(file) for file in (shard.file for shard in first.shards)}
    grown = ledger.plan(requests(9), shard_requests=100)
    assert grown.shards[: len(first.shards)] == first.shards and grown.shard_requests == 4 and grown.requests == 18
    assert all(folder.read_bytes(file) == data for file, data in files.items())
    assert ledger.plan(requests(9)) == grown
    with pytest.raises(ConfigError, match=r"place 0 of plan/shard-00002.parquet the prompts of this job end there"):
        ledger.plan(requests(3))
    with pytest.raises(ConfigError, match=r"place 0 of plan/shard-00000.parquet another prompt, sampling or index"):
        ledger.plan(reversed(requests(9)))
    assert ledger.plan(requests(9)) == grown, "a refused plan changes nothing"


@pytest.mark.parametrize("size", [1, 256, 1000])
def test_shards_of_a_long_plan_grow_with_the_place_alone(size: int) -> None:
    even = plan_module.EVEN_SHARDS * size
    assert [shard_size(size, before) for before in (0, even)] == [size, size]
    assert shard_size(size, 4 * even) == 2 * size and shard_size(size, 100 * even) == 10 * size
    assert shard_size(size, 10**9 * size) == 16 * size
    assert shard_size(256, 10**9) == 4096


def test_a_long_plan_extended_keeps_its_shards_and_goes_on_with_larger_ones(
    folder: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "EVEN_SHARDS", 2)
    ledger = Ledger(folder, JOB)
    first = ledger.plan(requests(20, candidates=1), shard_requests=2)
    assert [shard.rows for shard in first.shards] == [2, 2, 2, 2, 2, 3, 3, 4]
    grown = ledger.plan(requests(60, candidates=1), shard_requests=2)
    assert grown.shards[:8] == first.shards and [shard.rows for shard in grown.shards[8:]] == [4, 4, 5, 5, 6, 6, 7, 3]
    assert ledger.plan(requests(60, candidates=1)) == grown


def test_the_plan_is_parsed_once_for_all_its_shards(folder: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []

    def counted(place: Storage) -> Plan | None:
        parsed.append(place.uri)
        return load_plan(place)

    monkeypatch.setattr("nexus_ray.synthesis.ledger.load_plan", counted)
    Ledger(folder, JOB).plan(requests(8), shard_requests=SHARD_REQUESTS)
    ledger = Ledger(folder, JOB)
    for shard in ledger.open_shards():
        with ledger.write(shard) as log:
            assert log.pending() and not ledger.is_complete(shard)
    assert len(parsed) == 1
    Ledger(folder, JOB).plan(requests(9), shard_requests=SHARD_REQUESTS)
    assert len(ledger.open_shards()) == 9 and list(ledger.requests(8)), "a plan that has grown is seen"
    assert b"plan/shard-" not in pickle.dumps(ledger), "who gets a ledger reads the plan itself"


def test_a_machine_that_does_not_see_the_plan_says_so(folder: Storage) -> None:
    ledger = Ledger(folder, JOB)
    with pytest.raises(DataError, match=r"does not see shard 0 of the plan in .*stories, but 0 shards; set storage to"):
        ledger.write(0)
    ledger.plan(requests(1))
    with pytest.raises(DataError, match=r"does not see shard 7 of the plan in .*, but 1 shards"):
        ledger.is_complete(7)


def test_equal_requests_are_asked_once_and_counted(folder: Storage) -> None:
    given = [*requests(2), *requests(1), *requests(3)]
    ledger = Ledger(folder, JOB)
    plan = ledger.plan(given)
    assert (plan.requests, plan.repeated) == (6, 6)
    assert ledger.plan(given) == plan


def test_other_settings_are_refused_by_name_without_their_content(folder: Storage) -> None:
    Ledger(folder, JOB).plan(requests(1))
    other = replace(JOB, filters={"parity": "secret"}, revision="secret-2")
    with pytest.raises(ConfigError, match=r"other settings: revision \(\w+ -> \w+\), filters \(\w+ -> \w+\); restore"):
        Ledger(folder, other)
    with pytest.raises(ConfigError) as error:
        Ledger(folder, other)
    assert "secret" not in str(error.value)
    assert Ledger.load(folder).job == JOB
    with pytest.raises(DataError, match="holds no synthesis ledger"):
        Ledger.load(folder.child("nothing"))


# --- parts and manifest ------------------------------------------------------------------------------------------


def test_every_row_is_in_one_part_with_reason_and_history(folder: Storage) -> None:
    ledger = Ledger(folder, JOB)
    work_off(ledger, 4)
    rows = {kind: list(ledger.rows(kind)) for kind in ("accepted", "rejected", "review")}
    assert sum(map(len, rows.values())) == 60 and len({row.id for kind in rows for row in rows[kind]}) == 60
    assert {row.reason.partition(":")[0] for row in rows["rejected"]} == {"parity", "duplicate"}
    assert all(row.provenance["scores"] for row in rows["rejected"] + rows["review"])
    assert {row.reason for row in rows["review"]} == {"taste: odd"} and {row.reason for row in rows["accepted"]} == {""}
    kept = [row.text for row in rows["accepted"] + rows["review"]]
    assert len(set(kept)) == len(kept)
    first = rows["accepted"][0]
    assert first.provenance == {
        "recipe": "r",
        "parameters": {"n": "0"},
        "parents": ["d"],
        "prompt": requests(1)[0].prompt.id,
        "generator": "teacher-1",
        "model": "teacher",
        "index": 0,
        "finish_reason": "stop",
        "scores": {},
        "request": requests(1)[0].id("teacher-1"),
        "item": first.provenance["item"],
        "shard": 0,
        "job": JOB.fingerprint,
        "sampling": {**asdict(Sampling()), "stop": []},
    }
    columns = pq.read_schema(folder.local_path / "accepted/part-00000.parquet").names
    assert columns == ["id", "text", "domain", "provenance"]


def test_a_prefix_of_the_manifest_stays(folder: Storage) -> None:
    ledger = Ledger(folder, JOB)
    phase(ledger, 2, random.Random(0), lambda id: None)
    first = ledger.manifest()
    texts = [row.text for row in ledger.rows()]
    phase(ledger, 4, random.Random(0), lambda id: None)
    grown = ledger.manifest()
    assert len(grown.entries) > len(first.entries) and grown.fingerprint != first.fingerprint
    pinned = grown.prefix(len(first.entries), first.fingerprint)
    assert pinned == first and [row.text for row in ledger.rows(manifest=pinned)] == texts
    with pytest.raises(DataError, match=r"pinned was 0123; restore the ledger"):
        grown.prefix(1, "0123")
    with pytest.raises(DataError, match=r"has 6 entries and 7 were asked for"):
        grown.prefix(7)


def test_what_the_manifest_does_not_list_is_deleted(folder: Storage) -> None:
    ledger = Ledger(folder, JOB)
    work_off(ledger, 1)
    strays = ("accepted/part-00001.parquet", "accepted/.part-00000.parquet.1-2.tmp", ".manifest.json.1-2.tmp")
    for name in strays:
        folder.write_text("torn", name)
    before = [row.id for row in ledger.rows()]
    with ledger.committer():
        pass
    assert not any(folder.exists(name) for name in strays) and [row.id for row in ledger.rows()] == before


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_part_is_an_error(folder: Storage, damage: str) -> None:
    ledger = Ledger(folder, JOB)
    work_off(ledger, 1)
    data = bytearray(folder.read_bytes("accepted/part-00000.parquet"))
    data[50] ^= 1
    folder.delete("accepted/part-00000.parquet")
    if damage == "changed":
        folder.write_bytes(bytes(data), "accepted/part-00000.parquet")
    with pytest.raises(DataError, match=r"accepted/part-00000.parquet is listed with \d+ rows and cannot be used"):
        list(ledger.rows())


def test_a_changed_manifest_is_an_error(folder: Storage) -> None:
    ledger = Ledger(folder, JOB)
    work_off(ledger, 1)
    folder.write_text(folder.read_text("manifest.json").replace('"rows": 10', '"rows": 11'), "manifest.json")
    folder.write_text(folder.read_text("manifest.json").replace('"shard": 0', '"shard": 1'), "manifest.json")
    with pytest.raises(DataError, match=r"manifest.json does not fit its fingerprint"):
        ledger.manifest()


def test_commits_wait_for_the_shards_before(folder: Storage) -> None:
    ledger = Ledger(folder, JOB)
    ledger.plan(requests(3), shard_requests=SHARD_REQUESTS)
    with ledger.committer() as committer:
        for shard, committed in ((1, 0), (0, 2), (2, 1)):
            with ledger.write(shard) as log:
                work(log, random.Random(0), lambda id: None)
            assert ledger.is_complete(shard)
            assert len(committer.commit()) == committed
        with (
            pytest.raises(DataError, match="no lock after"),
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setattr("nexus_ray.synthesis.commit.LOCK_S", 0.0)
            ledger.committer().__enter__()


def test_after_an_error_a_committer_is_closed(folder: Storage) -> None:
    """Its filters may remember rows that the manifest does not have."""

    class Failing(Duplicates):
        def judge(self, row: Row) -> Verdict:
            raise DataError("broken")

    ledger = Ledger(folder, JOB)
    ledger.plan(requests(1), shard_requests=SHARD_REQUESTS)
    with ledger.write(0) as log:
        work(log, random.Random(0), lambda id: None)
    with ledger.committer(Failing()) as committer:
        with pytest.raises(DataError, match="broken"):
            committer.commit()
        with pytest.raises(DataError, match="is closed, after an error"):
            committer.commit()
    with ledger.committer(Duplicates()) as committer:
        assert len(committer.commit()) == 1


def test_half_a_surrogate_pair_is_rejected_not_fatal(folder: Storage) -> None:
    ledger = Ledger(folder, JOB)
    ledger.plan(requests(1, candidates=1))
    with ledger.write(0) as log:
        [(id, request)] = log.pending().items()
        answer = Answer(id, "fine\nhalf \ud83d", "stop", 1, 1, "mo\udc80del")
        log.answered(answer)
        texts = answer.text.split("\n")
        log.judged(id, [(Row(text, id, item, request.prompt), PASS) for item, text in enumerate(texts)])
    with ledger.committer(Duplicates()) as committer:
        committer.commit()
    assert [row.text for row in ledger.rows()] == ["fine"]
    [bad] = ledger.rows("rejected")
    assert (bad.text, bad.reason) == ("half \\ud83d", "encoding: half a surrogate pair")


# --- people ------------------------------------------------------------------------------------------------------


def flagged(folder: Storage) -> tuple[Ledger, list[PartRow]]:
    ledger = Ledger(folder, JOB)
    work_off(ledger, 1)
    with ledger.review() as review:
        rows = list(review.queue())
    assert len(rows) >= 4
    return ledger, rows


def test_decisions_become_parts_of_their_own(folder: Storage) -> None:
    ledger, rows = flagged(folder)
    before = ledger.manifest()
    with ledger.review() as review, ledger.committer(Duplicates()) as committer:
        review.decide(rows[2].id, "accept", who="ann")
        review.decide(rows[0].id, "reject", who="ann")
        review.decide(rows[1].id, "edit", who="bob", text="better")
        review.decide(rows[3].id, "accept", who="ann")
        review.decide(rows[3].id, "undo", who="ann")
        assert [row.id for row in review.queue()] == [row.id for row in rows[3:]]
        entry = committer.fold_decisions()
        assert entry is not None and entry.name == "decided-00000" and committer.fold_decisions() is None
        with pytest.raises(DataError, match="is part of the manifest already and stands"):
            review.decide(rows[0].id, "accept", who="ann")
        review.decide(rows[3].id, "reject", who="ann")
        assert committer.fold_decisions().rejected_by == {"review": 1}
        assert list(review.queue()) == rows[4:]
    manifest = ledger.manifest()
    assert manifest.prefix(len(before.entries)) == before
    edited, accepted = list(ledger.rows())[-2:]
    assert (accepted.id, accepted.text) == (rows[2].id, rows[2].text)
    assert edited.text == "better" and edited.id not in {row.id for row in rows}
    assert edited.provenance["review"] == {"row": rows[1].id, "action": "edit", "who": "bob", "flagged": "taste: odd"}
    stats = ledger.stats()
    assert (stats.flagged, stats.decided) == (len(rows), 4)


def test_when_is_in_the_log_alone(folder: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same decisions at another time, in another order, by several sittings give the same part."""
    ledger, rows = flagged(folder)
    other, _ = flagged(Storage(str(tmp_path / "other")))
    for place, chosen in ((ledger, rows[:3]), (other, rows[2::-1])):
        for row in chosen:
            with place.review() as review:
                review.decide(row.id, "edit", who="ann", text="x" + row.text)
        with place.committer(Duplicates()) as committer:
            committer.fold_decisions()
        lines = (place.folder.local_path / "decisions.jsonl").read_text()
        assert lines.count('"when":"20') == 3
    name = "accepted/decided-00000.parquet"
    assert ledger.folder.read_bytes(name) == other.folder.read_bytes(name)


@pytest.mark.parametrize(
    ("action", "text", "message"),
    [
        ("praise", None, "is none of accept, reject, edit, override, undo"),
        ("edit", " ", "edit and override, and nothing else, bring a text"),
        ("override", None, "edit and override, and nothing else, bring a text"),
        ("accept", "x", "edit and override, and nothing else, bring a text"),
        ("edit", "\ud800", "half a surrogate pair"),
    ],
)
def test_bad_decisions_are_refused(folder: Storage, action: str, text: str | None, message: str) -> None:
    ledger, rows = flagged(folder)
    accepted = next(ledger.rows())
    with ledger.review() as review:
        with pytest.raises(DataError, match=message):
            review.decide(rows[0].id, action, who="ann", text=text)  # type: ignore[arg-type]
        with pytest.raises(DataError, match="is not flagged"):
            review.decide(accepted.id, "accept", who="ann")
        assert list(review.queue()) == rows


# --- figures, lineage, answers of others -------------------------------------------------------------------------


def test_stats_count_everything(folder: Storage) -> None:
    ledger = Ledger(folder, JOB)
    assert ledger.stats().planned == 0
    ledger.plan(requests(4), shard_requests=SHARD_REQUESTS)
    with ledger.write(1) as log:
        log.sent(log.requests)
        id, request = next(iter(log.requests.items()))
        answer = reply(id, request)
        log.answered(answer)
        log.judged(id, judged(answer, request))
    stats = ledger.stats()
    assert (stats.planned, stats.answered, stats.uncommitted, stats.traffic.sent) == (8, 1, 10, 2)
    work_off(ledger, 4)
    decide_all(ledger)
    with ledger.committer(Duplicates()) as committer:
        committer.fold_decisions()
    stats = ledger.stats()
    assert (stats.planned, stats.answered, stats.failed, stats.uncommitted) == (8, 6, 2, 0)
    assert (stats.prompt_tokens, stats.completion_tokens) == (42, 600), "those of rejected rows too"
    assert stats.accepted + stats.rejected == 60 and stats.decided == stats.flagged > 0
    assert stats.rejected_by.keys() == {"parity", "duplicate", "review"} and sum(stats.rejected_by.values()) == (
        stats.rejected
    )
    assert stats.traffic.resent == 1 and stats.traffic.failed_by == {"http 400": 1, "timeout": 1}
    written = json.loads(folder.read_text("stats.json"))
    assert written.pop("shards") == 4 and written == json.loads(json.dumps(stats.to_json()))
    folder.delete("stats.json")
    assert ledger.stats() == stats, "the logs tell it again"


def test_lineage_leads_back_to_the_prompt_and_on_to_parents(folder: Storage) -> None:
    ledger = Ledger(folder, JOB)
    run_job(folder, 0, lambda id: None)
    edited = next(row for row in ledger.rows() if row.provenance.get("review", {}).get("action") == "edit")
    lineage = ledger.lineage(edited.id)
    assert (lineage.kind, lineage.row) == ("accepted", edited) and lineage.file.startswith("accepted/decided-")
    assert lineage.flagged is not None and lineage.flagged.text + "!" == edited.text
    assert lineage.decision is not None and lineage.decision.text == edited.text
    assert lineage.request in requests(4) and lineage.flagged.text in lineage.answer.text.split("\n")

    child = Request(Prompt("Go on.", parents=("elsewhere", edited.id)), Sampling(), 0)
    ledger.plan([*requests(4), child], shard_requests=SHARD_REQUESTS)
    with ledger.write(4) as log:
        [id] = log.pending()
        log.answered(Answer(id, "And so on.", "stop", 1, 1))
        log.judged(id, [(Row("And so on.", id, 0, child.prompt), PASS)])
    with ledger.committer(Duplicates()) as committer:
        [entry] = committer.commit()
    row = list(ledger.rows())[-1]
    found = ledger.lineage(row.id)
    assert found.request == child and found.parents == (lineage,) and entry.accepted.rows == 1
    with pytest.raises(DataError, match="is in no part of"):
        ledger.lineage("0" * 32)


def test_another_filter_borrows_every_answer(folder: Storage) -> None:
    first = Ledger(folder, JOB)
    work_off(first, 4)
    again = Ledger(folder.child("again"), replace(JOB, filters={"parity": 8}))
    again.plan(requests(6), shard_requests=3)
    assert again.borrow(Ledger.load(folder)) == 6 and again.borrow(first) == 0
    asked = work_off(again, 6)
    assert asked.keys().isdisjoint({row.provenance["request"] for row in first.rows("rejected")})
    assert len(asked) == 6, "two new prompts, and the two requests that failed"
    stats = again.stats()
    assert (stats.answered, stats.traffic.borrowed) == (10, 6)
    assert (stats.completion_tokens, stats.traffic.borrowed_completion_tokens) == (1000, 600)
    same = [row.id for row in first.rows()]
    assert [row.id for row in again.rows()][: len(same)] == same


def test_another_revision_borrows_nothing(folder: Storage) -> None:
    """An updated student must not replay its old answers."""
    work_off(Ledger(folder, JOB), 4)
    updated = Ledger(folder.child("again"), replace(JOB, revision="teacher-2"))
    updated.plan(requests(4))
    assert updated.borrow(Ledger.load(folder)) == 0
    assert updated.borrow(Ledger(folder.child("nothing"), JOB)) == 0
