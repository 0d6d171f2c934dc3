"""The controller of a running stage: from what was measured so far, and what was done about it, to the next action.

Pure and deterministic: a decision is a function of the config, the readings and the settings in force, so that a
resumed stage decides what the interrupted one would have. It acts on the replay ratio first and on the learning rate
only where replay is at its limit: replay costs the new domain least (0.02 nats for three quarters of the forgetting at
5 %, Ibrahim et al. 2024, arXiv:2403.08763, table 2; here: configs/experiments/replay/RESULT.md).

What it allows for:
- Delay. Forgetting rises fast and levels off where the ratio puts it, so a reading is carried forward by half of its
  last change (before anything is taken back, to the end of the stage if it rose), and after an action some evaluations
  only watch.
- The end of the stage. What counts is the forgetting at the end; losses at a high learning rate heal in part while it
  decays. The limit starts at `bound x (1 + slack)` and falls to the bound with the learning rates still to come.
- Gain. Over the fixed ratios of configs/experiments/replay, F / (F0 - F) falls as ratio^-0.5 (F: forgetting, F0: that
  without replay), so a ratio is changed by the square of the wanted change in forgetting.
- The learning rate's gain is taken to be 1 at most: it comes back by no more than leads to the middle of the band, so
  that a cut and its return do not chase each other.
- Noise. The standard error of a reading is added to it; between the limit and `room` below it nothing is done.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Context
from itertools import accumulate
from typing import Literal

from nexus_ray.config.control import ControlConfig

Kind = Literal["replay", "learning_rate", "stop"]

LEAD = 0.5
"""How many times its last change a reading is carried forward by."""
GAIN = 2.0
"""Power of the wanted change in forgetting that a ratio is changed by."""
LARGEST_RAISE, SMALLEST_RAISE, LARGEST_CUT, LR_STEP = 3.0, 1.2, 0.5, 0.5
"""Most and least that more replay multiplies a ratio by, least that less replay does, and what the learning rate is
multiplied by, and divided by at most. The smallest raise is still worth an interruption once it is rounded."""
TOO_LATE, LATE = 0.02, 0.1
"""With less than this share of the learning rates to come nothing has an effect any more, and less replay gains
nothing."""
SMALLEST_CHANGE = 0.1
"""Relative changes of a ratio below this are not worth an interruption."""
SMALLEST_RATIO = 0.001
"""What replay begins with where there was none; a ratio that would fall below it falls to the lowest allowed."""


@dataclass(frozen=True)
class Reading:
    """An evaluation of the protected domains during a stage; bits per byte."""

    step: int
    """Optimizer steps done; 0 is the stage's start."""
    forgetting: Mapping[str, float]
    """By domain, against its best score before the stage's end."""
    error: Mapping[str, float]
    """Standard error of each."""


@dataclass(frozen=True)
class Setting:
    """What is in force from step `since` on."""

    since: int
    replay_ratio: float
    lr_factor: float


@dataclass(frozen=True)
class Action:
    """What changes after step `step`; `stop` gives up."""

    kind: Kind
    step: int
    replay_ratio: float
    lr_factor: float
    reason: str

    @property
    def setting(self) -> Setting:
        """What it puts in force."""
        return Setting(self.step, self.replay_ratio, self.lr_factor)


