"""The shape of a text: regular expressions, JSON, tags, markdown, and the chat manners that wrap what was asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator

from nexus_ray.config.filters import Form, FormatFilter
from nexus_ray.synthesis.filters.text import Item, Text, verdict
from nexus_ray.synthesis.rows import Verdict

_FENCED = re.compile(r"\s*```(?:json)?[ \t]*\n(.*)\n?```\s*", re.DOTALL)
_TAG = re.compile(r"</?([A-Za-z][\w.:-]*)(?:\s[^<>]*)?/?>")
_MARKDOWN = re.compile(
    r"^#{1,6}[ \t]+\S"  # heading
    r"|^[ \t]*(?:[-*+]|\d{1,3}\.)[ \t]+\S.*\n[ \t]*(?:[-*+]|\d{1,3}\.)[ \t]+\S"  # list of two or more
    r"|^[ \t]*(?:```|~~~)"  # code fence
    r"|^[ \t]*\|.*\|[ \t]*\n[ \t]*\|[ \t:|-]+\|"  # table
    r"|(?<![\w*])\*\*[^\s*][^*\n]*\*\*(?![\w*])"  # strong
    r"|(?<!\w)__[^\s_][^_\n]*__(?!\w)"
    r"|\[[^\]\n]+\]\((?:https?:|/|#)[^)\s]*\)",  # link
    re.MULTILINE,
)
_MARKDOWN_SIGNS = re.compile(r"[#*`~|_\[+]|^[ \t]*(?:-|\d{1,3}\.)[ \t]", re.MULTILINE)
_OPENING = re.compile(
    r"\s*(?:(?:sure|sure thing|certainly|of course|absolutely|okay|ok|great|no problem)[!,.:]\s+"
    r"(?:[^\n]{0,60}?[!.:]\s+)?(?:here(?:'s|’s| is| are)|i(?:'d|’d| would) be (?:happy|glad)|let me (?:write|try))\b"
    r"|here(?:'s|’s| is| are) (?:a|an|the|your|my|some|one)\b[^\n.]{0,80}\b(?:story|tale|poem|text|essay|article|"
    r"summary|paragraph|passage|version|rewrite|translation|continuation|scene|dialogue|response|answer)\b[^\n.]{0,60}:\s*\n"
    r"|i(?:'m|’m| am) (?:sorry|afraid),? (?:but )?(?:i|as an)\b)",
    re.IGNORECASE,
)
_ANYWHERE = re.compile(
    r"\bas an? (?:ai|artificial intelligence|large language|language) (?:language )?(?:model|assistant)\b"
    r"|\bi(?:'m|’m| am) (?:just )?an? (?:ai|large language|language) (?:language )?(?:model|assistant)\b"
    r"|\bi (?:can(?:not|'t|’t)|am (?:not able|unable) to|won(?:'t|’t)) (?:help|assist|fulfil+|comply|generate|provide|"
    r"create) (?:you )?(?:with )?(?:this|that|your request|content|any)\b"
    r"|\bmy (?:training data|knowledge cutoff)\b",
    re.IGNORECASE,
)
_CLOSING = re.compile(
    r"(?:\b(?:i hope (?:this|that) helps|let me know if you(?:'d| would| have| need| want)|"
    r"feel free to (?:ask|let me know)|would you like me to)\b[^\n]{0,120})\s*\Z",
    re.IGNORECASE,
)


class Format:
    """Rejects texts of another shape than the one asked for."""

    name = "format"

    def __init__(self, config: FormatFilter | None = None) -> None:
        self.config = config or FormatFilter()
        self._required = [re.compile(pattern) for pattern in self.config.required]
        self._forbidden = [re.compile(pattern) for pattern in self.config.forbidden]

    def judge(self, item: Item) -> Verdict:
        return verdict(self.name, next(self._findings(Text.of(item).raw), None), {})

    def _findings(self, raw: str) -> Iterator[str]:
        config = self.config
        yield from (f"required[{i}] not found" for i, some in enumerate(self._required) if not some.search(raw))
        yield from (f"forbidden[{i}] found" for i, some in enumerate(self._forbidden) if some.search(raw))
        if config.json_text != "any":
            yield from self._json(raw)
        if config.tags:
            yield from self._tags(raw)
        if config.stray_tags == "forbidden" and any(tag not in config.tags for tag in _TAG.findall(raw)):
            yield "stray tags"
        yield from _form(config.markdown, "markdown", raw, has_markdown)
        if config.assistant_phrases == "forbidden" and has_assistant_phrase(raw):
            yield "assistant phrase"

    def _json(self, raw: str) -> Iterator[str]:
        fenced = _FENCED.fullmatch(raw)
        try:
            value = json.loads(fenced[1] if fenced else raw)
        except (ValueError, RecursionError):
            if self.config.json_text == "required":
                yield "no JSON"
            return
        if self.config.json_text == "forbidden" and isinstance(value, dict | list):
            yield "JSON"
        if self.config.json_keys:
            if not isinstance(value, dict):
                yield "JSON, but no object"
            else:
                yield from (f"JSON without {key}" for key in self.config.json_keys if key not in value)

    def _tags(self, raw: str) -> Iterator[str]:
        for tag in self.config.tags:
            opened = [found.end() for found in re.finditer(rf"<{re.escape(tag)}>", raw)]
            closed = [found.start() for found in re.finditer(rf"</{re.escape(tag)}>", raw)]
            if len(opened) != 1 or len(closed) != 1 or closed[0] < opened[0]:
                yield f"tag {tag} not exactly once"
            elif not raw[opened[0] : closed[0]].strip():
                yield f"tag {tag} empty"


def has_markdown(raw: str) -> bool:
    """Headings, lists of two or more, tables, strong emphasis, links or code fences."""
    return bool(_MARKDOWN_SIGNS.search(raw) and _MARKDOWN.search(raw))


def has_assistant_phrase(raw: str) -> bool:
    """Whether a model talks about itself or its task instead of writing the text; English only."""
    if _OPENING.match(raw) or _CLOSING.search(raw, max(0, len(raw) - 200)):
        return True
    lower = raw.lower()
    suspicious = "model" in lower or "assistant" in lower or "training data" in lower or "knowledge cutoff" in lower
    return bool(
        (
            suspicious
            or " help" in lower
            or " unable" in lower
            or "n't " in lower
            or "cannot" in lower
            or "n’t " in lower
        )
        and _ANYWHERE.search(lower)
    )


def _form(wanted: Form, what: str, raw: str, test: Callable[[str], bool]) -> Iterator[str]:
    if wanted != "any" and test(raw) != (wanted == "required"):
        yield f"no {what}" if wanted == "required" else what
