"""The peer of the filter benchmark: `datatrove`'s own steps, run in this process one after another.

Deduplication there is a batch job over files; its stages run on a folder of temporary files, as its executors would.
English words come from spaCy's tokenizer, its default and most of its time; or from a regular expression, the fastest
there could be, so that what is compared is not spaCy alone. Only the index of held-out n-grams is written here, by the
filter's own functions: the step that does it needs `lighteval`.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nexus_ray.errors import ConfigError

NGRAM = 13
FORBIDDEN = ("lorem ipsum", "{")
"""What C4's filter rejects whole documents for."""


def normal(text: str) -> str:
    """One case and single spaces, as our exact filter compares texts."""
    return " ".join(text.casefold().split())


class PlainWords:
    """A word tokenizer in datatrove's sense: runs of letters and digits, and every other sign."""

    def __init__(self) -> None:
        self.word_tokenize = re.compile(r"\w+|[^\w\s]").findall


class DatatroveFilters:
    """`run(texts)`: the same checks as `filtering.our_config`, with equal thresholds."""

    def __init__(self, folder: Path, held_out: Iterable[str], *, plain_words: bool = False) -> None:
        """`plain_words`: no spaCy. Raises ConfigError if datatrove is not installed."""
        os.environ["TQDM_DISABLE"] = "1"
        try:
            from datatrove.pipeline.filters import C4QualityFilter, GopherQualityFilter, GopherRepetitionFilter
            from datatrove.utils.logging import logger
        except ImportError as error:
            raise ConfigError(
                f"the peer of this benchmark cannot be loaded ({error}); install it: pip install -e '.[bench]'"
            ) from None
        from datatrove.pipeline.decont import NGramsDecontFilter
        from datatrove.pipeline.decont.n_grams import NGramsDecontConfig

        logger.remove()
        self._folder = folder
        self._tokenizer = PlainWords() if plain_words else None
        index = folder / "index"
        index.mkdir(parents=True, exist_ok=True)
        decontaminate = NGramsDecontFilter(str(index), NGramsDecontConfig(n_grams=NGRAM))
        if self._tokenizer is not None:
            decontaminate.tokenizer = self._tokenizer
        _write_index(decontaminate, held_out, index / "held_out.index.hashes")
        off = dict.fromkeys(
            (
                "min_avg_word_length",
                "max_avg_word_length",
                "max_symbol_word_ratio",
                "max_bullet_lines_ratio",
                "max_ellipsis_lines_ratio",
                "max_non_alpha_words_ratio",
                "min_stop_words",
            )
        )
        no_lines = dict.fromkeys(
            ("remove_citations", "filter_no_terminal_punct", "filter_javascript", "filter_policy"), False
        )
        no_counts = dict.fromkeys(("min_num_sentences", "min_words_per_line", "max_word_length"), -1)
        self._filters: list[tuple[str, Any]] = [
            ("format", C4QualityFilter(**no_lines, **no_counts)),
            ("length", GopherQualityFilter(min_doc_words=50, max_doc_words=100_000, **off)),
            ("repetition", GopherRepetitionFilter()),
            ("contamination", decontaminate),
        ]

    def run(self, texts: Sequence[str]) -> dict[int, str]:
        """Which documents are rejected, and by which check."""
        if self._tokenizer is None:
            return self._run(texts)
        import datatrove.utils.word_tokenizers as tokenizers

        original = tokenizers.load_word_tokenizer
        tokenizers.load_word_tokenizer = lambda language: self._tokenizer
        try:
            return self._run(texts)
        finally:
            tokenizers.load_word_tokenizer = original

    def _run(self, texts: Sequence[str]) -> dict[int, str]:
        from datatrove.data import Document
        from datatrove.utils.text import split_into_parts

        split_into_parts.cache_clear()
        documents = [Document(text=text, id=str(number)) for number, text in enumerate(texts)]
        rejected: dict[int, str] = {}

        def step(name: str, work: Callable[[list[Any]], Iterable[Any]]) -> None:
            nonlocal documents
            kept = list(work(documents))
            ids = {document.id for document in kept}
            rejected.update((int(document.id), name) for document in documents if document.id not in ids)
            documents = kept

        for name, some in self._filters:
            step(name, some.run)
        step("exact", self._exact)
        step("near", self._near)
        return rejected

    def _exact(self, documents: list[Any]) -> Iterable[Any]:
        from datatrove.pipeline.dedup.exact_dedup import (
            ExactDedupConfig,
            ExactDedupFilter,
            ExactDedupSignature,
            ExactFindDedups,
        )

        folder = self._fresh("exact")
        config = ExactDedupConfig(content_getter=_content)
        ExactDedupSignature(f"{folder}/signatures", config).run(documents)
        ExactFindDedups(f"{folder}/signatures", f"{folder}/duplicates", config).run()
        return ExactDedupFilter(f"{folder}/duplicates", config).run(documents)

    def _near(self, documents: list[Any]) -> Iterable[Any]:
        from datatrove.pipeline.dedup.minhash import (
            MinhashConfig,
            MinhashDedupBuckets,
            MinhashDedupCluster,
            MinhashDedupFilter,
            MinhashDedupSignature,
        )

        folder = self._fresh("near")
        config = MinhashConfig()  # 14 buckets of 8: half of the pairs at a Jaccard similarity of 0.72 are found
        signatures = MinhashDedupSignature(f"{folder}/signatures", config)
        if self._tokenizer is not None:
            signatures.word_tokenizer = self._tokenizer
        signatures.run(documents)
        buckets = MinhashDedupBuckets(f"{folder}/signatures", f"{folder}/buckets", config=config)
        for number in range(config.num_buckets):
            buckets.run(rank=number, world_size=config.num_buckets)
        MinhashDedupCluster(f"{folder}/buckets", f"{folder}/remove", config=config).run()
        return MinhashDedupFilter(f"{folder}/remove").run(documents)

    def _fresh(self, name: str) -> Path:
        folder = self._folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder


def _content(document: Any) -> str:
    return normal(document.text)


_content.__annotations__["return"] = str  # datatrove looks at it to choose the hash function


def _write_index(decontaminate: Any, held_out: Iterable[str], path: Path) -> None:
    from datatrove.utils.text import ngrams, simplify_text

    hashes: set[int] = set()
    for text in held_out:
        words = decontaminate.tokenizer.word_tokenize(simplify_text(text, decontaminate.config.norm_config))
        hashes.update(decontaminate.hash_func(" ".join(run)) for run in ngrams(words, NGRAM))
    np.array(sorted(hashes), dtype=decontaminate.config.hash_config.np_descr).tofile(path)
