"""Stages become segments: which domains, how much replay, and refusals before anything is started. No file is read."""

from __future__ import annotations

import json
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_ray.config import RunConfig, parse_config
from nexus_ray.corpora.manifest import Shard, TokenManifest
from nexus_ray.errors import ConfigError
from nexus_ray.stream.curriculum import changed_segment, replay_weights, stage_segments
from nexus_ray.stream.mixture import MAX_CYCLE
from nexus_ray.stream.plan import Plan, Segment

SEQ_LEN, ROWS_PER_STEP = 16, 10
TOKENS = {"a": 40_001, "b": 10_001, "c": 25_001, "d": 5_001}


def manifest(domain: str, tokens: int) -> TokenManifest:
    shard = Shard("tokens-00000.parquet", tokens, 10, 4 * tokens, f"hash of {domain}", 0)
    return TokenManifest(domain, "train", "/nowhere", "t", 256, 0, (shard,) if tokens else ())


MANIFESTS = {name: manifest(name, tokens) for name, tokens in TOKENS.items()}


def config(*stages: dict[str, Any], steps: int = 20, **continual: Any) -> RunConfig:
    """Stages given as keyword dictionaries; a name for each is made up."""
    return parse_config(
        {
            "name": "test",
            "domains": {name: {"source": {"kind": "files", "paths": ["x"]}} for name in TOKENS},
            "stages": [{"name": f"s{i}", **stage} for i, stage in enumerate(stages)],
            "training": {
                "seq_len": SEQ_LEN,
                "global_batch_tokens": SEQ_LEN * ROWS_PER_STEP,
                "token_budget": SEQ_LEN * ROWS_PER_STEP * steps,
            },
            "continual": continual,
        }
    )


ONE_BY_ONE = ({"domains": {"a": 1}}, {"domains": {"b": 1}}, {"domains": {"c": 1}})


def drawn(segments: list[Segment]) -> dict[str, int]:
    total: dict[str, int] = {}
    for segment in segments:
        for name, rows in segment.drawn(segment.rows).items():
            total[name] = total.get(name, 0) + rows
    return total


def replayed(segments: list[Segment]) -> np.ndarray:
    """For each row of a stage, whether it is replayed."""
    start = segments[0].start_row
    plan = Plan(0, SEQ_LEN, 64, tuple(segments))
    return plan.sequences(start, plan.rows).replayed


# --- sequential -----------------------------------------------------------------------------------------------------


def test_the_first_stage_replays_nothing() -> None:
    """There is nothing earlier: all of its rows are new, whatever the ratio."""
    (segment,) = stage_segments(config(*ONE_BY_ONE, replay_ratio=0.25), 0, MANIFESTS, start_row=0)
    assert (segment.weights, segment.replay, segment.replay_ratio) == ({"a": 1}, (), 0.0)


def test_a_later_stage_is_one_segment_with_the_exact_ratio() -> None:
    """It begins where the plan ends and names the shards it draws from."""
    (segment,) = stage_segments(config(*ONE_BY_ONE, replay_ratio=0.25), 1, MANIFESTS, start_row=200, attempt=3)
    assert (segment.start_row, segment.rows, segment.stage, segment.attempt) == (200, 200, "s1", 3)
    assert (segment.weights, segment.cycle) == ({"a": 1, "b": 3}, 4)
    assert segment.replay == ("a",) and segment.replay_ratio == 0.25
    assert segment.manifests["a"].fingerprint == MANIFESTS["a"].fingerprint
    assert segment.manifests["a"].rows == 2500


def test_earlier_domains_are_replayed_by_their_tokens() -> None:
    """The default treats all earlier text alike: a domain of four times the tokens is replayed four times as often."""
    weights = replay_weights(config(*ONE_BY_ONE), 2, TOKENS)
    assert weights == {"a": Fraction(40_001), "b": Fraction(10_001)}
    segments = stage_segments(config(*ONE_BY_ONE, replay_ratio=0.5, steps=100), 2, MANIFESTS, start_row=0)
    counts = drawn(segments)
    assert counts["c"] == 500 and abs(counts["a"] - 400) <= 1 and abs(counts["b"] - 100) <= 1


def test_a_domain_that_returns_is_not_its_own_replay() -> None:
    """A stage that teaches an earlier domain again counts it as new."""
    twice = config({"domains": {"a": 1}}, {"domains": {"b": 1}}, {"domains": {"a": 1}}, replay_ratio=0.2)
    assert replay_weights(twice, 2, TOKENS) == {"b": Fraction(10_001)}


