"""Whatever a model writes, a validator gives a verdict: one answer must not end a job, and every rerun after it."""

from __future__ import annotations

import time
from contextlib import suppress

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nexus_ray.config.validators import ArithmeticConfig, JudgeConfig
from nexus_ray.synthesis.rows import Prompt, Row
from nexus_ray.synthesis.validators.agreement import final_answer, settle
from nexus_ray.synthesis.validators.arithmetic import Arithmetic
from nexus_ray.synthesis.validators.digits import MAX_DIGITS, exact
from nexus_ray.synthesis.validators.facts import FactChecker
from nexus_ray.synthesis.validators.grounded import Grounded, numbers
from nexus_ray.synthesis.validators.judge import Judge, trusted_judge
from nexus_ray.synthesis.validators.python_code import extract
from tests.unit.synthesis.validators.test_judge import perfect

LONG = "9" * 5000
PIECES = ["#### ", "\\boxed{", "}", "The answer is ", " = ", "+", "*", "/", "^", "%", "$", "(", ")", "<<", ">>", ",",
          ".", "-", "\n", "```python\n", "\n```\n", '"', "VERDICT: YES", "[END 0]", "\\frac{", "1", " x "]  # fmt: skip
texts = st.lists(
    st.one_of(st.text(max_size=30), st.sampled_from(PIECES), st.integers(1, 6000).map(lambda size: "7" * size)),
    max_size=12,
).map("".join)


@pytest.fixture(scope="module")
def judge() -> Judge:
    return trusted_judge(JudgeConfig(), perfect)


@settings(deadline=None)
@given(texts, texts, texts)
@example(f"#### {LONG}", f"#### {LONG}", LONG)
@example(f"The answer is {LONG}/{LONG}.", f"1 + {LONG} = {LONG}", f"There are {LONG} of them.")
@example(f"\\boxed{{1.{LONG}}}", "", f"```python\nx = {LONG}\n```")
@example("#### 1/0", "1/0 = 1", "((((9)^64)^64)^64)^64 = 1")
def test_no_validator_raises(judge: Judge, one: str, other: str, source: str) -> None:
    prompt = Prompt("Ask.", parameters={"answer": other}, source=source or None)
    rows = [Row(text, "r", place, prompt) for place, text in enumerate((one, other, source))]
    validators = [Arithmetic(ArithmeticConfig(require_final=True)), Grounded(), FactChecker(), judge, settle(rows)]
    for row in rows:
        assert all(validator.validate(row).outcome in ("pass", "reject", "flag") for validator in validators)
        with suppress(SyntaxError):  # the validator's verdict on code that does not parse
            extract(row.text)


def test_a_number_that_is_too_long_is_none() -> None:
    assert exact("1," * 29 + "1") == int("1" * MAX_DIGITS) and exact("1" * (MAX_DIGITS + 1)) is None
    assert exact("0." + "3" * MAX_DIGITS) is None and exact("-2.50") == -2.5
    assert final_answer(f"#### {LONG}") == LONG, "as words, so that equal ones still agree"
    assert final_answer(f"#### 1/{LONG}") is not None
    assert Arithmetic().check(f"8 * 9 = 72\n#### {LONG}", answer="72").outcome == "reject"
    assert Arithmetic().check(f"8 * 9 = 72\n#### {LONG}", answer=LONG).outcome == "pass"


def test_a_made_up_number_is_new_however_long() -> None:
    assert numbers(f"of {LONG} boats") == {LONG}
    assert Grounded().compare(f"The harbour has {LONG} boats.", "The harbour has boats.").outcome == "reject"
    assert Grounded().compare(f"The harbour has {LONG} boats.", f"The harbour has {LONG} boats.").outcome == "pass"


def test_towers_of_powers_are_not_computed() -> None:
    started = time.process_time()
    assert Arithmetic().check("((((((9)^64)^64)^64)^64)^64)^64 = 1").scores["arithmetic.equations"] == 0
    assert Arithmetic().check("((2)^16)^64 = (2^32)^32").outcome == "pass"
    assert time.process_time() - started < 1
