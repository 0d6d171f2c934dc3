"""`FactChecker`: the short form of the validators that need neither a model nor a sandbox."""

from __future__ import annotations

from nexus_ray.config.validators import ArithmeticConfig, GroundedConfig
from nexus_ray.synthesis.rows import Row, Verdict
from nexus_ray.synthesis.validators.arithmetic import Arithmetic
from nexus_ray.synthesis.validators.grounded import Grounded


class FactChecker:
    """Checks a text against its source, and its arithmetic; a validator too.

    Without a source only arithmetic is checked: nothing here knows the world.
    """

    def __init__(self, grounded: GroundedConfig | None = None, arithmetic: ArithmeticConfig | None = None) -> None:
        self._grounded = Grounded(grounded)
        self._arithmetic = Arithmetic(arithmetic)

    def check(self, text: str, source: str | None = None) -> bool:
        """Whether nothing in the text is refuted, nor (given a source) unsupported."""
        return self.verdict(text, source).outcome == "pass"

    def validate(self, row: Row) -> Verdict:
        return self.verdict(row.text, row.prompt.source)

    def verdict(self, text: str, source: str | None = None) -> Verdict:
        """What `check` found, with reason and scores."""
        first = self._arithmetic.check(text)
        if first.outcome != "pass" or source is None:
            return first
        second = self._grounded.compare(text, source)
        return Verdict(second.outcome, second.reason, {**first.scores, **second.scores})
