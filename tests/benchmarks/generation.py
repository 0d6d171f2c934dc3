"""Local generation: SmolLM2-135M one answer at a time, in static batches, and by continuous batching.

One model, prompts of the stories recipe, the same sampling. Tokens are those of answers, up to each one's own limit;
limits vary by a factor of five, as answers do (a static batch ends with its longest). All run in one process with the
allocator settings that a session gives its workers. One at a time is also measured in the other precision, and counts
in the better one.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from nexus_ray.config.load import load_config
from nexus_ray.models.decode import Decoder, Job
from nexus_ray.models.local import with_local_model
from nexus_ray.session import KEEP_MEMORY
from nexus_ray.synthesis.prompts import PromptPlan, load_recipe
from tests.benchmarks.figures import Bar, Outcome

ROOT = Path(__file__).resolve().parents[2]
SAMPLING = {"temperature": 0.8, "top_p": 0.95}


def run(folder: Path, *, threads: int, dtype: str, slots: int, answers: int, longest: int, alone: int) -> Outcome:
    outcome = Outcome(
        f"generation: tokens/s of SmolLM2-135M, answers of {longest // 5} to {longest} tokens, {threads} threads",
        ("", "alone", f"static {slots}", f"continuous {slots}", "over alone", "over static"),
    )
    config = load_config(ROOT / "configs" / "experiments" / "smollm2" / "run.yaml", [f"storage={folder / 'runs'}"])
    place = with_local_model(config).model.source
    other = "float32" if dtype == "bfloat16" else "bfloat16"
    for precision, order in ((dtype, ORDER), (other, ("alone",))):
        with (
            patch.dict(os.environ, KEEP_MEMORY),  # glibc reads them when a process begins
            ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool,
        ):
            work = pool.submit(_measure, place, precision, order, threads, slots, answers, longest, alone)
            outcome.samples[precision] = work.result()
    rates = {name: median(found) for name, found in outcome.samples[dtype].items()}
    ours, best = rates["continuous"], max(rates["alone"], median(outcome.samples[other]["alone"]))
    outcome.rows.append((dtype, rates["alone"], rates["static"], ours, ours / rates["alone"], ours / rates["static"]))
    outcome.notes.append(f"alone in {other}: {median(outcome.samples[other]['alone']):.1f} tokens/s")
    outcome.bars.append(Bar("continuous over one at a time in the better precision", ours / best, 12.0))
    outcome.bars.append(Bar("continuous over static batches", ours / rates["static"], 1.2))
    return outcome


ORDER = ("alone", "continuous", "alone", "static", "alone")
STATIC_BATCHES = 2
"""As many as are measured: each takes as long as its longest answer, whatever follows."""


def _measure(
    place: str, dtype: str, order: Sequence[str], threads: int, slots: int, answers: int, longest: int, alone: int
) -> dict[str, list[float]]:
    """Tokens per second of each way, by turn."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(place)
    plan = PromptPlan(load_recipe(ROOT / "configs" / "prompts" / "stories.yaml"))
    prompts = [_ids(tokenizer, plan[i]) for i in range(answers)]
    limits = np.random.default_rng(0).integers(longest // 5, longest + 1, answers).tolist()
    model = AutoModelForCausalLM.from_pretrained(place, dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None  # every answer runs to its limit: all do the same work
    ways: dict[str, tuple[Callable[..., None], int]] = {
        "alone": (partial(_static, model, batch=1), alone),
        "static": (partial(_static, model, batch=slots), min(answers, STATIC_BATCHES * slots)),
        "continuous": (partial(_continuous, model, slots=slots), answers),
    }
    rates: dict[str, list[float]] = {}
    for name in order:
        work, count = ways[name]
        rates.setdefault(name, []).append(_rate(partial(work, prompts[:count], limits[:count]), limits[:count]))
    return rates


def _ids(tokenizer: Any, prompt: Any) -> list[int]:
    turns = [{"role": turn.role, "content": turn.content} for turn in prompt.content]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return [int(id) for id in tokenizer(text, add_special_tokens=False)["input_ids"]]


def _rate(work: Callable[[], None], limits: Sequence[int]) -> float:
    began = time.perf_counter()
    work()
    return sum(limits) / (time.perf_counter() - began)


def _static(model: Any, prompts: Sequence[list[int]], limits: Sequence[int], *, batch: int) -> None:
    model.set_attn_implementation("sdpa")  # as it comes
    for first in range(0, len(prompts), batch):
        some, most = prompts[first : first + batch], max(limits[first : first + batch])
        longest = max(map(len, some))
        ids = torch.tensor([[0] * (longest - len(one)) + one for one in some])
        mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in some])
        model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=most, do_sample=True, top_k=0, pad_token_id=0, **SAMPLING
        )


def _continuous(model: Any, prompts: Sequence[list[int]], limits: Sequence[int], *, slots: int) -> None:
    jobs = (Job(str(i), one, limit, **SAMPLING) for i, (one, limit) in enumerate(zip(prompts, limits, strict=True)))
    written = sum(len(one.tokens) for one in Decoder(model, slots=slots, end_tokens=[]).run(jobs))
    assert written == sum(limits)


SETTINGS = {"threads": 2, "dtype": "bfloat16", "slots": 64, "answers": 256, "longest": 320, "alone": 3}
QUICK = {"threads": 1, "dtype": "bfloat16", "slots": 4, "answers": 6, "longest": 10, "alone": 1}
