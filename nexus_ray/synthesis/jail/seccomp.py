"""A seccomp filter in a hundred instructions: what namespaces and limits leave open is refused here.

Refused with EPERM: sockets of any family but AF_UNIX (a network namespace does not cover them all: AF_VSOCK reaches a
virtual machine's host), memory that no limit counts (memfd, System V and POSIX queues, io_uring), new namespaces and
mounts, tracing, and interfaces that have a history of kernel faults (bpf, perf, userfaultfd, keys). A foreign calling
convention (32-bit, x32) ends the process. Numbers: Linux `asm/unistd_64.h` and `asm-generic/unistd.h`.
"""

from __future__ import annotations

import errno
import platform
import socket
import struct

REFUSED = {
    "x86_64": {
        "ptrace": 101, "personality": 135, "modify_ldt": 154, "pivot_root": 155, "chroot": 161, "acct": 163,
        "mount": 165, "umount2": 166, "quotactl": 179, "shmget": 29, "semget": 64, "msgget": 68, "mq_open": 240,
        "add_key": 248, "request_key": 249, "keyctl": 250, "migrate_pages": 256, "unshare": 272, "move_pages": 279,
        "perf_event_open": 298, "fanotify_init": 300, "name_to_handle_at": 303, "open_by_handle_at": 304, "setns": 308,
        "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "memfd_create": 319, "bpf": 321,
        "userfaultfd": 323,
    },
    "aarch64": {
        "umount2": 39, "mount": 40, "pivot_root": 41, "chroot": 51, "quotactl": 60, "acct": 89, "personality": 92,
        "unshare": 97, "ptrace": 117, "mq_open": 180, "msgget": 186, "semget": 190, "shmget": 194, "add_key": 217,
        "request_key": 218, "keyctl": 219, "migrate_pages": 238, "move_pages": 239, "perf_event_open": 241,
        "fanotify_init": 262, "name_to_handle_at": 264, "open_by_handle_at": 265, "setns": 268,
        "process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272, "memfd_create": 279, "bpf": 280,
        "userfaultfd": 282,
    },
}  # fmt: skip
REFUSED_EVERYWHERE = {
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428, "move_mount": 429,
    "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "pidfd_getfd": 438, "mount_setattr": 442,
    "memfd_secret": 447,
}  # fmt: skip
"""Calls since Linux 5.1 have one number on all architectures."""
_BY_ARGUMENT = {
    "x86_64": {"clone": 56, "socket": 41, "socketpair": 53},
    "aarch64": {"clone": 220, "socket": 198, "socketpair": 199},
}
_CLONE3 = 435
_NEW_NAMESPACES = 0x7E020000
"""Every CLONE_NEW* flag that `clone` takes."""
_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32_BIT = 0x40000000
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENT_AT = 0, 4, 16
"""Offsets in `struct seccomp_data`; the first argument's lower half on a little-endian machine."""

Instruction = tuple[int, int, int, int]
"""Code, instructions to skip if true, instructions to skip if false, constant."""


def supported() -> bool:
    """Whether the call numbers of this machine are known here."""
    return platform.machine() in REFUSED


def build_filter(machine: str) -> bytes:
    """Packed `struct sock_filter`s for `x86_64` or `aarch64`; KeyError for any other machine."""
    instructions: list[Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_EQUAL, 1, 0, _ARCHITECTURE[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
    ]
    if machine == "x86_64":
        instructions += [(_AT_LEAST, 0, 1, _X32_BIT), (_RETURN, 0, 0, _KILL)]
    for number in (*REFUSED[machine].values(), *REFUSED_EVERYWHERE.values()):
        instructions += _answer(number, errno.EPERM)
    instructions += _answer(_CLONE3, errno.ENOSYS)  # its flags lie in memory; libc falls back to clone
    special = _BY_ARGUMENT[machine]
    instructions += _unless_argument(special["clone"], (_ANY_BIT, 0, 1, _NEW_NAMESPACES))
    for name in ("socket", "socketpair"):
        instructions += _unless_argument(special[name], (_EQUAL, 1, 0, socket.AF_UNIX))
    instructions.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)


def _answer(number: int, error: int) -> list[Instruction]:
    return [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | error)]


def _unless_argument(number: int, test: Instruction) -> list[Instruction]:
    """EPERM for call `number` where `test` of its first argument leads to the next instruction, else allowed."""
    return [
        (_EQUAL, 0, 4, number),
        (_LOAD, 0, 0, _ARGUMENT_AT),
        test,
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
