"""Teachers on the network, through the official clients, against a real server that misbehaves to a script."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from nexus_ray.config.generators import AnthropicGenerator, BudgetConfig, OpenAIGenerator, RemoteGenerator
from nexus_ray.errors import ConfigError, SynthesisError
from nexus_ray.synthesis.budget import Budget, BudgetExhausted
from nexus_ray.synthesis.generators.gate import LocalGate, Permit, Settled, Tokens
from nexus_ray.synthesis.generators.health import REFUSALS
from nexus_ray.synthesis.generators.protocol import generate
from nexus_ray.synthesis.generators.remote import RemoteTeacher, remote_teacher
from nexus_ray.synthesis.rows import Answer, Failure, Message, Prompt, Request, Sampling
from nexus_ray.synthesis.throttle import Throttle
from tests.fault_server import FaultServer, Rule, text_for

KINDS = ("openai", "anthropic")
SECRET = "sk-planted-7Hq2Zx9vBn4Lw8Ty"
FAST = {"retry_delay_s": 0.01, "throttle": {"max_in_flight": 16, "cooldown_s": 0.02}}


def section(server: FaultServer, kind: str = "openai", **settings: Any) -> RemoteGenerator:
    data = {"kind": kind, "model": "teacher", "api_key_env": None, **FAST, **settings}
    if kind == "anthropic":
        return AnthropicGenerator(base_url=server.url, **data)
    return OpenAIGenerator(base_url=f"{server.url}/v1", **data)


def requests(count: int, indices: int = 1, **prompt: Any) -> list[Request]:
    sampling = Sampling(max_tokens=20)
    return [Request(Prompt(f"prompt {i}", **prompt), sampling, k) for i in range(count) for k in range(indices)]


def split(found: Iterable[Answer | Failure]) -> tuple[dict[str, Answer], dict[str, Failure]]:
    """Answers and failures by request; each request comes once."""
    answers: dict[str, Answer] = {}
    failures: dict[str, Failure] = {}
    for item in found:
        assert item.request_id not in answers and item.request_id not in failures
        if isinstance(item, Answer):
            answers[item.request_id] = item
        else:
            failures[item.request_id] = item
    return answers, failures


def check_complete(server: FaultServer, teacher: RemoteTeacher, asked: list[Request], found: list[Any]) -> None:
    """Every request has its one answer, the one that is its own, and no whole answer was given twice."""
    answers, failures = split(found)
    assert not failures and set(answers) == {request.id(teacher.revision) for request in asked}
    assert len({answer.text for answer in answers.values()}) == len(asked)
    assert set(server.answered().values()) == {1} and len(server.answered()) == len(asked)
    assert teacher.stats.sent == len(server.calls) == len(asked) + sum(teacher.stats.retries.values())


# --- what is sent and read --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_answers(kind: str) -> None:
    asked = requests(6, indices=3)
    with FaultServer() as server:
        teacher = remote_teacher(section(server, kind))
        found = list(generate(teacher, asked))
        check_complete(server, teacher, asked, found)
        first = next(call for call in server.calls if "prompt 0" in str(call.body) and call.index == "1")
        answer = next(item for item in found if item.request_id == asked[1].id(teacher.revision))
    assert answer.text == text_for(first.body, "1") and answer.finish_reason == "stop" and answer.model == "teacher"
    assert answer.prompt_tokens > 0 and answer.completion_tokens > 0
    assert not any(name.lower() in ("authorization", "x-api-key") for name in first.headers), "no key, none is sent"


def test_openai_payloads() -> None:
    talk = Prompt((Message("system", "be brief"), Message("user", "hello")))
    asked = [Request(talk, Sampling(9, 0.7, 0.9, ("END",)), 0)]
    with FaultServer() as server:
        plain = section(server, max_tokens_field="max_completion_tokens", omit=["top_p"], send_seed=True)
        assert split(generate(remote_teacher(plain), asked))[0]
        continued = section(server, api="completion")
        assert split(generate(remote_teacher(continued), requests(1)))[0]
        _, failed = split(generate(remote_teacher(continued), asked))
    chat, completion = (call.body for call in server.calls)
    assert chat.pop("seed") >= 0
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    assert chat == {
        "model": "teacher",
        "messages": turns,
        "max_completion_tokens": 9,
        "temperature": 0.7,
        "stop": ["END"],
    }
    assert completion["prompt"] == "prompt 0" and completion["max_tokens"] == 20
    assert [failure.retriable for failure in failed.values()] == [False]


def test_anthropic_payloads() -> None:
    talk = Prompt((Message("system", "be brief"), Message("user", "hello")))
    asked = [Request(talk, Sampling(9, 0.7, 0.9, ("END",)), 0)]
    with FaultServer() as server:
        assert split(generate(remote_teacher(section(server, "anthropic")), asked))[0]
        assert split(generate(remote_teacher(section(server, "anthropic", api_version="2023-06-01")), asked))[0]
    new, old = server.calls
    expected = {
        "model": "teacher",
        "max_tokens": 9,
        "system": "be brief",
        "messages": [{"role": "user", "content": "hello"}],
        "stop_sequences": ["END"],
    }
    assert new.body == expected and new.headers["anthropic-version"] == "2026-10-21"
    assert old.body == expected | {"temperature": 0.7} and old.headers["anthropic-version"] == "2023-06-01"


def test_a_revision_is_what_decides_the_answers() -> None:
    with FaultServer() as server:
        one = section(server)
        others = [section(server, revision="2026-11"), section(server, omit=["top_p"]), section(server, "anthropic")]
        same = section(server, timeout_s=3.0, max_retries=1)
        revisions = [remote_teacher(config).revision for config in [one, *others, same]]
    assert len(set(revisions)) == 4 and revisions[0] == revisions[-1]


def test_results_come_as_they_arrive_inside_a_running_loop() -> None:
    """The synchronous wrapper works in a notebook, and closing it early leaves nothing behind."""

    async def notebook(teacher: RemoteTeacher) -> list[Answer | Failure]:
        found = generate(teacher, requests(50))
        kept = [next(found) for _ in range(3)]
        found.close()
        return kept

    with FaultServer(delay_s=0.02) as server:
        assert len(asyncio.run(notebook(remote_teacher(section(server))))) == 3


# --- faults -----------------------------------------------------------------------------------------------------

BROKEN = ("500", "502", "408", "409", "truncate", "close", "html", "not_json", "empty", "two", "none", "surrogate")


@pytest.mark.parametrize("kind", KINDS)
def test_every_retriable_fault_is_mended(kind: str) -> None:
    """A third of the requests meet each fault on their first call, some of them one fault after the other."""
    faults = [Rule(fault, share=0.3, times=1 + i // 6) for i, fault in enumerate(BROKEN)]
    asked = requests(30, indices=2)
    with FaultServer(*faults) as server:
        teacher = remote_teacher(section(server, kind, max_retries=12))
        found = list(generate(teacher, asked))
        met = Counter(call.outcome for call in server.calls)
        assert set(BROKEN) <= set(met), "every fault must fire"
        check_complete(server, teacher, asked, found)
    retried = sum(teacher.stats.retries.values())
    assert retried == sum(met.values()) - met["ok"] > 30


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_what_is_not_retriable_is_asked_once(kind: str, status: int) -> None:
    """One bad request never ends a job."""
    with FaultServer(Rule(str(status), first=30, last=31)) as server:
        teacher = remote_teacher(section(server, kind))
        answers, failures = split(generate(teacher, requests(60)))
    assert len(answers) == 59 and len(server.calls) == 60
    (failure,) = failures.values()
    assert failure.reason == f"http {status}" and failure.retriable == (status in (401, 403, 404))


def test_retries_end() -> None:
    with FaultServer(Rule("500", share=0.05)) as server:
        teacher = remote_teacher(section(server, max_retries=3))
        answers, failures = split(generate(teacher, requests(100)))
    assert failures and len(answers) + len(failures) == 100
    assert {failure.reason for failure in failures.values()} == {"http 500, after 4 calls"}
    assert Counter(call.outcome for call in server.calls)["500"] == 4 * len(failures)
    assert all(failure.retriable for failure in failures.values())


def test_a_hang_is_cut_off_and_asked_again() -> None:
    with FaultServer(Rule("hang", share=0.2, times=1)) as server:
        teacher = remote_teacher(section(server, timeout_s=4.0))
        asked = requests(30)
        found = list(generate(teacher, asked))
        check_complete(server, teacher, asked, found)
    assert set(teacher.stats.retries) <= {"timeout after 4 s", "connection: ReadTimeout"} and teacher.stats.retries


def test_a_server_that_is_not_there() -> None:
    with FaultServer() as server:
        config = section(server, max_retries=1)
    _, failures = split(generate(remote_teacher(config), requests(5)))
    assert {failure.reason for failure in failures.values()} == {"connection: ConnectError, after 2 calls"}


# --- load -------------------------------------------------------------------------------------------------------


class WatchedGate(LocalGate):
    """Notes how many calls are in flight after each exchange."""

    def __init__(self, config: RemoteGenerator) -> None:
        super().__init__(Throttle(config.throttle, clock=time.monotonic), model=config.model)
        self.flying: list[int] = []

    async def exchange(self, settled: Sequence[Settled], wanted: Sequence[Tokens], holder: str) -> Permit:
        permit = await super().exchange(settled, wanted, holder)
        self.flying.append(self.throttle.in_flight)
        return permit


@pytest.mark.parametrize("kind", KINDS)
def test_a_storm_of_refusals(kind: str) -> None:
    """40 refusals in a row: fewer in flight, nothing lost, and growth when the storm is over."""
    asked = requests(150, indices=2)
    with FaultServer(Rule("429", first=50, last=90, headers={"Retry-After": "0.05"}), delay_s=0.005) as server:
        config = section(server, kind, throttle={"max_in_flight": 16, "decrease": 0.5, "increase": 4.0})
        gate = WatchedGate(config)
        teacher = remote_teacher(config, gate=gate)
        found = list(generate(teacher, asked))
        check_complete(server, teacher, asked, found)
    assert teacher.stats.retries == {"http 429": 40} and teacher.stats.peak_in_flight == 16
    assert gate.throttle.lowest <= 2 and gate.throttle.limit >= 12 and gate.throttle.in_flight == 0
    low = gate.flying.index(min(gate.flying[:-20]))
    assert max(gate.flying[:low]) == 16 and gate.flying[low] <= 2 and max(gate.flying[low:]) >= 12
    assert max(call.in_flight for call in server.calls[80:90]) <= 4, "as the server sees it"


def test_concurrency_finds_what_a_server_bears() -> None:
    """A server that refuses all beyond 4 at once is soon asked little more than that; one that bears more, more."""
    with FaultServer(delay_s=0.1, capacity=4, retry_after="0.01") as server:
        config = section(server)
        gate = WatchedGate(config)
        teacher = remote_teacher(config, gate=gate)
        asked = requests(100)
        found = list(generate(teacher, asked))
        check_complete(server, teacher, asked, found)
        refused = [call.outcome == "busy" for call in server.calls]
        assert sum(refused[:20]) >= 5 and sum(refused[-40:]) <= 15
        assert gate.throttle.lowest <= 4 and max(gate.flying[-80:-20]) <= 8
        server.capacity, server.delay_s, gate.flying = None, 0.0, []
        more = [Request(Prompt(f"more {i}"), Sampling(), 0) for i in range(150)]
        assert len(split(generate(teacher, more))[0]) == 150
    assert max(gate.flying) >= 12


def test_retry_after_is_honoured() -> None:
    with FaultServer(Rule("429", last=1, headers={"Retry-After": "1"})) as server:
        began = time.monotonic()
        assert len(split(generate(remote_teacher(section(server, throttle={"max_in_flight": 1})), requests(3)))[0]) == 3
    assert time.monotonic() - began >= 1.0


def test_a_server_that_only_refuses_ends_the_job() -> None:
    with FaultServer(Rule("429", headers={"Retry-After": "0.05"})) as server:
        config = section(server, throttle={"max_in_flight": 4, "patience_s": 0.5})
        with pytest.raises(SynthesisError, match=r"longer than throttle.patience_s=0.5; run again later"):
            list(generate(remote_teacher(config), requests(10)))


def test_a_worker_does_not_sleep_through_a_pause_that_another_one_caused() -> None:
    """The gate is closed for a day; a worker that has sent nothing ends as the one that was told."""
    with FaultServer(Rule("429", headers={"Retry-After": "86400"})) as server:
        gate = WatchedGate(section(server))
        for holder in ("one", "other"):
            with pytest.raises(SynthesisError, match="asks for a wait of 86400 s"):
                list(generate(remote_teacher(section(server), gate=gate, holder=holder), requests(5)))
    assert len(server.calls) == 5 and gate.throttle.in_flight == 0


def test_retry_after_in_other_words() -> None:
    """Milliseconds, as OpenAI sends them, and a date, taken against the server's own clock."""
    ahead = {"Date": "Wed, 21 Oct 2026 07:28:00 GMT", "Retry-After": "Wed, 21 Oct 2026 07:28:01 GMT"}
    for headers, least in (({"retry-after-ms": "300"}, 0.3), (ahead, 1.0)):
        with FaultServer(Rule("429", last=1, headers=headers)) as server:
            began = time.monotonic()
            config = section(server, throttle={"max_in_flight": 1, "max_retry_after_s": 5.0})
            assert len(split(generate(remote_teacher(config), requests(2)))[0]) == 2
        assert time.monotonic() - began >= least


