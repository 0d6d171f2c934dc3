"""A believable run record of three stages, written without training anything."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

from nexus_ray.config.tree import RunConfig

DOMAINS = ("shakespeare", "encyclopedia", "code")
HOSTILE = "<script>alert('x')</script> & <img src=x onerror=alert(1)>"
"""Text that must arrive on a page as text."""
_FINAL = {
    "shakespeare": (4.71, 2.18, 2.52, 2.74),
    "encyclopedia": (4.52, 3.44, 2.07, 2.31),
    "code": (5.13, 4.36, 3.61, 1.62),
}
BATCH = 8192


def demo_config(name: str = "demo", storage: str = "runs", **overrides: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "name": name,
        "storage": storage,
        "domains": {domain: {"source": {"kind": "files", "paths": [f"texts/{domain}.txt"]}} for domain in DOMAINS},
        "stages": [{"name": domain, "domains": {domain: 1.0}} for domain in DOMAINS],
        **overrides,
    }
    return RunConfig.model_validate(tree)


def write_record(
    folder: Path, *, steps: int = 120, stages: int = 3, outcome: str = "done", shift: float = 0.0, **overrides: Any
) -> Path:
    """A record with `stages` ended stages of `steps` steps. `shift` makes it forget more, in bits per byte."""
    folder.mkdir(parents=True, exist_ok=True)
    config = demo_config(folder.name, str(folder.parent), **overrides)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    _dump(folder / "run.json", _run(config, outcome))
    _dump(folder / "base" / "stage.json", {"name": "base", "scores": {name: _score(name, 0, 0.0) for name in DOMAINS}})
    _dump(folder / "base" / "samples.json", [_sample(name, "qzx 7 vvv lorem") for name in DOMAINS])
    lines, plan = [], []
    for index, name in enumerate(DOMAINS[:stages]):
        replay = list(DOMAINS[:index])
        weights = {name: 9, **dict.fromkeys(replay, 1)}
        segment = {"stage": name, "stage_index": index, "attempt": 0, "start_row": 0, "rows": steps * 32, "cycle": 10}
        manifests = {domain: {"fingerprint": f"f{domain[:3]}123456", "shards": 1, "rows": 4000} for domain in weights}
        more = {"weights": weights, "replay": replay, "replay_ratio": 0.1 if replay else 0.0, "lr_factor": 1.0}
        plan.append({**segment, **more, "manifests": manifests})
        lines += _metrics(name, index, replay, steps)
        _write_stage(folder / "stages" / f"{index:02d}-{name}", name, index, steps, shift)
    (folder / "plan.jsonl").write_text("".join(json.dumps(line) + "\n" for line in plan))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if stages:
        _dump(folder / "scores.json", _scores(stages, shift))
    return folder


def _dump(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def _bits(domain: str, row: int, shift: float) -> float:
    later = row > 1 + DOMAINS.index(domain)
    return _FINAL[domain][row] + (shift if later else 0.0)


def _score(domain: str, row: int, shift: float) -> dict[str, float]:
    bits = _bits(domain, row, shift)
    loss = bits * math.log(2) * 2.6
    figures = {"bits_per_byte": bits, "loss": loss, "perplexity": math.exp(loss)}
    return {"nll": loss * 5000, "tokens": 5000, "bytes": 13000, **figures}


def _sample(domain: str, text: str) -> dict[str, str]:
    prompts = {
        "shakespeare": "KING HENRY:\nOnce more unto the",
        "encyclopedia": "The river is",
        "code": "def read(path):",
    }
    return {"domain": domain, "prompt": prompts[domain], "text": f"{text} of {domain}, and {HOSTILE}"}


def _metrics(name: str, index: int, replay: list[str], steps: int) -> list[dict[str, Any]]:
    rng, lines = random.Random(index), []
    for step in range(1, steps + 1):
        warm = min(1.0, step / 12)
        lr = 1e-3 * warm * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        loss = (
            2.6
            + 5.4 * math.exp(-step / steps * (5 if index == 0 else 9)) * (1 if index == 0 else 0.5)
            + rng.gauss(0, 0.06)
        )
        line: dict[str, Any] = {
            "stage": name,
            "stage_index": index,
            "attempt": 0,
            "step": step,
            "tokens": step * BATCH,
            "time": 1.76e9 + index * 300 + step,
            "world_size": 1,
            "train/loss": loss,
            f"train/loss/{name}": loss + 0.02,
            "train/lr": lr,
            "train/grad_norm": 0.6 + 3 * math.exp(-step / 9) + rng.random() * 0.2,
            "train/replay_fraction": 0.1 * len(replay) * (1 - 1 / (step + 1)) / 2 if replay else 0.0,
            "train/targets": BATCH - 40,
            "perf/tokens_per_second": 11_800 + rng.gauss(0, 350),
            "perf/step_seconds": 0.69,
            "data/batch_hash": f"{step:016x}",
        }
        for earlier in replay:
            if step % 2:
                line[f"train/loss/{earlier}"] = 2.9 + rng.gauss(0, 0.09)
        if step % 20 == 0:
            for domain in DOMAINS:
                before, after = _FINAL[domain][index], _FINAL[domain][index + 1]
                line[f"eval/bits_per_byte/{domain}"] = after + (before - after) * math.exp(-5 * step / steps)
        lines.append(line)
    return lines


def _write_stage(folder: Path, name: str, index: int, steps: int, shift: float) -> None:
    forgetting = {d: _bits(d, index + 1, shift) - _bits(d, DOMAINS.index(d) + 1, shift) for d in DOMAINS[:index]}
    _dump(folder / "samples.json", [_sample(domain, f"some words after {name}") for domain in DOMAINS])
    gate = {"limit": 0.8, "over": {}, "action": "pass"} if forgetting else None
    stage = {
        "name": name,
        "index": index,
        "kind": "cpt",
        "attempt": 0,
        "steps": steps,
        "tokens": steps * BATCH,
        "seconds": 104.5,
        "train_seconds": 91.2,
        "scores": {domain: _score(domain, index + 1, shift) for domain in DOMAINS},
        "replay_fraction": 0.1 if index else 0.0,
        "world_size": 1,
        "trainable_parameters": 2_950_000,
        "parameters": 2_950_000,
        "forgetting": forgetting,
        "gate": gate,
        "checkpoint": "checkpoints/120",
        "model": "model",
        "time_to_first_step": 9.8,
    }
    _dump(folder / "stage.json", stage)


def _scores(stages: int, shift: float) -> dict[str, Any]:
    rows = [{domain: _score(domain, row, shift) for domain in DOMAINS} for row in range(stages + 1)]
    table = {
        key: [[row[domain][key] for domain in DOMAINS] for row in rows]
        for key in ("loss", "bits_per_byte", "perplexity")
    }
    lost = {d: _bits(d, stages, shift) - _bits(d, place + 1, shift) for place, d in enumerate(DOMAINS[: stages - 1])}
    mean, worst = (sum(lost.values()) / len(lost), max(lost.values())) if lost else (None, None)
    near = {name: [value - 0.02, value + 0.02] for name, value in lost.items()}
    intervals = {
        "level": 0.95,
        "bits_per_byte": [[[value - 0.03, value + 0.03] for value in row] for row in table["bits_per_byte"]],
        "forgetting": {
            "per_domain": near,
            "mean": [mean - 0.02, mean + 0.02] if mean is not None else None,
            "max": [worst - 0.03, worst + 0.03] if worst is not None else None,
        },
        "backward_transfer": [-mean - 0.02, -mean + 0.02] if mean is not None else None,
    }
    return {
        "domains": list(DOMAINS),
        "stages": ["base", *DOMAINS[:stages]],
        **table,
        "forgetting": {"per_domain": lost, "mean": mean, "max": worst, "anchors": {}},
        "backward_transfer": None if mean is None else -mean,
        "forward_transfer": {},
        "intervals": intervals,
    }


def _run(config: RunConfig, outcome: str) -> dict[str, Any]:
    data = {
        domain: {
            "source": f"files texts/{domain}.txt",
            "license": "CC-BY-SA-4.0",
            "attribution": "Wikipedia contributors & others",
            "documents": 5210,
            "tokens": 1_204_331,
            "held_out_documents": 262,
            "train": f"a1b2c3{domain[:3]}",
            "held_out": f"d4e5f6{domain[:3]}",
            "stats": {"documents_in": 5500, "empty_dropped": 1, "exact_duplicates": 27, "tokens_dropped": 0},
        }
        for domain in DOMAINS
    }
    return {
        "name": config.name,
        "fingerprint": "0123456789ab",
        "commit": "4f2c9d1e7b",
        "dirty": False,
        "started": "2026-01-05T10:00:00+00:00",
        "finished": "2026-01-05T10:06:12+00:00" if outcome == "done" else None,
        "outcome": outcome,
        "error": "loss became NaN at step 12" if outcome == "failed" else None,
        "versions": {"python": "3.11.7", "torch": "2.13.0", "ray": "2.60.0", "deepspeed": "0.19.8"},
        "hardware": {"cpu": "Xeon", "cores": 2, "memory_gib": 15.6, "gpus": []},
        "seeds": {"seed": config.seed},
        "data": data,
        "tokenizer": {"fingerprint": "7788aabb", "vocab_size": 4096},
        "model": {"parameters": 2_950_000, "source": "scratch"},
        "stages": [],
    }
