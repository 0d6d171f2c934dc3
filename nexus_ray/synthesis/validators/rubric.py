"""What a judge is asked and how its reply is read: rubrics, the texts made of them, strict parsing."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from nexus_ray.config.methods import Section
from nexus_ray.config.source import read_yaml
from nexus_ray.config.validators import is_rubric_path
from nexus_ray.errors import ConfigError
from nexus_ray.synthesis.rows import content_id

DATA = Path(__file__).parent / "data"
_VERDICT = re.compile(r"VERDICT:\s*(\S+)\s*")
_PREFERENCE = re.compile(r"BETTER:\s*([12])\s*")


class Item(Section):
    """One answer to be judged."""

    source: str | None = Field(None, min_length=1)
    """The text it was written from, if the rubric looks at one."""
    question: str
    answer: str = Field(min_length=1)


class Example(Item):
    """An answer with its verdict, shown to the judge."""

    explanation: str = Field(min_length=1)
    verdict: str


class GoldenItem(Item):
    """An answer whose right verdict is known, never shown to the judge."""

    accept: bool


class Rubric(Section):
    """What a judge decides and by which words."""

    question: str = Field(min_length=1)
    levels: dict[str, str] = Field(min_length=2)
    """Verdict -> when it is due."""
    accept: list[str] = Field(min_length=1)
    """Verdicts that accept a row."""
    source: Literal["required", "none"] = "required"
    """`required`: an answer is held against the text it was written from; `none`: the judge sees request and answer
    alone, which is all there is to style and quality."""
    examples: list[Example] = Field(default_factory=list)

    @property
    def needs_source(self) -> bool:
        return self.source == "required"

    @model_validator(mode="after")
    def _known_levels(self) -> Rubric:
        unknown = {*self.accept, *(example.verdict for example in self.examples)} - set(self.levels)
        if unknown:
            raise ValueError(f"{sorted(unknown)} are no levels of the rubric ({list(self.levels)})")
        if set(self.levels) == set(self.accept):
            raise ValueError("a rubric that accepts every level decides nothing")
        if self.examples and {one.verdict in self.accept for one in self.examples} != {True, False}:
            raise ValueError("examples must show accepted and rejected answers, or the judge learns one verdict")
        wrong = [place for place, one in enumerate(self.examples) if (one.source is None) == self.needs_source]
        if wrong:
            raise ValueError(f"source={self.source} and examples {wrong} do not fit: give each a source, or none")
        return self


def load_rubric(name: str) -> Rubric:
    """A rubric of the package by name, or from a YAML file. Raises ConfigError naming what is wrong."""
    path = Path(name) if is_rubric_path(name) else DATA / f"{name}.yaml"
    if not is_rubric_path(name) and not path.exists():
        shipped = ", ".join(sorted(file.stem for file in DATA.glob("*.yaml")))
        raise ConfigError(
            f"validators.judge.rubric={name!r} is no rubric of the package ({shipped}); name one of them, or the path "
            f"of a YAML file (ending in .yaml)"
        )
    try:
        return Rubric(**read_yaml(path))
    except (ValidationError, TypeError) as error:
        raise ConfigError(f"validators.judge.rubric: {path}: {_first(error)}") from None


def load_golden(name: str) -> list[GoldenItem]:
    """The package's golden set (`default`), or a JSON-lines file. Raises ConfigError naming file and line."""
    path = DATA / "golden.jsonl" if name == "default" else Path(name)
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"validators.judge.golden: {path} cannot be read: {error}") from None
    adapter = TypeAdapter(GoldenItem)
    items = []
    for number, line in enumerate(lines, start=1):
        try:
            items.append(adapter.validate_python(json.loads(line)))
        except (ValidationError, ValueError) as error:
            raise ConfigError(f"validators.judge.golden: {path}, line {number}: {_first(error)}") from None
    if {item.accept for item in items} != {True, False}:
        raise ConfigError(f"validators.judge.golden: {path} needs items to accept and items to reject")
    return items


