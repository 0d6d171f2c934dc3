"""Turns validation errors into faults a user can act on: dotted path, value, rule, way out. All of them at once.

A tree with faulty values is repaired (the faulty values fall back to their defaults) and looked at again, so that
faults between fields show in the same report as those inside fields.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from nexus_ray.config.generators import looks_like_key
from nexus_ray.config.paths import Location, choice, dotted, item_of, keys_at, models_at, nearest, nearest_path
from nexus_ray.config.source import Data, copy_data
from nexus_ray.config.tree import RunConfig
from nexus_ray.errors import ConfigError

_ROUNDS = 6  # repairs uncover further faults: a section's own rules run once its fields are sound


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a config."""

    path: str
    message: str
    """What stands there, the rule, and the way out."""
    related: tuple[str, ...] = ()
    """Other paths the fault was derived from; it is left out while one of them is itself at fault."""

    def __str__(self) -> str:
        return f"{self.path}{self.message}"


Check = Callable[[RunConfig], Iterable[Fault]]


def validate(data: Data, checks: Iterable[Check], *, where: str) -> RunConfig:
    """The typed tree of `data`. Raises ConfigError listing every fault, first those of fields, then of `checks`."""
    config, faults = collect(data, checks)
    if faults or config is None:
        raise ConfigError(report(faults, where=where))
    return config


def collect(data: Data, checks: Iterable[Check]) -> tuple[RunConfig | None, list[Fault]]:
    """The typed tree of `data`, repaired where needed (None if beyond repair), and all its faults."""
    faults: dict[str, Fault] = {}
    spoiled: list[str] = []
    config = None
    for _ in range(_ROUNDS):
        try:
            config = RunConfig.model_validate_json(json.dumps(data, default=str), strict=True)
            break
        except ValidationError as error:
            details = error.errors(include_url=False)
        for fault in (_fault(detail, _location(detail, data), data) for detail in details):
            if not _follows(fault, spoiled):
                faults.setdefault(fault.path, fault)
        spoiled += [dotted(_location(detail, data)) for detail in details]
        data = _repair(data, details)
    if config is not None:
        for fault in (fault for check in checks for fault in check(config)):
            if not any(touches((path,), spoiled) for path in (fault.path, *fault.related)):
                faults.setdefault(str(fault), fault)
    return config, list(faults.values())


def _follows(fault: Fault, spoiled: Iterable[str]) -> bool:
    """Whether a fault only shows because an earlier one was repaired: in the same place, or a rule over its value."""
    for path in spoiled:
        if fault.path == path or fault.path.startswith(path + "."):
            return True
        if path.startswith(fault.path + ".") and path.rpartition(".")[2] in fault.message:
            return True
    return False


def report(faults: Iterable[Fault], *, where: str) -> str:
    """The message that lists faults, one a line."""
    lines = [f"  {fault}" for fault in faults]
    return "\n".join([f"{where}: {len(lines)} fault{'s' if len(lines) != 1 else ''}", *lines])


def touches(paths: Iterable[str], others: Iterable[str]) -> bool:
    """Whether any of `paths` is, holds, or lies inside one of `others`."""
    known = tuple(others)
    return any(p == o or p.startswith(o + ".") or o.startswith(p + ".") for p in paths for o in known)


def _location(detail: ErrorDetails, data: Data) -> tuple[str | int, ...]:
    """Pydantic's location without the parts that are no keys of the user's data (union tags, `[key]`)."""
    found: list[str | int] = []
    node: Any = data
    for part in detail["loc"]:
        is_tag = isinstance(node, dict) and part not in node and node.get("kind") == part
        if part == "[key]" or is_tag:
            continue
        found.append(part)
        node = item_of(node, part)
    return tuple(found)


def _fault(detail: ErrorDetails, location: Location, data: Data) -> Fault:
    kind, value, context = detail["type"], detail["input"], detail.get("ctx") or {}
    path = dotted(location) or "(top level)"
    if kind == "extra_forbidden":
        return Fault(path, f"={shown(value)}: unknown key; {_meant(location, data)}")
    if kind == "missing":
        return Fault(path, f" is missing; {_required(location)}")
    if kind == "union_tag_not_found":
        return Fault(f"{path}.kind", f" is missing; set it to one of {', '.join(_kinds(location))}")
    if kind == "union_tag_invalid":
        found = value.get("kind") if isinstance(value, dict) else value
        known = choice(found, _kinds(location), what="kinds are")
        return Fault(f"{path}.kind", f"={shown(found)} is no kind of {_singular(location)}; {known}")
    if kind == "value_error":
        return Fault(path, f": {context.get('error', detail['msg'])}")
    if "[key]" in detail["loc"]:
        return Fault(path, f" is no valid name: {rule(detail)}")
    return Fault(path, f"={shown(value)}: {rule(detail)}")


def _kinds(location: Location) -> list[str]:
    """The kinds that the union at `location` tells apart."""
    return [kind for model in models_at(location) for kind in get_args(model.model_fields["kind"].annotation)]


def _singular(location: Location) -> str:
    name = next(str(part) for part in reversed(location) if isinstance(part, str))
    return name.removesuffix("s")


