"""Numbers of a text as exact fractions; a run of digits too long to be a number is none.

Python refuses to read integers of more than 4,300 digits, and exact arithmetic on long ones is slow: one answer that
counts on and on must not end a job.
"""

from __future__ import annotations

from fractions import Fraction

MAX_DIGITS = 30
"""Digits of a number at most; longer runs are identifiers, or a model that does not stop."""


def exact(text: str) -> Fraction | None:
    """The value of a decimal number, its thousands' commas ignored; None beyond `MAX_DIGITS`."""
    plain = text.replace(",", "")
    return Fraction(plain) if sum(map(str.isdecimal, plain)) <= MAX_DIGITS else None
