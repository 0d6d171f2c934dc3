"""Benchmark items out of their files, and rows that hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from nexus_ray.config.filters import BenchmarkText, FiltersConfig
from nexus_ray.errors import DataError
from nexus_ray.synthesis.filters import build_chain
from nexus_ray.synthesis.filters.benchmarks import benchmark_items
from nexus_ray.synthesis.filters.chain import references
from tests.unit.synthesis.filters.samples import ESSAY, STORY

SUM = "Natalia sold clips to forty-eight of her friends in April, and then half as many in May. How many altogether?"
RECORDS: list[dict[str, Any]] = [
    {
        "question": SUM,
        "answer": "She sold twenty-four in May, so forty-eight and twenty-four make seventy-two.",
        "split": "test",
    },
    {"question": "Which planet is nearest to the sun?", "answer": 4879, "split": "test"},
    {
        "question": "Only for training: what colour is the sky on a clear day at noon?",
        "answer": "blue",
        "split": "train",
    },
]
OFF = dict.fromkeys(FiltersConfig.model_fields)


def items(config: dict[str, Any]) -> list[tuple[str, str]]:
    return list(benchmark_items({"b": BenchmarkText.model_validate(config)}))


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "test.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in RECORDS))
    return path


def test_fields_alone_and_together(jsonl: Path) -> None:
    found = items({"paths": [str(jsonl)], "fields": ["question", "answer"], "where": {"split": "test"}})
    assert [name for name, _ in found] == [
        "b: test.jsonl, line 1, question",
        "b: test.jsonl, line 1, answer",
        "b: test.jsonl, line 1",
        "b: test.jsonl, line 2, question",
        "b: test.jsonl, line 2, answer",
        "b: test.jsonl, line 2",
    ]
    assert found[2][1] == f"{SUM}\n{RECORDS[0]['answer']}" and found[4][1] == "4879"


def test_other_formats(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"q": {"stem": "Why?"}, "choices": ["one", "two", None, ""]}]))
    (tmp_path / "b.txt").write_text("1. First item\n2. Second item\n")
    nested = items({"paths": [str(tmp_path / "a.json")], "fields": ["q.stem", "choices"]})
    assert [text for _, text in nested] == ["Why?", "one", "two", "Why?\none\ntwo"]
    pieces = items({"paths": [str(tmp_path / "b.txt")], "split_on": r"(?m)^\d\. "})
    assert [text.strip() for _, text in pieces] == ["1. First item", "2. Second item"]
    assert [name for name, _ in pieces] == ["b: b.txt, part 0", "b: b.txt, part 1"]


def test_rows_that_hold_items_are_rejected(jsonl: Path) -> None:
    """Question, answer, and the run of words from the one into the other; not the record that `where` leaves out."""
    benchmark = {"paths": [str(jsonl)], "fields": ["question", "answer"], "where": {"split": "test"}}
    config = {**OFF, "contamination": {"benchmarks": {"sums": benchmark}}}
    chain = build_chain(FiltersConfig.model_validate(config), held_out=[("essay", ESSAY)])
    found = {
        f"{STORY} {SUM}": "13 words in a row of sums: test.jsonl, line 1, question",
        f"{STORY} {RECORDS[0]['answer']} {STORY}": "13 words in a row of sums: test.jsonl, line 1, answer",
        "Half as many in May. How many altogether? She sold twenty-four in May, so it is clear.": (
            "13 words in a row of sums: test.jsonl, line 1"
        ),
        f"{STORY} Which planet is nearest to the sun? 4879": "whole item of sums: test.jsonl, line 2",
        SUM.replace("Natalia", "Anna").replace("forty", "fifty").replace("April", "June"): (
            "lightly edited of sums: test.jsonl, line 1, question"
        ),
        ESSAY: "13 words in a row of essay",
    }
    for text, finding in found.items():
        assert chain.judge(text).reason == f"contamination: {finding}"
    for text in (STORY, RECORDS[2]["question"], "Which planet is the nearest to us, and how do we know it?"):
        assert chain.judge(text).outcome == "pass"


def test_job_is_bound_to_their_content(jsonl: Path) -> None:
    config = FiltersConfig.model_validate(
        {"contamination": {"benchmarks": {"b": {"paths": [str(jsonl)], "fields": ["question"]}}}}
    )
    before = references(config)
    assert references(config) == before and references(FiltersConfig()) == {}
    jsonl.write_text(jsonl.read_text().replace("Natalia", "Anna"))
    assert references(config).keys() == {"benchmarks"} and references(config) != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fields": ["quiz"]}, r"line 1: no field 'quiz' \(filters\.contamination\.benchmarks\.b\.fields"),
        ({"fields": ["question.text"]}, "line 1: a str where a mapping with 'text' should be"),
        (
            {"paths": ["nowhere.jsonl"]},
            r"filters\.contamination\.benchmarks\.b\.paths: 'nowhere\.jsonl' matches no file",
        ),
        ({"where": {"split": "none"}}, "no text in the fields question of"),
    ],
)
def test_faults(jsonl: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        items({"paths": [str(jsonl)], "fields": ["question"], **change})


def test_broken_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": ')
    with pytest.raises(DataError, match="line 2: no valid JSON"):
        items({"paths": [str(tmp_path / "a.jsonl")]})
    (tmp_path / "b.jsonl").write_text('{"text": {"de": "eins"}}\n')
    with pytest.raises(DataError, match="text holds no text"):
        items({"paths": [str(tmp_path / "b.jsonl")]})


def test_config_faults() -> None:
    with pytest.raises(ValidationError, match="is no regular expression"):
        BenchmarkText(paths=["a"], split_on="(")
    with pytest.raises(ValidationError):
        BenchmarkText(paths=[])
