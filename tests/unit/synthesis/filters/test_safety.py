"""The word list: whole words only, in disguise too, mild ones by their share; and a classifier beside it."""

from __future__ import annotations

import math

import pytest

from nexus_ray.config.filters import SafetyFilter
from nexus_ray.synthesis.filters.safety import Safety, SafetyClassifier
from tests.unit.synthesis.filters.samples import CODE, ESSAY, STORY

HARMFUL = [
    ("He said fuck and left.", "strong word"),
    ("What a load of BULLSHIT, he cried.", "strong word"),
    ("what the f*ck is that", "strong word"),
    ("what the f**k is that", "strong word"),
    ("this is sh1t and you know it", "strong word"),
    ("full of $ense but fu(k, no: a$$hole", "strong word"),
    ("You should just kill  yourself.", "phrase"),
    ("Learn how to make a bomb at home", "phrase"),
    ("damn, damn, you ass", "mild words"),
    ("You c**t!", "strong word"),
    ('He yelled: "F**k!"', "strong word"),
    ("holy s**t - what a day", "strong word"),
    ("damn (s**t) he said", "strong word"),
    ("*f**king* hell", "strong word"),
    ("don't give a s**t, it's late", "strong word"),
    ("White power forever", "phrase"),
]
HARMLESS = [
    STORY,
    ESSAY,
    CODE,
    "The museum in Scunthorpe, Essex and Middlesex shows shiitake, cockatoos and a cocktail bar.",
    "The assassin passed the classic grass, embarrassed by the bass guitar and the title of the analyst.",
    "Charles Dickens wrote of Dick and the cock that crowed at dawn near Penistone, where all the people of the town "
    "had gathered to see the strange new carriage from London and its four black horses in the rain.",
    "He had to kill time; the plant did not kill itself. A bomb from the war was found; how it came there is unknown.",
    "The sex of the turtle depends on the temperature; a breast of chicken; a titmouse; Uranus.",
    "2*3*4 = 24, p4ss, l33t, a1b2, f(x) * k",
    "total = sum(k*s for k, s in zip(a, b))",
    "c**t",
    "y = c**t",
    "s**t + 1",
    "k**e",
    "print(c**t, 2*c**t, a[k**e])",
    "def f(s, t):\n    return s**t\n",
    "pow = lambda k, e: k**e",
    "The cost grows as c**t, where c is the base and t the time; in code it is `c**t`.",
    "let x = f*ck / 2",
    "He pressed the white power switch, and the white power light came on.",
    "Hell hath no fury like the sea that night, and every man aboard the ship prayed that the old mast would hold "
    "until the morning came and the wind went down at last over the grey and empty water of the bay.",
]


@pytest.mark.parametrize(("text", "finding"), HARMFUL)
def test_harmful(text: str, finding: str) -> None:
    assert Safety().judge(text).reason == f"safety: {finding}"


@pytest.mark.parametrize("text", HARMLESS)
def test_harmless(text: str) -> None:
    assert Safety().judge(text).outcome == "pass"


def test_config() -> None:
    lists = Safety(SafetyFilter(extra_words=["Voldemort", "he who must"], allow_words=["Fuck"], action="flag"))
    assert lists.judge("so fuck it").outcome == "pass"
    assert lists.judge("voldemort came").outcome == "flag"
    assert lists.judge("He, who MUST come").reason == "safety: phrase"
    assert lists.judge("he who may").outcome == "pass"
    assert Safety().judge("fuck fuck shit").scores["safety.strong"] == 3.0


def test_classifier() -> None:
    classifier = SafetyClassifier(lambda texts: [len(text) / 10 for text in texts], 0.5)
    assert classifier.judge("abcde").outcome == "pass"
    assert classifier.judge("abcdef").reason == "safety_classifier: harmful"
    assert classifier.judge("abcdef").scores == {"safety.classifier": 0.6}
    assert SafetyClassifier(lambda texts: [math.nan], 0.5).judge("a").reason == "safety_classifier: no finite score"
    flagging = SafetyClassifier(lambda texts: [1.0] * len(texts), 0.5, action="flag")
    assert [one.outcome for one in flagging.judge_many(["a", "b"])] == ["flag", "flag"]
