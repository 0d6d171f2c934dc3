"""No key and no prompt in anything that is shown or written, whatever goes wrong: found by planting both.

The key stands in the environment, the marker in every part of a prompt; the servers echo both wherever they can. All
loggers are at DEBUG, asyncio's own debugging is on, and every file that came into being is read.
"""

from __future__ import annotations

import json
import logging
import pickle
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from nexus_ray.config.faults import _fault, _location
from nexus_ray.config.generators import (
    AnthropicGenerator,
    BudgetConfig,
    Generator,
    LocalGenerator,
    OpenAIGenerator,
    ServedGenerator,
)
from nexus_ray.errors import NexusError
from nexus_ray.storage import Storage
from nexus_ray.synthesis.budget import Budget
from nexus_ray.synthesis.generators.dispatch import Site
from nexus_ray.synthesis.generators.gate import LocalGate
from nexus_ray.synthesis.generators.protocol import generate
from nexus_ray.synthesis.generators.remote import RemoteTeacher, connector, remote_teacher
from nexus_ray.synthesis.generators.served import ServedTeacher, served_teacher
from nexus_ray.synthesis.ledger import Ledger
from nexus_ray.synthesis.plan import Job
from nexus_ray.synthesis.rows import PASS, Answer, Failure, Message, Prompt, Request, Row, Sampling
from nexus_ray.synthesis.throttle import Throttle
from tests.fault_server import FaultServer, Rule

KEY = "sk-planted-7Hq2Zx9vBn4Lw8Ty"
MARK = "Planted8d1fMarker"
SECRETS = (KEY, MARK)
VARIABLE = "TEACHER_KEY"
ADAPTER: TypeAdapter[Any] = TypeAdapter(Generator)
ECHO = {"error": {"message": f"{KEY} {MARK}", "code": KEY, "type": "invalid_request_error", "param": MARK.lower()}}
STATUSES = ("400", "404", "408", "409", "413", "422", "429", "500", "502", "503", "504", "529")
BUSY = ("429", "503", "529")
FINAL = ("400", "404", "413", "422")
SHAPES = ("truncate", "close", "not_json", "html", "empty", "two", "none", "no_usage", "surrogate", "hang")
FAST = {"retry_delay_s": 0.01, "timeout_s": 1.0, "max_refusals": 3, "max_error_share": 1.0}
THROTTLE = {"max_in_flight": 16, "cooldown_s": 0.02, "decrease": 0.95}
KINDS = ("openai", "anthropic", "served")


