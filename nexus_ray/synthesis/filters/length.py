"""How long a text is, in words and characters; no tokenizer is needed."""

from __future__ import annotations

from nexus_ray.config.filters import LengthFilter
from nexus_ray.synthesis.filters.text import Item, Text, verdict
from nexus_ray.synthesis.rows import Verdict


class Length:
    """Rejects what is shorter or longer than the bounds."""

    name = "length"

    def __init__(self, config: LengthFilter | None = None) -> None:
        self.config = config or LengthFilter()

    def judge(self, item: Item) -> Verdict:
        text = Text.of(item)
        words, chars = text.size, len(text.raw)
        scores = {"length.words": float(words), "length.chars": float(chars)}
        return verdict(self.name, self._finding(words, chars), scores)

    def _finding(self, words: int, chars: int) -> str | None:
        config = self.config
        if words < config.min_words:
            return "too few words"
        if config.max_words is not None and words > config.max_words:
            return "too many words"
        if chars < config.min_chars:
            return "too few characters"
        if config.max_chars is not None and chars > config.max_chars:
            return "too many characters"
        return None
