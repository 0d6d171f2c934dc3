"""Where documents come from: every source lists its items in a fixed order and reads one at a time, in any process."""

from __future__ import annotations

from nexus_ray.config.tree import DomainConfig, FilesSource, HubSource, WheelSource
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
    if isinstance(source, FilesSource):
        return FilesCorpus(domain, source)
    if isinstance(source, WheelSource):
        return WheelCorpus(domain, source, shared.child("downloads"))
    if isinstance(source, HubSource):
        return HubCorpus(domain, source)
    return StdlibCorpus(domain, source)
