"""What a run taught and cost, in sentences and key figures generated from its numbers.

All differences are in bits per byte on held-out text. A change counts as measurable if its interval excludes zero or,
where the record has no interval, if it exceeds `NOTICEABLE`.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from nexus_ray.report.record import Interval, RunRecord, Scores, as_interval, number

NOTICEABLE = 0.005
"""Bits per byte below which a change without an interval is called none."""
_WORDS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine"}


@dataclass(frozen=True)
class Story:
    """One domain's fate in a sentence or two."""

    domain: str
    tone: str
    """`good`, `bad` or `flat`."""
    text: str


@dataclass(frozen=True)
class Card:
    """One key figure."""

    label: str
    value: str
    unit: str = ""
    detail: str = ""
    tone: str = "flat"


@dataclass(frozen=True)
class Learned:
    """A domain's bits per byte around the stage it was new in. `final` is after the last evaluated stage."""

    domain: str
    stage: str
    row: int
    before: float
    after: float
    final: float
    later_stages: int


# --- figures ---------------------------------------------------------------------------------------------------


def learned(record: RunRecord) -> list[Learned]:
    """Every domain that has been trained on, at the first stage it was new in, where the score matrix covers it."""
    out: list[Learned] = []
    rows = record.scores.stages
    for stage in record.stages:
        for domain in record.new_domains(stage.index):
            column = record.scores.column(domain)
            if stage.name not in rows or any(item.domain == domain for item in out):
                continue
            row = rows.index(stage.name)
            before = column[row - 1] if 0 < row <= len(column) else None
            after, final = (column[row], column[-1]) if row < len(column) else (None, None)
            if before is not None and after is not None and final is not None:
                out.append(Learned(domain, stage.name, row, before, after, final, len(column) - 1 - row))
    return out


def forgetting_of(scores: Scores, domain: str) -> tuple[float | None, Interval | None]:
    """Forgetting of one domain and its interval, if known."""
    value = (scores.forgetting.get("per_domain") or {}).get(domain)
    interval = scores.interval("forgetting", "per_domain", domain) or scores.interval("forgetting", domain)
    if isinstance(value, dict):
        interval = interval or as_interval(value.get("interval"))
        value = value.get("value")
    return number(value), interval


def forgetting_overall(scores: Scores, which: str) -> tuple[float | None, Interval | None]:
    """`mean` or `max` forgetting over the earlier domains, and its interval, if known."""
    return number(scores.forgetting.get(which)), scores.interval("forgetting", which)


def new_domain_score(record: RunRecord) -> float | None:
    """Mean bits per byte, after the last evaluated stage, of the domains that were new in it."""
    if not record.scores.stages:
        return None
    stages = [stage for stage in record.stages if stage.name == record.scores.stages[-1]]
    values = [
        column[-1]
        for name in (record.new_domains(stages[-1].index) if stages else [])
        if (column := record.scores.column(name))
    ]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def mean_gain(record: RunRecord) -> float | None:
    """Bits per byte that the domains gained in their own stages, on average."""
    gains = [item.before - item.after for item in learned(record)]
    return sum(gains) / len(gains) if gains else None


def tokens_per_second(record: RunRecord) -> float | None:
    """Median over all logged steps."""
    values = [number(line.get("perf/tokens_per_second")) for stage in record.stages for line in stage.steps]
    known = [value for value in values if value]
    return median(known) if known else None


def measurable(value: float, interval: Interval | None) -> bool:
    if interval is None:
        return abs(value) > NOTICEABLE
    return interval[0] > 0 or interval[1] < 0


# --- words -----------------------------------------------------------------------------------------------------


