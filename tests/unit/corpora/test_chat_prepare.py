"""A chat domain prepared as a whole: rows of whole conversations, counts, what is left out, and text left as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from nexus_ray.config import RunConfig, parse_config
from nexus_ray.corpora import build as build_module
from nexus_ray.corpora import prepare as prepare_module
from nexus_ray.corpora.build import settings_hash
from nexus_ray.corpora.conversations import messages_of
from nexus_ray.corpora.documents import iter_documents
from nexus_ray.corpora.manifest import TokenManifest
from nexus_ray.corpora.prepare import PreparedData, find_prepared, prepare, shared_storage
from nexus_ray.corpora.reader import NO_LOSS, PAD, TokenReader, token_ids
from nexus_ray.corpora.sources import open_source
from nexus_ray.corpora.tokens import base_fingerprint
from nexus_ray.corpora.verify import verify_shard
from nexus_ray.errors import ConfigError, DataError
from nexus_ray.evaluate.held_out import HeldOutSet
from nexus_ray.stream.curriculum import stage_segments
from nexus_ray.stream.plan import Plan
from nexus_ray.stream.rows import StageStream, row_hashes
from tests.chats import chat_tokenizer, conversations, talk, write_jsonl
from tests.corpus import sentences
from tests.unit.corpora.test_prepare import run_here

SEQ_LEN = 128
SETTINGS, BASE = "32fdea5dd6254448", "0ee461e09f179e8d"
"""Hashes of a text domain's settings, from the version before there were conversations."""


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (build_module, prepare_module):
        monkeypatch.setattr(module, "run_tasks", run_here)


def config_of(root: Path, *overrides: str, **model: Any) -> RunConfig:
    """A stage of text, then one of conversations that replays it."""
    if not (root / "sea.txt").exists():
        (root / "sea.txt").write_text("\n".join(sentences(300)))
    if not (root / "chat.jsonl").exists():
        write_jsonl(root / "chat.jsonl", conversations(300))
    data = {
        "name": "sft",
        "storage": str(root / "runs"),
        "model": {"tokenizer": {"vocab_size": 340, **model}},
        "domains": {
            "sea": {"source": {"kind": "files", "paths": [str(root / "sea.txt")], "split_on": "(?m)^"}},
            "helper": {"format": "chat", "source": {"kind": "files", "paths": [str(root / "chat.jsonl")]}},
        },
        "stages": [
            {"name": "sea", "domains": {"sea": 1}},
            {"name": "helper", "kind": "sft", "domains": {"helper": 1}},
        ],
        "training": {"seq_len": SEQ_LEN, "global_batch_tokens": 8 * SEQ_LEN, "token_budget": 80 * SEQ_LEN},
        "data": {"shard_tokens": 2048},
    }
    return parse_config(data, overrides)


def stored(manifest: TokenManifest) -> list[tuple[str, np.ndarray]]:
    """(id, tokens with flags) of every document, by the table."""
    found = []
    for shard in manifest.shards:
        tokens = pq.read_table(manifest.folder.path(shard.file)).column("tokens").to_numpy()
        assert len(tokens) == shard.tokens and shard.tokens % SEQ_LEN == 0
        used = np.zeros(len(tokens), bool)
        for row in pq.read_table(manifest.folder.path(shard.table)).to_pylist():
            part = slice(row["offset"], row["offset"] + row["tokens"])
            assert not used[part].any() and part.start // SEQ_LEN == (part.stop - 1) // SEQ_LEN
            used[part] = True
            found.append((row["id"], tokens[part]))
        assert (tokens[~used] == PAD).all() and (~used).sum() == shard.padding
    return found


def test_rows_hold_every_conversation_once_and_whole(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    config = config_of(tmp_path)
    data = prepare(config)
    assert find_prepared(config) == data
    helper = data.domains["helper"]
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer_dir())
    said = {row["id"]: messages_of(row["text"]) for row in iter_documents(helper.manifest)}  # type: ignore[arg-type]
    everything = stored(helper.train) + stored(helper.held_out)
    assert sorted(name for name, _ in everything) == sorted(said) and len(said) == 300
    for name, tokens in everything:
        whole = tokenizer.apply_chat_template(said[name], tokenize=False)
        assert tokenizer.decode(token_ids(tokens)) == whole
        learned = tokenizer.decode(token_ids(tokens)[tokens & NO_LOSS == 0])
        answers = [turn["content"] for turn in said[name] if turn["role"] == "assistant"]
        assert learned == "".join(answer + tokenizer.eos_token for answer in answers)
    for manifest in (helper.train, helper.held_out):
        assert manifest.seq_len == SEQ_LEN and manifest.documents == len(stored(manifest))
        assert manifest.tokens == sum(len(tokens) for _, tokens in stored(manifest))
        assert manifest.targets == sum(int((tokens & NO_LOSS == 0).sum()) for _, tokens in stored(manifest))
        for shard in manifest.shards:
            verify_shard(manifest, shard)
    assert len(helper.train.shards) > 2
    stats = helper.stats
    assert stats["answer_tokens"] == helper.train.targets and stats["padding_tokens"] == helper.train.padding > 0
    assert 0.8 < stats["packing_efficiency"] < 1 and stats["too_long_dropped"] == 0


