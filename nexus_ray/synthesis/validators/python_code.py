"""Whether the Python code in an answer passes its tests, in the sandbox."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

from nexus_ray.config.validators import PythonCodeConfig
from nexus_ray.errors import SynthesisError
from nexus_ray.synthesis.rows import Row, Verdict
from nexus_ray.synthesis.sandbox import Result, require_sandbox

_BLOCK = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
_PYTHON = ("python", "py", "python3", "")
_ERROR = re.compile(r"^(?:[\w.]+\.)?([A-Z]\w*(?:Error|Exception|Interrupt|Exit|Warning|Iteration))\b", re.MULTILINE)


@dataclass(frozen=True)
class Code:
    """The code of an answer, parted into what is tested and what tests it."""

    program: str
    tests: str
    checks: int
    """Assertions in both that compute something: `assert True` is none."""


def extract(text: str) -> Code | None:
    """The Python blocks of an answer; None if it has none. Blocks that hold nothing but checks are the tests.

    A block without a language counts if it is Python. Raises SyntaxError for a block that says it is and is not.
    """
    program: list[str] = []
    tests: list[str] = []
    checks = 0
    for language, body in _BLOCK.findall(text):
        if language.casefold() not in _PYTHON:
            continue
        try:
            tree = ast.parse(body)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            if language:
                raise SyntaxError("a Python block does not parse") from None
            continue
        checks += count_checks(tree)
        (tests if program and _only_checks(tree) else program).append(body)
    return Code("\n".join(program), "\n".join(tests), checks) if program else None


def count_checks(tree: ast.AST) -> int:
    """Assertions and unittest's `self.assert...` calls that depend on more than constants."""
    found = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            found += not _constant(node.test)
        elif (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.startswith("assert")
        ):
            found += any(not _constant(argument) for argument in node.args)
    return found


def _constant(node: ast.expr) -> bool:
    return not any(isinstance(part, ast.Name | ast.Call | ast.Attribute) for part in ast.walk(node))


def _only_checks(tree: ast.Module) -> bool:
    """Whether a block is made of assertions, test functions and test cases, with what those need."""
    kinds = [_kind(node) for node in tree.body]
    return "check" in kinds and "code" not in kinds


def _kind(node: ast.stmt) -> str:
    if isinstance(node, ast.Assert):
        return "check"
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
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
        checks = code.checks + (_count_given(given) if given else 0)
        if not checks and self.config.without_tests != "run":
            return Verdict(self.config.without_tests, "python_code: no test", {"python_code.checks": 0.0})
        tests = f"{code.tests}\n{given}" if given else code.tests
        return _verdict(self.sandbox.run(code.program, tests), checks)


def _count_given(tests: str) -> int:
    try:
        return count_checks(ast.parse(tests))
    except SyntaxError as error:
        raise SynthesisError(
            f"python_code: the tests given with a prompt do not parse (line {error.lineno}); mend the parameter that "
            f"`tests` names"
        ) from None


def _verdict(result: Result, checks: int) -> Verdict:
    """Nothing that varies from run to run goes into it: a row's record must come out the same when it is run again."""
    scores = {"python_code.checks": float(checks)}
    if result.outcome == "refused":
        raise SynthesisError(f"python_code: the sandbox refused to run a program: {result.reason}")
    if result.outcome == "passed":
        return Verdict("pass", scores=scores)
    named = _ERROR.findall(result.output) if result.outcome == "failed" else []
    return Verdict("reject", f"python_code: {result.outcome}{f': {named[-1]}' if named else ''}", scores)
