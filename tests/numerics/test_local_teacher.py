"""The local teacher: answers, reasons to end, revisions, and what it cannot be asked. A real tiny model in a folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from nexus_ray.config.generators import LocalGenerator
from nexus_ray.errors import ConfigError
from nexus_ray.synthesis.generators.local import LocalTeacher, local_teacher
from nexus_ray.synthesis.generators.protocol import generate
from nexus_ray.synthesis.rows import Answer, Failure, Message, Prompt, Request, Sampling
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("teacher") / "model"
    tiny_model().save_pretrained(place)
    shutil.copytree(tiny_tokenizer(place.parent / "tokenizer"), place, dirs_exist_ok=True)
    return place


@pytest.fixture(scope="module")
def teacher(folder: Path) -> LocalTeacher:
    return local_teacher(LocalGenerator(kind="local", model=str(folder), batch_size=3))


def requests(count: int, **sampling: object) -> list[Request]:
    return [Request(Prompt("def add"), Sampling(max_tokens=12, **sampling), i) for i in range(count)]  # type: ignore[arg-type]


def test_every_request_is_answered_and_an_answer_does_not_depend_on_its_company(teacher: LocalTeacher) -> None:
    asked = requests(7)
    found = {item.request_id: item for item in generate(teacher, asked)}
    assert set(found) == {request.id(teacher.revision) for request in asked}
    assert len({item.text for item in found.values() if isinstance(item, Answer)}) > 1  # candidates differ
    [alone] = teacher.answers(asked[4:5])
    assert alone == found[alone.request_id] and isinstance(alone, Answer)
    assert 0 < alone.completion_tokens <= 12 and alone.prompt_tokens > 0


def test_reasons_to_end(teacher: LocalTeacher) -> None:
    [cut] = teacher.answers(requests(1))
    assert isinstance(cut, Answer) and cut.finish_reason == ("stop" if cut.completion_tokens < 12 else "length")
    stop = cut.text[len(cut.text) // 2 :][:1]
    [stopped] = teacher.answers(requests(1, stop=(stop,)))
    assert isinstance(stopped, Answer) and stop not in stopped.text


def test_what_cannot_be_asked_fails_alone(teacher: LocalTeacher) -> None:
    chat = Request(Prompt((Message("user", "Hello"),)), Sampling(max_tokens=3), 0)
    long = Request(Prompt("def add " * 5000), Sampling(max_tokens=3), 0)
    found = list(teacher.answers([chat, long, *requests(1)]))
    failures = [item for item in found if isinstance(item, Failure)]
    assert len(found) == 3 and not any(failure.retriable for failure in failures)
    assert any("the model has" in failure.reason for failure in failures)


def test_another_student_has_another_revision(folder: Path, teacher: LocalTeacher, tmp_path: Path) -> None:
    again = local_teacher(LocalGenerator(kind="local", model=str(folder), batch_size=1))
    assert again.revision == teacher.revision
    other = shutil.copytree(folder, tmp_path / "other")
    tiny_model(seed=1).save_pretrained(other)
    assert local_teacher(LocalGenerator(kind="local", model=str(other))).revision != teacher.revision
    half = local_teacher(LocalGenerator(kind="local", model=str(folder), dtype="bfloat16"))
    assert half.revision != teacher.revision and next(half._decoder.model.parameters()).dtype == torch.bfloat16


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"generator\.model="):
        local_teacher(LocalGenerator(kind="local", model=str(tmp_path)))
