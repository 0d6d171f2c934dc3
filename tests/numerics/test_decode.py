"""Continuous batching writes what one sequence at a time would."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from nexus_ray.errors import ConfigError
from nexus_ray.models import decode
from nexus_ray.models.decode import SHARED_TOKENS, Decoder, Job, choose, uniforms
from tests.expandable import expandable

NAMES = ["llama", "qwen2-tied", "olmo2"]


def alone(model: torch.nn.Module, job: Job, end_tokens: Sequence[int] = ()) -> list[int]:
    """The job's tokens by whole forward passes, without any cache."""
    tokens: list[int] = []
    uniform = uniforms(job.key, job.max_tokens)
    while len(tokens) < job.max_tokens:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([[*job.prompt, *tokens]]), use_cache=False).logits[:, -1]
        number = float(uniform[len(tokens)])
        [token] = choose(logits, temperature=[job.temperature], top_p=[job.top_p], uniform=[number])
        if token in end_tokens:
            break
        tokens.append(token)
    return tokens


def some_jobs(count: int, *, vocab: int, temperature: float, longest: int = 40) -> list[Job]:
    """Prompts and answers of many lengths."""
    chosen = np.random.default_rng(count)
    return [
        Job(
            f"job {i}",
            chosen.integers(1, vocab, chosen.integers(1, 12)).tolist(),
            int(chosen.integers(1, longest)),
            temperature,
            0.9,
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_every_sequence_is_what_it_would_be_alone(name: str, temperature: float) -> None:
    model = expandable(name, dtype=torch.float64).eval()
    vocab = model.config.vocab_size
    jobs = some_jobs(13, vocab=vocab, temperature=temperature)
    decoder = Decoder(model, slots=4, end_tokens=[3, 5])
    written = {one.key: one for one in decoder.run(iter(jobs))}
    assert len(written) == len(jobs)
    for job in jobs:
        expected = alone(model, job, [3, 5])
        assert written[job.key].tokens == expected
        assert written[job.key].ended == (len(expected) < job.max_tokens)
    assert decoder.steps < sum(len(one.tokens) for one in written.values())


@pytest.mark.parametrize("name", NAMES)
def test_what_prompts_have_in_common_is_read_once_and_changes_nothing(name: str) -> None:
    model = expandable(name, dtype=torch.float64).eval()
    begins = [list(range(first, first + SHARED_TOKENS + 1)) for first in (1, 30)]
    jobs = [Job(f"same {i}", [*begins[0], 7], 9) for i in range(3)]  # several answers to one prompt
    jobs += [Job(f"common {i}", [*begins[0], *range(2, 3 + i)], 9) for i in range(4)]  # and others that begin alike
    jobs += [Job("the beginning itself", begins[0], 9), Job("another", [*begins[1], 3], 9)]
    read: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, inputs: read.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    written = {one.key: one.tokens for one in Decoder(model, slots=len(jobs) - 1, end_tokens=[]).run(iter(jobs))}
    assert read[:2] == [SHARED_TOKENS, 6 * 5]  # then six distinct prompts, up to five tokens each behind the beginning
    for job in jobs:
        assert written[job.key] == alone(model, job), job.key


def test_many_prompts_are_read_in_passes_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model = expandable("llama", dtype=torch.float64).eval()
    monkeypatch.setattr(decode, "READ_TOKENS", 20)
    jobs = some_jobs(9, vocab=model.config.vocab_size, temperature=0.0)
    sizes: list[tuple[int, ...]] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, inputs: sizes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    written = {one.key: one.tokens for one in Decoder(model, slots=9, end_tokens=[]).run(iter(jobs))}
    hook.remove()
    assert max(rows * columns for rows, columns in sizes) <= 20
    assert sum(columns > 1 for _, columns in sizes) > 2
    assert written == {job.key: alone(model, job) for job in jobs}


def test_a_model_that_keeps_its_attention_to_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = expandable("llama").eval()
    decoder = Decoder(model, slots=2, end_tokens=[])
    model.set_attn_implementation("sdpa")  # as a model would that does not ask for the function by its name
    with pytest.raises((ConfigError, TypeError), match=r"continuous batching cannot write|cohorts"):
        list(decoder.run([Job("one", [1, 2], 5)]))


def test_long_sequences_grow_their_buffers_and_late_prompts_may_be_longer_than_all_before() -> None:
    model = expandable("llama", dtype=torch.float64, max_position_embeddings=1024).eval()
    jobs = [Job("first", [7], 400, 0.0), *(Job(f"short {i}", [i + 1], 20, 0.0) for i in range(6))]
    jobs += [Job("long prompt", list(range(1, 60)) * 5, 30, 0.0), Job("last", [9, 9], 290, 0.0)]
    written = {one.key: one.tokens for one in Decoder(model, slots=2, end_tokens=[]).run(jobs)}
    for job in jobs:
        assert written[job.key] == alone(model, job), job.key


def test_a_stop_ends_a_sequence_where_it_says() -> None:
    model = expandable("llama", dtype=torch.float64).eval()
    job = Job("stopped", [1, 2], 30, 1.0, is_stop=lambda tokens: len(tokens) == 7)
    [written] = Decoder(model, slots=1, end_tokens=[]).run([job])
    assert written.ended and len(written.tokens) == 7


def test_nothing_to_do_and_nothing_to_read() -> None:
    decoder = Decoder(expandable("llama"), slots=2, end_tokens=[])
    assert list(decoder.run([])) == []
    with pytest.raises(ConfigError, match="empty prompt"):
        list(decoder.run([Job("empty", [], 3)]))


def test_models_with_windows_are_refused() -> None:
    with pytest.raises(ConfigError, match="continuous batching"):
        Decoder(expandable("smollm3-sliding"), slots=2, end_tokens=[])


@pytest.mark.parametrize("vocab", [50, 2000])
def test_the_nucleus_has_the_right_size_and_shares(vocab: int) -> None:
    """Counts of 20,000 draws against the truncated distribution, also where 256 candidates are too few."""
    torch.manual_seed(0)
    logits = torch.randn(1, vocab) * (3.0 if vocab == 50 else 0.3)
    probability = (logits[0] / 0.7).double().softmax(0)
    order = probability.argsort(descending=True)
    kept = int((probability[order].cumsum(0) < 0.8).sum()) + 1
    truth = torch.zeros(vocab, dtype=torch.float64)
    truth[order[:kept]] = probability[order[:kept]] / probability[order[:kept]].sum()
    draws = 20_000
    rows = logits.expand(draws, vocab) if vocab == 50 else logits.expand(400, vocab)
    uniform = ((np.arange(len(rows)) + 0.5) / len(rows)).tolist()
    found = choose(rows, temperature=[0.7] * len(rows), top_p=[0.8] * len(rows), uniform=uniform)
    counts = torch.bincount(torch.tensor(found), minlength=vocab) / len(rows)
    assert float((counts - truth).abs().max()) < 1.5 / len(rows) + 1e-6
    assert set(found) <= set(order[:kept].tolist())


def test_random_numbers_belong_to_the_key() -> None:
    assert np.array_equal(uniforms("a", 5), uniforms("a", 9)[:5]) and not np.array_equal(
        uniforms("a", 5), uniforms("b", 5)
    )
