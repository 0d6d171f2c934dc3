"""A small, sound config for tests to spoil."""

from __future__ import annotations

from pathlib import Path

from nexus_ray.config import RunConfig, parse_config
from nexus_ray.config.source import parse_yaml

TWO_STAGES = """
name: two
domains:
  letters: {source: {kind: files, paths: [letters.txt]}}
  code: {source: {kind: stdlib}}
stages:
  - {name: letters, domains: {letters: 1}}
  - {name: code, domains: {code: 1}}
"""


def two_stages(*overrides: str, text: str = TWO_STAGES) -> RunConfig:
    """The config above with `path=value` overrides."""
    return parse_config(parse_yaml(text, where="two.yaml"), overrides, where="two.yaml")


def write_two_stages(folder: Path, text: str = TWO_STAGES) -> Path:
    """The config above as a file, its corpus beside it, its storage inside `folder`."""
    corpus = folder / "letters.txt"
    corpus.write_text("a b c d e f g\n" * 50)
    file = folder / "two.yaml"
    file.write_text(text.replace("letters.txt", str(corpus)) + f"storage: {folder / 'runs'}\n")
    return file
