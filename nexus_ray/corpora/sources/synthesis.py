"""Rows that a synthesis job has accepted: a prefix of its ledger's manifest, one item for each part.

A ledger only grows at its end, so a domain that reads more of it later keeps its earlier documents, and a run may start
while the rest is being written. Which prefix a run reads is decided at its first start (`pinned`), and verified.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from nexus_ray.config.tree import DomainConfig, RunConfig, SynthesisSource
from nexus_ray.corpora.manifest import MANIFEST_FILE
from nexus_ray.corpora.parts import Manifest, PartFile, load_manifest, read_rows
from nexus_ray.corpora.sources.base import Item, RawDocument
from nexus_ray.errors import DataError
from nexus_ray.storage import Storage

Pin = Mapping[str, Any]
"""`entries` and `fingerprint` of the prefix of a ledger's manifest that is read, as in SynthesisSource."""


class SynthesisCorpus:
    """The accepted parts of a ledger, in the order of its manifest."""

    def __init__(self, domain: str, config: SynthesisSource) -> None:
        self.domain = domain
        self.config = config

    @property
    def label(self) -> str:
        return f"synthesis ledger {self._folder.uri}"

    @property
    def credits(self) -> tuple[str | None, str | None]:
        return None, None

    def settings(self) -> dict[str, Any]:
        return {"kind": "synthesis", "max_documents": self.config.max_documents}

    def listing(self) -> list[Item]:
        return [Item(part.file, part.bytes, part.sha256) for part in self._parts()]

    items = listing

    def read(self, item: Item) -> Iterator[RawDocument]:
        part = next((part for part in self._parts() if part.file == item.name), None)
        if part is None:
            raise DataError(f"domains.{self.domain}.source: {self._folder.path(item.name)} is not in the manifest")
        for index, row in enumerate(read_rows(self._folder, part)):
            place = {"ledger": self._folder.uri, "file": item.name, "index": index}
            trace = {"source": "synthesis", "row": row.id, "generator": row.provenance.get("generator")}
            yield RawDocument(row.text, {**trace, **place})

    @property
    def _folder(self) -> Storage:
        if self.config.ledger is None:
            raise DataError(f"domains.{self.domain}.source.ledger is not known before the config is resolved; set it")
        return Storage(self.config.ledger)

    def _parts(self) -> list[PartFile]:
        return self.prefix().files("accepted")

    def prefix(self) -> Manifest:
        """The manifest as far as it is read. Raises DataError if there is no ledger, or it is not the pinned one."""
        manifest = read_manifest(self._folder, where=f"domains.{self.domain}.source")
        entries = len(manifest.entries) if self.config.entries is None else self.config.entries
        return manifest.prefix(entries, self.config.fingerprint)


def read_manifest(folder: Storage, *, where: str) -> Manifest:
    """What a ledger's folder lists. Raises DataError, with the way out, if nothing is committed there."""
    if not folder.exists(MANIFEST_FILE):
        raise DataError(
            f"{where}: nothing has been written to the synthesis ledger {folder.uri} yet; run "
            f"`nexus-ray synthesize CONFIG` first, or name another folder in `ledger`"
        )
    return load_manifest(folder)


def own_pin(domain: DomainConfig | None) -> Pin | None:
    """What a domain says itself of the prefix of its ledger that is read."""
    if domain is None or not isinstance(domain.source, SynthesisSource) or domain.source.entries is None:
        return None
    return {"entries": domain.source.entries, "fingerprint": domain.source.fingerprint}


def present_pin(domain: str, source: SynthesisSource) -> Pin:
    """All that a ledger holds now. Raises DataError if there is none."""
    prefix = SynthesisCorpus(domain, source).prefix()
    return {"entries": len(prefix.entries), "fingerprint": prefix.fingerprint}


def pinned(config: RunConfig, find: Callable[[str, SynthesisSource], Pin | None]) -> RunConfig:
    """The config with its ledgers held to the prefixes that `find` knows, by domain and source. One that the config
    itself holds to a prefix, or that `find` does not know, is left as it is."""
    domains = {}
    for name, domain in config.domains.items():
        if isinstance(domain.source, SynthesisSource) and domain.source.entries is None:
            pin = find(name, domain.source)
            if pin is not None:
                domains[name] = domain.model_copy(update={"source": domain.source.model_copy(update=dict(pin))})
    return config.model_copy(update={"domains": {**config.domains, **domains}}) if domains else config
