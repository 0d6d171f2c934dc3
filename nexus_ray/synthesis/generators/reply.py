"""What one call to a teacher can come back with, and which of it is worth another call.

Retriable are connection errors, timeouts, 408, 409, 429, 5xx and replies that are no whole answer; never 400, 401,
403, 404, 422 and the rest. Invariant: nothing of a prompt, an answer or a key enters a reason; of a server's own
words only short identifiers do.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nexus_ray.synthesis.generators.gate import NOTHING, Tokens
from nexus_ray.synthesis.rows import Answer, FinishReason
from nexus_ray.synthesis.throttle import OutcomeKind, http_date, retry_after_s

BUSY = frozenset({429, 503, 529})
"""Refused for load: 429 (rate), 503, and Anthropic's 529 (overloaded)."""
RETRIABLE = frozenset({408, 409})
ACCOUNT = frozenset({301, 302, 303, 307, 308, 401, 402, 403, 404})
"""Address, key, credit or model are wrong, not the request: before any answer, reason to stop."""
NO_CREDIT = frozenset({"insufficient_quota", "billing_error", "billing_hard_limit_reached"})
"""Error codes under which a 429 is no matter of load."""
_NOT_SENT = frozenset({"ConnectError", "ConnectTimeout", "PoolTimeout"})
_IDENTIFIER = re.compile(r"[a-z][a-z_]{2,39}", re.ASCII)

Next = Literal["answer", "again", "fail", "stop", "cut"]
"""Done; worth a retry; not worth one; no request will ever be answered; the time allowed was up."""


@dataclass(frozen=True)
class Reply:
    """Outcome of one call."""

    next: Next
    load: OutcomeKind
    """What it says about the endpoint's load."""
    reason: str = ""
    answer: Answer | None = None
    used: Tokens | None = NOTHING
    """What was billed; None if that cannot be known."""
    retry_after_s: float | None = None
    status: int | None = None
    later: bool = False
    """Of a failure: whether asking again in another run may help."""
    left: bool = True
    """Whether the call reached the server at all."""


class Broken(ValueError):
    """A reply of status 200 that is no whole answer; the message says in which way."""


def answered(answer: Answer, used: Tokens | None) -> Reply:
    return Reply("answer", "ok", answer=answer, used=used)


def broken(reason: str, used: Tokens | None = None) -> Reply:
    """A reply of status 200 that cannot be used; it may have been billed."""
    return Reply("again", "error", reason, used=used, later=True)


def timed_out(timeout_s: float) -> Reply:
    return Reply("again", "timeout", f"timeout after {timeout_s:g} s", used=None, later=True)


def disconnected(kind: str) -> Reply:
    """No reply, or a torn one; `kind` is the name of the transport's exception."""
    left = kind not in _NOT_SENT
    load: OutcomeKind = "timeout" if "Timeout" in kind else "error"
    return Reply("again", load, f"connection: {kind}", used=None if left else NOTHING, later=True, left=left)


def refused(status: int, headers: Mapping[str, str], body: bytes) -> Reply:
    """The reply for a status other than 200."""
    words = _identifiers(body)
    reason = " ".join([f"http {status}", *words])
    if NO_CREDIT & set(words):
        return Reply("stop", "error", reason, status=status, later=True)
    if status in BUSY:
        return Reply("again", "busy", reason, retry_after_s=_asked_wait(headers), status=status, later=True)
    if status in RETRIABLE or status >= 500:
        load: OutcomeKind = "timeout" if status in (408, 504) else "error"
        return Reply("again", load, reason, retry_after_s=_asked_wait(headers), status=status, later=True)
    return Reply("fail", "error", reason, status=status, later=status in ACCOUNT)


def read_answer(body: bytes, parse: Callable[[Mapping[str, Any]], tuple[Answer, Tokens | None]]) -> Reply:
    """The reply of status 200 whose JSON `parse` understands; `parse` raises Broken for what it does not."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return broken("the reply is no JSON")
    if not isinstance(data, dict):
        return broken("the reply is no JSON object")
    try:
        answer, used = parse(data)
        return answered(answer, used)
    except Broken as error:
        return broken(str(error))


def whole_text(value: Any, finish: FinishReason) -> str:
    """The text of an answer. Raises Broken if it is none, empty without a reason, or cannot be stored as UTF-8."""
    text = "" if value is None else value
    if not isinstance(text, str):
        raise Broken("the reply holds no text")
    if not text and finish in ("stop", "other"):
        raise Broken("the reply is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Broken("the reply holds half a surrogate pair") from None
    return text


def token_count(usage: Any, name: str) -> int | None:
    """A count in a `usage` section; None if it is missing or no count."""
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _asked_wait(headers: Mapping[str, str]) -> float | None:
    milliseconds = headers.get("retry-after-ms", "")
    if milliseconds.isdecimal():
        return int(milliseconds) / 1000
    now = http_date(headers.get("date"))
    return retry_after_s(headers.get("retry-after"), now=time.time() if now is None else now)


def _identifiers(body: bytes) -> list[str]:
    """`error.type`, `error.code` and `error.param` where they are short lower-case identifiers."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return []
    error = data.get("error", data) if isinstance(data, dict) else None
    if not isinstance(error, dict):
        return []
    found = [error.get(name) for name in ("type", "code", "param")]
    return list(dict.fromkeys(word for word in found if isinstance(word, str) and _IDENTIFIER.fullmatch(word)))
