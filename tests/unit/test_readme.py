"""What the README tells a newcomer to type exists: verbs, configs, settings, make targets, files."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from nexus_ray.cli import VERBS, build_parser
from nexus_ray.config import load_config, parse_config
from nexus_ray.config.source import apply_overrides
from nexus_ray.config.study import StudyConfig
from nexus_ray.grid import load_grid
from nexus_ray.study.load import load_study

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [
    shlex.split(line, comments=True) for kind, block in BLOCKS if kind == "bash" for line in block.splitlines() if line
]
INLINE = [shlex.split(text) for text in re.findall(r"`((?:nexus-ray|make) [a-z][^`]*)`", README)]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
WRITTEN_LATER = {"RESULT.md", "VERB.py"}
"""Results of the experiments, and a placeholder."""


def check(words: list[str]) -> None:
    """One command line: what it names exists, and the config it names loads with its overrides."""
    program, *rest = words
    if program == "make":
        assert rest[0] in TARGETS, f"no make target {rest[0]}"
    elif program == "nexus-ray":
        check_verb([word for word in rest if word not in (">", "schema.json")])
    elif program == "ray":
        script = words[words.index("--") + 1 :]
        assert script[0] == "python"
        check(script)
    elif program == "python":
        assert (ROOT / rest[0]).is_file(), f"no file {rest[0]}"
        if rest[0].startswith("jobs/"):
            check_verb([Path(rest[0]).stem, *rest[1:]])
    else:
        assert words == ["source", ".venv/bin/activate"]


def check_verb(words: list[str]) -> None:
    args = build_parser().parse_args(words)
    assert args.verb in VERBS
    config = getattr(args, "config", None)
    if config is None or config.startswith("runs/"):
        return
    if args.verb == "grid":
        assert load_grid(ROOT / config)[1]
    elif args.verb == "tune":
        assert load_study(ROOT / config).config.name
    else:
        assert load_config(ROOT / config, args.overrides).name


@pytest.mark.parametrize("words", COMMANDS + INLINE, ids=" ".join)
def test_a_command_is_true(words: list[str]) -> None:
    check(words)


def test_there_are_commands() -> None:
    text = [" ".join(words) for words in COMMANDS]
    assert text[:2] == ["make demo", "make test"] and len(text) > 10


def test_every_verb_is_in_the_table_as_the_command_line_describes_it() -> None:
    listed = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|$", README, flags=re.MULTILINE))
    assert set(listed) == set(VERBS)
    assert all((ROOT / "jobs" / f"{verb}.py").is_file() for verb in set(VERBS) - {"schema"})


@pytest.mark.parametrize("block", [text for kind, text in BLOCKS if kind == "yaml"])
def test_a_piece_of_config_fits_into_the_demo(block: str) -> None:
    piece = yaml.safe_load(block)
    if "space" in piece:
        assert StudyConfig.model_validate(piece).name
        return
    tree = yaml.safe_load((ROOT / "configs/demo.yaml").read_text())
    if "domains" in piece:  # stands for the demo's own
        tree["model"].pop("tokenizer")
        tree.pop("report")
        parse_config({**tree, **piece})
    else:
        tree["model"] = {}
        values = [
            f"{section}.{key}={yaml.safe_dump(value, default_flow_style=True).strip()}"
            for section, part in piece.items()
            for key, value in part.items()
        ]
        parse_config(apply_overrides(tree, [value.removesuffix("...").strip() for value in values]))


def test_every_file_named_exists() -> None:
    named = re.findall(r"`((?:tests|configs|jobs|nexus_ray)/[\w./-]*)`", README)
    named += re.findall(r"\]\(((?!https?:)[^)]*)\)", README)
    missing = [path for path in named if Path(path).name not in WRITTEN_LATER and not (ROOT / path).exists()]
    assert not missing


def test_every_setting_named_exists() -> None:
    from nexus_ray.config.paths import setting_paths

    sections = {path.partition(".")[0] for path in setting_paths() if "." in path}
    named = {
        path
        for path in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:[:=][^`]*)?`", README)
        if path.partition(".")[0] in sections and not path.endswith((".py", ".html"))
    }
    assert named and named <= set(setting_paths())
