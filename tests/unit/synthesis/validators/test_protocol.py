"""Validators from a config, in order; and FactChecker, the short form."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from nexus_ray.config.validators import ValidatorsConfig
from nexus_ray.errors import ConfigError
from nexus_ray.synthesis.rows import Prompt, Row
from nexus_ray.synthesis.validators.facts import FactChecker
from nexus_ray.synthesis.validators.protocol import build_validators, first_objection

SOURCE = "Each of the 4 boats carries 12 nets. The nets are mended in March."


def row(text: str, source: str | None = SOURCE) -> Row:
    return Row(text, "r", 0, Prompt("Ask.", source=source))


def test_the_first_objection_counts_and_all_scores_are_kept() -> None:
    config = ValidatorsConfig.model_validate({"validators": [{"kind": "arithmetic"}, {"kind": "grounded"}]})
    validators = build_validators(config.validators)
    assert first_objection(validators, row("The nets are mended in March.")).outcome == "pass"
    wrong_sum = first_objection(validators, row("The nets: 4 * 12 = 50."))
    assert wrong_sum.reason.startswith("arithmetic") and "grounded.coverage" not in wrong_sum.scores
    made_up = first_objection(validators, row("The 9 nets are mended in March."))
    assert made_up.reason.startswith("grounded") and set(made_up.scores) >= {"arithmetic.wrong", "grounded.coverage"}
    assert first_objection([], row("Anything.")).outcome == "pass"


def test_a_judge_needs_a_model() -> None:
    config = ValidatorsConfig.model_validate({"validators": [{"kind": "judge"}, {"kind": "agreement"}]})
    with pytest.raises(ConfigError, match="no model to ask"):
        build_validators(config.validators)


@pytest.mark.parametrize(
    "validators",
    [
        [{"kind": "agreement"}, {"kind": "grounded"}],
        [{"kind": "grounded", "min_words": 1.5}],
        [{"kind": "grounded", "typo": 1}],
        [{"kind": "python_code", "sandbox": {"isolation": "maybe"}}],
        [{"kind": "oracle"}],
    ],
)
def test_faulty_configs_are_refused(validators: list[dict[str, object]]) -> None:
    with pytest.raises(ValidationError):
        ValidatorsConfig.model_validate({"validators": validators})


@pytest.mark.parametrize(
    ("text", "source", "holds"),
    [
        ("The 4 boats carry 12 nets each.", SOURCE, True),
        ("The 5 boats carry 12 nets each.", SOURCE, False),
        ("The 5 boats carry 12 nets each.", None, True),
        ("4 * 12 = 48", None, True),
        ("4 * 12 = 49", None, False),
        ("4 boats with 12 nets each: 12 + 4 = 17", SOURCE, False),
        ("", None, True),
    ],
)
def test_fact_checker(text: str, source: str | None, holds: bool) -> None:
    checker = FactChecker()
    assert checker.check(text, source) is holds
    assert (checker.validate(row(text, source)).outcome == "pass") is holds
