"""A run's `plan.jsonl`: read once, appended to before what is appended is used."""

from __future__ import annotations

from collections.abc import Mapping

from nexus_ray.config.tree import RunConfig
from nexus_ray.corpora.manifest import TokenManifest
from nexus_ray.errors import DataError
from nexus_ray.storage import Storage
from nexus_ray.stream.curriculum import changed_segment, stage_segments
from nexus_ray.stream.plan import Segment, check_versions, parse_plan
from nexus_ray.stream.rows import StageStream

PLAN = "plan.jsonl"


class PlanFile:
    """The plan of the run in `folder`; the driver alone writes it."""

    def __init__(self, folder: Storage, config: RunConfig) -> None:
        self._folder = folder
        text = folder.read_text(PLAN) if folder.exists(PLAN) else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # a torn line was never used: it is used once it is written
            folder.write_text(whole, PLAN)
        self.plan = parse_plan(
            whole.splitlines(),
            seed=config.seed,
            seq_len=config.training.seq_len,
            shuffle_window_rows=config.data.shuffle_window_rows,
        )

    def attempts(self, index: int) -> int:
        """The number of the stage's newest planned attempt (0 for the first)."""
        return max((s.attempt for s in self.plan.segments if s.stage_index == index), default=0)

    def stream(
        self, config: RunConfig, index: int, attempt: int, manifests: Mapping[str, TokenManifest]
    ) -> StageStream:
        """The stage's part of the plan, appended if it is not there yet. `config` is the stage's own.

        Raises DataError if the shards are not those that the plan names or if an older version planned other rows,
        ConfigError as `stage_segments` does.
        """
        check_versions(self.plan.segments)
        if not self._of(index, attempt):
            self._append(*stage_segments(config, index, manifests, start_row=self.plan.rows, attempt=attempt))
        pinned = {}
        for segment in self._of(index, attempt):
            for name, source in segment.manifests.items():
                pinned[name] = manifests[name].prefix(source.shards)
                if pinned[name].fingerprint != source.fingerprint:
                    raise DataError(
                        f"domain {name!r}: its training shards at {manifests[name].root} are not those that "
                        f"plan.jsonl names (fingerprint {pinned[name].fingerprint} instead of {source.fingerprint}); "
                        f"restore them, or start under another name"
                    )
        first, stop = self.plan.stage_rows(index, attempt)
        rows = config.training.rows_per_step
        return StageStream(self.plan, pinned, first, rows, (stop - first) // rows)

    def change(
        self,
        config: RunConfig,
        index: int,
        attempt: int,
        manifests: Mapping[str, TokenManifest],
        *,
        step: int,
        replay_ratio: float,
        lr_factor: float,
    ) -> None:
        """Plan the rest of a stage, after `step` of its steps, with another replay ratio and learning-rate factor."""
        first, _ = self.plan.stage_rows(index, attempt)
        self._append(
            changed_segment(
                config,
                index,
                manifests,
                self._of(index, attempt)[-1],
                start_row=first + step * config.training.rows_per_step,
                replay_ratio=replay_ratio,
                lr_factor=lr_factor,
            )
        )

    def _of(self, index: int, attempt: int) -> list[Segment]:
        return [s for s in self.plan.segments if (s.stage_index, s.attempt) == (index, attempt)]

    def _append(self, *segments: Segment) -> None:
        self.plan = self.plan.append(segments)
        for segment in segments:
            self._folder.append_line(segment.to_line(), PLAN)
