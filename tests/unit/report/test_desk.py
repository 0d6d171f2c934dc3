"""`nexus-ray review`: a ledger's flagged rows on the page, worked over HTTP, and the ledger afterwards."""

from __future__ import annotations

import random
import re
import threading
from pathlib import Path
from types import SimpleNamespace

from nexus_ray.report.desk import review_ledger
from nexus_ray.storage import Storage
from nexus_ray.synthesis.ledger import Ledger
from tests.ledger_job import JOB, Duplicates, requests, work
from tests.unit.report.test_review import Desk


def flagged(folder: Path) -> Ledger:
    """A committed ledger some of whose rows wait for a person."""
    ledger = Ledger(Storage(str(folder)), JOB)
    ledger.plan(requests(4), shard_requests=2)
    with ledger.committer(Duplicates()) as committer:
        for shard in list(ledger.open_shards()):
            with ledger.write(shard) as log:
                work(log, random.Random(0), lambda id: None)
        committer.commit()
    return ledger


def test_decisions_made_on_the_page_are_in_the_ledger(tmp_path: Path) -> None:
    ledger = flagged(tmp_path)
    with ledger.review() as review:
        waiting = list(review.queue())
    assert len(waiting) > 3
    said: list[str] = []
    done = threading.Event()
    settings = {"who": "ann", "say": said.append, "until": done.is_set}
    served = threading.Thread(target=review_ledger, args=(str(tmp_path),), kwargs=settings, daemon=True)
    served.start()
    while not said:
        done.wait(0.05)
    found = re.search(r"open (http://127.0.0.1:(\d+)/\S+)", said[0])
    assert found is not None
    desk = Desk(SimpleNamespace(url=found[1], port=int(found[2])), [])  # type: ignore[arg-type]
    shown = desk.row(0)
    assert shown["text"] == waiting[0].text and shown["prompt"] and shown["reason"] == waiting[0].reason
    desk.decide(0, "accept", id=waiting[0].id)
    desk.decide(1, "reject", id=waiting[1].id)
    desk.decide(2, "edit", "A better line.", id=waiting[2].id)
    done.set()
    served.join(20)
    assert said[-2] == f"3 of {len(waiting)} rows decided by ann"
    assert said[-1].startswith("1 new texts wait for the filters; `nexus-ray synthesize` judges them")
    assert "A better line." not in [row.text for row in ledger.rows("accepted")]
    with ledger.committer(Duplicates()) as committer:
        committer.fold_decisions()
    texts = [row.text for row in ledger.rows("accepted")]
    assert waiting[0].text in texts and "A better line." in texts
    assert waiting[1].id in {row.id for row in ledger.rows("rejected")}
    edited = next(row for row in ledger.rows("accepted") if row.text == "A better line.")
    assert edited.provenance["review"]["who"] == "ann" and edited.provenance["review"]["row"] == waiting[2].id
    with ledger.review() as review:
        assert len(list(review.queue())) == len(waiting) - 3


def test_an_empty_queue_says_so(tmp_path: Path) -> None:
    ledger = Ledger(Storage(str(tmp_path)), JOB)
    ledger.plan(requests(1), shard_requests=2)
    said: list[str] = []
    assert review_ledger(str(tmp_path), who="ann", say=said.append) == 0 and "no row" in said[0]
