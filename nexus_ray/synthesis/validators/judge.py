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
from itertools import count

from nexus_ray.config.validators import JudgeConfig
from nexus_ray.errors import ConfigError, SynthesisError
from nexus_ray.synthesis.rows import Row, Verdict
from nexus_ray.synthesis.validators.calibration import Calibration, Record, wilson_low
from nexus_ray.synthesis.validators.rubric import (
    Example,
    GoldenItem,
    Item,
    Rubric,
    ask_for_grade,
    ask_for_preference,
    golden_fingerprint,
    load_golden,
    load_rubric,
    read_grade,
    read_preference,
    rubric_fingerprint,
)

Ask = Callable[[str], str]
"""Sends a prompt to the judging model and returns its reply.

Raises RefusedQuestionError where no reply will ever come, another NexusError where one may come later: then nothing
is decided, and nothing is measured.
"""
PADDING = (
    " To put the same thing in other words, that is the answer to the question that was asked. It is good to keep this"
    " in mind when thinking about the question, since the answer given above is the one that belongs to it. In summary,"
    " the answer stands as it was given at the beginning, and the rest is only said to be complete."
)
"""Adds length and nothing else."""


class RefusedQuestionError(SynthesisError):
    """The judging model does not take this one question, however often it is asked: it is too long, or not allowed."""