@dataclass(frozen=True)
class Controller:
    """Holds the worst of the protected domains under `bound`."""

    bound: float
    """Bits per byte."""
    config: ControlConfig
    start_ratio: float
    """The replay ratio that the stage starts with."""
    can_replay: bool
    """Whether the stage has anything to replay."""
    left: Sequence[float]
    """Share of the stage's sum of learning rates that is still to come, by steps done; [steps + 1], 1 to 0."""

    def limit(self, step: int) -> float:
        """The forgetting allowed after `step` steps."""
        return self.bound * (1.0 + self.config.slack * self.left[step])

    def decide(self, readings: Sequence[Reading], settings: Sequence[Setting]) -> Action | None:
        """What to do after the last reading; None: nothing.

        `readings` begin with that of step 0 and rise by step; `settings` begin with that of step 0.
        """
        now, setting = readings[-1], settings[-1]
        settled = sum(reading.step > setting.since for reading in readings) > self.config.settle_evaluations
        if now.step == 0 or (setting.since and not settled) or self.left[now.step] < TOO_LATE:
            return None
        limit = self.limit(now.step)
        worst, expected = self._worst(readings, rising=LEAD, falling=LEAD)
        if expected > limit:
            why = f"{worst} is expected to lose {expected:.4f} bits per byte, {limit:.4f} is allowed"
            return self._hold_back(readings, setting, expected / limit, why) or self._give_up(readings, setting)
        worst, expected = self._worst(readings, rising=math.inf, falling=0.0)
        if settled and expected < self.config.room * limit and self.left[now.step] >= LATE:
            why = f"{worst} is expected to lose {expected:.4f} of the {limit:.4f} bits per byte allowed"
            return self._let_go(now.step, setting, expected / limit, why)
        return None

    def _worst(self, readings: Sequence[Reading], *, rising: float, falling: float) -> tuple[str, float]:
        """The domain expected to lose most, and how much: its last reading, carried forward by `rising` or `falling`
        times its last change (at most to the end of the stage, at the pace per learning rate), and its margin."""
        now, before = readings[-1], readings[-2]
        done, to_come = self.left[before.step] - self.left[now.step], self.left[now.step]
        whole = to_come / done if done > 0 else 0.0
        expected = {}
        for name, value in now.forgetting.items():
            change = value - before.forgetting[name]
            lead = min(whole, rising if change > 0 else falling)
            expected[name] = value + lead * change + self.config.margin * now.error[name]
        return max(expected.items(), key=lambda item: item[1])

    @property
    def _aim(self) -> float:
        """The middle of the band in which nothing is done, as a share of the limit."""
        return (1.0 + self.config.room) / 2

    def _hold_back(self, readings: Sequence[Reading], setting: Setting, excess: float, why: str) -> Action | None:
        """More replay, else a lower learning rate where forgetting does not fall under the bound by itself; None if
        both are at their limits (the ratio: within `SMALLEST_CHANGE` of it)."""
        step, ratio = readings[-1].step, setting.replay_ratio
        most = _rounded(self.config.max_replay_ratio, ROUND_FLOOR)
        if self.can_replay and most >= ratio * (1 + SMALLEST_CHANGE):
            factor = min(LARGEST_RAISE, max(SMALLEST_RAISE, (excess / self._aim) ** GAIN))
            more = min(most, _rounded(max(ratio, self.config.min_replay_ratio, SMALLEST_RATIO) * factor))
            return Action("replay", step, more, setting.lr_factor, f"{why}: more replay")
        lower = max(self.config.min_lr_factor, setting.lr_factor * LR_STEP)
        if lower < setting.lr_factor and self._worst(readings, rising=LEAD, falling=math.inf)[1] > self.bound:
            return Action("learning_rate", step, ratio, lower, f"{why}: lower learning rate")
        return None

    def _let_go(self, step: int, setting: Setting, share: float, why: str) -> Action | None:
        """The learning rate back up, else less replay; None if what changes would hardly change."""
        if setting.lr_factor < 1.0:
            rise = min(1 / LR_STEP, self._aim / share) if share > 0 else 1 / LR_STEP
            higher = min(1.0, _rounded(setting.lr_factor * rise))
            if higher < min(1.0, setting.lr_factor * (1 + SMALLEST_CHANGE)):
                return None
            return Action("learning_rate", step, setting.replay_ratio, higher, f"{why}: learning rate back up")
        factor = max(LARGEST_CUT, (max(0.0, share) / self._aim) ** GAIN)
        least = _rounded(min(self.start_ratio, self.config.min_replay_ratio), ROUND_CEILING)
        wanted = setting.replay_ratio * factor
        less = max(least, _rounded(wanted)) if wanted >= SMALLEST_RATIO else least
        if not self.can_replay or less >= setting.replay_ratio * (1 - SMALLEST_CHANGE):
            return None
        return Action("replay", step, less, 1.0, f"{why}: less replay")

    def _give_up(self, readings: Sequence[Reading], setting: Setting) -> Action | None:
        """Stop, if a domain is surely above the limit and at its pace would still be above the bound at the end."""
        now, before = readings[-1], readings[-2]
        done, to_come = self.left[before.step] - self.left[now.step], self.left[now.step]
        for name, value in now.forgetting.items():
            surely = value - self.config.margin * now.error[name]
            pace = min(0.0, value - before.forgetting[name]) / done if done > 0 else 0.0
            end = surely + pace * to_come
            if surely > self.limit(now.step) and end > self.bound:
                reason = (
                    f"{name} has lost {value:.4f} bits per byte and at this pace ends at {end:.4f} or more, above the "
                    f"bound of {self.bound:g}, with replay and learning rate at their limits"
                )
                return Action("stop", now.step, setting.replay_ratio, setting.lr_factor, reason)
        return None


def area_left(factors: Sequence[float]) -> list[float]:
    """Share of the sum of `factors` (one per step) still to come after 0, 1, ... steps."""
    total = sum(factors)
    return [max(0.0, 1.0 - done / total) for done in accumulate(factors, initial=0.0)]


def _rounded(ratio: float, how: str = ROUND_HALF_EVEN) -> float:
    """Two significant digits: a plan's cycle is then at most a few thousand rows. Limits are rounded inwards."""
    return float(Context(prec=2, rounding=how).create_decimal(repr(ratio)))
