"""The other side of `synthesis.sandbox` and of servers: programs that run in processes of their own, on the standard
library alone."""

from __future__ import annotations

import sys
from pathlib import Path

_LOAD = """
import importlib, sys, types
for name, folder in (("nexus_ray", sys.argv[1]), ("nexus_ray.synthesis", sys.argv[1] + "/synthesis")):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
importlib.import_module("nexus_ray.synthesis.jail." + sys.argv[2]).main()
"""
"""Loads a program without the packages above it, which would load pydantic."""


def bare_command(program: str) -> list[str]:
    """Command that runs `main` of a module of this package; it finds arguments added here from `sys.argv[3]` on."""
    return [sys.executable, "-I", "-S", "-c", _LOAD, str(Path(__file__).parents[2]), program]
