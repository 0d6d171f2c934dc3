"""Hard caps on what a job may use: requests, tokens, money, seconds; what it will use; what an accepted row cost.

What a call can use at most is reserved before it is sent, and settled afterwards. Invariant: spent plus reserved never
exceeds a cap, whatever is in flight (unless a server bills more than it was allowed to write, which shows in
`overdrawn`). Pure: the clock is handed in. Money is counted in whole 10^-12 of the currency, so that sums are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from typing import Any

from nexus_ray.config.generators import BudgetConfig, PriceConfig
from nexus_ray.errors import ConfigError, DataError, SynthesisError

UNITS = 10**12
"""Units of money in one of the currency."""
_POLL_S = 0.1


class BudgetExhausted(SynthesisError):
    """A cap was reached. All that was in flight has been answered and kept; with a higher cap the job goes on."""


@dataclass(frozen=True)
class Usage:
    """What calls used, or can use at most."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    units: int = 0
    """10^-12 of the currency."""

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(a + b for a, b in zip(self.values, other.values, strict=True)))

    def __sub__(self, other: Usage) -> Usage:
        return Usage(*(a - b for a, b in zip(self.values, other.values, strict=True)))

    @property
    def values(self) -> tuple[int, int, int, int]:
        return self.requests, self.prompt_tokens, self.completion_tokens, self.units

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    @property
    def money(self) -> float:
        """In the currency of the prices."""
        return self.units / UNITS


@dataclass(frozen=True)
class Account:
    """What a holder's calls have used, and what those in flight can use at most."""

    spent: Usage = Usage()
    reserved: Usage = Usage()

    @property
    def most(self) -> Usage:
        return self.spent + self.reserved


@dataclass(frozen=True)
class Allowance:
    """How many of the calls asked for may be sent."""

    count: int
    exhausted: str = ""
    """Set when no further call will ever fit: the cap that stands in the way, `max_money=2.0`."""
    wait_s: float = 0.0
    """When calls in flight hold what is left: seconds after which asking again makes sense."""
    seconds_left: float = math.inf
    """After which calls in flight are to be cut off."""


@dataclass(frozen=True)
class Forecast:
    """What the whole job will use if it goes on as it began."""

    requests: int
    tokens: int
    money: float
    seconds: float
    exceeded: Mapping[str, float]
    """Share of the job after which a cap will stop it, by cap; empty if the budget is enough."""


