"""Continuous batching: many sequences are written at once, and one that ends makes room for the next at once.

Keys and values of all sequences lie in one buffer, right-aligned at a common column where the next token goes: columns
carry no meaning of their own, since keys are rotated by their position before they are stored. So a step is one
forward pass with one mask, whatever the sequences' lengths.

Invariant: a sequence's tokens follow from its prompt, its settings and its key alone, but for rounding: kernels may add
in another order when other sequences share the batch.

Legend: N slots, T columns, V vocabulary, K candidates.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nexus_ray.errors import ConfigError

CANDIDATES = (256, 4096)
"""Most probable tokens looked at first, and then; only where these hold less than `top_p` is the whole vocabulary
sorted, which takes as long as a tenth of a forward pass of a small model."""
FIRST_COLUMNS = 256
REFILL_SHARE = 8
"""Prompts are read in groups, when so many slots (one in ...) are free: a lone one would leave the others waiting."""


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
class _Slot:
    job: Job
    uniform: np.ndarray
    start: int
    """Column of the prompt's first token."""
    position: int
    """Of the next token."""
    tokens: list[int] = field(default_factory=list)


class SlotCache:
    """What attention layers read and write in a step: columns `begin` to `end` of every slot, the last one new."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.begin = self.end = 0

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store [N, heads, 1, dim] in the last column; all columns, [N, heads, T, dim]."""
        own_keys, own_values = self.keys[layer], self.values[layer]
        own_keys[:, :, self.end - 1] = keys[:, :, 0]
        own_values[:, :, self.end - 1] = values[:, :, 0]
        return own_keys[:, :, self.begin : self.end], own_values[:, :, self.begin : self.end]

    def get_seq_length(self, *_: Any) -> int:
        return self.end - 1 - self.begin

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2] if self.keys else 0

    def move(self, offset: int, capacity: int, slots: Sequence[int] | None = None) -> None:
        """All columns by `offset` into buffers of `capacity` columns, keeping `slots` (default: all)."""
        for buffers in (self.keys, self.values):
            for layer, old in enumerate(buffers):
                rows = old if slots is None else old[list(slots)]
                new = old.new_zeros(rows.shape[0], old.shape[1], capacity, old.shape[3])
                new[:, :, self.begin + offset : self.end + offset] = rows[:, :, self.begin : self.end]
                buffers[layer] = new
        self.begin, self.end = self.begin + offset, self.end + offset


