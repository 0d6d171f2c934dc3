"""The one door to an endpoint: throttle and budget in a single exchange, so that a cluster pays one message a turn.

`LocalGate` is the door of one process. For a cluster, an actor holds a `LocalGate` and each worker a small `Gate`
that forwards `exchange` to it with the worker's own name as `holder`; see there what the name is for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from nexus_ray.synthesis.budget import Account, Budget, Usage
from nexus_ray.synthesis.throttle import Outcome, Throttle


@dataclass(frozen=True)
class Tokens:
    """What one call uses, or can use at most."""

    prompt: int = 0
    completion: int = 0


NOTHING = Tokens()


@dataclass(frozen=True)
class Settled:
    """One call that has ended."""

    outcome: Outcome
    reserved: Tokens
    used: Tokens | None
    """None if the server may have billed it without saying how much: then the reservation counts."""

    @property
    def billed(self) -> Tokens:
        return self.reserved if self.used is None else self.used


@dataclass(frozen=True)
class Permit:
    """What may be sent now."""

    count: int
    epoch: int
    wait_s: float = 0.0
    """When fewer than wanted: seconds after which to ask again, if no call ends before."""
    exhausted: str = ""
    """The cap that lets no further call through."""
    seconds_left: float = math.inf
    """After which these calls are to be cut off."""
    refused_for_s: float = 0.0
    """Seconds in which the server has answered nothing but refusals."""


def calls_usage(calls: Iterable[Tokens]) -> Usage:
    """Requests and tokens of some calls; a holder knows no prices, so they cost nothing yet."""
    return sum((Usage(1, call.prompt, call.completion) for call in calls), Usage())


def account_after(account: Account, settled: Sequence[Settled], sent: Sequence[Tokens]) -> Account:
    """A holder's own account once an exchange has settled some calls and permitted those `sent`."""
    return Account(
        account.spent + calls_usage(call.billed for call in settled),
        account.reserved - calls_usage(call.reserved for call in settled) + calls_usage(sent),
    )


class Gate(Protocol):
    """Where workers ask before they send."""

    async def exchange(self, settled: Sequence[Settled], wanted: Sequence[Tokens], holder: str) -> Permit:
        """Report the calls that ended and ask for new ones; the first `count` of `wanted` may be sent."""
        ...


class LocalGate:
    """Throttle of one (endpoint, model) and, where there are caps, the job's budget, which gates may share."""

    def __init__(self, throttle: Throttle, *, model: str, budget: Budget | None = None) -> None:
        self.throttle = throttle
        self.budget = budget
        self._model = model

    async def exchange(self, settled: Sequence[Settled], wanted: Sequence[Tokens], holder: str) -> Permit:
        """See `Gate`. `holder` names a worker: its leases are known by it, and freed by `forget` when it dies."""
        self.throttle.report((call.outcome for call in settled), holder)
        if self.budget is not None:
            for call in settled:
                self.budget.settle(self._usage(call.reserved), self._usage(call.billed), holder)
        grant = self.throttle.acquire(len(wanted), holder)
        permit = Permit(grant.count, grant.epoch, grant.wait_s, refused_for_s=grant.refused_for_s)
        if self.budget is None or not grant.count:
            return permit
        allowed = self.budget.reserve([self._usage(tokens) for tokens in wanted[: grant.count]], holder)
        self.throttle.release(grant.count - allowed.count, holder)
        wait_s = max(grant.wait_s, allowed.wait_s)
        left = allowed.seconds_left
        return Permit(allowed.count, grant.epoch, wait_s, allowed.exhausted, left, grant.refused_for_s)

    def announce(self, account: Account, holder: str) -> None:
        """A worker tells where it is, to a gate that has started again: it holds these leases and no others."""
        self.throttle.hold(account.reserved.requests, holder)
        if self.budget is not None:
            self.budget.announce(Account(self._priced(account.spent), self._priced(account.reserved)), holder)

    def forget(self, holder: str) -> None:
        """A worker is gone: its leases are free, what it had reserved counts as used."""
        self.throttle.forget(holder)
        if self.budget is not None:
            self.budget.forget(holder)

    def _usage(self, tokens: Tokens) -> Usage:
        return self._priced(calls_usage([tokens]))

    def _priced(self, usage: Usage) -> Usage:
        assert self.budget is not None
        return self.budget.usage(
            self._model,
            requests=usage.requests,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
        )
