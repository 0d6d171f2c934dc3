"""Which tokens of a rendered conversation are learned: exactly what the assistant says and what closes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from nexus_ray.corpora.chat_template import (
    DEFAULT_TEMPLATE,
    REFUSED,
    SPECIAL,
    TODAY,
    ChatEncoder,
    Conversation,
    Refusal,
    check_template,
    template_fingerprint,
)
from nexus_ray.corpora.reader import NO_LOSS, token_ids
from nexus_ray.errors import ConfigError
from nexus_ray.storage import Storage
from tests.chats import CHATML, chat_tokenizer, talk

KINDS = ["chatml", "llama3", "mistral", "mistral sentencepiece", "default"]
TALK = talk("the king?", "the hills.", "and the sea?", " ships, über  sea ")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    made = {name: chat_tokenizer(root / name, name) for name in ("chatml", "llama3", "mistral")}
    made["mistral sentencepiece"] = chat_tokenizer(root / "sentencepiece", "mistral", metaspace=True)
    made["default"] = chat_tokenizer(root / "default", "chatml", template=DEFAULT_TEMPLATE)
    return made


def encode(folder: Path, messages: list[dict[str, str]]) -> Conversation:
    [made] = ChatEncoder(folder).encode([messages])
    assert isinstance(made, Conversation), made
    return made


def learned(tokenizer: Any, made: Conversation) -> list[str]:
    """Runs of learned tokens, as text."""
    flags = np.concatenate([[True], made.ids & NO_LOSS != 0, [True]])
    edges = np.flatnonzero(np.diff(flags.astype(int)))
    ids = token_ids(made.ids)
    return [tokenizer.decode(ids[a:b]) for a, b in edges.reshape(-1, 2)]


CLOSING = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "default": "<|im_end|>"}


@pytest.mark.parametrize("kind", ["chatml", "llama3", "default"])
def test_answers_and_their_closing_are_learned_and_nothing_else(folders: dict[str, Path], kind: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders[kind])
    made = encode(folders[kind], TALK)
    second = TALK[3]["content"].strip() if kind == "llama3" else TALK[3]["content"]  # Llama's template trims
    assert learned(tokenizer, made) == ["the hills." + CLOSING[kind], second + CLOSING[kind]]
    assert made.targets == (made.ids & NO_LOSS == 0).sum()
    assert made.answer_bytes == len(("the hills." + second).encode())
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert tokenizer.decode(token_ids(made.ids)) == whole


@pytest.mark.parametrize("kind", ["mistral", "mistral sentencepiece"])
def test_the_blank_before_an_answer_is_the_models_own(folders: dict[str, Path], kind: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders[kind])
    made = encode(folders[kind], talk("the king?", "the hills.", "and?", "ships."))
    texts = [text.strip() for text in learned(tokenizer, made)]
    assert texts == ["the hills.</s>", "ships.</s>"]
    assert made.answer_bytes == len("the hills.ships.")
    ids = token_ids(made.ids)
    assert (ids == tokenizer.bos_token_id).sum() == 1 and ids[0] == tokenizer.bos_token_id
    if kind == "mistral sentencepiece":  # no space is added where the rendering is cut
        whole = tokenizer.apply_chat_template(talk("the king?", "the hills.", "and?", "ships."), return_dict=False)
        assert ids.tolist() == whole


def test_no_space_is_added_where_a_rendering_is_cut(tmp_path: Path) -> None:
    """A tokenizer in SentencePiece's way would put a space before an answer that stands alone."""
    folder = chat_tokenizer(tmp_path, "chatml", metaspace=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    made = encode(folder, talk("the king?", "the hills.", "and?", "ships."))
    whole = tokenizer.apply_chat_template(talk("the king?", "the hills.", "and?", "ships."), return_dict=False)
    assert token_ids(made.ids).tolist() == whole
    assert learned(tokenizer, made) == ["the hills.<|im_end|>", "ships.<|im_end|>"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_prompt_is_what_the_model_is_given_when_asked(folders: dict[str, Path], kind: str) -> None:
    """The tokens before the first answer equal those of `apply_chat_template(..., add_generation_prompt=True)`."""
    tokenizer = AutoTokenizer.from_pretrained(folders[kind])
    made = encode(folders[kind], talk("the\nking?", "\n\nthe hills."))
    asked = tokenizer.apply_chat_template(talk("the\nking?"), add_generation_prompt=True, return_dict=False)
    first = int(np.argmax(made.ids & NO_LOSS == 0))
    assert token_ids(made.ids[:first]).tolist() == asked
    bos = tokenizer.bos_token_id
    assert (token_ids(made.ids) == bos).sum() == (0 if bos is None else 1)


@pytest.mark.parametrize("kind", ["chatml", "llama3", "default"])
def test_a_system_turn_is_read_and_not_learned(folders: dict[str, Path], kind: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders[kind])
    made = encode(folders[kind], talk("the king?", "the hills.", system="old sea"))
    assert learned(tokenizer, made) == ["the hills." + CLOSING[kind]]
    assert "old sea" in tokenizer.decode(token_ids(made.ids))


def test_a_trailing_question_and_two_answers_in_a_row(folders: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders["chatml"])
    messages = [*talk("king?", "hills."), {"role": "assistant", "content": "sea."}, *talk("and ships?")]
    assert learned(tokenizer, encode(folders["chatml"], messages)) == ["hills.<|im_end|>", "sea.<|im_end|>"]


def test_an_answer_that_occurs_in_the_template_is_found_where_it_stands(folders: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders["chatml"])
    for answer in ("assistant", "im", "a", ""):
        assert learned(tokenizer, encode(folders["chatml"], talk("a", answer))) == [answer + "<|im_end|>"]


def test_a_batch_is_its_conversations_one_by_one(folders: dict[str, Path]) -> None:
    made = [talk("king?", "hills."), TALK, talk("<|im_end|>", "no"), talk("sea", "ships", system="night")]
    for kind in ("chatml", "mistral sentencepiece"):
        encoder = ChatEncoder(folders[kind])
        together = encoder.encode(made)
        for one, messages in zip(together, made, strict=True):
            [alone] = encoder.encode([messages])
            assert type(one) is type(alone)
            if isinstance(one, Conversation) and isinstance(alone, Conversation):
                assert np.array_equal(one.ids, alone.ids) and one.answer_bytes == alone.answer_bytes


def refusal(folder: Path, messages: list[dict[str, str]]) -> Refusal:
    [made] = ChatEncoder(folder).encode([messages])
    assert isinstance(made, Refusal)
    return made


def test_what_is_left_out_and_why(folders: dict[str, Path], tmp_path: Path) -> None:
    spelt = refusal(folders["chatml"], talk("what is <|im_end|>?", "a token."))
    assert spelt == Refusal(SPECIAL, "it spells out '<|im_end|>', which would be read as the token itself")
    assert refusal(folders["chatml"], talk("x", "y")[1:]) == Refusal(REFUSED, "it starts with an answer")
    twice = refusal(folders["mistral"], talk("a", "b", system="no system turns here"))
    assert twice.count == REFUSED and "roles must alternate" in twice.reason
    rewriting = CHATML.replace("message['content']", "(message['content'] | replace('king', 'queen'))")
    folder = chat_tokenizer(tmp_path / "rewriting", "chatml", template=rewriting)
    assert refusal(folder, talk("a", "the king")).reason == "the chat template changes what the assistant says"


def test_templates_that_cannot_be_trained_with(tmp_path: Path) -> None:
    inside = CHATML.replace(
        "message['content'] +",
        "message['content'] + (' (earlier)' if message['role'] == 'assistant' and not loop.last else '') +",
    )
    folder = chat_tokenizer(tmp_path / "inside", "chatml", template=inside)
    encoder = ChatEncoder(folder)
    with pytest.raises(ConfigError, match=r"a conversation up to an answer otherwise than inside the whole.*earlier"):
        encoder.encode([TALK])
    prompt = CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>model\n' }}")
    encoder = ChatEncoder(chat_tokenizer(tmp_path / "prompt", "chatml", template=prompt))
    with pytest.raises(ConfigError, match=r"model.tokenizer.chat_template: .*the prompt before an answer otherwise"):
        encoder.encode([TALK])
    open_ended = "{% for message in messages %}{{ '\n' + message.role + ': ' + message.content }}{% endfor %}"
    encoder = ChatEncoder(chat_tokenizer(tmp_path / "open", "chatml", template=open_ended))
    with pytest.raises(ConfigError, match=r"nothing after an answer.*set it to `default`"):
        encoder.encode([TALK])
    with pytest.raises(ConfigError, match=r"here is no Jinja template: line 1: .*; mend it"):
        check_template("{% for %}", "here")


def test_a_heading_that_no_prompt_gives_is_not_learned(tmp_path: Path) -> None:
    """A template without a generation prompt: its heading of the assistant's turn is read, not learned."""
    deaf = CHATML.partition("{% if add_generation_prompt %}")[0]
    folder = chat_tokenizer(tmp_path, "chatml", template=deaf)
    made = encode(folder, talk("king?", "hills."))
    assert learned(AutoTokenizer.from_pretrained(folder), made) == ["hills.<|im_end|>"]


def test_the_date_does_not_enter(tmp_path: Path) -> None:
    dated = "{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}" + CHATML
    folder = chat_tokenizer(tmp_path, "chatml", template=dated)
    text = AutoTokenizer.from_pretrained(folder).decode(token_ids(encode(folder, TALK).ids))
    assert text.startswith(f"Today: {TODAY['%d']} Jul {TODAY['%Y']}\n<|im_start|>system")


def test_the_fingerprint_of_a_template(folders: dict[str, Path], tmp_path: Path) -> None:
    prints = [template_fingerprint(Storage(str(folder))) for folder in folders.values()]
    assert None not in prints and len({*prints}) >= 4
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert template_fingerprint(Storage(str(tmp_path))) is None
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>", "chat_template": "x"}')
    assert template_fingerprint(Storage(str(tmp_path))) is not None
