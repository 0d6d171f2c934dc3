"""Which of several answers to one prompt the majority gives (self-consistency, Wang et al. 2022, arXiv:2203.11171).

Only final answers are compared, in a normal form: `#### 72`, `\\boxed{72}`, `The answer is $72.00.` are one answer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from nexus_ray.config.validators import AgreementConfig
from nexus_ray.synthesis.rows import Row, Verdict
from nexus_ray.synthesis.validators.digits import MAX_DIGITS, exact, signed

_HASHES = re.compile(r"^\s*####\s*(.+?)\s*$", re.MULTILINE)
_SAID = re.compile(r"\banswer\s*(?:is|:|=)\s*:?\s*(.+?)(?=\.?\s*$|\.\s)", re.IGNORECASE | re.MULTILINE)
_BOX = re.compile(r"\\boxed\s*\{")
_MAX_BOX = 1000
"""Characters of a box at most."""
_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(-?[\d.,]+)\s*\}\s*\{\s*(\d+)\s*\}")
_MIXED_FRACTION = re.compile(r"(?<=\d)(?=\\[dt]?frac)")
_MIXED = re.compile(r"(?<![\d./,])(-?)(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d/])")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+)?")
_SHORT_WORDS = 12
"""A last line of more words than this is prose, not an answer."""


def final_answer(text: str) -> str | None:
    """The final answer in its normal form; None if there is none to be found."""
    for found in (_HASHES.findall(text), _boxed(text), _SAID.findall(text)):
        if found:
            return normal_form(found[-1])
    lines = [line for line in text.splitlines() if line.strip()]
    return normal_form(lines[-1]) if lines and len(lines[-1].split()) <= _SHORT_WORDS else None


def _boxed(text: str) -> list[str]:
    """What stands in the boxes of a text, braces inside them included."""
    return [box for match in _BOX.finditer(text) if (box := _braced(text[match.end() : match.end() + _MAX_BOX]))]


def _braced(text: str) -> str:
    """A text up to the brace that closes the one before it; empty if there is none."""
    depth = 1
    for place, sign in enumerate(text):
        depth += (sign == "{") - (sign == "}")
        if not depth:
            return text[:place]
    return ""


def normal_form(answer: str) -> str | None:
    """A number as a fraction if the answer holds exactly one, else its words in lower case; None if empty."""
    answer = _MIXED.sub(_improper, _FRACTION.sub(r"\1/\2", _MIXED_FRACTION.sub(" ", signed(answer))))
    found = _NUMBER.findall(answer)
    value = _value(found[0]) if len(found) == 1 else None
    if value is not None:
        return str(value / 100 if "%" in answer else value)
    words = re.findall(r"\w+", answer.casefold())
    return " ".join(word for word in words if word not in ("a", "an", "the")) or None


def _value(number: str) -> Fraction | None:
    """`72`, `1,000.5` or `3/4`; None for a division by zero and for what is too long to be a number."""
    top, _, bottom = number.partition("/")
    numerator, denominator = exact(top.strip()), exact(bottom.strip() or "1")
    return numerator / denominator if numerator is not None and denominator else None


def _improper(mixed: re.Match[str]) -> str:
    """`1 1/2` as `3/2`; what is no mixed number (`2 3/2`) as it is."""
    sign, whole, top, bottom = mixed.groups()
    if sum(map(len, (whole, top, bottom))) > MAX_DIGITS or not 0 < int(top) < int(bottom):
        return mixed.group()
    return f"{sign}{int(whole) * int(bottom) + int(top)}/{bottom}"


@dataclass(frozen=True)
class Settled:
    """What the answers to one prompt agreed on."""

    answer: str | None
    """Normal form of the majority's answer; None if there is no majority."""
    share: float
    """Of all answers, those without a final answer included."""
    answers: int
    config: AgreementConfig

    def validate(self, row: Row) -> Verdict:
        """The verdict on one of the rows that voted."""
        scores = {"agreement.share": self.share, "agreement.answers": float(self.answers)}
        if self.answers < self.config.min_answers:
            wanted = self.config.min_answers
            return Verdict("flag", f"agreement: {self.answers} answers to compare, fewer than {wanted}", scores)
        if self.answer is None:
            reason = f"agreement: the commonest answer has {self.share:.2f}, less than {self.config.min_share:g}"
            return Verdict("reject", f"{reason} or not more than the next", scores)
        if final_answer(row.text) != self.answer:
            return Verdict("reject", f"agreement: another answer than {self.share:.2f} of {self.answers}", scores)
        return Verdict("pass", scores=scores)


def settle(rows: Sequence[Row], config: AgreementConfig | None = None) -> Settled:
    """Count the final answers of rows to one prompt; the result does not depend on their order.

    Raises ValueError if the rows belong to several prompts.
    """
    config = config or AgreementConfig()
    prompts = {row.prompt.id for row in rows}
    if len(prompts) > 1:
        raise ValueError(f"answers to {len(prompts)} prompts cannot vote with each other")
    votes = Counter(answer for answer in map(final_answer, (row.text for row in rows)) if answer is not None)
    ranked = sorted(votes.values(), reverse=True)
    if not ranked:
        return Settled(None, 0.0, len(rows), config)
    share = ranked[0] / len(rows)
    clear = share >= config.min_share and ranked[0] > (ranked[1] if len(ranked) > 1 else 0)
    return Settled(max(votes, key=votes.__getitem__) if clear else None, share, len(rows), config)
