"""Code in answers: what is taken for code and for tests, and what running it says."""

from __future__ import annotations

import ast

import pytest

from nexus_ray.config.validators import PythonCodeConfig, SandboxConfig
from nexus_ray.errors import SynthesisError
from nexus_ray.synthesis.jail import driver
from nexus_ray.synthesis.rows import Prompt, Row
from nexus_ray.synthesis.sandbox import probe
from nexus_ray.synthesis.validators.python_code import PythonCode, count_checks, extract

ADD = "Here it is:\n```python\ndef add(a, b):\n    return a + b\n```\n"
BROKEN = ADD.replace("+ b", "- b")
needs_isolation = pytest.mark.skipif(not probe().isolated, reason=f"no isolation here: {probe().reason}")


def row(text: str, tests: str = "") -> Row:
    return Row(text, "r", 0, Prompt("Write it.", parameters={"tests": tests} if tests else {}))


def fenced(body: str, language: str = "python") -> str:
    return f"And its tests:\n```{language}\n{body}\n```\nDone."


def config(**values: object) -> PythonCodeConfig:
    return PythonCodeConfig(sandbox=SandboxConfig(wall_seconds=20, memory_mb=128), **values)


RIGHT = (
    (ADD + fenced("assert add(1, 2) == 3"), ""),
    (ADD, "assert add(1, 2) == 3"),
    (ADD, "def test_add():\n    assert add(2, 2) == 4"),
    (ADD + fenced("import unittest\nclass TestAdd(unittest.TestCase):\n    def test(self):\n"
                 "        self.assertEqual(add(1, 1), 2)\nif __name__ == '__main__':\n    unittest.main()"), ""),
    ("```py\nimport math\ndef f(x):\n    return math.isqrt(x)\nassert f(9) == 3\n```", ""),
    ("1. Like so:\n   ```python\n   x = 1\n   ```\n".replace("   x", "x") + "```python\nassert x == 1\n```", ""),
    ("```\n$ pip install nothing\n```\n" + ADD, "assert add(0, 0) == 0"),
    ("```bash\nrm -rf /\n```\n" + ADD, "assert add(0, 0) == 0"),
)  # fmt: skip
WRONG = (
    (BROKEN + fenced("assert add(1, 2) == 3"), "", "python_code: failed: AssertionError"),
    (BROKEN, "assert add(1, 2) == 3", "python_code: failed: AssertionError"),
    (ADD, "assert mul(1, 2) == 2", "python_code: failed: NameError"),
    (ADD + fenced("assert add(1, 2) == 3").replace("Done", "```python\nassert add(1, 1) == 3\n```"), "",
     "python_code: failed: AssertionError"),
    ("```python\nimport os\nos._exit(0)\n```", "assert add(1, 2) == 3", "python_code: failed"),
    ("```python\ndef add(a, b)\n    return a\n```", "assert add(1, 2) == 3",
     "python_code: a Python block does not parse"),
    ("No code here: def add(a, b): return a + b", "assert 1 == add(0, 1)", "python_code: no block of Python code"),
    ("```python\nopen('/etc/shadow')\n```", "assert id(1)", "python_code: failed: FileNotFoundError"),
    ("```python\nx = bytearray(2**30)\n```", "assert x", "python_code: memory"),
)  # fmt: skip


@needs_isolation
@pytest.mark.parametrize(("text", "given"), RIGHT, ids=range(len(RIGHT)))
def test_right_code_passes(text: str, given: str) -> None:
    verdict = PythonCode(config()).validate(row(text, given))
    assert (verdict.outcome, verdict.reason) == ("pass", "")
    assert verdict.scores["python_code.checks"] >= 1


@needs_isolation
@pytest.mark.parametrize(("text", "given", "reason"), WRONG, ids=range(len(WRONG)))
def test_wrong_code_is_rejected(text: str, given: str, reason: str) -> None:
    verdict = PythonCode(config()).validate(row(text, given))
    assert (verdict.outcome, verdict.reason) == ("reject", reason)