def test_the_stream_mixes_conversations_with_replayed_text(tmp_path: Path) -> None:
    config = config_of(tmp_path, "continual.replay_ratio=0.25")
    data = prepare(config)
    manifests = {name: domain.train for name, domain in data.domains.items()}
    plan = Plan(0, SEQ_LEN, 64).append(stage_segments(config, 1, manifests, start_row=0))
    stream = StageStream(plan, manifests, 0, 8, 10)
    rows = stream.part(0, 10, rank=0, rows_per_rank=8)
    of_chat = rows.domain == plan.domains.index("helper")
    assert rows.replayed.sum() == 20 and (rows.replayed == ~of_chat).all() and row_hashes(rows) > 0
    for row in rows.tokens[of_chat]:
        inside = row[:-1][row[:-1] != PAD]
        starts = np.where(inside < 0, ~inside, inside)
        assert row[0] < 0 and (starts & NO_LOSS != 0).any() and (token_ids(row) < data.vocab_size).all()
        assert row[-1] < 0, "the last column is the next row's first token, or padding"
    text = rows.tokens[~of_chat]
    assert (np.where(text < 0, ~text, text)[text != PAD] < data.vocab_size).all()
    held_out = HeldOutSet(data.domains["helper"].held_out, SEQ_LEN, 10_000)
    answers = [
        turn["content"]
        for row in iter_documents(
            data.domains["helper"].manifest,
            split="held_out",  # type: ignore[arg-type]
            held_out_fraction=0.05,
        )
        for turn in messages_of(row["text"])
        if turn["role"] == "assistant"
    ]
    assert held_out.bytes_by_document.sum() == len("".join(answers).encode())


def test_text_is_prepared_as_ever(tmp_path: Path) -> None:
    """Settings, names and shards of a text domain are those it had before there were conversations."""
    both = config_of(tmp_path)
    source = open_source("sea", both.domains["sea"], shared_storage(both))
    assert set(source.settings()) == {"kind", "format", "text_field", "where", "split_on", "max_documents"}
    fixed = type(source)("sea", both.domains["sea"].source.model_copy(update={"paths": ["x"]}))  # type: ignore[call-arg]
    assert settings_hash(fixed) == SETTINGS
    assert base_fingerprint("train", "t", 0.05) == BASE
    data = prepare(both)
    alone = parse_config(
        {
            **both.model_dump(mode="json"),
            "storage": str(tmp_path / "alone"),
            "anchors": [],
            "domains": {"sea": both.domains["sea"].model_dump(mode="json")},
            "stages": [both.stages[0].model_dump(mode="json")],
        }
    )
    text_only = prepare(alone)
    for split in ("train", "held_out"):
        ours, theirs = (getattr(each.domains["sea"], split) for each in (data, text_only))
        assert ours.shards == theirs.shards and ours.fingerprint == theirs.fingerprint
        assert ours.seq_len is None and ours.padding == 0 and ours.targets == ours.tokens - ours.documents
    assert "packing_efficiency" not in data.domains["sea"].stats
    assert data.tokenizer_fingerprint == text_only.tokenizer_fingerprint
    assert not text_only.tokenizer.exists("chat_template.jinja") and data.tokenizer.exists("chat_template.jinja")


def test_a_manifest_from_before_conversations_is_read(tmp_path: Path) -> None:
    sea = prepare(config_of(tmp_path)).domains["sea"].train
    old = sea.to_json()
    del old["seq_len"]
    for shard in old["shards"]:
        del shard["padding"], shard["answers"]
    assert TokenManifest.from_json(json.loads(json.dumps(old)), root=sea.root) == sea


def test_another_row_length_or_template_makes_other_shards(tmp_path: Path) -> None:
    first = prepare(config_of(tmp_path))
    longer = prepare(config_of(tmp_path, "training.seq_len=256"))
    template = tmp_path / "mine.jinja"
    text = (first.tokenizer_dir() / "chat_template.jinja").read_text()
    template.write_text(text.replace("### ", "## "))
    other = prepare(config_of(tmp_path, chat_template=str(template)))
    roots = {each.domains["helper"].train.root for each in (first, longer, other)}
    assert len(roots) == 3
    assert {each.domains["sea"].train.root for each in (first, longer, other)} == {first.domains["sea"].train.root}
    assert first.domains["helper"].documents == longer.domains["helper"].documents
    with pytest.raises(DataError, match=r"domain helper .* laid out in rows of 128 tokens, and rows of 256"):
        TokenReader(first.domains["helper"].train, 256)