class Decoder:
    """A causal LM that writes many sequences; `run` may be called again and again, not twice at once."""

    def __init__(self, model: Any, *, slots: int, end_tokens: Iterable[int]) -> None:
        check_decodable(model)
        self.model = model.eval()
        self.slots = slots
        self.end_tokens = frozenset(end_tokens)
        self.device = model.get_input_embeddings().weight.device
        self.steps = 0
        """Forward passes of all calls so far, those that read prompts included."""

    @torch.inference_mode()
    def run(self, jobs: Iterable[Job]) -> Iterator[Written]:
        """Sequences in the order in which they end. Jobs are drawn as slots become free.

        Raises:
            ConfigError: a prompt is empty.
        """
        source, waiting = iter(jobs), deque[Job]()
        self.cache, self.active = SlotCache(), dict[int, _Slot]()
        self.width = self.slots
        more = True
        while True:
            while more and len(waiting) < self.slots:
                drawn = next(source, None)
                more = drawn is not None
                if drawn is not None:
                    waiting.append(drawn)
            free = self.width - len(self.active)
            if waiting and (free >= max(1, self.slots // REFILL_SHARE) or not self.active):
                self._widen(min(self.slots, len(self.active) + len(waiting)))
                group = [waiting.popleft() for _ in range(min(len(waiting), self.width - len(self.active)))]
                yield from self._read(group)
            elif not self.active:
                return
            else:
                if not waiting and not more and 2 * len(self.active) <= self.width:
                    self._narrow()
                yield from self._step()

    # --- prompts ------------------------------------------------------------------------------------------------

    def _read(self, group: Sequence[Job]) -> Iterator[Written]:
        """Read prompts side by side, put their keys and values into free slots, and write their first token."""
        from transformers import DynamicCache

        if any(not job.prompt for job in group):
            raise ConfigError("an empty prompt gives a model nothing to continue; begin it with one token at least")
        longest = max(len(job.prompt) for job in group)
        ids = torch.zeros(len(group), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, job in enumerate(group):
            ids[row, longest - len(job.prompt) :] = torch.tensor(job.prompt)
            mask[row, longest - len(job.prompt) :] = 1
        read = DynamicCache()
        logits = self.model(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(self.device),
            past_key_values=read,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        self.steps += 1
        self._make_room(read, longest)
        slots = [slot for slot in range(self.width) if slot not in self.active][: len(group)]
        for row, (slot, job) in enumerate(zip(slots, group, strict=True)):
            length = len(job.prompt)
            columns = slice(self.cache.end - length, self.cache.end)
            for layer, part in enumerate(read.layers):
                self.cache.keys[layer][slot, :, columns] = part.keys[row, :, longest - length :]
                self.cache.values[layer][slot, :, columns] = part.values[row, :, longest - length :]
            self.active[slot] = _Slot(job, uniforms(job.key, job.max_tokens), columns.start, length)
        self.cache.begin = min(slot.start for slot in self.active.values())
        yield from self._take(slots, logits)

    def _make_room(self, read: Any, length: int) -> None:
        """Buffers, and so many columns to the left of the next one."""
        cache = self.cache
        if not cache.keys:
            for part in read.layers:
                shape = (self.width, part.keys.shape[1], max(FIRST_COLUMNS, 2 * length), part.keys.shape[3])
                cache.keys.append(part.keys.new_zeros(shape))
                cache.values.append(part.values.new_zeros(shape))
            cache.begin = cache.end = length
        elif cache.end < length:
            offset = length - cache.end
            cache.move(offset, cache.capacity + offset)
            self._shifted(offset)

    def _widen(self, width: int) -> None:
        """Slots for so many sequences, if there are less (the buffers shrink when the work runs out, and may grow)."""
        if width <= self.width:
            return
        for buffers in (self.cache.keys, self.cache.values):
            for layer, old in enumerate(buffers):
                buffers[layer] = torch.cat([old, old.new_zeros(width - self.width, *old.shape[1:])])
        self.width = width

    def _narrow(self) -> None:
        """Only the slots in use, so that empty ones cost nothing at the end of the work."""
        used = sorted(self.active)
        self.cache.move(0, self.cache.capacity, used)
        self.active = {place: self.active[slot] for place, slot in enumerate(used)}
        self.width = len(used)

    # --- steps --------------------------------------------------------------------------------------------------

    def _step(self) -> Iterator[Written]:
        """One more token of every sequence."""
        cache = self.cache
        cache.begin = min(slot.start for slot in self.active.values())
        if cache.end == cache.capacity:
            used = cache.end - cache.begin
            offset = -cache.begin
            cache.move(offset, cache.capacity if used <= cache.capacity // 2 else 2 * cache.capacity)
            self._shifted(offset)
        cache.end += 1
        ids = torch.zeros(self.width, 1, dtype=torch.long)
        positions = torch.zeros(self.width, 1, dtype=torch.long)
        starts = torch.full((self.width,), cache.end - 1)
        for place, slot in self.active.items():
            ids[place, 0], positions[place, 0], starts[place] = slot.tokens[-1], slot.position, slot.start
            slot.position += 1
        seen = torch.arange(cache.begin, cache.end) >= starts[:, None]
        logits = self.model(
            input_ids=ids.to(self.device),
            attention_mask=seen[:, None, None, :].to(self.device),
            position_ids=positions.to(self.device),
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
        self.steps += 1
        places = sorted(self.active)
        yield from self._take(places, logits if len(places) == self.width else logits[places])

    def _shifted(self, offset: int) -> None:
        for slot in self.active.values():
            slot.start += offset

    def _take(self, places: Sequence[int], logits: Tensor) -> Iterator[Written]:
        """Choose the next token of the sequences in `places` from `logits` [n, V]; those that end leave their slot."""
        slots = [self.active[place] for place in places]
        chosen = choose(
            logits,
            temperature=[slot.job.temperature for slot in slots],
            top_p=[slot.job.top_p for slot in slots],
            uniform=[float(slot.uniform[len(slot.tokens)]) for slot in slots],
        )
        for place, slot, token in zip(places, slots, chosen, strict=True):
            ended = token in self.end_tokens
            if not ended:
                slot.tokens.append(token)
                ended = slot.job.is_stop is not None and slot.job.is_stop(slot.tokens)
            if ended or len(slot.tokens) == slot.job.max_tokens:
                del self.active[place]
                yield Written(slot.job.key, slot.tokens, ended)


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
    tokens = scaled.argmax(dim=1)
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
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(config, "sliding_window", None):
        other = ", ".join(sorted(kinds - {"full_attention"})) or f"a window of {config.sliding_window} tokens"
        raise ConfigError(
            f"model {config.model_type} has {other}: continuous batching keeps one window for all layers; serve it "
            "with vLLM or another server and use kind: openai"
        )
