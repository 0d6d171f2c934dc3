"""From a record to a conversation: a list of messages, kept as canonical JSON in a document's `text`.

Nothing is guessed: an unknown role, content that is no text or a conversation without an answer name their record. A
record that holds nothing to learn (no messages, blank answers) becomes an empty text, which the writer of documents
drops and counts like any other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nexus_ray.config.tree import ChatConfig
from nexus_ray.errors import DataError

Messages = list[dict[str, str]]
ROLES = ("system", "user", "assistant")
_SHAREGPT = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_UNSUPPORTED = ("tool_calls", "function_call", "tool_call_id", "reasoning_content", "thinking", "reasoning")
"""Keys of a message that change what a template writes, and that are not read yet."""


def conversation_text(record: Any, chat: ChatConfig, place: str, where: str) -> str:
    """The canonical JSON of a record's messages; "" if there is nothing in it to learn.

    `place` is the file and record, `where` the config path of the domain's source, for messages. Raises DataError.
    """
    if not isinstance(record, dict):
        raise DataError(f"{place}: a {type(record).__name__} is no record; records must be mappings")
    path = where.removesuffix("source") + "chat"
    for field in chat.fields:
        if field not in record:
            raise DataError(
                f"{place}: no field {field!r} ({path}, layout {chat.layout}); the fields are "
                f"{', '.join(map(str, record)) or 'none'}; name the right ones in {path}"
            )
    if chat.layout == "pair":
        prompt, completion = (_content(record[field], f"{place}: field {field!r}") for field in chat.fields)
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    else:
        messages = _turns(record[chat.fields[0]], chat, f"{place}: field {chat.fields[0]!r}")
    if messages and not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{place}: no turn of the assistant, so nothing to learn; mend the record or leave it out")
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        return ""
    return canonical(messages)


def canonical(messages: Messages) -> str:
    """The one way in which a conversation is written down: its text, and so its id."""
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    return json.dumps(plain, ensure_ascii=False, separators=(",", ":"))


def messages_of(text: str) -> Messages:
    """The inverse of `canonical`."""
    return json.loads(text)


def contents(text: str) -> str:
    """What a tokenizer is trained on: what is said, under the headings of the plain chat template."""
    return "\n\n".join(f"### {message['role'].capitalize()}\n{message['content']}" for message in messages_of(text))


def _turns(turns: Any, chat: ChatConfig, place: str) -> Messages:
    if turns is None:
        return []
    if not isinstance(turns, list):
        raise DataError(f"{place} holds a {type(turns).__name__}, not a list of turns; name another field or layout")
    names, roles = (("from", "value"), _SHAREGPT) if chat.layout == "sharegpt" else (("role", "content"), None)
    messages = []
    for number, turn in enumerate(turns):
        at = f"{place}, turn {number}"
        if not isinstance(turn, Mapping) or any(name not in turn for name in names):
            raise DataError(f"{at} is no mapping with {names[0]!r} and {names[1]!r} (layout {chat.layout}); mend it")
        unread = [key for key in _UNSUPPORTED if turn.get(key)]
        if unread:
            raise DataError(f"{at} has {', '.join(unread)}, which cannot be learned from yet; leave the record out")
        said = turn[names[0]]
        role = (roles or dict(zip(ROLES, ROLES, strict=True))).get(said) if isinstance(said, str) else None
        if role is None:
            known = ", ".join(roles or ROLES)
            raise DataError(f"{at} has the role {said!r}; known are {known}: rename it or leave the record out")
        messages.append({"role": role, "content": _content(turn[names[1]], at)})
    return messages


def _content(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place} holds a {type(value).__name__} instead of text; mend it or leave the record out")
    return value
