"""Local generation: SmolLM2-135M one answer at a time, in static batches, and by continuous batching.

One model, prompts of the stories recipe, the same sampling. Tokens are those of answers, up to each one's own limit;
limits vary by a factor of five, as answers do (a static batch ends with its longest).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from nexus_ray.config.load import load_config
from nexus_ray.models.decode import Decoder, Job
from nexus_ray.models.local import with_local_model
from nexus_ray.synthesis.prompts import PromptPlan, load_recipe
from tests.benchmarks.figures import Bar, Outcome

ROOT = Path(__file__).resolve().parents[2]
SAMPLING = {"temperature": 0.8, "top_p": 0.95}


def run(folder: Path, *, threads: int, slots: int, answers: int, longest: int, alone: int, rounds: int) -> Outcome:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(threads)
    config = load_config(ROOT / "configs" / "experiments" / "smollm2" / "run.yaml", [f"storage={folder / 'runs'}"])
    place = with_local_model(config).model.source
    tokenizer = AutoTokenizer.from_pretrained(place)
    plan = PromptPlan(load_recipe(ROOT / "configs" / "prompts" / "stories.yaml"))
    prompts = [_ids(tokenizer, plan[i]) for i in range(answers)]
    limits = np.random.default_rng(0).integers(longest // 5, longest + 1, answers).tolist()
    outcome = Outcome(
        f"generation: tokens/s of SmolLM2-135M, answers of {longest // 5} to {longest} tokens, {threads} threads",
        ("", "alone", f"static {slots}", f"continuous {slots}", "over alone", "over static"),
    )
    for dtype in ("bfloat16", "float32"):
        model = AutoModelForCausalLM.from_pretrained(place, dtype=getattr(torch, dtype)).eval()
        model.generation_config.eos_token_id = None  # every answer runs to its limit: both do the same work
        rates: dict[str, list[float]] = {"alone": [], "static": [], "continuous": []}
        for _ in range(rounds):
            rates["alone"].append(_rate(partial(_static, model, prompts[:alone], limits[:alone], 1), limits[:alone]))
            rates["static"].append(_rate(partial(_static, model, prompts, limits, slots), limits))
            rates["continuous"].append(_rate(partial(_continuous, model, prompts, limits, slots), limits))
        one, static, ours = (median(rates[name]) for name in ("alone", "static", "continuous"))
        outcome.rows.append((dtype, one, static, ours, ours / one, ours / static))
        outcome.samples[dtype] = rates
    best = max(outcome.rows, key=lambda row: row[3])
    base = max(row[1] for row in outcome.rows)
    outcome.bars.append(Bar("continuous over one at a time, the better precision of each", best[3] / base, 12.0))
    outcome.bars.append(Bar(f"continuous over static batches, {best[0]}", best[5], 1.2))
    return outcome


def _ids(tokenizer: Any, prompt: Any) -> list[int]:
    turns = [{"role": turn.role, "content": turn.content} for turn in prompt.content]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return [int(id) for id in tokenizer(text, add_special_tokens=False)["input_ids"]]


def _rate(work: Callable[[], None], limits: Sequence[int]) -> float:
    began = time.perf_counter()
    work()
    return sum(limits) / (time.perf_counter() - began)


def _static(model: Any, prompts: Sequence[list[int]], limits: Sequence[int], batch: int) -> None:
    for first in range(0, len(prompts), batch):
        some, most = prompts[first : first + batch], max(limits[first : first + batch])
        longest = max(map(len, some))
        ids = torch.tensor([[0] * (longest - len(one)) + one for one in some])
        mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in some])
        model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=most, do_sample=True, top_k=0, pad_token_id=0, **SAMPLING
        )


def _continuous(model: Any, prompts: Sequence[list[int]], limits: Sequence[int], slots: int) -> None:
    jobs = (Job(str(i), one, limit, **SAMPLING) for i, (one, limit) in enumerate(zip(prompts, limits, strict=True)))
    written = sum(len(one.tokens) for one in Decoder(model, slots=slots, end_tokens=[]).run(jobs))
    assert written == sum(limits)


SETTINGS = {"threads": 2, "slots": 64, "answers": 160, "longest": 320, "alone": 3, "rounds": 1}
QUICK = {"threads": 1, "slots": 4, "answers": 6, "longest": 10, "alone": 1, "rounds": 1}
