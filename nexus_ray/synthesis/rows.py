"""What travels through synthesis: prompt -> request -> answer -> rows -> verdict.

A *prompt* is one thing to ask for; a *request* is one of the several times it is asked (its `index`); an *answer* is
what a generator gave for it; a *row* is one piece of training text taken from an answer. Ids are content addresses:
the same question to the same revision of the same generator has the same id on every machine and in every run, which
is what makes a ledger resumable. Invariant: nothing here depends on time, order or randomness.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "content_filter", "other"]
"""Why an answer ended: by itself or at a stop text, at `max_tokens`, withheld by the server, anything else."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Prompt:
    """One thing to ask for. `content` is a conversation, or plain text for a model to continue."""

    content: str | tuple[Message, ...]
    recipe: str = "prompt"
    """Name and fingerprint of what made it."""
    parameters: Mapping[str, str] = field(default_factory=dict)
    """Values the template was filled with."""
    parents: tuple[str, ...] = ()
    """Ids of the documents or rows it was made from."""
    source: str | None = None
    """Text that answers must be grounded in; part of what a validator sees, not of what is sent."""

    @property
    def id(self) -> str:
        """32 hexadecimal digits."""
        return content_id("prompt", asdict(self))


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn."""

    max_tokens: int = 512
    temperature: float = 0.8
    top_p: float = 0.95
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """The `index`-th time that a prompt is asked."""

    prompt: Prompt
    sampling: Sampling
    index: int

    def id(self, revision: str) -> str:
        """Content address under a generator's revision (weights, adapter, engine; or endpoint and model name)."""
        return content_id("request", [self.prompt.id, asdict(self.sampling), self.index, revision])


@dataclass(frozen=True)
class Answer:
    """What a generator gave for a request."""

    request_id: str
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    model: str = ""
    """What the server says answered; empty for a local model."""


@dataclass(frozen=True)
class Failure:
    """A request that got no answer, after all retries."""

    request_id: str
    reason: str
    """Short and free of payload and keys: `http 500`, `timeout after 60 s`."""
    retriable: bool
    """Whether asking again later may help."""
    passing: bool = False
    """Whether it says nothing of the request: the call never left, or nothing came back from anywhere. Such a failure
    does not count among the `attempts`."""


@dataclass(frozen=True)
class Row:
    """One piece of text taken from an answer: what filters judge and training reads."""

    text: str
    request_id: str
    item: int
    """Place among the rows of its answer."""
    prompt: Prompt
    finish_reason: FinishReason = "stop"
    domain: str = ""

    @property
    def id(self) -> str:
        return content_id("row", [self.request_id, self.item])


@dataclass(frozen=True)
class Verdict:
    """What one filter or validator says of one row."""

    outcome: Literal["pass", "reject", "flag"]
    """`flag` sends the row to a person."""
    reason: str = ""
    """`filter: what was found`; empty if it passed."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Figures behind the verdict, by name (`repetition.top_2gram`), kept with the row whatever the outcome."""


PASS = Verdict("pass")


def content_id(kind: str, value: Any) -> str:
    """32 hexadecimal digits of BLAKE2b over canonical JSON: keys sorted, no white space, UTF-8."""
    text = json.dumps([kind, value], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
