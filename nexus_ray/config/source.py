"""From a YAML file and `path=value` overrides to plain nested data, refusing what YAML would swallow in silence.

Duplicate keys, keys that are not text (`no:` means `False` in YAML 1.1) and values that are no plain data are
errors here; what the values mean is the business of `faults` and `tree`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from nexus_ray.errors import ConfigError

Data = dict[str, Any]


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate and non-text keys, and leaves dates as the text they are."""


def _strict_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> Data:
    seen: set[str] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node, deep=True)
        written = key_node.value if isinstance(key_node, yaml.ScalarNode) else str(key)
        if not isinstance(key, str):
            problem = f"the key {written} is read by YAML as {key!r}, not as text; write '{written}' in quotes"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
        if key in seen:
            problem = f"the key {key!r} stands twice in one mapping; keep one of them"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
        seen.add(key)
    loader.flatten_mapping(node)  # `<<` merges: the mapping's own keys come last and win
    return {
        loader.construct_object(key, deep=True): loader.construct_object(value, deep=True) for key, value in node.value
    }


def _as_text(_: _StrictLoader, node: yaml.ScalarNode) -> str:
    return node.value


_StrictLoader.add_constructor("tag:yaml.org,2002:map", _strict_mapping)
_StrictLoader.add_constructor("tag:yaml.org,2002:timestamp", _as_text)


def parse_yaml(text: str, *, where: str) -> Any:
    """Plain data of a YAML text. Raises ConfigError naming `where`, the line and the problem."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{where}, line {mark.line + 1}, column {mark.column + 1}" if mark else where
        context = f" ({error.context})" if error.context else ""
        raise ConfigError(f"{place}: {error.problem or 'not valid YAML'}{context}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from None


def read_yaml(path: Path) -> Data:
    """The mapping in a YAML file. Raises ConfigError if the file is missing, unreadable or no mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist{_neighbours(path)}") from None
    except IsADirectoryError:
        raise ConfigError(f"config file {path} is a folder; name a YAML file{_neighbours(path / 'x')}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from None
    data = parse_yaml(text, where=str(path))
    if not isinstance(data, dict):
        found = "empty" if data is None else f"a {type(data).__name__}"
        raise ConfigError(f"config file {path} is {found}; it must be a mapping that starts with `name:`")
    return data


def _neighbours(path: Path) -> str:
    names = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
    return f"; {path.parent}/ has {', '.join(names[:8])}" if names else ""


def apply_overrides(data: Data, overrides: Sequence[str]) -> Data:
    """Copy of `data` with every `path=value` set: values are YAML, lists and mappings are replaced whole.

    Unknown keys are set as they stand, for the validation to report. Raises ConfigError listing every override
    that has no `=` or leads through a value that is no section.
    """
    result = copy_data(data)
    problems = []
    for override in overrides:
        try:
            _apply(result, override)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return result


def override_texts(values: Mapping[str, Any]) -> Iterator[str]:
    """`path=value` texts whose values YAML reads back as they are (JSON's 1e-05 it would read as text)."""
    for path, value in values.items():
        text = yaml.safe_dump(value, default_flow_style=True, width=10**9)
        yield f"{path}={text.removesuffix('...' + chr(10)).strip()}"


def _apply(data: Data, override: str) -> None:
    path, equals, text = override.partition("=")
    path = path.strip()
    if not equals or not path or not all(path.split(".")):
        raise ConfigError(f"override {override!r} is not of the form path=value, such as training.seq_len=128")
    value = parse_yaml(text, where=f"override {override!r}")
    node: Any = data
    parts = path.split(".")
    done: list[str] = []
    while parts:
        key, rest = _next_key(node, parts, done, override)
        if not rest:
            node[key] = value
            return
        if isinstance(node, dict) and node.get(key) is None:
            node[key] = {}
        node, parts = node[key], rest
        done.append(str(key))


def _next_key(node: Any, parts: list[str], done: list[str], override: str) -> tuple[Any, list[str]]:
    """The key of `node` that the first of `parts` name, and the parts left over (keys may contain dots)."""
    place = ".".join(done)
    if isinstance(node, list):
        if not parts[0].isdecimal() or int(parts[0]) >= len(node):
            count = f"entries 0 to {len(node) - 1}" if node else "no entries"
            raise ConfigError(f"override {override!r}: {place} has {count}, not {parts[0]!r}")
        return int(parts[0]), parts[1:]
    if not isinstance(node, dict):
        raise ConfigError(f"override {override!r}: {place} is {node!r}, so it has no {parts[0]!r} inside")
    if done and done[-1] == "override":  # a stage's overrides are keyed by whole dotted paths
        return ".".join(parts), []
    for length in range(len(parts), 1, -1):
        if (joined := ".".join(parts[:length])) in node:
            return joined, parts[length:]
    return parts[0], parts[1:]


def copy_data(value: Any) -> Any:
    """Deep copy of plain nested data."""
    if isinstance(value, dict):
        return {key: copy_data(item) for key, item in value.items()}
    if isinstance(value, list):
        return [copy_data(item) for item in value]
    return value
