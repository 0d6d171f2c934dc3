"""`sequence(i)` is a pure function of (seed, plan, position): counters go on, samples are nested, growth is safe."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_ray.errors import DataError
from nexus_ray.stream.plan import Plan, Segment, Source, parse_plan

OLD, NEW = Source("f-old", 1, 500), Source("f-new", 1, 700)
GOLDEN = [463, 373, 682, 64, 469, 189, 466, 32, 689, 174, 288, 489, 372, 161, 393, 416]
"""Rows of the first 16 positions at 25 % replay, written by version 1."""


def segment(start: int, rows: int, replay: int, cycle: int = 100, **changes: object) -> Segment:
    values: dict = {
        "stage": "s",
        "stage_index": 0,
        "attempt": 0,
        "start_row": start,
        "rows": rows,
        "weights": {"new": cycle - replay, "old": replay} if replay else {"new": cycle},
        "cycle": cycle,
        "replay": ("old",) if replay else (),
        "replay_ratio": replay / cycle,
        "manifests": {"new": NEW, "old": OLD},
    }
    return Segment(**(values | changes))


def plan(*segments: Segment, seed: int = 0) -> Plan:
    return Plan(seed, 64, 256).append(segments)


@given(st.integers(0, 3000), st.integers(0, 300), st.integers(1, 99))
@settings(deadline=None)
def test_any_slice_equals_the_whole(start: int, length: int, replay: int) -> None:
    p = plan(segment(0, 1700, replay), segment(1700, 1900, 100 - replay))
    stop = min(start + length, p.rows)
    start = min(start, stop)
    whole, part = p.sequences(0, p.rows), p.sequences(start, stop)
    assert np.array_equal(whole.domain[start:stop], part.domain)
    assert np.array_equal(whole.row[start:stop], part.row)
    assert np.array_equal(whole.replayed[start:stop], part.replayed)


@given(st.integers(1, 4000), st.sampled_from([1, 5, 10, 25, 50]))
@settings(deadline=None)
def test_cumulative_replay_is_never_off_by_more_than_one(rows: int, replay: int) -> None:
    taken = plan(segment(0, rows, replay)).sequences(0, rows).replayed.cumsum()
    assert np.abs(taken - np.arange(1, rows + 1) * replay / 100).max() < 1


def test_what_is_replayed_at_5_percent_is_also_replayed_at_10() -> None:
    def replayed(replay: int) -> set[int]:
        s = plan(segment(0, 2000, replay)).sequences(0, 2000)
        return set(s.row[s.replayed].tolist())

    assert replayed(5) < replayed(10) < replayed(25)


def test_a_domain_s_counter_goes_on_in_the_next_segment() -> None:
    split = plan(segment(0, 300, 10), segment(300, 200, 10, stage_index=1))
    whole = plan(segment(0, 500, 10))
    assert np.array_equal(split.sequences(0, 500).row, whole.sequences(0, 500).row)


def test_replay_begins_with_the_rows_learned_first_and_goes_on_from_stage_to_stage() -> None:
    """Learned in the middle of a run, then replayed twice: cumulative prefixes of what was learned, at any ratio."""

    def taken(replay: int) -> tuple[list[int], list[int]]:
        learn = segment(300, 400, 0, stage_index=1, weights={"old": 1}, cycle=1)
        later = [segment(700 + 400 * i, 400, replay, stage_index=2 + i) for i in range(2)]
        s = plan(segment(0, 300, 0), learn, *later).sequences(0, 1500)
        old = s.domain == s.domains.index("old")
        return s.row[old & ~s.replayed].tolist(), s.row[s.replayed].tolist()

    for replay in (5, 10, 25):
        learned, again = taken(replay)
        assert len(again) == 8 * replay and again == learned[: len(again)]
        assert learned == taken(0)[0], "replay takes no row from learning"


def test_replayed_before_it_is_learned_a_domain_is_learned_from_its_first_row_on() -> None:
    relearned = segment(300, 200, 0, stage_index=1, weights={"old": 1}, cycle=1)
    s = plan(segment(0, 300, 50), relearned).sequences(0, 500)
    assert s.row[s.replayed].tolist() == s.row[300:450].tolist()


def test_a_repeated_attempt_takes_the_rows_of_the_rejected_one() -> None:
    """The model goes back, and its rows with it: the new domain's from the stage's first on, the replayed ones nested;
    later stages replay what the attempt that was kept has learned."""
    first = segment(0, 300, 0, weights={"old": 1}, cycle=1)
    tries = [segment(300 + 200 * i, 200, 10 + 10 * i, stage_index=1, attempt=i) for i in range(2)]
    sources = {"third": Source("f-third", 1, 900), "new": NEW}
    last = segment(700, 400, 50, stage_index=2, weights={"third": 50, "new": 50}, manifests=sources)
    p = plan(first, *tries, replace(last, replay=("new",)))
    rejected, kept, later = p.sequences(300, 500), p.sequences(500, 700), p.sequences(700, 1100)
    for replayed, (fewer, more) in ((True, (rejected, kept)), (False, (kept, rejected))):
        less, whole = (s.row[s.replayed == replayed].tolist() for s in (fewer, more))
        assert less == whole[: len(less)] and len(less) < len(whole)
    learned = kept.row[~kept.replayed].tolist()
    assert later.row[later.replayed].tolist()[: len(learned)] == learned


def test_a_stage_that_learns_no_replayed_domain_has_the_rows_of_version_1() -> None:
    """One after the other in each domain's own order, as one counter per domain gives them."""
    p = plan(segment(0, 2000, 25), segment(1000, 1000, 50))
    s = p.sequences(0, 2000)
    for index, (name, source) in enumerate({"new": NEW, "old": OLD}.items()):
        mine = s.row[s.domain == index]
        assert np.array_equal(mine, p.order(name, source)(np.arange(len(mine))))
    assert s.row[:16].tolist() == GOLDEN


