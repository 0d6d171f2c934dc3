"""Contamination planted verbatim and lightly edited is found, in both directions; ordinary likeness is not."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_ray.config.filters import ContaminationFilter
from nexus_ray.synthesis.filters.contamination import Contamination, HeldOut, overlap, overlap_table
from nexus_ray.synthesis.filters.hash_table import HashTable
from nexus_ray.synthesis.filters.text import word_hashes
from tests.unit.synthesis.filters.samples import ESSAY, STORY, random_words

QUESTION = "If a train leaves Lyon at nine and travels at eighty kilometres per hour, when does it reach Dijon?"
SHORT = "Which river flows through the city of Vienna?"
TINY = "What is love?"
HELD_OUT = HeldOut([("essay", ESSAY), ("question", QUESTION), ("short", SHORT), ("tiny", TINY)])


def lightly(text: str, every: int, seed: int = 0) -> str:
    """Every so many words, one is replaced, left out or doubled."""
    rng = random.Random(seed)
    result: list[str] = []
    for place, word in enumerate(text.split()):
        change = rng.choice(["replaced", "gone", "doubled"]) if place % every == every - 1 else ""
        result += {"": [word], "replaced": ["whatever"], "gone": [], "doubled": [word, "indeed"]}[change]
    return " ".join(result)


PASSAGE = " ".join(ESSAY.split()[10:50])

FOUND = [
    (f"{STORY} {PASSAGE} {STORY}", "13 words in a row of essay"),
    (PASSAGE.upper().replace(",", " --").replace(" ", "\n"), "13 words in a row of essay"),
    (f"Q: {QUESTION} A: at noon.", "13 words in a row of question"),
    (f"{STORY} {SHORT.lower()} The Danube.", "whole item of short"),
    (f"{STORY} {lightly(PASSAGE, 8)} {STORY}", "lightly edited of essay"),
    (lightly(ESSAY, 7), "lightly edited of essay"),
    (QUESTION.replace("nine", "ten").replace("eighty", "ninety"), "lightly edited of question"),
    (QUESTION.replace("a train leaves Lyon", "a bus leaves Paris"), "13 words in a row of question"),
    (
        QUESTION.replace("nine and", "nine very early one day and").replace("per hour", "or even more per hour"),
        "lightly edited of question",
    ),
    (SHORT.replace("Vienna", "Budapest"), "lightly edited of short"),
    ("the finest mud. People learned early to farm this ground", "lightly edited of essay"),  # a row inside an item
]
CLEAN = [
    STORY,
    SHORT[:30],
    "Which mountain stands near the city of Vienna, and who climbed it?",
    "A train leaves Lyon at noon; it was cold. When does the next one reach Paris?",
    "When the current slows, the boat drifts, and the river carries leaves from the mountains to the sea.",
    "What is love? Nobody in the village could say.",
    lightly(ESSAY, 3),
    "",
]


@pytest.mark.parametrize(("text", "finding"), FOUND)
def test_found(text: str, finding: str) -> None:
    verdict = Contamination(HELD_OUT).judge(text)
    assert verdict.reason == f"contamination: {finding}"
    assert verdict.scores["contamination.share"] >= 0.5


@pytest.mark.parametrize("text", CLEAN)
def test_clean(text: str) -> None:
    assert Contamination(HELD_OUT).judge(text).outcome == "pass"


def test_too_short_items_are_counted() -> None:
    assert HELD_OUT.ignored.total() == 1 and HELD_OUT.names == ["essay", "question", "short"]
    assert Contamination(HeldOut([])).judge(STORY).outcome == "pass"


def test_planted_among_many() -> None:
    """200 held-out texts of 200 words; a passage of 30 to 60 words of one of them planted in each of 400 rows."""
    rng = random.Random(7)
    texts = [" ".join(random_words(seed, 200)) for seed in range(200)]
    held_out = HeldOut((str(number), text) for number, text in enumerate(texts))
    filter = Contamination(held_out)
    verbatim = edited = 0
    for number in range(200):
        words = texts[number].split()
        start, size = rng.randrange(140), rng.randint(30, 60)
        passage, around = " ".join(words[start : start + size]), random_words(10_000 + number, 120)
        verbatim += filter.judge(" ".join([*around[:60], passage, *around[60:]])).reason.endswith(f" of {number}")
        edited += filter.judge(" ".join([*around[:60], lightly(passage, 8, number), *around[60:]])).reason.endswith(
            f" of {number}"
        )
    false = sum(filter.judge(" ".join(random_words(20_000 + number, 200))).outcome != "pass" for number in range(400))
    assert verbatim == 200
    assert edited >= 195
    assert false == 0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(13, 40), st.integers(0, 150))
def test_any_thirteen_words_are_found(seed: int, size: int, at: int) -> None:
    held = random_words(seed, 200)
    row = [*random_words(seed + 1, 30), *held[at : at + size], *random_words(seed + 2, 30)]
    assert Contamination(HeldOut([("h", " ".join(held))])).judge(" ".join(row)).outcome == "reject"


def test_the_other_direction() -> None:
    """Of items that should be unseen: which rows hold a part of them."""
    rows = [("r1", STORY), ("r2", f"{STORY} {PASSAGE}"), ("r3", f"{lightly(PASSAGE, 8)} {QUESTION}")]
    assert overlap([("essay", ESSAY), ("question", QUESTION), ("short", SHORT)], rows) == {
        "essay": ["r2", "r3"],
        "question": ["r3"],
    }


def test_the_table_counts_items_of_each_set_and_the_rows_that_touch_them() -> None:
    items = [("books/a1", ESSAY), ("books/b2", QUESTION), ("gsm8k: test.jsonl, line 3, question", SHORT)]
    items += [("gsm8k: test.jsonl, line 4, question", "too short")]
    rows = [("r1", STORY), ("r2", f"{STORY} {PASSAGE}"), ("r3", lightly(PASSAGE, 8))]
    assert overlap_table(items, rows) == [
        {"unseen": "books", "items": 2, "too_short": 0, "touched": 1, "touched_share": 0.5, "rows": 2},
        {"unseen": "gsm8k", "items": 1, "too_short": 1, "touched": 0, "touched_share": 0.0, "rows": 0},
    ]
    assert overlap_table([], rows) == []


def test_every_item_is_named() -> None:
    held_out = HeldOut([("one", ESSAY), ("two", f"Before. {ESSAY} After.")])
    assert [hit.item for hit in held_out.hits(PASSAGE)] == ["one", "two"]


def test_commonplaces_lead_nowhere() -> None:
    """A run of words in hundreds of held-out texts is no sign of any of them."""
    opening = "once upon a time there was a little girl"
    held_out = HeldOut((str(n), f"{opening} {' '.join(random_words(n, 60))}") for n in range(300))
    assert Contamination(held_out).judge(f"{opening} {' '.join(random_words(999, 60))}").outcome == "pass"
    cased = ContaminationFilter(ngram=9, short_words=9)
    strict = HeldOut([("a", f"{opening} {' '.join(random_words(1, 60))}")], cased)
    assert Contamination(strict).judge(f"{opening} {' '.join(random_words(999, 60))}").outcome == "reject"


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 9))), st.lists(st.sampled_from("abcdefgh")))
def test_hash_table_is_a_dictionary_of_lists(entries: list[tuple[str, int]], query: list[str]) -> None:
    import numpy as np

    table = HashTable(word_hashes([key for key, _ in entries]), np.array([value for _, value in entries], np.int64))
    places, numbers = table.find(word_hashes(query))
    expected = [(place, value) for place, key in enumerate(query) for other, value in entries if other == key]
    assert sorted(zip(places.tolist(), numbers.tolist(), strict=True)) == sorted(expected)
