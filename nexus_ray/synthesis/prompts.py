"""Prompts by number from a recipe: templates filled with a point of a parameter grid and an excerpt of a document.

    plan = PromptPlan(load_recipe("configs/prompts/stories.yaml"))
    plan[0]; plan.range(200, 400)

Variety of generated text comes from what is asked, not from the temperature (TinyStories, Eldan & Li 2023,
arXiv:2305.07759; SimpleStories, Finke et al. 2025, arXiv:2504.09184), so every prompt keeps its parameters.
Invariant: prompt i is a pure function of (recipe without its count, documents, i): raising the count only adds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nexus_ray.config.prompts import ParameterConfig, RecipeConfig
from nexus_ray.config.source import read_yaml
from nexus_ray.errors import ConfigError
from nexus_ray.synthesis.combinations import Axis, Combinations, permuted
from nexus_ray.synthesis.excerpts import Documents, Excerpts
from nexus_ray.synthesis.rows import Message, Prompt, content_id
from nexus_ray.synthesis.template import Template, Value

MAX_WITHOUT_COUNT = 10_000_000
MAX_LIST_BYTES = 64 * 2**20


def load_recipe(path: str | Path) -> RecipeConfig:
    """A recipe file with its word lists read into it, so that the result stands for itself.

    Raises:
        ConfigError: listing the faults of the file by path, or naming the word list that cannot be used.
    """
    path = Path(path)
    data = read_yaml(path)
    config = _validated(data, str(path))
    parameters = {name: _with_values(name, found, path.parent) for name, found in config.parameters.items()}
    return _validated({**config.model_dump(), "parameters": parameters}, str(path))


def _validated(data: Any, where: str) -> RecipeConfig:
    try:
        return RecipeConfig.model_validate(data)
    except ValidationError as error:
        faults = [f"  {'.'.join(map(str, e['loc'])) or '(top level)'}: {e['msg']}" for e in error.errors()]
    raise ConfigError("\n".join([f"{where}: {len(faults)} fault{'s' if len(faults) != 1 else ''}", *faults]))


def _with_values(name: str, parameter: ParameterConfig, folder: Path) -> dict[str, Any]:
    if parameter.file is None:
        return parameter.model_dump()
    values = read_list(folder / parameter.file, where=f"parameters.{name}.file")
    return {**parameter.model_dump(), "values": values, "file": None}


def read_list(path: Path, *, where: str) -> list[str]:
    """Lines of a text file, stripped, without blank ones and those that start with `#`. Raises ConfigError."""
    try:
        if path.stat().st_size > MAX_LIST_BYTES:
            raise ConfigError(f"{where}={str(path)!r} is larger than {MAX_LIST_BYTES >> 20} MiB; use a shorter list")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}={str(path)!r} cannot be read ({error}); name a UTF-8 text file") from None
    values = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not values:
        raise ConfigError(f"{where}={str(path)!r} holds no values; write one a line")
    return values


class PromptPlan:
    """The prompts of a recipe, in order: `plan[i]`, `plan.size`, `plan.range(start, stop)`.

    Raises ConfigError if a template is faulty, a parameter is never used, `documents` are missing or not asked for,
    or there are fewer different prompts than `prompts`.
    """

    def __init__(self, recipe: RecipeConfig, documents: Documents | None = None) -> None:
        unread = [name for name, parameter in recipe.parameters.items() if not parameter.values]
        if unread:
            raise ConfigError(f"parameters.{unread[0]}.file has not been read; load the recipe with load_recipe")
        if (documents is None) != (recipe.documents is None):
            missing = "need the documents of that domain" if documents is None else "are not asked for by the recipe"
            raise ConfigError(f"documents: prompts of recipe {recipe.name!r} {missing}; give both or neither")
        self.recipe = recipe
        self._documents = documents
        self._templates = _templates(recipe)
        self._axes = [Axis(name, parameter) for name, parameter in recipe.parameters.items()]
        self._excerpts: Excerpts | None = None
        if documents is not None and recipe.documents is not None:
            self._excerpts = Excerpts(documents, recipe.documents)
        self._combinations = lru_cache(maxsize=1024)(self._new_combinations)
        made_by = {"turns": [t.model_dump() for t in recipe.messages], "text": recipe.text, "count": recipe.items.count}
        cut = recipe.documents.model_dump() if recipe.documents else None
        self._made_by = f"{recipe.name}@{content_id('template', [made_by, cut])[:12]}"
        settings = recipe.model_dump(exclude={"prompts"})
        self.fingerprint = content_id("plan", [settings, documents.fingerprint if documents is not None else None])
        """Hash of all that decides prompt i, for every i."""
        self.size = self._checked_size()
        """Number of prompts."""

    def __reduce__(self) -> tuple[type[PromptPlan], tuple[RecipeConfig, Documents | None]]:
        return type(self), (self.recipe, self._documents)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Prompt:
        """Raises IndexError outside [0, size), ConfigError if the prompt is longer than `max_characters`."""
        if not 0 <= index < self.size:
            raise IndexError(index)
        unit, draw = self._place(index)
        found = self._excerpts[unit] if self._excerpts is not None else None
        chosen = self._combinations(unit)[draw]
        values: dict[str, Value] = {**chosen, "count": str(self.recipe.items.count)}
        stored = {name: value if isinstance(value, str) else _json(value) for name, value in chosen.items()}
        if found is not None:
            values["source"] = found.text
            stored["source_window"] = str(found.window)
        grounded = self.recipe.documents is not None and self.recipe.documents.grounded
        return Prompt(
            content=self._render(values),
            recipe=self._made_by,
            parameters=stored,
            parents=(found.document,) if found is not None else (),
            source=found.text if found is not None and grounded else None,
        )

    def range(self, start: int = 0, stop: int | None = None) -> Iterator[Prompt]:
        """Prompts start, ..., stop - 1, made one at a time."""
        for index in range(start, self.size if stop is None else min(stop, self.size)):
            yield self[index]

    def shown(self) -> Iterator[tuple[Prompt, tuple[str, ...]]]:
        """Every prompt in order with the texts that it holds up as examples: its excerpt, and the assistant's turns."""
        for index in range(self.size):
            prompt = self[index]
            excerpt = (self._excerpts[self._place(index)[0]].text,) if self._excerpts is not None else ()
            turns = () if isinstance(prompt.content, str) else prompt.content
            yield prompt, (*excerpt, *(turn.content for turn in turns if turn.role == "assistant"))

    def _place(self, index: int) -> tuple[int, int]:
        """Number of the excerpt, and of the draw from the grid for it.

        Sampled: every excerpt once in random order, then every one again with another combination. Product: all
        combinations of the first excerpt, then of the second, so that documents may be added at the end.
        """
        if self._excerpts is None:
            return 0, index
        if self.recipe.order == "product":
            return divmod(index, self._combinations(0).size)
        draw, place = divmod(index, len(self._excerpts))
        return permuted(place, len(self._excerpts), self._key("excerpts")), draw

    def _new_combinations(self, unit: int) -> Combinations:
        return Combinations(self._axes, None if self.recipe.order == "product" else self._key("grid", unit))

    def _key(self, *parts: object) -> bytes:
        return hashlib.blake2b(_json([self.recipe.seed, *parts]).encode(), digest_size=32).digest()

    def _checked_size(self) -> int:
        units = len(self._excerpts) if self._excerpts is not None else 1
        capacity = units * Combinations(self._axes, None).size
        count = self.recipe.prompts
        if count is None and capacity > MAX_WITHOUT_COUNT:
            raise ConfigError(
                f"prompts is not set and there are {capacity:,} combinations, more than {MAX_WITHOUT_COUNT:,}; set it"
            )
        if count is not None and count > capacity:
            raise ConfigError(
                f"prompts={count:,} and there are only {capacity:,} different ones; lower it, or add values"
                " or documents (num_candidates asks the same prompt several times)"
            )
        return count or capacity

    def _render(self, values: Mapping[str, Value]) -> str | tuple[Message, ...]:
        left = self.recipe.max_characters
        texts = []
        for template in self._templates:
            texts.append(template.render(values, limit=left))
            left -= len(texts[-1])
        if self.recipe.text is not None:
            return texts[0]
        return tuple(Message(turn.role, text.strip()) for turn, text in zip(self.recipe.messages, texts, strict=True))


def _templates(recipe: RecipeConfig) -> list[Template]:
    """The recipe's templates, checked. Raises ConfigError naming all faults, one a line."""
    sizes: dict[str, int | None] = {name: parameter.choose for name, parameter in recipe.parameters.items()}
    sizes |= {"count": None} | ({"source": None} if recipe.documents is not None else {})
    texts = {f"messages.{place}.content": turn.content for place, turn in enumerate(recipe.messages)}
    if recipe.text is not None:
        texts["text"] = recipe.text
    templates, faults = [], []
    for where, text in texts.items():
        try:
            templates.append(Template(text, where=where, sizes=sizes))
        except ConfigError as error:
            faults.append(str(error))
    used = {name for template in templates for name in template.names}
    for name in [] if faults else sorted(set(sizes) - {"count"} - used):
        path = "documents" if name == "source" else f"parameters.{name}"
        faults.append(f"{path}: no template uses {name!r}, so prompts would repeat; write {{{{ {name} }}}}, or drop it")
    if faults:
        raise ConfigError("\n".join(faults))
    return templates


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(", ", ": "))
