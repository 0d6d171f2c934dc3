"""What is exported loads with plain transformers, says the same and generates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nexus_ray.models.export import export_model
from nexus_ray.models.sample import continue_text
from tests.tiny import EOS_ID, TEXTS, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_export_loads_with_plain_transformers(tmp_path: Path, tokenizer_dir: Path) -> None:
    model = tiny_model()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "stale").touch()
    out = export_model(model, tokenizer_dir, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert "stale" not in names
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert all(torch.equal(part, model.state_dict()[name]) for name, part in loaded.state_dict().items())
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id == EOS_ID
    original = AutoTokenizer.from_pretrained(tokenizer_dir)
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == original.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
    output = loaded.generate(torch.tensor([[5, 6]]), max_new_tokens=4, do_sample=False, pad_token_id=EOS_ID)
    assert output.shape[1] <= 6


def test_export_of_other_weights_in_another_precision(tmp_path: Path, tokenizer_dir: Path) -> None:
    weights = tiny_model(seed=1).state_dict()
    out = export_model(tiny_model(), tokenizer_dir, tmp_path / "m", state_dict=weights, dtype=torch.bfloat16)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == torch.bfloat16
    assert all(torch.equal(part, weights[name].bfloat16()) for name, part in loaded.state_dict().items())
    single = (out / "model.safetensors").stat().st_size
    assert single < 2 * sum(p.numel() for p in loaded.parameters()) + 10_000  # tied embeddings once


def test_continuations_repeat(tokenizer_dir: Path) -> None:
    model, tokenizer = tiny_model().train(), AutoTokenizer.from_pretrained(tokenizer_dir)

    def write(temperature: float, seed: int, prompt: str = TEXTS[0]) -> str:
        return continue_text(model, tokenizer, prompt, max_new_tokens=12, temperature=temperature, seed=seed)

    state = torch.random.get_rng_state()
    assert write(0.0, 0) == write(0.0, 1)
    assert write(1.0, 3) == write(1.0, 3)
    assert write(1.0, 3) != write(1.0, 4)
    assert not write(0.0, 0).startswith(TEXTS[0])
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.training
    assert isinstance(write(0.0, 0, prompt=""), str)
    assert isinstance(write(0.0, 0, prompt="long " * 400), str)
