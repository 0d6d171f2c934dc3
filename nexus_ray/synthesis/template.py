"""Prompt templates: the part of Jinja that fills words into text, and no more.

Templates come from recipe files that people exchange, so they are treated as foreign: they are checked node by node
against a list of what is allowed (variables, conditions, loops over a list, a few filters), and then run in Jinja's
immutable sandbox without loader, globals or random filters. Invariant: what is rendered depends on the values alone,
and its cost is bounded by the template's own length and the number of values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache

import jinja2
from jinja2 import meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nexus_ray.errors import ConfigError

MAX_TEMPLATE_CHARACTERS = 100_000
MAX_LOOP_DEPTH = 2
FILTERS = ("capitalize", "first", "join", "last", "length", "lower", "title", "trim", "upper")
_LIST_FILTERS = ("first", "join", "last", "length")
_LOOP_FIELDS = ("first", "last", "index", "index0", "length")
_COMPARISONS = ("eq", "ne", "in", "notin")
_ALLOWED = (
    nodes.Template, nodes.Output, nodes.TemplateData, nodes.If, nodes.For, nodes.Name, nodes.Const, nodes.Concat,
    nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.CondExpr, nodes.Filter, nodes.Getitem,
    nodes.Getattr, nodes.List, nodes.Tuple,
)  # fmt: skip

Value = str | Sequence[str]


class Template:
    """A checked template over variables that are each one text, or a list of `sizes[name]` texts.

    `where` names it in errors (`messages.1.content`).

    Raises:
        ConfigError: it is no template, uses more than is allowed, or names a variable that does not exist.
    """

    def __init__(self, text: str, *, where: str, sizes: Mapping[str, int | None]) -> None:
        self.where = where
        if len(text) > MAX_TEMPLATE_CHARACTERS:
            raise ConfigError(
                f"{where} has {len(text)} characters, more than {MAX_TEMPLATE_CHARACTERS}; shorten it, or hand long "
                "text in through `documents`"
            )
        try:
            tree = environment().parse(text)
            _Check(where, sizes).visit(tree, frozenset(), 0)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"{where}, line {error.lineno}: {error.message}; filters are {', '.join(FILTERS)}"
            ) from None
        except RecursionError:
            raise ConfigError(f"{where} is nested too deep; take it apart") from None
        self.names = frozenset(meta.find_undeclared_variables(tree))
        unknown = sorted(self.names - set(sizes))
        if unknown:
            known = ", ".join(sorted(sizes)) or "none"
            raise ConfigError(f"{where} uses {unknown[0]!r}, which does not exist; variables are: {known}")
        self._template = environment().from_string(tree)

    def render(self, values: Mapping[str, Value], *, limit: int) -> str:
        """The text for these values. Raises ConfigError if it is longer than `limit` characters or cannot be made."""
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._template.generate(dict(values)):
                length += len(piece)
                if length > limit:
                    raise ConfigError(
                        f"{self.where} renders to more than {limit} characters; raise max_characters, or lower "
                        "documents.max_bytes"
                    )
                pieces.append(piece)
        except (jinja2.TemplateError, TypeError) as error:
            raise ConfigError(
                f"{self.where} cannot be rendered ({type(error).__name__}); mend its expressions"
            ) from None
        return "".join(pieces)


@cache
def environment() -> ImmutableSandboxedEnvironment:
    """The sandbox all templates share: no loader (so no files), no globals, the filters of `FILTERS`, no tests."""
    made = ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    made.globals.clear()
    made.tests.clear()
    made.filters = {name: made.filters[name] for name in FILTERS}
    return made


class _Check:
    """Walks a syntax tree and refuses what is not on the lists."""

    def __init__(self, where: str, sizes: Mapping[str, int | None]) -> None:
        self.where = where
        self.sizes = sizes

    def visit(self, node: nodes.Node, texts: frozenset[str], depth: int) -> None:
        """`texts`: loop variables in sight, each one text; `depth`: loops around this node."""
        if not isinstance(node, _ALLOWED):
            raise self._refused(node, f"{type(node).__name__.lower()} is not allowed in a prompt template")
        for problem in self._problems(node, texts, depth):
            raise self._refused(node, problem)
        if isinstance(node, nodes.For):
            assert isinstance(node.target, nodes.Name)
            texts, depth = texts | {node.target.name}, depth + 1
        for child in node.iter_child_nodes():
            self.visit(child, texts, depth)

    def _is_list(self, node: nodes.Node, texts: frozenset[str]) -> bool:
        return isinstance(node, nodes.Name) and node.name not in texts and self.sizes.get(node.name) is not None

    def _problems(self, node: nodes.Node, texts: frozenset[str], depth: int) -> Iterator[str]:
        if isinstance(node, nodes.For):
            if not self._is_list(node.iter, texts) or not isinstance(node.target, nodes.Name) or node.recursive:
                yield "a loop goes over a parameter with `choose`: {% for x in parameter %}"
            elif depth >= MAX_LOOP_DEPTH:
                yield f"loops stand more than {MAX_LOOP_DEPTH} deep"
        elif isinstance(node, nodes.Getattr):
            inside_loop = isinstance(node.node, nodes.Name) and node.node.name == "loop" and depth > 0
            if not inside_loop or node.attr not in _LOOP_FIELDS:
                yield f"attributes are not allowed, only loop.{', loop.'.join(_LOOP_FIELDS)} inside a loop"
        elif isinstance(node, nodes.Getitem):
            place = node.arg.value if isinstance(node.arg, nodes.Const) else None
            size = (self.sizes[node.node.name] or 0) if self._is_list(node.node, texts) else 0  # type: ignore[attr-defined]
            if type(place) is not int or not 0 <= place < size:
                yield "[n] takes one of a parameter with `choose`, counted from 0"
        elif isinstance(node, nodes.Filter):
            yield from self._filter_problems(node, texts)
        elif isinstance(node, nodes.Output | nodes.Concat):
            if any(self._is_list(part, texts) for part in node.nodes):
                yield "a list is written with join: {{ parameter | join(', ') }}"
        elif isinstance(node, nodes.Operand):
            if node.op not in _COMPARISONS:
                yield "texts are compared with ==, !=, in, not in"
        elif isinstance(node, nodes.CondExpr) and node.expr2 is None:
            yield "an inline `if` needs its `else`"

    def _filter_problems(self, node: nodes.Filter, texts: frozenset[str]) -> Iterator[str]:
        if node.node is None or node.name not in FILTERS:
            yield f"filters are {', '.join(FILTERS)}"
        elif node.kwargs or node.dyn_args or node.dyn_kwargs or any(not isinstance(a, nodes.Const) for a in node.args):
            yield f"the filter {node.name} takes fixed values only"
        elif self._is_list(node.node, texts) and node.name not in _LIST_FILTERS:
            yield f"the filter {node.name} changes one text; a list is written with join"

    def _refused(self, node: nodes.Node, problem: str) -> ConfigError:
        return ConfigError(f"{self.where}, line {node.lineno}: {problem}")
