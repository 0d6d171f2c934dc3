"""Conversations to tokens through a tokenizer's chat template, each token known to be part of an answer or not.

An answer is what the assistant says and the end-of-turn that closes it; nothing else is learned. Where it lies is found
by rendering prefixes: the prompt before it (`add_generation_prompt=True`) and the conversation up to its end must both
be prefixes of the whole rendering. Nothing is derived from a pad token, and no BOS is added to what a template writes.

Invariant: the tokens are a pure function of (messages, tokenizer, template): a template that asks for today's date is
given `TODAY`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nexus_ray.corpora.conversations import Messages
from nexus_ray.corpora.manifest import stable_hash
from nexus_ray.corpora.reader import NO_LOSS
from nexus_ray.errors import ConfigError
from nexus_ray.storage import Storage

TEMPLATE_FILE = "chat_template.jinja"
DEFAULT_TEMPLATE = """\
{%- for message in messages %}
{%- if message.role not in ['system', 'user', 'assistant'] %}
{{- raise_exception('unknown role ' + message.role) }}
{%- endif %}
{{- '### ' + message.role.capitalize() + '\\n' + message.content }}
{%- if message.role == 'assistant' %}
{{- eos_token }}
{%- endif %}
{{- '\\n\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '### Assistant\\n' }}
{%- endif %}
"""
"""Plain headings, and the end-of-document token after each answer: needs no token that a tokenizer may lack. A user who
types `### Assistant` can imitate a heading; use a template with special tokens where that matters."""
TODAY = {"%d": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%y": "24", "%A": "Friday", "%a": "Fri"}
"""The date that templates see: the one that Llama 3.1's own falls back to."""
_CLOCK = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f"|replace('{sign}', '{value}')" for sign, value in TODAY.items())
    + " }}{% endmacro +%}"
)
_MARK = "\ue000answer\ue001"
"""Stands in for an answer to find what a template writes before and after it."""
TOO_LONG, REFUSED, SPECIAL = "too_long_dropped", "refused_dropped", "special_token_dropped"
DROPPED = (TOO_LONG, REFUSED, SPECIAL)
"""Counts of conversations left out: longer than a row, refused by the template, spelling out a special token."""


@dataclass(frozen=True)
class Conversation:
    """Tokens of a conversation, `NO_LOSS` set in those that are no part of an answer."""

    ids: NDArray[np.int32]
    answer_bytes: int
    """UTF-8 bytes of what the assistant says."""

    @property
    def targets(self) -> int:
        return int((self.ids[1:] & NO_LOSS == 0).sum())


@dataclass(frozen=True)
class Refusal:
    """A conversation that is left out: the count it goes into, and why."""

    count: str
    reason: str


class _RefusedError(Exception):
    pass


def template_fingerprint(folder: Storage) -> str | None:
    """Hash of all that a tokenizer's chat template writes with; None if the tokenizer has none."""
    settings = folder.read_json("tokenizer_config.json") if folder.exists("tokenizer_config.json") else {}
    template = folder.read_bytes(TEMPLATE_FILE).decode() if folder.exists(TEMPLATE_FILE) else None
    template = template or settings.get("chat_template")
    if not template:
        return None
    tokens = {key: value for key, value in settings.items() if key.endswith(("_token", "special_tokens"))}
    return stable_hash([template, tokens, _CLOCK if "strftime_now" in str(template) else ""])


