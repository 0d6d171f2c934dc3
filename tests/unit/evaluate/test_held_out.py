"""Held-out scoring: every token once, whole documents, the same figures for any number of workers."""

from __future__ import annotations

import itertools
import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_ray.errors import DataError
from nexus_ray.evaluate.held_out import HeldOutSet, choose_documents, evaluate_domains, pack_documents
from nexus_ray.evaluate.scores import DomainScore, scores_from_bytes, scores_to_bytes
from nexus_ray.models.score import IGNORE, decode_rows, token_nll
from tests.tiny import pack_row, random_documents, tiny_model, write_tokens


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(2, 70), min_size=1, max_size=20), seq_len=st.integers(4, 24))
def test_packing_scores_every_token_but_the_first_once(lengths: list[int], seq_len: int) -> None:
    starts = np.cumsum([1, *lengths])
    texts = [np.arange(a, b, dtype=np.int32) for a, b in itertools.pairwise(starts)]
    rows, piece_of, document_of_piece = pack_documents(texts, seq_len)
    targets = decode_rows(rows).targets.numpy()
    assert np.array_equal(targets != IGNORE, piece_of >= 0)
    found: dict[int, list[int]] = {}
    for token, piece in zip(targets[piece_of >= 0], piece_of[piece_of >= 0], strict=True):
        found.setdefault(int(document_of_piece[piece]), []).append(int(token))
    assert {number: sorted(tokens) for number, tokens in found.items()} == {
        number: text[1:].tolist() for number, text in enumerate(texts)
    }
    pieces_of_row = [set(row[row >= 0]) for row in piece_of]
    assert sum(map(len, pieces_of_row)) == len(document_of_piece), "a piece lies in one row"


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40), max_tokens=st.integers(2, 300))
def test_choice_repeats_and_keeps_within_the_budget(lengths: list[int], max_tokens: int) -> None:
    table = np.asarray(lengths, dtype=np.int64)
    chosen = choose_documents(table, max_tokens, 0)
    assert np.array_equal(chosen, choose_documents(table, max_tokens, 0))
    assert len(set(chosen.tolist())) == len(chosen)
    assert (table[chosen] > 1).all()
    assert table[chosen].sum() <= max_tokens or len(chosen) == 1
    if max_tokens >= table.sum():
        assert len(chosen) == (table > 1).sum()


def test_scores_equal_those_of_each_document_alone(tmp_path: Path) -> None:
    documents = random_documents(9, low=2, high=40)
    held_out = HeldOutSet(write_tokens(tmp_path, documents, shards=3), seq_len=48, max_tokens=10_000)
    assert held_out.documents.tolist() == list(range(9))
    model = tiny_model().train()
    score = evaluate_domains(model, {"tiny": held_out}, batch_size=2)["tiny"]
    assert model.training
    for i, document in enumerate(documents):
        with torch.no_grad():
            alone = token_nll(model.eval(), decode_rows(pack_row([document], len(document) - 1))).double().sum()
        assert score.nll_by_document[i] == pytest.approx(float(alone), rel=1e-5)
        assert score.tokens_by_document[i] == len(document) - 1
        assert score.bytes_by_document[i] == 3 * (len(document) - 2)


def test_figures_follow_their_definitions() -> None:
    score = DomainScore(np.asarray([10.0, 30.0]), np.asarray([4, 6]), np.asarray([20, 30]))
    assert (score.nll, score.tokens, score.bytes, score.loss) == (40.0, 10, 50, 4.0)
    assert score.perplexity == pytest.approx(math.exp(4))
    assert score.bits_per_byte == pytest.approx(40 / math.log(2) / 50)
    again = scores_from_bytes(scores_to_bytes({"a-b.c": score, "d": score}))
    assert list(again) == ["a-b.c", "d"]
    assert again["d"].summary() == score.summary()


def _on_ranks(sets: dict[str, HeldOutSet], world_size: int) -> list[dict[str, DomainScore]]:
    """Every rank in a thread of its own, with an all-reduce between them."""
    barrier, totals, lock = threading.Barrier(world_size), [], threading.Lock()
    results: list[dict[str, DomainScore]] = [{}] * world_size
    models = [tiny_model() for _ in range(world_size)]

    def all_reduce(tensor: torch.Tensor) -> None:
        with lock:
            totals.append(tensor.clone())
        barrier.wait(20)
        tensor.copy_(torch.stack(totals).sum(0))

    def work(rank: int) -> None:
        results[rank] = evaluate_domains(
            models[rank], sets, batch_size=2, rank=rank, world_size=world_size, all_reduce=all_reduce
        )

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_workers_gives_the_same_bits(tmp_path: Path, world_size: int) -> None:
    sets = {
        name: HeldOutSet(write_tokens(tmp_path / name, random_documents(count, high=90)), 32, 10_000)
        for name, count in (("many", 11), ("one", 1))
    }
    alone = evaluate_domains(tiny_model(), sets, batch_size=2)
    for scores in _on_ranks(sets, world_size):
        for name, score in scores.items():
            assert np.array_equal(score.nll_by_document, alone[name].nll_by_document)


def test_smaller_budget_scores_the_same_text_the_same(tmp_path: Path) -> None:
    manifest = write_tokens(tmp_path, random_documents(30, high=60))
    large, small = HeldOutSet(manifest, 32, 10_000), HeldOutSet(manifest, 32, 200)
    assert small.documents.tolist() == HeldOutSet(manifest, 32, 200).documents.tolist()
    model = tiny_model()
    everything = evaluate_domains(model, {"t": large}, batch_size=4)["t"]
    some = evaluate_domains(model, {"t": small}, batch_size=4)["t"]
    assert 0 < some.tokens < 200
    np.testing.assert_allclose(some.nll_by_document, everything.nll_by_document[small.documents], rtol=1e-5)


def test_empty_or_broken_held_out_text_is_named(tmp_path: Path) -> None:
    empty = write_tokens(tmp_path / "empty", [np.zeros(1, dtype=np.int32)], domain="bare")
    with pytest.raises(DataError, match=r"domain bare has no held-out document.*domains\.bare\.held_out_fraction"):
        HeldOutSet(empty, 32, 100)
    broken = write_tokens(tmp_path / "broken", random_documents(3), domain="torn")
    (tmp_path / "broken" / "held_out" / "tokens-00000.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"tokens-00000\.parquet, held-out text of domain torn, cannot be read"):
        HeldOutSet(broken, 32, 100)
    (tmp_path / "broken" / "held_out" / "documents-00000.parquet").unlink()
    with pytest.raises(DataError, match=r"documents-00000\.parquet"):
        HeldOutSet(broken, 32, 100)
