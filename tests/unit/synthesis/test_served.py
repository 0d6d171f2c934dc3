"""Teachers behind a server of our own: command lines, start, death, restart, end. The servers are real processes."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from nexus_ray.config.generators import BudgetConfig, ServedGenerator
from nexus_ray.errors import ConfigError, SynthesisError
from nexus_ray.synthesis.budget import Budget
from nexus_ray.synthesis.generators import server as server_module
from nexus_ray.synthesis.generators import server_process
from nexus_ray.synthesis.generators.gate import LocalGate
from nexus_ray.synthesis.generators.protocol import generate
from nexus_ray.synthesis.generators.served import ServedTeacher, launch_of, model_content, served_teacher
from nexus_ray.synthesis.generators.server_process import PORTS, free_port, redact, secrets_of
from nexus_ray.synthesis.jail.inside import descendants
from nexus_ray.synthesis.rows import Answer, Failure, Prompt, Request, Sampling
from nexus_ray.synthesis.throttle import Throttle

KEY = "sk-planted-7Hq2Zx9vBn4Lw8Ty"
FAST = {"retry_delay_s": 0.01, "throttle": {"max_in_flight": 4, "cooldown_s": 0.02}, "start_timeout_s": 60.0}


def fault_server(*rules: dict[str, Any], before: str = "", **settings: Any) -> dict[str, Any]:
    """A server section that runs tests/fault_server.py, after a line of shell."""
    text = json.dumps({"port": 4711, "rules": list(rules), "key_env": "FAULT_KEY", **settings})
    python = [sys.executable, "-m", "tests.fault_server", text.replace("4711", "{port}")]
    command = ["sh", "-c", f'{before}\nexec "$@"', "sh", *python] if before else python
    return {"command": command, "key_env": "FAULT_KEY"}


def section(server: Any, **settings: Any) -> ServedGenerator:
    return ServedGenerator.model_validate({"kind": "served", "model": "teacher", "server": server, **FAST, **settings})


def requests(count: int) -> list[Request]:
    return [Request(Prompt(f"prompt {i}"), Sampling(max_tokens=20), 0) for i in range(count)]


def check_complete(teacher: ServedTeacher, asked: list[Request], found: list[Answer | Failure]) -> None:
    answers = [item for item in found if isinstance(item, Answer)]
    assert len(found) == len(answers) == len(asked)
    assert {answer.request_id for answer in answers} == {request.id(teacher.revision) for request in asked}
    assert len({answer.text for answer in answers}) == len(asked)


def gone(pids: list[int], *, within_s: float = 10.0) -> bool:
    """Whether none of them runs any more, soon."""
    until = time.monotonic() + within_s
    while left := [pid for pid in pids if alive(pid)]:
        if time.monotonic() > until:
            print(f"still there: {left}")
            return False
        time.sleep(0.05)
    return True


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def processes_of(teacher: ServedTeacher) -> list[int]:
    """The keeper, the server and all below, by the port in their command lines or their parents."""
    port = str(teacher._server.launch.port)
    keepers = [pid for pid in descendants(os.getpid()) if port in Path(f"/proc/{pid}/cmdline").read_text()]
    return sorted({pid for keeper in keepers for pid in [keeper, *descendants(keeper)]})


# --- life ---------------------------------------------------------------------------------------------------------


def test_a_server_is_started_asked_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through no proxy, whatever the environment says; its own children end with it, in other sessions too."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with served_teacher(section(fault_server(before="setsid sleep 1000 &"))) as teacher:
        asked = requests(30)
        check_complete(teacher, asked, list(generate(teacher, asked)))
        first = processes_of(teacher)
        assert len(first) == 3, "keeper, server, its child in another session"
        check_complete(teacher, asked, list(generate(teacher, asked)))  # another event loop, the same server
        assert processes_of(teacher) == first and teacher.restarts == 0 and teacher.stats.sent == 60
    assert gone(first, within_s=0.0), "when it is closed, nothing is left"
    with pytest.raises(SynthesisError, match="make a new generator"):
        list(generate(teacher, asked))


def test_a_server_that_dies_is_started_again_and_nothing_is_lost() -> None:
    """It dies at its 21st call, in each of its lives."""
    asked = requests(50)
    config = section(fault_server({"fault": "die", "first": 20}, delay_s=0.01))
    budget = Budget(BudgetConfig(), models=["teacher"], clock=time.monotonic)
    gate = LocalGate(Throttle(config.throttle, clock=time.monotonic), model="teacher", budget=budget)
    with served_teacher(config, gate=gate) as teacher:
        found = list(generate(teacher, asked))
        check_complete(teacher, asked, found)
        assert teacher.restarts == 2
        retries = teacher.stats.retries
        assert set(retries) <= {f"connection: {kind}" for kind in ("ReadError", "RemoteProtocolError", "ConnectError")}
        assert teacher.stats.sent == 50 + sum(retries.values()) == budget.spent.requests
        assert 2 <= sum(retries.values()) <= 2 * (4 + 2), "what was in flight was sent again, and hardly more"
    assert budget.reserved.requests == 0 and gate.throttle.in_flight == 0


def test_a_killed_server_and_a_killed_keeper() -> None:
    asked = requests(60)
    with served_teacher(section(fault_server(before="setsid sleep 1000 &", delay_s=0.05))) as teacher:
        found = generate(teacher, asked)
        kept = [next(found) for _ in range(5)]
        _, server, *_ = seen = processes_of(teacher)
        os.kill(server, signal.SIGKILL)
        kept += [next(found) for _ in range(15)]
        assert gone(seen), "a dead server leaves nothing behind"
        seen = processes_of(teacher)
        assert len(seen) == 3
        os.kill(seen[0], signal.SIGKILL)
        assert gone(seen), "of the server the kernel takes care, of its children we do"
        check_complete(teacher, asked, [*kept, *found])
        assert teacher.restarts == 2


def test_an_engine_that_is_dead_behind_a_living_server() -> None:
    """The process lives and says that it is ill: it is ended and started again."""
    asked = requests(30)
    with served_teacher(section(fault_server({"fault": "sick", "first": 20}), timeout_s=30.0)) as teacher:
        found = generate(teacher, asked)
        kept = [next(found) for _ in range(10)]
        before = processes_of(teacher)
        check_complete(teacher, asked, [*kept, *found])
        assert teacher.restarts == 1 and gone(before)


def test_a_request_that_kills_its_server_fails_alone() -> None:
    rule = {"fault": "die", "share": 0.08}
    with served_teacher(section(fault_server(rule), max_retries=3, throttle={"max_in_flight": 1})) as teacher:
        found = list(generate(teacher, requests(30)))
        assert teacher.restarts <= teacher._server._max_restarts
    failures = [item for item in found if isinstance(item, Failure)]
    assert len(found) == 30 and len(failures) == teacher.restarts / 4 > 0
    assert all("after 4 calls" in failure.reason and failure.retriable for failure in failures)


def test_a_server_that_keeps_dying_ends_the_job() -> None:
    config = section(fault_server({"fault": "die", "first": 10}), max_restarts=2)
    found: list[Answer | Failure] = []
    with (
        served_teacher(config) as teacher,
        pytest.raises(SynthesisError, match=r"ended with exit code 7 while it was in use .*DiedOfThisError") as caught,
    ):
        for item in generate(teacher, requests(200)):
            found.append(item)
    assert "started 2 more times, max_restarts=2" in str(caught.value) and "set `log` to a file" in str(caught.value)
    assert "prompt 1" not in str(caught.value) and 25 <= len(found) <= 30, "what had been answered came out"


OWNER = """
import sys, threading, time
from nexus_ray.config.generators import ServedGenerator
from nexus_ray.synthesis.generators.protocol import generate
from nexus_ray.synthesis.generators.served import served_teacher
from tests.unit.synthesis.test_served import FAST, fault_server, processes_of, requests, section

