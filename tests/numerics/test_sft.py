"""Fine-tuning on conversations: the loss is that of the answers, and no conversation sees its neighbour in a row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nexus_ray.corpora.chat_template import ChatEncoder, Conversation
from nexus_ray.corpora.manifest import TokenManifest
from nexus_ray.corpora.reader import NO_LOSS, PAD, TokenReader, token_ids
from nexus_ray.corpora.tokens import ChatLayout, ShardBuffer
from nexus_ray.evaluate.held_out import HeldOutSet, evaluate_domains
from nexus_ray.models.score import IGNORE, decode_rows, token_nll
from nexus_ray.storage import Storage
from tests.chats import chat_tokenizer, conversations
from tests.tiny import EOS_ID, pack_row, random_documents, tiny_model

SEQ_LEN = 96


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Conversation]:
    encoder = ChatEncoder(chat_tokenizer(tmp_path_factory.mktemp("tok"), "llama3"))
    encoded = encoder.encode(conversations(24, words=4))
    kept = [each for each in encoded if isinstance(each, Conversation) and len(each.ids) <= SEQ_LEN]
    assert len(kept) > 15
    return kept


def shards(made: list[Conversation], root: Path) -> TokenManifest:
    buffer = ShardBuffer(EOS_ID, ChatLayout("t", SEQ_LEN))
    for number, conversation in enumerate(made):
        buffer.add_conversation(f"{number:016x}", "x" * number, conversation)
    shard = buffer.write(Storage(str(root / "held_out")), 0, batch=0, metadata={"tokenizer": "t"})
    return TokenManifest("chat", "held_out", str(root), "t", 400, EOS_ID, (shard,), seq_len=SEQ_LEN)


def by_hand(model: torch.nn.Module, conversation: Conversation) -> torch.Tensor:
    """Nats of the answers' tokens of one conversation alone, with nothing but the model's own forward pass."""
    ids = torch.from_numpy(token_ids(conversation.ids)).long()[None]
    logits = model(input_ids=ids).logits[0, :-1].double()
    learned = torch.from_numpy(conversation.ids[1:] & NO_LOSS == 0)
    return F.cross_entropy(logits[learned], ids[0, 1:][learned], reduction="sum")


def test_packed_rows_lose_exactly_what_the_answers_lose(made: list[Conversation], tmp_path: Path) -> None:
    manifest = shards(made, tmp_path)
    reader = TokenReader(manifest, SEQ_LEN)
    rows = decode_rows(reader.read(np.arange(reader.num_rows)))
    assert int((rows.targets != IGNORE).sum()) == manifest.targets == sum(each.targets for each in made)
    assert (rows.segment_ids.max(dim=1).values > 0).any(), "rows hold several conversations"
    assert manifest.tokens == sum(len(each.ids) for each in made)
    assert manifest.padding == reader.num_rows * SEQ_LEN - manifest.tokens > 0
    model = tiny_model(vocab_size=400).eval()
    with torch.no_grad():
        packed = token_nll(model, rows).double().sum()
        expected = sum(by_hand(model, each) for each in made)
    torch.testing.assert_close(packed, expected, rtol=1e-5, atol=0.0)


def test_gradients_are_those_of_the_answers_one_by_one(made: list[Conversation], tmp_path: Path) -> None:
    reader = TokenReader(shards(made, tmp_path), SEQ_LEN)
    model, alone = tiny_model(vocab_size=400), tiny_model(vocab_size=400)
    token_nll(model, decode_rows(reader.read(np.arange(reader.num_rows)))).sum().backward()
    for each in made:
        by_hand(alone, each).backward()
    for (name, ours), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_conversation_cannot_see_its_neighbour(made: list[Conversation], tmp_path: Path, attention: str) -> None:
    reader = TokenReader(shards(made, tmp_path), SEQ_LEN)
    wire = reader.read(np.arange(reader.num_rows))
    row = next(row for row in wire if ((row < 0) & (row != PAD))[1:SEQ_LEN].any())
    border = 1 + int(np.argmax(((row < 0) & (row != PAD))[1:]))
    changed = row.copy()
    changed[1 : border - 1] = (token_ids(row[1 : border - 1]) + 7) % 390 | (row[1 : border - 1] & NO_LOSS)
    model = tiny_model(vocab_size=400, attention=attention).eval()
    with torch.no_grad():
        before, after = (token_nll(model, decode_rows(each[None])) for each in (row, changed))
    assert before[0, border:].sum() > 0
    assert not torch.equal(before[:, : border - 1], after[:, : border - 1])
    assert torch.equal(before[:, border:], after[:, border:])


def test_held_out_answers_are_scored_alone(made: list[Conversation], tmp_path: Path) -> None:
    held_out = HeldOutSet(shards(made, tmp_path), SEQ_LEN, 100_000)
    model = tiny_model(vocab_size=400).eval()
    score = evaluate_domains(model, {"chat": held_out}, batch_size=4)["chat"]
    assert score.tokens == sum(each.targets for each in made)
    assert score.bytes == sum(each.answer_bytes for each in made)
    with torch.no_grad():
        assert score.nll == pytest.approx(float(sum(by_hand(model, each) for each in made)), rel=1e-5)
    assert ((held_out.piece_of >= 0).sum()) == score.tokens


def test_the_flag_is_stripped_everywhere_and_text_rows_stay_as_they_were() -> None:
    documents = random_documents(3, low=10, high=20)
    plain = pack_row(documents, 64)
    flags = np.zeros(65, np.int32)
    flags[[0, 3, 4]] = NO_LOSS
    flagged = np.where(plain == PAD, PAD, np.where(plain < 0, ~(~plain | flags), plain | flags)).astype(np.int32)
    text, chat = decode_rows(plain), decode_rows(flagged)
    for name in ("input_ids", "position_ids", "segment_ids"):
        assert torch.equal(getattr(text, name), getattr(chat, name))
    assert (chat.targets[0, [2, 3]] == IGNORE).all() and (text.targets[0, [2, 3]] != IGNORE).all()
    kept = torch.ones(64, dtype=torch.bool)
    kept[[2, 3]] = False
    assert torch.equal(text.targets[0, kept], chat.targets[0, kept])
    assert np.array_equal(token_ids(flagged), text_ids(plain))


def text_ids(row: np.ndarray) -> np.ndarray:
    return np.where(row == PAD, 0, np.where(row < 0, ~row, row))
