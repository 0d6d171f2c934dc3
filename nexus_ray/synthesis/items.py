"""From an answer to its rows: one, or several told apart strictly.

Invariant: an answer gives exactly the rows that were asked for, or none. Parsers that zip parallel lists, or keep what
they can, pair questions with the answers of others as soon as a model leaves one out (InstructLab's `_parse`); so a
wrong count, a missing part or text between the parts rejects the answer as a whole, with its reason. A rejected answer
is kept as one row.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nexus_ray.config.prompts import ItemsConfig
from nexus_ray.synthesis.rows import PASS, Answer, Request, Row, Verdict
from nexus_ray.synthesis.template import Template

_NUMBER = re.compile(r"^[ \t]{0,3}(\d{1,4})[.)](?:[ \t]+|$)", re.MULTILINE)
_FENCE = re.compile(r"```(?:json|JSON)?[ \t]*\n(.*)\n[ \t]*```", re.DOTALL)


class _Misfit(Exception):
    """Why an answer is not what was asked for."""


@dataclass(frozen=True)
class Parsed:
    """Rows of one answer and what was said of it as a whole."""

    rows: tuple[Row, ...]
    verdict: Verdict
    """`pass`; or `reject`, and then `rows` is the whole answer as one row."""


class ItemParser:
    """Takes answers apart as `config` says. Raises ConfigError if `items.text` is no template over the fields."""

    def __init__(self, config: ItemsConfig) -> None:
        self.config = config
        text = config.text if config.text is not None else "\n".join(f"{{{{ {name} }}}}" for name in config.fields)
        self._template = Template(text, where="items.text", sizes=dict.fromkeys(config.fields))

    def parse(self, request: Request, answer: Answer, *, domain: str = "") -> Parsed:
        """The answer's rows, numbered in its order."""
        try:
            if self.config.format != "one" and answer.finish_reason != "stop":
                raise _Misfit(f"cut off (finish reason {answer.finish_reason}), so its last item may be torn")
            texts, verdict = self.split(answer.text), PASS
        except _Misfit as misfit:
            whole = answer.text.encode(errors="backslashreplace").decode()
            texts, verdict = [whole], Verdict("reject", f"items: {misfit}")
        rows = (
            Row(text, answer.request_id, item, request.prompt, answer.finish_reason, domain)
            for item, text in enumerate(texts)
        )
        return Parsed(tuple(rows), verdict)

    def split(self, text: str) -> list[str]:
        """`count` texts, none of them empty. Raises an exception whose text is the reason, as `parse` reports it."""
        if self.config.format == "one":
            return _checked([text.strip()], 1)
        if self.config.format == "numbered":
            return _checked(_numbered(text), self.config.count)
        if self.config.format == "tags":
            found: Sequence[Any] = _tagged(text, self.config.fields or ["item"])
        else:
            found = _array(text)
        if self.config.fields:
            return _checked([self._joined(place, item) for place, item in enumerate(found, 1)], self.config.count)
        texts = [item["item"] if self.config.format == "tags" else item for item in found]
        wrong = next((place for place, item in enumerate(texts, 1) if not isinstance(item, str)), None)
        if wrong is not None:
            raise _Misfit(f"item {wrong} is no text")
        return _checked([item.strip() for item in texts], self.config.count)

    def _joined(self, place: int, item: object) -> str:
        fields = self.config.fields
        if not isinstance(item, Mapping):
            raise _Misfit(f"item {place} is no object with {', '.join(fields)}")
        if set(item) != set(fields):
            missing, extra = sorted(set(fields) - set(item)), len(set(item) - set(fields))
            raise _Misfit(
                f"item {place} " + (f"lacks {', '.join(missing)}" if missing else f"has {extra} keys too many")
            )
        values = {}
        for name in fields:
            if not isinstance(item[name], str) or not item[name].strip():
                raise _Misfit(f"item {place} has no text as {name}")
            values[name] = item[name].strip()
        return self._template.render(values, limit=sys.maxsize).strip()


def _checked(items: list[str], count: int) -> list[str]:
    if len(items) != count:
        raise _Misfit(f"{len(items)} items, not {count}")
    for place, item in enumerate(items, 1):
        if not item:
            raise _Misfit("empty" if count == 1 else f"item {place} is empty")
        if any("\ud800" <= letter <= "\udfff" for letter in item):
            raise _Misfit(f"item {place} holds half a surrogate pair, which is no text")
    return items


def _numbered(text: str) -> list[str]:
    """Items of a list numbered 1, 2, 3 ... at line starts; an item may have several lines."""
    marks = list(_NUMBER.finditer(text))
    if not marks:
        raise _Misfit("no numbered list")
    if text[: marks[0].start()].strip():
        raise _Misfit("text before the first item")
    for place, mark in enumerate(marks, 1):
        if int(mark[1]) != place:
            raise _Misfit(f"number {int(mark[1])} stands where {place} should")
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [text[mark.end() : end].strip() for mark, end in zip(marks, ends, strict=True)]


def _array(text: str) -> list[object]:
    """A JSON array, alone or as the only content of a code fence."""
    text = text.strip()
    fence = _FENCE.fullmatch(text)
    try:
        found = json.loads(fence[1] if fence else text, object_pairs_hook=_object, parse_constant=_no_constant)
    except RecursionError:
        raise _Misfit("nested too deep") from None
    except ValueError:
        raise _Misfit("no JSON") from None
    if not isinstance(found, list):
        raise _Misfit("no JSON array")
    return found


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise _Misfit("an object has a key twice")
    return dict(pairs)


def _no_constant(name: str) -> object:
    raise _Misfit(f"{name} is no JSON")


def _tagged(text: str, names: Sequence[str]) -> list[dict[str, str]]:
    """Items as runs of `<name>...</name>` in the order of `names`, with nothing but white space between them."""
    items: list[dict[str, str]] = []
    expected, opened, last = 0, None, 0
    for tag in re.finditer(rf"<(/?)({'|'.join(names)})>", text):
        between, name = text[last : tag.start()], tag[2]
        place = len(items) + (expected == 0 and not tag[1])
        if tag[1]:
            if opened != name:
                raise _Misfit(f"item {max(1, place)}: </{name}> closes what is not open")
            items[-1][name] = between.strip()
            opened, expected = None, (expected + 1) % len(names)
        else:
            if opened is not None:
                raise _Misfit(f"item {len(items)}: <{name}> stands inside <{opened}>")
            if between.strip():
                raise _Misfit(f"text outside the tags before item {place}")
            if name != names[expected]:
                raise _Misfit(f"item {max(1, place)}: <{name}> stands where <{names[expected]}> should")
            if expected == 0:
                items.append({})
            opened = name
        last = tag.end()
    if opened is not None or expected:
        raise _Misfit(f"item {len(items)}: <{opened or names[expected]}> is " + ("not closed" if opened else "missing"))
    if not items:
        raise _Misfit("no tags")
    if text[last:].strip():
        raise _Misfit("text after the last item")
    return items