@needs_isolation
def test_code_without_tests() -> None:
    trivial = ADD + fenced("assert True\nassert 1 + 1 == 2")
    for policy, text, outcome in (
        ("flag", ADD, "flag"), ("reject", ADD, "reject"), ("run", ADD, "pass"), ("flag", trivial, "flag"),
        ("run", "```python\nadd(1)\n```", "reject"),
    ):  # fmt: skip
        assert PythonCode(config(without_tests=policy)).validate(row(text)).outcome == outcome


TESTED = (
    "if __name__ == '__main__':\n    assert add(2, 2) == 4",
    "def main():\n    assert add(2, 2) == 4\nif '__main__' == __name__:\n    import sys\n    sys.exit(main())",
    "class TestAdd:\n    def setup_method(self):\n        self.want = 4\n"
    "    def test_x(self):\n        assert add(2, 2) == self.want",
    "class TestAdd:\n    def setup_method(self, method):\n        self.want = 4\n"
    "    def test_x(self, a=2):\n        assert add(a, 2) == self.want",
    "class TestAdd:\n    async def test_x(self):\n        assert add(2, 2) == 4",
    "def test_add(a=2, *, b=2):\n    assert add(a, b) == 4",
    "async def test_add():\n    assert add(2, 2) == 4",
    "async def main():\n    assert add(2, 2) == 4\nimport asyncio\nif __name__ == '__main__':\n    asyncio.run(main())",
    "def check(got, want):\n    assert got == want\ncheck(add(2, 2), 4)",
    "def demonstrate():\n    got = add(2, 2)\n    assert got == 4\ndemonstrate()",
    "def run_all():\n    for a, want in ((2, 4),):\n        assert add(a, 2) == want\n    return True\nrun_all()",
    "import unittest\nclass Cases(unittest.TestCase):\n    def same(self, got, want):\n"
    "        self.assertEqual(got, want)\n    def test_add(self):\n        self.same(add(2, 2), 4)\n"
    "if __name__ == '__main__':\n    unittest.main()",
    "def test_add():\n    assert add(2, 2) == 4\nif __name__ == '__main__':\n    n = int(input())\n    assert n > 0",
)  # fmt: skip
UNTESTED = (
    "def check():\n    assert add(2, 2) == 4",
    "def test_add(fixture):\n    assert add(fixture, 2) == 4",
    "class Test:\n    def __init__(self, a):\n        self.a = a\n"
    "    def test_x(self):\n        assert add(self.a, 2) == 4",
    "def halve(a):\n    assert isinstance(a, int)\n    return a / 2\nprint(halve(add(2, 2)))",
    "def halve(a):\n    check_number(a)\n    return a / 2\n"
    "def check_number(a):\n    assert a >= 0\nprint(halve(add(2, 2)))",
    "class Stack:\n    def push(self, x):\n        self.assert_valid(x)\n        assert x.room > 2\n"
    "    def assert_valid(self, x):\n        assert x\nStack().push(type('X', (), {'room': add(9, 9) + 9}))",
    "def total(xs):\n    s = sum(xs)\n    assert s >= 0\n    return s\n"
    "if __name__ == '__main__':\n    print(total([1]))",
    "assert (add(2, 2) == 4, 'always true')",
    "if 0:\n    assert add(2, 2) == 4",
    "try:\n    assert add(2, 2) == 5\nexcept AssertionError:\n    print('FAIL')",
)  # fmt: skip


@needs_isolation
@pytest.mark.parametrize("tests", TESTED, ids=range(len(TESTED)))
def test_checks_run_wherever_they_stand(tests: str) -> None:
    """Each is run (so that wrong code is found) and counted."""
    validator = PythonCode(config())
    right, wrong = (validator.validate(row(code.replace("```\n", f"{tests}\n```\n"))) for code in (ADD, BROKEN))
    assert (right.outcome, right.scores) == ("pass", {"python_code.checks": 1.0})
    assert (wrong.outcome, wrong.reason) == ("reject", "python_code: failed: AssertionError")
    assert validator.validate(row(ADD + fenced(tests))).scores == right.scores, "in a block of its own too"
    assert validator.validate(row(ADD, tests)).scores == right.scores, "given with the prompt too"


