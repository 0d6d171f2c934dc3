"""Filters of generated text, each small and usable alone on plain text or a row; `chain` puts them together.

All work offline and without a model. What they need in common (words, lines, hashes) is in `text`.
"""

from __future__ import annotations

from nexus_ray.synthesis.filters.chain import FilterChain, build_chain
from nexus_ray.synthesis.filters.quality import QualityFilter
from nexus_ray.synthesis.filters.text import Filter, RememberingFilter, Text

__all__ = ["Filter", "FilterChain", "QualityFilter", "RememberingFilter", "Text", "build_chain"]