def test_a_grown_manifest_starts_a_new_order_and_leaves_earlier_rows_alone() -> None:
    grown = Source("f-old-2", 2, 900)
    before = plan(segment(0, 400, 50))
    after = plan(segment(0, 400, 50), segment(400, 400, 50, manifests={"new": NEW, "old": grown}))
    assert np.array_equal(before.sequences(0, 400).row, after.sequences(0, 400).row)
    late = after.sequences(400, 800)
    assert late.row[late.replayed].max() >= OLD.rows


def test_another_seed_gives_another_order() -> None:
    assert not np.array_equal(
        plan(segment(0, 300, 10)).sequences(0, 300).row, plan(segment(0, 300, 10), seed=1).sequences(0, 300).row
    )


def test_a_plan_survives_its_file() -> None:
    p = plan(segment(0, 300, 10), segment(300, 200, 5, lr_factor=0.5))
    lines = [s.to_line() for s in p.segments]
    assert parse_plan(lines, seed=0, seq_len=64, shuffle_window_rows=256) == p


def older(*segments: Segment) -> list[str]:
    """Lines as version 1 wrote them."""
    return [json.dumps({k: v for k, v in asdict(s).items() if k != "version"}) for s in segments]


def parsed(lines: list[str]) -> Plan:
    return parse_plan(lines, seed=0, seq_len=64, shuffle_window_rows=256)


def test_lines_of_an_older_version_are_refused_where_their_rows_were_others() -> None:
    learn, replay = segment(0, 300, 0, weights={"old": 1}, cycle=1), segment(300, 200, 10, stage_index=1)
    with pytest.raises(DataError, match=r"begun by an older version and learns and replays 'old'.*`commit` in run"):
        parsed(older(learn, replay)).sequences(0, 1)
    with pytest.raises(DataError, match=r"older version and repeats a stage"):
        parsed(older(learn, segment(300, 200, 0, stage_index=1, attempt=1))).sequences(0, 1)
    assert parsed(older(learn, replay)).rows == 500, "how much it planned is known all the same"


def test_lines_of_an_older_version_go_on_where_their_rows_are_the_same() -> None:
    """Stages that only learn, or replay what no stage has learned; the lines that follow count as this version does."""
    learn, replay = segment(0, 300, 0, weights={"old": 1}, cycle=1), segment(300, 200, 10, stage_index=1)
    mixed, now = parsed([*older(learn), replay.to_line()]), plan(learn, replay)
    assert np.array_equal(mixed.sequences(0, 500).row, now.sequences(0, 500).row)
    single = parsed(older(segment(0, 300, 10))).sequences(0, 300)
    assert np.array_equal(single.row, plan(segment(0, 300, 10)).sequences(0, 300).row)


