"""Stored predictions: the divergence is what it says, and a row is found by its number among the replayed ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nexus_ray.errors import DataError
from nexus_ray.models.score import IGNORE, decode_rows
from nexus_ray.storage import Storage
from nexus_ray.stream.curriculum import stage_segments
from nexus_ray.stream.plan import Plan
from nexus_ray.stream.rows import StageStream
from nexus_ray.train.agree import WorkerContext
from nexus_ray.train.teacher import (
    Teacher,
    TeacherInfo,
    kl_to_stored,
    replayed_before,
    replayed_rows,
    stored_rows,
    top_log_probs,
    write_teacher,
)
from tests.stage import STEPS, tiny_config, tiny_manifests

B, S, V = 2, 5, 40


def logits(seed: int) -> torch.Tensor:
    return 3.0 * torch.randn(B, S, V, generator=torch.Generator().manual_seed(seed))


TARGETS = torch.zeros(B, S, dtype=torch.long)


def full_kl(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1)


def test_with_the_whole_vocabulary_it_is_the_kl() -> None:
    found = kl_to_stored(logits(1), *top_log_probs(logits(0), V), TARGETS)
    torch.testing.assert_close(found, full_kl(logits(0), logits(1)), rtol=2e-3, atol=2e-3)  # stored in float16


@pytest.mark.parametrize("k", [1, 4, 16])
def test_with_fewer_it_is_a_lower_bound_and_zero_for_the_same_model(k: int) -> None:
    stored = top_log_probs(logits(0), k)
    assert (kl_to_stored(logits(1), *stored, TARGETS) <= full_kl(logits(0), logits(1)) + 2e-3).all()
    assert kl_to_stored(logits(0), *stored, TARGETS).abs().max() < 1e-3


def test_columns_without_target_count_nothing_and_gradients_are_finite() -> None:
    student = (20.0 * logits(1)).requires_grad_()  # nearly all mass on one token: nothing is left for the rest
    targets = TARGETS.clone()
    targets[:, 2:] = IGNORE
    found = kl_to_stored(student, *top_log_probs(20.0 * logits(0), 4), targets)
    assert (found[:, 2:] == 0).all() and (found[:, :2] > 0).all()
    found.sum().backward()
    assert student.grad is not None and torch.isfinite(student.grad).all()
    assert (student.grad[:, 2:] == 0).all()


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> StageStream:
    """The second stage of two: a quarter of its rows replay the first domain."""
    root = tmp_path_factory.mktemp("teacher")
    config, manifests = tiny_config(root, stages=2), tiny_manifests(root)
    plan = Plan(config.seed, config.training.seq_len, config.data.shuffle_window_rows)
    for index in range(2):
        plan = plan.append(stage_segments(config, index, manifests, start_row=plan.rows))
    first, _ = plan.stage_rows(1, 0)
    return StageStream(plan, manifests, first, config.training.rows_per_step, STEPS)


def test_numbers_of_replayed_rows_follow_the_plan(stream: StageStream) -> None:
    flags = np.concatenate([stream.sequences(step, 1).replayed for step in range(STEPS)])
    assert replayed_rows(stream) == flags.sum() == STEPS * stream.rows_per_step // 4
    counted = [replayed_before(stream, stream.first_row + i) for i in range(len(flags))]
    assert counted == [int(flags[:i].sum()) for i in range(len(flags))]
    everything = np.concatenate(list(stored_rows(stream, 0, replayed_rows(stream), batch=5)))
    parts = [np.concatenate(list(stored_rows(stream, a, b, batch=3))) for a, b in ((0, 7), (7, replayed_rows(stream)))]
    assert np.array_equal(everything, np.concatenate(parts))


class Parrot(torch.nn.Module):
    """Says of every column that the token it reads comes next, more surely the larger the token."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.dtype = torch.float32
        self.config = type("Config", (), {"_attn_implementation": "sdpa"})()

    def forward(self, input_ids: torch.Tensor, **other: object) -> object:
        logits = F.one_hot(input_ids, self.vocab_size).float() * (1.0 + input_ids[..., None] / 50.0)
        return type("Output", (), {"logits": logits})()


def test_what_is_stored_is_read_back_for_the_row_it_belongs_to(stream: StageStream, tmp_path: Path) -> None:
    folder, rows = Storage(str(tmp_path / "teacher")), replayed_rows(stream)
    info = TeacherInfo(rows=rows, parts=1, top_k=3, seq_len=32, first_row=stream.first_row, run="abc")
    with pytest.raises(DataError, match=r"continual\.keep\.kl needs the stored predictions"):
        Teacher.open(folder, info, stream)
    model = Parrot(256)
    write_teacher(model, stream, folder, info, WorkerContext(0, 1, torch.device("cpu")), batch_rows=4)
    teacher = Teacher.open(folder, info, stream)
    for step in range(STEPS):
        rows_of_step = stream.part(step, 1, rank=0, rows_per_rank=stream.rows_per_step)
        decoded = decode_rows(rows_of_step.tokens)
        same = teacher.divergence(model(decoded.input_ids).logits, decoded.targets, rows_of_step)  # type: ignore[attr-defined]
        assert same.abs().max() < 1e-2
        other = teacher.divergence(torch.zeros(*decoded.targets.shape, 256), decoded.targets, rows_of_step)
        told = (other.sum(dim=1) > 0).numpy()
        assert np.array_equal(told, rows_of_step.replayed)
    with pytest.raises(DataError, match="have run=abc, this stage needs other"):
        Teacher.open(folder, TeacherInfo(rows, 1, 3, 32, stream.first_row, "other"), stream)
