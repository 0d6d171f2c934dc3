"""What a model is asked to continue after a stage, by kind of domain."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from nexus_ray.corpora.chat_template import ChatEncoder, Conversation
from nexus_ray.corpora.manifest import TokenManifest
from nexus_ray.corpora.tokens import ChatLayout, ShardBuffer
from nexus_ray.evaluate.held_out import HeldOutSet
from nexus_ray.evaluate.hooks import ScoringHooks
from nexus_ray.storage import Storage
from tests.chats import chat_tokenizer, talk
from tests.tiny import random_documents, write_tokens


def hooks_of(root: Path, tokenizer: Path, prompts: dict[str, str]) -> ScoringHooks:
    [made] = ChatEncoder(tokenizer).encode([talk("the king?", "the hills.")])
    assert isinstance(made, Conversation)
    buffer = ShardBuffer(0, ChatLayout("t", 128))
    buffer.add_conversation("0", "x", made)
    shard = buffer.write(Storage(str(root / "held_out")), 0, batch=0, metadata={})
    chat = TokenManifest("chat", "held_out", str(root), "t", 400, 0, (shard,), seq_len=128)
    text = write_tokens(root / "text", random_documents(2))
    hooks = ScoringHooks(
        folder=Storage(str(root)), tokenizer=Storage(str(tokenizer)), held_out={"chat": chat, "text": text},
        seq_len=128, batch_size=2, max_tokens=1000, during_tokens=1000, prompts=prompts, sample_tokens=4,
        temperature=0.0, sample_seed=0,
    )  # fmt: skip
    hooks._sets[1000] = {name: HeldOutSet(each, 128, 1000) for name, each in hooks.held_out.items()}
    return hooks


def test_prompts_of_conversations_end_where_the_answer_begins(tmp_path: Path) -> None:
    folder = chat_tokenizer(tmp_path / "tok", "llama3")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = tokenizer.apply_chat_template(talk("the king?"), tokenize=False, add_generation_prompt=True)
    hooks = hooks_of(tmp_path / "a", folder, {"text": "once"})
    assert hooks._prompt("chat", tokenizer) == asked
    assert hooks._prompt("text", tokenizer) == "once"
    assert "<|" not in hooks_of(tmp_path / "b", folder, {})._prompt("text", tokenizer)
    given = hooks_of(tmp_path / "c", folder, {"chat": "the king?"})
    assert given._prompt("chat", tokenizer) == asked
