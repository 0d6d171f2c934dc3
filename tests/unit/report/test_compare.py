"""Comparison of runs that differ in what they were told, in how far they came, and in their domains."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from nexus_ray.errors import ConfigError
from nexus_ray.report.compare import compare_runs, comparison, config_differences, labels
from nexus_ray.report.record import load_run
from tests.record_fixture import write_record


def _compare(folders: list[Path], out: Path | None = None, width: int = 120) -> tuple[str, str]:
    console = Console(file=io.StringIO(), width=width)
    path = compare_runs(folders, out, console=console)
    return console.file.getvalue(), Path(path).read_text()  # type: ignore[attr-defined]


def test_table_and_page_of_three_runs(tmp_path: Path) -> None:
    folders = [
        write_record(tmp_path / "more", steps=20, continual={"replay_ratio": 0.25}),
        write_record(tmp_path / "none", steps=20, shift=0.3, continual={"replay_ratio": 0.0}),
        write_record(tmp_path / "cut", steps=20, stages=1, outcome="interrupted"),
    ]
    table, page = _compare(folders)
    assert (tmp_path / "compare.html").is_file()
    for text in (table, page):
        for word in ("continual.replay_ratio", "0.25", "0.400", "0.700", "interrupted", "shakespeare", "tokens/s"):
            assert word in text
    assert page.count('class="heat small"') == 3 and 'class="chart scatter"' in page


def test_only_differences_are_shown_and_own_paths_are_not(tmp_path: Path) -> None:
    first, second = write_record(tmp_path / "a", steps=3), write_record(tmp_path / "b", steps=3, seed=7)
    rows = config_differences([load_run(first), load_run(second)])
    assert [(row.label, row.cells) for row in rows] == [("seed", ["0", "7"])]


def test_the_best_is_marked_among_runs_that_are_done(tmp_path: Path) -> None:
    folders = [
        write_record(tmp_path / "a", steps=3),
        write_record(tmp_path / "b", steps=3, shift=0.2),
        write_record(tmp_path / "c", steps=3, stages=1, outcome="failed"),
    ]
    rows = {(row.group, row.label): row for row in comparison([load_run(folder) for folder in folders])}
    assert rows["final bits per byte", "shakespeare"].best == {0}
    assert rows["result", "mean forgetting"].best == {0}
    assert rows["final bits per byte", "code"].best == frozenset()


def test_runs_with_other_domains_and_missing_files(tmp_path: Path) -> None:
    first = write_record(tmp_path / "a", steps=3)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text(
        yaml.safe_dump({"name": "other", "stages": [{"name": "s", "domains": {"poems": 1}}]})
    )
    (other / "scores.json").write_text(
        json.dumps({"domains": ["poems"], "stages": ["base", "s"], "bits_per_byte": [[3.0], [None]]})
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "run.json").write_text("{}")
    table, page = _compare([first, other, empty], tmp_path / "page.html")
    assert "poems" in table and "poems" in page and "unknown" in table


def test_one_run_and_many_runs(tmp_path: Path) -> None:
    folder = write_record(tmp_path / "a", steps=3)
    assert "done" in _compare([folder])[0]
    table, _ = _compare([folder] * 9, width=80)
    assert max(map(len, table.splitlines())) <= 80
    assert [word for word in (f"a ({place})" for place in range(1, 10)) if word not in table] == []
    assert labels([load_run(folder)] * 2) == ["a (1)", "a (2)"]


def test_a_missing_run_is_named(tmp_path: Path) -> None:
    folder = write_record(tmp_path / "a", steps=3)
    with pytest.raises(ConfigError, match=r"typo.*runs beside it: a"):
        compare_runs([folder, tmp_path / "typo"])
    with pytest.raises(ConfigError, match="at least one run"):
        compare_runs([])
    assert not (tmp_path / "compare.html").exists()
