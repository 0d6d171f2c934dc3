"""The shape of a text: regular expressions, JSON, tags, markdown, and the chat manners that wrap what was asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container, Iterator
from itertools import islice

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


def _manner(pattern: str) -> re.Pattern[str]:
    """For text in lower case; an apostrophe stands for both of its forms, so it may not be in brackets."""
    return re.compile(pattern.replace("'", "['’]"))


_WRITTEN = (
    r"(?:story|stories|tales?|narratives?|fiction|poems?|essays?|articles?|texts?|summary|paragraphs?|passages?|pieces?|"
    r"scenes?|dialogues?|explanations?|descriptions?|continuations?|rewrite|version|translation)"
)
_ASKED = r"(?:requests?|prompts?|tasks?|topics?|subjects?|themes?|content|material|scenarios?|instructions?|questions?)"
_COUNT = r"(?:(?:about|exactly|approximately) )?\d+(?:[ -]words?)?"
_OPENING = _manner(
    r"\s*(?:(?:sure|sure thing|certainly|of course|absolutely|okay|ok|great|no problem)[!,.:]\s+"
    r"(?:[^\n]{0,60}?[!.:]\s+)?"
    r"(?:here(?:'s| is| are)|i(?:'d| would) be (?:happy|glad|delighted)|let me (?:write|try))\b"
    r"|(?:here(?:'s| is| are)|below is) (?:a|an|the|your|my|some|one)\b[^\n.]{0,80}\b"
    rf"(?:{_WRITTEN}|response|answer)\b[^\n.]{{0,60}}:\s*\n"
    rf"|as (?:(?:you )?(?:requested|asked|instructed)|per your (?:request|instructions?))\b[^\n]{{0,40}}\b{_WRITTEN}\b"
    r"[^\n]{0,60}:\s*\n)"
)
_CLOSING = _manner(
    r"(?:\b(?:i hope (?:this|that) helps|let me know if you(?:'d| would| have| need| want)"
    r"|feel free to (?:ask|let me know)|would you like me to"
    r"|(?:some|any)thing else (?:that )?(?:i can|you(?:'d| would) like)"
    rf"|i hope (?:that )?you (?:like|enjoy|enjoyed) (?:this|the|my) {_WRITTEN})\b[^\n]{{0,120}}"
    rf"|[(\[\n][*_ ]{{0,3}}(?:total )?word count\W{{1,6}}{_COUNT}[)\]*_. ]{{0,6}}"
    rf"|\n[*_ ]{{0,3}}[(\[]{_COUNT}[)\]*_. ]{{1,6}})\s*\Z"
)
_SELF = _manner(
    r"\bas an? (?:ai|artificial intelligence|large language|language) (?:language )?(?:model|assistant)"
    r"(?:,? i\b|, (?:my|it|there|we)\b)"
    r"|\bi(?:'m| am) (?:just |only )?a (?:large )?language model\b"
    r"|\bi(?:'m| am) (?:just |only )?an (?:ai|artificial intelligence) (?:language )?(?:model|assistant)\b.{0,12}\b"
    r"(?:(?:trained|created|developed|made) by|designed to|(?:do(?:n't| not)|can(?:'t|not)|unable|not able)\b)"
    r"|\bmy (?:training data|knowledge cutoff)\b"
)
_DO = (
    r"(?:(?:tell|finish|craft|draft|discuss|answer|offer|depict|support|do|fulfil+)(?:ing)?"
    r"|(?:writ|continu|creat|generat|produc|provid|compos|complet|shar|describ|accommodat)(?:e|ing)"
    r"|(?:help|assist|comply|proceed|continu|engag)(?:e|ing)?(?: you)? (?:with|in|by|to)|respond(?:ing)? to)"
)
_I_CANNOT = (
    r"(?:\bi(?: can(?:'t|not| not)| (?:wo|would)n't| (?:will|would) not"
    r"|(?:'m| am) (?:\w+ly )?(?:unable|not (?:able|willing|allowed|permitted|going|designed)) to"
    r"|(?:'m| am) (?:not |un)comfortable(?: with)?| do(?:n't| not) feel (?:comfortable(?: with)?|able to)"
    r"|(?:'d| would) (?:rather|prefer) not(?: to)?|(?: must| have to| need to)?(?: \w+ly)? (?:decline|refuse) to"
    r"| (?:must|have to|need to|will) refrain from)(?: be able to| be| in good conscience)?)"
)
_DECLINED = rf"(?:{_I_CANNOT}|\b(?:appropriate|right) for me to)"
_SORRY = r"\b(?:sorry|apologi[sz]e|apologies|unfortunately|regret(?:tably)?|afraid|appreciate|thank(?:s| you) for)\b"
_THIS = r"(?:this|that|these|those|such|your)"
_KIND = r"(?:kind|type|sort|nature|level)s?"
_ENDS = (
    r"(?=\s*(?:[.;!:)]|\Z)"
    r"|,? (?:but|because|since|due|however|for you|if|in (?:the|that|this)|involving"
    r"|as (?:it|described|requested|written))\b)"
)
_GRAVE = (
    r"(?:violen|explicit|sexual|graphic|harm|illegal|abus|hate|suicid|inappropriate|offensive|minors\b|gore|tortur|racis|"
    r"discriminat|dangerous|(?:that|which) (?:\w+ )?(?:demean|depict|promot|glorif|encourag|portray|exploit|involv))"
)
_SOME = (
    rf"(?:an? |any |more )?(?:(?!(?:my|our|her|his|their|its|the) )[\w-]+ ){{0,3}}?(?:{_WRITTEN}|content|material)\b"
)
_OBJECT = (  # what only one who was asked for a text declines
    rf"(?: you)?(?: (?:about|on|with|to))? (?:{_THIS} (?:{_KIND} of (?:[\w-]+ )?{_WRITTEN}|(?:[\w-]+ )?{_ASKED})\b"
    rf"|{_SOME}[^.!?\n]{{0,40}}? {_THIS} (?:[\w-]+ )?(?:{_KIND}|{_ASKED})\b"
    rf"|{_SOME} (?:about|on|like|with) (?:that|this)\b{_ENDS}"
    rf"|{_SOME}[^.!?\n]{{0,60}}?\b{_GRAVE})"
)
_REFUSAL = _manner(
    rf"{_DECLINED} {_DO}(?: or {_DO})?{_OBJECT}"
    rf"|{_DECLINED} (?:help|assist)(?:ing)?(?: you)? with (?:this|that){_ENDS}"
    rf"|{_SORRY}[^\n]{{0,100}}?{_I_CANNOT} (?:{_DO}{_OBJECT}"
    rf"|{_DO}(?: you)? (?:(?:the|this) (?:[\w-]+ )?{_WRITTEN}{_ENDS}|{_SOME}(?! for (?:my|what|why)\b))"
    rf"|(?:help|assist|comply|continue|proceed|do so){_ENDS})"
    rf"|{_SORRY}[^\n]{{0,40}}?\bas an ai\b"
    rf"|\bi (?:(?:must|have to|need to|will) )?(?:\w+ly )?(?:decline|refuse) {_THIS} {_ASKED}\b"
    rf"|\bi(?:'m| am| do)(?: not|n't) (?:feel )?comfortable with {_THIS} {_ASKED}\b"
    rf"|\bnot (?:an? |the )?(?:{_KIND} of )?(?:{_WRITTEN}|{_ASKED}|something) (?:that )?"
    r"i(?:'m| am| can| feel| would be)\b[^.!?\n]{0,20}\b(?:able|comfortable|willing|help|write|discuss)\b"
    r"|\b(?:against|violates?|conflicts? with|by|outside|within) (?:my|our) (?:[\w-]+ ){0,2}"
    rf"(?:guidelines|polic(?:y|ies)|programming to {_DO})\b"
)
_MAYBE_REFUSAL = _manner(  # a narrator may say it too
    rf"{_DECLINED} {_DO}(?: or {_DO})?(?: you)? "
    rf"(?:(?:this|that|the) {_WRITTEN}\b|{_SOME} (?:about|on|with|of|where|in which|that)\b)(?! without)"
    rf"|{_SORRY}[^\n]{{0,100}}?{_I_CANNOT} {_DO}(?: you| about)? (?:this|that|it){_ENDS}"
)
_GOES_ON = _manner(
    r"\bi can,? (?:however,? |instead,? )?(?:help|offer|write|provide|suggest|tell|create)\b|\b(?:happy|glad) to\b"
    r"|\bwould you like\b|\bif you(?:'d| would) (?:like|prefer)\b|\blet me know\b|\b(?:some|any)thing else\b"
    r"|\bguidelines\b|\b(?:in)?appropriate\b|\balternative\b|\bdifferent (?:topic|story|prompt|request|direction)\b"
)
_POLITE = ("hope ", "let me know", "feel free", "would you like", "thing else", "word")
_DECLINING = (
    *("n't ", "n’t ", "cannot", " not ", "unable", "uncomfortable", "declin", "refuse", "refrain", "for me to"),
    *("as an ai", "guideline", "polic", "programming"),
)
"""Text of which some must be there before the long patterns are tried."""
_MOST_QUOTED = 50  # matches looked at
_EDGE_CHARS = 400  # a refusal stands at the beginning or end; between them, someone in the text speaks
_CLAUSE = re.compile(r"(?:^\W*|\n|[^\w\s]\s|\b(?:but|so|and|that|however|unfortunately|afraid),? )\Z")
"""What stands before a clause of one's own, which may begin with I."""
_LITTLE = re.compile(r"[^.!?]{0,40}[.!?]?\s*")
_SINGLE_QUOTED = re.compile(r"(?<!\w)['‘](?=\w)(?:[^'‘’]|['’](?=\w))*\Z")
_REASONING = re.compile(
    r"\s*(?:<(think|thinking|thoughts?|reasoning|reflection|scratchpad)>|\[THINK\]|<\|(?:begin_of_thought|channel)\|>"
    r"|◁think▷)",
    re.IGNORECASE,
)
_REASONING_END = re.compile(r"^[ \t]*</?(think|thinking)>|</(think|thinking)>[ \t]*$", re.IGNORECASE | re.MULTILINE)


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
        if config.assistant_phrases == "forbidden" and has_reasoning(raw, config.tags):
            yield "reasoning block"
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
    """Whether a model talks about itself or its task instead of writing the text; English only.

    What someone says in quotation marks never counts, and a refusal only at the beginning or end.
    """
    lower = raw.lower()
    end = len(lower)
    tail = max(0, end - 200)
    if _OPENING.match(lower):
        return True
    if any(part in lower[tail:] for part in _POLITE) and _unquoted(_CLOSING, lower, tail, end):
        return True
    if any(word in lower for word in ("model", "assistant", "training data", "knowledge cutoff")) and _unquoted(
        _SELF, lower, 0, end
    ):
        return True
    edges = {(0, min(end, _EDGE_CHARS)), (max(0, end - _EDGE_CHARS), end)}
    return any(_refuses(lower, start, stop) for start, stop in edges)


