"""What every validator is, and how the sections of a config become validators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from nexus_ray.config.validators import (
    AgreementConfig,
    ArithmeticConfig,
    GroundedConfig,
    PythonCodeConfig,
    ValidatorConfig,
)
from nexus_ray.errors import ConfigError
from nexus_ray.synthesis.rows import PASS, Row, Verdict
from nexus_ray.synthesis.validators.arithmetic import Arithmetic
from nexus_ray.synthesis.validators.calibration import Record
from nexus_ray.synthesis.validators.grounded import Grounded
from nexus_ray.synthesis.validators.judge import trusted_judge
from nexus_ray.synthesis.validators.python_code import PythonCode


class Validator(Protocol):
    """Decides on one row at a time; the verdict depends on the row alone."""

    def validate(self, row: Row) -> Verdict: ...


def build_validators(
    configs: Sequence[ValidatorConfig], *, ask: Callable[[str], str] | None = None, record: Record | None = None
) -> list[Validator]:
    """Validators of the given sections in order, agreement excepted: it needs all answers to a prompt.

    `ask` sends a prompt to the judging model; `record` is where its calibration stands. Raises ConfigError if a judge
    has no model, SynthesisError if a validator cannot be trusted here: no sandbox for code, or a judge that fails its
    golden set.
    """
    return [_build(config, ask, record) for config in configs if not isinstance(config, AgreementConfig)]


def _build(config: ValidatorConfig, ask: Callable[[str], str] | None, record: Record | None) -> Validator:
    if isinstance(config, GroundedConfig):
        return Grounded(config)
    if isinstance(config, PythonCodeConfig):
        return PythonCode(config)
    if isinstance(config, ArithmeticConfig):
        return Arithmetic(config)
    if ask is None:
        raise ConfigError("validators: `judge` has no model to ask; name a generator for it, or leave it out")
    return trusted_judge(config, ask, record=record)  # type: ignore[arg-type]  # the agreement section never comes here


def first_objection(validators: Sequence[Validator], row: Row) -> Verdict:
    """The verdict of the first validator that does not pass the row, with the scores of all that were asked."""
    scores: dict[str, float] = {}
    for validator in validators:
        verdict = validator.validate(row)
        scores |= verdict.scores
        if verdict.outcome != "pass":
            return Verdict(verdict.outcome, verdict.reason, scores)
    return Verdict("pass", scores=scores) if scores else PASS