def rubric_fingerprint(rubric: Rubric) -> str:
    """Of all that a judge is told besides the answer: the rubric, and the wording around it."""
    item = Item(source="source" if rubric.needs_source else None, question="question", answer="answer")
    return content_id(
        "rubric", [rubric.model_dump(), ask_for_grade(rubric, item), ask_for_preference(rubric, item, "")]
    )


def golden_fingerprint(golden: Sequence[GoldenItem]) -> str:
    """Of a golden set's items, in their order."""
    return content_id("golden", [item.model_dump() for item in golden])


def _first(error: Exception) -> str:
    """Where and what, without the offending text."""
    if isinstance(error, ValidationError):
        fault = error.errors(include_input=False)[0]
        return f"{'.'.join(map(str, fault['loc'])) or 'item'}: {fault['msg']}"
    return type(error).__name__ if isinstance(error, json.JSONDecodeError) else str(error)


def ask_for_grade(rubric: Rubric, item: Item, *, examples: Sequence[Example] | None = None) -> str:
    """The prompt that asks for a verdict; `examples` instead of the rubric's own."""
    shown = rubric.examples if examples is None else examples
    levels = "\n".join(f"{name}: {meaning}" for name, meaning in rubric.levels.items())
    parts = [
        f"You judge an answer {_kind(rubric)}.\n\n{rubric.question}\n\n{levels}",
        f"First explain in one or two sentences. Then end with one line of its own:\nVERDICT: {_either(rubric)}",
    ]
    parts += [f"{_item(example)}\n{example.explanation}\nVERDICT: {example.verdict}" for example in shown]
    return "\n\n".join([*parts, _item(item)]) + "\n"


def ask_for_preference(rubric: Rubric, item: Item, other: str) -> str:
    """The prompt that asks which of two answers, the item's (1) or `other` (2), is better."""
    fence = _fence(item, other)
    return (
        f"You compare two answers {_kind(rubric, several=True)}.\n\n{rubric.question}\n\n"
        f"{_asked(item, fence)}\n{_block('ANSWER 1', item.answer, fence)}\n{_block('ANSWER 2', other, fence)}\n\n"
        "The order of the answers means nothing. First explain in one or two sentences. Then end with one line of its "
        "own:\nBETTER: 1 or 2\n"
    )


def _kind(rubric: Rubric, *, several: bool = False) -> str:
    if not rubric.needs_source:
        return "to a request"
    return f"that {'were' if several else 'was'} written from a source text"


def _either(rubric: Rubric) -> str:
    return " or ".join(rubric.levels)


def _item(item: Item) -> str:
    fence = _fence(item)
    return f"{_asked(item, fence)}\n{_block('ANSWER', item.answer, fence)}"


def _asked(item: Item, fence: str) -> str:
    """What was to be answered, and from what."""
    source = "" if item.source is None else f"{_block('SOURCE', item.source, fence)}\n"
    return f"{source}{_block('QUESTION', item.question, fence)}"


def _fence(item: Item, other: str = "") -> str:
    """A mark that the texts cannot contain by chance, so that an answer cannot close its own block."""
    return content_id("fence", [item.source, item.question, item.answer, other])[:8]


def _block(name: str, text: str, fence: str) -> str:
    return f"[{name} {fence}]\n{text}\n[END {fence}]"


def read_grade(rubric: Rubric, reply: str) -> str | None:
    """The level that the reply ends with; None unless its last line, and no other, is a verdict of the rubric."""
    found = _last_line(_VERDICT, reply)
    return found if found in rubric.levels else None


def read_preference(reply: str) -> int | None:
    """1 or 2, under the same rule."""
    found = _last_line(_PREFERENCE, reply)
    return int(found) if found else None


def _last_line(pattern: re.Pattern[str], reply: str) -> str | None:
    lines = [line.strip() for line in reply.strip().splitlines()]
    matches = [pattern.fullmatch(line) for line in lines]
    said = [match for match in matches if match]
    return said[0][1] if len(said) == 1 and matches[-1] else None
