"""Dotted paths of the config tree: which there are, what type stands at one, and the nearest to a misspelt one."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from nexus_ray.config.tree import RunConfig

Location = Sequence[str | int]


def dotted(location: Location) -> str:
    """`stages.0.name` from its parts."""
    return ".".join(str(part) for part in location)


def members(annotation: Any) -> list[Any]:
    """The alternatives of a type with `Annotated` and `None` taken off: `A | B | None` gives [A, B]."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return members(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [m for arg in get_args(annotation) for m in members(arg) if m is not type(None)]
    return [annotation]


def section(annotation: Any) -> type[BaseModel] | None:
    """The model class of a type that is exactly one section."""
    found = [m for m in members(annotation) if isinstance(m, type) and issubclass(m, BaseModel)]
    return found[0] if len(found) == 1 else None


@cache
def setting_paths() -> tuple[str, ...]:
    """Dotted paths of all settings that have a fixed path (not those inside `domains` and `stages`)."""
    return tuple(_leaves(RunConfig, ""))


def _leaves(model: type[BaseModel], prefix: str) -> Iterable[str]:
    for name, field in model.model_fields.items():
        inner = section(field.annotation)
        if inner is None:
            yield prefix + name
        else:
            yield from _leaves(inner, f"{prefix}{name}.")


def keys_at(location: Location, data: Any, root: type[BaseModel] = RunConfig) -> list[str]:
    """Keys that the section at `location` of `root` allows; [] where any key goes or no section stands there.

    `data` (the user's whole mapping) tells which kind a source is.
    """
    kinds: list[Any] = [root]
    for part in location:
        data = item_of(data, part)
        kinds = [inner for kind in kinds for inner in _inside(kind, part)]
    kind_name = data.get("kind") if isinstance(data, dict) else None
    models = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
    exact = [m for m in models if "kind" in m.model_fields and kind_name in get_args(m.model_fields["kind"].annotation)]
    return list(dict.fromkeys(name for model in exact or models for name in model.model_fields))


def models_at(location: Location) -> list[type[BaseModel]]:
    """The sections that may stand at `location`."""
    kinds: list[Any] = [RunConfig]
    for part in location:
        kinds = [inner for kind in kinds for inner in _inside(kind, part)]
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _inside(kind: Any, part: str | int) -> list[Any]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        field = kind.model_fields.get(str(part))
        return members(field.annotation) if field else []
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is dict:
        return members(arguments[1])
    return members(arguments[0]) if origin is list else []


def item_of(data: Any, part: str | int) -> Any:
    """What stands under a key or at a place of nested data; None if there is nothing."""
    if isinstance(data, dict):
        return data.get(part)
    return data[part] if isinstance(data, list) and isinstance(part, int) and part < len(data) else None


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` most likely means, or None."""
    names = {name.lower().replace("-", "_"): name for name in known}
    found = difflib.get_close_matches(word.lower().replace("-", "_"), names, n=1, cutoff=0.6)
    return names[found[0]] if found else None


def nearest_path(path: str, known: Iterable[str] = ()) -> str | None:
    """The setting that a whole dotted path most likely means: the same last key elsewhere, or similar spelling."""
    paths = list(known) or list(setting_paths())
    last = path.rpartition(".")[2]
    same = [p for p in paths if p.rpartition(".")[2] == last]
    return same[0] if same else nearest(path, paths)


def choice(word: Any, known: Iterable[str], *, what: str) -> str:
    """`did you mean X?` if something known is near, else the list of what is known."""
    names = list(known)
    near = nearest(str(word), names)
    return f"did you mean {near!r}?" if near else f"{what}: {', '.join(names) or 'none'}"