def test_configured_replay_replaces_the_default() -> None:
    """Named weights are taken exactly, also a domain of no earlier stage; an empty mapping means none."""
    named = config({"domains": {"a": 1}}, {"domains": {"b": 1}, "replay": {"a": 0.1, "d": 0.3}}, replay_ratio=0.4)
    (segment,) = stage_segments(named, 1, MANIFESTS, start_row=0)
    assert segment.weights == {"a": 1, "b": 6, "d": 3} and set(segment.replay) == {"a", "d"}
    none = config({"domains": {"a": 1}}, {"domains": {"b": 1}, "replay": {}}, replay_ratio=0.4)
    assert stage_segments(none, 1, MANIFESTS, start_row=0)[0].weights == {"b": 1}


def test_weights_of_new_domains_are_the_decimals_of_the_user() -> None:
    """0.1 is one tenth, not its binary neighbour with its endless denominator."""
    mixed = config({"domains": {"a": 0.1, "b": 0.2, "c": 0.7}})
    (segment,) = stage_segments(mixed, 0, MANIFESTS, start_row=0)
    assert (segment.weights, segment.cycle) == ({"a": 1, "b": 2, "c": 7}, 10)


def test_replay_of_everything_leaves_no_new_text() -> None:
    """The control arm of old data alone: ratio 1."""
    (segment,) = stage_segments(config(*ONE_BY_ONE, replay_ratio=1.0), 1, MANIFESTS, start_row=0)
    assert segment.weights == {"a": 1}


@pytest.mark.parametrize("ratio", [0.01, 0.05, 0.25])
def test_the_cumulative_replay_of_a_stage_is_never_off_by_more_than_one_row(ratio: float) -> None:
    """At 1 % as at 25 %, at every row of the stage."""
    rows = replayed(stage_segments(config(*ONE_BY_ONE, replay_ratio=ratio, steps=200), 2, MANIFESTS, start_row=0))
    assert np.abs(rows.cumsum() - ratio * np.arange(1, rows.size + 1)).max() < 1


# --- interleaved ----------------------------------------------------------------------------------------------------


def test_interleaved_mixes_the_domains_of_all_stages_in_every_stage() -> None:
    """Each stage's text weighs the same, split inside as the stage says; nothing counts as replay."""
    stages = ({"domains": {"a": 3, "b": 1}}, {"domains": {"c": 5}})
    for index in range(2):
        (segment,) = stage_segments(
            config(*stages, curriculum="interleaved", replay_ratio=0.3), index, MANIFESTS, start_row=0
        )
        assert (segment.weights, segment.cycle, segment.replay) == ({"a": 3, "b": 1, "c": 4}, 8, ())


# --- progressive ----------------------------------------------------------------------------------------------------


def test_progressive_moves_from_the_old_domains_to_the_new_in_equal_steps() -> None:
    """The ratio falls linearly through its mean; the first stage has nothing to move from."""
    progressive = config(*ONE_BY_ONE, curriculum="progressive", replay_ratio=0.2, progressive_steps=4, steps=40)
    segments = stage_segments(progressive, 1, MANIFESTS, start_row=70)
    assert [segment.replay_ratio for segment in segments] == [0.35, 0.25, 0.15, 0.05]
    assert [segment.start_row for segment in segments] == [70, 170, 270, 370]
    assert len(stage_segments(progressive, 0, MANIFESTS, start_row=0)) == 1


def test_progressive_above_one_half_ends_above_zero() -> None:
    """The swing is bounded by the nearer end, so no part asks for more than everything."""
    progressive = config(*ONE_BY_ONE, curriculum="progressive", replay_ratio=0.9, progressive_steps=2)
    ratios = [segment.replay_ratio for segment in stage_segments(progressive, 1, MANIFESTS, start_row=0)]
    assert ratios == [0.95, 0.85]


