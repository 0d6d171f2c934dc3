"""Runs inside the sandbox: a program, then its tests, in one module named `solution`, and counts the checks that held.

Its source is handed to a fresh interpreter as `-c`; standard input holds JSON `{program, tests, mark}`. The first
thing written is the mark, the last is the mark and one word: `passed`, `failed` or `memory`. If the tests begin with
`REPORT`, the line before `passed` says `checks N`. A program that ends the process early leaves no mark behind its
output, and so does not pass. This guards against accident; a program bent on forging the mark or the count
could read them from memory.

What a check is (`checks`): an assertion, or a call of a method `assert...`, that depends on more than constants. It
counts where it tests, not where it guards a function's input: at module level and under `if __name__ == "__main__"`; in
`main` and in functions and classes that are called tests; in another function only if that gives nothing back, calls
the solution or is called check, verify, assert or expect, and the check is about more than one of its parameters.
Methods `assert...` that the solution does not define count everywhere. A check in a loop is one.
"""

import ast
import builtins
import contextlib
import inspect
import json
import linecache
import os
import sys
import traceback
import types
from collections.abc import Iterable

Check = ast.Assert | ast.Call
Function = ast.FunctionDef | ast.AsyncFunctionDef
REPORT = "# report checks\n"
"""First line of tests whose driver is to say how many checks held."""
_SEEN = "__check_held__"
"""Built-in name that a program's checks call with their number when they have held."""
_HELPERS = ("check", "verify", "assert", "expect")
_BUILTIN = frozenset(dir(builtins))