def requests(count: int = 80) -> list[Request]:
    """The marker is in every part of a prompt that there is."""
    sampling = Sampling(max_tokens=20, stop=(f"{MARK} stop",))
    parts = {"parameters": {"word": MARK}, "source": f"{MARK} source", "recipe": f"r-{MARK}"}
    turns = (Message("system", f"{MARK} system"), Message("user", f"{MARK} user"))
    return [
        Request(Prompt((*turns, Message("user", str(i))), **parts), sampling, k)
        for i in range(count // 2)
        for k in (0, 1)
    ]  # type: ignore[arg-type]


def every_fault() -> list[Rule]:
    """Each fault meets some requests, several of them one after the other; with header and body full of secrets where
    it has any. What is not retriable comes last, and once the first calls are over, where 404 would end the job."""
    echo = {"X-Echo": f"{KEY} {MARK}"}
    rubbish, soon = {"Retry-After": KEY, "retry-after-ms": MARK, "Date": MARK}, {"Retry-After": "0.01", "Date": KEY}
    mended = [*SHAPES, *(status for status in STATUSES if status not in FINAL)]
    rules = [
        Rule(fault, share=0.1, times=1 + place // 4, body=ECHO, headers=echo | (soon if fault in BUSY else rubbish))
        for place, fault in enumerate(mended)
    ]
    return rules + [Rule(status, first=40, share=0.1, body=ECHO, headers=echo | rubbish) for status in FINAL]


# --- what is shown and written ------------------------------------------------------------------------------------


class Shown:
    """All text that came out of a test."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def error(self, error: BaseException) -> None:
        """As it is printed, with what lies behind it, and as it crosses a process border."""
        self.texts += ["".join(traceback.format_exception(error)), repr(error), repr(error.args), repr(error.__dict__)]
        for behind in (error.__cause__, error.__context__):
            if behind is not None:
                self.texts.append(repr(behind) + str(behind))
        if isinstance(error, NexusError):
            self.texts.append(repr(pickle.loads(pickle.dumps(error))) + repr(pickle.dumps(error)))

    def thing(self, *things: object) -> None:
        """Its repr, and those of its parts."""
        for thing in things:
            self.texts += [repr(thing), str(thing)]
            parts = vars(thing) if hasattr(thing, "__dict__") else {}
            self.texts += [f"{name}={value!r}" for name, value in parts.items()]

    def reprs(self, *things: object) -> None:
        """Of things whose parts hold a prompt or key because somebody must: their repr alone."""
        self.texts += [text for thing in things for text in (repr(thing), str(thing))]

    def folder(self, folder: Path, *, plans: bool = False) -> None:
        """Every file in it, packed ones unpacked. `plans`: those too whose purpose is to hold prompts."""
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            if plans or "plan" not in file.relative_to(folder).parts:
                rows = pq.read_table(file).to_pylist() if file.suffix == ".parquet" else ""
                self.texts.append(f"{file.name} {file.read_bytes()!r} {rows!r}")

    def holds(self, secret: str) -> list[str]:
        return [text[max(0, text.find(secret) - 200) :][:400] for text in self.texts if secret in text]

    def check(self) -> None:
        assert self.texts and not [found for secret in SECRETS for found in self.holds(secret)]


@pytest.fixture
def shown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> Iterator[Shown]:
    """What a test shows; what was logged, printed or warned of is added at its end, and everything is searched."""
    monkeypatch.setenv(VARIABLE, KEY)
    monkeypatch.setenv("PYTHONASYNCIODEBUG", "1")
    for name in [None, *logging.root.manager.loggerDict]:
        caplog.set_level(logging.DEBUG, logger=name)
    shown = Shown()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        yield shown
    shown.texts += [
        f"{record.name} {record.getMessage()} {record.exc_text} {vars(record)!r}" for record in caplog.records
    ]
    shown.texts += [*map(str, warned), *capfd.readouterr()]
    shown.check()


@contextmanager
def teacher_of(kind: str, rules: list[Rule], **settings: Any) -> Iterator[tuple[Any, LocalGate, FaultServer | None]]:
    """A teacher of a kind before a server with those faults, its gate, and the server where it runs in this process."""
    data = {"kind": kind, "model": "teacher", **FAST, "throttle": THROTTLE, **settings}
    prices = {"teacher": {"input": 1.0, "output": 2.0}}
    if kind == "served":
        config = ADAPTER.validate_python({"start_timeout_s": 60.0, **data, "server": _command(rules)})
        gate = gate_of(config, prices)
        with served_teacher(config, gate=gate) as served:
            yield served, gate, None
        return
    with FaultServer(*rules) as server:
        url = f"{server.url}/v1" if kind == "openai" else server.url
        config = ADAPTER.validate_python({"api_key_env": VARIABLE, "base_url": url, **data})
        gate = gate_of(config, prices)
        yield remote_teacher(config, gate=gate), gate, server


def gate_of(config: Any, prices: dict[str, Any], **caps: Any) -> LocalGate:
    budget = Budget(BudgetConfig(prices=prices, **caps), models=["teacher"], clock=time.monotonic)
    return LocalGate(Throttle(config.throttle, clock=time.monotonic), model="teacher", budget=budget)


def _command(rules: list[Rule]) -> dict[str, Any]:
    """A server of our own: it gets a random key, and this process's environment with the planted one."""
    plain = [{**vars(rule), "body": None, "headers": {}} for rule in rules]
    settings = json.dumps({"port": 4711, "key_env": "FAULT_KEY", "rules": plain})
    return {
        "command": [sys.executable, "-m", "tests.fault_server", settings.replace("4711", "{port}")],
        "key_env": "FAULT_KEY",
    }


# --- jobs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_job_with_every_fault(kind: str, shown: Shown, tmp_path: Path) -> None:
    """Through the ledger, as a real job; the marker is in its plan, which is there to hold prompts, nowhere else."""
    folder = tmp_path / "job"
    with teacher_of(kind, every_fault(), max_retries=30) as (teacher, gate, server):
        ledger = Ledger(Storage(str(folder)), Job("stories", teacher.revision, recipe={}, filters={}))
        ledger.plan(requests())
        with ledger.write(0) as log:
            pending = log.pending()
            log.sent(pending)
            for item in generate(teacher, pending.values()):
                shown.thing(item)
                log.answered(item) if isinstance(item, Answer) else log.failed(item)
            for answer in log.unjudged():
                row = Row(answer.text, answer.request_id, 0, log.requests[answer.request_id].prompt)
                log.judged(answer.request_id, [(row, PASS)])
        with ledger.committer() as committer:
            committer.commit()
        (folder / "budget.json").write_text(json.dumps(gate.budget.state()))  # type: ignore[union-attr]
        shown.thing(teacher, teacher.stats, gate, gate.throttle, gate.budget, ledger, ledger.stats())
        if server is not None:
            sent = {name.lower(): value for call in server.calls[:1] for name, value in call.headers.items()}
            assert KEY in (sent.get("authorization", "") + sent.get("x-api-key", "")), "the key does arrive"
            met = {call.outcome for call in server.calls}
            assert met >= {*STATUSES, *SHAPES}, f"every fault must fire, not only {met}"
    everything = Shown()
    everything.folder(folder, plans=True)
    assert everything.holds(MARK) and not everything.holds(KEY), "the search does find what is there"
    shown.folder(folder)


# --- errors -------------------------------------------------------------------------------------------------------

FATAL: dict[str, tuple[list[Rule], dict[str, Any], str]] = {
    "no key": ([Rule("401", body=ECHO)], {}, "refuses the first request"),
    "no model": ([Rule("404", body=ECHO)], {}, "refuses the first request"),
    "no credit": ([Rule("429", body={"error": {**ECHO["error"], "code": "insufficient_quota"}})], {}, "no credit left"),
    "long wait": ([Rule("429", headers={"Retry-After": "86400"}, body=ECHO)], {}, "asks for a wait"),
    "only refusals": (
        [Rule("503", headers={"Retry-After": "0.05"}, body=ECHO)],
        {"throttle": {**THROTTLE, "patience_s": 0.3}, "max_refusals": 1000},
        "has refused every request",
    ),
    "too many failures": ([Rule("422", body=ECHO)], {"max_error_share": 0.5}, "larger share"),
    "too many broken": ([Rule("html")], {"max_error_share": 0.5, "max_retries": 0}, "larger share"),
}


@pytest.mark.parametrize("kind", ["openai", "anthropic"])
@pytest.mark.parametrize("why", FATAL)
def test_errors_that_end_a_job(kind: str, why: str, shown: Shown) -> None:
    rules, settings, message = FATAL[why]
    with teacher_of(kind, rules, **settings) as (teacher, _, _):
        shown.error(_ended(teacher, message))
        shown.thing(teacher, teacher.stats)


@pytest.mark.parametrize("cap", [{"max_requests": 10}, {"max_tokens": 5000}, {"max_money": 0.002}])
def test_an_exhausted_budget(cap: dict[str, Any], shown: Shown) -> None:
    with FaultServer() as server:
        data = {"kind": "openai", "model": "teacher", "base_url": f"{server.url}/v1", "api_key_env": VARIABLE}
        config = ADAPTER.validate_python(data)
        gate = gate_of(config, {"teacher": {"input": 1.0, "output": 2.0}}, **cap)
        shown.error(_ended(remote_teacher(config, gate=gate), "is used up"))
        shown.thing(gate.budget, gate.budget.state(), gate.budget.forecast(10, 40))  # type: ignore[union-attr]


def test_servers_that_do_not_live(shown: Shown, tmp_path: Path) -> None:
    """One that prints its environment and ends; one that dies with the whole call on its lips."""
    env = {"command": ["sh", "-c", "env; echo {port}; exit 3"], "key_env": "FAULT_KEY"}
    config = ServedGenerator.model_validate({"kind": "served", "model": "teacher", "server": env})
    with served_teacher(config) as teacher:
        error = _ended(teacher, "The last it printed")
        assert f"{VARIABLE}=***" in str(error) and "FAULT_KEY=***" in str(error)
        assert teacher._server.launch.key not in str(error) + repr(vars(teacher._server))  # type: ignore[operator]
        shown.error(error)
        shown.thing(teacher, teacher._server, teacher._server.launch, teacher._remote)
    with teacher_of("served", [Rule("die", first=5)], max_restarts=1) as (dying, gate, _):
        error = _ended(dying, "DiedOfThisError")
        assert dying._server.launch.key not in str(error)
        shown.error(error)
        shown.thing(dying, dying.stats, gate)
    shown.folder(tmp_path)


def test_keys_where_they_do_not_belong(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: list[tuple[type[BaseModel], dict[str, Any]]] = [
        (OpenAIGenerator, {"api_key": KEY}),
        (OpenAIGenerator, {"api_key_env": KEY}),
        (OpenAIGenerator, {"base_url": f"https://x:{KEY}@host/v1"}),
        (AnthropicGenerator, {"model": KEY}),
        (ServedGenerator, {"options": {"api-key": KEY}}),
        (ServedGenerator, {"options": {"anything": f"a={KEY}"}}),
        (ServedGenerator, {"server": {"command": ["{port}", KEY]}}),
        (ServedGenerator, {"server": {"command": ["{port}"], "key_env": KEY}}),
        (ServedGenerator, {"server": {"command": ["{port}"], "api_key": KEY}}),
        (ServedGenerator, {"server": KEY}),
        (ServedGenerator, {"log": KEY}),
        (ServedGenerator, {"program": KEY}),
    ]
    for section_type, data in wrong:
        with pytest.raises(ValidationError) as caught:
            section_type.model_validate(
                {"kind": section_type.__name__.removesuffix("Generator").lower(), "model": "m", **data}
            )
        shown.error(caught.value)
        shown.texts += [str(_fault(detail, _location(detail, {}), {})) for detail in caught.value.errors()]
    section = ADAPTER.validate_python({"kind": "openai", "model": "m", "api_key_env": VARIABLE})
    for value in ("", f"{KEY} {KEY}", f"{KEY}é"):
        monkeypatch.setenv(VARIABLE, value)
        with pytest.raises(NexusError) as refused:
            remote_teacher(section)
        shown.error(refused.value)


def _ended(teacher: RemoteTeacher | ServedTeacher, message: str) -> BaseException:
    with pytest.raises(NexusError, match=message) as caught:
        for item in generate(teacher, requests(200)):
            assert isinstance(item, Answer | Failure)
    return caught.value


# --- objects ------------------------------------------------------------------------------------------------------


def test_reprs_of_what_a_teacher_is_made_of(shown: Shown) -> None:
    """Also in the middle of a job, when prompts are in flight."""
    with teacher_of("openai", [Rule("hang", first=8)], timeout_s=30.0) as (teacher, gate, _):
        found = generate(teacher, requests())
        assert [isinstance(next(found), Answer) for _ in range(8)]
        loop_objects = [*_dispatchers()]
        assert loop_objects, "a job is under way"
        shown.thing(teacher, gate, gate.throttle, gate.budget, *loop_objects)
        site: Site = loop_objects[0]._site
        shown.thing(site, site.endpoint, site.health, teacher._config, connector(teacher._config))
        shown.reprs(*site.endpoint._clients, *loop_objects[0]._ready)  # type: ignore[attr-defined]
        shown.reprs(*loop_objects[0]._tasks, *loop_objects[0]._tasks.values())
        found.close()


def _dispatchers() -> Iterator[Any]:
    import gc

    from nexus_ray.synthesis.generators.dispatch import _Run

    return (thing for thing in gc.get_objects() if type(thing) is _Run and thing._tasks)


def test_local_teachers(shown: Shown, tmp_path: Path) -> None:
    """Prompts that a local model cannot be asked, one of them because its chat template complains of the content."""
    from nexus_ray.synthesis.generators.local import local_teacher
    from tests.tiny import tiny_model, tiny_tokenizer

    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer(tmp_path)
    sampling = Sampling(max_tokens=3)
    asked = [Request(Prompt(f"{MARK} " * 1000), sampling, 0), Request(Prompt(""), sampling, 0), requests(2)[0]]
    complaint = "{{ raise_exception('cannot talk of ' + messages[0].content) }}"
    for template in (None, complaint, "{{ messages[0].nothing.at_all }}"):
        if template is not None:
            (tmp_path / "chat_template.jinja").write_text(template)
        teacher = local_teacher(LocalGenerator(kind="local", model=str(tmp_path)))
        found = list(teacher.answers(asked))
        assert len(found) == 3 and all(isinstance(item, Failure) and not item.retriable for item in found)
        shown.thing(teacher, *found)
