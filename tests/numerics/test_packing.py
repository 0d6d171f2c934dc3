"""Packing does not leak: a packed row scores, and teaches, exactly what its documents do one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nexus_ray.models.score import IGNORE, decode_rows, token_nll
from tests.tiny import pack_row, random_documents, tiny_model

SEQ_LEN = 64


def _documents() -> list[np.ndarray]:
    return [document[:n] for document, n in zip(random_documents(4, low=20, high=20), (20, 2, 17, 13), strict=True)]


def _gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return {name: gradient for name, gradient in found.items() if gradient is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_loss_is_the_token_weighted_mean_of_separate_losses(attention: str) -> None:
    model = tiny_model(attention=attention).eval()
    documents = _documents()
    packed = decode_rows(pack_row(documents, SEQ_LEN))
    targets = int((packed.targets != IGNORE).sum())
    (token_nll(model, packed).sum() / targets).backward()
    packed_gradients = _gradients(model)

    with torch.no_grad():
        packed_loss = token_nll(model, packed).sum() / targets
    separate_sum = torch.zeros(())
    for document in documents:
        alone = decode_rows(pack_row([document], len(document) - 1))
        assert int((alone.targets != IGNORE).sum()) == len(document) - 1
        nll = token_nll(model, alone, single_segment=True).sum()
        (nll / targets).backward()
        separate_sum += nll.detach()

    assert targets == sum(len(document) - 1 for document in documents)
    torch.testing.assert_close(packed_loss, separate_sum / targets, rtol=1e-6, atol=1e-6)
    separate_gradients = _gradients(model)
    assert packed_gradients.keys() == separate_gradients.keys()
    for name, gradient in packed_gradients.items():
        torch.testing.assert_close(gradient, separate_gradients[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_document_cannot_see_its_neighbour(attention: str) -> None:
    model = tiny_model(attention=attention).eval()
    first, second, *_ = random_documents(2, low=20, high=20)
    with torch.no_grad():
        before = token_nll(model, decode_rows(pack_row([first, second], SEQ_LEN)))
        changed = np.where(first == 0, first, (first + 7) % 299 + 1).astype(np.int32)
        after = token_nll(model, decode_rows(pack_row([changed, second], SEQ_LEN)))
    assert not torch.equal(before[:, :19], after[:, :19])
    assert torch.equal(before[:, 20:], after[:, 20:])


def test_sdpa_and_eager_agree() -> None:
    packed = decode_rows(pack_row(_documents(), SEQ_LEN))
    with torch.no_grad():
        scores = [token_nll(tiny_model(attention=name).eval(), packed) for name in ("sdpa", "eager")]
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-5)


def test_a_packed_row_scores_the_same_beside_any_other_row() -> None:
    model = tiny_model().eval()
    packed = pack_row(_documents(), SEQ_LEN)
    single = pack_row(random_documents(1, low=SEQ_LEN + 1, high=SEQ_LEN + 1), SEQ_LEN)
    other = pack_row(random_documents(3, seed=5, low=20, high=20), SEQ_LEN)
    with torch.no_grad():
        beside_single = token_nll(model, decode_rows(np.concatenate([packed, single])))
        beside_other = token_nll(model, decode_rows(np.concatenate([packed, other])))
    assert torch.equal(beside_single[0], beside_other[0])


def test_padding_changes_nothing_and_is_finite() -> None:
    model = tiny_model()
    documents = _documents()[:2]
    short = decode_rows(pack_row(documents, 32))
    long = decode_rows(pack_row(documents, 96))
    torch.testing.assert_close(token_nll(model, short), token_nll(model, long)[:, :32], rtol=1e-5, atol=1e-6)
    token_nll(model, long).sum().backward()
    assert all(torch.isfinite(gradient).all() for gradient in _gradients(model).values())