class Judge:
    """Validator that asks a model. Use `trusted_judge`: an unmeasured judge refuses to decide."""

    def __init__(self, config: JudgeConfig, ask: Ask) -> None:
        """Raises ConfigError for a rubric or golden set that cannot be used; see `load_measure`."""
        self.config = config
        self.rubric, self.golden = load_measure(config)
        self.calibration: Calibration | None = None
        self._ask = ask

    def validate(self, row: Row) -> Verdict:
        """Flagged are rows without the source that the rubric needs, questions that are refused, unreadable replies.

        Raises what `ask` raises where a reply may come later: the row is then not judged.
        """
        if self.calibration is None or self.calibration.faults(self.config):
            raise SynthesisError("judge: not measured, or found wanting, on its golden set; use trusted_judge")
        if self.rubric.needs_source and row.prompt.source is None:
            return Verdict("flag", "judge: the prompt has no source")
        content = row.prompt.content
        question = content if isinstance(content, str) else content[-1].content
        source = row.prompt.source if self.rubric.needs_source else None
        item = Item.model_construct(source=source, question=question, answer=row.text)  # unchecked: even empty
        try:
            level = read_grade(self.rubric, self._ask(ask_for_grade(self.rubric, item)))
        except RefusedQuestionError as error:
            return Verdict("flag", f"judge: {error}")
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
        pairs = _pairs(self.golden)
        swaps = [self._order_matters(first, second) for first, second in pairs]
        examples = [self._example_is_wrong(place) for place in range(len(self.rubric.examples))]
        right = [item.accept for item in self.golden]
        kept = [wanted for wanted, grade in zip(right, grades, strict=True) if grade]
        replies = [*grades, *padded, *swaps, *examples]
        self.calibration = Calibration(
            accepted=len(kept),
            pairs=len(pairs),
            precision=_share(kept),
            precision_low=wilson_low(sum(kept), len(kept)),
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
        level = read_grade(self.rubric, self._reply(ask_for_grade(self.rubric, item, examples=examples)))
        return None if level is None else level in self.rubric.accept

    def _reply(self, prompt: str) -> str:
        """A reply while measuring; a question that is refused counts as a reply that cannot be read."""
        try:
            return self._ask(prompt)
        except RefusedQuestionError:
            return ""

    def _padded(self, grades: list[bool | None]) -> list[bool | None]:
        rejected = [item for item, grade in zip(self.golden, grades, strict=True) if grade is False]
        return [self._accepts(item.model_copy(update={"answer": item.answer + PADDING})) for item in rejected]

    def _order_matters(self, first: GoldenItem, second: GoldenItem) -> bool | None:
        ways = ((first, second.answer), (second, first.answer))
        one, other = (read_preference(self._reply(ask_for_preference(self.rubric, *way))) for way in ways)
        return None if one is None or other is None else one == other

    def _example_is_wrong(self, place: int) -> bool | None:
        example = self.rubric.examples[place]
        others = [other for number, other in enumerate(self.rubric.examples) if number != place]
        accepted = self._accepts(example, others)
        return None if accepted is None else accepted != (example.verdict in self.rubric.accept)


def trusted_judge(config: JudgeConfig, ask: Ask, *, record: Record | None = None) -> Judge:
    """A judge that has passed its golden set, now or, if `record` knows it, earlier.

    Raises SynthesisError with all reasons if it does not pass, and what `ask` raises while it is measured.
    """
    judge = Judge(config, ask)
    if record is None:
        judge.calibrate()
    else:
        names = rubric_fingerprint(judge.rubric), golden_fingerprint(judge.golden)
        judge.calibration = record.measured(*names, judge.calibrate)
    assert judge.calibration is not None
    faults = judge.calibration.faults(config)
    if faults:
        written = f" Measured once, in {record.file}; delete that to measure again." if record is not None else ""
        raise SynthesisError(
            f"validators.judge: the model is no judge for this rubric: {'; '.join(faults)}. Use a stronger model, mend "
            f"the rubric, or leave the judge out; lower a threshold only if wrongly accepted rows do no harm.{written}"
        )
    return judge


def load_measure(config: JudgeConfig) -> tuple[Rubric, list[GoldenItem]]:
    """The rubric and the golden set of a config. Asks nothing.

    Raises ConfigError if one cannot be used, they do not fit each other, or no judge could show enough with them.
    """
    rubric, golden = load_rubric(config.rubric), load_golden(config.golden)
    _refuse_other_sources(config, rubric, golden)
    _refuse_shared_items(rubric, golden)
    _refuse_weak_golden(config, golden)
    return rubric, golden


def _pairs(golden: Sequence[GoldenItem]) -> list[tuple[GoldenItem, GoldenItem]]:
    """An acceptable and an unacceptable answer to the same question, for each such question."""
    found = []
    for good in (item for item in golden if item.accept):
        for bad in golden:
            if not bad.accept and (bad.source, bad.question) == (good.source, good.question):
                found.append((good, bad))
                break
    return found


def _refuse_other_sources(config: JudgeConfig, rubric: Rubric, golden: Sequence[GoldenItem]) -> None:
    wrong = [number for number, item in enumerate(golden, start=1) if (item.source is None) == rubric.needs_source]
    if wrong:
        rule = "needs a source with every answer" if rubric.needs_source else "judges answers without a source"
        raise ConfigError(
            f"validators.judge.golden={config.golden}: {len(wrong)} items do not fit rubric={config.rubric}, which "
            f"{rule}; name a golden set made for that rubric"
        )


def _refuse_shared_items(rubric: Rubric, golden: Sequence[GoldenItem]) -> None:
    shared = {_subject(example) for example in rubric.examples} & {_subject(item) for item in golden}
    if shared:
        raise ConfigError(
            f"validators.judge: {len(shared)} sources stand both in the rubric's examples and in the golden set, which "
            f"would measure memory; replace them in one of the two"
        )


def _subject(item: Item) -> str:
    return item.question if item.source is None else item.source


def _refuse_weak_golden(config: JudgeConfig, golden: Sequence[GoldenItem]) -> None:
    """What no judge can mend is said before anything is paid for."""
    where = f"validators.judge.golden={config.golden}"
    if not _pairs(golden):
        raise ConfigError(
            f"{where}: no question has both an answer to accept and one to reject, so that order_swaps cannot be "
            f"measured; add such pairs"
        )
    acceptable = sum(item.accept for item in golden)
    best = wilson_low(acceptable, acceptable)
    if best < config.min_precision_low:
        needed = next(n for n in count(acceptable) if wilson_low(n, n) >= config.min_precision_low)
        raise ConfigError(
            f"{where}: {acceptable} items to accept promise a precision of {best:.2f} at best, below min_precision_low="
            f"{config.min_precision_low:g}; give it {needed} or more"
        )


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else math.nan


def _accuracy(right: Sequence[bool], grades: Sequence[bool | None]) -> float:
    return _share([wanted is grade for wanted, grade in zip(right, grades, strict=True)])
