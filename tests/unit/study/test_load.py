"""Study files: the committed example loads, and every fault shows by path, with a way out, before anything starts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from nexus_ray.config import Hardware
from nexus_ray.errors import ConfigError
from nexus_ray.study.judge import Judge
from nexus_ray.study.load import evaluations, load_study, run_tokens, rung_tokens
from nexus_ray.study.records import Point
from tests.studies import STUDY, a_study, write_study

EXAMPLE = Path(__file__).resolve().parents[3] / "configs/experiments/study/study.yaml"
LORA = {"choice": [True, False]}


def test_the_committed_study_has_24_trials_and_a_third_of_the_tokens() -> None:
    study = load_study(EXAMPLE, hardware=Hardware(cpus=2))
    points = list(study.space.grid())
    assert len(points) * len(study.config.seeds) == 24
    methods = {study.config_of(point, 0).continual.method for point in points}
    assert methods == {"full", "lora", "expand"}
    assert {name for point in points for name in point.params} == {
        "method",
        "continual.lora_rank",
        "continual.replay_ratio",
        "continual.warmup_steps",
    }
    config = study.config_of(points[0], 0)
    judge = Judge(study.config.stopping, study.config.objective)
    first, second = (float(share) for share in judge.shares)
    assert rung_tokens(config, judge.shares) == [204_800, 409_600]
    assert (24 * first + 8 * (second - first) + 2 * (1 - second)) / 24 <= 0.4


def test_where_a_run_is_scored_and_judged(tmp_path: Path) -> None:
    study = a_study(tmp_path, stopping={"rule": "asha", "rungs": [0.25, 0.5, 0.51]})
    config = study.config_of(next(study.space.grid()), 0)
    assert run_tokens(config) == 900_000
    first = [50_000 * k for k in range(1, 9)]
    assert evaluations(config) == [*first, 450_000, *(450_000 + tokens for tokens in first)]
    shares = Judge(study.config.stopping, study.config.objective).shares
    assert rung_tokens(config, shares) == [250_000, 450_000, 500_000]


def test_overrides_apply_to_all_trials(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path), ["training.weight_decay=0.25"])
    assert {study.config_of(point, 0).training.weight_decay for point in study.space.grid()} == {0.25}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("name=other", "override name: name of a trial follows from the study; use its `name`"),
        ("seed=5", "override seed: seed of a trial follows from the study"),
        ("continual.replay_ratio=0.5", "space.continual.replay_ratio sets it in every trial; narrow the knob"),
        ("trainin.seq_len=5", "override trainin.seq_len: is no path of a run's config; did you mean training.seq_len?"),
    ],
)
def test_what_the_command_line_cannot_set_for_all_trials(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_study(write_study(tmp_path), [override])


def test_a_study_may_be_kept_elsewhere(tmp_path: Path) -> None:
    assert load_study(write_study(tmp_path), [f"storage={tmp_path}/there"]).folder.uri.startswith(f"{tmp_path}/there")


@pytest.mark.parametrize(
    "base", [{"stages": None}, {"stages": "x"}, {"model": "y"}, {"stages": [{"name": "one", "replay": 3}]}]
)
def test_a_base_run_that_is_none_is_said_to_be(tmp_path: Path, base: dict[str, Any]) -> None:
    space = {"order": {"stages_order": "permutations"}}
    with pytest.raises(ConfigError, match=rf"run\.yaml(.|\n)*{next(iter(base))}"):
        a_study(tmp_path, base=base, space=space)


def test_orders_are_of_the_stages_that_common_sets(tmp_path: Path) -> None:
    stages = [{"name": name, "domains": {domain: 1}} for name, domain in (("x", "french"), ("y", "code"))]
    orders = {"order": {"stages_order": [["x", "y"], ["y", "x"]]}}
    study = a_study(tmp_path, common={"stages": stages}, space=orders)
    assert [point.params["order"] for point in study.space.grid()] == ["x>y", "y>x"]


def test_a_stage_that_repeats_itself_is_no_trial(tmp_path: Path) -> None:
    held = {"continual.max_forgetting": 0.5}
    with pytest.raises(ConfigError, match="on_forgetting=retry repeats stage one with more replay"):
        a_study(tmp_path, common={"continual.on_forgetting": "retry", **held})
    a_study(tmp_path, common={"continual.on_forgetting": "control", **held})


def knobs(**more: Any) -> dict[str, Any]:
    return {"space": {**STUDY["space"], **{name.replace("__", "."): knob for name, knob in more.items()}}}


ONE = {"continual.replay_ratio": {"choice": [0.0, 0.1]}}


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        # the file's own fields
        ({"space": {}}, ["space={}: must not be empty"]),
        ({"space": None}, ["space is missing"]),
        ({"spaces": 1}, ["spaces=1: unknown key; did you mean 'space'?"]),
        ({"seeds": [1, 1]}, ["seeds=[1, 1] names a seed twice"]),
        (
            {"search": {"kind": "rando", "trials": 3}},
            ["search.kind='rando' is unknown; use one of grid, random, optuna"],
        ),
        ({"search": {"trials": 3}}, ["search.kind is missing"]),
        ({"search": {"kind": "random"}}, ["search.trials is missing"]),
        ({"search": {"kind": "grid", "trials": 3}}, ["search.trials=3: unknown key"]),
        ({"search": {"kind": "random", "trials": "3"}}, ["search.trials='3': YAML reads this as text", "write 3"]),
        (
            {"objective": {"kind": "weighted", "weights": {"accuracy": 1.0}}},
            ["objective.weights.accuracy=1.0: unknown key; known are: new, forgetting, cost"],
        ),
        ({"objective": {"kind": "weighted", "weights": {"new": 0, "forgetting": 0}}}, ["all weights are 0"]),
        ({"objective": {"kind": "new_under_forgetting"}}, ["objective.max_forgetting is missing"]),
        ({"stopping": {"rule": "hyperband"}}, ["stopping.rule='hyperband' is unknown", "none, median, asha"]),
        ({"stopping": {"rule": "asha", "rungs": [0.5, 0.2]}}, ["must rise from rung to rung"]),
        ({"stopping": {"rule": "asha", "rungs": [0.5], "min_share": 0.1}}, ["rungs and min_share both say"]),
        ({"stopping": {"rule": "asha", "rungs": [1.0]}}, ["stopping.rungs.0=1.0: must be less than 1"]),
        ({"stopping": {"rule": "median", "eta": 3}}, ["stopping.eta=3: unknown key"]),
        # knobs
        (knobs(training__seq_len={}), ["space.training.seq_len: a knob is one of choice", "none of them"]),
        (knobs(training__seq_len={"choice": [8], "uniform": [0, 1]}), ["choice and uniform; give exactly one"]),
        (knobs(training__learning_rate={"uniform": [2, 1]}), ["uniform=[2.0, 1.0] must rise"]),
        (knobs(training__learning_rate={"log_uniform": [0, 1]}), ["has no logarithm at its low end; start above 0"]),
        (knobs(training__seq_len={"choice": [8], "levels": 3}), ["levels=3 is for ranges"]),
        (
            knobs(training__learning_rate={"log_uniform": [1e-4, 1e-3]}),
            ["space.training.learning_rate.levels is missing"],
        ),
        (
            knobs(training__seq_len={"int_uniform": [8.5, 9]}),
            ["space.training.seq_len.int_uniform.0=8.5: must be a whole"],
        ),
        (
            knobs(training__epsilon={"choice": [1e-8, float("nan")]}),
            ["space.training.epsilon.choice.1: nan is no finite number", "write a number, or drop it"],
        ),
        (knobs(m={"choice": [1.0, float("inf")], "path": "training.epsilon"}), ["space.m.choice.1: inf is no finite"]),
        (
            knobs(stages__0__domains={"choice": [{"french": 1.0}, {"french": float("nan")}]}),
            ["space.stages.0.domains.choice.1: nan is no finite number"],
        ),
        (
            knobs(m={"options": {"a": {"training.epsilon": float("-inf")}}}),
            ["space.m.options.a.training.epsilon: -inf is no finite number"],
        ),
        (
            knobs(training__epsilon={"choice": [1e-8], "when": {"continual.replay_ratio": {"below": float("inf")}}}),
            ["space.training.epsilon.when.continual.replay_ratio: inf is no finite number"],
        ),
        (knobs(training__epsilon={"uniform": [0, float("inf")]}), ["uniform.1=inf: must be a finite number"]),
        # paths
        (
            knobs(continual__replay_ration=LORA),
            ["space.continual.replay_ration: is no path", "did you mean continual.replay_ratio?"],
        ),
        (knobs(lora_rank=LORA), ["space.lora_rank: is no path", "did you mean continual.lora_rank?"]),
        (knobs(continual=LORA), ["space.continual: is a section; name a value inside it", "continual.replay_ratio"]),
        (knobs(seed=LORA), ["space.seed: seed of a trial follows from the study; use its `name` and `seeds`"]),
        (
            knobs(cluster__num_workers={"choice": [1, 2]}),
            ["cluster.num_workers changes no number of a run", "`common`"],
        ),
        (knobs(x={"path": "no.such", "choice": [1]}), ["space.x.path=no.such: is no path of a run's config"]),
        (knobs(m={"options": {"a": {"training.lr": 1.0}}}), ["space.m.options.a.training.lr: is no path"]),
        (
            {"common": {"training.lerning_rate": 1}},
            ["common.training.lerning_rate: is no path", "training.learning_rate?"],
        ),
        (knobs(stages__7__name={"choice": ["x"]}), ["stages has entries 0 to 1, not '7'"]),
        # values the run refuses
        (knobs(training__epsilon={"choice": [1e-8, -1.0]}), ["space (", "training.epsilon=-1.0: must be more than 0"]),
        (knobs(training__beta1={"uniform": [0.5, 1.5], "levels": 2}), ["training.beta1=1.5: must be less than 1"]),
        (
            {"space": {"training.weight_decay": {"uniform": [-1, 1]}}, "search": {"kind": "random", "trials": 1}},
            ["training.weight_decay=-1.0: must be at least 0"],
        ),
        (
            {"space": {"continual.use_lora": LORA, "continual.use_osft": LORA}},
            ["space (continual.use_lora=True, continual.use_osft=True", "exclude each other"],
        ),
        # conditions
        (
            knobs(continual__lora_rank={"choice": [4], "when": {"continual.use_lra": True}}),
            ["space.continual.lora_rank.when.continual.use_lra: no knob of that name"],
        ),
        (
            knobs(continual__lora_rank={"choice": [4], "when": {"continual.replay_ratio": 0.3}}),
            ["when.continual.replay_ratio=0.3 never holds: continual.replay_ratio has 0.0, 0.05, 0.25"],
        ),
        (
            knobs(continual__lora_rank={"choice": [4], "when": {"continual.replay_ratio": {"over": 0.1}}}),
            ["a condition is a value, a list of values, or {above: x} / {below: x}"],
        ),
        (
            {
                "space": {
                    "continual.use_lora": {"choice": [True], "when": {"continual.lora_rank": 4}},
                    "continual.lora_rank": {"choice": [4], "when": {"continual.lora.dora": True}},
                    "continual.lora.dora": {"choice": [True], "when": {"continual.use_lora": True}},
                }
            },
            ["the conditions run in a circle (continual.use_lora -> continual.lora_rank -> continual.lora.dora -> "],
        ),
        (
            knobs(
                a={"options": {"x": {}, "y": {}}},
                b={"options": {"z": {}}, "when": {"a": "x"}},
                training__epsilon={"choice": [1e-8], "when": {"a": "y", "b": "z"}},
            ),
            ["space.training.epsilon.when=", "these cannot hold together"],
        ),
        # two that set the same
        (
            knobs(m={"options": {"a": {"continual.warmup_steps": 3}}}),
            ["space.m sets continual.warmup_steps, and so does space.continual.warmup_steps in the same point"],
        ),
        (
            knobs(lr={"path": "continual.warmup_steps", "choice": [3]}),
            ["space.lr sets continual.warmup_steps, and so does"],
        ),
        # order of stages
        (knobs(o={"stages_order": [["one"]]}), ["space.o.stages_order.0=['one']: name every stage once: one, two"]),
        (
            {**knobs(o={"stages_order": "permutations"}), "stopping": {"rule": "median"}},
            ["stopping.rule=median compares trials at rungs, where two orders have learned different domains"],
        ),
        (
            knobs(o={"stages_order": "permutations"}, p={"stages_order": "permutations"}),
            ["space.p: space.o orders the stages already"],
        ),
        # search and stopping that do not fit
        ({"search": {"kind": "random", "trials": 13}}, ["search.trials=13, but the space has 12 points"]),
        (
            {
                "stopping": {"rule": "asha"},
                "common": {"evaluation.every_steps": None},
                "base": {"stages": [{"name": "one", "domains": {"french": 1}}]},
            },
            ["stopping.rule=asha reads evaluations during a stage", "set it in `common`, to 50 or less"],
        ),
        (
            {"stopping": {"rule": "asha", "rungs": [0.2, 0.21, 0.22]}},
            ["stopping.rungs: no evaluation between the rung at 0.2 of the budget and the next one"],
        ),
        # the base
        ({"base": {"trainin": {}}}, ["its base run run.yaml", "trainin={}: unknown key; did you mean training?"]),
    ],
)
def test_faults_are_told_by_path_with_a_way_out(tmp_path: Path, changes: dict[str, Any], messages: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_study(write_study(tmp_path, **changes), hardware=Hardware(cpus=2))
    for message in messages:
        assert message in str(error.value)


def test_orders_need_stages_that_stand_alone(tmp_path: Path) -> None:
    stages = [
        {"name": "one", "domains": {"french": 1}, "replay": {"english": 1}},
        {"name": "two", "domains": {"code": 1}, "replay": {"english": 1, "french": 1}},
    ]
    order = {"space": {"order": {"stages_order": "permutations"}}}
    with pytest.raises(ConfigError, match=r"stages\.1\.replay of the base run names french, which in another order"):
        load_study(write_study(tmp_path, base={"stages": stages}, **order))
    with pytest.raises(ConfigError, match=r"differ by order; name them in model\.tokenizer\.train_on"):
        load_study(write_study(tmp_path, base={"model": {}}, **order))
    by_hand = {"order": {"options": {"as-is": {}, "turned": {"stages": stages[::-1]}}}}
    study = load_study(write_study(tmp_path, base={"stages": stages}, space=by_hand))
    assert [study.config_of(point, 0).stages[0].name for point in study.space.grid()] == ["one", "two"]


def test_knobs_that_exclude_each_other_may_share_a_path(tmp_path: Path) -> None:
    space = {
        "method": {
            "options": {"full": {}, "lora": {"continual.use_lora": True}, "fixed": {"training.learning_rate": 1e-3}}
        },
        "lr-full": {"path": "training.learning_rate", "choice": [1e-4], "when": {"method": "full"}},
        "lr-lora": {"path": "training.learning_rate", "choice": [2e-3, 3e-3], "when": {"method": ["lora"]}},
    }
    study = a_study(tmp_path, space=space)
    rates = [study.config_of(point, 0).training.learning_rate for point in study.space.grid()]
    assert rates == [1e-4, 2e-3, 3e-3, 1e-3]


def test_a_point_inside_a_range_may_be_refused(tmp_path: Path) -> None:
    space = {"training.seq_len": {"int_uniform": [100, 200]}}
    study = a_study(tmp_path, space=space, search={"kind": "optuna", "trials": 3})
    sound, odd = Point({"training.seq_len": 125}), Point({"training.seq_len": 150})
    assert study.refusal(sound) is None
    refusal = study.refusal(odd)
    assert refusal is not None and "training.seq_len=150" in refusal and "\n" not in refusal
    assert study.budget(odd) == study.base_tokens == 900_000


def test_all_faults_are_listed_at_once(tmp_path: Path) -> None:
    space = {"continual.nope": {"choice": [1]}, "training": {"choice": [1]}, "seed": {"choice": [1]}}
    with pytest.raises(ConfigError, match="3 faults"):
        load_study(write_study(tmp_path, space=space))
    with pytest.raises(ConfigError) as error:
        load_study(write_study(tmp_path, space={"training.beta1": {"choice": [0.1, 1.5, 0.2, 2.0]}, **ONE}))
    lines = str(error.value).splitlines()[1:]
    assert len(lines) == 2 and all("and 1 more points" in line for line in lines), "a fault is told once"
