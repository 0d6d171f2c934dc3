"""The system calls that the sandbox needs and Python 3.11 has no name for, through libc.

Every call that fails raises `SetupError` with the step and the system's reason.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import struct

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 0x1000, 0x4000, 0x40000
MNT_DETACH = 2
_ATTR_READ_ONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_DROP = 1, 4, 22, 24
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _AMBIENT_CLEAR_ALL = 36, 38, 47, 4
_SECCOMP_MODE_FILTER = 2
_CAPABILITY_VERSION_3 = 0x20080522
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_MOUNT_SETATTR = 442  # the same on every architecture; Linux 5.12

_libc = ctypes.CDLL(None, use_errno=True)


class SetupError(OSError):
    """A step of building the sandbox was refused by the system."""

    def __init__(self, step: str, number: int) -> None:
        super().__init__(number, f"{step}: {os.strerror(number)}")
        self.step = step


def _check(step: str, result: int) -> None:
    if result == -1:
        raise SetupError(step, ctypes.get_errno())


def _prctl(step: str, option: int, *values: int) -> None:
    padded = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)][:4]
    _check(step, _libc.prctl(option, *padded))


def unshare(flags: int, step: str) -> None:
    """Leave the namespaces named by `flags` for new ones."""
    _check(step, _libc.unshare(ctypes.c_int(flags)))


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    values = [None if value is None else value.encode() for value in (source, target, kind)]
    _check(f"mount {source} at {target}", _libc.mount(*values, ctypes.c_ulong(flags), options.encode() or None))


def unmount(target: str) -> None:
    """Detach a mount and all that is mounted inside it."""
    _check(f"unmount {target}", _libc.umount2(target.encode(), MNT_DETACH))


def pivot_root(new: str, old: str) -> None:
    """Make the mount `new` the root; the former root appears at `old`, a folder inside `new`."""
    number = _PIVOT_ROOT[platform.machine()]
    _check("pivot_root", _libc.syscall(ctypes.c_long(number), new.encode(), old.encode()))


def make_read_only(target: str, attributes: int = 0, *, recursive: bool = True) -> None:
    """Read-only, with further `attributes`; flags that a mount already has stay, as the kernel demands."""
    flags = _AT_RECURSIVE if recursive else 0
    attr = struct.pack("=QQQQ", _ATTR_READ_ONLY | attributes, 0, 0, 0)
    result = _libc.syscall(
        ctypes.c_long(_MOUNT_SETATTR),
        ctypes.c_int(_AT_FDCWD),
        target.encode(),
        ctypes.c_uint(flags),
        attr,
        ctypes.c_size_t(len(attr)),
    )
    _check(f"make {target} read-only (mount_setattr, Linux 5.12)", result)


def die_with_parent() -> None:
    """SIGKILL for this process when its parent ends. Credentials that change afterwards undo it."""
    _prctl("prctl PDEATHSIG", _PR_SET_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> None:
    """Descendants whose parents end become children of this process."""
    _prctl("prctl CHILD_SUBREAPER", _PR_SET_CHILD_SUBREAPER, 1)


def hide_memory() -> None:
    """No other process may trace this one or read its memory."""
    _prctl("prctl DUMPABLE", _PR_SET_DUMPABLE, 0)


def drop_bounding_set() -> None:
    """No program run from here can gain a capability. Needs CAP_SETPCAP."""
    for capability in range(64):
        if _libc.prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0) == -1:
            break  # the first number that this kernel does not know
    if capability == 0:
        raise SetupError("prctl CAPBSET_DROP", ctypes.get_errno())


def drop_capabilities() -> None:
    """Give up all capabilities for good: effective, permitted, inheritable, ambient, and by set-uid programs."""
    _prctl("prctl CAP_AMBIENT", _PR_CAP_AMBIENT, _AMBIENT_CLEAR_ALL)
    header, sets = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), bytes(24)
    _check("capset", _libc.capset(header, sets))
    _prctl("prctl NO_NEW_PRIVS", _PR_SET_NO_NEW_PRIVS, 1)


def install_filter(program: bytes) -> None:
    """Put a seccomp filter (packed `struct sock_filter`s) on this process and all it starts, for good."""
    instructions = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(instructions))
    buffer = ctypes.create_string_buffer(header, len(header))
    _prctl("prctl SECCOMP", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(buffer))
