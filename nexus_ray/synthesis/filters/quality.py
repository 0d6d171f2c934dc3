"""The mission's `QualityFilter`: the short form for one process, of length, perplexity and diversity."""

from __future__ import annotations

from nexus_ray.config.filters import DiversityFilter, LengthFilter, PerplexityFilter
from nexus_ray.errors import ConfigError
from nexus_ray.synthesis.filters.chain import FilterChain
from nexus_ray.synthesis.filters.diversity import Diversity
from nexus_ray.synthesis.filters.length import Length
from nexus_ray.synthesis.filters.likelihood import Perplexities, Perplexity
from nexus_ray.synthesis.filters.text import Filter, Item
from nexus_ray.synthesis.rows import Verdict


class QualityFilter:
    """`passes(text)`: long enough, plausible to the reference model, not repetitive.

    - `min_length`: words.
    - `max_perplexity`: highest perplexity per token; needs `perplexity` (texts -> perplexities under a frozen
      reference, not the student: `synthesis.scorer` makes one). None: not looked at.
    - `diversity_threshold`: least share of a text's runs of four words that are new, in it and beside the texts
      remembered, in [0, 1].

    `passes` changes nothing; call `remember` with what was accepted, so that the next texts are held against it.
    """

    def __init__(
        self,
        min_length: int = 4,
        max_perplexity: float | None = None,
        diversity_threshold: float = 0.3,
        *,
        perplexity: Perplexities | None = None,
    ) -> None:
        if min_length < 0:
            raise ConfigError(f"min_length={min_length}: words cannot be fewer than none; use 0 or more")
        if not 0.0 <= diversity_threshold <= 1.0:
            raise ConfigError(f"diversity_threshold={diversity_threshold}: must be a share; use a number from 0 to 1")
        if max_perplexity is not None and not max_perplexity >= 1.0:
            raise ConfigError(f"max_perplexity={max_perplexity}: no text has less than 1; use a higher number, or None")
        if max_perplexity is not None and perplexity is None:
            raise ConfigError(
                f"max_perplexity={max_perplexity}: something must measure it; hand in `perplexity`, a callable from "
                f"texts to perplexities, or leave max_perplexity out"
            )
        costly: list[Filter] = []
        if max_perplexity is not None and perplexity is not None:
            costly.append(Perplexity(perplexity, PerplexityFilter(max_perplexity=max_perplexity, min_words=1)))
        self._diversity = Diversity(DiversityFilter(threshold=diversity_threshold))
        length = Length(LengthFilter(min_words=min_length))
        self._chain = FilterChain([length, self._diversity], costly, [self._diversity])

    def passes(self, text: str) -> bool:
        """Whether a text is good enough."""
        return self.judge(text).outcome == "pass"

    def judge(self, item: Item) -> Verdict:
        """The same with reason and figures."""
        return self._chain.judge(item)

    def remember(self, item: Item) -> None:
        """Take note of an accepted text."""
        self._chain.remember(item)