def listing(names: list[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else ""


def span(interval: Interval | None, digits: int = 3) -> str:
    """`0.190 to 0.238`, or nothing."""
    return f"{_signless(interval[0], digits)} to {_signless(interval[1], digits)}" if interval else ""


def _signless(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return text.replace("-", "−") if float(text) else text.lstrip("-")


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{seconds:.1f} s" if seconds < 10 else f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def count(value: float | None) -> str:
    """A count with thousands set apart, or in millions (M), billions (B) when large."""
    if value is None:
        return "–"
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(value) >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:,.0f}"


def headline(record: RunRecord) -> str:
    """The run in one line."""
    names = [item.domain for item in learned(record)]
    total = len(record.config.get("stages") or record.stages)
    ended = sum(stage.finished for stage in record.stages)
    at = f"stage {min(ended + 1, total)} of {total}"
    if record.outcome == "running":
        return f"Running: {at}"
    if record.outcome == "interrupted":
        return f"Interrupted in {at}; the same command continues it"
    if record.outcome == "stopped":
        return f"Stopped after stage {ended} of {total}" + (f"; learned {listing(names)}" if names else "")
    if record.outcome == "failed":
        return f"Failed in {at}"
    if not names:
        return f"{record.name}: no stage has been evaluated yet"
    return f"Learned {listing(names)}{_forgot(record, len(names))}"


def _forgot(record: RunRecord, domains: int) -> str:
    mean, interval = forgetting_overall(record.scores, "mean")
    if mean is None:
        return ""
    if mean > 0 and measurable(mean, interval):
        return f"; forgot {mean:.3f} bits per byte{' on average' if domains > 2 else ''}"
    return "; forgot nothing measurable"


def stories(record: RunRecord) -> list[Story]:
    """A sentence or two per domain: what was learned in its stage, and what later stages did to it."""
    out = []
    for item in learned(record):
        share = (item.before - item.after) / item.before if item.before else 0.0
        text = (
            f"{item.before:.3f} → {item.after:.3f} bits per byte in stage {item.stage}, "
            f"{abs(share) * 100:.0f} % {'less' if share >= 0 else 'more'}."
        )
        tone, fate = _fate(record, item)
        out.append(Story(item.domain, tone, f"{text} {fate}".strip()))
    known = {story.domain for story in out}
    for domain in record.scores.domains:
        column = [value for value in record.scores.column(domain) if value is not None]
        if domain not in known and len(column) > 1:
            change = column[-1] - column[0]
            word = "worse" if change > 0 else "better"
            text = f"Never new in an evaluated stage: {column[0]:.3f} → {column[-1]:.3f} bits per byte"
            known_change = abs(change) > NOTICEABLE
            tone = "flat" if not known_change else "bad" if change > 0 else "good"
            out.append(Story(domain, tone, text + (f", {abs(change):.3f} {word}." if known_change else ", unchanged.")))
    return out


def _fate(record: RunRecord, item: Learned) -> tuple[str, str]:
    gain, later = item.before - item.after, item.later_stages
    if not item.later_stages:
        return ("good" if gain > 0 else "bad"), ("" if gain > 0 else "It learned nothing.")
    lost, interval = forgetting_of(record.scores, item.domain)
    if lost is None:
        lost = item.final - item.after
    stage_word = "The later stage" if later == 1 else f"The {_WORDS.get(later, later)} later stages"
    within = f" (95 % interval {span(interval)})" if interval else ""
    if not measurable(lost, interval):
        return "good", f"{stage_word} left it where it was{within}: nothing measurable was forgotten."
    if lost < 0:
        return "good", f"{stage_word} improved it by another {-lost:.3f}: nothing was forgotten."
    kept = 1 - lost / gain if gain > 0 else 0.0
    still = f"; {kept * 100:.0f} % of what it had gained is still there"
    remains = still if 0 <= kept <= 1 else "; more than it had gained"
    return "bad", f"{stage_word} cost it {lost:.3f}{within}{remains}."


def cards(record: RunRecord) -> list[Card]:
    """The key figures under the headline."""
    total = sum(stage.tokens for stage in record.stages)
    out = [Card("Trained", count(total), "tokens", f"{len(record.stages)} stages")]
    seconds = [number(stage.info.get("seconds")) for stage in record.stages]
    training = [number(stage.info.get("train_seconds")) for stage in record.stages]
    if any(seconds):
        inside = sum(filter(None, training))
        detail = f"{duration(inside)} in training steps" if inside else ""
        out.append(Card("Time", duration(sum(filter(None, seconds))), "", detail))
    if (speed := tokens_per_second(record)) is not None:
        out.append(Card("Speed", count(speed), "tokens/s", "median step"))
    for label, which in (("Mean forgetting", "mean"), ("Worst forgetting", "max")):
        value, interval = forgetting_overall(record.scores, which)
        if value is not None:
            tone = ("bad" if value > 0 else "good") if measurable(value, interval) else "flat"
            out.append(Card(label, _signless(value, 3), "bits per byte", span(interval), tone))
    if (backward := record.scores.backward_transfer) is not None:
        interval = record.scores.interval("backward_transfer")
        tone = ("good" if backward > 0 else "bad") if measurable(backward, interval) else "flat"
        out.append(Card("Backward transfer", _signless(backward, 3), "bits per byte", span(interval), tone))
    forward = [value for value in record.scores.forward_transfer.values() if value is not None]
    if forward:
        mean = sum(forward) / len(forward)
        out.append(
            Card(
                "Forward transfer",
                _signless(mean, 3),
                "bits per byte",
                "against training from scratch",
                "good" if mean > 0 else "bad",
            )
        )
    model = record.run.get("model") or {}
    if (size := number(model.get("parameters"))) is not None:
        out.append(Card("Model", count(size), "parameters"))
    return out
