"""What the roadmap hands to the training workers: held-out scores during and after a stage, samples, the export."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nexus_ray.corpora.manifest import TokenManifest
from nexus_ray.corpora.reader import NO_LOSS, PAD, token_ids
from nexus_ray.errors import DataError
from nexus_ray.evaluate.drift import drift
from nexus_ray.evaluate.held_out import HeldOutSet, evaluate_domains
from nexus_ray.evaluate.scores import DomainScore, scores_from_bytes, scores_to_bytes
from nexus_ray.models.export_stage import export_stage
from nexus_ray.models.methods import Adapted
from nexus_ray.models.sample import continue_text
from nexus_ray.storage import Storage
from nexus_ray.train.agree import WorkerContext
from nexus_ray.train.engine import Engine

START = "start.npz"
"""What a controlled stage's first model scored on the sample that is evaluated during it."""


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
    old: tuple[str, ...] = ()
    """Domains that the model knew before the stage: earlier ones and anchors."""
    sample: bool = False
    """Also score the sample of `during` in `finish`, for a stage that begins with these weights."""
    _sets: dict[int, dict[str, HeldOutSet]] = field(default_factory=dict, repr=False)
    _start: dict[str, DomainScore] | None = field(default=None, repr=False)
    _last: dict[str, DomainScore] = field(default_factory=dict, repr=False)

    def during(self, model: nn.Module, context: WorkerContext) -> dict[str, float]:
        """Bits per byte of every domain on a smaller sample of documents."""
        scores = self._last = self._score(model, context, self.during_tokens)
        return {f"eval/bits_per_byte/{name}": score.bits_per_byte for name, score in scores.items()}

    def begin(self, model: nn.Module, context: WorkerContext) -> None:
        """Score the sample of `during` before the stage's first step, for `drifts` to start from."""
        scores = self._score(model, context, self.during_tokens)
        if context.rank == 0:
            self.folder.write_bytes(scores_to_bytes(scores), START)

    def drifts(self, names: Sequence[str]) -> dict[str, tuple[float, float]]:
        """Bits per byte that each of `names` lost between `begin` and the last `during`, and their standard errors.

        Raises DataError if the scores of `begin` are gone.
        """
        if self._start is None:
            if not self.folder.exists(START):
                raise DataError(
                    f"{self.folder.path(START)} is missing: what the stage's first model scored, which forgetting is "
                    f"measured against; delete the stage's folder to begin it again"
                )
            self._start = scores_from_bytes(self.folder.read_bytes(START))
        scored = self._held_out(self.max_tokens)
        return {
            name: drift(self._start[name], self._last[name], of_documents=len(scored[name].documents)) for name in names
        }

    def select(self, model: nn.Module, context: WorkerContext) -> dict[str, float]:
        """Nats per token of every domain on `during_tokens` of held-out documents that `finish` does not score."""
        scores = self._score_sets(model, context, self.selection())
        return {name: score.loss for name, score in scores.items()}

    def selection(self) -> dict[str, HeldOutSet]:
        """What `select` scores. Raises DataError if a domain has no held-out documents besides the scored ones."""
        scored = self._held_out(self.max_tokens)
        return {
            name: HeldOutSet(manifest, self.seq_len, self.during_tokens, seed=1, besides=scored[name])
            for name, manifest in self.held_out.items()
        }

    def old_text(self, rows: int) -> NDArray[np.int32]:
        """Some rows [n, S+1] of held-out text of what the model knew, or else of what it will be scored on."""
        sets = self._held_out(self.during_tokens)
        chosen = [sets[name].rows for name in self.old or self.held_out]
        return np.concatenate([part[: max(1, rows // len(chosen))] for part in chosen])

    def finish(self, engine: Engine, context: WorkerContext, adapted: Adapted) -> dict[str, Any]:
        """Score all domains, write `evaluation.npz`, `samples.json` and `model/`."""
        scores = self._score(engine.module, context, self.max_tokens)
        if context.rank == 0:
            self.folder.write_bytes(scores_to_bytes(scores), "evaluation.npz")
        if self.sample:
            self.begin(engine.module, context)
        with tempfile.TemporaryDirectory(prefix="nexus-tokenizer-") as place:
            tokenizer_dir = Path(place)
            if self.export or self.sample_tokens:
                self.tokenizer.download(tokenizer_dir)
            if self.sample_tokens and (context.rank == 0 or engine.stage == 3):
                self._samples(engine, context, tokenizer_dir)
            if self.export:
                self._export(engine, context, adapted, tokenizer_dir)
        return {"scores": {name: score.summary() for name, score in scores.items()}}

    def _held_out(self, max_tokens: int) -> dict[str, HeldOutSet]:
        if max_tokens not in self._sets:
            self._sets[max_tokens] = {
                name: HeldOutSet(manifest, self.seq_len, max_tokens) for name, manifest in self.held_out.items()
            }
        return self._sets[max_tokens]

    def _score(self, model: nn.Module, context: WorkerContext, max_tokens: int) -> dict[str, DomainScore]:
        return self._score_sets(model, context, self._held_out(max_tokens))

    def _score_sets(
        self, model: nn.Module, context: WorkerContext, sets: Mapping[str, HeldOutSet]
    ) -> dict[str, DomainScore]:
        def all_reduce(values: torch.Tensor) -> None:
            values.copy_(context.sum(values))

        return evaluate_domains(
            model,
            sets,
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
            for prompt in [self._prompt(name, tokenizer)]
        ]
        if context.rank == 0:
            self.folder.write_json(samples, "samples.json")

    def _prompt(self, name: str, tokenizer: Any) -> str:
        """What the model continues: the configured prompt (a user's turn in a chat domain) or a held-out opening."""
        prompt = self.prompts.get(name)
        if not prompt:
            return self._opening(name, tokenizer)
        if self.held_out[name].seq_len is None:
            return prompt
        asked = [{"role": "user", "content": prompt}]
        return str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))

    def _opening(self, name: str, tokenizer: Any) -> str:
        """The first words of a held-out document, or all that stands before a held-out conversation's first answer."""
        row = self._sets[self.max_tokens][name].rows[0]
        if self.held_out[name].seq_len is not None:
            flagged = np.where(row < 0, ~row, row) & NO_LOSS != 0
            return str(tokenizer.decode(token_ids(row[: int(np.argmin(flagged))])))
        tokens = row[:16]
        words = token_ids(tokens[tokens != PAD]).tolist()
        return str(tokenizer.decode([word for word in words if word != tokenizer.eos_token_id]))

    def _export(self, engine: Engine, context: WorkerContext, adapted: Adapted, tokenizer_dir: Path) -> None:
        state = engine.full_state_dict()
        if context.rank or state is None:
            return
        adapted = replace(adapted, model=engine.module)
        if self.folder.is_local:
            with self.folder.write_errors():
                export_stage(adapted, tokenizer_dir, self.folder.local_path, state_dict=state)
            return
        with tempfile.TemporaryDirectory(prefix="nexus-export-") as place:
            for part in export_stage(adapted, tokenizer_dir, Path(place), state_dict=state):
                self.folder.upload(part, part.name)
