"""ROUGE-L novelty against a slow reference, and how much of a text is new phrasing."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_ray.config.filters import DiversityFilter, NoveltyFilter
from nexus_ray.synthesis.filters.diversity import Diversity
from nexus_ray.synthesis.filters.novelty import Novelty, rouge_l
from nexus_ray.synthesis.filters.text import words_of
from tests.unit.synthesis.filters.samples import ESSAY, STORY


def reference(first: str, other: str) -> float:
    """2 LCS / (m + n) by the textbook table."""
    a, b = words_of(first), words_of(other)
    before = [0] * (len(b) + 1)
    for word in a:
        now = [0]
        for place, partner in enumerate(b):
            now.append(before[place] + 1 if word == partner else max(before[place + 1], now[-1]))
        before = now
    return 2 * before[-1] / (len(a) + len(b)) if a or b else 1.0


SENTENCES = st.lists(st.sampled_from(["a", "b", "c", "d", "e", "f", "g", "h"]), min_size=1, max_size=14).map(" ".join)


@given(SENTENCES, SENTENCES)
def test_rouge_is_the_textbook_one(first: str, other: str) -> None:
    assert rouge_l(first, other) == pytest.approx(reference(first, other))


@settings(deadline=None)
@given(st.lists(SENTENCES, max_size=20), SENTENCES, st.sampled_from([0.3, 0.5, 0.7, 0.9, 1.0]))
def test_index_loses_nothing(accepted: list[str], text: str, limit: float) -> None:
    """The verdict with the index of words is that of comparing with every text."""
    novelty = Novelty(NoveltyFilter(max_rouge=limit))
    for some in accepted:
        novelty.remember(some)
    highest = max((reference(text, some) for some in accepted), default=0.0)
    assert (novelty.judge(text).outcome == "reject") == (highest > limit + 1e-12)
    assert novelty.highest(text) == pytest.approx(highest if highest >= limit - 1e-9 else 0.0)


PAIRS = [
    ("Write a poem about the sea.", "Write a short poem about the sea.", "reject"),  # 12 / 13
    ("Write a poem about the sea.", "Write a story about a mountain.", "pass"),  # 6 / 12
    ("List three fruits that are red.", "Name three animals that can fly at night.", "pass"),
    ("a b c d e f g", "a b c d e f g x y z w v u", "pass"),  # 14 / 20: 0.7 itself passes
    ("a b c d e f g", "a b c d e f g x y z w v", "reject"),
    (STORY, STORY.replace("small", "young"), "reject"),
    (STORY, ESSAY, "pass"),
]


@pytest.mark.parametrize(("first", "other", "outcome"), PAIRS)
def test_novelty(first: str, other: str, outcome: str) -> None:
    novelty = Novelty()
    novelty.remember(first)
    assert novelty.judge(other).outcome == outcome


def test_what_a_prompt_showed_is_no_news_and_the_reason_says_so() -> None:
    novelty = Novelty()
    novelty.show(STORY)
    novelty.remember(ESSAY)
    assert novelty.judge(STORY.replace("small", "young")).reason == "novelty: close to a text of the prompts"
    assert novelty.judge(ESSAY).reason == "novelty: close to an accepted row"


def test_only_the_beginning_is_looked_at() -> None:
    novelty = Novelty(NoveltyFilter(max_words=5))
    novelty.remember("a b c d e f g h")
    assert novelty.judge("a b c d e v w x y z").outcome == "reject"


def test_many_words() -> None:
    """Beyond the code points there are, words share characters; nothing breaks at the surrogates."""
    novelty = Novelty(NoveltyFilter(max_words=200))
    rng = random.Random(0)
    for start in range(0, 60000, 200):
        novelty.remember(" ".join(f"w{start + i}" for i in range(200)))
    assert novelty.judge(" ".join(f"w{55200 + i}" for i in range(200))).outcome == "reject"
    assert novelty.judge(" ".join(f"w{rng.randrange(60000)}" for i in range(200))).outcome == "pass"
    "".join(novelty._texts).encode()  # no surrogates


def test_diversity_inside_a_text() -> None:
    diversity = Diversity()
    assert diversity.measure(STORY) == 1.0
    assert diversity.measure("a b c d a b c d a b c d") == pytest.approx(4 / 9)
    assert diversity.judge("ha " * 40).reason == "diversity: repetitive"
    assert diversity.judge("").outcome == "reject" and diversity.judge("Yes.").outcome == "pass"


def test_diversity_beside_what_was_accepted() -> None:
    """Each text is no pairwise duplicate, but all are put together from the same phrases."""
    phrases = [
        f"{word} and then they all went home" for word in ["ann", "bob", "cat", "dan", "eve", "fay", "gus", "hal"]
    ]
    diversity = Diversity(DiversityFilter(threshold=0.5))
    accepted = 0
    for start in range(8):
        text = ". ".join(phrases[start:] + phrases[:start])
        if diversity.judge(text).outcome == "pass":
            diversity.remember(text)
            accepted += 1
    assert accepted == 1
    assert diversity.judge(STORY).outcome == "pass"


def test_diversity_window() -> None:
    diversity = Diversity(DiversityFilter(window=2))
    for text in ("a b c d e", "f g h i j", "k l m n o"):
        diversity.remember(text)
    assert diversity.measure("a b c d e") == 1.0 and diversity.measure("f g h i j") == 0.0
    diversity.remember("p q r s t")
    assert diversity.measure("f g h i j") == 1.0 and diversity.measure("k l m n o") == 0.0
    twice = Diversity(DiversityFilter(window=2))
    for text in ("a b c d e", "a b c d x", "k l m n o"):
        twice.remember(text)
    assert twice.measure("a b c d") == 0.0  # still in the second
    alone = Diversity(DiversityFilter(window=0))
    alone.remember(STORY)
    assert alone.measure(STORY) == 1.0
