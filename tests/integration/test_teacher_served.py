"""A loopback teacher that is a real OpenAI-compatible server: `transformers serve` with a tiny model, started by us."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nexus_ray.config.generators import BudgetConfig, ServedGenerator
from nexus_ray.synthesis.budget import Budget
from nexus_ray.synthesis.generators.gate import LocalGate
from nexus_ray.synthesis.generators.protocol import generate
from nexus_ray.synthesis.generators.served import ServedTeacher, served_teacher
from nexus_ray.synthesis.jail.inside import descendants
from nexus_ray.synthesis.rows import Answer, Message, Prompt, Request, Sampling
from nexus_ray.synthesis.throttle import Throttle
from tests.tiny import TEXTS, tiny_model, tiny_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
PROMPTS, CANDIDATES, MAX_TOKENS = 12, 3, 16
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model that draws at random and writes a few tokens at least: an empty answer is none."""
    place = tmp_path_factory.mktemp("served") / "tiny"
    tiny_model().save_pretrained(place)
    shutil.copytree(tiny_tokenizer(place.parent / "tokenizer"), place, dirs_exist_ok=True)
    (place / "chat_template.jinja").write_text(TEMPLATE)
    sampling = {"do_sample": True, "min_new_tokens": 4, "eos_token_id": 0, "pad_token_id": 0}
    (place / "generation_config.json").write_text(json.dumps(sampling))
    return place


def served(folder: Path, budget: Budget | None = None, **settings: Any) -> tuple[ServedTeacher, Path]:
    log = folder.parent / f"server-{time.monotonic_ns()}.log"
    config = ServedGenerator.model_validate(
        {
            "kind": "served",
            "server": "transformers",
            "model": str(folder),
            "gpus": 0,
            "options": {"device": "cpu"},
            "throttle": {"max_in_flight": 8},
            "log": str(log),
            **settings,
        }
    )
    gate = LocalGate(Throttle(config.throttle, clock=time.monotonic), model=config.model, budget=budget)
    return served_teacher(config, gate=gate), log


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Iterator[tuple[ServedTeacher, Path, Budget]]:
    budget = Budget(BudgetConfig(), models=[str(folder)], clock=time.monotonic)
    teacher, log = served(folder, budget)
    with teacher:
        yield teacher, log, budget


def conversations() -> list[Request]:
    prompts = [Prompt((Message("user", f"{TEXTS[i % 3]} number {i}"),)) for i in range(PROMPTS)]
    return [Request(prompt, Sampling(max_tokens=MAX_TOKENS), k) for prompt in prompts for k in range(CANDIDATES)]


def calls_in(log: Path) -> int:
    return log.read_text().count("[Request received]")


def test_nothing_is_lost_and_nothing_repeated(teacher: tuple[ServedTeacher, Path, Budget], folder: Path) -> None:
    from transformers import AutoTokenizer

    served, log, budget = teacher
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = conversations()
    found = list(generate(served, asked))
    answers = {item.request_id: item for item in found if isinstance(item, Answer)}
    assert len(found) == len(answers) == len(asked)
    assert set(answers) == {request.id(served.revision) for request in asked}
    assert served.stats.sent == calls_in(log) == len(asked) == budget.spent.requests, "each was sent once, as it saw"
    assert 1 < served.stats.peak_in_flight <= 8
    for request in asked:
        answer = answers[request.id(served.revision)]
        content = request.prompt.content[0].content  # type: ignore[union-attr]
        assert answer.prompt_tokens == len(tokenizer(f"user: {content}\nassistant:")["input_ids"])
        assert 4 <= answer.completion_tokens <= MAX_TOKENS and answer.text
        assert (answer.finish_reason == "length") == (answer.completion_tokens == MAX_TOKENS)
    texts = Counter(answer.text for answer in answers.values())
    assert max(texts.values()) == 1, "candidates of one prompt differ"
    used = [sum(getattr(answer, f"{part}_tokens") for answer in answers.values()) for part in ("prompt", "completion")]
    assert [budget.spent.prompt_tokens, budget.spent.completion_tokens] == used and not any(budget.reserved.values)


def test_plain_text_is_continued(teacher: tuple[ServedTeacher, Path, Budget], folder: Path) -> None:
    """A second job on a server of the same kind, by the other protocol; its revision differs from the chat's."""
    plain, log = served(folder, api="completion")
    asked = [Request(Prompt(text), Sampling(max_tokens=MAX_TOKENS), k) for text in TEXTS for k in range(4)]
    with plain:
        found = list(generate(plain, asked))
        assert len(found) == 12 == calls_in(log) and all(isinstance(item, Answer) for item in found)
    assert plain.revision != teacher[0].revision
    assert all(word not in log.read_text() for word in ("question", "river")), "the server prints no prompts"


def test_killed_while_it_writes(folder: Path) -> None:
    """SIGKILL in the middle of the job: the server comes back by itself, and only what was in flight is sent again."""
    killed, _ = served(folder)
    asked = conversations()
    with killed:
        found = generate(killed, asked)
        kept = [next(found) for _ in range(8)]
        port = str(killed._server.launch.port)
        [server] = [pid for pid in descendants(os.getpid()) if _is_server(pid, port)]
        os.kill(server, signal.SIGKILL)
        everything = [*kept, *found]
        assert killed.restarts == 1
    assert {item.request_id for item in everything if isinstance(item, Answer)} == {
        request.id(killed.revision) for request in asked
    }
    assert len(everything) == len(asked) and killed.stats.sent == len(asked) + sum(killed.stats.retries.values())
    assert 1 <= sum(killed.stats.retries.values()) <= 2 * 8


def _is_server(pid: int, port: str) -> bool:
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return port in words and "keeper" not in words
