"""Teachers that speak OpenAI's protocol, through the official client with its own retries switched off.

Replies are read from the raw body, strictly: the client itself accepts what does not fit its types.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import openai

from nexus_ray.config.generators import OpenAIGenerator
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

_FINISH: Mapping[str, FinishReason] = {"stop": "stop", "length": "length", "content_filter": "content_filter"}


class OpenAIEndpoint:
    """One server. Made inside the event loop that uses it."""

    def __init__(self, config: OpenAIGenerator, key: str | None) -> None:
        self._config = config
        self._clients = [
            openai.AsyncOpenAI(api_key=key or "none", base_url=config.base_url, max_retries=0, http_client=pool)
            for pool in http_clients(config)
        ]
        self._without_key = {} if key else {"Authorization": openai.Omit()}
        resources = [each.chat.completions if config.api == "chat" else each.completions for each in self._clients]
        self._create: Iterator[Any] = itertools.cycle(each.with_raw_response.create for each in resources)

    async def ask(self, request: Request, request_id: str) -> Reply:
        """See `Endpoint`."""
        if self._config.api == "completion" and not isinstance(request.prompt.content, str):
            return Reply("fail", "error", "a conversation needs `api: chat`, not plain completion")
        body = payload(self._config, request, request_id)
        headers = {INDEX_HEADER: str(request.index), **self._without_key}
        try:
            raw = await next(self._create)(**body, extra_headers=headers)
        except openai.APIConnectionError as error:
            return disconnected(type(error.__cause__).__name__)
        except openai.APIStatusError as error:
            return refused(error.status_code, error.response.headers, error.response.content)
        return read_answer(raw.http_response.content, lambda data: parse(data, request_id, api=self._config.api))

    async def close(self) -> None:
        for client in self._clients:
            await client.close()


def payload(config: OpenAIGenerator, request: Request, request_id: str) -> dict[str, Any]:
    """The body of a call."""
    content = request.prompt.content
    body: dict[str, Any] = {"model": config.model, **sampling_fields(request.sampling, config.omit)}
    body[config.max_tokens_field if config.api == "chat" else "max_tokens"] = request.sampling.max_tokens
    if config.send_seed:
        body["seed"] = int(request_id[:8], 16) & 0x7FFFFFFF
    if config.api == "completion":
        return body | {"prompt": content}
    turns = [("user", content)] if isinstance(content, str) else [(turn.role, turn.content) for turn in content]
    return body | {"messages": [{"role": role, "content": text} for role, text in turns]}


def parse(data: Mapping[str, Any], request_id: str, *, api: str) -> tuple[Answer, Tokens | None]:
    """The answer in a reply, and what it used if the server says so. Raises Broken for what is no whole answer."""
    choices = data.get("choices")
    if not isinstance(choices, list):
        raise Broken("the reply holds no choices")
    if len(choices) != 1:
        raise Broken(f"the reply holds {len(choices)} choices where 1 was asked for")
    choice = choices[0]
    message = choice.get("message") if api == "chat" and isinstance(choice, dict) else choice
    if not isinstance(choice, dict) or not isinstance(message, dict):
        raise Broken("the reply holds no message")
    finish = _FINISH.get(str(choice.get("finish_reason")), "other")
    text = whole_text(message.get("content" if api == "chat" else "text"), finish)
    counts = [token_count(data.get("usage"), name) for name in ("prompt_tokens", "completion_tokens")]
    prompt, completion = counts
    used = None if prompt is None or completion is None else Tokens(prompt, completion)
    model = data.get("model")
    return Answer(request_id, text, finish, prompt or 0, completion or 0, model if isinstance(model, str) else ""), used
