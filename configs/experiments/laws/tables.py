"""Tables of the laws in Markdown: what was fitted, what it predicted of runs it had not seen, and the ratio it advises.

    python configs/experiments/laws/tables.py runs       (storage; without held_out.yaml's study, the fit alone)

New: bits per byte of French; forgotten: bits per byte of English; lower is better in both. A law is chosen by its
error at ratios left out of the fit, before it sees the held-out runs. Relative errors are shares of the measured mean
over seeds; the interval of their mean resamples the held-out settings. Nearest: the error of taking the nearest fitted
setting instead. Intervals of predictions hold 95 %: what the law leaves open, and the scatter around it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analyse import mean_cell, table

from nexus_ray.errors import DataError
from nexus_ray.study.advice import HeldOut, Laws, best_ratio, fit_laws, held_out, left_out
from nexus_ray.study.law_forms import LAWS, Quantity
from nexus_ray.study.laws import Fitted, Measurement, fit_law, settings_of
from nexus_ray.study.measured import RATIO

FIT, HELD = "laws", "laws-held-out"
BOUNDS = (0.3, 0.6)
"""Bits per byte of English for which a ratio is asked: about what 15 and 4 % of replay forget in ../replay."""
AIM = 0.05
"""Relative error that was hoped for."""


def measured(storage: Path, name: str) -> list[Measurement]:
    """The finished runs of a study; none before it has results."""
    file = storage / f"{name}-study" / "results.json"
    trials = json.loads(file.read_text())["trials"] if file.exists() else []
    return [
        Measurement(t["tokens"], t["params"][RATIO], -t["new"], t["forgetting"], t["seed"])
        for t in trials
        if t["status"] == "finished"
    ]


def tables(storage: Path) -> str:
    fitted, unseen = measured(storage, FIT), measured(storage, HELD)
    try:
        laws = fit_laws(fitted)
    except DataError as error:
        return f"the study {FIT} has {len(fitted)} finished runs: {error}"
    parts = [_runs("fitted", fitted), _runs("held out", unseen)]
    for quantity, law, error in (
        ("new", laws.new, laws.new_error),
        ("forgetting", laws.forgetting, laws.forgetting_error),
    ):
        parts += [_fit(law, error), *_predictions(law, unseen)]
        parts += [] if error is None else [_choice(quantity, law, fitted, unseen)]
    return "".join([*parts, _advice(laws, sorted({row.tokens for row in [*fitted, *unseen]}))])


def _runs(what: str, rows: Sequence[Measurement]) -> str:
    cells: dict[tuple[float, float], list[Measurement]] = {}
    for row in sorted(rows, key=lambda row: (row.tokens, row.ratio)):
        cells.setdefault((row.tokens, row.ratio), []).append(row)
    lines = []
    for (tokens, ratio), own in cells.items():
        means = [mean_cell(values, ".4f") for values in ([row.new for row in own], [row.old for row in own])]
        lines.append([f"{tokens:,}", f"{ratio:.1%}", len(own), *means])
    return f"\n{what}: {len(rows)} runs\n" + table(["tokens", "replay", "seeds", "new", "forgotten"], lines)


def _fit(law: Fitted, error: HeldOut | None) -> str:
    rows = [
        [p.name, f"{p.value:.4g}", f"[{p.interval[0]:.3g}, {p.interval[1]:.3g}]", "yes" if p.determined else "no"]
        for p in law.parameters()
    ]
    left = "" if error is None else f"; ratios left out of the fit are {error.error:.1%} off"
    return (
        f"\n{law.law.of}: {law.law.name}, {law.law.formula}; D in units of {law.unit:,.0f} tokens; "
        f"scatter {law.scatter:.2%}{left}\n" + table(["parameter", "value", "95 %", "determined by the data"], rows)
    )


def _predictions(law: Fitted, unseen: Sequence[Measurement]) -> Iterator[str]:
    if not unseen:
        return
    tested = held_out(law, settings_of(unseen, law.law.of))
    rows = []
    for row in tested.rows:
        low, high = law.predict(row.tokens, row.ratio).interval
        off, inside = abs(row.predicted - row.measured) / abs(row.measured), "yes" if row.covered else "no"
        figures = f"{row.measured:.4f}", f"{row.predicted:.4f}", f"[{low:.4f}, {high:.4f}]", inside, f"{off:.2%}"
        rows.append([f"{row.tokens:,.0f}", f"{row.ratio:.1%}", *figures, f"{row.nearest:.4f}"])
    yield table(["tokens", "replay", "measured", "predicted", "95 %", "inside", "off by", "nearest"], rows)
    spread = "" if tested.interval is None else f" [{tested.interval[0]:.2%}, {tested.interval[1]:.2%}]"
    yield (
        f"\nMean relative error of {law.law.of}: {tested.error:.2%}{spread}, "
        f"{'within' if tested.error <= AIM else 'above'} the aim of {AIM:.0%}; nearest fitted setting instead: "
        f"{tested.baseline:.2%}; in bits per byte {tested.absolute:.4f}.\n"
    )


def _choice(quantity: Quantity, chosen: Fitted, fitted: Sequence[Measurement], unseen: Sequence[Measurement]) -> str:
    """All forms of a quantity, so that the choice among them can be judged."""
    seen, rows = settings_of(fitted, quantity), []
    for name in (law.name for law in LAWS.values() if law.of == quantity):
        left = left_out(name, seen, by="ratio")
        test = held_out(fit_law(name, seen, draws=0), settings_of(unseen, quantity)) if unseen else None
        mark = "this one" if name == chosen.law.name else ""
        rows.append(
            [name, f"{left.error:.2%}", f"{left.absolute:.4f}", "–" if test is None else f"{test.error:.2%}", mark]
        )
    return table(["form", "ratios left out", "bits per byte", "held out", "chosen"], rows)


def _advice(laws: Laws, budgets: Sequence[float]) -> str:
    rows = []
    for tokens in budgets:
        for bound in BOUNDS:
            found = best_ratio(laws, tokens=tokens, max_forgetting=bound)
            spread = "–" if found.interval is None else f"[{found.interval[0]:.1%}, {found.interval[1]:.1%}]"
            ratio = "none" if found.ratio is None else f"{found.ratio:.1%}"
            expected = ["–" if x is None else f"{x:.4f}" for x in (found.new, found.forgetting)]
            rows.append([f"{tokens:,.0f}", bound, ratio, spread, *expected, "; ".join(found.warnings)])
    head = ["tokens", "forgotten at most", "replay", "95 %", "new expected", "forgotten expected", "careful"]
    return "\nThe ratio of the lowest new loss that keeps a bound:\n" + table(head, rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("storage", nargs="?", default="runs", type=Path)
    print(tables(parser.parse_args(argv).storage))


if __name__ == "__main__":
    main()