def checks(*trees: ast.AST) -> list[Check]:
    """The checks in the modules of one solution, as the head of this module defines them, in no special order."""
    solution = _names(trees)
    own = {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, Function)}
    helpers: dict[int, bool] = {}
    found: list[Check] = []
    todo: list[tuple[ast.AST, tuple[Function | ast.ClassDef, ...]]] = [(tree, ()) for tree in trees]
    while todo:  # without recursion, which a long sum would exhaust
        node, within = todo.pop()
        if isinstance(node, ast.Assert):
            says = not isinstance(node.test, ast.Tuple) and not constant(node.test)
            if says and _tests(node.test, within, solution, helpers):
                found.append(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = node.func.attr
            if name.startswith("assert") and name not in own and not all(map(constant, node.args)):
                found.append(node)
        elif isinstance(node, Function | ast.ClassDef):
            within = (*within, node)
        todo += [(child, within) for child in ast.iter_child_nodes(node)]
    return found


def constant(node: ast.expr) -> bool:
    """Whether no name occurs in it: an assertion of it says nothing."""
    return not any(isinstance(part, ast.Name | ast.Call | ast.Attribute) for part in ast.walk(node))


def _names(trees: Iterable[ast.AST]) -> set[str]:
    """Functions and classes that a solution defines, under all names that its tests give them."""
    names = {"solution"}
    for tree in trees:
        for node in ast.iter_child_nodes(tree):
            if isinstance(node, Function | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.ImportFrom) and node.module == "solution":
                names.update(alias.asname or alias.name for alias in node.names)
    return names


def _tests(
    test: ast.expr, within: tuple[Function | ast.ClassDef, ...], solution: set[str], helpers: dict[int, bool]
) -> bool:
    """Whether an assertion inside these definitions tests the solution, and not the input of a function. `helpers`
    keeps what was found out of each function, by `id`."""
    functions = [node for node in within if isinstance(node, Function)]
    if not functions or any(_is_test(node.name) for node in within):
        return True
    inner = functions[-1]
    arguments = inner.args
    own = {one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
    about = {part.id for part in ast.walk(test) if isinstance(part, ast.Name)} - _BUILTIN
    if id(inner) not in helpers:
        helpers[id(inner)] = _is_helper(inner, solution)
    return helpers[id(inner)] and (len(about) > 1 or not about <= own)


def _is_test(name: str) -> bool:
    name = name.casefold()
    return name.startswith("test") or name == "main" or bool({"test", "tests"} & set(name.split("_")))


def _is_helper(function: Function, solution: set[str]) -> bool:
    parts = list(ast.walk(function))
    if any(isinstance(part, ast.Yield | ast.YieldFrom) for part in parts):
        return False
    if any(isinstance(part, ast.Return) and part.value and not constant(part.value) for part in parts):
        return False
    called = {_root(part.func) for part in parts if isinstance(part, ast.Call)}
    return function.name.lstrip("_").startswith(_HELPERS) or bool(called & (solution - {function.name}))


def _root(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


class _Solution:
    """A program and its tests, in one module, their checks numbered and counted."""

    def __init__(self, program: str, tests: str) -> None:
        """Raises SyntaxError."""
        self.module = types.ModuleType("solution")
        sys.modules["solution"] = self.module
        self.held: set[int] = set()
        """Numbers of the checks that have held."""
        self.count = self.held.__len__  # bound before the program can replace `len`
        self.parts = {file: _parsed(text, file) for file, text in (("solution.py", program), ("tests.py", tests))}
        found = checks(*self.parts.values())
        self.numbers = {id(check): number for number, check in enumerate(found)}
        for number, check in enumerate(found):
            _watch(check, number)
        setattr(builtins, _SEEN, self._seen)

    def _seen(self, number: int, value: object = True) -> object:
        self.held.add(number)
        return value

    def run(self) -> None:
        """Raises whatever the program raises."""
        for file, tree in self.parts.items():
            exec(compile(tree, file, "exec"), self.module.__dict__)
        self._run_functions(vars(self.module))
        for name, value in list(vars(self.module).items()):
            if name.startswith("Test") and isinstance(value, type) and value.__module__ == "solution":
                self._run_class(value)
        self._run_cases()
        for file, tree in self.parts.items():
            for guard in tree.body:
                if isinstance(guard, ast.If) and _is_main(guard.test) and self._reached(guard.body) - self.held:
                    self._run_guard(guard.body, file)

    def _run_functions(self, names: dict[str, object]) -> None:
        """Functions `test...` that need no argument."""
        for name, value in list(names.items()):
            if name.startswith("test") and isinstance(value, types.FunctionType) and value.__module__ == "solution":
                _call(value)

    def _run_class(self, cls: type) -> None:
        """Methods `test...` of a class in pytest's manner, each on an object of its own; unittest's have `__init__`."""
        plain = getattr(cls, "__init__") is object.__init__  # noqa: B009  (the type checker warns of subclasses)
        if not plain or inspect.isabstract(cls):
            return
        names = [name for name in dir(cls) if name.startswith("test") and callable(getattr(cls, name))]
        if names:
            _call_if_any(cls, "setup_class")
            for name in names:
                one = cls()
                _call_if_any(one, "setup_method", getattr(one, name))
                _call_if_any(one, name)
                _call_if_any(one, "teardown_method", getattr(one, name))
            _call_if_any(cls, "teardown_class")

    def _run_cases(self) -> None:
        if "unittest" in sys.modules:
            import unittest

            suite = unittest.defaultTestLoader.loadTestsFromModule(self.module)
            runner = unittest.TextTestRunner(sys.stdout, verbosity=0)
            if suite.countTestCases() and not runner.run(suite).wasSuccessful():
                raise AssertionError("unittest cases failed")

    def _reached(self, body: list[ast.stmt]) -> set[int]:
        """Numbers of the checks in these statements and in all functions and classes of the module that they name."""
        defined = {
            node.name: node
            for tree in self.parts.values()
            for node in tree.body
            if isinstance(node, Function | ast.ClassDef)
        }
        todo: list[ast.AST] = list(body)
        numbers: set[int] = set()
        while todo:
            for node in ast.walk(todo.pop()):
                if id(node) in self.numbers:
                    numbers.add(self.numbers[id(node)])
                elif isinstance(node, ast.Name) and node.id in defined:
                    todo.append(defined.pop(node.id))
        return numbers

    def _run_guard(self, body: list[ast.stmt], file: str) -> None:
        """What stands under `if __name__ == "__main__"`. To end the process with 0 is no failure, nor is to wait for
        input that does not come."""
        before = sys.modules["__main__"]
        sys.modules["__main__"] = self.module
        self.module.__name__ = "__main__"
        try:
            exec(compile(ast.Module(body, []), file, "exec"), self.module.__dict__)
        except EOFError:
            pass
        except SystemExit as end:
            if end.code not in (None, 0):
                raise
        finally:
            self.module.__name__ = "solution"
            sys.modules["__main__"] = before


def _parsed(text: str, file: str) -> ast.Module:
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    return ast.parse(text, file)


def _watch(check: Check, number: int) -> None:
    """Let a check report that it held: `assert x and seen(n)` for `assert x`, `seen(n, a.assertB(c))` for a call."""
    place = check.test if isinstance(check, ast.Assert) else check
    name = ast.copy_location(ast.Name(_SEEN, ast.Load()), place)
    argument = ast.copy_location(ast.Constant(number), place)
    if isinstance(check, ast.Assert):
        call = ast.copy_location(ast.Call(name, [argument], []), place)
        check.test = ast.copy_location(ast.BoolOp(ast.And(), [check.test, call]), place)
    else:
        inner = ast.copy_location(ast.Call(check.func, check.args, check.keywords), place)
        check.func, check.args, check.keywords = name, [argument, inner], []


def _is_main(test: ast.expr) -> bool:
    return isinstance(test, ast.Compare) and ast.unparse(test) in ("__name__ == '__main__'", "'__main__' == __name__")


def _call_if_any(owner: object, name: str, *arguments: object) -> None:
    method = getattr(owner, name, None)
    if isinstance(method, types.FunctionType | types.MethodType):
        _call(method, *arguments)


def _call(function: types.FunctionType | types.MethodType, *arguments: object) -> None:
    """Call a function, with these arguments if it needs them, and not if it needs others; run a coroutine."""
    plain = function.__func__ if isinstance(function, types.MethodType) else function
    if not isinstance(plain, types.FunctionType):
        return
    code = plain.__code__
    needed = code.co_argcount - len(plain.__defaults__ or ()) - isinstance(function, types.MethodType)
    if needed in (len(arguments), min(needed, 0)) and code.co_kwonlyargcount <= len(plain.__kwdefaults__ or {}):
        result = function(*arguments[: max(needed, 0)])
        if isinstance(result, types.CoroutineType):
            import asyncio

            asyncio.run(result)


def _outcome(program: str, tests: str) -> tuple[str, int]:
    """One word, and how many checks have held."""
    try:
        solution = _Solution(program, tests)
        solution.run()
    except MemoryError:
        return "memory", 0
    except BaseException as error:  # whatever it is, SystemExit too, it is the program's failure and is shown
        below = error.__traceback__.tb_next if error.__traceback__ else None
        traceback.print_exception(type(error), error, below.tb_next if below else None, limit=-8)
        return "failed", 0
    return "passed", solution.count()


def main() -> None:
    with open(0, encoding="utf-8", closefd=False) as stream:
        job = json.load(stream)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    os.write(1, f"{job['mark']}\n".encode())
    word, held = _outcome(job["program"], job["tests"])
    with contextlib.suppress(OSError, ValueError, AttributeError):  # the program may have closed or replaced it
        sys.stdout.flush()
    said = f"\nchecks {held}" if job["tests"].startswith(REPORT) and word == "passed" else ""
    os.write(1, f"{said}\n{job['mark']}{word}".encode())  # in one piece: no other process can write between
    os._exit(0)


if __name__ == "__main__":
    main()