@given(st.integers(2, 60), st.integers(2, 15), st.sampled_from([0.01, 0.1, 0.25, 0.5, 0.9]))
@settings(deadline=None, max_examples=60)
def test_a_progressive_stage_replays_its_ratio_exactly(steps: int, parts: int, ratio: float) -> None:
    """Whole steps in every part, none lost between them; replay_ratio on average, to less than one row of the stage,
    also where the parts do not divide; and at every border no more than one row from the falling line."""
    progressive = config(
        *ONE_BY_ONE, curriculum="progressive", replay_ratio=ratio, progressive_steps=parts, steps=steps
    )
    segments = stage_segments(progressive, 1, MANIFESTS, start_row=0)
    total = steps * ROWS_PER_STEP
    assert len(segments) == min(parts, steps)
    assert sum(segment.rows for segment in segments) == total
    assert all(segment.rows and segment.rows % ROWS_PER_STEP == 0 for segment in segments)
    counted = replayed(segments).cumsum()
    assert abs(counted[-1] - ratio * total) <= 0.5 + 1e-9
    swing = min(ratio, 1 - ratio)
    for segment in segments:
        done = segment.start_row + segment.rows
        assert abs(counted[done - 1] - done * (ratio + swing - swing * done / total)) <= 0.5 + 1e-9
    assert (np.diff([segment.replay_ratio for segment in segments]) <= 1 / min(s.rows for s in segments) + 1e-9).all()


def test_a_long_progressive_stage_keeps_its_cycles_short() -> None:
    """Parts of many rows round their ratio to a fraction of a small cycle instead of one as long as the part."""
    progressive = config(*ONE_BY_ONE, curriculum="progressive", replay_ratio=0.1, progressive_steps=7, steps=99_991)
    generous = parse_config(progressive.model_dump(mode="json"), ["data.max_repetitions=1.0e+9"], where="test")
    segments = stage_segments(generous, 1, MANIFESTS, start_row=0)
    assert max(segment.cycle for segment in segments) <= MAX_CYCLE
    assert abs(drawn(segments)["a"] - 0.1 * 99_991 * ROWS_PER_STEP) <= 1


# --- refusals -------------------------------------------------------------------------------------------------------


def test_too_many_repetitions_of_a_small_source_are_refused() -> None:
    """The message says how often which domain would be read, and every way out."""
    small = {**MANIFESTS, "b": manifest("b", 161)}
    greedy = parse_config(
        config(*ONE_BY_ONE, replay_ratio=0.0).model_dump(mode="json"), ["data.max_repetitions=2"], where="test"
    )
    with pytest.raises(ConfigError) as caught:
        stage_segments(greedy, 1, small, start_row=0)
    message = str(caught.value)
    for words in (
        "data.max_repetitions=2: stage 's1' would read domain 'b' 20.0 times (200 rows drawn, 10 there)",
        "Lower training.token_budget or the domain's weight, add text, or raise data.max_repetitions to 20",
    ):
        assert words in message
    at_the_limit = parse_config(greedy.model_dump(mode="json"), ["data.max_repetitions=20"], where="test")
    assert stage_segments(at_the_limit, 1, small, start_row=0)


def test_repetitions_are_counted_over_all_parts_of_a_stage() -> None:
    """A progressive stage does not hide them in its segments; replayed sources count too."""
    small = {**MANIFESTS, "a": manifest("a", 81)}
    progressive = parse_config(
        config(*ONE_BY_ONE, curriculum="progressive", replay_ratio=0.5).model_dump(mode="json"),
        ["data.max_repetitions=15"],
        where="test",
    )
    with pytest.raises(ConfigError, match=r"domain 'a' (19\.\d|20\.\d) times"):
        stage_segments(progressive, 1, small, start_row=0)


@pytest.mark.parametrize("tokens", [0, 1])
def test_a_source_too_short_for_a_row_is_refused(tokens: int) -> None:
    """One token has no next token to predict."""
    with pytest.raises(ConfigError) as caught:
        stage_segments(config(*ONE_BY_ONE), 0, {**MANIFESTS, "a": manifest("a", tokens)}, start_row=0)
    expected = f"domains.a: its {tokens} training tokens do not fill a row of training.seq_len=16; add text"
    assert expected in str(caught.value)


def test_a_cut_run_draws_from_the_same_share_of_every_domain() -> None:
    plain = config(*ONE_BY_ONE, replay_ratio=0.5)
    cut = parse_config(plain.model_dump(mode="json"), ["data.fraction=0.1", "data.max_repetitions=0.9"], where="test")
    segments = stage_segments(plain, 1, MANIFESTS, start_row=0)
    assert [source.used for source in segments[0].manifests.values()] == [None, None]
    with pytest.raises(ConfigError, match=r"domain 'b' 1\.6 times \(100 rows drawn, 62 there\)"):
        stage_segments(cut, 1, MANIFESTS, start_row=0)
    roomy = parse_config(cut.model_dump(mode="json"), ["data.max_repetitions=2"], where="test")
    tenth = stage_segments(roomy, 1, MANIFESTS, start_row=0)
    assert {name: source.used for name, source in tenth[0].manifests.items()} == {"a": 250, "b": 62}
    assert Segment.from_json(json.loads(tenth[0].to_line())) == tenth[0]
    first = Plan(3, SEQ_LEN, 100).append(segments).sequences(0, 60).row
    assert Plan(3, SEQ_LEN, 100).append(tenth).sequences(0, 60).row.tolist() == first.tolist(), "until it repeats"


