"""Forgetting and transfer: signs, definitions, what is undefined, and intervals."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nexus_ray.evaluate.scores import DomainScore
from nexus_ray.evaluate.transfer import (
    change_since,
    earlier_domains,
    forgetting,
    learned_at,
    score_document,
    stage_forgetting,
)

DOMAINS = ["a", "b", "c"]
TRAINED = [["a"], ["b"], ["c"]]


def _score(bits_per_byte: float, documents: int = 20, noise: float = 0.1, seed: int = 0) -> DomainScore:
    """Documents of 100 bytes and 25 targets around a mean."""
    around = np.random.default_rng(seed).normal(0, noise, documents)
    around -= around.mean()
    sizes = np.full(documents, 100)
    return DomainScore((bits_per_byte + around) * 100 * math.log(2), sizes // 4, sizes)


def _rows(table: list[list[float | None]]) -> list[dict[str, DomainScore]]:
    return [{d: _score(v, seed=j) for j, (d, v) in enumerate(zip(DOMAINS, row, strict=True)) if v} for row in table]


def _document(table: list[list[float | None]], **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "domains": DOMAINS,
        "stages": ["base", "first", "second", "third"][: len(table)],
        "trained_by_stage": TRAINED,
        "scores_by_stage": _rows(table),
        "samples": 200,
    }
    return score_document(**{**arguments, **changes})


TABLE: list[list[float | None]] = [[8.0, 8.0, 8.0], [2.0, 6.0, 7.0], [2.5, 2.2, 6.5], [2.4, 3.0, 1.5]]


def test_worked_example() -> None:
    document = _document(TABLE, from_scratch={"b": _score(2.5, seed=1), "c": _score(1.4, seed=2)})
    assert document["forgetting"]["per_domain"] == pytest.approx({"a": 0.4, "b": 0.8})
    assert document["forgetting"]["mean"] == pytest.approx(0.6)
    assert document["forgetting"]["max"] == pytest.approx(0.8)
    assert document["backward_transfer"] == pytest.approx(-0.6)
    assert document["forward_transfer"] == pytest.approx({"b": 0.3, "c": -0.1})
    assert np.allclose(document["bits_per_byte"], np.asarray(TABLE, dtype=float))
    assert np.allclose(document["perplexity"], np.exp(np.asarray(document["loss"])))


_matrices = arrays(np.float64, (4, 3), elements=st.floats(-10, 0, width=32))


@settings(deadline=None)
@given(_matrices, st.floats(-5, 5), st.integers(1, 3))
def test_a_constant_changes_nothing(scores: np.ndarray, constant: float, row: int) -> None:
    np.testing.assert_allclose(forgetting(scores + constant, row), forgetting(scores, row), atol=1e-9)
    since = [1, 0, 1]
    np.testing.assert_allclose(change_since(scores + constant, row, since), change_since(scores, row, since), atol=1e-9)


@settings(deadline=None)
@given(_matrices)
def test_nothing_is_forgotten_where_scores_only_improve(scores: np.ndarray) -> None:
    rising = np.sort(scores, axis=0)
    assert (forgetting(rising, 3) <= 0).all()
    assert (change_since(rising, 3, [1, 1, 2]) >= 0).all()
    np.testing.assert_array_equal(forgetting(rising, 3), rising[2] - rising[3])


@settings(deadline=None)
@given(_matrices)
def test_forgetting_is_at_least_the_loss_since_any_stage(scores: np.ndarray) -> None:
    for since in range(3):
        assert (forgetting(scores, 3) >= -change_since(scores, 3, [since] * 3)).all()


def test_leading_dimensions_are_independent() -> None:
    scores = np.random.default_rng(0).normal(size=(5, 4, 3))
    together = forgetting(scores, 3)
    assert all(np.array_equal(together[i], forgetting(scores[i], 3)) for i in range(5))


def test_undefined_figures_are_null_and_the_document_is_json() -> None:
    base_only = _document(TABLE[:1])
    assert base_only["forgetting"] == {"per_domain": {}, "mean": None, "max": None, "anchors": {}}
    assert base_only["backward_transfer"] is None
    assert base_only["forward_transfer"] == {}
    one_stage = _document(TABLE[:2])
    assert one_stage["forgetting"]["per_domain"] == {}
    gaps = _document([[8.0, None, None], [2.0, None, None], [None, 2.2, None]])
    assert gaps["bits_per_byte"][0][1] is None
    assert gaps["forgetting"]["per_domain"] == {"a": None}
    assert gaps["forgetting"]["mean"] is None
    for document in (base_only, one_stage, gaps):
        assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_earlier_domains_replay_only_domains_and_anchors() -> None:
    assert learned_at(DOMAINS, [["b"], ["b", "a"]]) == [2, 1, None]
    assert earlier_domains(DOMAINS, TRAINED, 2) == ["a"]
    assert earlier_domains(DOMAINS, [["b"], ["c"]], 1) == ["a"], "only ever replayed: known before the run"
    assert earlier_domains(DOMAINS, [["b"], ["c"]], 1, anchors=["a"]) == []
    document = _document(TABLE[:3], trained_by_stage=[["b"], ["c"]], anchors=["a"])
    assert document["forgetting"]["per_domain"] == pytest.approx({"b": 2.2 - 6.0})
    assert document["forgetting"]["anchors"] == pytest.approx({"a": 0.5})
    gate = stage_forgetting(
        domains=DOMAINS, trained_by_stage=[["b"], ["c"]], scores_by_stage=_rows(TABLE[:3]), anchors=["a"]
    )
    assert gate == pytest.approx({"b": 2.2 - 6.0, "a": 0.5})
    assert stage_forgetting(domains=DOMAINS, trained_by_stage=TRAINED, scores_by_stage=_rows(TABLE[:1])) == {}


def test_replay_only_domain_transfers_backward_from_the_base() -> None:
    document = _document(TABLE[:2], trained_by_stage=[["b"], ["c"]], anchors=["c"])
    assert document["backward_transfer"] == pytest.approx(8.0 - 2.0)


def test_intervals_are_paired_and_repeat() -> None:
    document = _document(TABLE)
    assert document == _document(TABLE)
    assert document["intervals"] != _document(TABLE, seed=1)["intervals"]
    low, high = document["intervals"]["bits_per_byte"][1][0]
    assert low < 2.0 < high
    assert high - low > 0.02
    # The same noise in all stages cancels in their difference.
    low, high = document["intervals"]["forgetting"]["per_domain"]["a"]
    assert low == pytest.approx(0.4) == high
    assert document["intervals"]["forgetting"]["mean"] == pytest.approx([0.6, 0.6])
    assert document["intervals"]["forgetting"]["max"] == pytest.approx([0.8, 0.8])
    assert document["intervals"]["backward_transfer"] == pytest.approx([-0.6, -0.6])


def test_interval_covers_the_sampling_error_of_the_mean() -> None:
    rows = [{"a": _score(3.0, documents=400, noise=0.5)}]
    document = score_document(domains=["a"], stages=["base"], trained_by_stage=[], scores_by_stage=rows, samples=2000)
    low, high = document["intervals"]["bits_per_byte"][0][0]
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(400), rel=0.15)


def test_a_single_document_has_no_interval() -> None:
    rows = [{"a": _score(3.0, documents=1), "b": _score(4.0)} for _ in range(3)]
    document = score_document(
        domains=["a", "b"],
        stages=["base", "x", "y"],
        trained_by_stage=[["a"], ["b"]],
        scores_by_stage=rows,
        samples=100,
    )
    assert document["intervals"]["bits_per_byte"][0][0] is None
    assert document["intervals"]["bits_per_byte"][0][1] is not None
    assert document["intervals"]["forgetting"] == {"per_domain": {"a": None}, "mean": None, "max": None, "anchors": {}}


def test_domain_order_and_other_domains_leave_intervals_alone() -> None:
    document = _document(TABLE)
    turned = _document([row[::-1] for row in TABLE], domains=DOMAINS[::-1], scores_by_stage=_rows(TABLE))
    for domain in ("a", "b"):
        pair, other = (d["intervals"]["forgetting"]["per_domain"][domain] for d in (document, turned))
        assert pair == pytest.approx(other)


def test_different_documents_are_refused() -> None:
    rows = [{"a": _score(3.0, documents=5)}, {"a": _score(3.0, documents=6)}]
    with pytest.raises(ValueError, match="different documents"):
        score_document(domains=["a"], stages=["base", "x"], trained_by_stage=[["a"]], scores_by_stage=rows)
    with pytest.raises(ValueError, match="do not fit together"):
        score_document(domains=["a"], stages=["base", "x"], trained_by_stage=[], scores_by_stage=rows)
