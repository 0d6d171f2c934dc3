"""Arithmetic: right sums pass, wrong ones are found, and what is no claim about numbers is left alone."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_ray.config.validators import ArithmeticConfig
from nexus_ray.synthesis.rows import Prompt, Row
from nexus_ray.synthesis.validators.arithmetic import Arithmetic, equations

from .labelled import NO_SUMS, RIGHT_SUMS, WRONG_SUMS


@pytest.mark.parametrize("text", RIGHT_SUMS)
def test_right_sums_are_found_and_pass(text: str) -> None:
    held = [equation.holds for equation in equations(text)]
    assert held and False not in held
    assert Arithmetic().check(text).outcome == "pass"


@pytest.mark.parametrize("text", WRONG_SUMS)
def test_wrong_sums_are_rejected(text: str) -> None:
    verdict = Arithmetic().check(text)
    assert verdict.outcome == "reject" and "1 of" in verdict.reason
    assert verdict.scores["arithmetic.wrong"] == 1


@pytest.mark.parametrize("text", NO_SUMS)
def test_what_is_no_sum_is_left_alone(text: str) -> None:
    assert list(equations(text)) == []


def test_every_equation_of_a_solution_counts() -> None:
    text = "First 3 * 4 = 12 eggs. Then 12 - 5 = 7 eggs.\nSo 7 * $2 = $14.\n#### 14"
    verdict = Arithmetic().check(text)
    assert verdict.scores == {"arithmetic.equations": 3.0, "arithmetic.wrong": 0.0}


@pytest.mark.parametrize(
    ("final", "known", "outcome"),
    [
        ("#### 72", "72", "pass"),
        ("#### $1,072.00", "1072", "pass"),
        ("#### 27", "72", "reject"),
        ("#### Paris", "paris", "pass"),
        ("#### many", "72", "reject"),
        ("#### 1\n#### 72", "72", "pass"),
        ("72", "72", "reject"),
        ("#### \u22125", "5", "reject"),
        ("#### \u22125", "-5", "pass"),
        ("#### -$5", "\u2013$5", "pass"),
        ("#### -$5", "$5", "reject"),
    ],
)
def test_final_answers(final: str, known: str, outcome: str) -> None:
    validator = Arithmetic(ArithmeticConfig(require_final=True))
    row = Row(f"8 * 9 = 72\n{final}", "r", 0, Prompt("Ask.", parameters={"answer": known}))
    assert validator.validate(row).outcome == outcome


def test_a_demanded_number_of_equations() -> None:
    validator = Arithmetic(ArithmeticConfig(min_equations=2))
    assert validator.check("1 + 1 = 2").reason == "arithmetic: 1 equations, fewer than 2"
    assert validator.check("1 + 1 = 2 and 2 + 2 = 4").outcome == "pass"


numbers = st.integers(0, 10**6)


@settings(deadline=None)
@given(numbers, st.sampled_from("+-*/"), numbers, st.integers(-3, 3), st.sampled_from(["", " apples", " kg"]))
def test_sums_are_judged_exactly(a: int, sign: str, b: int, off: int, unit: str) -> None:
    if sign == "/":
        a, b = a * (b + 1), b + 1
    exact = {"+": Fraction(a + b), "-": Fraction(a - b), "*": Fraction(a * b), "/": Fraction(a, b or 1)}[sign]
    (found,) = equations(f"We get {a}{unit} {sign} {b:,}{unit} = {int(exact) + off}{unit} then.")
    assert found.holds is (off == 0)


@settings(deadline=None)
@given(st.text(alphabet="0123456789+-*/^=()x% .$", max_size=80))
def test_any_text_is_read(text: str) -> None:
    Arithmetic().check(text)


def test_hostile_texts_are_cheap() -> None:
    for text in ("(" * 5000 + "1" + ")" * 5000 + " = 1", "9^9^9^9^9^9 = 1", "1+" * 20000 + "1 = 5", "= " * 20000,
                 "-" * 5000 + "1 = 1", "9" * 5000 + " + 1 = 2", "((((1)^64)^64)^64)^64 + (9^64)^64 = 3"):  # fmt: skip
        started = time.process_time()
        Arithmetic().check(text)
        assert time.process_time() - started < 5
