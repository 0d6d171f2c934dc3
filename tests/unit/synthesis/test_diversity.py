"""Diversity figures: right on small texts, fair to length, alarmed by collapse, quiet about real text."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_ray.errors import DataError
from nexus_ray.synthesis.diversity import Measures, measure_diversity, words_of

VOCABULARY = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("r", "n", "st", "ck", "lling")]


def language(count: int, *, seed: int, words: int = 80, vocabulary: int = 300, subjects: int = 6) -> Iterator[str]:
    """Texts of a made-up language: Zipf-like words, each text about one of several subjects."""
    generator = np.random.default_rng(seed)
    chances = 1 / np.arange(1, vocabulary + 1)
    for _ in range(count):
        about = int(generator.integers(subjects))
        common = generator.choice(vocabulary, words, p=chances / chances.sum())
        own = generator.integers(20, size=words) + 100 + 20 * about
        numbers = np.where(generator.random(words) < 0.3, own % vocabulary, common)
        yield " ".join(VOCABULARY[n].title() + "." if n % 9 == 0 else VOCABULARY[n] for n in numbers)


ANCHOR = list(language(600, seed=0))


def compare(generated: list[str], **options: int) -> tuple[Measures, Measures]:
    report = measure_diversity(generated, ANCHOR, **options)
    return report.generated, report.anchor


def test_figures_of_a_text_small_enough_to_count() -> None:
    rows = ["One two three four five six.", "One two three four FIVE seven!", "Red blue"]
    report = measure_diversity(rows, [" ".join(f"w{i}x{j}" for j in range(6)) for i in range(40)])
    found = report.generated
    assert (report.rows, report.words, report.generated_rows) == (3, 14, 3)
    assert found.distinct_1 == 9 / 14 and found.distinct_2 == 7 / 11 and found.distinct_3 == 5 / 8
    assert found.common_opening == 2 / 3
    assert found.self_repetition == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert report.anchor.distinct_1 == 1 and report.anchor.self_repetition == 0


def test_the_compression_ratio_is_that_of_the_rows() -> None:
    text = "Nothing will come of nothing: speak again. " * 30
    report = measure_diversity([text.strip()], [text, text])
    data = text.strip().rstrip(".").encode()
    assert report.generated.compression_ratio == len(data) / len(zlib.compress(data, 9))


def test_real_text_beside_real_text_differs_little() -> None:
    ours, real = compare(list(language(250, seed=7)))
    for name in ("distinct_1", "distinct_2", "compression_ratio", "tail_kept", "topics_hit", "topic_entropy"):
        assert getattr(ours, name) == pytest.approx(getattr(real, name), rel=0.1), name
    assert ours.vendi_score == pytest.approx(real.vendi_score, rel=0.15)


def test_a_shared_opening_shows() -> None:
    ours, real = compare(
        [f"Once upon a time there {text}" if i % 5 < 3 else text for i, text in enumerate(ANCHOR[:200])]
    )
    assert 0.55 < ours.common_opening < 0.65 and real.common_opening < 0.05


def test_a_lost_tail_shows() -> None:
    ours, real = compare(list(language(250, seed=7, vocabulary=60)))
    assert ours.tail_kept is not None and real.tail_kept is not None
    assert ours.tail_kept < 0.3 * real.tail_kept and (ours.distinct_1 or 0) < 0.5 * (real.distinct_1 or 1)


def test_a_lost_subject_shows() -> None:
    ours, real = compare(list(language(250, seed=7, subjects=1)))
    assert (ours.topics_hit or 1) < 0.7 * (real.topics_hit or 0)
    assert (ours.topic_entropy or 1) < (real.topic_entropy or 0) - 0.1


def test_repeated_rows_show() -> None:
    ours, real = compare(list(language(10, seed=7)) * 20)
    assert ours.compression_ratio > 3 * real.compression_ratio
    assert (ours.self_repetition or 0) > 0.9 and ours.vendi_score <= 10.1


@pytest.mark.parametrize("words", [5, 20, 60])
def test_both_sides_have_the_same_number_and_length_of_rows(words: int) -> None:
    """Without matching, short rows would look more varied than the anchor's by their length alone."""
    report = measure_diversity(language(200, seed=3, words=words), ANCHOR)
    assert report.words == 200 * words == report.rows * words
    for name in ("distinct_1", "compression_ratio"):
        assert getattr(report.generated, name) == pytest.approx(getattr(report.anchor, name), rel=0.1)