def test_gaps_and_positions_outside_are_refused() -> None:
    with pytest.raises(DataError, match="starts at row 400, not 300"):
        plan(segment(0, 300, 10), segment(400, 100, 10))
    with pytest.raises(DataError, match=r"covers 0\.\.300"):
        plan(segment(0, 300, 10)).sequences(299, 301)


def test_drawn_counts_agree_with_the_sequences(tmp_path: Path) -> None:
    s = segment(0, 1000, 7)
    for rows in (0, 1, 99, 100, 101, 777):
        domain = plan(s).sequences(0, rows).domain
        assert s.drawn(rows) == {"new": int((domain == 0).sum()), "old": int((domain == 1).sum())}


# --- a line that replaces the end of a stage --------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(1, 1999), st.integers(0, 60)), min_size=1, max_size=5), st.integers(0, 60))
@settings(deadline=None)
def test_rows_before_a_cut_never_change_and_counters_go_on(cuts: list[tuple[int, int]], first: int) -> None:
    """Whatever is planned anew, and in whatever order of rows: what stood before it stays, every domain takes the rows
    of its own order one after the other, and the plan covers what it covered."""
    p = plan(segment(0, 2000, first))
    for start, replay in cuts:
        before = p.sequences(0, start)
        p = p.append([segment(start, 2000 - start, replay)])
        after = p.sequences(0, start)
        for name in ("row", "replayed"):
            assert np.array_equal(getattr(before, name), getattr(after, name))
        assert [before.domains[i] for i in before.domain] == [after.domains[i] for i in after.domain]
    assert p.rows == 2000 and sum(s.rows for s in p.segments) == 2000
    whole = p.sequences(0, 2000)
    for index, name in enumerate(whole.domains):
        mine = whole.row[whole.domain == index]
        assert np.array_equal(mine, p.order(name, {"new": NEW, "old": OLD}[name])(np.arange(len(mine))))


@given(st.integers(100, 1900), st.sampled_from([5, 10]), st.sampled_from([25, 50]))
@settings(deadline=None)
def test_samples_stay_nested_over_a_cut(cut: int, less: int, more: int) -> None:
    """What a stage replays at a ratio it also replays if the ratio is raised on the way, and more."""

    def replayed(*segments: Segment) -> set[int]:
        s = plan(*segments).sequences(0, 2000)
        return set(s.row[s.replayed].tolist())

    changed = replayed(segment(0, 2000, less), segment(cut, 2000 - cut, more))
    assert replayed(segment(0, 2000, less)) <= changed <= replayed(segment(0, 2000, more))


def test_a_plan_that_was_cut_survives_its_file() -> None:
    lines = [segment(0, 300, 10), segment(100, 200, 20, lr_factor=0.5), segment(100, 200, 30)]
    p = parse_plan([s.to_line() for s in lines], seed=0, seq_len=64, shuffle_window_rows=256)
    assert [(s.start_row, s.rows, s.replay_ratio) for s in p.segments] == [(0, 100, 0.1), (100, 200, 0.3)]
    assert p.segment_at(99).replay_ratio == 0.1 and p.segment_at(100).lr_factor == 1.0


def test_only_the_end_of_the_last_stage_can_be_planned_anew() -> None:
    two = [segment(0, 300, 10), segment(300, 200, 10, stage_index=1)]
    with pytest.raises(DataError, match=r"inside rows planned before; only the end of the stage planned last"):
        plan(*two, segment(100, 400, 10))
    with pytest.raises(DataError, match=r"inside rows planned before"):
        plan(*two, segment(200, 300, 10, stage_index=1))
    with pytest.raises(DataError, match=r"inside rows planned before"):
        plan(*two, segment(400, 100, 10, stage_index=1, attempt=1))
    with pytest.raises(DataError, match=r"ends at 450, and the stage it changes at 500"):
        plan(*two, segment(400, 50, 10, stage_index=1))
