"""The printed plan: figures per stage, and warnings for what is allowed but may surprise."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from nexus_ray import dry_run
from nexus_ray.cli import main
from nexus_ray.config import Hardware, RunConfig, fingerprint, resolve
from tests.configs import two_stages, write_two_stages


def planned(*overrides: str) -> RunConfig:
    return resolve(two_stages("training.token_budget=100000", *overrides), Hardware(cpus=2))


def manifest(domain: str, rows: int) -> Any:
    """What the plan asks of a token manifest."""
    return SimpleNamespace(
        domain=domain, tokens=rows * 256, fingerprint="f", shards=(1,), root="r", rows=lambda seq_len: rows
    )


def warnings(config: RunConfig, **rows: int) -> list[str]:
    return list(dry_run.plan_warnings(config, {name: manifest(name, count) for name, count in rows.items()}))


def test_the_plan_shows_stages_rates_domains_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config = planned("continual.warmup_steps=4", "training.learning_rate=2.0e-3")
    monkeypatch.setattr(dry_run, "_manifests", lambda config: {})
    console = Console(record=True, width=140)
    dry_run.print_plan(config, console)
    text = console.export_text()
    for word in (
        fingerprint(config),
        "letters (cpt)",
        "98,304",
        "12 x 8,192 tokens",
        "384 x 256 tokens",
        "replay: 0 (nothing earlier)",
        "replay: 0.1 of letters, by tokens",
        "4: 2.00e-03",
        "12: 2.00e-04",
        "memory per worker: about",
        "1 worker(s), 2 threads, fp32, ZeRO 0",
    ):
        assert word in text, word


def test_learning_rates_show_the_ends_and_the_peak() -> None:
    config = planned("continual.warmup_steps=4", "training.learning_rate=1.0", "continual.warmup_on_new=false")
    first, second = dry_run.learning_rates(config, 0), dry_run.learning_rates(config, 1)
    assert first[0] == (1, 0.25) and (4, 1.0) in first and first[-1] == (12, pytest.approx(0.1))
    assert {rate for _, rate in second} == {0.1}


def test_warnings() -> None:
    first, second, third = warnings(planned("continual.warmup_steps=50"))
    assert "letters: continual.warmup_steps=50 is clipped to the stage's 12 steps" in first
    assert "nothing to replay yet" in second
    assert "code: continual.warmup_steps=50" in third
    assert warnings(planned("continual.warmup_steps=5", "continual.replay_ratio=0")) == []
    quiet = ("continual.warmup_steps=5", "continual.replay_ratio=0")
    (unused,) = warnings(planned(*quiet, "domains.more={source: {kind: stdlib}}"))
    assert unused.startswith("domains.more is declared")
    (repeated,) = warnings(planned(*quiet), letters=100, code=10_000)
    assert repeated == "stage letters: reads letters 3.8 times (384 rows drawn, 100 there)"


def test_a_dry_run_needs_neither_ray_nor_corpora(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["roadmap", str(write_two_stages(tmp_path)), "--dry-run"]) == 0
    assert "after `prepare`" in capsys.readouterr().out
    assert not (tmp_path / "runs" / "two").exists()


def test_the_plan_says_what_each_stage_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    config = planned("stages.1.override={continual.use_lora: true, continual.lora_rank: 4}", "training.freeze=[]")
    monkeypatch.setattr(dry_run, "_manifests", lambda config: {})
    console = Console(record=True, width=140)
    dry_run.print_plan(config, console)
    lines = console.export_text().split("methods")[1].splitlines()
    full = next(line for line in lines if line.strip().startswith("letters"))
    lora = next(line for line in lines if line.strip().startswith("code"))
    assert "full" in full and "100.00%" in full
    assert "lora" in lora and 0 < float(lora.split()[-1].removesuffix("%")) < 10


def test_settings_of_a_method_that_no_stage_uses_are_pointed_out() -> None:
    idle = [text for text in warnings(planned("continual.lora_rank=4", "continual.lora.dora=true")) if "effect" in text]
    assert idle == ["continual.lora_rank, continual.lora have no effect: no stage sets continual.use_lora: true"]
    used = planned("continual.lora_rank=4", "stages.1.override={continual.use_lora: true}")
    assert not [text for text in warnings(used) if "effect" in text]
