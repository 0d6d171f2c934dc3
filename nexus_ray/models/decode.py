"""Continuous batching: many sequences are written at once, and one that ends makes room for the next at once.

A step is one forward pass over the last tokens of all sequences. Only attention tells them apart: sequences whose
prompts were read together form a cohort, with keys and values of its own, as long as its own longest sequence; so a
new sequence does not attend over as many columns as the oldest one has. What prompts have in common is read once.

Invariant: a sequence's tokens follow from its prompt, its settings and its key alone, but for rounding: kernels may add
in another order when other sequences share the batch.

Legend: N sequences, n those of a cohort, T columns, V vocabulary, K candidates.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nexus_ray.errors import ConfigError

ATTENTION = "nexus_cohorts"
"""Name of `attend` among the attention functions of `transformers`."""
CANDIDATES = (256, 4096)
"""Most probable tokens looked at first, and then; only where these hold less than `top_p` is the whole vocabulary
sorted, which takes as long as a tenth of a forward pass of a small model."""
GROWTH = 128
"""Columns that a cohort's buffers gain at a time."""
READ_TOKENS = 8192
"""Prompt tokens read in one pass, so that memory does not grow with the number of slots."""
REFILL_SHARE = 8
"""Prompts are read in groups, when so many slots (one in ...) are free: a lone one would leave the others waiting."""
SHARED_TOKENS = 16
"""A beginning that prompts of a group have in common is read by itself if it is as long as this."""


@dataclass(frozen=True)
class Job:
    """One sequence to write."""

    key: str
    """Names it, and seeds its random numbers."""
    prompt: Sequence[int]
    max_tokens: int
    temperature: float = 1.0
    """0 takes the most probable token."""
    top_p: float = 1.0
    is_stop: Callable[[list[int]], bool] | None = None
    """Asked after every token whether the tokens written so far end the text."""


@dataclass(frozen=True)
class Written:
    """What became of a job."""

    key: str
    tokens: list[int]
    """Without the end token."""
    ended: bool
    """By an end token or a stop, and not at `max_tokens`."""


@dataclass
class _Sequence:
    job: Job
    uniform: np.ndarray
    tokens: list[int] = field(default_factory=list)


