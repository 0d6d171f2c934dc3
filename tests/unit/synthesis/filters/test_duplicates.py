"""Exact and near duplicates: what counts as one, recall and precision over random pairs, memory kept and taken up."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_ray.config.filters import NearFilter
from nexus_ray.synthesis.filters.exact import Exact
from nexus_ray.synthesis.filters.near import Near, jaccard, shingles
from nexus_ray.synthesis.filters.text import Text, words_of
from tests.unit.synthesis.filters.samples import ESSAY, STORY, random_words, row

# --- exact -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "other", "same"),
    [
        ("The fox ran.", "the  FOX\n ran. ", True),
        ("caf\u00e9", "cafe\u0301", True),
        ("Straße", "STRASSE", True),
        ("x = a + b", "x = a - b", False),
        ("The fox ran.", "The fox ran!", False),
        ("The fox ran.", "The foxes ran.", False),
    ],
)
def test_exact(first: str, other: str, same: bool) -> None:
    exact = Exact()
    assert exact.judge(other).outcome == "pass"
    exact.remember(first)
    assert (exact.judge(other).outcome == "reject") == same


# --- near --------------------------------------------------------------------------------------------------------


def true_jaccard(first: str, other: str, words: int) -> float:
    """By definition, from sets of tuples of words."""
    sets = []
    for text in (first, other):
        found = words_of(text)
        sets.append({tuple(found[i : i + words]) for i in range(len(found) - words + 1)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def edited(words: list[str], edits: int, seed: int) -> list[str]:
    """A copy with single words replaced, removed or put in."""
    rng = random.Random(seed)
    result = list(words)
    for place in sorted(rng.sample(range(len(words)), edits), reverse=True):
        result[place : place + 1] = rng.choice([["other"], [], [result[place], "more"]])
    return result


def test_recall_and_precision() -> None:
    """600 texts of 200 words and an edited copy of each, at true Jaccard 0.4 to 1: see the figures asserted."""
    near = Near()
    originals = [random_words(seed, 200) for seed in range(600)]
    for number, words in enumerate(originals):
        near.remember(row(" ".join(words), item=number))
    found_above = above = close = found_close = false = 0
    for number, words in enumerate(originals):
        copy = " ".join(edited(words, 2 + number % 12, number))
        similarity = true_jaccard(" ".join(words), copy, 5)
        verdict = near.judge(copy)
        rejected = verdict.outcome == "reject"
        if similarity >= 0.7:
            above += 1
            found_above += rejected
            assert not rejected or verdict.scores["near.jaccard"] == pytest.approx(similarity, abs=1e-4)
        else:
            false += rejected
        if 0.7 <= similarity < 0.75:
            close += 1
            found_close += rejected
    assert above > 200 and close > 20
    assert found_above >= 0.95 * above and found_close >= 0.95 * close
    assert false == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(6, 120), st.integers(0, 5))
def test_verdict_is_never_wrong_about_similarity(seed: int, size: int, edits: int) -> None:
    """Whatever is rejected is at or above the threshold, by shingles of the pair's own length."""
    words = random_words(seed, size)
    copy = edited(words, min(edits, size), seed)
    near = Near()
    near.remember(" ".join(words))
    length = 3 if min(len(words), len(copy)) < 40 else 5
    similarity = true_jaccard(" ".join(words), " ".join(copy), length)
    if near.judge(" ".join(copy)).outcome == "reject":
        assert similarity >= 0.7
    else:
        assert similarity < 0.9  # misses are for chance at the threshold, not for clear cases


def test_short_and_long_meet() -> None:
    """A text of 42 words and a shorter one cut from it are compared by three words, one of 39 and one of 41 too."""
    words = random_words(1, 42)
    near = Near()
    near.remember(" ".join(words))
    assert near.judge(" ".join(words[:36])).outcome == "reject"
    assert near.judge(" ".join(words[:20])).outcome == "pass"
    other = Near()
    other.remember(" ".join(words[:36]))
    assert other.judge(" ".join(words)).outcome == "reject"


@pytest.mark.parametrize(
    ("first", "other", "outcome"),
    [
        ("What is the capital of France?", "what is the capital of france", "reject"),
        ("What is the capital of France?", "What is the capital of Spain?", "pass"),
        ("Yes.", "yes", "reject"),
        ("Yes.", "No.", "pass"),
        (STORY, STORY.replace("small fox", "young fox").replace("bright marbles", "old coins"), "reject"),
        (STORY, ESSAY, "pass"),
        ("", "a", "pass"),
        ("", "", "pass"),
    ],
)
def test_near_pairs(first: str, other: str, outcome: str) -> None:
    near = Near()
    near.remember(first)
    assert near.judge(other).outcome == outcome


def test_nearest_earliest_row_is_named() -> None:
    near = Near()
    rows = [row(ESSAY, item=0), row(STORY, item=1), row(STORY, item=2)]
    for some in rows:
        near.remember(some)
    assert near.judge(STORY).reason == f"near: 1.00 of {rows[1].id}"


def test_threshold_is_inclusive() -> None:
    first, other = Text("a b c d e f g h"), Text("a b c d e f g x")
    similarity = jaccard(shingles(first, 3), shingles(other, 3))
    assert similarity == pytest.approx(5 / 7)
    at = Near(NearFilter(jaccard=5 / 7))
    at.remember(first)
    assert at.judge(other).outcome == "reject"
