"""A teacher that misbehaves to a script: OpenAI's and Anthropic's protocol on the loopback, over real HTTP.

What it answers depends on (payload, index) alone, never on time or order. What goes wrong is scripted by `Rule`s and
a `capacity` beyond which it refuses. `FaultServer` runs in a thread; `python -m tests.fault_server '{"delay_s": 0.2}'`
runs it as a process of its own that prints its port and ends when its standard input does; with a `port` among its
settings it listens there and stays.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

PATHS = {"/v1/chat/completions": "chat", "/v1/completions": "completion", "/v1/messages": "anthropic"}


@dataclass(frozen=True)
class Rule:
    """A fault, for the calls with an ordinal in [first, last) whose key falls into `share`, on their first `times`."""

    fault: str
    """A status such as `429`, or hang, truncate, close, not_json, html, empty, two, none, no_usage, surrogate; `die`
    prints the call, key and all, and ends the process; `sick` hangs, and makes the server say that it is ill."""
    first: int = 0
    last: int = 10**9
    share: float = 1.0
    times: int = 10**9
    only: str = ""
    """Text that a call's payload must hold."""
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = None

    def hits(self, ordinal: int, key: str, attempt: int) -> bool:
        drawn = int(hashlib.sha256(f"{self.fault} {key}".encode()).hexdigest()[:8], 16) / 2**32
        return self.first <= ordinal < self.last and attempt < self.times and drawn < self.share


@dataclass(frozen=True)
class Call:
    """One call that arrived."""

    key: str
    """Digest of payload and index."""
    index: str
    attempt: int
    """How often this key had arrived before."""
    outcome: str
    """`ok`, `busy` (beyond capacity) or the fault."""
    in_flight: int
    headers: dict[str, str]
    body: dict[str, Any]


WORDS = ("river", "lantern", "morning", "bridge", "sparrow", "winter", "copper", "garden", "harbour", "whisper")


def text_for(payload: Any, index: str, items: int = 0) -> str:
    """The answer to a payload, the index-th time; a numbered list of `items` sentences, some of them common to many."""
    digest = hashlib.sha256(json.dumps([payload, index], sort_keys=True).encode()).hexdigest()
    if not items:
        return f"Story {digest[:24]}."
    drawn = [int(hashlib.sha256(f"{digest} {item}".encode()).hexdigest(), 16) for item in range(items)]
    return "\n".join(f"{item}. {_sentence(number % 5000)}" for item, number in enumerate(drawn, start=1))


