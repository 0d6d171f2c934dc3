"""What a worker does with shards, over a real loopback teacher: one stream of calls, and nothing is paid twice."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nexus_ray.config.generators import BudgetConfig, OpenAIGenerator, ThrottleConfig
from nexus_ray.errors import DataError, SynthesisError
from nexus_ray.synthesis.budget import Budget, BudgetExhausted
from nexus_ray.synthesis.generators.gate import LocalGate
from nexus_ray.synthesis.generators.protocol import Line
from nexus_ray.synthesis.generators.remote import RemoteTeacher, remote_teacher
from nexus_ray.synthesis.generators.server_process import free_port
from nexus_ray.synthesis.ledger import Ledger
from nexus_ray.synthesis.rows import Answer, Request, Row, Verdict
from nexus_ray.synthesis.setup import AnswerJudge, JobSpec, PlanOrder, open_job
from nexus_ray.synthesis.shard_log import ShardLog, read_state
from nexus_ray.synthesis.throttle import Throttle
from nexus_ray.synthesis.validators.calibration import calibrations
from nexus_ray.synthesis.validators.judge import RefusedQuestionError
from nexus_ray.synthesis.worker import Asker, work_shards
from tests.fault_server import FaultServer, Rule
from tests.jobs import job_config
from tests.unit.synthesis.validators.test_judge import RUBRICS, perfect

STORIES = {"rubric": str(RUBRICS / "stories.yaml"), "golden": str(RUBRICS / "stories.jsonl")}


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer(items=10) as found:
        yield found


def teacher(server: FaultServer, *, in_flight: int = 64, gate: LocalGate | None = None, **more: Any) -> RemoteTeacher:
    section = {"kind": "openai", "model": "m", "base_url": f"{server.url}/v1", "retry_delay_s": 0.01, **more}
    throttle = {"max_in_flight": in_flight}
    return remote_teacher(OpenAIGenerator.model_validate({**section, "throttle": throttle}), gate=gate)


def planned(tmp_path: Path, server: FaultServer, **settings: Any) -> tuple[JobSpec, Ledger]:
    """A job and its ledger, with two requests a prompt."""
    spec = open_job(job_config(tmp_path, server.url, **settings), "sentences", {})
    ledger = Ledger(spec.ledger, spec.job)
    ledger.plan(spec.requests(), shard_requests=spec.config.shard_requests)
    return spec, ledger


def work(ledger: Ledger, generator: RemoteTeacher, judge: AnswerJudge, **settings: Any) -> list[int]:
    """All open shards; the numbers of those whose log was closed, in that order."""
    shards, ended = iter(ledger.open_shards()), []

    def open_next() -> ShardLog | None:
        return next(map(ledger.write, shards), None)

    with Line(generator) as line:
        work_shards(open_next, line, judge, ended=ended.append, **settings)
    return ended


def sent(ledger: Ledger) -> int:
    return ledger.stats().traffic.sent


class Broken(AnswerJudge):
    """Fails from its `after`-th answer on."""

    def __init__(self, spec: JobSpec, *, after: int = 0) -> None:
        super().__init__(spec)
        self.after = after
        self.judged = 0

    def rows(self, request: Request, answer: Answer) -> list[tuple[Row, Verdict]]:
        self.judged += 1
        if self.judged > self.after:
            raise RuntimeError("broken filter")
        return super().rows(request, answer)


# --- one shard ----------------------------------------------------------------------------------------------------


def test_a_worker_judges_beside_the_calls_and_a_stop_leaves_the_rest(tmp_path: Path, server: FaultServer) -> None:
    spec, ledger = planned(tmp_path, server, prompts=6, shard_requests=12)
    few = teacher(server, in_flight=2)
    assert work(ledger, few, AnswerJudge(spec), threads=3, stop=lambda: len(server.calls) >= 5) == [0]
    state = read_state(ledger.folder, 0)
    assert 5 <= state.sent < 12 and len(state.answers) == len(state.rows) == state.sent == len(server.calls)
    assert work(ledger, few, AnswerJudge(spec), threads=3) == [0]
    assert ledger.is_complete(0) and len(server.calls) == sent(ledger) == 12
    with ledger.committer(PlanOrder(spec)) as committer:
        assert len(committer.commit()) == 1
    assert ledger.stats().accepted > 60


def test_an_outage_of_the_judge_leaves_answers_to_be_judged_later(tmp_path: Path, server: FaultServer) -> None:
    judge = {"kind": "openai", "model": "j", "base_url": f"{server.url}/v1"}
    validators = [{"kind": "judge", **STORIES}]
    spec, ledger = planned(tmp_path, server, prompts=2, shard_requests=4, judge=judge, validators=validators)
    assert AnswerJudge(spec, perfect) is not None and len(calibrations(spec.ledger)) == 1

    def outage(prompt: str) -> str:
        raise SynthesisError("the judging model gave no reply")

    with pytest.raises(SynthesisError, match="gave no reply"):
        work(ledger, teacher(server), AnswerJudge(spec, outage))
    state = read_state(ledger.folder, 0)
    assert len(state.answers) == state.sent and not state.rows, "no verdict was written"
    work(ledger, teacher(server), AnswerJudge(spec, lambda prompt: "Fine.\nVERDICT: YES"))
    assert ledger.is_complete(0)
    with ledger.committer(PlanOrder(spec)) as committer:
        committer.commit()
    assert ledger.stats().accepted > 20 and ledger.stats().flagged == 0


class AlwaysTheFirst(Rule):
    """Hits the request that arrives first, however often it comes."""

    def hits(self, ordinal: int, key: str, attempt: int) -> bool:
        return bool(self.body.setdefault("key", key) == key)


# --- requests that fail -------------------------------------------------------------------------------------------


def test_a_request_that_never_works_holds_back_no_row(tmp_path: Path, server: FaultServer) -> None:
    """It is asked again in the same session, behind the others, until it is given up: its shard can be committed."""
    spec, ledger = planned(tmp_path, server, prompts=40, shard_requests=8)
    server.rules = [AlwaysTheFirst("500", body={})]
    work(ledger, teacher(server, in_flight=8, max_retries=0), AnswerJudge(spec))
    broken = {call.key for call in server.calls if call.outcome == "500"}
    assert len(broken) == 1
    with ledger.committer(PlanOrder(spec)) as committer:
        assert len(committer.commit()) == 10, "all shards"
    stats = ledger.stats()
    assert (stats.answered, stats.failed, stats.traffic.resent) == (79, 1, 0)
    assert len(server.calls) == stats.traffic.sent == 79 + 3


def test_many_requests_that_never_work_are_given_up_in_one_session(tmp_path: Path, server: FaultServer) -> None:
    """One in ten: as they come back behind the others they make up most of the last calls, and end no session."""
    spec, ledger = planned(tmp_path, server, prompts=200, shard_requests=100)
    server.rules = [Rule("empty", share=0.1)]
    work(ledger, teacher(server, in_flight=16, max_retries=0), AnswerJudge(spec), threads=2)
    broken = {call.key for call in server.calls if call.outcome == "empty"}
    assert len(broken) > 20 and all(ledger.is_complete(shard) for shard in ledger.open_shards())
    assert (ledger.stats().answered, ledger.stats().failed) == (400 - len(broken), len(broken))


def test_a_session_of_nothing_but_such_requests_counts_against_them(tmp_path: Path, server: FaultServer) -> None:
    """Their share ends it, but the teacher answers: so it is them, and not an outage."""
    spec, ledger = planned(tmp_path, server, prompts=20, shard_requests=40)
    server.rules = [Rule("500", only="sentences about")]
    for _ in range(4):
        with contextlib.suppress(SynthesisError):
            work(ledger, teacher(server, in_flight=4, max_retries=0), AnswerJudge(spec))
    assert ledger.stats().failed >= 20 and ledger.stats().answered == 0


@pytest.mark.parametrize("sessions", [1, 4])
def test_an_outage_costs_no_request_its_attempts(tmp_path: Path, server: FaultServer, sessions: int) -> None:
    spec, ledger = planned(tmp_path, server, prompts=20, shard_requests=10)
    server.rules = [Rule("500")]
    for _ in range(sessions):
        with pytest.raises(SynthesisError, match="20 of the last 20 requests failed"):
            work(ledger, teacher(server, in_flight=8, max_retries=0), AnswerJudge(spec))
    server.rules = []
    work(ledger, teacher(server), AnswerJudge(spec))
    assert (ledger.stats().answered, ledger.stats().failed) == (40, 0)


def test_calls_that_never_left_count_for_nothing(tmp_path: Path) -> None:
    """Too few for the share of errors to end the session, which ends by itself."""
    server = FaultServer(items=10)
    server.port = free_port()  # where nobody listens yet
    spec, ledger = planned(tmp_path, server, prompts=3, shard_requests=6)
    for _ in range(4):
        work(ledger, teacher(server, max_retries=0), AnswerJudge(spec))
        assert not ledger.is_complete(0)
    with server:
        work(ledger, teacher(server), AnswerJudge(spec))
    assert (ledger.stats().answered, ledger.stats().failed) == (6, 0)


def test_a_question_without_reply_is_told_from_a_judge_without_replies(server: FaultServer) -> None:
    asker = Asker(teacher(server, max_retries=1), alone=False)
    server.rules = [Rule("not_json", share=0.3)]
    silent = 0
    for number in range(20):
        try:
            assert asker(f"Is {number} even?")
        except RefusedQuestionError as error:
            silent += 1
            assert "answers others, but not the question: the reply is no JSON" in str(error)
    assert 2 <= silent <= 10
    server.rules = [Rule("empty")]
    with pytest.raises(SynthesisError, match="gave no reply") as caught:
        asker("Is 2 even?")
    assert not isinstance(caught.value, RefusedQuestionError)
    asker.close()


# --- errors -------------------------------------------------------------------------------------------------------


def test_an_error_of_a_validator_awaits_and_keeps_what_is_in_flight(tmp_path: Path, server: FaultServer) -> None:
    spec, ledger = planned(tmp_path, server, prompts=30, shard_requests=10)
    server.delay_s = 0.05
    broken = Broken(spec, after=7)
    with pytest.raises(RuntimeError, match="broken filter"):
        work(ledger, teacher(server, in_flight=16), broken)
    stats = ledger.stats()
    assert stats.answered == stats.traffic.sent == len(server.calls) < 60
    assert broken.judged == 8, "no answer is judged after the error"
    work(ledger, teacher(server, in_flight=16), AnswerJudge(spec), threads=2)
    assert len(server.calls) == 60 and ledger.stats().traffic.resent == 0
    assert all(ledger.is_complete(shard) for shard in ledger.open_shards())


def test_a_judge_out_of_budget_makes_nothing_be_asked_twice(tmp_path: Path, server: FaultServer) -> None:
    """Teacher and judging model share the cap; the judging model meets it first."""
    judge = {"kind": "openai", "model": "j", "base_url": f"{server.url}/v1"}
    validators = [{"kind": "judge", **STORIES}]
    spec, ledger = planned(tmp_path, server, prompts=30, shard_requests=10, judge=judge, validators=validators)
    AnswerJudge(spec, perfect)
    server.delay_s = 0.02
    budget = Budget(BudgetConfig(max_requests=60), models={"m"}, clock=time.monotonic, saved=None)
    gates = [LocalGate(Throttle(ThrottleConfig(), clock=time.monotonic), model="m", budget=budget) for _ in range(2)]
    asker = Asker(teacher(server, gate=gates[0]), alone=False)
    with pytest.raises(BudgetExhausted, match="max_requests=60"):
        work(ledger, teacher(server, in_flight=16, gate=gates[1]), AnswerJudge(spec, asker), threads=4)
    stats = ledger.stats()
    assert 0 < stats.answered == stats.traffic.sent < 60
    work(ledger, teacher(server, in_flight=16), AnswerJudge(spec, lambda prompt: "Fine.\nVERDICT: YES"), threads=4)
    assert sent(ledger) == 60 and ledger.stats().traffic.resent == 0
    asker.close()


def test_a_shard_that_cannot_be_opened_ends_the_work_and_not_the_calls(tmp_path: Path, server: FaultServer) -> None:
    spec, ledger = planned(tmp_path, server, prompts=4, shard_requests=4)
    server.delay_s = 0.05
    ledger.folder.write_text("no line of a log\n", "log", "00001.jsonl")
    with pytest.raises(DataError, match=r"00001.jsonl, line 1, is damaged"):
        work(ledger, teacher(server, in_flight=8), AnswerJudge(spec))
    assert len(read_state(ledger.folder, 0).answers) == len(server.calls) == 4
    with ledger.write(0) as log:
        assert len(log.unjudged()) + len(log.state.rows) == 4, "its lock is free"


# --- several shards -----------------------------------------------------------------------------------------------


def test_one_stream_of_calls_runs_through_all_shards(tmp_path: Path, server: FaultServer) -> None:
    spec, ledger = planned(tmp_path, server, prompts=16, shard_requests=4)
    server.delay_s = 0.05
    assert sorted(work(ledger, teacher(server, in_flight=8), AnswerJudge(spec), threads=2)) == list(range(8))
    assert len(server.calls) == 32 and all(ledger.is_complete(shard) for shard in ledger.open_shards())
    assert max(call.in_flight for call in server.calls) == 8, "twice a shard's"


def test_a_shard_is_closed_when_it_ends_and_the_next_is_opened_when_it_is_needed(
    tmp_path: Path, server: FaultServer
) -> None:
    """One call of the first shard hangs: the others go on, and end before it."""
    spec, ledger = planned(tmp_path, server, prompts=40, shard_requests=4)
    hanging = threading.Event()
    opened: list[int] = []
    ended: list[int] = []
    most = [0]

    class Slow(AnswerJudge):
        def rows(self, request: Request, answer: Answer) -> list[tuple[Row, Verdict]]:
            if answer.request_id == next(iter(ledger.requests(0))):
                hanging.wait(20)
            return super().rows(request, answer)

    def open_next() -> ShardLog | None:
        if len(opened) == 20:
            return None
        opened.append(len(opened))
        most[0] = max(most[0], len(opened) - len(ended))
        return ledger.write(opened[-1])

    def on_end(shard: int) -> None:
        ended.append(shard)
        if len(ended) == 19:
            hanging.set()

    with Line(teacher(server, in_flight=4)) as line:
        work_shards(open_next, line, Slow(spec), threads=4, ended=on_end)
    assert sorted(ended) == opened == list(range(20)) and ended[-1] == 0
    assert most[0] < 10


def test_shards_that_come_later_join_the_stream(tmp_path: Path) -> None:
    turns = itertools.count()

    class Staggered(FaultServer):
        """The first shard's answers come one after another, so that three are in flight when the first is there."""

        async def _reply(self, *args: Any) -> Any:
            await asyncio.sleep(0.3 * min(next(turns), 4))
            return await super()._reply(*args)

    with Staggered() as server:
        spec, ledger = planned(tmp_path, server, prompts=8, shard_requests=4)
        asked, shards = itertools.count(), iter(ledger.open_shards())

        def open_next() -> ShardLog | None:
            return ledger.write(shard) if next(asked) != 1 and (shard := next(shards, None)) is not None else None

        with Line(teacher(server, in_flight=8)) as line:
            work_shards(open_next, line, AnswerJudge(spec))
        assert not ledger.open_shards() or all(map(ledger.is_complete, ledger.open_shards()))
        assert len(server.calls) == 16 and max(call.in_flight for call in server.calls) > 4