def test_one_request_that_is_always_refused_fails_alone() -> None:
    with FaultServer(Rule("429", share=0.04, headers={"Retry-After": "0"})) as server:
        answers, failures = split(generate(remote_teacher(section(server, max_refusals=3)), requests(60)))
    assert failures and len(answers) + len(failures) == 60
    assert {failure.reason for failure in failures.values()} == {"http 429, after 4 calls"}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule("429", first=5, headers={"Retry-After": "86400"}), "asks for a wait of 86400 s"),
        (Rule("429", first=5, body={"error": {"code": "insufficient_quota"}}), "no credit left .http 429 insuff"),
    ],
)
def test_what_no_wait_mends_ends_the_job(rule: Rule, message: str) -> None:
    found: list[Answer | Failure] = []
    with FaultServer(rule) as server, pytest.raises(SynthesisError, match=message):
        _into(found, generate(remote_teacher(section(server)), requests(60)))
    assert len(found) == sum(server.answered().values()) >= 5, "what had been answered came out"


def _into(found: list[Answer | Failure], source: Iterable[Answer | Failure]) -> None:
    for item in source:
        found.append(item)


# --- when a job ends ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("status", "hint"), [(401, "the key in the environment"), (403, "what it may use"), (404, "model=teacher")]
)
def test_a_wrong_key_or_model_ends_at_once(kind: str, status: int, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", SECRET)
    with FaultServer(Rule(str(status), body={"error": {"type": "invalid_thing", "message": SECRET}})) as server:
        teacher = remote_teacher(section(server, kind, api_key_env="TEACHER_KEY"))
        with pytest.raises(SynthesisError, match=hint) as caught:
            list(generate(teacher, requests(500)))
    assert f"http {status} invalid_thing" in str(caught.value) and SECRET not in str(caught.value)
    assert len(server.calls) <= 16 + REFUSALS


def test_one_refusal_among_the_first_calls_is_that_requests_own() -> None:
    with FaultServer(Rule("403", last=1)) as server:
        found = list(generate(remote_teacher(section(server, "openai")), requests(40)))
    assert [item.reason for item in found if isinstance(item, Failure)] == ["http 403"] and len(found) == 40


def test_a_teacher_that_has_answered_before_may_refuse_a_lone_request() -> None:
    with FaultServer(Rule("403")) as server:
        with pytest.raises(SynthesisError, match="refuses the first requests"):
            list(generate(remote_teacher(section(server, "openai")), requests(1)))
        [failure] = generate(remote_teacher(section(server, "openai"), proven=True), requests(1))
        with pytest.raises(SynthesisError, match="refuses the first requests"):  # a key that was revoked since
            list(generate(remote_teacher(section(server, "openai"), proven=True), requests(40)))
    assert isinstance(failure, Failure) and failure.retriable and not failure.passing


@pytest.mark.parametrize(("share", "ends"), [(0.8, True), (0.2, False)])
def test_a_share_of_failures_ends_a_job(share: float, ends: bool) -> None:
    found: list[Answer | Failure] = []
    with FaultServer(Rule("400", share=share)) as server:
        teacher = remote_teacher(section(server))
        if ends:
            with pytest.raises(
                SynthesisError, match=r"of the last 20 requests failed.*max_error_share=0.5: \d+ times `http 400`"
            ):
                _into(found, generate(teacher, requests(300)))
            assert 20 <= len(found) <= 40, "all in flight came back, none was sent after"
        else:
            _into(found, generate(teacher, requests(300)))
            assert len(found) == 300
    answers, failures = split(found)
    assert len(answers) == sum(server.answered().values()) and len(failures) == len(found) - len(answers)


def with_budget(config: RemoteGenerator, saved: Any = None, **caps: Any) -> tuple[RemoteTeacher, Budget]:
    prices = {"teacher": {"input": 1.0, "output": 2.0}}
    budget = Budget(BudgetConfig(prices=prices, **caps), models=["teacher"], clock=time.monotonic, saved=saved)
    gate = LocalGate(Throttle(config.throttle, clock=time.monotonic), model="teacher", budget=budget)
    return remote_teacher(config, gate=gate), budget


@pytest.mark.parametrize(
    ("cap", "little", "more"), [("max_requests", 25, 90), ("max_tokens", 2000, 10**5), ("max_money", 0.002, 1.0)]
)
def test_a_budget_stops_cleanly_and_goes_on_when_raised(cap: str, little: float, more: float) -> None:
    asked = requests(60)
    first: list[Answer | Failure] = []
    with FaultServer(Rule("500", share=0.2, times=1), delay_s=0.005) as server:
        teacher, budget = with_budget(section(server), **{cap: little})
        with pytest.raises(BudgetExhausted, match=f"Raise budget.{cap} and run again"):
            _into(first, generate(teacher, asked))
        assert 0 < len(first) < 60 and budget.reserved.requests == 0
        used = {
            "max_requests": budget.spent.requests,
            "max_tokens": budget.spent.tokens,
            "max_money": budget.spent.money,
        }
        assert 0.8 * little < used[cap] <= little and budget.spent.requests == len(server.calls)
        answered = split(first)[0]
        teacher, budget = with_budget(section(server), saved=budget.state(), **{cap: more})
        rest = [request for request in asked if request.id(teacher.revision) not in answered]
        found = [*first, *generate(teacher, rest)]
        assert len(split(found)[0]) == 60 and set(server.answered().values()) == {1}
        assert budget.spent.requests == len(server.calls) and not any(budget.overdrawn.values)
        assert budget.spent.tokens == sum(a.prompt_tokens + a.completion_tokens for a in found if isinstance(a, Answer))


def test_seconds_are_a_hard_cap() -> None:
    began = time.monotonic()
    with FaultServer(Rule("hang", first=3)) as server:
        teacher, budget = with_budget(section(server), max_seconds=1.0)
        with pytest.raises(BudgetExhausted, match="max_seconds=1"):
            list(generate(teacher, requests(60)))
    assert 1.0 <= time.monotonic() - began < 60.0 and teacher.stats.retries == {}
    assert budget.spent.completion_tokens > 100, "nobody knows whether calls that were cut off are billed: they count"


def test_an_answer_without_usage_costs_what_was_reserved() -> None:
    with FaultServer(Rule("no_usage")) as server:
        teacher, budget = with_budget(section(server))
        assert len(split(generate(teacher, requests(3)))[0]) == 3
    assert budget.spent.completion_tokens == 60 and budget.spent.prompt_tokens >= 3 * len("prompt 0")


# --- keys -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_key_or_payload_is_ever_shown(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every logger at DEBUG, a server that echoes the secret in headers and bodies, and every way to fail."""
    monkeypatch.setenv("TEACHER_KEY", SECRET)
    echo = {"error": {"message": SECRET, "code": SECRET, "type": "invalid_request_error"}}
    rules = [Rule(fault, share=0.3, times=1) for fault in ("truncate", "close", "html", "two", "surrogate", "hang")]
    rules += [Rule(status, share=0.3, times=1, body=echo, headers={"X-Echo": SECRET}) for status in ("500", "429")]
    rules += [Rule("400", share=0.1, body=echo, headers={"X-Echo": SECRET})]
    for name in [None, *logging.root.manager.loggerDict]:
        caplog.set_level(logging.DEBUG, logger=name)
    shown: list[str] = []
    with FaultServer(*rules) as server:
        teacher = remote_teacher(section(server, kind, api_key_env="TEACHER_KEY", timeout_s=1.0))
        asked = [Request(Prompt(f"{SECRET} number {i}"), Sampling(), 0) for i in range(60)]
        answers, failures = split(generate(teacher, asked))
        assert len(answers) + len(failures) == 60 and failures
        shown += [repr(teacher), repr(teacher.__dict__), repr(teacher.stats), *map(repr, failures.values())]
        sent = {name.lower(): value for name, value in server.calls[0].headers.items()}
        assert sent["authorization"] == f"Bearer {SECRET}", "the key does arrive"
        server.rules = [Rule("401", body=echo)]
        fresh = remote_teacher(section(server, kind, api_key_env="TEACHER_KEY"))
        with pytest.raises(SynthesisError) as caught:
            list(generate(fresh, asked))
        shown += ["".join(traceback.format_exception(caught.value)), repr(caught.value.__context__)]
    shown += [f"{record.name} {record.getMessage()} {record.exc_text}" for record in caplog.records]
    assert not [text for text in shown if SECRET in text]
    assert {record.name for record in caplog.records} & {"asyncio"}, "loggers at DEBUG were heard"


def test_a_missing_key_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultServer() as server:
        config = section(server, api_key_env="TEACHER_KEY")
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"export TEACHER_KEY=\.\.\."):
        remote_teacher(config)
    for value in (f"{SECRET}\n{SECRET}", f"{SECRET} x", f"{SECRET}é"):
        monkeypatch.setenv("TEACHER_KEY", value)
        with pytest.raises(ConfigError, match="characters that no key has") as caught:
            remote_teacher(config)
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_package_names_its_extra(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, kind, None)
    monkeypatch.delitem(sys.modules, f"nexus_ray.synthesis.generators.{kind}_chat", raising=False)
    with FaultServer() as server, pytest.raises(ConfigError, match=rf"pip install 'nexus-ray\[{kind}\]'"):
        remote_teacher(section(server, kind))
