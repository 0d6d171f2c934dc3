"""Imports point one way, and what must answer at once stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "nexus_ray"
ORDER = (
    ("errors",),
    ("config",),
    ("storage", "session", "hub"),
    ("corpora",),
    ("models",),
    ("synthesis",),
    ("stream",),
    ("train",),
    ("evaluate",),
    ("jobs",),
    ("tracking_board",),
    ("progress", "tracking", "record"),
    ("study",),
    ("tracking_study",),
    ("steer",),
    ("watching",),
    ("roadmap",),
    ("tune",),
    ("report",),
    ("dry_run", "doctor", "grid"),
    ("cli",),
)
"""A module imports only from its own part and from those before it, lazily or not."""
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
HEAVY = ("torch", "ray", "deepspeed", "transformers", "datasets", "pyarrow", "wandb", "numpy")


def part(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def imported(path: Path) -> set[str]:
    """The nexus_ray modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write it out"
            origin = node.module or ""
            names.update([f"{origin}.{alias.name}" for alias in node.names] if origin == "nexus_ray" else [origin])
    return {name for name in names if name.split(".")[0] == "nexus_ray"}


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_to_the_left(path: Path) -> None:
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    assert own in RANK, f"{own} has no place in the order of the parts yet; give it one here"
    for module in imported(path):
        other = part(module)
        if other in ("__init__", "__version__"):
            continue
        assert RANK[other] <= RANK[own], f"{own} imports {module}, which stands to its right"
        assert other == own or RANK[other] < RANK[own], f"{own} imports its neighbour {module}"


def test_only_the_session_and_the_doctor_start_ray() -> None:
    callers = {path.name for path in FILES if "ray.init(" in path.read_text().replace("`ray.init", "")}
    assert callers == {"session.py", "doctor.py"}


@pytest.mark.parametrize(
    "module", ["nexus_ray", "nexus_ray.errors", "nexus_ray.config", "nexus_ray.cli", "nexus_ray.session"]
)
def test_light_modules_load_nothing_heavy(module: str) -> None:
    assert loaded(module, HEAVY) == "[]"


def loaded(modules: str, heavy: tuple[str, ...]) -> str:
    code = f"import sys, {modules}; print([m for m in {heavy!r} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    return run.stdout.strip()


def test_public_names_load_lazily() -> None:
    import nexus_ray

    assert nexus_ray.ContinualConfig().replay_ratio == 0.1
    assert "ContinualConfig" in dir(nexus_ray) and nexus_ray.__version__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        nexus_ray.nothing  # noqa: B018
