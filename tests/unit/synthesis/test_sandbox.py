"""The sandbox: whatever a program does is contained, ended and reported; where it cannot be contained it is not run."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from nexus_ray.config.validators import SandboxConfig
from nexus_ray.errors import SynthesisError
from nexus_ray.synthesis import jail, sandbox
from nexus_ray.synthesis.jail import seccomp, view
from nexus_ray.synthesis.sandbox import Result, Sandbox, probe, require_sandbox

CONFIG = SandboxConfig(wall_seconds=20, memory_mb=128, work_mb=4, output_kb=64, processes=6)
SHORT = CONFIG.model_copy(update={"wall_seconds": 1.5})
SYSTEM_PYTHON = "/usr/bin/python3"
needs_isolation = pytest.mark.skipif(not probe().isolated, reason=f"no isolation here: {probe().reason}")


def as_me(program: str, tests: str = "", config: SandboxConfig = CONFIG) -> Result:
    return Sandbox(config).run(program, tests)


class AsNobody:
    """The supervisor under another user and, because that user must be able to read it, the system's interpreter."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, program: str, tests: str = "", config: SandboxConfig = CONFIG) -> Result:
        job = replace(Sandbox(config)._job(program, tests), python="", visible=[])
        load = jail._LOAD.rpartition("importlib.import_module")[0] + (
            "import io, json\nfrom nexus_ray.synthesis.jail import supervise, view\njob = json.load(sys.stdin)\n"
            "job.update(python=view.interpreter(), visible=view.visible_paths())\n"
            "sys.stdin = io.StringIO(json.dumps(job))\nsupervise.main()\n"
        )
        done = subprocess.run(
            [SYSTEM_PYTHON, "-I", "-S", "-c", load, str(self.folder / "nexus_ray")],
            input=json.dumps(asdict(job)).encode(),
            capture_output=True,
            env={},
            cwd="/",
            user=65534,
            group=65534,
            extra_groups=[],
            start_new_session=True,
            check=False,
        )
        assert done.stdout, done.stderr
        return Result(**json.loads(done.stdout))


@pytest.fixture(params=["as me", "as nobody"], scope="module")
def run(request: pytest.FixtureRequest) -> Iterator[object]:
    if not probe().isolated:
        pytest.skip(f"no isolation here: {probe().reason}")
    if request.param == "as me":
        yield as_me
        return
    if os.geteuid() != 0 or not os.path.exists(SYSTEM_PYTHON):
        pytest.skip("needs root, to become somebody else, and a system Python")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        target = Path(folder, "nexus_ray/synthesis/jail")
        shutil.copytree(Path(sandbox.__file__).parent / "jail", target, ignore=shutil.ignore_patterns("__pycache__"))
        yield AsNobody(Path(folder))


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs util-linux, to ask the system independently")
def test_isolation_is_there_where_the_system_allows_it() -> None:
    """Or a sandbox that is broken would only skip its tests."""
    allowed = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--net", "--ipc", "--fork", "true"], check=False
    )
    assert probe().isolated or allowed.returncode, probe().reason


def test_a_program_and_its_tests(run) -> None:
    program = "def add(a, b):\n    return a + b\n"
    good = run(program, "assert add(1, 2) == 3\nprint('so far', 'so good')")
    assert (good.outcome, good.reason, good.output) == ("passed", "", "so far so good\n")
    bad = run(program, "assert add(1, 2) == 4, 'wrong sum'")
    assert bad.outcome == "failed" and bad.output.endswith("AssertionError: wrong sum\n")
    assert 'File "tests.py", line 1' in bad.output and "assert add(1, 2) == 4" in bad.output
    assert "jail" not in bad.output and "<string>" not in bad.output


@pytest.mark.parametrize(
    ("tests", "outcome"),
    [
        ("def test_one():\n    assert f() == 1", "passed"),
        ("def test_one():\n    assert f() == 2", "failed"),
        ("import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(f(), 1)", "passed"),
        ("import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(f(), 2)", "failed"),
        ("from solution import f as g\nassert g() == 1", "passed"),
        ("import sys; sys.exit(0)", "failed"),
        ("import os; os._exit(0)", "failed"),
        ("raise KeyboardInterrupt", "failed"),
        ("def (", "failed"),
        ("import pydantic", "failed"),
        ("input()", "failed"),
        ("import sys; sys.stdout = None; sys.stderr.close()", "passed"),
    ],
)
@needs_isolation
def test_styles_of_tests(tests: str, outcome: str) -> None:
    assert (
        as_me("def f():\n    return 1\nif __name__ == '__main__':\n    raise SystemExit(3)", tests).outcome == outcome
    )


