"""Claude as a teacher, through the official client with its own retries switched off.

Version 2026-10-21 of the messages protocol refuses temperature and top_p, at any value; see `api_version`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import anthropic

from nexus_ray.config.generators import AnthropicGenerator
from nexus_ray.synthesis.generators.gate import Tokens
from nexus_ray.synthesis.generators.reply import (
    Broken,
    Reply,
    disconnected,
    read_answer,
    refused,
    token_count,
    whole_text,
)
from nexus_ray.synthesis.generators.transport import INDEX_HEADER, http_clients, sampling_fields
from nexus_ray.synthesis.rows import Answer, FinishReason, Request

_FINISH: Mapping[str, FinishReason] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "refusal": "content_filter",
}
_INPUT_COUNTS = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")


class AnthropicEndpoint:
    """One server. Made inside the event loop that uses it."""

    def __init__(self, config: AnthropicGenerator, key: str | None) -> None:
        self._config = config
        self._clients = [
            anthropic.AsyncAnthropic(
                api_key=key or "none",
                base_url=config.base_url,
                max_retries=0,
                timeout=config.timeout_s,
                open_telemetry=False,
                http_client=pool,
            )
            for pool in http_clients(config)
        ]
        self._headers = {"anthropic-version": config.api_version}
        self._without_key = {} if key else {"Authorization": anthropic.Omit()}
        creates = [client.messages.with_raw_response.create for client in self._clients]
        self._create: Iterator[Any] = itertools.cycle(creates)

    async def ask(self, request: Request, request_id: str) -> Reply:
        """See `Endpoint`."""
        headers = {INDEX_HEADER: str(request.index), **self._headers, **self._without_key}
        try:
            raw = await next(self._create)(**payload(self._config, request), extra_headers=headers)
        except anthropic.APIConnectionError as error:
            return disconnected(type(error.__cause__).__name__)
        except anthropic.APIStatusError as error:
            return refused(error.status_code, error.response.headers, error.response.content)
        return read_answer(raw.http_response.content, lambda data: parse(data, request_id))

    async def close(self) -> None:
        for client in self._clients:
            await client.close()


def payload(config: AnthropicGenerator, request: Request) -> dict[str, Any]:
    """The body of a call; system turns go before the conversation."""
    content = request.prompt.content
    fields = sampling_fields(request.sampling, config.omit)
    body: dict[str, Any] = {"model": config.model, "max_tokens": request.sampling.max_tokens}
    if "stop" in fields:
        body["stop_sequences"] = fields.pop("stop")
    if config.api_version == "2023-06-01":
        body["extra_body"] = fields  # the client knows only the newer protocol
    if isinstance(content, str):
        return body | {"messages": [{"role": "user", "content": content}]}
    system = "\n\n".join(turn.content for turn in content if turn.role == "system")
    turns = [{"role": turn.role, "content": turn.content} for turn in content if turn.role != "system"]
    return body | ({"system": system} if system else {}) | {"messages": turns}


def parse(data: Mapping[str, Any], request_id: str) -> tuple[Answer, Tokens | None]:
    """The answer in a reply, and what it used if the server says so. Raises Broken for what is no whole answer."""
    blocks = data.get("content")
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        raise Broken("the reply holds no content")
    texts = [block.get("text") for block in blocks if block.get("type") == "text"]
    if len(texts) > 1:
        raise Broken(f"the reply holds {len(texts)} texts where 1 was asked for")
    finish = _FINISH.get(str(data.get("stop_reason")), "other")
    text = whole_text(texts[0] if texts else None, finish)
    usage = data.get("usage")
    asked, written = [token_count(usage, name) for name in _INPUT_COUNTS], token_count(usage, "output_tokens")
    prompt = sum(count or 0 for count in asked)
    used = None if asked[0] is None or written is None else Tokens(prompt, written)
    model = data.get("model")
    return Answer(request_id, text, finish, prompt, written or 0, model if isinstance(model, str) else ""), used
