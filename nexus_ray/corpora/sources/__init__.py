"""Where documents come from: every source lists its items in a fixed order and reads one at a time, in any process."""

from __future__ import annotations

from nexus_ray.config.tree import ChatConfig, DomainConfig, FilesSource, HubSource, SynthesisSource, WheelSource
from nexus_ray.corpora.sources.base import CorpusSource, Item, RawDocument
from nexus_ray.corpora.sources.files import FilesCorpus
from nexus_ray.corpora.sources.hub import HubCorpus
from nexus_ray.corpora.sources.stdlib import StdlibCorpus
from nexus_ray.corpora.sources.wheel import WheelCorpus
from nexus_ray.storage import Storage

__all__ = ["CorpusSource", "Item", "RawDocument", "open_source"]


def open_source(domain: str, config: DomainConfig, shared: Storage) -> CorpusSource:
    """The source of a domain; opens nothing yet. `shared` holds downloads."""
    source = config.source
    chat = (config.chat or ChatConfig()) if config.format == "chat" else None
    if isinstance(source, FilesSource):
        return FilesCorpus(domain, source, chat)
    if isinstance(source, WheelSource):
        return WheelCorpus(domain, source, shared.child("downloads"), chat)
    if isinstance(source, HubSource):
        return HubCorpus(domain, source, chat)
    if isinstance(source, SynthesisSource):
        from nexus_ray.corpora.sources.synthesis import SynthesisCorpus  # its parts are documents, which need sources

        return SynthesisCorpus(domain, source)
    return StdlibCorpus(domain, source)
