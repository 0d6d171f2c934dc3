"""When a job can no longer succeed, and what it met until then.

One failure never ends a job, their share does: more than `max_error_share` of the last 100 requests, 20 at least
(NeMo Data Designer judges after 10, too few for a small job).
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

from nexus_ray.config.generators import RemoteGenerator
from nexus_ray.errors import SynthesisError
from nexus_ray.synthesis.generators.reply import ACCOUNT, Reply

WINDOW = 100
LEAST = 20
"""The share of failures is that among the last `WINDOW` requests, once there are so many."""
REFUSALS = 3
"""So many requests in a row that are refused for address, key or model, before there is any answer, are no accident."""


@dataclass
class CallStats:
    """Counts of one generator since it was made."""

    sent: int = 0
    """Calls, retries included."""
    answers: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    """Requests that got no answer, by reason."""
    retries: Counter[str] = field(default_factory=Counter)
    """Further calls, by what made them necessary."""
    peak_in_flight: int = 0


class Health:
    """Judges what comes back from one endpoint. `name` is how errors call it: `openai gpt-x at https://...`."""

    def __init__(self, config: RemoteGenerator, *, name: str, proven: bool = False) -> None:
        """`proven`: it has answered before, in another process."""
        self._config = config
        self._proven = proven
        self._refusals = 0
        self._failed: set[str] = set()
        self._name = name
        self._recent: deque[str] = deque(maxlen=WINDOW)
        self.stats = CallStats()

    def ended(self, request_id: str, reason: str = "") -> SynthesisError | None:
        """Count a request that has ended, with the reason if it failed; the error once too many have. One that failed
        before and fails again says nothing new of the endpoint."""
        if not reason:
            self._recent.append("")
            self.stats.answers += 1
            return None
        if request_id in self._failed:
            return None
        self._failed.add(request_id)
        self._recent.append(reason)
        self.stats.failures[reason] += 1
        failed = [why for why in self._recent if why]
        limit = self._config.max_error_share
        if len(self._recent) < LEAST or len(failed) <= limit * len(self._recent):
            return None
        common = ", ".join(f"{count} times `{why}`" for why, count in Counter(failed).most_common(3))
        return SynthesisError(
            f"{self._name}: {len(failed)} of the last {len(self._recent)} requests failed, a larger share than "
            f"max_error_share={limit:g}: {common}. Everything answered is kept; mend the cause and run again"
        )

    def first_refusal(self, reply: Reply, *, alone: bool) -> SynthesisError | None:
        """The error if nothing was answered yet and this shows that address, key or model are wrong: the last of
        `REFUSALS`, or there is nothing else in flight (`alone`). A single one may be the request's own, and is taken
        for it where the endpoint is proven."""
        if self.stats.answers or reply.status not in ACCOUNT:
            return None
        self._refusals += 1
        if self._refusals < REFUSALS and (self._proven or not alone):
            return None
        key = self._config.api_key_env
        if reply.status not in (401, 402, 403):
            advice = f"base_url={self._config.base_url} and model={self._config.model}"
        elif key is None:
            advice = "whether it wants a key, whose environment variable api_key_env names"
        else:
            advice = f"the key in the environment variable {key}, and what it may use"
        return SynthesisError(f"{self._name} refuses the first requests ({reply.reason}); check {advice}")

    def last_word(self, reply: Reply) -> SynthesisError | None:
        """The error if this reply tells that no further call will succeed in this session."""
        if reply.next == "stop":
            return SynthesisError(f"{self._name} has no credit left ({reply.reason}); refill the account and run again")
        return self.pause(reply.retry_after_s or 0.0)

    def pause(self, seconds: float) -> SynthesisError | None:
        """The error if server or gate want a longer wait than `throttle.max_retry_after_s`."""
        limit = self._config.throttle.max_retry_after_s
        if seconds <= limit:
            return None
        return SynthesisError(
            f"{self._name} asks for a wait of {seconds:.0f} s, longer than throttle.max_retry_after_s={limit:g}; "
            f"run again after it, or raise that"
        )

    def refused_for(self, seconds: float) -> SynthesisError | None:
        """The error once a server has done nothing but refuse for longer than `throttle.patience_s`."""
        patience = self._config.throttle.patience_s
        if seconds <= patience:
            return None
        return SynthesisError(
            f"{self._name} has refused every request for {seconds:.0f} s, longer than "
            f"throttle.patience_s={patience:g}; run again later, or raise that"
        )
