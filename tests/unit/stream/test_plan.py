"""`sequence(i)` is a pure function of (seed, plan, position): counters go on, samples are nested, growth is safe."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_ray.errors import DataError
from nexus_ray.stream.plan import Plan, Segment, Source, parse_plan

OLD, NEW = Source("f-old", 1, 500), Source("f-new", 1, 700)


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
