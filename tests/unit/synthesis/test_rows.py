"""Content addresses: equal questions have equal ids, and anything that changes an answer changes the id."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nexus_ray.synthesis.rows import Message, Prompt, Request, Row, Sampling

PROMPT = Prompt((Message("user", "Ask."),), recipe="r1", parameters={"word": "oak"}, parents=("d1",), source="An oak.")
REQUEST = Request(PROMPT, Sampling(), 0)


def test_ids_do_not_depend_on_the_order_of_parameters() -> None:
    one, other = (
        replace(PROMPT, parameters=dict(pairs)) for pairs in ([("a", "1"), ("b", "2")], [("b", "2"), ("a", "1")])
    )
    assert one.id == other.id and len(one.id) == 32


@pytest.mark.parametrize(
    "change",
    [
        {"content": "Ask."},
        {"content": (Message("system", "Ask."),)},
        {"recipe": "r2"},
        {"parameters": {"word": "elm"}},
        {"parents": ()},
        {"source": None},
    ],
)
def test_every_part_of_a_prompt_counts(change: dict[str, object]) -> None:
    changed = replace(PROMPT, **change)  # type: ignore[arg-type]
    assert changed.id != PROMPT.id
    assert replace(REQUEST, prompt=changed).id("rev") != REQUEST.id("rev")


def test_index_sampling_and_revision_count() -> None:
    ids = {
        REQUEST.id("rev"),
        REQUEST.id("other"),
        replace(REQUEST, index=1).id("rev"),
        replace(REQUEST, sampling=Sampling(temperature=0.1)).id("rev"),
    }
    assert len(ids) == 4


def test_rows_of_one_answer_differ() -> None:
    assert Row("same", "q", 0, PROMPT).id != Row("same", "q", 1, PROMPT).id