def test_fork_bomb(run) -> None:
    bomb = run("import os\nassert os.getpid() == 2\nwhile True: os.fork()", config=SHORT)
    assert bomb.outcome in ("failed", "timeout")  # the first refused fork raises in most of them
    counted = run(
        "import os, time\nn = 0\ntry:\n    while n < 50:\n        if os.fork() == 0: time.sleep(60)\n        n += 1\n"
        "finally:\n    print('children', n)"
    )
    assert counted.outcome == "failed" and "BlockingIOError" in counted.output
    assert "children 5" in counted.output and counted.reason == "5 processes left running, ended"
    threads = "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    assert "can't start new thread" in run(threads).output


def test_network(run) -> None:
    with as_listener() as port:
        result = run(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=5)")
        assert result.outcome == "failed" and "PermissionError" in result.output
    families = (
        "import socket\nfor family in range(1, 48):\n    try: socket.socket(family, socket.SOCK_DGRAM)\n"
        "    except OSError: continue\n    print('open', family)\n"
        "import asyncio\nasyncio.run(asyncio.sleep(0))"  # its loop needs a socket pair
    )
    only_unix = run(families)
    assert (only_unix.outcome, only_unix.output) == ("passed", "open 1\n")


class as_listener:
    """A port of this machine that accepts connections, so that a refusal is the sandbox's."""

    def __enter__(self) -> int:
        import socket

        self.socket = socket.create_server(("127.0.0.1", 0))
        socket.create_connection(self.socket.getsockname()).close()
        return int(self.socket.getsockname()[1])

    def __exit__(self, *_: object) -> None:
        self.socket.close()


