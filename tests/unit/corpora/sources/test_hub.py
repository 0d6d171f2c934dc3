"""Hub datasets: without a network the message comes at once and says what to do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from nexus_ray.config.tree import HubSource
from nexus_ray.corpora.sources.hub import HubCorpus
from nexus_ray.errors import DataError

CONFIG = HubSource(kind="hub", dataset="someone/stories")


class FakeStream(list):
    num_shards = 3

    def shard(self, *, num_shards: int, index: int) -> FakeStream:
        return FakeStream(self[index::num_shards])


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(self: object, *args: object, **kwargs: object) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    with pytest.raises(
        DataError, match=r"domains.tales.source: dataset 'someone/stories': the hub cannot be reached .*"
    ):
        HubCorpus("tales", CONFIG).items()


def test_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def missing(*args: object, streaming: bool, **kwargs: object) -> None:
        assert not streaming
        raise FileNotFoundError("not in the cache")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets, "load_dataset", missing)
    with pytest.raises(DataError, match=r"not in the cache\); HF_HUB_OFFLINE is set; .* use a `files` source"):
        HubCorpus("tales", CONFIG).items()


def test_shards_are_streamed_at_the_resolved_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    asked = []

    def load(name: str, subset: str | None, *, revision: str, **kwargs: object) -> FakeStream:
        asked.append(revision)
        return FakeStream({"text": str(number)} for number in range(7))

    info = SimpleNamespace(sha="c0ffee", card_data=SimpleNamespace(license=["mit", "cc0"]))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, **kwargs: info)
    monkeypatch.setattr(datasets, "load_dataset", load)
    source = HubCorpus("tales", CONFIG)
    items = source.items()
    assert [item.name for item in items] == ["0/3", "1/3", "2/3"]
    documents = [document for item in items for document in source.read(item)]
    assert [document.text for document in documents] == ["0", "3", "6", "1", "4", "2", "5"]
    assert documents[0].provenance["revision"] == "c0ffee" and set(asked) == {"c0ffee"}
    assert source.credits == ("mit, cc0", "https://huggingface.co/datasets/someone/stories")
    cut = HubCorpus("tales", CONFIG.model_copy(update={"split_on": "(?=x)"}))
    monkeypatch.setattr(FakeStream, "__iter__", lambda self: iter([{"text": "axbxc"}, {"text": "d"}]))
    pieces = list(cut.read(items[0]))
    assert [piece.text for piece in pieces] == ["a", "xb", "xc", "d"]
    assert [piece.provenance.get("part") for piece in pieces] == [0, 1, 2, None]
    limited = HubCorpus("tales", CONFIG.model_copy(update={"max_documents": 5}))
    assert [item.name for item in limited.items()] == ["0/1"]
