"""A real classifier from a folder: its figures, its pieces and batches, and what it is refused for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from nexus_ray.config.filters import FiltersConfig, SafetyModel
from nexus_ray.errors import ConfigError
from nexus_ray.synthesis.filters.chain import build_chain, references
from nexus_ray.synthesis.filters.safety_model import classifier_fingerprint, load_classifier
from nexus_ray.synthesis.rows import Answer
from nexus_ray.synthesis.setup import AnswerJudge, JobSpec, open_job
from tests.jobs import FILTERS, job_config
from tests.tiny import EOS_ID, VOCAB_SIZE, tiny_tokenizer
from tests.unit.synthesis.filters.samples import ESSAY, STORY

LABELS = {0: "fine", 1: "toxic", 2: "obscene"}
SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
TEXTS = [STORY, "To be, or not to be.", ESSAY[:80], "def add(a, b): return a + b", "Yes."]


def save(folder: Path, model: Any, *, pad: bool = True) -> SafetyModel:
    tiny_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if pad:
        tokenizer.pad_token = tokenizer.eos_token
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return SafetyModel(model=str(folder), unsafe=["toxic", "obscene"], max_tokens=64, batch_size=4)


def bert(folder: Path, *, seed: int = 0, bias: float = 0.0, **changes: Any) -> SafetyModel:
    """A classifier of 10,000 random weights; `bias` pushes towards `toxic`."""
    torch.manual_seed(seed)
    settings = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 64, "pad_token_id": EOS_ID, "id2label": LABELS}
    model = BertForSequenceClassification(BertConfig(**{**SHAPE, **settings, **changes}))
    with torch.no_grad():
        model.classifier.weight.mul_(20.0)
        if bias:
            model.classifier.bias[1] = bias
    return save(folder, model)


def alone(config: SafetyModel, text: str) -> torch.Tensor:
    """Logits of a text that fits, by transformers itself."""
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    model = BertForSequenceClassification.from_pretrained(config.model).eval()
    with torch.inference_mode():
        return model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits[0].double()


def test_unsafe_labels_add_up_where_they_exclude_each_other(tmp_path: Path) -> None:
    config = bert(tmp_path)
    found = load_classifier(config)(TEXTS[1:])
    expected = [float(alone(config, text).softmax(0)[1:].sum()) for text in TEXTS[1:]]
    assert found == pytest.approx(expected, abs=1e-5) and len({round(value, 3) for value in found}) == 4
    assert load_classifier(config)(TEXTS) == load_classifier(config)(TEXTS)


def test_the_highest_counts_where_each_label_stands_alone(tmp_path: Path) -> None:
    config = bert(tmp_path, problem_type="multi_label_classification")
    expected = [float(alone(config, text).sigmoid()[1:].max()) for text in TEXTS[1:]]
    assert load_classifier(config)(TEXTS[1:]) == pytest.approx(expected, abs=1e-5)


def test_the_worst_piece_of_a_long_text_counts(tmp_path: Path) -> None:
    config = bert(tmp_path)
    classify = load_classifier(config)
    ids = AutoTokenizer.from_pretrained(tmp_path)(STORY)["input_ids"]
    assert len(ids) > 3 * 64, "or the text is no long one"
    pieces = [classify._harm([ids[start : start + 64]])[0] for start in range(0, len(ids), 64)]
    assert classify([STORY])[0] == pytest.approx(max(pieces), abs=1e-5) and max(pieces) > pieces[0]
    assert classify([""]) == [0.0]


def test_a_model_without_padding_is_asked_text_by_text(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = LlamaConfig(**SHAPE, vocab_size=VOCAB_SIZE, pad_token_id=None, id2label=LABELS)
    config = save(tmp_path, LlamaForSequenceClassification(shape), pad=False)
    classify = load_classifier(config)
    assert classify(TEXTS) == [classify([text])[0] for text in TEXTS]


def test_it_judges_in_the_chain_and_its_content_is_what_a_ledger_is_bound_to(tmp_path: Path) -> None:
    one, other = bert(tmp_path / "a", bias=50.0), bert(tmp_path / "b", seed=1)
    filters = FiltersConfig.model_validate({"safety": {"max_classifier": 0.01, "classifier": one.model_dump()}})
    verdict = build_chain(filters, classifier=load_classifier(one)).judge(STORY)
    assert verdict.reason == "safety_classifier: harmful" and verdict.scores["safety.classifier"] > 0.99
    assert references(filters) == {"classifier": classifier_fingerprint(one)}
    assert classifier_fingerprint(one) != classifier_fingerprint(other)
    assert classifier_fingerprint(one) != classifier_fingerprint(one.model_copy(update={"unsafe": ["toxic"]}))


def test_a_job_asks_it_and_another_one_is_another_job(tmp_path: Path) -> None:
    def opened(model: SafetyModel) -> JobSpec:
        safety = {"max_classifier": 0.01, "classifier": model.model_dump()}
        config = job_config(tmp_path, "http://127.0.0.1:1", filters={**FILTERS, "safety": safety}, unseen=[])
        return open_job(config, "sentences", {})

    spec = opened(bert(tmp_path / "a", bias=50.0))
    [request, *_] = spec.requests()
    text = "\n".join(f"{place}. Here is a line about thing {place}." for place in range(1, 11))
    rows = AnswerJudge(spec).rows(request, Answer(request.id(spec.job.revision), text, "stop", 1, 1))
    assert {verdict.reason for _, verdict in rows} == {"safety_classifier: harmful"} and len(rows) == 10
    moved = (tmp_path / "a").rename(tmp_path / "c")
    again = opened(SafetyModel(model=str(moved), unsafe=["toxic", "obscene"], max_tokens=64, batch_size=4))
    assert again.job == spec.job != opened(bert(tmp_path / "b", seed=1)).job


def test_what_cannot_judge_is_refused_by_field(tmp_path: Path) -> None:
    config = bert(tmp_path / "bert")
    with pytest.raises(ConfigError, match=r"unsafe='rude' is no label of .*; its labels are fine, toxic, obscene"):
        classifier_fingerprint(config.model_copy(update={"unsafe": ["rude"]}))
    with pytest.raises(ConfigError, match=r"classifier.max_tokens=512 exceeds the 64 tokens"):
        load_classifier(config.model_copy(update={"max_tokens": 512}))
    with pytest.raises(ConfigError, match=r"filters.safety.classifier.model=.*nowhere is not a folder"):
        load_classifier(config.model_copy(update={"model": str(tmp_path / "nowhere")}))
    writer = LlamaForCausalLM(LlamaConfig(**SHAPE, vocab_size=VOCAB_SIZE, id2label=LABELS))
    with pytest.raises(ConfigError, match=r"lacks the weights score\.weight: it was not trained as a classifier"):
        load_classifier(save(tmp_path / "llama", writer))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="this process sees no GPU"):
            load_classifier(config.model_copy(update={"device": "cuda"}))
