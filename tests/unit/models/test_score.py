"""The wire format, and how rows are presented to a model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_ray.corpora.reader import PAD
from nexus_ray.models.score import IGNORE, attention_inputs, decode_rows, segment_mask, token_nll
from tests.tiny import pack_row, random_documents, tiny_model


def _decode_slowly(row: list[int]) -> list[tuple[int, int, int, int]]:
    """(input, target, position, segment) of each column, by the book."""
    result: list[tuple[int, int, int, int]] = []
    position, segment, after_pad = 0, -1, False
    for column, value in enumerate(row[:-1]):
        if value == PAD:
            result.append((0, IGNORE, 0, -1))
            after_pad = True
            continue
        begins = column == 0 or value < 0 or after_pad
        position, segment = (0, segment + 1) if begins else (position + 1, segment)
        following = row[column + 1]
        result.append((value if value >= 0 else ~value, following if following >= 0 else IGNORE, position, segment))
        after_pad = False
    return result


_values = st.one_of(st.integers(0, 299), st.integers(0, 299).map(lambda t: ~t), st.just(int(PAD)))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(_values, min_size=9, max_size=9), min_size=1, max_size=4))
def test_decoding_follows_the_definition(rows: list[list[int]]) -> None:
    decoded = decode_rows(np.asarray(rows, dtype=np.int32))
    for i, row in enumerate(rows):
        parts = (decoded.input_ids, decoded.targets, decoded.position_ids, decoded.segment_ids)
        assert list(zip(*(part[i].tolist() for part in parts), strict=True)) == _decode_slowly(row)


def test_mask_is_causal_inside_segments_and_padding_sees_itself() -> None:
    rows = decode_rows(np.asarray([[~5, 6, ~7, 8, PAD, PAD, PAD]], dtype=np.int32))
    expected = torch.tensor(
        [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [0, 0, 1, 0, 0, 0],
            [0, 0, 1, 1, 0, 0],
            [0, 0, 0, 0, 1, 0],
            [0, 0, 0, 0, 0, 1],
        ]
    ).bool()
    assert torch.equal(segment_mask(rows.position_ids)[0, 0], expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_mask_reaches_every_layer_unchanged(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(attention=attention)
    seen = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda _module, _args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
        )
    rows = decode_rows(pack_row(random_documents(2, low=5, high=9), 24))
    inputs = attention_inputs(rows, attention, torch.float32)
    model(**inputs, use_cache=False)
    assert len(seen) == 2
    assert all(torch.equal(mask, inputs["attention_mask"]) for mask in seen)


def test_bfloat16_mask_has_the_models_precision() -> None:
    model = tiny_model().bfloat16()
    nll = token_nll(model, decode_rows(pack_row(random_documents(2, low=5, high=9), 24)))
    assert nll.dtype == torch.float32
    assert torch.isfinite(nll).all()


def test_flash_attention_gets_one_flat_sequence() -> None:
    rows = decode_rows(np.concatenate([pack_row(random_documents(2, seed=s, low=5, high=9), 24) for s in (1, 2)]))
    inputs = attention_inputs(rows, "flash_attention_2", torch.bfloat16)
    assert inputs.keys() == {"input_ids", "position_ids"}
    assert all(value.shape == (1, 48) for value in inputs.values())
    assert inputs["position_ids"][0, 24] == 0


def test_single_segment_rows_use_the_built_in_causal_mask() -> None:
    model = tiny_model()
    rows = decode_rows(pack_row(random_documents(1, low=25, high=25), 24))
    assert attention_inputs(rows, single_segment=True).keys() == {"input_ids"}
    with torch.no_grad():
        masked, causal = token_nll(model, rows), token_nll(model, rows, single_segment=True)
    torch.testing.assert_close(masked, causal, rtol=1e-5, atol=1e-5)


def test_nll_is_zero_where_nothing_is_predicted() -> None:
    rows = decode_rows(pack_row(random_documents(3, low=4, high=6), 24))
    nll = token_nll(tiny_model(), rows)
    assert torch.equal(nll > 0, rows.targets != IGNORE)
