"""A model as judge, trusted only after it has been measured.

Public judges ship with wrong examples (InstructLab's faithfulness judge explains why a claim is not supported and then
answers YES: `configs/knowledge/evaluate_faithfulness.yaml`, example 2) and prefer long answers. So a judge here first
grades a golden set it is never shown: its precision must reach `min_precision`. Its own examples are measured too: each
is graded with the others as examples and must get the verdict it carries, and all together must not make the judge
worse on the golden set than it is without any. Swapping two answers, or padding one with empty words, must not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nexus_ray.config.validators import JudgeConfig
from nexus_ray.errors import ConfigError, SynthesisError
from nexus_ray.synthesis.rows import Row, Verdict
from nexus_ray.synthesis.validators.rubric import (
    Example,
    GoldenItem,
    Item,
    Rubric,
    ask_for_grade,
    ask_for_preference,
    load_golden,
    load_rubric,
    read_grade,
    read_preference,
)

Ask = Callable[[str], str]
"""Sends a prompt to the judging model and returns its reply."""
PADDING = (
    " To put the same thing in other words, that is the answer to the question that was asked. It is good to keep this"
    " in mind when thinking about the question, since the answer given above is the one that belongs to it. In summary,"
    " the answer stands as it was given at the beginning, and the rest is only said to be complete."
)
"""Adds length and nothing else."""


@dataclass(frozen=True)
class Calibration:
    """What a judge showed on its golden set. Shares of nothing are NaN."""

    precision: float
    """Rightly accepted among accepted."""
    precision_low: float
    """Lower end of its 95 % interval (Wilson): how little a short golden set can promise."""
    recall: float
    """Accepted among the acceptable."""
    accuracy: float
    accuracy_without_examples: float
    unparsed: float
    """Share of replies, probes included, that do not follow the demanded form."""
    order_swaps: float
    """Share of pairs whose winner changes with the order of the two answers."""
    length_swaps: float
    """Share of rejected items that are accepted once they are padded."""
    wrong_examples: tuple[int, ...]
    """Places, from 0, of examples whose verdict the judge does not share when it has not seen it."""

    def faults(self, config: JudgeConfig) -> list[str]:
        """Why this judge is not to be trusted; empty if it is."""
        found = [
            _below("precision", self.precision, "min_precision", config.min_precision),
            _below("recall", self.recall, "min_recall", config.min_recall),
            _above("unparsed", self.unparsed, "max_unparsed", config.max_unparsed),
            _above("order_swaps", self.order_swaps, "max_order_swaps", config.max_order_swaps),
            _above("length_swaps", self.length_swaps, "max_length_swaps", config.max_length_swaps),
        ]
        if self.wrong_examples:
            found.append(f"examples {list(self.wrong_examples)} of the rubric get another verdict than they carry")
        if self.accuracy < self.accuracy_without_examples:
            found.append(
                f"the rubric's examples lower accuracy from {self.accuracy_without_examples:.2f} to {self.accuracy:.2f}"
            )
        return [fault for fault in found if fault]


class Judge:
    """Validator that asks a model. Use `trusted_judge`: an unmeasured judge refuses to decide."""

    def __init__(self, config: JudgeConfig, ask: Ask) -> None:
        """Raises ConfigError for a rubric or golden set that cannot be used, or that share items."""
        self.config = config
        self.rubric = load_rubric(config.rubric)
        self.golden = load_golden(config.golden)
        self.calibration: Calibration | None = None
        self._ask = ask
        _refuse_shared_items(self.rubric, self.golden)

    def validate(self, row: Row) -> Verdict:
        """Rows without a source, and replies not in the demanded form, are flagged."""
        if self.calibration is None or self.calibration.faults(self.config):
            raise SynthesisError("judge: not measured, or found wanting, on its golden set; use trusted_judge")
        if row.prompt.source is None:
            return Verdict("flag", "judge: the prompt has no source")
        content = row.prompt.content
        question = content if isinstance(content, str) else content[-1].content
        item = Item(source=row.prompt.source, question=question, answer=row.text)
        level = read_grade(self.rubric, self._ask(ask_for_grade(self.rubric, item)))
        if level is None:
            return Verdict("flag", "judge: the reply is not in the demanded form")
        accepted = level in self.rubric.accept
        scores = {"judge.accepted": float(accepted), "judge.precision": self.calibration.precision}
        return Verdict("pass", scores=scores) if accepted else Verdict("reject", f"judge: {level}", scores)

    def calibrate(self) -> Calibration:
        """Measure this judge. Asks about three times per golden item and once per example."""
        grades = [self._accepts(item) for item in self.golden]
        bare = [self._accepts(item, ()) for item in self.golden] if self.rubric.examples else grades
        padded = self._padded(grades)
        swaps = [self._order_matters(first, second) for first, second in _pairs(self.golden)]
        examples = [self._example_is_wrong(place) for place in range(len(self.rubric.examples))]
        right = [item.accept for item in self.golden]
        kept = [wanted for wanted, grade in zip(right, grades, strict=True) if grade]
        replies = [*grades, *padded, *swaps, *examples]
        self.calibration = Calibration(
            precision=_share(kept),
            precision_low=_wilson_low(sum(kept), len(kept)),
            recall=sum(kept) / sum(right),
            accuracy=_accuracy(right, grades),
            accuracy_without_examples=_accuracy(right, bare),
            unparsed=_share([reply is None for reply in replies]),
            order_swaps=_share([swap for swap in swaps if swap is not None]),
            length_swaps=_share([grade for grade in padded if grade is not None]),
            wrong_examples=tuple(place for place, wrong in enumerate(examples) if wrong is not False),
        )
        return self.calibration

    def _accepts(self, item: Item, examples: Sequence[Example] | None = None) -> bool | None:
        """None if the reply does not follow the form."""
        level = read_grade(self.rubric, self._ask(ask_for_grade(self.rubric, item, examples=examples)))
        return None if level is None else level in self.rubric.accept

    def _padded(self, grades: list[bool | None]) -> list[bool | None]:
        rejected = [item for item, grade in zip(self.golden, grades, strict=True) if grade is False]
        return [self._accepts(item.model_copy(update={"answer": item.answer + PADDING})) for item in rejected]

    def _order_matters(self, first: GoldenItem, second: GoldenItem) -> bool | None:
        ways = ((first, second.answer), (second, first.answer))
        one, other = (read_preference(self._ask(ask_for_preference(self.rubric, *way))) for way in ways)
        return None if one is None or other is None else one == other

    def _example_is_wrong(self, place: int) -> bool | None:
        example = self.rubric.examples[place]
        others = [other for number, other in enumerate(self.rubric.examples) if number != place]
        accepted = self._accepts(example, others)
        return None if accepted is None else accepted != (example.verdict in self.rubric.accept)


def trusted_judge(config: JudgeConfig, ask: Ask) -> Judge:
    """A judge that has passed its golden set. Raises SynthesisError with all reasons if it does not."""
    judge = Judge(config, ask)
    faults = judge.calibrate().faults(config)
    if faults:
        raise SynthesisError(
            f"validators.judge: the model is no judge for this rubric: {'; '.join(faults)}. Use a stronger model, mend "
            f"the rubric, or leave the judge out; lower a threshold only if wrongly accepted rows do no harm"
        )
    return judge


def _pairs(golden: Sequence[GoldenItem]) -> list[tuple[GoldenItem, GoldenItem]]:
    """An acceptable and an unacceptable answer to the same question, for each such question."""
    found = []
    for good in (item for item in golden if item.accept):
        for bad in golden:
            if not bad.accept and (bad.source, bad.question) == (good.source, good.question):
                found.append((good, bad))
                break
    return found


def _refuse_shared_items(rubric: Rubric, golden: Sequence[GoldenItem]) -> None:
    shared = {example.source for example in rubric.examples} & {item.source for item in golden}
    if shared:
        raise ConfigError(
            f"validators.judge: {len(shared)} sources stand both in the rubric's examples and in the golden set, which "
            f"would measure memory; replace them in one of the two"
        )


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else math.nan


def _accuracy(right: Sequence[bool], grades: Sequence[bool | None]) -> float:
    return _share([wanted is grade for wanted, grade in zip(right, grades, strict=True)])


def _wilson_low(successes: int, trials: int) -> float:
    """Lower end of the 95 % score interval (Wilson 1927)."""
    if not trials:
        return math.nan
    z, share = 1.959964, successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return (centre - spread) / (1 + z * z / trials)


def _below(name: str, value: float, limit_name: str, limit: float) -> str:
    return "" if value >= limit else f"{name} {value:.2f} is below {limit_name}={limit:g}"


def _above(name: str, value: float, limit_name: str, limit: float) -> str:
    return f"{name} {value:.2f} is above {limit_name}={limit:g}" if value > limit else ""
