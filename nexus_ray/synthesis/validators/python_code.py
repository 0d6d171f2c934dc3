"""Whether the Python code in an answer passes its tests, in the sandbox; a test that never runs is none."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

from nexus_ray.config.validators import PythonCodeConfig
from nexus_ray.errors import SynthesisError
from nexus_ray.synthesis.jail.driver import REPORT, checks
from nexus_ray.synthesis.rows import Row, Verdict
from nexus_ray.synthesis.sandbox import Result, require_sandbox

_BLOCK = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
_HELD = re.compile(r"^checks (\d+)\s*\Z", re.MULTILINE)
_PYTHON = ("python", "py", "python3", "")
_ERROR = re.compile(r"^(?:[\w.]+\.)?([A-Z]\w*(?:Error|Exception|Interrupt|Exit|Warning|Iteration))\b", re.MULTILINE)


@dataclass(frozen=True)
class Code:
    """The code of an answer, parted into what is tested and what tests it."""

    program: str
    tests: str
    trees: tuple[ast.Module, ...]
    """Its blocks, parsed."""

    @property
    def checks(self) -> int:
        """Checks that are written in both: whether they run is not seen here."""
        return count_checks(*self.trees)


def extract(text: str) -> Code | None:
    """The Python blocks of an answer; None if it has none. Blocks that hold nothing but checks are the tests.

    A block without a language counts if it is Python. Raises SyntaxError for a block that says it is and is not.
    """
    program: list[str] = []
    tests: list[str] = []
    trees: list[ast.Module] = []
    for language, body in _BLOCK.findall(text):
        if language.casefold() not in _PYTHON:
            continue
        try:
            tree = ast.parse(body)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            if language:
                raise SyntaxError("a Python block does not parse") from None
            continue
        trees.append(tree)
        (tests if program and _only_checks(tree) else program).append(body)
    return Code("\n".join(program), "\n".join(tests), tuple(trees)) if program else None


def count_checks(*trees: ast.AST) -> int:
    """Assertions and unittest's `self.assert...` calls that test something; `jail.driver` says which those are."""
    return len(checks(*trees))


def _only_checks(tree: ast.Module) -> bool:
    """Whether a block is made of assertions, test functions and test cases, with what those need."""
    kinds = [_kind(node) for node in tree.body]
    return "check" in kinds and "code" not in kinds


def _kind(node: ast.stmt) -> str:
    if isinstance(node, ast.Assert):
        return "check"
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return "check" if node.name.casefold().startswith("test") else "code"
    if isinstance(node, ast.Import | ast.ImportFrom | ast.Assign | ast.Expr | ast.If | ast.For | ast.With | ast.Try):
        return "check" if count_checks(node) else "help"
    return "code"


class PythonCode:
    """Validator of rows that hold Python code."""

    def __init__(self, config: PythonCodeConfig | None = None) -> None:
        """Raises SynthesisError where programs cannot be isolated and the config demands it."""
        self.config = config or PythonCodeConfig()
        self.sandbox = require_sandbox(self.config.sandbox)

    def validate(self, row: Row) -> Verdict:
        """Raises SynthesisError if the sandbox refuses: the row is not to blame for the machine."""
        try:
            code = extract(row.text)
        except SyntaxError as error:
            return Verdict("reject", f"python_code: {error.msg}")
        if code is None:
            return Verdict("reject", "python_code: no block of Python code")
        given = row.prompt.parameters.get(self.config.tests, "")
        if not count_checks(*code.trees, _parsed(given)) and self.config.without_tests != "run":
            return self._untested("no test")
        return self._verdict(self.sandbox.run(code.program, f"{REPORT}{code.tests}\n{given}"))

    def _untested(self, reason: str) -> Verdict:
        outcome = "pass" if self.config.without_tests == "run" else self.config.without_tests
        return Verdict(outcome, "" if outcome == "pass" else f"python_code: {reason}", {"python_code.checks": 0.0})

    def _verdict(self, result: Result) -> Verdict:
        """The score is of checks that ran and held. Nothing that varies from run to run goes into a verdict: a row's
        record must come out the same when it is run again."""
        if result.outcome == "refused":
            raise SynthesisError(f"python_code: the sandbox refused to run a program: {result.reason}")
        if result.outcome == "passed":
            held = _HELD.search(result.output)
            if held is None:
                return Verdict("reject", "python_code: the count of its checks was overwritten")
            scores = {"python_code.checks": float(held[1])}
            return Verdict("pass", scores=scores) if int(held[1]) else self._untested("no test ran")
        named = _ERROR.findall(result.output) if result.outcome == "failed" else []
        return Verdict("reject", f"python_code: {result.outcome}{f': {named[-1]}' if named else ''}")


def _parsed(tests: str) -> ast.Module:
    try:
        return ast.parse(tests)
    except SyntaxError as error:
        raise SynthesisError(
            f"python_code: the tests given with a prompt do not parse (line {error.lineno}); mend the parameter that "
            f"`tests` names"
        ) from None