def test_a_line_keeps_its_connections_and_gives_them_back(tmp_path: Path, server: FaultServer) -> None:
    spec, _ = planned(tmp_path, server, prompts=4)
    asked = list(spec.requests())
    opened: list[Any] = []

    class Counted(RemoteTeacher):
        def _endpoint(self) -> Any:
            found = super()._endpoint()
            opened.append(found)
            return found

    plain = teacher(server)
    counted = Counted(plain._config, plain._connect, gate=plain._gate, holder="")
    with Line(counted) as line:
        assert sum(1 for _ in line.generate(asked[:4])) == 4
        abandoned = line.generate(asked[4:])
        next(abandoned)
        abandoned.close()  # type: ignore[attr-defined]
        assert sum(1 for _ in line.generate(asked)) == len(asked)
    assert len(opened) == 3 and len(set(map(id, opened))) == 1 and counted._open is None


def test_what_goes_wrong_in_a_line_is_raised_and_the_line_goes_on(tmp_path: Path, server: FaultServer) -> None:
    spec, _ = planned(tmp_path, server, prompts=2)

    def requests() -> Iterable[Request]:
        yield next(spec.requests())
        raise ValueError("no more prompts")

    server.rules = [Rule("500", times=1)]
    with Line(teacher(server)) as line:
        with pytest.raises(ValueError, match="no more prompts"):
            list(line.generate(requests()))
        assert len(list(line.generate(spec.requests()))) == 4
