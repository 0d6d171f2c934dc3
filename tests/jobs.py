"""A small synthesis job: prompts about numbers, a teacher at some address, filters that fit its short sentences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from nexus_ray.config import RunConfig
from nexus_ray.config.hardware import Hardware
from nexus_ray.config.load import parse_config, resolve

HARDWARE = Hardware(cpus=2, amx_bf16=False)
RECIPE = {
    "name": "sentences",
    "messages": [{"role": "user", "content": "Write {{ count }} sentences about {{ thing }}, numbered."}],
    "parameters": {"thing": {"values": [f"thing {number}" for number in range(400)]}},
    "items": {"format": "numbered", "count": 10},
    "order": "product",
}
FILTERS = {
    "length": {"min_words": 3},
    "language": None,
    "repetition": None,
    "novelty": None,
    "near": None,
    "diversity": None,
}


def job_data(folder: Path, url: str, *, prompts: int = 4, name: str = "job", **job: Any) -> dict[str, Any]:
    """Config of a run whose one domain is written by the teacher at `url`, ten sentences an answer."""
    recipe = folder / "recipe.yaml"
    if not recipe.exists():
        recipe.write_text(yaml.safe_dump(RECIPE))
        (folder / "real.txt").write_text(
            "\n".join(f"A real sentence, the {n}th of them, about rain." for n in range(80))
        )
    files = {"kind": "files", "paths": [str(folder / "real.txt")], "split_on": "(?m)^", "license": "CC0-1.0"}
    generator = {"kind": "openai", "model": "m", "base_url": f"{url}/v1", "retry_delay_s": 0.01}
    return {
        "name": name,
        "storage": str(folder / "runs"),
        "model": {
            "architecture": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "max_seq_len": 64},
            "tokenizer": {"vocab_size": 320, "train_on": ["real"]},
        },
        "domains": {
            "real": {"source": files, "held_out_fraction": 0.2},
            "sentences": {"source": {"kind": "synthesis", "license": "CC0-1.0"}, "held_out_fraction": 0.1},
        },
        "stages": [{"name": "sentences", "domains": {"sentences": 1}}],
        "training": {"token_budget": 1024, "seq_len": 32, "global_batch_tokens": 256, "micro_batch_size": 4},
        "evaluation": {"max_tokens": 500, "bootstrap_samples": 100},
        "cluster": {"cpus_per_worker": 1},
        "report": {"sample_tokens": 0},
        "synthesis": {
            "sentences": {
                "generator": generator,
                "recipe": str(recipe),
                "prompts": prompts,
                "num_candidates": 2,
                "filters": FILTERS,
                "shard_requests": 4,
                **job,
            }
        },
    }


def job_config(folder: Path, url: str, **settings: Any) -> RunConfig:
    """The same, resolved."""
    return resolve(parse_config(job_data(folder, url, **settings)), HARDWARE)


def job_file(folder: Path, url: str, **settings: Any) -> Path:
    """The same as a file for the command line."""
    file = folder / "job.yaml"
    file.write_text(json.dumps(job_data(folder, url, **settings)))
    return file