def _refuses(lower: str, start: int, stop: int) -> bool:
    """Within [start, stop): a plain refusal, or what a narrator might say too, followed by an offer or by nothing."""
    edge = lower[start:stop]
    if not any(part in edge for part in _DECLINING):
        return False
    if _unquoted(_REFUSAL, lower, start, stop):
        return True
    found = _unquoted(_MAYBE_REFUSAL, lower, start, stop)
    if found is None:
        return False
    rest = lower[found.end() : found.end() + _EDGE_CHARS]
    is_all = _LITTLE.fullmatch(lower[: found.start()]) and _LITTLE.fullmatch(rest)
    return bool(is_all or _GOES_ON.search(rest))


def _unquoted(pattern: re.Pattern[str], lower: str, start: int, stop: int) -> re.Match[str] | None:
    """The first match in [start, stop) outside quotation marks that begins a clause, if it begins with I."""
    for found in islice(pattern.finditer(lower, start, stop), _MOST_QUOTED):
        place = found.start()
        begins = lower[place] != "i" or _CLAUSE.search(lower[max(0, place - 20) : place])
        if begins and not _is_quoted(lower, place):
            return found
    return None


def _is_quoted(text: str, place: int) -> bool:
    """Whether quotation marks are open at `place`, since its line began; the strings of JSON do not count."""
    if text.startswith(('{"', '["')):
        return False
    line = text[text.rfind("\n", 0, place) + 1 : place]
    return (
        line.count('"') % 2 == 1
        or line.rfind("“") > line.rfind("”")
        or line.rfind("«") > line.rfind("»")
        or _SINGLE_QUOTED.search(line[-_EDGE_CHARS:]) is not None
    )


def has_reasoning(raw: str, wanted: Container[str] = ()) -> bool:
    """Whether a model's reasoning stands before the text, closed or not, in another tag than the wanted ones.

    Where the prompt's template opens the block, only its end is there.
    """
    found = _REASONING.match(raw)
    if found is None and "think" in raw:
        found = _REASONING_END.search(raw)
    return found is not None and not any(name in wanted for name in found.groups() if name)


def _form(wanted: Form, what: str, raw: str, test: Callable[[str], bool]) -> Iterator[str]:
    if wanted != "any" and test(raw) != (wanted == "required"):
        yield f"no {what}" if wanted == "required" else what