teacher = served_teacher(section(fault_server(before="trap '' TERM; setsid sleep 1000 &")))
thread = threading.Thread(target=teacher.start)  # a thread that ends; its end must not end the server
thread.start()
thread.join()
time.sleep(0.5)
assert len(list(generate(teacher, requests(5)))) == 5
print(*processes_of(teacher), flush=True)
if sys.argv[1] == "exit":
    sys.exit(0)
time.sleep(100)
"""


@pytest.mark.fault
@pytest.mark.parametrize("how", ["killed", "exit"])
def test_a_server_ends_with_its_owner(how: str) -> None:
    """Killed by SIGKILL, or gone without closing; the server and its child ignore SIGTERM."""
    with subprocess.Popen([sys.executable, "-c", OWNER, how], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        pids = [int(pid) for pid in owner.stdout.readline().split()]
        assert len(pids) == 3
        if how == "killed":
            assert all(map(alive, pids))
            owner.kill()
        owner.wait(30)
    assert gone(pids)


# --- starts that fail ---------------------------------------------------------------------------------------------


def failed_start(server: dict[str, Any], **settings: Any) -> str:
    with served_teacher(section(server, **settings)) as teacher:
        with pytest.raises(SynthesisError) as caught:
            teacher.start()
        assert not processes_of(teacher) and teacher.restarts == 0
        with pytest.raises(SynthesisError):
            list(generate(teacher, requests(3)))
    return str(caught.value)


def test_a_server_that_does_not_start_shows_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTHER_API_KEY", "plainlookingsecret")
    talk = (
        "echo 'loading weights'; echo no GPU: $OTHER_API_KEY $FAULT_KEY api=$(printf hf%sabcdefghijklm _) >&2; exit 3"
    )
    message = failed_start({"command": ["sh", "-c", f"{talk} # {{port}}"], "key_env": "FAULT_KEY"})
    assert "sh teacher: the server ended with exit code 3 before it was healthy." in message
    assert message.endswith("The last it printed:\n  loading weights\n  no GPU: *** *** api=***")


def test_a_server_that_never_becomes_healthy() -> None:
    began = time.monotonic()
    message = failed_start({"command": ["sleep", "1000{port}"]}, start_timeout_s=0.5)
    assert "not healthy after start_timeout_s=0.5 (GET /health); raise that" in message and "printed nothing" in message
    assert time.monotonic() - began < 10.0
    message = failed_start(fault_server() | {"health": "/nowhere"}, start_timeout_s=3.0)
    assert "GET /nowhere" in message, "404 is not healthy"


def test_programs_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs the program /nowhere/llama-server"):
        served_teacher(section({"command": ["/nowhere/llama-server", "--port", "{port}"]}))
    with pytest.raises(ConfigError, match=r"generator.program=/opt/vllm/bin/vllm"):
        served_teacher(section("vllm", model=str(Path(__file__)), program=str(tmp_path / "vllm")))
    text = tmp_path / "text"
    text.write_text("no program")
    text.chmod(0o755)
    assert "ended with exit code" in failed_start({"command": [str(text), "{port}"]})


def test_a_log_is_kept_on_request_and_private(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    config = section(fault_server({"fault": "die", "first": 5}), log=str(log), max_restarts=0)
    with served_teacher(config) as teacher, pytest.raises(SynthesisError, match=f"what it printed is in {log}"):
        list(generate(teacher, requests(20)))
    assert "prompt" in log.read_text() and stat.S_IMODE(log.stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match=r"generator.log=.*there is no folder"):
        served_teacher(section(fault_server(), log=str(tmp_path / "a" / "b")))


# --- what is started and what it is called ------------------------------------------------------------------------


@pytest.fixture
def vllm(tmp_path: Path) -> Path:
    """A program of that name, which is found but never run."""
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    return program


def test_vllms_command_line(vllm: Path) -> None:
    options = {"max-model-len": 4096, "enforce_eager": True, "enable-prefix-caching": False, "dtype": "bfloat16"}
    config = section("vllm", model="Qwen/Qwen3-8B", program=str(vllm), gpus=2, options=options)
    launch = launch_of(config, port=23456, key=KEY, commit="abc123")
    said = (
        "serve Qwen/Qwen3-8B --host 127.0.0.1 --port 23456 --served-model-name Qwen/Qwen3-8B "
        "--disable-uvicorn-access-log --revision abc123 --tensor-parallel-size 2 --max-model-len 4096 --enforce-eager "
        "--no-enable-prefix-caching --dtype bfloat16"
    )
    assert " ".join(launch.command[1:]) == said
    assert launch.environment == {"VLLM_API_KEY": KEY} and launch.key == KEY
    assert KEY not in repr(launch) and KEY not in " ".join(launch.command), "no user of the machine can read it"


def test_vllm_is_looked_for_on_the_path(vllm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(vllm.parent))
    assert launch_of(section("vllm"), port=1, key=KEY).command[0] == str(vllm)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    with pytest.raises(ConfigError, match=r"needs the package uvicorn.*pip install 'nexus-ray\[serve\]'"):
        launch_of(section("transformers"), port=1, key=KEY)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"options": {"api-key": "x"}}, "options.api-key is not for you to set"),
        ({"options": {"tensor_parallel_size": 2}}, "options.tensor_parallel_size is not for you"),
        ({"options": {"--dtype": "auto"}}, "names have no dashes in front"),
        ({"options": {"hf-token": "hf_abcdefghijklmnop"}}, "holds what looks like a key"),
        ({"server": {"command": ["llama-server", "-m", "{model}"]}}, r"write \{port\} where the number belongs"),
        ({"server": {"command": ["x", "{port}", f"--api-key={KEY}"]}}, "command holds what looks like a key"),
        ({"server": {"command": ["x", "{port}"], "key_env": KEY}}, "key_env is the NAME of an environment variable"),
        ({"server": {"command": ["x", "{port}"]}, "options": {"a": 1}}, "write them into server.command"),
        ({"server": "transformers", "program": "/x"}, "program=/x is where vLLM lies"),
        ({"server": "sglang"}, "vllm"),
    ],
)
def test_faults_of_the_section(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message) as caught:
        section(**{"server": "vllm", **settings})
    assert KEY not in str(caught.value) and "hf_abcdefghijklmnop" not in str(caught.value)


def test_a_revision_is_what_is_served_and_how_not_where(tmp_path: Path) -> None:
    """Another port, machine or folder of the same model asks nothing anew; another model or flag does."""
    one, other = tmp_path / "a" / "model.gguf", tmp_path / "b" / "model.gguf"
    for file in (one, other):
        file.parent.mkdir()
        file.write_bytes(b"weights")

    def revision(model: Path | str = one, **settings: Any) -> str:
        return served_teacher(section(fault_server(**settings.pop("flags", {})), model=str(model), **settings)).revision

    first = revision()
    assert first.startswith("served:model.gguf:") and first == revision() == revision(other)
    assert first == revision(timeout_s=9.0, max_restarts=1, gpus=2, start_timeout_s=1.0)
    different = [revision(flags={"delay_s": 1.0}), revision(api="completion"), revision("hub/name")]
    different.append(revision("hub/name", revision="abc"))
    other.write_bytes(b"other weights")
    assert len({first, revision(other), *different}) == 6


def test_what_is_beside_the_weights_counts_too(tmp_path: Path) -> None:
    from tests.tiny import tiny_model

    tiny_model().save_pretrained(tmp_path)
    config = section(fault_server(), model=str(tmp_path))
    before = model_content(config)
    (tmp_path / "README.md").write_text("read me")
    assert model_content(config) == before and before[0] is None
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert model_content(config) != before


def test_ports() -> None:
    drawn = Counter(free_port() for _ in range(50))
    assert all(port in PORTS for port in drawn) and len(drawn) > 40


def test_what_looks_like_a_key_is_not_shown() -> None:
    hidden = secrets_of({"HF_TOKEN": "short-but-named", "HOME": "/root", "X": "0f3c9a1be57d4286903cf1ab77e0d2c4"}, KEY)
    text = f"a short-but-named b 0f3c9a1be57d4286903cf1ab77e0d2c4 c {KEY} d sk-other-1 /usr/lib/x86/python3/site/packs1"
    assert redact(text, hidden) == "a *** b *** c *** d *** /usr/lib/x86/python3/site/packs1"


def test_a_silent_server_is_dead_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in its tracks, it answers nothing: its process lives, and nobody waits for it for ever."""
    monkeypatch.setattr(server_module, "SILENT_S", 1.0)
    monkeypatch.setattr(server_module, "PROBE_EVERY_S", 0.2)
    monkeypatch.setattr(server_process, "GRACE_S", 0.5)
    asked = requests(20)
    with served_teacher(section(fault_server(delay_s=0.02))) as teacher:
        found = generate(teacher, asked)
        kept = [next(found) for _ in range(3)]
        os.kill(processes_of(teacher)[1], signal.SIGSTOP)
        check_complete(teacher, asked, [*kept, *found])
        assert teacher.restarts == 1
