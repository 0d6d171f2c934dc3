"""Plans of prompts: pure, extendable, without repeats, with parameters and parents; the committed recipes work."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nexus_ray.config.prompts import RecipeConfig
from nexus_ray.corpora.documents import iter_documents, load_documents
from nexus_ray.errors import ConfigError
from nexus_ray.storage import Storage
from nexus_ray.synthesis import excerpts
from nexus_ray.synthesis.excerpts import DomainDocuments, excerpt
from nexus_ray.synthesis.prompts import PromptPlan, load_recipe
from nexus_ray.synthesis.rows import Message, Prompt
from tests.unit.synthesis.build import write_domain

CONFIGS = Path(__file__).resolve().parents[3] / "configs/prompts"


def recipe(**changes: Any) -> RecipeConfig:
    base: dict[str, Any] = {
        "name": "r",
        "text": "A {{ style }} tale of a {{ noun }}.",
        "parameters": {"style": {"values": ["sad", "gay"]}, "noun": {"values": ["fox", "owl", "hen"]}},
    }
    return RecipeConfig.model_validate({**base, **changes})


@dataclass
class ListDocuments:
    """Documents held in memory."""

    texts: list[str]
    fingerprint: str = "f"
    sizes: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.sizes = np.array([len(text.encode()) for text in self.texts], np.int64)

    def read(self, number: int) -> tuple[str, str]:
        return f"d{number}", self.texts[number]


def test_the_full_product_in_the_order_written() -> None:
    plan = PromptPlan(recipe(order="product"))
    assert plan.size == len(plan) == 6
    assert [prompt.content for prompt in plan.range(0, 2)] == ["A sad tale of a fox.", "A sad tale of a owl."]
    assert plan[4].parameters == {"style": "gay", "noun": "owl"}
    with pytest.raises(IndexError):
        plan[6]


def test_raising_the_count_only_adds() -> None:
    many = {"noun": {"values": [f"n{i}" for i in range(500)]}, "style": {"values": ["a", "b"], "weights": {"b": 3}}}
    small, large = (PromptPlan(recipe(parameters=many, prompts=count)) for count in (50, 900))
    assert list(small.range()) == list(large.range(0, 50))
    assert len({prompt.id for prompt in large.range()}) == 900
    assert small.fingerprint == large.fingerprint
    assert [large[i] for i in (700, 3)] == [PromptPlan(large.recipe)[i] for i in (700, 3)]


@pytest.mark.parametrize("change", [{"seed": 1}, {"order": "product"}, {"text": "{{ style }} {{ noun }}"}])
def test_what_decides_prompts_is_in_the_fingerprint(change: dict[str, Any]) -> None:
    assert PromptPlan(recipe(**change)).fingerprint != PromptPlan(recipe()).fingerprint
    assert [p.content for p in PromptPlan(recipe(**change)).range()] != [
        p.content for p in PromptPlan(recipe()).range()
    ]


def test_the_same_words_keep_their_id_when_the_grid_grows() -> None:
    """Answers paid for stay usable: a prompt's id holds its template and values, not the rest of the grid."""
    grown = {"style": {"values": ["sad", "gay", "odd"]}, "noun": {"values": ["fox", "owl", "hen"]}}
    before = {prompt.id for prompt in PromptPlan(recipe()).range()}
    assert before < {prompt.id for prompt in PromptPlan(recipe(parameters=grown, seed=5)).range()}


def test_conversations_are_trimmed_and_lists_are_stored_whole() -> None:
    plan = PromptPlan(
        recipe(
            text=None,
            messages=[
                {"role": "system", "content": "Be {{ style }}."},
                {"role": "user", "content": "Write {{ count }}:\n{% for n in noun %}- {{ n }}\n{% endfor %}"},
            ],
            parameters={"style": {"values": ["sad"]}, "noun": {"values": ["fox", "owl", "hen"], "choose": 2}},
            items={"format": "numbered", "count": 4},
            order="product",
        )
    )
    assert plan.size == 3
    assert plan[1].content == (Message("system", "Be sad."), Message("user", "Write 4:\n- fox\n- hen"))
    assert plan[1].parameters == {"style": "sad", "noun": '["fox", "hen"]'}


