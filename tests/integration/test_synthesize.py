"""A whole synthesis job on Ray against a real loopback teacher: the funnel, going on, budgets, faults, lineage."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nexus_ray.errors import ConfigError, SynthesisError
from nexus_ray.report.lineage import row_lineage, stage_documents
from nexus_ray.report.page import render_report
from nexus_ray.report.record import load_run
from nexus_ray.roadmap import run_roadmap
from nexus_ray.session import job_demand, ray_session
from nexus_ray.synthesis.job import UNANSWERED, JobOutcome, synthesize
from tests.fault_server import FaultServer, Rule
from tests.jobs import job_config

pytestmark = pytest.mark.ray
ITEMS = 10


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("synthesize")
    config = job_config(folder, "http://127.0.0.1:1", workers=2)
    with ray_session(config, [job_demand(config.synthesis["sentences"])]):
        yield folder


def run(place: Path, server: FaultServer, **settings: Any) -> JobOutcome:
    return synthesize(job_config(place, server.url, **settings), "sentences")


def accepted(outcome: JobOutcome) -> list[str]:
    return [row.text for row in outcome.ledger.rows()]


def test_the_funnel_adds_up_and_a_longer_job_goes_on_where_the_first_ended(place: Path) -> None:
    with FaultServer(items=ITEMS) as server:
        first = run(place, server, name="grow", prompts=4, workers=2)
        stats = first.stats
        assert (stats.planned, stats.answered, stats.failed) == (8, 8, 0)
        assert stats.accepted + stats.rejected == 8 * ITEMS and stats.rejected_by["length"] > 0
        again = run(place, server, name="grow", prompts=4, workers=2)
        assert again.stats == stats and len(server.calls) == 8
        longer = run(place, server, name="grow", prompts=12)
        assert longer.stats.answered == 24 and len(server.calls) == 24
        assert accepted(longer)[: len(accepted(first))] == accepted(first)
        assert max(server.answered().values()) == 1
    assert longer.cost is not None and longer.cost["requests"] == pytest.approx(24 / longer.stats.accepted)


def test_workers_change_nothing(place: Path) -> None:
    with FaultServer(items=ITEMS, delay_s=0.01) as server:
        one = run(place, server, name="one", prompts=10, workers=1)
    with FaultServer(Rule("500", share=0.3, times=1), Rule("truncate", share=0.2, times=2), items=ITEMS) as server:
        server.port, port = server.port, server.port
        two = synthesize(job_config(place, f"http://127.0.0.1:{port}", name="two", prompts=10, workers=2), "sentences")
    assert accepted(one) == accepted(two)


def test_a_budget_stops_cleanly_and_a_raised_one_goes_on(place: Path) -> None:
    with FaultServer(items=ITEMS) as server:
        cut = run(place, server, name="budget", prompts=20, budget={"max_requests": 11})
        assert "max_requests=11" in cut.stopped and len(server.calls) == 11 and cut.stats.answered == 11
        again = run(place, server, name="budget", prompts=20, budget={"max_requests": 11})
        assert len(server.calls) == 11 and "max_requests=11" in again.stopped
        whole = run(place, server, name="budget", prompts=20, budget={"max_requests": 40})
        assert whole.stopped == "" and whole.stats.answered == 40 and len(server.calls) == 40
        assert max(server.answered().values()) == 1


def test_one_bad_request_never_ends_a_job_and_a_dead_teacher_does(place: Path) -> None:
    with FaultServer(Rule("400", first=9, last=10), items=ITEMS) as server:  # the first calls tell of the address
        outcome = run(place, server, name="bad", prompts=10)
        assert (outcome.stats.answered, outcome.stats.failed) == (19, 1) and outcome.stopped == ""
        assert list(outcome.stats.traffic.failed_by.values()) == [1]
    with FaultServer(Rule("400", first=2), items=ITEMS) as server:
        with pytest.raises(SynthesisError, match="400"):
            run(place, server, name="dead", prompts=200)
        assert len(server.calls) < 400
        server.rules.clear()
        revived = run(place, server, name="dead", prompts=200)
        assert revived.stats.answered + revived.stats.failed == 400 and revived.stats.failed < 200


def test_requests_without_an_answer_are_said_to_hold_back_rows(place: Path) -> None:
    with FaultServer(Rule("500"), items=ITEMS) as server:
        waits = run(place, server, name="waits", prompts=2)
        assert "the same command asks them again" in waits.stopped and waits.stats.failed == 0
        server.rules.clear()
        whole = run(place, server, name="waits", prompts=2)
        assert whole.stopped == "" and whole.stats.answered == 4


def test_target_ends_a_job_and_a_higher_one_goes_on(place: Path) -> None:
    with FaultServer(items=ITEMS, delay_s=0.5) as server:
        some = run(place, server, name="target", prompts=400, target=30)
        rows = accepted(some)
        assert some.stopped == "target" and 30 <= len(rows) < 400
        asked = len(server.calls)
        assert asked < 400
        more = run(place, server, name="target", prompts=400, target=len(rows) + 30)
        assert accepted(more)[: len(rows)] == rows and len(rows) + 30 <= len(accepted(more))
        assert more.stats.traffic.sent == len(server.calls) and more.stats.traffic.resent == 0


SLOW_CALLS = [
    (1, 3, False),
    pytest.param(0, 1, False, marks=pytest.mark.slow),
    pytest.param(0, 3, True, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("retries", "attempts", "dies"), SLOW_CALLS)
def test_a_slow_call_of_the_first_shard_has_little_more_asked_than_the_target_takes(
    place: Path, retries: int, attempts: int, dies: bool
) -> None:
    """Rows behind it wait for their turn, and count. Where the teacher dies meanwhile, the job says so and ends."""
    ends = UNANSWERED if dies else "target"
    with FaultServer(Rule("hang", first=1, last=2), items=ITEMS, delay_s=0.5 if dies else 0.05) as server:
        server.rules += [Rule("500", first=13)] if dies else []
        generator = {
            "kind": "openai", "model": "m", "base_url": f"{server.url}/v1", "retry_delay_s": 0.01, "timeout_s": 8.0,
            "max_retries": retries, "max_error_share": 1.0, "throttle": {"max_in_flight": 4},
        }  # fmt: skip
        settings = {"generator": generator, "prompts": 400, "target": 60, "attempts": attempts}
        some = run(place, server, name=f"slow-{retries}-{attempts}", **settings)
        assert 6 <= len(server.calls) < 200 and some.stats.planned == 800
        assert (some.stopped, some.stats.failed) == (ends, int(attempts == 1))
        assert not some.ledger.folder.exists("control", "hold")
        server.rules.clear()
        again = run(place, server, name=f"slow-{retries}-{attempts}", **settings)
        assert again.stopped == ("target" if dies else "") and 60 <= again.stats.accepted < 120


def test_another_filter_is_another_job_and_takes_answers_over(place: Path) -> None:
    with FaultServer(items=ITEMS) as server:
        url = server.url
        old = synthesize(job_config(place, url, name="old", prompts=6), "sentences")
        longer = {"length": {"min_words": 12}, "language": None, "repetition": None}
        with pytest.raises(ConfigError, match="other settings: filters"):
            synthesize(job_config(place, url, name="old", prompts=6, filters=longer), "sentences")
        borrow = [str(old.ledger.folder.uri)]
        new = synthesize(job_config(place, url, name="new", prompts=6, filters=longer, borrow=borrow), "sentences")
        assert len(server.calls) == 12 and new.stats.traffic.borrowed == 12 and new.stats.accepted < old.stats.accepted


def test_a_run_trains_on_the_prefix_it_began_with_and_knows_what_it_read(place: Path) -> None:
    with FaultServer(items=ITEMS) as server:
        config = job_config(place, server.url, name="train", prompts=12)
        outcome = synthesize(config, "sentences")
        trained = run_roadmap(config)
        more = synthesize(job_config(place, server.url, name="train", prompts=30), "sentences")
        assert more.stats.accepted > outcome.stats.accepted
        assert run_roadmap(config).scores == trained.scores
    page = render_report(load_run(trained.folder))
    assert "What was written for this run" in page and f'<td class="n">{more.stats.accepted}</td>' in page
    documents = list(stage_documents(trained.folder, "sentences"))
    assert documents and all(line["provenance"]["source"] == "synthesis" for line in documents)
    row = row_lineage(trained.folder, documents[0]["provenance"]["row"])
    assert row["text"] in row["answer"] and row["parameters"]["thing"].startswith("thing")
    assert row["prompt"][0]["content"].startswith("Write 10 sentences about thing")
    assert row["generator"].startswith("openai:m:") and row["outcome"] == "accepted"
    held_out_and_train = outcome.stats.accepted
    assert len(documents) <= held_out_and_train
    assert "secret" not in json.dumps(documents)