def test_grown_domains_keep_their_rows(tmp_path: Path) -> None:
    config = config_of(tmp_path, f"domains.helper.source.paths=[{tmp_path}/chats]")
    write_jsonl(tmp_path / "chats" / "0.jsonl", conversations(200))
    before = prepare(config).domains["helper"].train
    write_jsonl(tmp_path / "chats" / "1.jsonl", conversations(60, seed=5))
    after = prepare(config).domains["helper"].train
    assert after.prefix(len(before.shards)).fingerprint == before.fingerprint and after.documents > before.documents
    rows = np.arange(before.rows(SEQ_LEN))
    assert np.array_equal(TokenReader(before, SEQ_LEN).read(rows), TokenReader(after, SEQ_LEN).read(rows))


def test_what_is_too_long_is_counted_and_most_of_it_is_an_error(tmp_path: Path) -> None:
    said: list[str] = []
    long = talk("the sea?", "the king spoke " * 60)
    write_jsonl(tmp_path / "chat.jsonl", [*conversations(80, words=4), long, talk("<|endoftext|>?", "yes")])
    data: PreparedData = prepare(config_of(tmp_path), progress=said.append)
    stats = data.domains["helper"].stats
    assert (stats["too_long_dropped"], stats["special_token_dropped"], stats["documents"]) == (1, 1, 82)
    assert stats["tokens_dropped"] > SEQ_LEN
    assert data.domains["helper"].train.documents + data.domains["helper"].held_out.documents == 80
    [warning] = [line for line in said if line.startswith("warning")]
    assert "domains.helper: 2 of 82 conversations left out: 1 longer than training.seq_len=128" in warning
    assert "1 not fit for the chat template (the first, document " in warning
    with pytest.raises(
        DataError, match=r"conversations left out: .* longer than training.seq_len=16 .*; raise training"
    ):
        prepare(config_of(tmp_path, "training.seq_len=16"))


def test_a_shard_of_which_nothing_is_left(tmp_path: Path) -> None:
    chats = [*(talk(f"{i}?", "the king spoke " * 60) for i in range(30)), *conversations(120, words=4)]
    write_jsonl(tmp_path / "chat.jsonl", chats)
    train = prepare(config_of(tmp_path, "data.shard_tokens=1024")).domains["helper"].train
    assert 0 in [shard.documents for shard in train.shards] and train.rows(SEQ_LEN) > 2
    for shard in train.shards:
        verify_shard(train, shard)
    rows = TokenReader(train, SEQ_LEN).read(np.arange(train.rows(SEQ_LEN)))
    assert (rows[:, 0] < 0).all() and (rows[:, 0] != PAD).all()


def test_bad_records_name_file_and_line(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "chat.jsonl", conversations(80))
    file.write_text(file.read_text() + '{"messages": [{"role": "robot", "content": "x"}]}\n')
    with pytest.raises(DataError, match=r"chat.jsonl, line 81: field 'messages', turn 0 has the role 'robot'"):
        prepare(config_of(tmp_path))
    write_jsonl(file, [*conversations(80), [], talk("who?", " ")])
    assert prepare(config_of(tmp_path)).domains["helper"].stats["empty_dropped"] == 2


def test_ready_made_tokenizers_and_their_templates(tmp_path: Path) -> None:
    own = chat_tokenizer(tmp_path / "llama3", "llama3")
    data = prepare(config_of(tmp_path, source=str(own)))
    assert data.tokenizer.exists("chat_template.jinja") and data.domains["helper"].train.targets > 0
    bare = chat_tokenizer(tmp_path / "bare", "chatml")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match=r"model.tokenizer.chat_template: .*bare has no chat template.*`default`"):
        prepare(config_of(tmp_path, source=str(bare)))
    given = prepare(config_of(tmp_path, source=str(bare), chat_template="default"))
    assert "### " in given.tokenizer.read_bytes("chat_template.jinja").decode()
    with pytest.raises(ConfigError, match=r"chat_template='.*nowhere.jinja' cannot be read"):
        prepare(config_of(tmp_path, chat_template=str(tmp_path / "nowhere.jinja")))


def test_exports_chat(tmp_path: Path) -> None:
    """A tokenizer trained here goes into the export with its template, and one of its answers ends the generation."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nexus_ray.models.export import export_model
    from tests.tiny import tiny_model

    data = prepare(config_of(tmp_path))
    model = tiny_model(vocab_size=data.vocab_size)
    out = export_model(model, data.tokenizer_dir(), tmp_path / "model")
    tokenizer, loaded = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    asked = talk("who?", "the king.", "where?", system="be brief")
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert text == (
        "### System\nbe brief\n\n### User\nwho?\n\n### Assistant\nthe king.<|endoftext|>\n\n"
        "### User\nwhere?\n\n### Assistant\n"
    )
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert loaded.generate(**ids, max_new_tokens=2, do_sample=False).shape[1] > ids["input_ids"].shape[1]
    assert loaded.config.eos_token_id == tokenizer.eos_token_id
    again = prepare(config_of(tmp_path, source=str(out)))  # a later run that starts from the export
    rows = [TokenReader(each.domains["helper"].train, SEQ_LEN) for each in (data, again)]
    everything = np.arange(rows[0].num_rows)
    assert np.array_equal(rows[0].read(everything), rows[1].read(everything))