class Cohort:
    """Sequences whose prompts were read together; row i of every buffer is sequence i's."""

    def __init__(self, jobs: Sequence[Job], keys: list[Tensor], values: list[Tensor], seen: Tensor) -> None:
        """`keys`, `values`: by layer, [n, heads, T, dim], of the prompts; `seen` [n, T]: False where a row has none."""
        self.sequences = [_Sequence(job, uniforms(job.key, job.max_tokens)) for job in jobs]
        self.end = seen.shape[1]
        self._keys, self._values, self._seen = keys, values, seen
        self.bias = torch.empty(0)
        self.reached: set[int] = set()
        """Layers that have stored the present column."""

    def open_column(self) -> None:
        """Room for one more token of every sequence; `bias` [n, 1, 1, T] is what a step adds to attention's scores."""
        if self.end == self._seen.shape[1]:
            self._keys, self._values = list(map(self._grown, self._keys)), list(map(self._grown, self._values))
            fresh = self._seen.new_ones(len(self.sequences), GROWTH)
            self._seen = torch.cat([self._seen[: len(self.sequences)], fresh], dim=1)
        self.end += 1
        self.reached.clear()
        seen = self._seen[: len(self.sequences), None, None, : self.end]
        self.bias = torch.zeros_like(seen, dtype=self._keys[0].dtype).masked_fill_(~seen, float("-inf"))

    def store(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put the new tokens' [n, heads, 1, dim] into the present column; all columns so far, [n, heads, T, dim]."""
        count = len(self.sequences)
        own_keys, own_values = self._keys[layer][:count, :, : self.end], self._values[layer][:count, :, : self.end]
        own_keys[:, :, -1:], own_values[:, :, -1:] = keys, values
        self.reached.add(layer)
        return own_keys, own_values

    def drop(self, row: int) -> None:
        """Forget a sequence; the last one takes its row."""
        last = len(self.sequences) - 1
        if row != last:
            for buffer in (*self._keys, *self._values):
                buffer[row, :, : self.end] = buffer[last, :, : self.end]
            self._seen[row] = self._seen[last]
            self.sequences[row] = self.sequences[last]
        self.sequences.pop()

    def _grown(self, buffer: Tensor) -> Tensor:
        _, heads, columns, dim = buffer.shape
        grown = buffer.new_zeros(len(self.sequences), heads, columns + GROWTH, dim)
        grown[:, :, :columns] = buffer[: len(self.sequences)]
        return grown


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cohorts: Sequence[Cohort] | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """`transformers`' own SDPA attention; with `cohorts`, that of each one's rows over what it has stored.

    `query` [N, heads, 1, dim] with rows in the cohorts' order; the result is [N, 1, heads, dim].
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if cohorts is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    parts, first = [], 0
    for cohort in cohorts:
        rows = slice(first, first := first + len(cohort.sequences))
        stored = cohort.store(module.layer_idx, key[rows], value[rows])
        parts.append(sdpa_attention_forward(module, query[rows], *stored, cohort.bias, **settings)[0])
    return torch.cat(parts), None


class Decoder:
    """A causal LM that writes many sequences; `run` may be called again and again, not twice at once.

    The model's attention becomes `attend`, which is its SDPA for everybody else.
    """

    def __init__(self, model: Any, *, slots: int, end_tokens: Iterable[int]) -> None:
        """`slots`: sequences written at once.

        Raises:
            ConfigError: the model's layers do not fit.
        """
        check_decodable(model)
        _use_cohorts(model)
        self.model = model.eval()
        self.slots = slots
        self.end_tokens = frozenset(end_tokens)
        self.device = model.get_input_embeddings().weight.device
        self.layers = set(range(model.config.get_text_config().num_hidden_layers))
        self.steps = 0
        """Forward passes of all calls so far, those that read prompts included."""

    @torch.inference_mode()
    def run(self, jobs: Iterable[Job]) -> Iterator[Written]:
        """Sequences in the order in which they end. Jobs are drawn as slots become free.

        Raises:
            ConfigError: a prompt is empty.
        """
        source, waiting = iter(jobs), deque[Job]()
        self.cohorts: list[Cohort] = []
        more = True
        while True:
            while more and len(waiting) < self.slots:
                drawn = next(source, None)
                more = drawn is not None
                if drawn is not None:
                    waiting.append(drawn)
            free = self.slots - sum(len(cohort.sequences) for cohort in self.cohorts)
            if waiting and (free >= max(1, self.slots // REFILL_SHARE) or not self.cohorts):
                while waiting and free:
                    group = _group(waiting, free)
                    free -= len(group)
                    yield from self._read(group)
            elif not self.cohorts:
                return
            else:
                yield from self._step()

    # --- prompts ------------------------------------------------------------------------------------------------

    def _read(self, group: Sequence[Job]) -> Iterator[Written]:
        """Read prompts side by side as a new cohort, each distinct one once, and write their first tokens."""
        from transformers import DynamicCache

        prompts = list(dict.fromkeys(tuple(job.prompt) for job in group))
        if () in prompts:
            raise ConfigError("an empty prompt gives a model nothing to continue; begin it with one token at least")
        common = _common(prompts)
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        seen = torch.zeros(len(prompts), longest, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            rest = longest - len(prompt) + common  # the gap lies behind the common beginning
            ids[row, :common], seen[row, :common] = torch.tensor(prompt[:common]), True
            ids[row, rest:], seen[row, rest:] = torch.tensor(prompt[common:]), True
        ids, seen = ids.to(self.device), seen.to(self.device)
        positions = (seen.cumsum(1) - 1).clamp(min=0)
        read = DynamicCache()
        if common:
            self._forward(ids[:1, :common], position_ids=positions[:1, :common], past_key_values=read)
            read.batch_repeat_interleave(len(prompts))
        logits = self._forward(
            ids[:, common:],
            position_ids=positions[:, common:],
            attention_mask=seen.long(),
            past_key_values=read,
        )
        order = {prompt: row for row, prompt in enumerate(prompts)}
        rows = torch.tensor([order[tuple(job.prompt)] for job in group], device=self.device)
        keys, values = [layer.keys[rows] for layer in read.layers], [layer.values[rows] for layer in read.layers]
        self.cohorts.append(Cohort(group, keys, values, seen[rows]))
        yield from self._take(self.cohorts[-1:], logits[rows])

    # --- steps --------------------------------------------------------------------------------------------------

    def _step(self) -> Iterator[Written]:
        """One more token of every sequence."""
        for cohort in self.cohorts:
            cohort.open_column()
        sequences = [sequence for cohort in self.cohorts for sequence in cohort.sequences]
        ids = torch.tensor([[sequence.tokens[-1]] for sequence in sequences], device=self.device)
        places = [[len(sequence.job.prompt) + len(sequence.tokens) - 1] for sequence in sequences]
        logits = self._forward(ids, position_ids=torch.tensor(places, device=self.device), cohorts=self.cohorts)
        if any(cohort.reached != self.layers for cohort in self.cohorts):
            raise ConfigError(
                f"model {self.model.config.model_type}: its layers do not hand their attention on, so continuous "
                "batching cannot write with it; serve it with vLLM or another server and use kind: openai"
            )
        yield from self._take(self.cohorts, logits)

    def _forward(self, ids: Tensor, **inputs: Any) -> Tensor:
        """Logits [N, V] behind the last column of `ids` [N, columns]."""
        self.steps += 1
        cached = inputs.get("past_key_values") is not None
        logits: Tensor = self.model(input_ids=ids, use_cache=cached, logits_to_keep=1, **inputs).logits[:, -1]
        return logits

    def _take(self, cohorts: Sequence[Cohort], logits: Tensor) -> Iterator[Written]:
        """Choose the next token of the sequences of `cohorts` from `logits` [N, V]; those that end leave."""
        sequences = [sequence for cohort in cohorts for sequence in cohort.sequences]
        chosen = choose(
            logits,
            temperature=[sequence.job.temperature for sequence in sequences],
            top_p=[sequence.job.top_p for sequence in sequences],
            uniform=[float(sequence.uniform[len(sequence.tokens)]) for sequence in sequences],
        )
        firsts = accumulate([len(cohort.sequences) for cohort in cohorts], initial=0)
        for cohort, first in zip(list(cohorts), list(firsts)[:-1], strict=True):
            for row in reversed(range(len(cohort.sequences))):  # a row that takes another's place has had its turn
                sequence, token = cohort.sequences[row], chosen[first + row]
                ended = token in self.end_tokens
                if not ended:
                    sequence.tokens.append(token)
                    ended = sequence.job.is_stop is not None and sequence.job.is_stop(sequence.tokens)
                if ended or len(sequence.tokens) == sequence.job.max_tokens:
                    cohort.drop(row)
                    yield Written(sequence.job.key, sequence.tokens, ended)
        self.cohorts = [cohort for cohort in self.cohorts if cohort.sequences]


def _group(waiting: deque[Job], most: int) -> list[Job]:
    """The next jobs to read in one pass: at most `most`, and `READ_TOKENS` with their padding, but one at least."""
    group, longest = [waiting.popleft()], 0
    while waiting and len(group) < most:
        longest = max(longest, len(group[-1].prompt), len(waiting[0].prompt))
        if longest * (len(group) + 1) > READ_TOKENS:
            break
        group.append(waiting.popleft())
    return group


def _common(prompts: Sequence[tuple[int, ...]]) -> int:
    """Tokens that all prompts begin with, the last one of each left out; 0 if reading them apart would not pay."""
    first, last = min(prompts)[:-1], max(prompts)[:-1]  # those between begin as these two do
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return length if len(prompts) > 1 and length >= SHARED_TOKENS else 0


def _use_cohorts(model: Any) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)


def uniforms(key: str, count: int) -> np.ndarray:
    """`count` numbers in [0, 1), a function of the key alone; more of them begin with the same ones."""
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=16).digest(), "big")
    return np.random.Generator(np.random.Philox(key=seed)).random(count)


def choose(
    logits: Tensor, *, temperature: Sequence[float], top_p: Sequence[float], uniform: Sequence[float]
) -> list[int]:
    """One token per row of `logits` [n, V], by nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751).

    The nucleus is the smallest set of most probable tokens that holds `top_p`; of it, the token is taken at which the
    cumulated probability passes `uniform`. Temperature 0 takes the most probable one.
    """
    heat = torch.tensor([value or 1.0 for value in temperature], device=logits.device)[:, None]
    scaled = logits.float() / heat
    total = scaled.logsumexp(dim=1, keepdim=True)
    limit = torch.tensor(top_p, dtype=torch.float64, device=logits.device)[:, None]
    drawn = torch.tensor(uniform, dtype=torch.float64, device=logits.device)[:, None]
    tokens = scaled.argmax(dim=1) if not all(temperature) else scaled.new_zeros(len(scaled), dtype=torch.long)
    rows = torch.tensor([row for row, hot in enumerate(temperature) if hot], dtype=torch.long, device=logits.device)
    for count in (*CANDIDATES, scaled.shape[1]):
        if not len(rows):
            break
        best, order = scaled[rows].topk(min(count, scaled.shape[1]), dim=1)
        share = (best - total[rows]).exp().double().cumsum(dim=1)
        wide = share[:, -1] >= limit[rows, 0] if count < scaled.shape[1] else torch.ones_like(rows, dtype=torch.bool)
        places = _nucleus(share[wide], limit[rows[wide]], drawn[rows[wide]])
        tokens[rows[wide]] = order[wide].gather(1, places)[:, 0]
        rows = rows[~wide]
    found: list[int] = tokens.tolist()
    return found


def _nucleus(share: Tensor, limit: Tensor, drawn: Tensor) -> Tensor:
    """Place [n, 1] of the token that is drawn, `share` [n, K] being cumulated probabilities, most probable first."""
    kept = (share < limit).sum(dim=1, keepdim=True).clamp(max=share.shape[1] - 1)
    mass = share.gather(1, kept)
    return torch.searchsorted(share, drawn * mass, right=True).clamp(max=kept)


def check_decodable(model: Any) -> None:
    """Raise ConfigError for a model whose layers do not all attend to everything before."""
    config = model.config.get_text_config()
    if not getattr(model, "_supports_sdpa", False):
        raise ConfigError(
            f"model {config.model_type} has attention of its own, continuous batching needs SDPA: serve it with vLLM "
            "or another server and use kind: openai"
        )
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(config, "sliding_window", None):
        other = ", ".join(sorted(kinds - {"full_attention"})) or f"a window of {config.sliding_window} tokens"
        raise ConfigError(
            f"model {config.model_type} has {other}: continuous batching keeps one window for all layers; serve it "
            "with vLLM or another server and use kind: openai"
        )
