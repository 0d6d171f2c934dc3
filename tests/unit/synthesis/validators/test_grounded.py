"""Grounding: a labelled set in both directions, and what each part of the check contributes."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_ray.config.validators import GroundedConfig
from nexus_ray.synthesis.rows import Prompt, Row
from nexus_ray.synthesis.validators.grounded import Grounded, Source, numbers, support
from nexus_ray.synthesis.validators.words import capitalised, sentences, stem

from .labelled import BEYOND_WORDS, GROUNDED, HARBOUR, MOSS, UNGROUNDED


def row(text: str, source: str | None) -> Row:
    return Row(text, "r", 0, Prompt("Ask.", source=source))


@pytest.mark.parametrize(("source", "text"), GROUNDED, ids=range(len(GROUNDED)))
def test_supported_texts_pass(source: str, text: str) -> None:
    assert Grounded().validate(row(text, source)).reason == ""


@pytest.mark.parametrize(("source", "text"), UNGROUNDED, ids=range(len(UNGROUNDED)))
def test_unsupported_texts_are_rejected(source: str, text: str) -> None:
    assert Grounded().validate(row(text, source)).outcome == "reject"


@pytest.mark.parametrize(("source", "text"), BEYOND_WORDS, ids=range(len(BEYOND_WORDS)))
def test_claims_of_the_sources_own_words_are_beyond_it(source: str, text: str) -> None:
    assert Grounded().validate(row(text, source)).outcome == "pass"


def test_what_was_found_is_named_and_scored_without_the_text() -> None:
    verdict = Grounded().validate(row('In 1999 Zorn wrote "all of this is invented".', HARBOUR))
    assert verdict.reason == "grounded: not in the source: 1 numbers, 1 names, 1 quotations"
    assert verdict.scores["grounded.new_facts"] == 3
    loose = Grounded().validate(row("Elegant painted lighthouses attract wealthy visitors.", MOSS))
    assert loose.reason == "grounded: a sentence has 0.00 of its words from the source, less than 0.6"
    assert "Zorn" not in verdict.reason and "lighthouse" not in loose.reason


def test_settings() -> None:
    text = "A dried moss turns green again within minutes. Rich farmers buy expensive tractors."
    assert Grounded().validate(row(text, MOSS)).outcome == "reject"
    assert Grounded(GroundedConfig(min_sentences=0.5)).validate(row(text, MOSS)).outcome == "pass"
    wrong_year = row("The harbour was dug in 1847.", HARBOUR)
    assert Grounded(GroundedConfig(new_facts="flag")).validate(wrong_year).outcome == "flag"
    assert Grounded().validate(row("Anything.", None)).outcome == "flag"


def test_numbers_are_compared_by_value() -> None:
    assert numbers("12,500 crowns, 3.50 and seven; one of them") == {Fraction(12500), Fraction(7, 2), Fraction(7)}
    assert numbers("twelve") == numbers("12")
    assert numbers("3 million, 2bn and one thousand") == {Fraction(3 * 10**6), Fraction(2 * 10**9), Fraction(1000)}
    assert numbers("version 1.2.3") != numbers("version 3.2.1")


def test_sentences_and_names() -> None:
    text = 'Dr. A. Moss met Mr. Lee at 3.5 km. "Stop!" she said. Then they left.\n- A point\n2. Another one'
    assert sentences(text) == [
        "Dr. A. Moss met Mr. Lee at 3.5 km.", '"Stop!" she said.', "Then they left.", "A point", "Another one"
    ]  # fmt: skip
    assert capitalised("Rain fell. Anna Berg saw Oslo, and I did not. However, it dried.") == {"Anna", "Berg", "Oslo"}
    assert capitalised("They sang for Ann-And-I and saw Two Harbors.") == {"Ann", "Harbors"}
    assert len({stem(word) for word in ("repair", "repairs", "repaired", "repairing")}) == 1


def test_many_numbers_are_cheap() -> None:
    started = time.process_time()
    assert Grounded().compare("1 " * 20000, "1 " * 20000).outcome == "pass"
    assert time.process_time() - started < 5


PIECES = st.sampled_from(
    [
        "I",
        "AA",
        "Anna",
        "A's",
        "Two",
        "two",
        "Ten",
        "3",
        "not",
        "isn't",
        "It's",
        "No",
        "the",
        "&",
        '"',
        "one",
        "million",
        "to",
        "$",
        "km",
        "miles",
        "m",
        "pounds",
        "°",
        "degrees",
        "C",
    ]
)
GLUE = st.sampled_from([" ", "-", "'", "", ". ", "\n", "'s "])
PUT_TOGETHER = st.lists(st.tuples(PIECES, GLUE), max_size=12).map(lambda pairs: "".join(map("".join, pairs)))


@settings(deadline=None)
@given(st.text(max_size=300) | PUT_TOGETHER)
def test_any_text_supports_itself(text: str) -> None:
    found = support(text, Source(text), min_words=0.6)
    assert found.new_facts == 0 and found.supported == 1.0