def test_short_documents_shorten_both_sides_and_few_pieces_mean_fewer_rows() -> None:
    report = measure_diversity(language(50, seed=3, words=90), [f"A short text number {i}" for i in range(20)])
    assert (report.rows, report.words, report.reference_rows) == (10, 50, 10)
    assert report.clusters == 0 and report.generated.topics_hit is None and report.generated.topic_entropy is None


def test_long_documents_give_pieces_beginnings_first() -> None:
    documents = [f"Scene {i} opens. " + text for i, text in enumerate([" ".join(ANCHOR[:30])] * 40)]
    begun = measure_diversity(language(20, seed=3, words=50), documents, max_rows=20)
    assert begun.rows == 20 and begun.anchor.common_opening == 1 / 20
    more = measure_diversity(language(200, seed=3, words=50), documents)
    assert (more.rows, more.reference_rows) == (200, 980)


def test_a_sample_bounds_what_is_compared_and_is_spread_over_the_stream() -> None:
    stream = [f"early {text}" for text in language(1500, seed=1, words=12)] + list(language(1500, seed=2, words=12))
    report = measure_diversity(iter(stream), ANCHOR, max_rows=100, max_words=10)
    assert (report.rows, report.words, report.generated_rows) == (100, 1000, 3000)
    same = measure_diversity(iter(stream), ANCHOR, max_rows=100, max_words=10)
    other = measure_diversity(iter(stream), ANCHOR, max_rows=100, max_words=10, seed=1)
    assert same == report != other


def test_a_row_of_marks_stays_small() -> None:
    report = measure_diversity(["word " + "! " * 200_000 + "end", "other words here"], ANCHOR, max_words=10)
    assert report.generated.compression_ratio < 10


@pytest.mark.parametrize(
    ("generated", "anchor", "words"),
    [
        ([], ANCHOR, "no generated"),
        (["?! ..."], ANCHOR, "no generated"),
        (["a b"], [], "0 pieces"),
        (["a b"], ["one"], "1 pieces"),
    ],
)
def test_too_little_text_is_said(generated: list[str], anchor: list[str], words: str) -> None:
    with pytest.raises(DataError, match=words):
        measure_diversity(generated, anchor)


def test_the_table_is_json_and_says_which_way_is_better() -> None:
    table = measure_diversity(ANCHOR[:20], ["a b"] * 3).table()
    rows = {row["measure"]: row for row in json.loads(json.dumps(table, allow_nan=False))}
    assert len(rows) == 10 and rows["topics_hit"]["ratio"] is None and rows["self_repetition"]["generated"] is None
    assert rows["compression_ratio"]["more_varied"] == "lower" and rows["tail_kept"]["more_varied"] == "higher"
    assert rows["distinct_1"]["ratio"] == pytest.approx(
        rows["distinct_1"]["generated"] / rows["distinct_1"]["anchor"], rel=1e-4
    )


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.text("ab \n.é", max_size=30), min_size=1, max_size=12), seed=st.integers(0, 3))
def test_any_text_gives_figures_in_range(rows: list[str], seed: int) -> None:
    if not any(map(words_of, rows)):
        return
    report = measure_diversity(rows, ANCHOR[:90], seed=seed, max_rows=8, max_words=5)
    for side in (report.generated, report.anchor):
        for name in ("distinct_1", "distinct_2", "self_repetition", "common_opening", "tail_kept", "topics_hit"):
            value = getattr(side, name)
            assert value is None or 0 <= value <= 1
        assert 0 <= side.vendi_score <= report.rows + 1e-9
