"""How many requests may be in flight at one (endpoint, model): additive increase, multiplicative decrease.

One throttle serves all workers and roles of a job, on however many machines: they take leases (`acquire`) and hand
them back with what came of them (`report`). Two jobs at one endpoint have a throttle each, and only the server's
refusals tell either of the other. Invariant: at most `limit` leases are out when one is granted, and a burst of
refusals of requests that were sent before a decrease never causes a second one. Pure: the clock is handed in, nothing
waits.

Increase and decrease as by Chiu and Jain 1989 (doi:10.1016/0169-7552(89)90019-6); factor and cooldown are those of
NeMo Data Designer. A lease carries the number of decreases so far (its epoch), not a time: clocks of machines differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Literal

from nexus_ray.config.generators import ThrottleConfig

OutcomeKind = Literal["ok", "busy", "timeout", "error"]
"""Answered; refused for load (429, 503, 529); no answer in time; anything else, which says nothing about load."""
LEASE_S = 600.0
"""A holder not heard of for so long has lost its leases: its process is gone."""
MAX_COOLDOWN_S = 60.0
POLL_S = 0.05
"""When to ask again after no lease was free."""
RIVAL_S = 5.0
"""A holder that wanted more but has not asked again for so long no longer competes."""


@dataclass(frozen=True)
class Grant:
    """Leases handed out."""

    count: int
    epoch: int
    """To be returned with each outcome."""
    wait_s: float = 0.0
    """When fewer were granted than wanted: seconds after which asking again makes sense."""
    refused_for_s: float = 0.0
    """Seconds in which the server has answered nothing but refusals; 0 while it answers."""


@dataclass(frozen=True)
class Outcome:
    """What came of one lease."""

    kind: OutcomeKind
    epoch: int
    retry_after_s: float | None = None
    """What the server asked for."""


@dataclass
class _Holder:
    leases: int = 0
    wanting: bool = False
    """Whether it was last granted less than it wanted."""
    seen: float = 0.0


class Throttle:
    """Leases for one endpoint. `clock` gives seconds and never goes back."""

    def __init__(self, config: ThrottleConfig, *, clock: Callable[[], float]) -> None:
        self._config = config
        self._clock = clock
        self._limit = float(config.start_in_flight or config.max_in_flight)
        self._holders: dict[str, _Holder] = {}
        self._paused_until = -math.inf
        self._refusals = 0
        self._refused: tuple[float, float] | None = None
        self.epoch = 0
        """Decreases so far."""
        self.lowest = self.limit
        """Least limit so far."""

    @property
    def limit(self) -> int:
        """Requests that may be in flight now, at least 1."""
        return max(1, int(self._limit))

    @property
    def in_flight(self) -> int:
        """Leases that are out."""
        return sum(holder.leases for holder in self._holders.values())

    def acquire(self, wanted: int, holder: str = "") -> Grant:
        """Up to `wanted` leases. Where holders compete, each gets an equal share of what the satisfied ones leave."""
        now = self._clock()
        self._expire(now)
        own = self._holders.setdefault(holder, _Holder())
        own.seen = now
        refused = self._refused[1] - self._refused[0] if self._refused else 0.0
        if self._paused_until > now:
            own.wanting = wanted > 0
            return Grant(0, self.epoch, self._paused_until - now, refused)
        others = [other for name, other in self._holders.items() if name != holder]
        rivals = [other for other in others if other.wanting and now - other.seen <= RIVAL_S]
        left = self.limit - sum(other.leases for other in others) + sum(rival.leases for rival in rivals)
        share = math.ceil(left / (len(rivals) + 1)) - own.leases
        count = max(0, min(wanted, share, self.limit - self.in_flight))
        own.leases += count
        own.wanting = count < wanted
        return Grant(count, self.epoch, POLL_S if own.wanting else 0.0, refused)

    def report(self, outcomes: Iterable[Outcome], holder: str = "") -> None:
        """Hand leases back. Those of a holder that was taken for dead are no longer counted."""
        now = self._clock()
        own = self._holders.setdefault(holder, _Holder())
        own.seen = now
        for outcome in outcomes:
            own.leases = max(0, own.leases - 1)
            if outcome.kind == "ok":
                self._succeed()
            elif outcome.kind in ("busy", "timeout"):
                self._refuse(outcome, now)

    def release(self, count: int, holder: str = "") -> None:
        """Hand back leases that were not used."""
        own = self._holders.setdefault(holder, _Holder())
        own.leases = max(0, own.leases - count)

    def hold(self, leases: int, holder: str = "") -> None:
        """A holder has so many leases out, granted before this throttle began. They may exceed the limit; nothing is
        granted then until enough have come back."""
        self._holders[holder] = _Holder(leases, seen=self._clock())

    def forget(self, holder: str) -> None:
        """Free all leases of a holder that is gone."""
        self._holders.pop(holder, None)

    def _succeed(self) -> None:
        self._refusals, self._refused = 0, None
        self._limit = min(self._limit + self._config.increase / self._limit, float(self._config.max_in_flight))

    def _refuse(self, outcome: Outcome, now: float) -> None:
        if outcome.kind == "busy":
            recent = self._refused is not None and now - self._refused[1] <= self._config.patience_s
            self._refused = (self._refused[0] if recent and self._refused else now, now)
        if outcome.retry_after_s is not None:
            self._paused_until = max(self._paused_until, now + outcome.retry_after_s)
        if outcome.epoch != self.epoch:
            return
        self.epoch += 1
        self._limit = max(1.0, self._limit * self._config.decrease)
        self.lowest = min(self.lowest, self.limit)
        if outcome.kind == "busy" and outcome.retry_after_s is None:
            pause = min(self._config.cooldown_s * 2.0 ** min(self._refusals, 16), MAX_COOLDOWN_S)
            self._paused_until = max(self._paused_until, now + pause)
        self._refusals += 1

    def _expire(self, now: float) -> None:
        for name in [name for name, holder in self._holders.items() if now - holder.seen > LEASE_S]:
            del self._holders[name]


def strictest(configs: Sequence[ThrottleConfig]) -> ThrottleConfig:
    """The first of the configs with the lowest limits of all: several roles may ask one endpoint."""
    start = min(config.start_in_flight or config.max_in_flight for config in configs)
    most = min(config.max_in_flight for config in configs)
    return configs[0].model_copy(update={"max_in_flight": most, "start_in_flight": start})


def retry_after_s(value: str | None, *, now: float) -> float | None:
    """Seconds a Retry-After header asks for (RFC 9110, 10.2.3): a number or an HTTP date; None if it is neither.

    `now` is the time of day in seconds since 1970; take it from the reply's own Date header where there is one.
    """
    if value is None:
        return None
    text = value.strip()
    try:
        seconds = float(text)
    except ValueError:
        at = http_date(text)
        seconds = math.nan if at is None else at - now
    return max(0.0, seconds) if math.isfinite(seconds) else None


def http_date(text: str | None) -> float | None:
    """Seconds since 1970 of an HTTP date; None if the text is none."""
    try:
        found = parsedate_to_datetime(text or "")
    except (ValueError, IndexError, TypeError, OverflowError):
        return None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
