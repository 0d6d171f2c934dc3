"""Texts equal to an accepted one but for case, white space and Unicode form; punctuation counts (`a+b`, `a-b`)."""

from __future__ import annotations

import hashlib
import unicodedata

from nexus_ray.config.filters import ExactFilter
from nexus_ray.synthesis.filters.text import Item, Text, verdict
from nexus_ray.synthesis.rows import Verdict

_DIGEST_BYTES = 16


class Exact:
    """Rejects a text whose normalised form was accepted before. About 100 bytes of memory a row."""

    name = "exact"

    def __init__(self, config: ExactFilter | None = None) -> None:
        self._seen: set[bytes] = set()
        self._last: tuple[Text, bytes] | None = None

    def __len__(self) -> int:
        return len(self._seen)

    def judge(self, item: Item) -> Verdict:
        finding = "as an accepted row" if self._digest(item) in self._seen else None
        return verdict(self.name, finding, {})

    def remember(self, item: Item) -> None:
        self._seen.add(self._digest(item))

    def _digest(self, item: Item) -> bytes:
        """Kept for the text that was asked about last: an accepted one is remembered next."""
        text = Text.of(item)
        if self._last is None or self._last[0] is not text:
            self._last = text, digest(text.raw)
        return self._last[1]


def digest(raw: str) -> bytes:
    """BLAKE2b of the text in one case, with one space for any white space, in Unicode's composed form."""
    if not raw.isascii():
        raw = unicodedata.normalize("NFC", raw)
    plain = " ".join(raw.casefold().split())
    return hashlib.blake2b(plain.encode(errors="surrogatepass"), digest_size=_DIGEST_BYTES).digest()
