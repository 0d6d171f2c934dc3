"""What a sandboxed program can see of this machine: the interpreter, its standard library, the system's libraries."""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
from pathlib import Path

_SYSTEM_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")


def interpreter() -> str:
    """Real path of the interpreter behind this one's virtual environment, if it is in one."""
    return os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable)


@functools.cache
def visible_paths() -> list[list[str]]:
    """Pairs (path on this machine, path inside), none inside another; no packages of a virtual environment."""
    prefix = Path(interpreter()).parents[1]
    own = [interpreter(), sysconfig.get_path("stdlib"), str(prefix / "lib"), str(prefix / "lib64")]
    own.append(str(sysconfig.get_config_var("LIBDIR")))
    pairs = {path: os.path.realpath(path) for path in _SYSTEM_LIBRARIES if os.path.exists(path)}
    pairs |= {os.path.realpath(path): os.path.realpath(path) for path in own if os.path.exists(path)}
    outer = [path for path in sorted(pairs) if not any(path.startswith(f"{other}/") for other in pairs)]
    return [[pairs[path], path] for path in outer]