class ChatEncoder:
    """Renders and tokenises conversations with the template of a tokenizer folder (local)."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer
        from tokenizers.decoders import ByteLevel
        from transformers import AutoTokenizer

        self._hugging = AutoTokenizer.from_pretrained(folder)
        template = self._hugging.get_chat_template()
        self._template = (_CLOCK if "strftime_now" in template else "") + template
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder().values()
        self._special = tuple(token.content for token in added if token.special)
        self._closing = tuple(token.content for token in added if not token.content.isspace())
        first, second = (self._tokenizer.encode(text, add_special_tokens=False).ids for text in ("a", " a"))
        # A byte-level tokenizer that adds no space gives the same bytes for a text and for its pieces.
        self._by_pieces = isinstance(self._tokenizer.decoder, ByteLevel) and first != second

    def encode(self, conversations: Sequence[Messages]) -> list[Conversation | Refusal]:
        """Tokens of each conversation, or why there are none.

        Raises ConfigError if the template cannot be used: it renders a conversation's start in another way than the
        same messages inside the whole, or never closes an answer.
        """
        found: list[tuple[list[tuple[str, bool]], int] | Refusal] = [self._try(messages) for messages in conversations]
        rendered = [each for each in found if not isinstance(each, Refusal)]
        made = iter(self._by_piece(rendered) if self._by_pieces else self._by_offset(rendered))
        return [each if isinstance(each, Refusal) else next(made) for each in found]

    # --- rendering ------------------------------------------------------------------------------------------------

    def _try(self, messages: Messages) -> tuple[list[tuple[str, bool]], int] | Refusal:
        for message in messages:
            if special := next((token for token in self._special if token in message["content"]), None):
                return Refusal(SPECIAL, f"it spells out {special!r}, which would be read as the token itself")
        if messages[0]["role"] == "assistant":
            return Refusal(REFUSED, "it starts with an answer")
        try:
            return self._spans(messages)
        except _RefusedError as refused:
            return Refusal(REFUSED, str(refused))

    def _render(self, messages: Messages, *, prompt: bool = False) -> str:
        import jinja2

        try:
            return str(
                self._hugging.apply_chat_template(
                    messages, chat_template=self._template, tokenize=False, add_generation_prompt=prompt
                )
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise _RefusedError(f"the chat template refuses it: {error}") from None

    def _spans(self, messages: Messages) -> tuple[list[tuple[str, bool]], int]:
        """The rendering cut into (text, is it an answer), and the bytes of the answers."""
        whole = self._render(messages)
        spans: list[tuple[str, bool]] = []
        done = answer_bytes = 0
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                begin, end, said = self._answer(messages, number, whole)
                spans += [(whole[done:begin], False), (whole[begin:end], True)]
                done, answer_bytes = end, answer_bytes + said
        spans.append((whole[done:], False))
        return [span for span in spans if span[0]], answer_bytes

    def _answer(self, messages: Messages, number: int, whole: str) -> tuple[int, int, int]:
        """First and last-plus-one character in `whole` of an answer with its end-of-turn, and its bytes without."""
        before, content = messages[:number], messages[number]["content"]
        prompt, upto = self._render(before, prompt=True), self._render(messages[: number + 1])
        self._check_prefix(prompt, upto, "the prompt before an answer")
        self._check_prefix(upto, whole, "a conversation up to an answer")
        lead, mark, tail = self._render([*before, {"role": "assistant", "content": _MARK}])[len(prompt) :].partition(
            _MARK
        )
        piece = upto[len(prompt) :]
        said = piece[len(lead) : len(piece) - len(tail)]
        if not mark or lead + said + tail != piece or said.strip() != content.strip():
            raise _RefusedError("the chat template changes what the assistant says")
        if not tail:
            raise _unusable("it writes nothing after an answer, so a model would never learn to stop")
        closing = min((tail.find(token) + len(token) for token in self._closing if token in tail), default=len(tail))
        begin = len(prompt) + (len(lead) if lead.strip() else 0)  # a blank before it is written by the model
        return begin, len(prompt) + len(lead) + len(said) + closing, len(said.encode())

    @staticmethod
    def _check_prefix(part: str, whole: str, what: str) -> None:
        if whole.startswith(part):
            return
        at = next((i for i, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b), min(len(part), len(whole)))
        near = slice(max(0, at - 20), at + 20)
        raise _unusable(
            f"it renders {what} otherwise than inside the whole ({part[near]!r} against {whole[near]!r} at character "
            f"{at}), so that the model would be trained on another text than it is later given"
        )

    # --- tokenising -----------------------------------------------------------------------------------------------

    def _by_piece(self, rendered: list[tuple[list[tuple[str, bool]], int]]) -> list[Conversation | Refusal]:
        """Each span on its own: the prompt's tokens are those that the model is given when it is asked."""
        texts = [text for spans, _ in rendered for text, _ in spans]
        encoded = iter(self._tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        made: list[Conversation | Refusal] = []
        for spans, answer_bytes in rendered:
            parts = [np.array(next(encoded).ids, np.int32) | (0 if answer else NO_LOSS) for _, answer in spans]
            made.append(Conversation(np.concatenate(parts).astype(np.int32), answer_bytes))
        return made

    def _by_offset(self, rendered: list[tuple[list[tuple[str, bool]], int]]) -> list[Conversation | Refusal]:
        """The whole at once, for tokenizers that would add a space to each piece; a token belongs where it starts."""
        whole = ["".join(text for text, _ in spans) for spans, _ in rendered]
        made: list[Conversation | Refusal] = []
        for (spans, answer_bytes), encoding in zip(
            rendered, self._tokenizer.encode_batch(whole, add_special_tokens=False), strict=True
        ):
            ends = np.cumsum([len(text) for text, _ in spans])
            first, last = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
            span_of = np.minimum(np.searchsorted(ends, first, side="right"), len(spans) - 1)
            if (last > ends[span_of]).any():
                made.append(Refusal(REFUSED, "one token of the tokenizer spans the border of an answer"))
                continue
            flags = np.array([0 if answer else NO_LOSS for _, answer in spans], np.int32)
            made.append(Conversation(np.array(encoding.ids, np.int32) | flags[span_of], answer_bytes))
        return made


def _unusable(reason: str) -> ConfigError:
    return ConfigError(
        f"model.tokenizer.chat_template: the tokenizer's chat template cannot be trained with: {reason}; name a file "
        f"with another template, or set it to `default`"
    )


@lru_cache(maxsize=4)
def load_chat_encoder(folder: Storage) -> ChatEncoder:
    """The encoder of a tokenizer folder, kept for the next shard of the same process."""
    if folder.is_local:
        return ChatEncoder(folder.local_path)
    with tempfile.TemporaryDirectory(prefix="nexus-tokenizer-") as place:
        folder.download(Path(place))
        return ChatEncoder(Path(place))


def check_template(text: str, where: str) -> None:
    """Raise ConfigError if `text` is no Jinja template."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(
            text.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        )
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"{where} is no Jinja template: line {error.lineno}: {error.message}; mend it") from None