def test_a_plan_survives_pickling() -> None:
    plan = PromptPlan(recipe())
    assert pickle.loads(pickle.dumps(plan))[3] == plan[3]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompts": 7}, "prompts=7 and there are only 6 different ones"),
        ({"text": "A {{ noun }}."}, "parameters.style: no template uses 'style'"),
        ({"text": "{{ style }} {{ noun }} {{ source }}"}, "text uses 'source', which does not exist"),
        ({"max_characters": 15}, "more than 15 characters"),
        ({"documents": {"domain": "d"}}, "need the documents"),
        ({"parameters": {"a": {"values": [f"{i}" for i in range(5000)], "choose": 5}}}, "prompts is not set"),
    ],
)
def test_faulty_recipes_say_what_and_what_to_do(change: dict[str, Any], words: str) -> None:
    if "parameters" in change:
        change["text"] = "{{ a | join }}"
    with pytest.raises(ConfigError, match=words):
        list(PromptPlan(recipe(**change)).range())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("text: x\nmessages: [{role: user, content: x}]", "either messages or text"),
        ("messages: [{role: assistant, content: x}]", "the user begins"),
        ("messages: [{role: system, content: x}]", "the user begins"),
        ("messages: [{role: user, content: x}, {role: system, content: x}]", "a system turn stands first"),
        ("text: x\nparameters: {source: {values: [a]}}", "meaning of its own"),
        ("text: x\nparameters: {a: {values: [a, a]}}", "names 'a' twice"),
        ("text: x\nparameters: {a: {values: [a], weights: {b: 2}}}", "which is none of the values"),
        ("text: x\nparameters: {a: {values: [a], file: b}}", "either values or file"),
        ("text: x\nparameters: {a: {values: [a, b], choose: 3}}", "choose=3 of 2 values"),
        ("text: x\nparameters: {a: {values: [yes]}}", "parameters.a.values.0"),
        ("text: x\nparameters: {a: {values: [a, b], weights: {b: 2}}}\norder: product", "weights means nothing"),
        ("text: x\nparameters: {a: {file: none.txt}}", "parameters.a.file=.*none.txt.* cannot be read"),
        ("text: x\nparameters: {a: {file: empty.txt}}", "holds no values"),
        ("text: x\nparameters: {a: {file: twice.txt}}", "parameters.a: .*'x' twice"),
        ("text: x\nitems: {count: 3}", "count=3 needs a format"),
        ("text: x\nwidth: 3", "width"),
    ],
)
def test_faults_of_a_recipe_file(tmp_path: Path, change: str, words: str) -> None:
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    (tmp_path / "twice.txt").write_text("x\n y\nx\n")
    (tmp_path / "r.yaml").write_text(f"name: r\n{change}\n")
    with pytest.raises(ConfigError, match=words):
        load_recipe(tmp_path / "r.yaml")


def test_a_word_list_becomes_part_of_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("# birds\nowl\n\n  hen  \n")
    (tmp_path / "r.yaml").write_text("name: r\ntext: '{{ bird }}'\nparameters: {bird: {file: words.txt}}\n")
    loaded = load_recipe(tmp_path / "r.yaml")
    assert loaded.parameters["bird"].values == ["owl", "hen"] and loaded.parameters["bird"].file is None


# --- documents ---------------------------------------------------------------------------------------------------

ABOUT = {"text": "{{ style }}: {{ source }}", "parameters": {"style": {"values": ["sad", "gay"]}}}


def test_documents_are_parents_and_ground_the_answer() -> None:
    plan = PromptPlan(recipe(**ABOUT, documents={"domain": "d"}, order="product"), ListDocuments(["One.", "Two."]))
    assert [(p.content, p.parents) for p in plan.range()] == [
        ("sad: One.", ("d0",)),
        ("gay: One.", ("d0",)),
        ("sad: Two.", ("d1",)),
        ("gay: Two.", ("d1",)),
    ]
    assert plan[0].source == "One." and plan[0].parameters == {"style": "sad", "source_window": "0"}


