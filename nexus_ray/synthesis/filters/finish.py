"""Why the model stopped: a text cut off at `max_tokens` has no end to learn (Self-Instruct drops such replies)."""

from __future__ import annotations

from nexus_ray.config.filters import FinishFilter
from nexus_ray.synthesis.filters.text import Item, Text, verdict
from nexus_ray.synthesis.rows import Verdict


class Finish:
    """Rejects rows whose answer ended otherwise than allowed. Plain text has no such reason and passes."""

    name = "finish"

    def __init__(self, config: FinishFilter | None = None) -> None:
        self.allow = frozenset((config or FinishFilter()).allow)

    def judge(self, item: Item) -> Verdict:
        reason = Text.of(item).finish_reason
        return verdict(self.name, None if reason is None or reason in self.allow else str(reason), {})