def shown(value: Any) -> str:
    """A value in at most 60 letters; not one that looks like a key, which may have been put into any place."""
    if any(looks_like_key(word) for word in re.findall(r"[^\s\"'=,:\[\]{}]+", str(value))):
        return "*** (not shown: it looks like a key)"
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _meant(location: Location, data: Data) -> str:
    key, parent = str(location[-1]), location[:-1]
    allowed = keys_at(parent, data)
    near = nearest(key, allowed)
    if near is None and (elsewhere := nearest_path(key)) and elsewhere.rpartition(".")[2] == key:
        return f"did you mean {elsewhere}?"
    if near is not None:
        return f"did you mean {dotted([*parent, near])}?"
    return f"{dotted(parent) or 'the top level'} has {', '.join(allowed)}"


def _required(location: Location) -> str:
    key = str(location[-1])
    if len(location) == 1:
        hints = {
            "name": "give the run a name, such as `name: demo`",
            "domains": "declare at least one, such as `domains: {code: {source: {kind: stdlib}}}`",
            "stages": "list at least one, such as `stages: [{name: code, domains: {code: 1}}]`",
        }
        return hints.get(key, "set it")
    if key == "domains":
        return "name the new domains and their weights, such as `domains: {code: 1}`"
    if key == "source":
        return "say where the text comes from, such as `source: {kind: files, paths: [corpus/]}`"
    return "set it"


def rule(detail: ErrorDetails) -> str:
    """What a value must be, and how to write it."""
    kind, value, context = detail["type"], detail["input"], detail.get("ctx") or {}
    if kind in ("literal_error", "enum"):
        known = [word.strip("'") for word in str(context["expected"]).replace(" or ", ", ").split(", ")]
        near = nearest(str(value), known)
        return f"must be one of {', '.join(known)}" + (f"; did you mean {near!r}?" if near else "")
    bounds = {
        "greater_than_equal": ("ge", "must be at least"),
        "greater_than": ("gt", "must be more than"),
        "less_than_equal": ("le", "must be at most"),
        "less_than": ("lt", "must be less than"),
    }
    if kind in bounds:
        key, words = bounds[kind]
        return f"{words} {context[key]:.12g}; write a number in that range"
    if kind == "string_pattern_mismatch" and context["pattern"].startswith("^[A-Za-z0-9]"):
        return "a name has letters, digits, '.', '_' and '-', starts with a letter or digit; choose such a name"
    if kind == "string_pattern_mismatch":
        return "must be the 64 hex digits, in lower case, that `sha256sum FILE` prints"
    if kind == "too_short":
        return "must not be empty; name at least one"
    if kind == "string_too_long":
        return f"must have at most {context['max_length']} letters; shorten it"
    return _type_rule(kind, value, detail["msg"])


def _type_rule(kind: str, value: Any, message: str) -> str:
    if kind in ("float_type", "float_parsing", "int_type", "int_parsing") and isinstance(value, str):
        plain = _plain_number(value)
        if plain is not None:
            return f"YAML reads this as text, not as a number; write {plain}"
    words = {
        "float_type": "must be a number, such as 0.1",
        "finite_number": "must be a finite number",
        "int_type": "must be a whole number, such as 8",
        "int_from_float": "must be a whole number, without a fraction",
        "bool_type": "must be true or false",
        "string_type": f"must be text; put it in quotes: {str(value)!r}",
        "list_type": "must be a list, such as [a, b]",
        "dict_type": "must be a mapping, such as {key: value}",
        "model_type": "must be a section of `key: value` lines",
    }
    return words.get(kind, message[:1].lower() + message[1:])


def _plain_number(text: str) -> str | None:
    """`3.0e-4` for `3e-4`, `1000` for `1,000`: how the number must be written for YAML to see one."""
    try:
        number = float(text.replace(",", "").replace("_", ""))
    except ValueError:
        return None
    if number.is_integer() and "e" not in text.lower() and "." not in text:
        return str(int(number))
    if "e" in text.lower():
        mantissa, _, exponent = text.lower().partition("e")
        mantissa = mantissa if "." in mantissa else mantissa + ".0"
        return f"{mantissa}e{exponent if exponent[:1] in '+-' else '+' + exponent}"
    return repr(number)


def _repair(data: Data, details: Iterable[ErrorDetails]) -> Data:
    """Copy of `data` with every faulty value replaced by its default, or by something harmless where there is none."""
    result = copy_data(data)
    if not isinstance(result, dict):
        return {}
    for detail in details:
        location = _location(detail, data)
        if location[:1] == ("domains",) and len(location) >= 3 and location[2] == "source":
            result["domains"][location[1]]["source"] = {"kind": "stdlib"}
        elif location[:1] == ("synthesis",) and len(location) > 1:
            result["synthesis"].pop(location[1], None)
        elif "[key]" in detail["loc"] or detail["type"] != "missing":
            _remove(result, location)
        elif location[-1] == "name":
            _put(result, location, f"unnamed-{len(dotted(location))}")
        elif location[-1] == "source":
            _put(result, location, {"kind": "stdlib"})
    return result


def _remove(data: Any, location: Location) -> None:
    """Take a value out; one inside a list of plain values takes the list along, so that no index shifts."""
    holder: Any = None
    for part in location[:-1]:
        inside = isinstance(data, list) or (isinstance(data, dict) and part in data)
        holder, data = data, data[part] if inside else {}
    if isinstance(data, dict):
        data.pop(location[-1], None)
    elif isinstance(holder, dict) and location[0] != "stages":
        holder.pop(location[-2], None)


def _put(data: Any, location: Location, value: Any) -> None:
    for part in location[:-1]:
        data = data[part]
    data[location[-1]] = value
