"""How the model of a stage comes about: the run's first model, what each stage before made of it, and this stage's
own method.

A checkpoint holds what its stage trained and nothing else, so a model is rebuilt by going through the stages in turn.
What no later stage has changed is never written twice, and a hash tells whether it is what it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from nexus_ray.config.tree import RunConfig
from nexus_ray.errors import DataError
from nexus_ray.models.build import build_model
from nexus_ray.models.methods import Adapted, begin, continues, end, restructures, trains_all
from nexus_ray.storage import Storage
from nexus_ray.train import checkpoint as ckpt
from nexus_ray.train.agree import KnownToAll, WorkerContext


@dataclass(frozen=True)
class Earlier:
    """A finished stage that a later one builds on."""

    config: RunConfig
    """Resolved, with that stage's overrides applied."""
    folder: Storage
    """That stage's folder."""

    @property
    def checkpoints(self) -> Storage:
        return self.folder.child("checkpoints")


@dataclass(frozen=True)
class Lineage:
    """The stages before one, and the model they lead to."""

    config: RunConfig
    """Of the stage itself."""
    history: tuple[Earlier, ...]
    vocab_size: int
    eos_id: int
    context: WorkerContext
    warn: Callable[[str], None]

    def newest(self, folder: Storage) -> ckpt.Checkpoint | None:
        """The newest checkpoint in a folder whose files verify; collective."""
        return ckpt.newest_valid(folder, rank=self.context.rank, world=self.context.world, on_bad=self.warn)

    def build(self, *, own: ckpt.Checkpoint | None) -> tuple[Adapted, ckpt.Checkpoint | None]:
        """The model to be trained, in fp32 on the CPU, and the checkpoint whose weights it still lacks; collective.

        That is `own`, the stage's own, if there is one; else that of the stage before if this one trains exactly what
        it trained (whose optimizer state may then be kept); else None.
        """
        history = self._needed(own)
        missing = own
        if own is None and history and continues(history[-1][0].config, self.config):
            missing = history.pop()[1]
        return self._shaped(history), missing

    def start(self) -> Adapted:
        """The model as the stage's first step finds it; collective."""
        return self._shaped(self._needed(None))

    def _needed(self, own: ckpt.Checkpoint | None) -> list[tuple[Earlier, ckpt.Checkpoint | None]]:
        """The stages before, with their last checkpoints; None where a later stage has replaced every weight."""
        replaced = own is not None and trains_all(self.config)
        found: list[tuple[Earlier, ckpt.Checkpoint | None]] = []
        for each in reversed(self.history):
            found.append((each, None if replaced else self._ended(each)))
            replaced = replaced or trains_all(each.config)
        return found[::-1]

    def _ended(self, earlier: Earlier) -> ckpt.Checkpoint:
        found = self.newest(earlier.checkpoints)
        if found is None:
            raise KnownToAll(
                DataError(
                    f"{earlier.checkpoints.uri} holds no valid checkpoint of the stage before; delete that stage's "
                    f"folder to train it again"
                )
            )
        return found

    def _shaped(self, history: list[tuple[Earlier, ckpt.Checkpoint | None]]) -> Adapted:
        # fp32: DeepSpeed makes its bf16 copies from fp32 weights, which become the masters.
        adapted = Adapted(self.context.agreed(self.first))
        reference = self.config.model.init_from or self.config.model.source
        for earlier, checkpoint in history:
            if checkpoint is not None or restructures(earlier.config):
                adapted = self._begun(adapted, earlier.config, reference)
                if checkpoint is not None:
                    with ckpt.portable(checkpoint, rank=self.context.rank, world=self.context.world) as states:
                        ckpt.load_weights(adapted.model, states)
                adapted = end(adapted, earlier.config)
            if adapted.base is None:
                reference = earlier.folder.child("model").uri
        return self._begun(adapted, self.config, reference)

    def _begun(self, adapted: Adapted, config: RunConfig, reference: str) -> Adapted:
        adapted = self.context.agreed(partial(begin, adapted, config, reference=reference))
        if config.continual.method == "osft":
            for buffer in adapted.model.buffers():  # bases of subspaces: another LAPACK may give other ones
                self.context.share(buffer)
        return adapted

    def first(self) -> Any:
        """The model that the run starts from, in fp32 on the CPU."""
        return build_model(self.config.model, vocab_size=self.vocab_size, eos_id=self.eos_id, seed=self.config.seed)