def _sentence(number: int) -> str:
    """One of as many sentences as there are numbers; every ninth is too short to be kept."""
    words = [WORDS[number // 10**place % 10] for place in range(4)]
    return (
        words[0]
        if number % 9 == 0
        else f"The {words[0]} saw a {words[1]} near the {words[2]} and the {words[3]} {number}."
    )


class FaultServer:
    """`with FaultServer(...) as server: server.url` ... Fields may be changed while it runs."""

    def __init__(
        self, *rules: Rule, delay_s: float = 0.0, capacity: int | None = None, retry_after: str = "0", items: int = 0
    ) -> None:
        self.rules = list(rules)
        self.items = items
        self.delay_s = delay_s
        self.capacity = capacity
        self.retry_after = retry_after
        self.calls: list[Call] = []
        self.in_flight = 0
        self.keep_calls = True
        self.port = 0
        self.key = ""
        """Demanded of callers, if set."""
        self.health = 200
        self._attempts: Counter[str] = Counter()
        self._ordinal = 0
        self._ready = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def answered(self) -> Counter[str]:
        """Whole answers given, by key."""
        return Counter(call.key for call in self.calls if call.outcome == "ok")

    # --- running ---------------------------------------------------------------------------------------------

    async def start(self) -> None:
        app = web.Application()
        for path in PATHS:
            app.router.add_post(path, self._serve)
        app.router.add_get("/health", self._say_health)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        self.port = self._runner.addresses[0][1]

    def __enter__(self) -> FaultServer:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run_in_thread()), daemon=True)
        self._thread.start()
        assert self._ready.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)

    async def _run_in_thread(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        await self.start()
        self._ready.set()
        await self._stop.wait()
        await self._runner.cleanup()

    # --- serving ---------------------------------------------------------------------------------------------

    async def _say_health(self, request: web.Request) -> web.Response:
        return web.Response(status=self.health)

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        self.in_flight += 1
        try:
            body = await request.json()
            index = request.headers.get("x-rollout-index", "0")
            key = hashlib.sha256(json.dumps([body, index], sort_keys=True).encode()).hexdigest()[:16]
            text = json.dumps(body)
            attempt, ordinal = self._attempts[key], self._ordinal
            self._attempts[key] += 1
            self._ordinal += 1
            rule = next((rule for rule in self.rules if rule.only in text and rule.hits(ordinal, key, attempt)), None)
            busy = self.capacity is not None and self.in_flight > self.capacity
            outcome = "busy" if busy else rule.fault if rule else "ok"
            if self.keep_calls:
                self.calls.append(Call(key, index, attempt, outcome, self.in_flight, dict(request.headers), body))
            if busy:
                return web.json_response({}, status=429, headers={"Retry-After": self.retry_after})
            await asyncio.sleep(self.delay_s)
            return await self._reply(request, PATHS[request.path], body, index, rule)
        finally:
            self.in_flight -= 1

    async def _reply(
        self, request: web.Request, kind: str, body: Any, index: str, rule: Rule | None
    ) -> web.StreamResponse:
        fault = rule.fault if rule else ""
        if rule and fault.isdigit():
            return web.json_response(rule.body, status=int(fault), headers=rule.headers)
        data = _whole(kind, body, text_for(body, index, self.items))
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({}, status=401)
        if fault == "die":
            print(f"DiedOfThisError: {dict(request.headers)} {body}", flush=True)
            os._exit(7)
        if fault == "sick":
            self.health = 503
        if fault in ("hang", "sick"):
            await asyncio.sleep(3600)
        if fault == "close":
            assert request.transport is not None
            request.transport.close()
        if fault == "html":
            return web.Response(text="<html>gateway</html>", content_type="text/html")
        if fault == "not_json":
            return web.Response(text='{"choices": [', content_type="application/json")
        if fault == "truncate":
            return await _truncated(request, json.dumps(data).encode())
        return web.json_response(_spoil(kind, data, fault), headers=rule.headers if rule else None)


def _whole(kind: str, body: Any, text: str) -> dict[str, Any]:
    asked, written = len(json.dumps(body)) // 4, len(text) // 4
    if kind == "anthropic":
        return {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": body["model"],
            "content": [{"type": "text", "text": text}],
            "stop_reason": "end_turn",
            "usage": {"input_tokens": asked, "output_tokens": written},
        }
    inside = {"message": {"role": "assistant", "content": text}} if kind == "chat" else {"text": text}
    return {
        "id": "1",
        "object": "chat.completion" if kind == "chat" else "text_completion",
        "created": 1,
        "model": body["model"],
        "choices": [{"index": 0, "finish_reason": "stop", **inside}],
        "usage": {"prompt_tokens": asked, "completion_tokens": written, "total_tokens": asked + written},
    }


def _spoil(kind: str, data: dict[str, Any], fault: str) -> dict[str, Any]:
    items = data["content" if kind == "anthropic" else "choices"]
    texts = items[0] if kind != "chat" else items[0]["message"]
    name = "content" if kind == "chat" else "text"
    if fault == "two":
        items.append(items[0])
    elif fault == "none":
        items.clear()
    elif fault == "empty":
        texts[name] = ""
    elif fault == "surrogate":
        texts[name] = "\ud800"
    elif fault == "no_usage":
        del data["usage"]
    return data


async def _truncated(request: web.Request, data: bytes) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": str(len(data))})
    await response.prepare(request)
    await response.write(data[: len(data) // 2])
    assert request.transport is not None
    request.transport.close()
    return response


async def _main(settings: dict[str, Any]) -> None:
    port, key_env = settings.pop("port", 0), settings.pop("key_env", None)
    server = FaultServer(*(Rule(**rule) for rule in settings.pop("rules", [])), **settings)
    server.keep_calls = False
    server.port, server.key = port, os.environ[key_env] if key_env else ""
    await server.start()
    print(server.port, flush=True)
    if port:
        await asyncio.Event().wait()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_main(json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}))
