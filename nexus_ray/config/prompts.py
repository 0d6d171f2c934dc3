"""What to ask a generator for: a recipe file (`configs/prompts/*.yaml`) of templates, parameters and documents.

Only what can be checked field by field is checked here; templates are checked by `nexus_ray.synthesis.prompts`.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from nexus_ray.config.methods import Section

Identifier = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=64)]
"""Name of a template's variable or of a part of an item."""
RESERVED = ("source", "source_window", "count", "loop")
"""Names that mean something of their own in a template, or among a prompt's stored parameters."""


class Turn(Section):
    """One turn of the conversation that is sent."""

    role: Literal["system", "user", "assistant"]
    content: str = Field(min_length=1)
    """Jinja template; white space at both ends of the rendered text is removed."""


class ParameterConfig(Section):
    """One axis of the grid: the values that a template variable may take."""

    values: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    file: str | None = None
    """Text file with one value a line, relative to the recipe; blank lines and lines that start with `#` are left
    out."""
    weights: dict[str, Annotated[int, Field(ge=1, le=1000)]] = Field(default_factory=dict)
    """How many times as often as the others a value is drawn (order: sampled); 1 for values not named."""
    choose: int | None = Field(None, ge=1, le=32)
    """The variable is a list of so many different values; default: it is one value."""

    @model_validator(mode="after")
    def _values_are_sound(self) -> ParameterConfig:
        if bool(self.values) == (self.file is not None):
            raise ValueError("give either values or file, and not an empty one")
        if not self.values:
            return self
        repeated = sorted({value for value in self.values if self.values.count(value) > 1}) if self._repeats else []
        if repeated:
            raise ValueError(f"values names {', '.join(map(repr, repeated[:3]))} twice; drop one, or use weights")
        unknown = sorted(set(self.weights) - set(self.values))
        if unknown:
            raise ValueError(f"weights names {', '.join(map(repr, unknown[:3]))}, which is none of the values")
        if self.choose is not None and self.choose > len(self.values):
            raise ValueError(f"choose={self.choose} of {len(self.values)} values; lower it, or add values")
        if self.choose is not None and self.weights:
            raise ValueError("choose and weights do not combine: drop one of them")
        return self

    @property
    def _repeats(self) -> bool:
        return len(set(self.values)) < len(self.values)

    @property
    def combinations(self) -> int:
        """Different settings of this variable."""
        return math.comb(len(self.values), self.choose or 1)


class DocumentsConfig(Section):
    """Documents of a domain that prompts are made from, as `source`; only those that are not held out."""

    domain: str
    """Name of the domain."""
    max_bytes: int = Field(4000, ge=50, le=1_000_000)
    """Most UTF-8 bytes of a document in one prompt; cut at the end of a line or word."""
    excerpts: Literal["first", "all"] = "first"
    """A prompt may get the `first` max_bytes of a document, or any of its windows of max_bytes."""
    grounded: bool = True
    """Keep the excerpt with the prompt, for validators that check answers against it."""


class ItemsConfig(Section):
    """How many rows an answer holds, and how they are told apart. What does not fit is rejected as a whole."""

    format: Literal["one", "numbered", "json", "tags"] = "one"
    """`one`: the whole answer is one row; `numbered`: `1. ...`, `2. ...`; `json`: an array; `tags`: `<item>...</item>`,
    or the fields as tags."""
    count: int = Field(1, ge=1, le=1000)
    """Rows of an answer, exactly; `{{ count }}` in the template."""
    fields: list[Identifier] = Field(default_factory=list)
    """Parts of one item (json: keys of an object; tags: tags in this order); default: an item is one text."""
    text: str | None = None
    """Jinja template of a row's text over the fields; default: the fields, each on a line of its own."""

    @model_validator(mode="after")
    def _agree(self) -> ItemsConfig:
        if self.format == "one" and self.count != 1:
            raise ValueError(f"count={self.count} needs a format that tells rows apart: numbered, json or tags")
        if self.fields and self.format in ("one", "numbered"):
            raise ValueError(f"fields are read by format json or tags, not {self.format}; change one of them")
        if len(set(self.fields)) < len(self.fields):
            raise ValueError(f"fields={self.fields} names one twice; drop it")
        if self.text is not None and not self.fields:
            raise ValueError("text is a template over fields, and there are none; drop text, or name the fields")
        return self


class RecipeConfig(Section):
    """A recipe: an ordered, extendable list of prompts. Prompt i is a function of this file alone, not of `prompts`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)
    seed: int = 0
    """Decides the order of sampled combinations."""
    prompts: int | None = Field(None, ge=1)
    """Prompts of the plan; default: every combination, if there are no more than ten million."""
    order: Literal["sampled", "product"] = "sampled"
    """`sampled`: combinations in random order, none twice; `product`: all in the order written, the last parameter
    changing fastest, document by document."""
    messages: list[Turn] = Field(default_factory=list)
    """The conversation, as templates."""
    text: str | None = Field(None, min_length=1)
    """Template of plain text for a model to continue, in place of `messages`; sent exactly as rendered."""
    parameters: dict[Identifier, ParameterConfig] = Field(default_factory=dict)
    documents: DocumentsConfig | None = None
    items: ItemsConfig = Field(default_factory=ItemsConfig)
    max_characters: int = Field(50_000, ge=1, le=2_000_000)
    """Longest prompt, in characters over all turns; a longer one is an error."""

    @model_validator(mode="after")
    def _agree(self) -> RecipeConfig:
        if bool(self.messages) == (self.text is not None):
            raise ValueError("give either messages or text, and not an empty one")
        roles = [turn.role for turn in self.messages]
        if "system" in roles[1:]:
            raise ValueError("messages: a system turn stands first, and there is at most one")
        spoken = [role for role in roles if role != "system"]
        if (roles and spoken != ["user", "assistant"] * (len(spoken) // 2) + ["user"] * (len(spoken) % 2)) or (
            roles and not spoken
        ):
            raise ValueError("messages: user and assistant take turns, and the user begins")
        taken = sorted(set(self.parameters) & set(RESERVED))
        if taken:
            raise ValueError(f"parameters: {', '.join(taken)} has a meaning of its own in templates; choose another")
        weighted = sorted(name for name, parameter in self.parameters.items() if parameter.weights)
        if self.order == "product" and weighted:
            raise ValueError(
                f"order: product takes every combination once, so parameters.{weighted[0]}.weights means nothing; "
                "drop it, or use order: sampled"
            )
        return self
