"""The report: self-contained, safe against the text it shows, right in what it says, for every state of a run."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nexus_ray.report import summary
from nexus_ray.report.page import write_report
from nexus_ray.report.record import load_run
from nexus_ray.storage import Storage
from tests.record_fixture import DOMAINS, HOSTILE, write_record

_VOID = {"meta", "link", "input", "br", "img"}


class Page(HTMLParser):
    """Tags, attributes and the balance of open elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "action")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)


def _report(folder: Path) -> str:
    path = write_report(Storage(str(folder)))
    assert path == str(folder / "report.html")
    return Path(path).read_text(encoding="utf-8")


def test_the_page_is_whole_and_loads_nothing(tmp_path: Path) -> None:
    text = _report(write_record(tmp_path / "demo", steps=40))
    page = Page(text)
    assert page.open == [] and page.links == ["data:,"]
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest", text)
    assert "default-src 'none'" in text
    assert page.tags.count("svg") == 7 and page.tags.count("circle") == 12
    assert len(text) < 400_000


def test_text_of_the_record_arrives_as_text(tmp_path: Path) -> None:
    text = _report(write_record(tmp_path / "demo", steps=10))
    assert HOSTILE not in text and "&lt;script&gt;alert(" in text
    assert "img" not in Page(text).tags
    assert Page(text).tags.count("script") == 8  # the page's own and the data of seven charts


def test_everything_a_reader_looks_for_is_there(tmp_path: Path) -> None:
    text = _report(write_record(tmp_path / "demo", steps=10))
    expected = [
        "2.740",
        "perplexity",
        "before any training",
        "KING HENRY",
        "CC-BY-SA-4.0",
        "Wikipedia contributors &amp; others",
    ]
    expected += [
        "a1b2c3sha",
        "27 duplicates",
        "replay_ratio",
        "4f2c9d1e7b",
        "0.19.8",
        "limit",
        "0123456789ab",
        "95 % interval",
    ]
    assert [word for word in expected if word not in text] == []


def test_headline_and_stories_say_what_was_learned_and_forgotten(tmp_path: Path) -> None:
    record = load_run(write_record(tmp_path / "demo", steps=4))
    expected = "Learned shakespeare, encyclopedia and code; forgot 0.400 bits per byte on average"
    assert summary.headline(record) == expected
    stories = {story.domain: story for story in summary.stories(record)}
    assert stories["shakespeare"].text == (
        "4.710 → 2.180 bits per byte in stage shakespeare, 54 % less. The two later stages cost it 0.560 "
        "(95 % interval 0.540 to 0.580); 78 % of what it had gained is still there."
    )
    assert [stories[name].tone for name in DOMAINS] == ["bad", "bad", "good"]
    assert stories["code"].text == "3.610 → 1.620 bits per byte in stage code, 55 % less."


def test_what_cannot_be_told_from_zero_is_not_called_forgetting(tmp_path: Path) -> None:
    record = load_run(write_record(tmp_path / "demo", steps=4, shift=-0.4))  # mean forgetting 0.0
    assert summary.headline(record).endswith("forgot nothing measurable")
    assert "improved it by another 0.160" in summary.stories(record)[1].text
    assert [card.value for card in summary.cards(record) if card.label == "Mean forgetting"] == ["0.000"]


@pytest.mark.parametrize(
    ("outcome", "stages", "words"),
    [
        ("running", 1, "Running: stage 2 of 3"),
        ("interrupted", 2, "Interrupted in stage 3 of 3; the same command continues it"),
        ("stopped", 2, "Stopped after stage 2 of 3; learned shakespeare and encyclopedia"),
        ("failed", 1, "Failed in stage 2 of 3"),
        ("running", 0, "Running: stage 1 of 3"),
    ],
)
def test_unfinished_runs_have_a_page(tmp_path: Path, outcome: str, stages: int, words: str) -> None:
    text = _report(write_record(tmp_path / "demo", steps=10, stages=stages, outcome=outcome))
    assert f"<h1>{words}</h1>" in text and Page(text).open == []
    assert ("loss became NaN" in text) == (outcome == "failed")


@pytest.mark.parametrize("left", ["run.json", "config.yaml", "metrics.jsonl"])
def test_a_record_of_one_file_has_a_page(tmp_path: Path, left: str) -> None:
    full = write_record(tmp_path / "full", steps=3)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / left).write_bytes((full / left).read_bytes())
    assert Page(_report(bare)).open == []


def test_non_finite_metrics_break_the_curve_and_not_the_page(tmp_path: Path) -> None:
    folder = write_record(tmp_path / "demo", steps=10, stages=1)
    line = {
        "stage": "encyclopedia",
        "stage_index": 1,
        "attempt": 0,
        "step": 1,
        "tokens": 8192,
        "train/loss": float("nan"),
    }
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    text = _report(folder)
    assert "NaN" not in re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)


def test_credentials_inside_the_config_are_hidden(tmp_path: Path) -> None:
    folder = write_record(tmp_path / "demo", steps=3)
    with (folder / "config.yaml").open("a") as file:
        file.write("teacher:\n  api_key: sk-verysecret\n  url: https://me:hunter2@host/x?token=abc123\n")
    text = _report(folder)
    assert "(hidden)" in text
    assert not any(secret in text for secret in ("sk-verysecret", "hunter2", "abc123"))


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "–"), (4.25, "4.2 s"), (42, "42 s"), (125, "2 min 05 s"), (7300, "2 h 01 min")]
)
def test_durations(seconds: float | None, text: str) -> None:
    assert summary.duration(seconds) == text
