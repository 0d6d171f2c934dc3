"""What the roadmap hands to the training workers: held-out scores during and after a stage, samples, the export."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nexus_ray.corpora.manifest import TokenManifest
from nexus_ray.corpora.reader import PAD
from nexus_ray.evaluate.held_out import HeldOutSet, evaluate_domains
from nexus_ray.evaluate.scores import DomainScore, scores_to_bytes
from nexus_ray.models.export import export_model
from nexus_ray.models.sample import continue_text
from nexus_ray.storage import Storage
from nexus_ray.train.engine import Engine
from nexus_ray.train.loop import WorkerContext


@dataclass
class ScoringHooks:
    """`StageHooks` of the roadmap. Everything it writes lies in the stage's folder."""

    folder: Storage
    tokenizer: Storage
    held_out: Mapping[str, TokenManifest]
    seq_len: int
    batch_size: int
    max_tokens: int
    during_tokens: int
    prompts: Mapping[str, str]
    sample_tokens: int
    temperature: float
    sample_seed: int
    export: bool = True
    _sets: dict[int, dict[str, HeldOutSet]] = field(default_factory=dict, repr=False)

    def during(self, model: nn.Module, context: WorkerContext) -> dict[str, float]:
        """Bits per byte of every domain on a smaller sample of documents."""
        scores = self._score(model, context, self.during_tokens)
        return {f"eval/bits_per_byte/{name}": score.bits_per_byte for name, score in scores.items()}

    def finish(self, engine: Engine, context: WorkerContext) -> dict[str, Any]:
        """Score all domains, write `evaluation.npz`, `samples.json` and `model/`."""
        scores = self._score(engine.module, context, self.max_tokens)
        if context.rank == 0:
            self.folder.write_bytes(scores_to_bytes(scores), "evaluation.npz")
        with tempfile.TemporaryDirectory(prefix="nexus-tokenizer-") as place:
            tokenizer_dir = Path(place)
            if self.export or self.sample_tokens:
                self.tokenizer.download(tokenizer_dir)
            if self.sample_tokens and (context.rank == 0 or engine.stage == 3):
                self._samples(engine, context, tokenizer_dir)
            if self.export:
                self._export(engine, context, tokenizer_dir)
        return {"scores": {name: score.summary() for name, score in scores.items()}}

    def _score(self, model: nn.Module, context: WorkerContext, max_tokens: int) -> dict[str, DomainScore]:
        if max_tokens not in self._sets:
            self._sets[max_tokens] = {
                name: HeldOutSet(manifest, self.seq_len, max_tokens) for name, manifest in self.held_out.items()
            }

        def all_reduce(values: torch.Tensor) -> None:
            values.copy_(context.sum(values))

        return evaluate_domains(
            model,
            self._sets[max_tokens],
            batch_size=self.batch_size,
            device=context.device,
            rank=context.rank,
            world_size=context.world,
            all_reduce=all_reduce if context.world > 1 else None,
        )

    def _samples(self, engine: Engine, context: WorkerContext, tokenizer_dir: Path) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
        samples = [
            {
                "domain": name,
                "prompt": prompt,
                "text": continue_text(
                    engine.module,
                    tokenizer,
                    prompt,
                    max_new_tokens=self.sample_tokens,
                    temperature=self.temperature,
                    seed=self.sample_seed,
                ),
            }
            for name in self.held_out
            for prompt in [self.prompts.get(name) or self._opening(name, tokenizer)]
        ]
        if context.rank == 0:
            self.folder.write_json(samples, "samples.json")

    def _opening(self, name: str, tokenizer: Any) -> str:
        """The first words of a held-out document."""
        tokens = self._sets[self.max_tokens][name].rows[0][:16]
        words = [int(~token if token < 0 else token) for token in tokens if token != PAD]
        return str(tokenizer.decode([word for word in words if word != tokenizer.eos_token_id]))

    def _export(self, engine: Engine, context: WorkerContext, tokenizer_dir: Path) -> None:
        state = engine.full_state_dict()
        if context.rank == 0:
            if self.folder.is_local:
                with self.folder.write_errors():
                    export_model(engine.module, tokenizer_dir, self.folder.local_path / "model", state_dict=state)
            else:
                with tempfile.TemporaryDirectory(prefix="nexus-export-") as place:
                    out = export_model(engine.module, tokenizer_dir, Path(place) / "model", state_dict=state)
                    self.folder.upload(out, "model")
