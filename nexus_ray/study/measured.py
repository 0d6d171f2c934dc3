"""What laws are fitted to, out of finished trials or of the records of runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import yaml

from nexus_ray.errors import DataError
from nexus_ray.storage import Storage
from nexus_ray.study.laws import Measurement
from nexus_ray.study.records import Trial, Value, canonical
from nexus_ray.study.replicates import is_number

RATIO = "continual.replay_ratio"
BUDGET = "training.token_budget"


def from_trials(
    trials: Sequence[Trial],
    *,
    knob: str = RATIO,
    budgets: Collection[str] = (BUDGET,),
    fixed: Mapping[str, Value] | None = None,
) -> list[Measurement]:
    """Finished trials that differ in the replay ratio and the budget alone: those whose other knobs have the values
    `fixed`.

    `new` is bits per byte, `old` forgetting itself: fit with `base_old` 0. A budget is the tokens of the last report,
    whatever the knobs `budgets` say that set it (and what has to follow it, such as a warm-up).

    Raises:
        DataError: trials with different settings of another knob are left.
    """
    wanted, out, settings = dict(fixed or {}), [], set()
    for trial in trials:
        params = dict(trial.point.params)
        ratio = params.pop(knob, None)
        if trial.final is None or not is_number(ratio) or any(params.get(k) != v for k, v in wanted.items()):
            continue
        settings.add(canonical({k: v for k, v in params.items() if k not in wanted and k not in budgets}))
        final = trial.reports[-1]
        out.append(
            Measurement(final.tokens, float(ratio), -trial.final.new, trial.final.forgetting, trial.seed)  # type: ignore[arg-type]
        )
    if len(settings) > 1:
        raise DataError(
            f"a law over {knob} is one of otherwise equal trials, but these have {len(settings)} settings of other "
            f"knobs; fix them, for example to those of the winner"
        )
    return out


def from_run(folder: Storage, *, new: str, old: str, unit: str = "bits_per_byte") -> tuple[Measurement, float]:
    """The end of a finished run of one stage, and the old domain's loss before it (`base_old`).

    `new` and `old` are domains; `unit` is a matrix of `scores.json`: `bits_per_byte` or `loss` (nats per token).

    Raises:
        DataError: the run has not finished, has several stages, or did not evaluate a domain.
    """
    run, scores = folder.read_json("run.json"), folder.read_json("scores.json")
    stages, domains = run.get("stages") or [], scores.get("domains") or []
    matrix = scores.get(unit) or []
    if run.get("outcome") != "done" or len(stages) != 1 or len(matrix) != 2:
        raise DataError(f"{folder.uri}: a law needs a finished run of one stage; this one ended {run.get('outcome')!r}")
    if missing := sorted({new, old} - set(domains)):
        raise DataError(f"{folder.uri}: {', '.join(missing)} is none of the evaluated domains: {', '.join(domains)}")
    (_, before), (after_new, after_old) = ([row[domains.index(name)] for name in (new, old)] for row in matrix)
    config = yaml.safe_load(folder.read_text("config.yaml"))
    ratio = float(config["continual"]["replay_ratio"])
    seed = int((run.get("seeds") or {}).get("seed", 0))
    return Measurement(float(stages[0]["tokens"]), ratio, float(after_new), float(after_old), seed), float(before)