@needs_isolation
@pytest.mark.parametrize("tests", UNTESTED, ids=range(len(UNTESTED)))
def test_checks_that_do_not_run_or_do_not_test_are_none(tests: str) -> None:
    text = ADD.replace("```\n", f"{tests}\n```\n")
    verdict = PythonCode(config()).validate(row(text))
    assert (verdict.outcome, verdict.scores) == ("flag", {"python_code.checks": 0.0})
    assert verdict.reason in ("python_code: no test", "python_code: no test ran")
    assert PythonCode(config(without_tests="reject")).validate(row(text)).outcome == "reject"
    assert PythonCode(config(without_tests="run")).validate(row(text)).outcome == "pass"


@needs_isolation
def test_the_count_is_the_drivers_not_the_programs() -> None:
    printed = ADD.replace("```\n", "import atexit\nprint('checks 7')\natexit.register(print, 'checks 8')\n```\n")
    assert PythonCode(config(without_tests="run")).validate(row(printed)).scores == {"python_code.checks": 0.0}
    loop = "for a in range(5):\n    assert add(a, 0) == a\nassert add(1, 1) == 2"
    assert PythonCode(config()).validate(row(printed, loop)).scores == {"python_code.checks": 2.0}


@needs_isolation
def test_a_program_that_replaces_what_counts_ends_no_job() -> None:
    bent = ADD.replace("```\n", "import builtins\nbuiltins.len = lambda x: 'many'\n```\n")
    verdict = PythonCode(config()).validate(row(bent, "assert add(1, 1) == 2"))
    assert verdict.outcome == "pass" and verdict.scores == {"python_code.checks": 1.0}


@needs_isolation
def test_an_abstract_test_class_is_not_made() -> None:
    tests = (
        "from abc import ABC, abstractmethod\nclass TestBase(ABC):\n    @abstractmethod\n    def make(self): ...\n"
        "    def test_it(self):\n        assert self.make() == 4\n"
        "class TestAdd(TestBase):\n    def make(self):\n        return add(2, 2)"
    )
    assert PythonCode(config()).validate(row(ADD, tests)).scores == {"python_code.checks": 1.0}


def test_each_function_is_looked_through_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not for each of its checks: a long answer would take minutes."""
    looked: list[str] = []
    found = driver._is_helper

    def counted(function: driver.Function, solution: set[str]) -> bool:
        looked.append(function.name)
        return found(function, solution)

    monkeypatch.setattr(driver, "_is_helper", counted)
    assert count_checks(ast.parse("def check_all():\n" + "    assert add(1, 1) == 2\n" * 500)) == 500
    assert looked == ["check_all"]


@needs_isolation
def test_a_guard_without_checks_is_not_run() -> None:
    text = ADD.replace("```\n", "if __name__ == '__main__':\n    raise SystemExit(3)\n```\n")
    assert PythonCode(config()).validate(row(text, "assert add(2, 2) == 4")).outcome == "pass"


@needs_isolation
def test_two_runs_leave_the_same_record() -> None:
    validator = PythonCode(config())
    text = "```python\nimport os\nfor _ in range(3): os.fork()\nassert os.getpid() < 0\n```"
    assert validator.validate(row(text)) == validator.validate(row(text))


@needs_isolation
def test_tests_that_do_not_parse_are_nobodys_fault_but_the_prompts() -> None:
    with pytest.raises(SynthesisError, match=r"do not parse \(line 1\)") as error:
        PythonCode(config()).validate(row(ADD, "assert planted("))
    assert "planted" not in str(error.value)


def test_parts_of_an_answer() -> None:
    code = extract(ADD + fenced("import pytest\nCASES = [1, 2]\nfor c in CASES:\n    assert add(c, 0) == c"))
    assert code is not None
    assert code.program.startswith("def add") and code.tests.startswith("import pytest") and code.checks == 1
    both = extract("```python\ndef f(): return 1\nassert f() == 1\n```")
    assert both is not None and (both.tests, both.checks) == ("", 1)
    assert extract("```json\n{}\n```") is None


def test_checks_are_those_that_compute() -> None:
    source = "assert True\nassert 1 == 1\nassert f()\nself.assertEqual(f(), 2)\nself.assertTrue(1)\nx.y == 2"
    assert count_checks(ast.parse(source)) == 2
