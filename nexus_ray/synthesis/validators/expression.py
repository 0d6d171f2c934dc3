"""Arithmetic expressions as people write them in prose: a tokenizer and a recursive-descent parser, exact, no `eval`.

Grammar: sum = product (+|- product)*; product = power ((*|/|of|adjacent bracket) power)*;
power = atom (^ integer)? | - power; atom = [currency] (number [scale] | mixed number) [%] [unit [unit] [^ integer]] |
( sum ) | - atom. A power right behind a unit is the unit's: 20 cm^2.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction

from nexus_ray.synthesis.validators.digits import exact, plain_minus
from nexus_ray.synthesis.validators.words import CURRENCIES, MEASURES, STOP_WORDS, stem

_TOKEN = re.compile(
    r"(?P<number>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+\.\d+|\.\d+|\d+)|(?P<word>[^\W\d_]+(?:[/'-][^\W\d_]+)*)"
    r"|(?P<power>\*\*|\^)|(?P<op>[-+*/×÷·−–])|(?P<about>≈|≃|~=)|(?P<other_eq>[=!<>:]=|=>)|(?P<eq>=)"
    r"|(?P<open>[(\[])|(?P<close>[)\]])|(?P<money>[$€£¥])|(?P<percent>%)|(?P<space>[^\S\n]+)|(?P<other>.)",
    re.DOTALL,
)
_OPERATORS = {"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-"}
_LATEX: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"(?<=\d)\s*\\[dt]?frac\{(\d{1,3})\}\{(\d{1,3})\}"), lambda match: _behind_number(match)),
    (re.compile(r"\^\{(-?\d+)\}"), r"^\1"),
    (re.compile(r"\\(?:times|cdot)\b"), "*"),
    (re.compile(r"\\div\b"), "/"),
    (re.compile(r"\\approx\b"), "≈"),
    (re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}"), r"((\1)/(\2))"),
    (re.compile(r"\\[$%]"), r" "),
    (re.compile(r"\\text\{([^{}]*)\}"), r"\1"),
)
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_LABELS = {"step", "problem", "question", "exercise", "example", "part", "case", "item", "line", "page", "day", "week",
           "chapter", "no", "number"}  # fmt: skip
"""Words whose number is a label: `Step 3 1/2 + 1/4 = 3/4`."""
_MAX_TOKENS, _MAX_EXPONENT, _MAX_BITS = 60, 64, 16384
"""Bounds that keep a hostile text cheap: neither 9^9^9 nor ((9^64)^64)^64 is computed."""


@dataclass(frozen=True)
class Token:
    """`kind`: number, word, money, or the sign itself: + - * / ^ = ~ ( ) % and ? for anything else."""

    kind: str
    text: str
    spaced: bool
    """Whether white space stands before it."""


@dataclass(frozen=True)
class Value:
    """An evaluated expression and what was met on the way."""

    number: Fraction
    operators: int = 0
    adds: bool = False
    units: frozenset[frozenset[str]] = frozenset()
    """The words behind each number: `7 red apples`, `7 apples left`."""
    letters: frozenset[str] = frozenset()
    """Single letters behind numbers: units, or unknowns."""
    measures: frozenset[str] = frozenset()
    """Known units and currencies behind or before numbers."""
    percent: bool = False
    share: bool = False
    """A percentage by itself, or a sum of such."""
    mixes: bool = False
    """Percentages are added to something else, whose share they may be."""
    decimals: int | None = None
    """Decimals as written, of a number that stands alone."""


class NoExpressionError(ValueError):
    """These tokens are no arithmetic expression."""


def tokens(line: str) -> list[Token]:
    line = plain_minus(line)
    for pattern, replacement in _LATEX:
        line = pattern.sub(replacement, line)
    found: list[Token] = []
    spaced = False
    for match in _TOKEN.finditer(line):
        kind, text = match.lastgroup or "other", match.group()
        if kind == "space":
            spaced = True
            continue
        found.append(Token(_sign(kind, text), text, spaced))
        spaced = False
    return [_times(found, place) for place in range(len(found))]


def _behind_number(match: re.Match[str]) -> str:
    """A fraction right behind a number: part of a mixed number if it is less than one, else a factor."""
    top, bottom = match.groups()
    return f" {top}/{bottom}" if 0 < int(top) < int(bottom) else f"(({top})/({bottom}))"


def _sign(kind: str, text: str) -> str:
    signs = {"power": "^", "about": "~", "eq": "=", "open": "(", "close": ")", "percent": "%", "other": "?"}
    if kind == "op":
        return _OPERATORS.get(text, text)
    return "?" if kind == "other_eq" else signs.get(kind, kind)


def _times(row: list[Token], place: int) -> Token:
    """`3 x 4` is a product; `of` is one behind a share: `20% of 50`, `1/2 of 8`."""
    token = row[place]
    if token.kind != "word" or not 0 < place < len(row) - 1:
        return token
    before, after = row[place - 1].kind, row[place + 1].kind
    if token.text in ("x", "X") and before in ("number", ")", "%", "word") and after in ("number", "(", "money"):
        return replace(token, kind="*")
    if token.text == "of" and before in ("%", ")", "number") and after in ("number", "(", "money"):
        return replace(token, kind="*")
    return token


def parse_left(row: list[Token], start: int, stop: int, *, labels: bool = False) -> Value | None:
    """The longest expression that ends right before `stop`; None if there is none or it is torn from a longer one.
    `labels`: a number behind any word is its label, as in `Method 1 1/2 + 1/2 = 1`, and no part of a mixed number."""
    for first in range(max(start, stop - _MAX_TOKENS), stop):
        parser = _Parser(row[:stop], first, labels=labels)
        try:
            value = parser.sum()
        except NoExpressionError:
            continue
        if parser.place == stop:
            return None if _torn(row, first, start) else value
    return None


def _torn(row: list[Token], first: int, start: int) -> bool:
    """Whether what stands before the expression belongs to it: `x + 3`, `sqrt(16)`, `2x`."""
    if first == start:
        return False
    before, here = row[first - 1], row[first]
    joined = not here.spaced and before.kind in ("word", "?", ")") and before.text not in (":", ",", ";", ".", "{", "*")
    return before.kind in "+-*/^" or before.text in ("\\", "}") or joined


def parse_right(row: list[Token], start: int) -> Value | None:
    """The longest expression that begins at `start`; None if there is none or it goes on in letters."""
    parser = _Parser(row, start)
    try:
        value = parser.sum()
    except NoExpressionError:
        return None
    after = row[parser.place] if parser.place < len(row) else None
    if after and (after.kind in "*/^(" or after.text in ("!", "\\", "{")) and not after.spaced:
        return None
    return value


@dataclass
class _Parser:
    row: list[Token]
    place: int
    operators: int = field(default=0)
    labels: bool = False

    def kind(self, ahead: int = 0) -> str:
        place = self.place + ahead
        return self.row[place].kind if place < len(self.row) else "end"

    def sum(self, depth: int = 0) -> Value:
        if depth > 20:
            raise NoExpressionError
        value = self.product(depth)
        while self.kind() in "+-" and self._operand_follows():
            sign = self._take()
            other = self.product(depth)
            number = value.number + other.number if sign == "+" else value.number - other.number
            value = _join(value, other, number, adds=True)
        return value

    def product(self, depth: int) -> Value:
        value = self.power(depth)
        while True:
            if self.kind() in "*/" and self._operand_follows():
                sign = self._take()
            elif self.kind() == "(" and not self.row[self.place].spaced:
                sign = "*"
            else:
                return value
            other = self.power(depth)
            if sign == "/" and not other.number:
                raise NoExpressionError
            value = _join(value, other, value.number / other.number if sign == "/" else value.number * other.number)

    def power(self, depth: int) -> Value:
        if self._negative():
            self._take()
            value = self.power(depth + 1) if depth < 20 else self._fail()
            return replace(value, number=-value.number)
        value = self.atom(depth)
        if self.kind() != "^" or not self._operand_follows():
            return value
        self._take()
        other = self.atom(depth)
        exponent = other.number
        if exponent.denominator != 1 or abs(exponent) > _MAX_EXPONENT or (exponent < 0 and not value.number):
            raise NoExpressionError
        if abs(exponent) * _bits(value.number) > _MAX_BITS:
            raise NoExpressionError
        return _join(value, other, value.number ** int(exponent))

    def atom(self, depth: int) -> Value:
        if self._negative():
            self._take()
            value = self.atom(depth + 1) if depth < 20 else self._fail()
            return replace(value, number=-value.number)
        if self.kind() == "(":
            self._take()
            value = self.sum(depth + 1)
            if self.kind() != ")":
                raise NoExpressionError
            self._take()
            return self._units(replace(value, decimals=None))
        money = {CURRENCIES[self._take()]} if self.kind() == "money" else ()
        number = exact(self.row[self.place].text) if self.kind() == "number" else None
        if number is None:
            raise NoExpressionError
        part = self._proper_fraction()
        value = Value(number, decimals=len(self._take().partition(".")[2]), measures=frozenset(money))
        if part is not None:
            self.place += 3
            value = replace(value, number=number + part, operators=1, decimals=None)
        if self.kind() == "word" and self.row[self.place].text.casefold() in _SCALES:
            scale = _SCALES[self._take().casefold()]
            value = replace(value, number=value.number * scale, decimals=None)
        return self._units(value)

    def _negative(self) -> bool:
        """Whether a minus stands here that is a number's sign."""
        return self.kind() == "-" and self.kind(1) in ("number", "money", "(") and not self.row[self.place + 1].spaced

    def _proper_fraction(self) -> Fraction | None:
        """The fraction of a mixed number: `1/2` in `3 1/2`; None where the number is a label, or a date follows."""
        if [self.kind(ahead) for ahead in range(4)] != ["number", "number", "/", "number"]:
            return None
        whole, top, slash, bottom = self.row[self.place : self.place + 4]
        behind = self.row[self.place + 4] if self.place + 4 < len(self.row) else None
        before = self.row[self.place - 1] if self.place else None
        label = before and (before.text.casefold() in _LABELS or (self.labels and before.kind == "word"))
        date = behind is not None and behind.kind == "/" and not behind.spaced
        if label or date or not top.spaced or slash.spaced or bottom.spaced:
            return None
        if not all(one.text.isdecimal() and len(one.text) <= 3 for one in (whole, top, bottom)):
            return None
        return Fraction(int(top.text), int(bottom.text)) if 0 < int(top.text) < int(bottom.text) else None

    def _fail(self) -> Value:
        raise NoExpressionError

    def _units(self, value: Value) -> Value:
        """Read a percent or currency sign, or up to two words that go with a number, and the last one's power."""
        if self.kind() == "%":
            self._take()
            return replace(value, number=value.number / 100, percent=True, share=True)
        if self.kind() == "money":
            value = replace(value, measures=value.measures | {CURRENCIES[self._take()]})
        words = 0
        while words < 2 and self.kind() == "word" and self.row[self.place].text.casefold() not in STOP_WORDS:
            words += 1
            self.place += 1
        if not words:
            return value
        texts = [token.text for token in self.row[self.place - words : self.place]]
        self._unit_power()
        if len(texts[-1]) == 1 or len(texts[0]) == 1:
            return replace(value, letters=value.letters | {text for text in texts if len(text) == 1})
        parts = [part for text in texts for part in text.split("/")]
        measures = {MEASURES[part.casefold()].unit for part in parts if part.casefold() in MEASURES}
        return replace(
            value, units=value.units | {frozenset(map(stem, parts))}, measures=value.measures | frozenset(measures)
        )

    def _unit_power(self) -> None:
        if self.kind() != "^" or self.row[self.place].spaced:
            return
        size = 2 if self.kind(1) == "-" else 1
        if self.kind(size) == "number" and not any(
            token.spaced for token in self.row[self.place : self.place + size + 1]
        ):
            self.place += size + 1

    def _operand_follows(self) -> bool:
        return self.kind(1) in ("number", "money", "(") or (self.kind(1) == "-" and self.kind(2) in ("number", "("))

    def _take(self) -> str:
        token = self.row[self.place]
        self.place += 1
        return token.kind if token.kind in "+-*/" else token.text


def _bits(number: Fraction) -> int:
    return number.numerator.bit_length() + number.denominator.bit_length()


def _join(one: Value, other: Value, number: Fraction, *, adds: bool = False) -> Value:
    return Value(
        number,
        operators=one.operators + other.operators + 1,
        adds=adds or one.adds or other.adds,
        units=one.units | other.units,
        letters=one.letters | other.letters,
        measures=one.measures | other.measures,
        percent=one.percent or other.percent,
        share=adds and one.share and other.share,
        mixes=one.mixes or other.mixes or (adds and one.share != other.share),
    )
