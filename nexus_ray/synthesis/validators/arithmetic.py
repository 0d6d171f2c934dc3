"""Whether the equations between numbers in a text hold, in exact fractions, and whether it ends in the right answer.

Found are `a op b = c` and chains of them, with units, currency, percentages, thousands' commas and GSM8K's `<<a=b>>`;
an equation with a letter for a number, or that is torn out of a longer one, is left alone, as are remainders, residues
and other bases than ten. Code blocks are skipped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations, pairwise

from nexus_ray.config.validators import ArithmeticConfig
from nexus_ray.synthesis.rows import Row, Verdict
from nexus_ray.synthesis.validators.digits import exact, signed
from nexus_ray.synthesis.validators.expression import Token, Value, parse_left, parse_right, tokens

_FENCE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_CALCULATOR = re.compile(r"<<([^<>]*)>>-?[\d.,]*")
_EMPHASIS = re.compile(r"(?<![\w)])(\*\*|__)(\S(?:.*?\S)?)\1(?![\w(])")
_BULLET = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+")
_SENTENCE_END = re.compile(r"(?<=[.;?])\s+")
_OTHER_NUMBERS = re.compile(
    r"\b(?:mod|modulo|modulus|binary|octal|hex|hexadecimal|in base|floats?|floating)\b|\b0[xbo][\da-f]|\\[pb]mod\b",
    re.IGNORECASE,
)
"""Words that say that numbers near them are not to be read, or not to be calculated with, as usual."""
_REMAINDER = re.compile(r"\bremainders?\b|\brem\b|=\s*-?\d+\s*[Rr]\.?\s*\d+\b")
_DIVISION = re.compile(r"[/÷]|\\div\b|\\[dt]?frac\b")
_FINAL = re.compile(r"^\s*####\s*(.+?)\s*$", re.MULTILINE)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Equation:
    """Two sides that a text says are equal; `holds` is None where units or percentages forbid an answer."""

    left: Value
    right: Value
    about: bool
    """Written with an approximate sign."""

    @property
    def holds(self) -> bool | None:
        left, right = self.left, self.right
        if left.mixes or right.mixes:
            return None  # $80 - 25% = $60
        readings = [right.number, right.number * 100] if right.percent and not left.percent else [right.number]
        for reading in readings:
            if left.number == reading or self._rounds_to(reading, scale=100 if reading != right.number else 1):
                return True
        if left.adds and any(one.isdisjoint(other) for one, other in combinations(left.units | right.units, 2)):
            return None  # 1 hour + 30 minutes = 90 minutes
        if left.measures and right.measures and left.measures.isdisjoint(right.measures):
            return None  # 3 x 20 minutes = 1 hour
        return False

    def _rounds_to(self, reading: Fraction, *, scale: int) -> bool:
        """Whether the right side is the left one, rounded to the decimals that it is written with."""
        decimals = self.right.decimals
        if decimals is None or (decimals == 0 and not self.about):
            return False
        step = Fraction(scale if scale > 1 else 1, 10**decimals) / (100 if self.right.percent else 1)
        return abs(self.left.number - reading) <= step * (1 if self.about else Fraction(1, 2))


def equations(text: str) -> Iterator[Equation]:
    """Equations with at least one operator, in order."""
    text = _CALCULATOR.sub(lambda match: f"\n{match[1]}\n", _FENCE.sub("\n", text))
    for line in text.splitlines():
        for sentence in _SENTENCE_END.split(_EMPHASIS.sub(r"\2", _BULLET.sub("", line))):
            if _OTHER_NUMBERS.search(sentence) or (_REMAINDER.search(sentence) and _DIVISION.search(sentence)):
                continue
            row = tokens(sentence)
            places = [place for place, token in enumerate(row) if token.kind in "=~"]
            for before, place in pairwise([-1, *places]):
                about = row[place].kind == "~"
                pair = _sides(row, before, place)
                if pair is None:
                    continue
                if Equation(*pair, about=about).holds is False:
                    other = _sides(row, before, place, labels=True)
                    if other is not None and Equation(*other, about=about).holds:
                        continue  # who can tell a label from half of a mixed number?
                yield Equation(*pair, about=about)


def _sides(row: list[Token], before: int, place: int, *, labels: bool = False) -> tuple[Value, Value] | None:
    left = parse_left(row, before + 1, place, labels=labels)
    right = parse_right(row, place + 1)
    if left is None or right is None or not (left.operators or right.operators):
        return None
    if (left.letters | right.letters) and left.letters != right.letters:
        return None  # 3x + 2 = 14 is no claim about numbers; 3 m + 4 m = 7 m is one
    return left, right


def final_answer(text: str) -> str | None:
    """What stands behind the last `####`."""
    found = _FINAL.findall(text)
    return found[-1] if found else None


def number(text: str) -> Fraction | None:
    """The last number in a text; None if there is none, or it is too long to be one."""
    found = _NUMBER.findall(signed(text))
    return exact(found[-1]) if found else None


class Arithmetic:
    """Validator of rows that calculate."""

    def __init__(self, config: ArithmeticConfig | None = None) -> None:
        self.config = config or ArithmeticConfig()

    def validate(self, row: Row) -> Verdict:
        return self.check(row.text, answer=row.prompt.parameters.get(self.config.answer))

    def check(self, text: str, *, answer: str | None = None) -> Verdict:
        """The verdict on a text whose final answer is `answer`, if that is known."""
        held = [equation.holds for equation in equations(text)]
        scores = {"arithmetic.equations": float(len(held)), "arithmetic.wrong": float(held.count(False))}
        if held.count(False):
            return Verdict("reject", f"arithmetic: {held.count(False)} of {len(held)} equations do not hold", scores)
        if len(held) < self.config.min_equations:
            wanted = self.config.min_equations
            return Verdict("reject", f"arithmetic: {len(held)} equations, fewer than {wanted}", scores)
        problem = self._final_problem(text, answer)
        return Verdict("reject", f"arithmetic: {problem}", scores) if problem else Verdict("pass", scores=scores)

    def _final_problem(self, text: str, answer: str | None) -> str:
        final = final_answer(text)
        if final is None:
            return "no final answer after ####" if self.config.require_final else ""
        if answer is None:
            return ""
        expected, given = number(answer), number(final)
        same = given == expected if expected is not None else final.casefold() == answer.strip().casefold()
        return "" if same else "the final answer is not the known one"