# --- equal seed, different ratios -------------------------------------------------------------------------------------


def whole_plan(ratio: float, *stages: dict[str, Any], steps: int = 40) -> Plan:
    """The plan of all stages of a run with one replay ratio."""
    made = config(*stages, steps=steps, replay_ratio=ratio)
    plan = Plan(7, SEQ_LEN, 64)
    for index in range(len(stages)):
        plan = plan.append(stage_segments(made, index, MANIFESTS, start_row=plan.rows))
    return plan


def rows_of(plan: Plan, domain: str, *, replayed: bool) -> list[int]:
    """Rows of a domain in the order in which a plan takes them."""
    s = plan.sequences(0, plan.rows)
    return s.row[(s.domain == s.domains.index(domain)) & (s.replayed == replayed)].tolist()


RATIOS = (0.01, 0.05, 0.1, 0.25, 0.5)


@pytest.mark.parametrize(
    "stages",
    [
        ({"domains": {"a": 1}, "replay": {"b": 1}},),
        ({"domains": {"a": 1}, "replay": {"b": 3, "c": 1}},),
        ({"domains": {"a": 1}}, {"domains": {"b": 1}}),
        ({"domains": {"a": 1}}, {"domains": {"b": 1}, "replay": {"a": 1}}, {"domains": {"c": 1}, "replay": {"a": 1}}),
        ONE_BY_ONE,
    ],
    ids=["one", "two sources", "two stages", "three stages", "three stages, default replay"],
)
def test_trials_that_differ_in_their_ratio_replay_nested_rows(stages: tuple[dict[str, Any], ...]) -> None:
    """Whole plans: with a larger ratio a trial replays what it replays with a smaller one, in the same order, and then
    more; of the new domains it reads the same rows in the same order, and then fewer."""
    plans = [whole_plan(ratio, *stages, steps=100) for ratio in RATIOS]
    sources = {name for plan in plans for segment in plan.segments for name in segment.replay}
    for name in sources:
        taken = [rows_of(plan, name, replayed=True) for plan in plans]
        for less, more in pairwise(taken):
            assert more[: len(less)] == less and len(more) > len(less) > 0
    for name in {name for stage in stages for name in stage["domains"]}:
        taken = [rows_of(plan, name, replayed=False) for plan in plans]
        for more, less in pairwise(taken):
            assert more[: len(less)] == less and (name in sources or len(more) > len(less) > 0)
    for name in sources & {name for stage in stages for name in stage["domains"]}:
        for plan in plans:
            learned, again = rows_of(plan, name, replayed=False), rows_of(plan, name, replayed=True)
            shared = min(len(learned), len(again))
            assert again[:shared] == learned[:shared], "replay begins with what was learned first"


def test_a_changed_segment_covers_the_rest_of_its_stage() -> None:
    made = config(*ONE_BY_ONE, replay_ratio=0.1)
    [last] = stage_segments(made, 1, MANIFESTS, start_row=200)
    changed = changed_segment(made, 1, MANIFESTS, last, start_row=250, replay_ratio=0.25, lr_factor=0.5)
    assert (changed.start_row, changed.rows, changed.lr_factor) == (250, last.rows - 50, 0.5)
    assert changed.weights == {"a": 1, "b": 3} and changed.replay == ("a",) and changed.replay_ratio == 0.25
    grown = MANIFESTS | {name: manifest(name, 2 * TOKENS[name]) for name in TOKENS}
    later = changed_segment(made, 1, grown, last, start_row=250, replay_ratio=0.25, lr_factor=0.5)
    assert changed.manifests == later.manifests == last.manifests, "it goes on in the rows it has"
    none = stage_segments(config(*ONE_BY_ONE, replay_ratio=0.0), 1, MANIFESTS, start_row=200)[0]
    some = changed_segment(made, 1, MANIFESTS, none, start_row=250, replay_ratio=0.25, lr_factor=1.0)
    assert some.weights == changed.weights and set(some.manifests) == {"a", "b"}
