"""The mission's pipeline over a real loopback teacher, and the judging model's line, without a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import nexus_ray
from nexus_ray.config.generators import OpenAIGenerator
from nexus_ray.errors import ConfigError, SynthesisError
from nexus_ray.storage import Storage
from nexus_ray.synthesis.generators.remote import RemoteTeacher, remote_teacher
from nexus_ray.synthesis.rows import Prompt, Row
from nexus_ray.synthesis.setup import PlanOrder, needed_domains, open_job
from nexus_ray.synthesis.validators.judge import RefusedQuestionError
from nexus_ray.synthesis.worker import Asker
from tests.fault_server import FaultServer, Rule
from tests.jobs import job_config

PROMPTS = ["Tell me of rain.", "Tell me of snow.", "Tell me of wind."]


def teacher(server: FaultServer) -> RemoteTeacher:
    return remote_teacher(OpenAIGenerator(kind="openai", model="m", base_url=f"{server.url}/v1", retry_delay_s=0.01))


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer(items=10) as found:
        yield found


def test_a_batch_comes_in_the_order_of_prompts_and_candidates(server: FaultServer) -> None:
    server.delay_s = 0.01
    pipeline = nexus_ray.SyntheticPipeline(teacher(server), nexus_ray.QualityFilter(), nexus_ray.FactChecker())
    rows = pipeline.generate_rows(PROMPTS, num_candidates=3)
    assert [row.prompt.content for row in rows] == [prompt for prompt in PROMPTS for _ in range(3)]
    assert pipeline.generate_batch(PROMPTS, num_candidates=3) != [row.text for row in rows], "all are repeats by now"


def test_a_prompt_that_comes_again_is_asked_for_further_answers(server: FaultServer) -> None:
    pipeline = nexus_ray.SyntheticPipeline(teacher(server))
    texts = pipeline.generate_batch([PROMPTS[0], PROMPTS[1], PROMPTS[0]], num_candidates=2)
    assert len(set(texts)) == len(texts) == len(server.calls) == 6
    assert texts[:2] == pipeline.generate_batch(PROMPTS[:1], num_candidates=2)


def test_rejected_rows_and_failures_are_kept(server: FaultServer) -> None:
    server.rules = [Rule("400", first=1, last=2)]
    pipeline = nexus_ray.SyntheticPipeline(teacher(server), nexus_ray.QualityFilter(min_length=1000))
    assert pipeline.generate_batch(PROMPTS, num_candidates=1) == []
    assert len(pipeline.failures) == 1 and len(pipeline.rejected) == 2
    assert all(verdict.reason.startswith("length") for _, verdict in pipeline.rejected)
    with pytest.raises(ConfigError, match="num_candidates=0"):
        pipeline.generate_batch(PROMPTS, num_candidates=0)


def test_agreement_is_settled_over_the_answers_to_one_prompt(tmp_path: Path, server: FaultServer) -> None:
    validators = [{"kind": "agreement", "min_answers": 2}]
    config = job_config(tmp_path, server.url, prompts=2, validators=validators, filters={"exact": None})
    memory = PlanOrder(open_job(config, "sentences", {}))
    prompt = Prompt("How many?")
    rows = [Row(f"So there are many.\n#### {number}", "r", item, prompt) for item, number in enumerate((4, 4, 5))]
    memory.group(rows)
    assert [memory.judge(row).outcome for row in rows] == ["pass", "pass", "reject"]


def test_questions_of_a_judge_go_through_one_loop_from_several_threads(server: FaultServer) -> None:
    asker = Asker(teacher(server), alone=False)
    server.delay_s = 0.05
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(asker, [f"Is {number} even?" for number in range(16)]))
    assert all(replies) and len(set(replies)) == 16 and max(call.in_flight for call in server.calls) > 1
    server.rules = [Rule("400")]
    with pytest.raises(RefusedQuestionError, match="refuses the question: http 400"):
        asker("Is this a question?")
    server.rules = [Rule("500")]
    with pytest.raises(SynthesisError, match=r"no reply \(http 500.*\); what was answered is kept"):
        asker("Is this one?")
    asker.close()


def test_another_recipe_names_the_fault_and_the_way_out(tmp_path: Path, server: FaultServer) -> None:
    config = job_config(tmp_path, server.url)
    (tmp_path / "recipe.yaml").write_text("name: x\ntext: '{{ source }}'\ndocuments: {domain: nowhere}\n")
    with pytest.raises(ConfigError, match=r"documents.domain='nowhere' is no domain"):
        needed_domains(config, "sentences")
    with pytest.raises(ConfigError, match=r"synthesis.other: there is no such job; jobs of this config: sentences"):
        needed_domains(config, "other")
    assert Storage(str(tmp_path)).exists("recipe.yaml")
