"""A roadmap small enough for a test: three made-up languages in text files, a two-block Llama, 24 steps in all."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from nexus_ray.config import RunConfig
from nexus_ray.config.load import parse_config

SYLLABLES = {"north": "ka to mi re su", "south": "lo ba ne fi du", "east": "zha qir wox pum yel"}


def write_corpora(folder: Path, *, documents: int = 120) -> dict[str, Path]:
    """One text file per language; each line is a document of its own few syllables, easy to learn and to tell apart."""
    files = {}
    for name, syllables in SYLLABLES.items():
        chosen = random.Random(name)
        words = ["".join(chosen.choices(syllables.split(), k=chosen.randint(1, 3))) for _ in range(40)]
        lines = [f"{' '.join(chosen.choices(words, k=20))} {number}." for number in range(documents)]
        files[name] = folder / f"{name}.txt"
        files[name].write_text("\n".join(lines) + "\n")
    return files


def tiny_roadmap(folder: Path, *, name: str = "tiny", stages: int = 2, **overrides: Any) -> RunConfig:
    """A config over `write_corpora`'s files; keyword arguments replace values by dotted path (`__` for the dot)."""
    files = write_corpora(folder) if not (folder / "north.txt").exists() else None
    paths = files or {language: folder / f"{language}.txt" for language in SYLLABLES}
    languages = list(SYLLABLES)[:stages]
    data = {
        "name": name,
        "storage": str(folder / "runs"),
        "model": {
            "architecture": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "max_seq_len": 64},
            "tokenizer": {"vocab_size": 320, "train_on": languages},
        },
        "domains": {
            language: {
                "source": {"kind": "files", "paths": [str(paths[language])], "split_on": "(?m)^", "license": "CC0-1.0"},
                "held_out_fraction": 0.2,
            }
            for language in languages
        },
        "stages": [{"name": language, "domains": {language: 1.0}} for language in languages],
        "training": {
            "token_budget": 12 * 8 * 32,
            "seq_len": 32,
            "global_batch_tokens": 8 * 32,
            "micro_batch_size": 4,
            "learning_rate": 5.0e-3,
            "precision": "fp32",
            "checkpoint": {"every_steps": 5},
        },
        "continual": {"warmup_steps": 2, "replay_ratio": 0.25},
        "evaluation": {"max_tokens": 2000, "during_tokens": 500, "every_steps": 6, "bootstrap_samples": 100},
        "cluster": {"cpus_per_worker": 1},
        "report": {"sample_tokens": 8},
    }
    return parse_config(data, [f"{path.replace('__', '.')}={json.dumps(value)}" for path, value in overrides.items()])
