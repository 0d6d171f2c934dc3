"""Which characters a text is made of: scripts, and the debris of wrong decoding."""

from __future__ import annotations

import re
from collections.abc import Iterable

from nexus_ray.config.filters import CharsetFilter, Script
from nexus_ray.synthesis.filters.text import Item, Text, verdict
from nexus_ray.synthesis.rows import Verdict

RANGES: dict[Script, str] = {
    "latin": "A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02af\u1e00-\u1eff"
    "\u2c60-\u2c7f\ua720-\ua7ff\ufb00-\ufb06",
    "greek": "\u0370-\u03ff\u1f00-\u1fff",
    "cyrillic": "\u0400-\u052f\u1c80-\u1c8f\u2de0-\u2dff\ua640-\ua69f",
    "armenian": "\u0530-\u058f\ufb13-\ufb17",
    "hebrew": "\u0590-\u05ff\ufb1d-\ufb4f",
    "arabic": "\u0600-\u06ff\u0750-\u077f\u08a0-\u08ff\ufb50-\ufdff\ufe70-\ufefe",
    "devanagari": "\u0900-\u097f\ua8e0-\ua8ff",
    "thai": "\u0e00-\u0e7f",
    "hangul": "\u1100-\u11ff\u3130-\u318f\uac00-\ud7af",
    "kana": "\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f",
    "han": "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f",
}
"""Letters of each script, by Unicode block."""
_LETTER = re.compile(r"[^\W\d_]")
_BROKEN_ASCII = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_BROKEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd\ufffe\uffff\ue000-\uf8ff\ud800-\udfff\ufeff\u202a-\u202e\u2066-\u2069]"
    "|[\u00c2\u00c3][\u0080-\u00bf]|\u00e2(?:\u20ac.|\u0080[\u0080-\u00bf])"  # UTF-8 read as Latin-1 or Windows-1252
)


class Charset:
    """Rejects texts with too many letters of other scripts, or with broken characters."""

    name = "charset"

    def __init__(self, config: CharsetFilter | None = None) -> None:
        self.config = config or CharsetFilter()
        self._other = letters_outside(self.config.scripts)
        self._ascii_allowed = "latin" in self.config.scripts

    def judge(self, item: Item) -> Verdict:
        raw = Text.of(item).raw
        if raw.isascii() and self._ascii_allowed:
            foreign, broken = 0.0, len(_BROKEN_ASCII.findall(raw))
        else:
            foreign, broken = self._foreign(raw), len(_BROKEN.findall(raw))
        finding = "foreign script" if foreign > self.config.max_foreign else None
        if broken > self.config.max_broken:
            finding = "broken characters"
        return verdict(self.name, finding, {"charset.foreign": foreign, "charset.broken": float(broken)})

    def _foreign(self, raw: str) -> float:
        """Share of the letters that are of no allowed script."""
        count = len(_LETTER.findall(raw))
        return len(self._other.findall(raw)) / count if count else 0.0


def letters_outside(scripts: Iterable[Script]) -> re.Pattern[str]:
    """Matches one letter that is of none of the scripts."""
    return re.compile(rf"[^\W\d_{''.join(RANGES[script] for script in scripts)}]")
