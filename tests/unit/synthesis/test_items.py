"""An answer gives exactly what was asked for, or is rejected as a whole with the reason."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_ray.config.prompts import ItemsConfig
from nexus_ray.errors import ConfigError
from nexus_ray.synthesis.items import ItemParser
from nexus_ray.synthesis.rows import PASS, Answer, Prompt, Request, Sampling

REQUEST = Request(Prompt("Ask."), Sampling(), 0)


def parse(text: str, finish: str = "stop", /, **config: object) -> tuple[list[str], str]:
    """Texts of the rows, and the reason of a rejection."""
    parser = ItemParser(ItemsConfig.model_validate(config))
    parsed = parser.parse(REQUEST, Answer("q", text, finish, 1, 1), domain="d")  # type: ignore[arg-type]
    assert [row.item for row in parsed.rows] == list(range(len(parsed.rows)))
    assert all((row.request_id, row.domain, row.prompt) == ("q", "d", REQUEST.prompt) for row in parsed.rows)
    assert (parsed.verdict == PASS) or (parsed.verdict.outcome == "reject" and len(parsed.rows) == 1)
    return [row.text for row in parsed.rows], parsed.verdict.reason


QA = {"format": "tags", "count": 2, "fields": ["question", "answer"]}
PAIRS = {"format": "json", "count": 2, "fields": ["question", "answer"]}


@pytest.mark.parametrize(
    ("text", "config", "expected"),
    [
        (" A story.\n", {}, ["A story."]),
        ("1. One.\n2. Two,\nlonger.\n\n3) Three 3.5 km.", {"format": "numbered", "count": 3},
         ["One.", "Two,\nlonger.", "Three 3.5 km."]),
        ('["a", "b\\u00e9"]', {"format": "json", "count": 2}, ["a", "bé"]),
        ('```json\n["a", "b"]\n```\n', {"format": "json", "count": 2}, ["a", "b"]),
        ("<item>a</item>\n<item> b <i>c</i> </item>", {"format": "tags", "count": 2}, ["a", "b <i>c</i>"]),
        ("<question>q1</question><answer>a1</answer>\n<question>q2</question> <answer>a2</answer>", QA,
         ["q1\na1", "q2\na2"]),
        ('[{"question": "q1", "answer": "a1"}, {"answer": "a2", "question": "q2"}]',
         {**PAIRS, "text": "Q: {{ question }}\nA: {{ answer }}"}, ["Q: q1\nA: a1", "Q: q2\nA: a2"]),
    ],
)  # fmt: skip
def test_what_fits_is_taken_apart(text: str, config: dict[str, object], expected: list[str]) -> None:
    assert parse(text, **config) == (expected, "")


@pytest.mark.parametrize(
    ("text", "config", "reason"),
    [
        (" \n ", {}, "empty"),
        ("1. a\n2. b", {"format": "numbered", "count": 3}, "2 items, not 3"),
        ("1. a\n2. b\n3. c", {"format": "numbered", "count": 2}, "3 items, not 2"),
        ("1. a\n3. b", {"format": "numbered", "count": 2}, "number 3 stands where 2 should"),
        ("1. a\n1. x\n2. b", {"format": "numbered", "count": 2}, "number 1 stands where 2 should"),
        ("Sure! Here are two:\n1. a\n2. b", {"format": "numbered", "count": 2}, "text before the first item"),
        ("1. a\n2.\n", {"format": "numbered", "count": 2}, "item 2 is empty"),
        ("a and b", {"format": "numbered", "count": 2}, "no numbered list"),
        ('["a"', {"format": "json", "count": 1}, "no JSON"),
        ('Here: ["a"]', {"format": "json", "count": 1}, "no JSON"),
        ('{"a": 1}', {"format": "json", "count": 1}, "no JSON array"),
        ("[1]", {"format": "json", "count": 1}, "item 1 is no text"),
        ("[NaN]", {"format": "json", "count": 1}, "NaN is no JSON"),
        ("[" * 100_000, {"format": "json", "count": 1}, "nested too deep"),
        ('["\\ud800"]', {"format": "json", "count": 1}, "half a surrogate"),
        ('[{"question": "q", "answer": "a"}, {"question": "q"}]', PAIRS, "item 2 lacks answer"),
        ('[{"question": "q", "answer": "a", "note": ""}, {}]', PAIRS, "item 1 has 1 keys too many"),
        ('[{"question": "q", "question": "r", "answer": "a"}]', PAIRS, "a key twice"),
        ('[{"question": "q", "answer": null}]', PAIRS, "item 1 has no text as answer"),
        ('["q", "a"]', PAIRS, "item 1 is no object"),
        ("<question>q1</question><question>q2</question><answer>a</answer>", QA,
         "item 1: <question> stands where <answer> should"),
        ("<question>q1</question><answer>a1</answer><answer>a2</answer>", QA, "<answer> stands where <question>"),
        ("<question>q1</question><answer>a1</answer><question>q2</question>", QA, "item 2: <answer> is missing"),
        ("<question>q1</question><answer>a1", QA, "item 1: <answer> is not closed"),
        ("<question>q1<answer>a1</answer></question>", QA, "<answer> stands inside <question>"),
        ("</item>", {"format": "tags", "count": 1}, "closes what is not open"),
        ("<item>a</item> and <item>b</item>", {"format": "tags", "count": 2}, "text outside the tags before item 2"),
        ("Sure: <item>a</item>", {"format": "tags", "count": 1}, "text outside the tags before item 1"),
        ("<item>a</item> Enjoy!", {"format": "tags", "count": 1}, "text after the last item"),
        ("a", {"format": "tags", "count": 1}, "no tags"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_rejected_whole(text: str, config: dict[str, object], reason: str) -> None:
    texts, found = parse(text, **config)
    assert texts == [text] and found.startswith("items: ") and reason in found


def test_a_torn_list_is_rejected_and_a_torn_text_is_left_to_its_filter() -> None:
    assert "cut off" in parse("1. a\n2. b", "length", format="numbered", count=2)[1]
    assert parse("A sto", "length") == (["A sto"], "")


def test_a_rejected_answer_can_be_written_as_utf8() -> None:
    texts, reason = parse("a\ud800")
    assert texts == ["a\\ud800"] and "surrogate" in reason


def test_a_template_over_other_names_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"items.text uses 'reply'"):
        ItemParser(ItemsConfig(format="tags", fields=["question", "answer"], text="{{ reply }}"))


WORDS = st.text("ab <>/.1\n", max_size=8)


@settings(max_examples=150, deadline=None)
@given(items=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4), drop=st.integers(0, 12))
def test_no_part_ever_reaches_another_item(items: list[tuple[str, str]], drop: int) -> None:
    """Leave any one part out of any answer: rows are the pairs as written, or there are none."""
    parts = [(name, text) for pair in items for name, text in zip(("question", "answer"), pair, strict=True)]
    written = "".join(f"<{name}>{text}</{name}>" for place, (name, text) in enumerate(parts) if place != drop)
    texts, reason = parse(written, **{**QA, "count": len(items)})
    if drop < len(parts) or not all(text.strip() for _, text in parts):
        assert reason
    else:
        assert texts == [f"{q.strip()}\n{a.strip()}" for q, a in items]
    whole = json.dumps([{"question": q, "answer": a} for q, a in items])
    assert bool(parse(whole, **{**PAIRS, "count": len(items)})[1]) == (not all(text.strip() for _, text in parts))
