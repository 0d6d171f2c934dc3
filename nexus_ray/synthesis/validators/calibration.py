"""What a judge showed on its golden set, why that may not be enough, and the file where a job writes it down.

A measurement costs about a hundred calls that are paid for. `judge.json` in a ledger's folder holds it, so that it is
made once per job by whoever needs it first, and anyone can read later by which judge rows were accepted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nexus_ray.config.validators import JudgeConfig
from nexus_ray.errors import DataError
from nexus_ray.storage import Storage

FORMAT = 1
FILE = "judge.json"


@dataclass(frozen=True)
class Calibration:
    """What a judge showed on its golden set. Shares of nothing are NaN."""

    accepted: int
    """Golden items that it accepted."""
    pairs: int
    """Questions of the golden set with an answer to accept and one to reject."""
    precision: float
    """Rightly accepted among accepted."""
    precision_low: float
    """Lower end of its 95 % interval (Wilson): how little a short golden set can promise."""
    recall: float
    """Accepted among the acceptable."""
    accuracy: float
    accuracy_without_examples: float
    unparsed: float
    """Share of replies, probes included, that do not follow the demanded form."""
    order_swaps: float
    """Share of pairs whose winner changes with the order of the two answers."""
    length_swaps: float
    """Share of rejected items that are accepted once they are padded."""
    wrong_examples: tuple[int, ...]
    """Places, from 0, of examples whose verdict the judge does not share when it has not seen it."""

    def faults(self, config: JudgeConfig) -> list[str]:
        """Why this judge is not to be trusted; empty if it is. What could not be measured is a reason."""
        no_order = "no reply to its pairs can be read" if self.pairs else "the golden set has no such pair; add some"
        found = [
            _below("precision", self.precision, "min_precision", config.min_precision, "no golden item is accepted"),
            self._too_uncertain(config),
            _below("recall", self.recall, "min_recall", config.min_recall, "the golden set has no item to accept"),
            _above("unparsed", self.unparsed, "max_unparsed", config.max_unparsed, "the golden set is empty"),
            _above("order_swaps", self.order_swaps, "max_order_swaps", config.max_order_swaps, no_order),
            _above("length_swaps", self.length_swaps, "max_length_swaps", config.max_length_swaps,
                   "no golden item is rejected, or no reply to a padded one can be read"),
        ]  # fmt: skip
        if self.wrong_examples:
            found.append(f"examples {list(self.wrong_examples)} of the rubric get another verdict than they carry")
        if self.accuracy < self.accuracy_without_examples:
            found.append(
                f"the rubric's examples lower accuracy from {self.accuracy_without_examples:.2f} to {self.accuracy:.2f}"
            )
        return [fault for fault in found if fault]

    def _too_uncertain(self, config: JudgeConfig) -> str:
        """A precision that would do, shown on too few items."""
        if not (self.precision >= config.min_precision) or self.precision_low >= config.min_precision_low:
            return ""
        return (
            f"precision_low {self.precision_low:.2f} is below min_precision_low={config.min_precision_low:g}: the "
            f"{self.accepted} golden items that are accepted promise no more; add items"
        )


def wilson_low(successes: int, trials: int) -> float:
    """Lower end of the 95 % score interval of a share (Wilson 1927); NaN for no trials."""
    if not trials:
        return math.nan
    z, share = 1.959964, successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return (centre - spread) / (1 + z * z / trials)


def _below(name: str, value: float, limit_name: str, limit: float, missing: str) -> str:
    if math.isnan(value):
        return f"{name} cannot be measured: {missing}"
    return "" if value >= limit else f"{name} {value:.2f} is below {limit_name}={limit:g}"


def _above(name: str, value: float, limit_name: str, limit: float, missing: str) -> str:
    if math.isnan(value):
        return f"{name} cannot be measured: {missing}"
    return f"{name} {value:.2f} is above {limit_name}={limit:g}" if value > limit else ""


# --- the record --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """The calibrations of a job's judges, in the folder of its ledger."""

    folder: Storage
    revision: str
    """Of the judging model."""

    @property
    def file(self) -> str:
        return f"{self.folder.uri}/{FILE}"

    def measured(self, rubric: str, golden: str, measure: Callable[[], Calibration]) -> Calibration:
        """The calibration of this model by a rubric and a golden set, given by their fingerprints.

        Whoever comes first measures, under a lock, and the others wait and read. A judge that failed is written down
        too: it would fail again. Raises DataError if the file is damaged, and what `measure` raises, recording nothing.
        """
        key = {"rubric": rubric, "golden": golden, "revision": self.revision}
        with self.folder.lock("locks/judge"):
            known = calibrations(self.folder)
            for entry in known:
                if key.items() <= entry.items():
                    return _read(entry, self.file)
            found = measure()
            self.folder.write_json({"format": FORMAT, "judges": [*known, {**key, **_written(found)}]}, FILE)
            return found


def calibrations(folder: Storage) -> list[dict[str, Any]]:
    """What a ledger's folder records of its judges: fingerprints and figures (null for a share of nothing) of each.

    Empty where no judge was measured. Raises DataError if the file is damaged.
    """
    try:
        data = folder.read_json(FILE)
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']}, this version reads {FORMAT}")
        return [dict(entry) for entry in data["judges"]]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(_unusable(f"{folder.uri}/{FILE}", error)) from None


def _written(calibration: Calibration) -> dict[str, Any]:
    figures = asdict(calibration)
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in figures.items()}


def _read(entry: Mapping[str, Any], file: str) -> Calibration:
    try:
        figures: dict[str, Any] = {name: entry[name] for name in Calibration.__dataclass_fields__}
        figures = {name: math.nan if value is None else value for name, value in figures.items()}
        return Calibration(**{**figures, "wrong_examples": tuple(figures["wrong_examples"])})
    except (KeyError, TypeError) as error:
        raise DataError(_unusable(file, error)) from None


def _unusable(file: str, error: Exception) -> str:
    return f"{file} cannot be used ({type(error).__name__}: {error}); delete it, and the judge is measured again"
