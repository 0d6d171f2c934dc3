"""Benchmark items from their files, for `contamination`: every named field alone, and the fields together.

A question is looked for without its answer and the other way round; together they give the runs of words that begin in
the one and end in the other, and short pairs are long enough to be looked for at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nexus_ray.config.filters import BenchmarkText
from nexus_ray.config.tree import FilesSource
from nexus_ray.corpora.sources.files import FilesCorpus
from nexus_ray.errors import DataError

PATH = "filters.contamination.benchmarks"


def benchmark_items(benchmarks: Mapping[str, BenchmarkText]) -> Iterator[tuple[str, str]]:
    """Name (`gsm8k: test.jsonl, line 3, question`) and text of each.

    Raises DataError if a file is missing or unreadable, a record lacks a field, or a benchmark has no text at all.
    """
    for name, config in benchmarks.items():
        found = False
        for item in _items(name, config):
            found = True
            yield item
        if not found:
            raise DataError(
                f"{PATH}.{name}: no text in the fields {', '.join(config.fields)} of {', '.join(config.paths)}; "
                f"correct fields or where, or leave the benchmark out"
            )


def _items(name: str, config: BenchmarkText) -> Iterator[tuple[str, str]]:
    source = FilesSource(
        kind="files", paths=config.paths, format=config.format, where=config.where, split_on=config.split_on
    )
    corpus = FilesCorpus(name, source, where=f"{PATH}.{name}")
    columns = tuple(dict.fromkeys(field.partition(".")[0] for field in config.fields))
    for file in corpus.items():
        short = file.name.rpartition("/")[2]
        for place, record in corpus.records(file, columns):
            label = f"{name}: {short}, {place}"
            if isinstance(record, str):
                if record.strip():
                    yield label, record
                continue
            texts = {field: _texts(record, field, f"{file.name}, {place}", name) for field in config.fields}
            for field, parts in texts.items():
                yield from ((f"{label}, {field}", part) for part in parts)
            together = [part for parts in texts.values() for part in parts]
            if len(together) > 1:
                yield label, "\n".join(together)


def _texts(record: Any, field: str, place: str, name: str) -> list[str]:
    """What a field holds, as texts. Dots lead into mappings."""
    value = record
    for key in field.split("."):
        if not isinstance(value, Mapping):
            raise DataError(
                f"{place}: a {type(value).__name__} where a mapping with {key!r} should be ({PATH}.{name}.fields)"
            )
        if key not in value:
            known = ", ".join(map(str, value)) or "none"
            raise DataError(f"{place}: no field {key!r} ({PATH}.{name}.fields has {field}); the fields are {known}")
        value = value[key]
    values = value if isinstance(value, list) else [value]
    if any(isinstance(one, Mapping | list) for one in values):
        raise DataError(f"{place}: {field} holds no text ({PATH}.{name}.fields); name the field inside it with a dot")
    return [str(one) for one in values if one is not None and str(one).strip()]
