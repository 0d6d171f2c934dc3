"""Numbers of a text as exact fractions, and their signs; a run of digits too long to be a number is none.

Python refuses to read integers of more than 4,300 digits, and exact arithmetic on long ones is slow: one answer that
counts on and on must not end a job.
"""

from __future__ import annotations

import re
from fractions import Fraction

MAX_DIGITS = 30
"""Digits of a number at most; longer runs are identifiers, or a model that does not stop."""


def exact(text: str) -> Fraction | None:
    """The value of a decimal number, its thousands' commas ignored; None beyond `MAX_DIGITS`."""
    plain = text.replace(",", "")
    return Fraction(plain) if sum(map(str.isdecimal, plain)) <= MAX_DIGITS else None


_MINUS = str.maketrans(dict.fromkeys("\u2212\u2010\u2011\ufe63\uff0d", "-"))
"""Minus sign, hyphens that are none but are written for it, and forms of width."""
_DASH = re.compile(r"(?<![\w)\]])(?<!\d\s)\u2013(?=\\?[$€£¥]?\.?\d)")
_BEFORE_MONEY = re.compile(r"(?<![\w)\]])-\s?(\\?[$€£¥])\s?(?=\.?\d)")


def plain_minus(text: str) -> str:
    """A text with each minus as `-`. An en dash is one right before a number, unless it may part two: `5–7`, `5 –7`."""
    return _DASH.sub("-", text.translate(_MINUS))


def signed(text: str) -> str:
    """A text with each minus as `-` right before its digits: `−$5` becomes `$-5`."""
    return _BEFORE_MONEY.sub(r"\1-", plain_minus(text))
