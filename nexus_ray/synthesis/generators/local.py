"""A Hugging Face model in this process as a generator: continuous batching, answers that repeat.

Every answer is drawn with random numbers of its own, seeded by the request's id, so that it does not depend on what
else is written at the time. Several processes each hold their own copy; they share nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from nexus_ray.config.generators import LocalGenerator
from nexus_ray.errors import ConfigError
from nexus_ray.models.decode import Decoder, Job, Written
from nexus_ray.synthesis.rows import Answer, Failure, Request

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

    async def generate(self, requests: Iterable[Request]) -> AsyncIterator[Answer | Failure]:
        """Answers in the order in which they end; requests are drawn as there is room."""
        for result in self.answers(requests):
            yield result
            await asyncio.sleep(0)

    def answers(self, requests: Iterable[Request]) -> Iterator[Answer | Failure]:
        """`generate` for code without an event loop."""
        self._open: dict[str, tuple[Request, int]] = {}
        self._failed: list[Failure] = []
        for written in self._decoder.run(self._jobs(requests)):
            yield from self._failures()
            yield self._answer(written)
        yield from self._failures()

    async def aclose(self) -> None:
        """Nothing is open."""

    def _jobs(self, requests: Iterable[Request]) -> Iterator[Job]:
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
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
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


def local_teacher(config: LocalGenerator, *, threads: int | None = None, device: str = "cpu") -> LocalTeacher:
    """The generator of a config section, on `threads` threads of this process.

    Raises:
        ConfigError: the model cannot be read, or its layers do not fit continuous batching.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nexus_ray.hub import hub_answers
    from nexus_ray.models.build import no_progress_bars

    if threads is not None:
        torch.set_num_threads(threads)
    source = Path(config.model).expanduser()
    arguments: dict[str, Any] = {"local_files_only": source.exists() or not hub_answers()}
    if config.gguf is not None:
        arguments["gguf_file"] = config.gguf
    if not source.exists():
        arguments["revision"] = config.revision or "main"
    place = str(source) if source.exists() else config.model
    try:
        with no_progress_bars():
            tokenizer = AutoTokenizer.from_pretrained(place, **arguments)
            model = AutoModelForCausalLM.from_pretrained(place, dtype=_dtype(config, device), **arguments)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"generator.model={config.model!r} cannot be read: {reason}; name a folder with config.json, weights and "
            f"tokenizer, or a Hugging Face id that this machine can reach"
        ) from None
    revision = f"local:{weights_revision(config, model)}:{str(model.dtype).removeprefix('torch.')}"
    return LocalTeacher(model.to(device), tokenizer, batch_size=config.batch_size, revision=revision)


def weights_revision(config: LocalGenerator, model: Any) -> str:
    """12 hexadecimal digits of a model's files, or of its commit on the hub: another student, another revision."""
    source = Path(config.model).expanduser()
    if not source.exists():
        commit = getattr(model.config, "_commit_hash", None) or config.revision
        return hashlib.sha256(f"{config.model} {commit}".encode()).hexdigest()[:12]
    digest = hashlib.sha256()
    for path in sorted(path for path in source.iterdir() if path.is_file() and path.name != "manifest.json"):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


def _dtype(config: LocalGenerator, device: str) -> Any:
    if config.dtype == "auto":
        return torch.bfloat16 if device != "cpu" else torch.float32
    return getattr(torch, config.dtype)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
