"""Agreement: answers are compared in a normal form, and only a clear majority decides."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_ray.config.validators import AgreementConfig
from nexus_ray.synthesis.rows import Prompt, Row
from nexus_ray.synthesis.validators.agreement import final_answer, normal_form, settle

PROMPT = Prompt("How many?")


def rows(*texts: str) -> list[Row]:
    return [Row(text, f"r{number}", 0, PROMPT) for number, text in enumerate(texts)]


@pytest.mark.parametrize(
    "text",
    [
        "8 * 9 = 72\n#### 72",
        "So \\boxed{72}.",
        "We multiply. The answer is 72.",
        "Answer: $72.00",
        "The final answer is: 72 eggs.",
        "It takes a while to see.\n72",
        "#### 71\nNo, that is wrong.\n#### 72",
        "answer is 144/2",
        "#### 7,200%",
    ],
)
def test_one_normal_form_of_a_number(text: str) -> None:
    assert final_answer(text) == "72"


def test_other_answers() -> None:
    assert final_answer("The answer is the Red Kite.") == final_answer("#### red kite") == "red kite"
    assert normal_form("1/3") == "1/3" and normal_form("3 or 4") == "3 or 4" and normal_form("1/0") == "1 0"
    assert normal_form("...") is None and final_answer("") is None
    assert final_answer("This goes on and on, and after all of these many words there is no answer") is None
    assert final_answer("#### -5") == "-5" != final_answer("#### 5")


@pytest.mark.parametrize("minus", ["-", "\u2212", "\u2013", "\u2011"])
def test_a_minus_is_one_however_it_is_written(minus: str) -> None:
    for text in (f"#### {minus}5", f"The answer is {minus}$5.", f"\\boxed{{{minus}5}}", f"#### $ {minus}5"):
        assert final_answer(text) == "-5"
    assert final_answer(f"#### 3{minus}4 hours") != final_answer(f"#### {minus}4 hours")
    votes = rows(f"#### {minus}5", "#### 5", "#### 5")
    assert [settle(votes).validate(row).outcome for row in votes] == ["reject", "pass", "pass"]


def test_an_en_dash_between_numbers_is_none() -> None:
    assert normal_form("5\u20137") == normal_form("5 \u2013 7") == normal_form("5 \u20137") == "5 7"


@pytest.mark.parametrize(
    ("text", "form"),
    [
        (r"\boxed{\frac{3}{4}}", "3/4"),
        (r"\boxed{-\dfrac{3}{4}}", "-3/4"),
        (r"\boxed{1\frac{1}{2}}", "3/2"),
        (r"\boxed{\text{about } \mathbf{72}}", "72"),
        (r"\boxed{71}, no: \boxed{\text{72}} and \boxed{open", "72"),
        ("#### 1 1/2 cups", "3/2"),
        ("#### -1 1/2", "-3/2"),
        ("#### 2 3/2", "2 3 2"),
    ],
)
def test_braces_and_fractions(text: str, form: str) -> None:
    assert final_answer(text) == form


def test_the_majority_passes_and_the_rest_does_not() -> None:
    votes = rows("#### 72", "The answer is 72.", "\\boxed{72.0}", "#### 27", "I really cannot say, " * 5)
    settled = settle(votes)
    assert (settled.answer, settled.share) == ("72", 0.6)
    assert [settled.validate(row).outcome for row in votes] == ["pass"] * 3 + ["reject"] * 2
    assert settled.validate(votes[0]).scores == {"agreement.share": 0.6, "agreement.answers": 5.0}
    assert settled.validate(votes[3]).reason == "agreement: another answer than 0.60 of 5"


@pytest.mark.parametrize(
    ("texts", "share", "outcome"),
    [
        (["#### 1", "#### 1", "#### 2", "#### 2"], 0.5, "reject"),
        (["#### 1", "#### 1", "#### 2", "#### 3"], 0.5, "pass"),
        (["#### 1", "#### 1", "#### 2", "#### 3"], 0.6, "reject"),
        (["#### 1", "#### 1", "#### 2"], 1.0, "reject"),
        (["#### 1", "#### 1", "#### 1"], 1.0, "pass"),
        (["#### 1", "#### 1"], 0.5, "flag"),
        (["...", "...", "..."], 0.5, "reject"),
    ],
)
def test_shares(texts: list[str], share: float, outcome: str) -> None:
    votes = rows(*texts)
    assert settle(votes, AgreementConfig(min_share=share)).validate(votes[0]).outcome == outcome


@settings(deadline=None)
@given(st.lists(st.sampled_from(["#### 1", "#### 2", "#### 3", "..."]), min_size=1, max_size=9), st.randoms())
def test_order_does_not_matter(texts: list[str], random) -> None:
    shuffled = random.sample(texts, len(texts))
    assert settle(rows(*texts)) == settle(rows(*shuffled))


def test_answers_to_two_prompts_do_not_vote_together() -> None:
    with pytest.raises(ValueError, match="2 prompts"):
        settle([*rows("#### 1"), Row("#### 1", "x", 0, Prompt("Another?"))])
