"""Personal data and secrets, by pattern and checksum: e-mail, phone, IBAN, card, IP, US social security, keys.

Meant for what is certain enough to act on without a model: addresses reserved for examples, private IPs, version
numbers and digits that fail their checksum are left alone. Names and postal addresses need a model and are not seen.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from nexus_ray.config.filters import PersonalFilter, PersonalKind
from nexus_ray.synthesis.filters.checksums import is_card, is_iban
from nexus_ray.synthesis.filters.text import Item, Text, verdict
from nexus_ray.synthesis.rows import Row, Verdict


@dataclass(frozen=True, order=True)
class Found:
    """Where something personal stands: characters [start, stop)."""

    start: int
    stop: int
    kind: PersonalKind


class Personal:
    """Rejects, flags or masks personal data."""

    name = "personal"

    def __init__(self, config: PersonalFilter | None = None) -> None:
        self.config = config or PersonalFilter()

    def judge(self, item: Item) -> Verdict:
        found = find(Text.of(item).raw, self.config.kinds)
        kinds = Counter(some.kind for some in found)
        scores = {f"personal.{kind}": float(count) for kind, count in kinds.items()}
        action = "flag" if self.config.action == "flag" else "reject"
        return verdict(self.name, found[0].kind if found else None, scores, action=action)

    def clean(self, row: Row) -> Row:
        """The row with personal data masked if the action is `mask`; else the row itself."""
        if self.config.action != "mask":
            return row
        text = mask(row.text, self.config.kinds)
        return row if text == row.text else replace(row, text=text)


def find(raw: str, kinds: list[PersonalKind] | None = None) -> list[Found]:
    """All personal data of the kinds (default: all), in order; where two overlap, that first in `FINDERS` counts."""
    taken: list[Found] = []
    has_digits = _DIGITS.search(raw) is not None
    for kind in (kind for kind in FINDERS if (kinds is None or kind in kinds)):
        for start, stop in FINDERS[kind](raw) if has_digits or kind not in _NUMBERS else ():
            if all(stop <= other.start or start >= other.stop for other in taken):
                taken.append(Found(start, stop, kind))
    return sorted(taken)


def mask(raw: str, kinds: list[PersonalKind] | None = None) -> str:
    """The text with `[EMAIL]`, `[PHONE]`, ... in place of what was found."""
    parts, end = [], 0
    for found in find(raw, kinds):
        parts += [raw[end : found.start], f"[{found.kind.upper()}]"]
        end = found.stop
    return "".join([*parts, raw[end:]])


Spans = Iterator[tuple[int, int]]

_EMAIL = re.compile(
    r"(?<![\w.+-])[A-Za-z0-9][\w.!#$%&'*+/=?^`{|}~-]{0,63}(?<!\.)@((?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+"
    r"[A-Za-z]{2,24})(?![\w-]|\.\w|:[\w.~-]*/)"  # no remote such as `git@host.org:owner/name`
)
_NO_EMAIL = re.compile(
    r"^(?:git|hg|svn)@|@[1-4]x\.|\.(?:png|jpe?g|gif|svg|webp|bmp|ico|css|js|json|html?|txt|xml|ya?ml)$", re.I
)
_EXAMPLES = re.compile(r"(?:^|\.)(?:example\.(?:com|org|net)|example|test|invalid|localhost|local)$", re.IGNORECASE)
_DIGIT = re.compile(r"\d")
_DIGITS = re.compile(r"\d[\d .\-/()]{5,}\d")
_CARD = re.compile(r"(?<![\d.,-])(?<!\d )\d(?:[ -]?\d){12,18}(?![\d-]|[.,]\d| \d)")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}\b")
_IBAN_START = re.compile(r"[A-Z]{2}\d\d")
_IPV4 = re.compile(r"(?<![\d.\w-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9a-fA-F]{0,4}:){2,7}[0-9a-fA-F]{0,4}(?![\w:])")
_IPV4_PART = re.compile(r"\.\d{1,3}\.\d")  # begins with a letter that is quickly looked for, unlike the whole
_IPV6_PART = re.compile(r":[0-9a-fA-F]{0,4}:")
_VERSION = re.compile(
    r"(?:\b(?:v|ver\.?|cl\.|secs?\.|arts?\.|(?:version|release|build|firmware|(?:sub)?section|chapter|clause|article|"
    r"(?:sub)?paragraph|rule|table|figure|appendix|annex)s?)|§)\s*$",
    re.IGNORECASE,
)
_SSN = re.compile(r"(?<![\d-])(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\d-])")
_PHONE = re.compile(
    r"(?<![\w+./-])\+(?=[1-9])\d{1,3}(?:[ .\-/]?\(\d{1,4}\))?(?:[ .\-/]?\d){6,13}(?!\d)"  # international
    r"|(?<![\w+./$€£-])(?:1[ .-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[.-])[2-9]\d\d[ .-]\d{4}(?![\w-]|\.\d)"  # North America
)
_PHONE_DECIMAL = re.compile(r"\+\d{1,3}\.\d+")
_PHONE_LOCAL = re.compile(
    r"(?:\(0\d{1,5}\)|0\d{1,5})(?:[ .\-/]{0,3}\d){5,10}(?!\d)"
    r"|(?P<bare>\d{3}[ .-]\d{4}(?!\d)|[2-9]\d\d[2-9]\d{6}(?![\d\w]|[.,-]\d))"
)
_PHONE_WORDS = (
    r"\b(?:tel(?:ephone|efon|éfono|efono|efoon|\.)?|phone|call|fax|mobile|cell|whatsapp|téléphone|rufnummer|handy|móvil|"
    r"celular|ring|text)\b"
)
_PHONE_BEFORE = re.compile(_PHONE_WORDS + r"[^\n\d+]{0,25}\Z", re.IGNORECASE)
_PHONE_JUST_BEFORE = re.compile(
    _PHONE_WORDS + r"(?:(?:[^\w\n]+(?:me|us|him|her|them|back|now|is|was|number|no|phone|cell|mobile|line))*[^\w\n+]*"
    r"|[^\n\d+]{0,25}\b(?:at|on|under|number|no)\b[^\w\n+]{0,3})\Z",
    re.IGNORECASE,
)
_RANGE = re.compile(r"\d[05]0[ .-]\d[05][05]0")  # 500-1000 words, not a number to call
_FICTIONAL = re.compile(r"555[ .-]?01\d\d$")  # set apart for fiction in North America

_KEYS = (
    ("AKIA", re.compile(r"\bA(?:KIA|SIA)[0-9A-Z]{16}\b")),
    ("ASIA", re.compile(r"\bASIA[0-9A-Z]{16}\b")),
    ("gh", re.compile(r"\bgh[pousr]_[A-Za-z0-9]{36,}\b|\bgithub_pat_\w{22,}\b")),
    ("glpat-", re.compile(r"\bglpat-[\w-]{20,}")),
    ("xox", re.compile(r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}")),
    ("sk-", re.compile(r"\bsk-(?:proj-|ant-|svcacct-|or-)?[\w-]{20,}")),
    ("sk_", re.compile(r"\b[rs]k_(?:live|test)_[A-Za-z0-9]{16,}")),
    ("AIza", re.compile(r"\bAIza[\w-]{35}\b")),
    ("hf_", re.compile(r"\bhf_[A-Za-z]{30,}\b")),
    ("npm_", re.compile(r"\bnpm_[A-Za-z0-9]{36}\b")),
    ("pypi-", re.compile(r"\bpypi-[\w-]{50,}")),
    ("eyJ", re.compile(r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}")),
    (
        "-----BEGIN",
        re.compile(
            r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?-----"
            r"(?:.*?-----END (?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?-----)?",
            re.S,
        ),
    ),
    ("hooks.slack.com/", re.compile(r"(?:https?://)?\bhooks\.slack\.com/(?:services|workflows|triggers)/[\w/-]{20,}")),
    ("gsk_", re.compile(r"\bgsk_[A-Za-z0-9]{20,}")),
)
"""Text that must be there before its pattern is tried, and the pattern."""
_VALUE = r"(?!\d+(?:st|nd|rd|th)\b)([A-Za-z0-9_\-+/.=!@#$%^&*]{12,}+)(?!\()"
_ASSIGNED = re.compile(
    r"(?:api[_-]?key|access[_-]?key|secret(?!ar)|token|passw(?:or)?d|bearer|credential)\w{0,24}[\"']?\s*"
    rf"(?::=|[:=]|=>|\bis\b)\s*[\"']?{_VALUE}",
    re.IGNORECASE,
)
_HEADER = re.compile(rf"(?:\bbearer|\bauthorization:\s*\w+)\s+{_VALUE}", re.IGNORECASE)
_PASSWORD = re.compile(
    r"passw(?:or)?d[\"']?\s*(?::\s*[\"']?|=\s*[\"'])(?!\d+-|(?:sha|md|bytes|base|utf)-?\d)([A-Za-z0-9_\-!@#$%^&*]{6,})"
    r"(?![\w(\[{]|\.\w)",
    re.IGNORECASE,
)
_ASSIGNED_WORDS = ("key", "secret", "token", "passw", "bearer", "credential")
_HEADER_WORDS = ("bearer", "authorization")
_LEAST_ENTROPY = 3.3


def _emails(raw: str) -> Spans:
    if "@" in raw:
        for found in _EMAIL.finditer(raw):
            if not _EXAMPLES.search(found[1]) and not _NO_EMAIL.search(found[0]):
                yield found.span()


def _cards(raw: str) -> Spans:
    for found in _CARD.finditer(raw):
        if is_card(re.sub(r"\D", "", found[0])):
            yield found.span()


def _ibans(raw: str) -> Spans:
    for found in _IBAN.finditer(raw) if _IBAN_START.search(raw) else ():
        for stop in range(len(found[0]), 14, -1):
            if is_iban(found[0][:stop].replace(" ", "")) and found[0][stop - 1] != " ":
                yield found.start(), found.start() + stop
                break


def _ips(raw: str) -> Spans:
    spans = [found.span() for found in _IPV4.finditer(raw)] if _IPV4_PART.search(raw) else []
    spans += [found.span() for found in _IPV6.finditer(raw)] if _IPV6_PART.search(raw) else []
    for start, stop in spans:
        if _is_public(raw[start:stop]) and not _VERSION.search(raw, max(0, start - 16), start):
            yield start, stop


def _is_public(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if address.version == 4:
        return address.is_global and not text.endswith(".0.0")
    return address.is_global and text.count(":") > 2


def _ssns(raw: str) -> Spans:
    return (found.span() for found in _SSN.finditer(raw))


def _phones(raw: str) -> Spans:
    for found in _PHONE.finditer(raw):
        digits = re.sub(r"\D", "", found[0])
        if not 8 <= len(digits) <= 15 or _FICTIONAL.search(found[0]):
            continue
        start = found.start()
        if not _PHONE_DECIMAL.fullmatch(found[0]) or _PHONE_BEFORE.search(raw[max(start - 40, 0) : start]):
            yield found.span()
    for found in _PHONE_LOCAL.finditer(raw):
        start = found.start()
        is_whole = not raw[max(start - 1, 0) : start].isalnum()
        context = _PHONE_JUST_BEFORE if found["bare"] else _PHONE_BEFORE
        if is_whole and context.search(raw[max(start - 40, 0) : start]) and not _is_no_phone(found[0]):
            yield found.span()


def _is_no_phone(number: str) -> bool:
    return bool(_FICTIONAL.search(number) or _RANGE.fullmatch(number))


def _secrets(raw: str) -> Spans:
    for literal, pattern in _KEYS:
        if literal in raw:
            yield from (found.span() for found in pattern.finditer(raw))
    if not _DIGIT.search(raw):
        return
    lower = raw.lower()
    for words, pattern in (_ASSIGNED_WORDS, _ASSIGNED), (_HEADER_WORDS, _HEADER):
        for found in pattern.finditer(raw) if any(word in lower for word in words) else ():
            value = found[1].rstrip(".")
            if _is_mixed(value) and entropy(value) >= _LEAST_ENTROPY:
                yield found.start(1), found.start(1) + len(value)
    for found in _PASSWORD.finditer(raw) if "passw" in lower else ():
        if _is_mixed(found[1]):
            yield found.span(1)


def _is_mixed(value: str) -> bool:
    return any(char.isdigit() for char in value) and any(char.isalpha() for char in value)


def entropy(text: str) -> float:
    """Bits per character of a text, by the frequencies of its own characters."""
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values())


_NUMBERS = frozenset(("card", "ssn", "phone"))
"""Kinds that cannot be where no long run of digits stands."""
FINDERS: dict[PersonalKind, Callable[[str], Spans]] = {
    "secret": _secrets,
    "email": _emails,
    "iban": _ibans,
    "card": _cards,
    "ssn": _ssns,
    "ip": _ips,
    "phone": _phones,
}
"""In the order in which they may claim a span."""
