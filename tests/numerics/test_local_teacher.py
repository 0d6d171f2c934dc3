"""The local teacher: answers, reasons to end, revisions, and what it cannot be asked. A real tiny model in a folder."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
import torch

from nexus_ray.config.generators import LocalGenerator
from nexus_ray.config.tree import ModelConfig, WheelModel
from nexus_ray.errors import ConfigError, DataError
from nexus_ray.models.local import local_model
from nexus_ray.synthesis.generators.local import LocalTeacher, local_teacher
from nexus_ray.synthesis.generators.protocol import generate
from nexus_ray.synthesis.rows import Answer, Failure, Message, Prompt, Request, Sampling
from tests.corpus import write_wheel
from tests.gguf_file import write_gguf
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


# --- GGUF ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("gguf")
    return write_gguf(place / "tiny.gguf", tiny_model(), folder, chat_template="{{ messages[0].content }}!")


def test_a_gguf_file_is_converted_once_and_answers_as_its_model_does(
    gguf: Path, teacher: LocalTeacher, tmp_path: Path
) -> None:
    said: list[str] = []
    config = LocalGenerator(kind="local", model=str(gguf), batch_size=3)
    converted = local_teacher(config, storage=str(tmp_path), progress=said.append)
    greedy = requests(4, temperature=0.0)
    assert [answer.text for answer in _answers(converted, greedy)] == [a.text for a in _answers(teacher, greedy)]
    chat = Request(Prompt((Message("user", "Hello"),)), Sampling(max_tokens=3), 0)
    [answer] = _answers(converted, [chat])
    assert answer.prompt_tokens == len(teacher.tokenizer("Hello!")["input_ids"]), (
        "the chat template came along, from the same file"
    )
    again = local_teacher(config, storage=str(tmp_path), progress=said.append)
    assert again.revision == converted.revision and len(said) == 1
    [made] = [path for path in (tmp_path / "_shared" / "models").iterdir() if path.is_dir()]
    assert made.name.startswith("tiny-") and said == [f"converting {gguf} to {made}"]


def test_workers_that_start_together_convert_once(gguf: Path, tmp_path: Path) -> None:
    said: list[str] = []
    found: list[ModelConfig] = []

    def work() -> None:
        found.append(local_model(ModelConfig(source=str(gguf)), str(tmp_path), progress=said.append))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(said) == 1 and len(found) == 3 and len({model.source for model in found}) == 1


def test_a_gguf_file_inside_a_wheel(
    gguf: Path, teacher: LocalTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    source = write_wheel(tmp_path / "index", {"data/tiny.gguf": gguf.read_bytes()}, package="tinymodel")
    wheel = WheelModel(package="tinymodel", version="1.0", sha256=source.sha256, member="data/tiny.gguf")
    packed = local_teacher(LocalGenerator(kind="local", model="wheel", wheel=wheel), storage=str(tmp_path / "runs"))
    greedy = requests(2, temperature=0.0)
    assert [answer.text for answer in _answers(packed, greedy)] == [a.text for a in _answers(teacher, greedy)]
    other = wheel.model_copy(update={"sha256": "0" * 64})
    with pytest.raises(DataError, match=r"generator.wheel.sha256=0+ does not fit"):
        local_teacher(LocalGenerator(kind="local", model="wheel", wheel=other), storage=str(tmp_path / "runs"))


def test_faults_of_gguf_models(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"generator.model=/nowhere/x.gguf is no file"):
        local_teacher(LocalGenerator(kind="local", model="/nowhere/x.gguf"), storage=str(tmp_path))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ConfigError, match=r"generator.model=.*broken.gguf cannot be converted"):
        local_teacher(LocalGenerator(kind="local", model=str(broken)), storage=str(tmp_path))
    with pytest.raises(ValueError, match=r"give `model: wheel` with `wheel: \{package"):
        LocalGenerator(kind="local", model="wheel")
    with pytest.raises(ConfigError, match="a GGUF model is converted into local storage"):
        local_teacher(LocalGenerator(kind="local", model=str(broken)), storage="s3://bucket/runs")


def _answers(teacher: LocalTeacher, asked: list[Request]) -> list[Answer]:
    found = {item.request_id: item for item in teacher.answers(asked)}
    return [item for request in asked if isinstance(item := found[request.id(teacher.revision)], Answer)]
