"""YAML and overrides become plain data, and nothing is swallowed in silence."""

from __future__ import annotations

from pathlib import Path

import pytest

from nexus_ray.config.source import apply_overrides, parse_yaml, read_yaml
from nexus_ray.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", ["line 3", "'a'", "twice"]),
        ("x:\n  a: 1\n  a: 3\n", ["line 3", "'a'", "twice"]),
        ("no: 1\n", ["line 1", "False", "write 'no' in quotes"]),
        ("3: 1\n", ["'3' in quotes"]),
        ("a: [1, 2\nb: 3\n", ["line 2"]),
        ("a:\n\t- 1\n", ["line 2"]),
        ("a: !!python/object:os.system x\n", ["line 1"]),
        ("a: @x\n", ["line 1", "column 4"]),
    ],
)
def test_faulty_yaml_names_line_and_problem(text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, where="x.yaml")
    for word in ["x.yaml", *words]:
        assert word in str(caught.value)


def test_merge_keys_and_dates_are_plain_data() -> None:
    data = parse_yaml("base: &b {x: 1, y: 2}\nmine: {<<: *b, y: 3}\nwhen: 2024-01-02\n", where="x")
    assert data == {"base": {"x": 1, "y": 2}, "mine": {"x": 1, "y": 3}, "when": "2024-01-02"}


@pytest.mark.parametrize(("content", "word"), [("", "empty"), ("- a\n", "a list"), ("word", "a str")])
def test_a_file_must_hold_a_mapping(tmp_path: Path, content: str, word: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=word):
        read_yaml(file)


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").write_text("name: x")
    with pytest.raises(ConfigError, match=r"demmo.yaml does not exist.*demo.yaml"):
        read_yaml(tmp_path / "demmo.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        read_yaml(tmp_path)


def test_overrides_set_values_through_sections_lists_and_dotted_keys() -> None:
    data = {"a": {"b": 1}, "stages": [{"name": "x"}, {"name": "y", "override": {}}], "domains": {"my.text": {"n": 1}}}
    changed = apply_overrides(
        data,
        [
            "a.b=[1, 2]",
            "a.c.d=true",
            "stages.1.name=z",
            "stages.1.override.training.learning_rate=3.0e-4",
            "domains.my.text.n=5",
            "empty=",
            "text=a=b",
        ],
    )
    assert changed["a"] == {"b": [1, 2], "c": {"d": True}}
    assert changed["stages"][1] == {"name": "z", "override": {"training.learning_rate": 3.0e-4}}
    assert changed["domains"] == {"my.text": {"n": 5}}
    assert changed["empty"] is None and changed["text"] == "a=b"
    assert data["a"] == {"b": 1}, "the input stays as it was"


def test_all_faulty_overrides_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        apply_overrides({"stages": [{}], "a": 1}, ["nothing", "stages.7.name=x", "a.b=1", "=3", "a..b=1"])
    text = str(caught.value)
    assert len(text.splitlines()) == 5
    assert "path=value" in text and "entries 0 to 0, not '7'" in text and "a is 1" in text