def price_units(price: PriceConfig, prompt_tokens: int, completion_tokens: int) -> int:
    """What so many tokens cost, in 10^-12 of the currency, rounded up to a whole one per kind of token."""
    each = [math.ceil(Decimal(str(value)) * (UNITS // 10**6)) for value in (price.input, price.output)]
    return prompt_tokens * each[0] + completion_tokens * each[1]


class Budget:
    """Caps of one job for all its models and workers. `clock` gives seconds; `saved` is what `state` gave earlier.

    Each holder of calls has an account, so that a budget that starts again while holders work on can be told exactly
    where they are (`announce`). Until a holder speaks, its account counts as it was saved, calls in flight as used.

    Raises ConfigError if money is capped and one of `models` has no price; DataError if `saved` is no state.
    """

    def __init__(
        self,
        config: BudgetConfig,
        *,
        models: Iterable[str],
        clock: Callable[[], float],
        saved: Mapping[str, Any] | None = None,
    ) -> None:
        for model in models:
            if config.max_money is not None and model not in config.prices:
                raise ConfigError(
                    f"budget.max_money={config.max_money:g} caps the money, but budget.prices has no price for "
                    f"{model}; add `{model}: {{input: ..., output: ...}}` per million tokens, or leave max_money out"
                )
        self.config = config
        self._clock = clock
        self._started = clock()
        self._settled, self._accounts, self._seconds = _restored(saved)
        self.overdrawn = Usage()
        """By how much servers billed more than had been reserved, summed."""

    @property
    def spent(self) -> Usage:
        """What calls have used, those of earlier sessions and of holders that are gone among them."""
        return sum((account.spent for account in self._accounts.values()), self._settled)

    @property
    def reserved(self) -> Usage:
        """What calls in flight can use at most."""
        return sum((account.reserved for account in self._accounts.values()), Usage())

    @property
    def seconds(self) -> float:
        """Seconds of generation so far, earlier sessions included."""
        return self._seconds + self._clock() - self._started

    def usage(self, model: str, *, requests: int, prompt_tokens: int, completion_tokens: int) -> Usage:
        """Those figures with their price; a model without one costs nothing."""
        price = self.config.prices.get(model)
        units = price_units(price, prompt_tokens, completion_tokens) if price else 0
        return Usage(requests, prompt_tokens, completion_tokens, units)

    def reserve(self, wanted: Sequence[Usage], holder: str = "") -> Allowance:
        """Reserve what the first calls of `wanted` can use at most; as many as fit, in order."""
        left = math.inf if self.config.max_seconds is None else self.config.max_seconds - self.seconds
        if left <= 0:
            return Allowance(0, f"max_seconds={self.config.max_seconds:g}", seconds_left=0.0)
        count, blocked, before, taken = 0, "", self.spent + self.reserved, Usage()
        for usage in wanted:
            blocked = self._blocked(before + taken + usage)
            if blocked:
                break
            taken, count = taken + usage, count + 1
        account = self._accounts.get(holder, Account())
        self._accounts[holder] = replace(account, reserved=account.reserved + taken)
        final = bool(blocked) and not any(self.reserved.values)
        return Allowance(count, blocked if final else "", _POLL_S if blocked else 0.0, left)

    def settle(self, reserved: Usage, used: Usage, holder: str = "") -> None:
        """Replace what was reserved for a call by what it used."""
        account = self._accounts.get(holder, Account(reserved=reserved))
        self._accounts[holder] = Account(account.spent + used, account.reserved - reserved)
        self.overdrawn += Usage(*(max(0, u - r) for u, r in zip(used.values, reserved.values, strict=True)))

    def announce(self, account: Account, holder: str) -> None:
        """A holder tells where it is, in the place of what was saved of it."""
        self._accounts[holder] = account

    def forget(self, holder: str) -> None:
        """A holder is gone: nobody knows what became of its calls, so they count as used."""
        self._settled += self._accounts.pop(holder, Account()).most

    def state(self) -> dict[str, Any]:
        """What a later session needs, JSON-able, and of each holder what this one needs if it starts again. Calls in
        flight count as used: after a crash nobody knows."""
        holders = {holder: asdict(account.most) for holder, account in self._accounts.items()}
        return {**asdict(self.spent + self.reserved), "seconds": self.seconds, "holders": holders}

    def forecast(
        self, done: int, planned: int, *, borrowed: int = 0, accepted: int = 0, target: int | None = None
    ) -> Forecast | None:
        """Use of the whole job by that of its first `done` of `planned` requests; None before the first percent.

        `borrowed` of those done came from another job and used nothing. With a `target` the job may end before its
        plan does: as soon as `accepted` has grown to it, at the rate of rows per request so far.
        """
        paid = done - borrowed
        if paid < max(1, math.ceil((planned - borrowed) / 100)):
            return None
        left: float = planned - done
        if target is not None and accepted:
            left = min(left, max(0, target - accepted) * done / accepted)
        factor = 1 + left / paid
        requests, tokens = (math.ceil(value * factor) for value in (self.spent.requests, self.spent.tokens))
        found = {"requests": requests, "tokens": tokens, "money": self.spent.money * factor}
        found["seconds"] = self.seconds * factor
        caps = {name: getattr(self.config, f"max_{name}") for name in found}
        exceeded = {f"max_{name}": cap / found[name] for name, cap in caps.items() if cap and found[name] > cap}
        return Forecast(requests, tokens, found["money"], found["seconds"], exceeded)

    def per_accepted(self, accepted: int) -> dict[str, float] | None:
        """What one accepted row cost, rejected and failed ones included; None while there is none."""
        if not accepted:
            return None
        spent = {"requests": self.spent.requests, "tokens": self.spent.tokens, "money": self.spent.money}
        return {name: value / accepted for name, value in (spent | {"seconds": self.seconds}).items()}

    def _blocked(self, total: Usage) -> str:
        config = self.config
        if config.max_requests is not None and total.requests > config.max_requests:
            return f"max_requests={config.max_requests}"
        if config.max_tokens is not None and total.tokens > config.max_tokens:
            return f"max_tokens={config.max_tokens}"
        if config.max_money is not None and total.units > int(Decimal(str(config.max_money)) * UNITS):
            return f"max_money={config.max_money:g}"
        return ""


def exhausted(cap: str) -> BudgetExhausted:
    """The error that ends a job at a cap."""
    name = cap.partition("=")[0]
    return BudgetExhausted(
        f"budget.{cap} is used up as far as another call could fit; everything answered so far is kept. Raise "
        f"budget.{name} and run again to go on"
    )


def _restored(saved: Mapping[str, Any] | None) -> tuple[Usage, dict[str, Account], float]:
    """What belongs to no holder, the accounts of holders, and seconds."""
    if saved is None:
        return Usage(), {}, 0.0
    try:
        total, seconds = _counts(saved), float(saved["seconds"])
        holders = {holder: Account(_counts(counts)) for holder, counts in saved.get("holders", {}).items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"the saved budget cannot be used ({error!r}); restore it from a backup of the job") from None
    settled = total - sum((account.spent for account in holders.values()), Usage())
    counts = [value for usage in (settled, *(account.spent for account in holders.values())) for value in usage.values]
    if not all(value >= 0 for value in counts) or not seconds >= 0.0:
        raise DataError("the saved budget holds what is no count; restore it from a backup of the job")
    return settled, holders, seconds


def _counts(saved: Mapping[str, Any]) -> Usage:
    counts = [saved[name] for name in ("requests", "prompt_tokens", "completion_tokens", "units")]
    if not all(isinstance(value, int) for value in counts):
        raise ValueError(f"{counts} are no counts")
    return Usage(*counts)