def test_documents_may_be_added_at_the_end_of_a_product() -> None:
    config = recipe(**ABOUT, documents={"domain": "d", "excerpts": "all", "max_bytes": 50}, order="product")
    texts = [f"word{i} " * 20 for i in range(4)]
    few, more = PromptPlan(config, ListDocuments(texts[:2])), PromptPlan(config, ListDocuments(texts))
    assert list(few.range()) == list(more.range(0, few.size)) and more.size == 2 * few.size


def test_sampled_documents_each_once_before_any_twice() -> None:
    plan = PromptPlan(recipe(**ABOUT, documents={"domain": "d"}), ListDocuments([f"Text {i}." for i in range(20)]))
    for half in (plan.range(0, 20), plan.range(20)):
        assert {prompt.parents[0] for prompt in half} == {f"d{i}" for i in range(20)}
    assert len({prompt.id for prompt in plan.range()}) == plan.size == 40
    assert [prompt.parents for prompt in plan.range(0, 20)] != [(f"d{i}",) for i in range(20)]


def test_excerpts_begin_and_end_at_lines_or_words_and_fit() -> None:
    text = "".join(f"Line {i} of the scene, with ü in it.\n" for i in range(40))
    lines = set(text.splitlines())
    pieces = [excerpt(text, window, 200) for window in range(len(text.encode()) // 200)]
    assert all(set(piece.splitlines()) <= lines for piece in pieces)
    assert all(len(piece.encode()) <= 200 for piece in pieces) and len(set(pieces)) == len(pieces)
    words = excerpt("word " * 100, 1, 98)
    assert set(words.split()) == {"word"}
    assert excerpt("é" * 100, 1, 51) and excerpt("x" + " " * 500 + "y", 1, 100) == "x"


@pytest.mark.parametrize("block_bytes", [excerpts.BLOCK_BYTES, 700])
def test_held_out_documents_are_never_parents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(excerpts, "BLOCK_BYTES", block_bytes)
    texts = [f"Scene {i}\n" + "Speak the speech, I pray you.\n" * (i % 40) for i in range(300)]
    write_domain(Storage(str(tmp_path)), texts, batches=3)
    manifest = load_documents(Storage(str(tmp_path)))
    config = recipe(text="{{ source }}", parameters={}, documents={"domain": "d", "max_bytes": 50, "grounded": False})
    plan = PromptPlan(config, DomainDocuments(manifest, held_out_fraction=0.3))
    train = {row["id"]: row["text"] for row in iter_documents(manifest, split="train", held_out_fraction=0.3)}
    assert 0 < len(train) < 300 and plan.size == len(train)
    prompts = list(plan.range())
    assert {prompt.parents[0] for prompt in prompts} == set(train)
    assert all(train[p.parents[0]].startswith(str(p.content)) and p.source is None for p in prompts)


# --- the committed recipes ---------------------------------------------------------------------------------------


def _shown(prompts: list[Prompt]) -> str:
    parts = []
    for prompt in prompts:
        turns = (Message("user", prompt.content),) if isinstance(prompt.content, str) else prompt.content
        parts += [f"=== {prompt.id} {dict(prompt.parameters)}"]
        parts += [f"--- {turn.role}\n{turn.content}" for turn in turns]
    return "\n".join(parts) + "\n"


def test_stories_as_reviewed(golden: Callable[[str, str], None]) -> None:
    plan = PromptPlan(load_recipe(CONFIGS / "stories.yaml"))
    golden("prompts.stories.txt", _shown([plan[0], plan[1], plan[9999]]))


def test_shakespeare_as_reviewed(golden: Callable[[str, str], None]) -> None:
    scene = "".join(f"LORD {i}\n  So shaken as we are, so wan with care,\n  Find we a time.\n\n" for i in range(20))
    plan = PromptPlan(load_recipe(CONFIGS / "shakespeare.yaml"), ListDocuments([scene, "ACT I\nEnter two murderers."]))
    golden("prompts.shakespeare.txt", _shown(list(plan.range())))