def test_files_outside(run, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("whole")
    os.chmod(victim, 0o666)
    secrets = (str(victim), "/etc/shadow", "/etc/passwd", "/proc/1/environ", "/proc/self/status", "/sys/kernel")
    library = view.visible_paths()[-1][1]
    attempts = [(path, "r") for path in secrets]
    attempts += [(path, "w") for path in ("/new", "/etc/new", "/dev/new", f"{library}/new", str(victim))]
    program = (
        f"import errno, os\nfor path, mode in {attempts!r}:\n    try: open(path, mode)\n"
        "    except OSError as error: print(mode, errno.errorcode[error.errno])\n    else: print('opened', path)\n"
        "try: os.chmod(os.__file__, 0)\nexcept OSError as error: print('chmod', errno.errorcode[error.errno])\n"
        "print(*os.listdir('/'))"
    )
    *said, root, _ = run(program).output.split("\n")
    assert said == ["r ENOENT"] * 6 + ["w EROFS"] * 4 + ["w ENOENT", "chmod EROFS"]
    assert not set(root.split()) & {"old", "proc", "sys", "home", "var", "run", "boot", "bin", "work"}
    assert victim.read_text() == "whole"


def test_work_folder_is_empty_small_and_forgotten(run) -> None:
    program = "import os, tempfile\nassert os.listdir('.') == []\nopen('note', 'w').write('x')\n"
    assert (
        run(program + "assert tempfile.gettempdir() and os.listdir(tempfile.gettempdir()) == ['note']").outcome
        == "passed"
    )
    assert run(program).outcome == "passed"
    said = run(
        "def attempt(action):\n    try: action()\n    except OSError as error: print(error.strerror)\n"
        "def many(n, size):\n    for i in range(n): open(str(i), 'wb').write(bytes(size))\n"
        "attempt(lambda: open('large', 'wb').truncate(2**40))\n"
        "attempt(lambda: [open('large', 'w') for _ in range(1000)])\n"
        "attempt(lambda: many(20, 2**20))\nattempt(lambda: many(10**5, 0))"
    )
    full = "No space left on device"
    assert said.output.split("\n")[:4] == ["File too large", "Too many open files", full, full]


def test_endless_loop(run) -> None:
    for program in ("import time\ntime.sleep(100)",
                    "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
                    "    except (OSError, ValueError): pass\nwhile True: pass"):  # fmt: skip
        started = time.monotonic()
        result = run(program, config=SHORT)
        assert result.outcome == "timeout" and result.reason == "no end after 1.5 s"
        assert 1.5 <= result.seconds < 4 and time.monotonic() - started < 6


def test_memory_hog(run) -> None:
    alone = run("x = []\nwhile True: x.append(bytearray(2**22))")
    assert (alone.outcome, alone.reason) == ("memory", "an allocation was refused")
    together = (
        "import ctypes, os, time\nfor _ in range(5):\n    if os.fork() == 0:\n"
        "        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)\n        x = bytearray(b'x') * (60 * 2**20)\n"
        "        time.sleep(60)\ntime.sleep(60)"
    )
    several = run(together)
    assert several.outcome == "memory" and "128 allowed" in several.reason
    copies = "import os, time\nx = bytearray(b'x') * (60 * 2**20)\nfor _ in range(4): os.fork()\ntime.sleep(1)"
    shared = run(copies, config=CONFIG.model_copy(update={"processes": 20}))
    assert shared.outcome == "passed", "pages that processes share are counted once"
    hidden = run("import os\nos.memfd_create('x')")
    assert hidden.outcome == "failed" and "PermissionError" in hidden.output


def test_environment_descriptors_and_rights(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED_SECRET", "s3cret")
    leak = os.open("/etc/hostname", os.O_RDONLY)
    os.set_inheritable(leak, True)
    try:
        result = run(
            "import json, os, ctypes, socket\nopen_ones = []\nfor n in range(3, 1000):\n"
            "    try: os.fstat(n); open_ones.append(n)\n    except OSError: pass\n"
            "caps = (ctypes.c_uint32 * 6)()\n"
            "assert ctypes.CDLL(None).capget((ctypes.c_uint32 * 2)(0x20080522, 0), caps) == 0\n"
            "print(json.dumps([dict(os.environ), open_ones, list(caps), os.getuid(), socket.gethostname(), os.getpid(),"
            " os.read(0, 10).decode(), ctypes.CDLL(None).prctl(39, 0, 0, 0, 0)]))"
        )
    finally:
        os.close(leak)
    environment, descriptors, capabilities, user, host, pid, standard_input, no_new_privileges = json.loads(
        result.output
    )
    assert set(environment) <= {"PYTHONHASHSEED", "LC_CTYPE"}
    assert (descriptors, capabilities, standard_input, no_new_privileges) == ([], [0] * 6, "", 1)
    assert (user, host, pid) == (1000, "sandbox", 2)


def test_background_processes_end_with_the_program(run) -> None:
    token = f"left-behind-{os.getpid()}-{time.monotonic_ns()}"
    program = (
        "import os, sys, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        f"        os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(300)', {token!r}])\n"
        "    os._exit(0)\ntime.sleep(0.5)"
    )
    result = run(program)
    assert (result.outcome, result.reason) == ("passed", "1 process left running, ended")
    assert not running(token)


def running(token: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if token.encode() in path.read_bytes():
                found.append(str(path))
        except OSError:
            continue
    return found


def test_floods_are_cut(run) -> None:
    for program in ("while True: print('x' * 10000)", "import os\nos.fork()\nwhile True: os.write(1, b'x' * 99)"):
        started = time.monotonic()
        result = run(program)
        assert (result.outcome, result.reason) == ("killed", "printed more than 65536 bytes")
        assert len(result.output) <= 4096 and time.monotonic() - started < 10


def test_signals_reach_nobody_outside(run) -> None:
    program = (
        "import os, signal\nassert os.getpid() == 2, 'never outside'\n"
        "for pid in (os.getppid(), 1, -1, {me}):\n    for number in (2, 9, 15, 19):\n"
        "        try: os.kill(pid, number)\n        except ProcessLookupError: pass\nprint('done')"
    )
    result = run(program.format(me=os.getpid()))
    assert (result.outcome, result.output) == ("passed", "done\n")
    assert run("import os, signal\nos.kill(os.getpid(), 9)").reason == "ended by SIGKILL"
    assert run("import ctypes\nctypes.string_at(0)").reason == "ended by SIGSEGV"


@needs_isolation
@pytest.mark.skipif(platform.machine() not in seccomp.REFUSED, reason="another machine")
def test_the_filter_refuses_what_it_names() -> None:
    numbers = {**seccomp.REFUSED[platform.machine()], **seccomp.REFUSED_EVERYWHERE}
    program = (
        "import ctypes, json\nlibc = ctypes.CDLL(None, use_errno=True)\nsaid = {}\n"
        f"for name, number in {numbers!r}.items():\n"
        "    arguments = [ctypes.c_long(-1)] * 6\n"
        "    said[name] = libc.syscall(ctypes.c_long(number), *arguments), ctypes.get_errno()\n"
        "said['clone'] = libc.syscall(56, 0x10000000, 0, 0, 0, 0), ctypes.get_errno()\n"
        "said['clone3'] = libc.syscall(435, 0, 0), ctypes.get_errno()\nprint(json.dumps(said))"
    )
    said = json.loads(as_me(program).output)
    assert said.pop("clone3") == [-1, 38]
    assert {name for name, answer in said.items() if answer != [-1, 1]} == set()
    if platform.machine() == "x86_64":  # the x32 calls go by other numbers
        assert as_me("import ctypes\nctypes.CDLL(None).syscall(0x40000000 + 39)").reason == "ended by SIGSYS"


@needs_isolation
def test_order_of_sets_does_not_change_between_runs() -> None:
    assert len({as_me("print({str(n) for n in range(50)})").output for _ in range(3)}) == 1


@needs_isolation
def test_a_sandbox_dies_with_who_asked_for_it() -> None:
    token = f"orphan-{os.getpid()}-{time.monotonic_ns()}"
    program = (
        f"import os, sys\nos.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(99)', {token!r}])"
    )
    code = (
        "from nexus_ray.synthesis.sandbox import Sandbox\nfrom nexus_ray.config.validators import SandboxConfig\n"
        f"Sandbox(SandboxConfig(wall_seconds=90)).run({program!r})"
    )
    asker = subprocess.Popen([sys.executable, "-c", code], cwd=Path(sandbox.__file__).parents[2])
    wait_until(lambda: len(running(token)) == 2)  # its name stands in the asker's command line too
    asker.kill()
    asker.wait()
    wait_until(lambda: not running(token))


def wait_until(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@needs_isolation
def test_threads_may_share_a_sandbox() -> None:
    results: dict[int, Result] = {}
    shared = Sandbox(CONFIG)

    def one(number: int) -> None:
        results[number] = shared.run(f"print({number})", f"assert {number} % 2 == 0")

    threads = [threading.Thread(target=one, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [(results[n].outcome, results[n].output.split()[-1] != "") for n in range(4)] == [
        ("passed", True), ("failed", True), ("passed", True), ("failed", True)
    ]  # fmt: skip


def test_refuses_with_the_reason_where_namespaces_are_forbidden(tmp_path: Path) -> None:
    """In a process that may make no user namespace, nothing runs, and the reason says what is missing."""
    witness = tmp_path / "ran"
    program = f"open({str(witness)!r}, 'w')"
    code = (
        "import ctypes, struct\n"
        "from nexus_ray.synthesis.jail import linux, seccomp\n"
        "import platform\n"
        "linux._prctl('nnp', 38, 1)\n"
        "unshare = seccomp.REFUSED[platform.machine()]['unshare']\n"
        "parts = [(0x20, 0, 0, 0), (0x15, 0, 1, unshare), (6, 0, 0, 0x00050001), (6, 0, 0, 0x7FFF0000)]\n"
        "linux.install_filter(b''.join(struct.pack('=HBBI', *part) for part in parts))\n"
        "from nexus_ray.synthesis.sandbox import Sandbox, SandboxConfig, SynthesisError, probe, require_sandbox\n"
        f"result = Sandbox().run({program!r})\n"
        "print(result.outcome, '|', result.reason, '|', probe().isolated)\n"
        "try: require_sandbox(SandboxConfig())\nexcept SynthesisError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(sandbox.__file__).parents[2], check=True
    )
    first, second = done.stdout.splitlines()
    assert first == "refused | [Errno 1] new user namespace: Operation not permitted | False"
    assert "cannot be isolated on this machine: [Errno 1] new user namespace" in second
    assert "isolation=none" in second and "container" in second
    assert not witness.exists()


def test_an_interpreter_that_cannot_start_is_refused_not_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    if not probe().isolated:
        pytest.skip("no isolation here")
    monkeypatch.setattr(view, "visible_paths", lambda: [[view.interpreter(), view.interpreter()]])
    result = as_me("print(1)")
    assert result.outcome == "refused" and "No such file" in result.reason


def test_without_isolation_only_on_demand_and_with_a_warning() -> None:
    with pytest.warns(RuntimeWarning, match="isolation=none"):
        open_sandbox = Sandbox(CONFIG.model_copy(update={"isolation": "none"}))
    assert open_sandbox.run("x = 1", "assert x == 1").outcome == "passed"
    assert open_sandbox.run("x = 1", "assert x == 2").outcome == "failed"
    assert open_sandbox.run("x = bytearray(2**30)").outcome == "memory"
    left = open_sandbox.run(
        "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'])"
    )
    assert left.outcome == "passed" and "1 process left" in left.reason
    short = SHORT.model_copy(update={"isolation": "none"})
    with pytest.warns(RuntimeWarning):
        assert Sandbox(short).run("while True: pass").outcome == "timeout"


def test_require_sandbox_is_quiet_where_there_is_one() -> None:
    if probe().isolated:
        assert require_sandbox(CONFIG).config == CONFIG
    else:
        with pytest.raises(SynthesisError):
            require_sandbox(CONFIG)
