"""A real chat model out of a GGUF file in a package: converted once, loaded as any folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from nexus_ray.config import load_config
from nexus_ray.models.build import build_model
from nexus_ray.models.local import with_local_model

pytestmark = pytest.mark.slow
CONFIG = Path(__file__).resolve().parents[2] / "configs" / "experiments" / "smollm2" / "run.yaml"


def test_smollm2_is_converted_once_and_answers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    config = load_config(CONFIG, [f"storage={tmp_path}"])
    said: list[str] = []
    local = with_local_model(config, progress=said.append)
    assert with_local_model(config, progress=said.append) == local and len(said) == 1
    tokenizer = AutoTokenizer.from_pretrained(local.model.source)
    model = build_model(local.model, vocab_size=len(tokenizer), eos_id=tokenizer.eos_token_id, seed=0)
    assert tokenizer.chat_template and model.num_parameters() == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(model.generate(**ids, max_new_tokens=4, do_sample=False)[0])
