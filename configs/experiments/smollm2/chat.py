"""Chat with every finished arm's export through plain `transformers` (which finds an adapter's base by itself).

python configs/experiments/smollm2/chat.py runs
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

QUESTION = "What is the capital of France?"


def main(storage: Path) -> None:
    logging.set_verbosity_error()
    for entry in json.loads((storage / "smollm2-grid" / "results.json").read_text())["runs"]:
        if entry["outcome"] == "done":
            print(f"{entry['arm']}: {answer(next((storage / entry['name'] / 'stages').glob('*/model')))}")


def answer(place: Path) -> str:
    """What the model in a folder says, greedily."""
    tokenizer = AutoTokenizer.from_pretrained(place)
    model = AutoModelForCausalLM.from_pretrained(place)
    turns = [{"role": "user", "content": QUESTION}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    asked = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    written = model.generate(**asked, max_new_tokens=24, do_sample=False)
    return str(tokenizer.decode(written[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs"))
