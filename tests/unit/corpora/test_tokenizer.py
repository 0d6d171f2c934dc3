"""Tokenizers: trained alike each time, loadable by transformers, with an EOS of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nexus_ray.config.tree import ModelConfig, TokenizerConfig
from nexus_ray.corpora.documents import DocumentManifest, iter_documents
from nexus_ray.corpora.tokenizer import (
    EOS,
    TrainingPart,
    build_tokenizer,
    check_init_tokenizer,
    find_tokenizer,
    folder_name,
    sample_texts,
    train_bpe,
)
from nexus_ray.errors import ConfigError
from nexus_ray.storage import Storage
from tests.corpus import sentences
from tests.unit.corpora.test_documents import manifest_of


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> DocumentManifest:
    return manifest_of(tmp_path_factory.mktemp("documents"), sentences(300))


def silent(message: str) -> None:
    pass


def model(source: str = "train", **settings: object) -> ModelConfig:
    tokenizer = {"source": source, "vocab_size": 320}
    return ModelConfig.model_validate({"tokenizer": tokenizer, **settings})


def test_training_is_repeatable(documents: DocumentManifest) -> None:
    config = TokenizerConfig(vocab_size=320)
    first = train_bpe(config, [TrainingPart(documents, 0.1)])
    assert first == train_bpe(config, [TrainingPart(documents, 0.1)])
    assert first != train_bpe(config, [TrainingPart(documents, 0.5)])


def test_transformers_loads_it(documents: DocumentManifest, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = Storage(str(tmp_path / "tok"))
    assert find_tokenizer(folder) is None
    manifest = build_tokenizer(model(), [TrainingPart(documents, 0.1)], folder, progress=silent)
    assert find_tokenizer(folder) == manifest
    loaded = AutoTokenizer.from_pretrained(folder.uri)
    assert loaded.eos_token_id == manifest.eos_id and loaded.eos_token == EOS and loaded.pad_token is None
    assert len(loaded) == manifest.vocab_size == 320
    text = "The king , said: Zürich's \t 漢字 🙂\n"
    assert loaded.decode(loaded.encode(text)) == text


def test_a_saved_tokenizer_is_taken_over(documents: DocumentManifest, tmp_path: Path) -> None:
    original = Storage(str(tmp_path / "original"))
    trained = build_tokenizer(model(), [TrainingPart(documents, 0.1)], original, progress=silent)
    taken = build_tokenizer(model(original.uri), [], Storage(str(tmp_path / "copy")), progress=silent)
    assert (taken.vocab_size, taken.eos_id, taken.source) == (trained.vocab_size, trained.eos_id, original.uri)
    from_run = model("model", init_from=original.uri)
    assert folder_name(from_run, []) == folder_name(model(original.uri), [])


def test_no_eos_is_refused(documents: DocumentManifest, tmp_path: Path) -> None:
    folder = Storage(str(tmp_path / "tok"))
    build_tokenizer(model(), [TrainingPart(documents, 0.1)], folder, progress=silent)
    settings = {**folder.read_json("tokenizer_config.json"), "pad_token": EOS}
    settings.pop("eos_token")
    folder.write_json(settings, "tokenizer_config.json")
    folder.delete("special_tokens_map.json")
    with pytest.raises(ConfigError, match=r"has no EOS token.*\(a pad token is no substitute\); add eos_token"):
        build_tokenizer(model(folder.uri), [], Storage(str(tmp_path / "copy")), progress=silent)


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(
        ConfigError, match=r"model.tokenizer.source=.*: no tokenizer can be loaded .*; give a directory"
    ):
        build_tokenizer(model(str(tmp_path)), [], Storage(str(tmp_path / "copy")), progress=silent)
    with pytest.raises(ConfigError, match=r"model.source=scratch has no tokenizer; set model.tokenizer.source"):
        folder_name(model("model"), [])


def test_weights_that_came_with_another_tokenizer(documents: DocumentManifest, tmp_path: Path) -> None:
    parts = [TrainingPart(documents, 0.1)]
    ours, export = Storage(str(tmp_path / "ours")), tmp_path / "model"
    build_tokenizer(model(), parts, ours, progress=silent)
    settings = model(init_from=str(export))
    check_init_tokenizer(settings, ours)  # no model there: another check's business
    export.mkdir()
    (export / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"model.init_from=.*none there.*set model.tokenizer: {source: model}"):
        check_init_tokenizer(settings, ours)
    (export / "tokenizer.json").write_bytes(ours.read_bytes("tokenizer.json"))
    check_init_tokenizer(settings, ours)
    build_tokenizer(model(tokenizer={"vocab_size": 310}), parts, Storage(str(tmp_path / "theirs")), progress=silent)
    (export / "tokenizer.json").write_bytes((tmp_path / "theirs" / "tokenizer.json").read_bytes())
    with pytest.raises(ConfigError, match=r"came with another tokenizer than model.tokenizer.source='train' makes"):
        check_init_tokenizer(settings, ours)


def test_samples_are_even_bounded_and_never_held_out(documents: DocumentManifest) -> None:
    part = TrainingPart(documents, 0.2)
    train = [row["text"] for row in iter_documents(documents, split="train", held_out_fraction=0.2)]
    assert list(sample_texts(part, 10**9)) == train
    budget = sum(map(len, train)) // 2
    some = list(sample_texts(part, budget))
    assert budget * 0.7 < sum(map(len, some)) <= budget and set(some) <= set(train)
    assert any(text in train[-20:] for text in some)
