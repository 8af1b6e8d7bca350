"""System calls as data: their numbers on the machines that sandboxes run on, and a call written down for the helper,
which carries it out (`helper/launch.c`) in a process where Python can't."""

from __future__ import annotations

import functools
import os
import platform
import struct

from envs.errors import Unsupported

MACHINES = ("x86_64", "aarch64")

NUMBERS: dict[str, tuple[int | None, int | None]] = {
    "acct": (163, 89),
    "add_key": (248, 217),
    "adjtimex": (159, 171),
    "bpf": (321, 280),
    "capset": (126, 91),
    "chdir": (80, 49),
    "chroot": (161, 51),
    "clock_adjtime": (305, 266),
    "clock_settime": (227, 112),
    "clone": (56, 220),
    "clone3": (435, 435),
    "close": (3, 57),
    "delete_module": (176, 106),
    "fanotify_init": (300, 262),
    "fchmodat": (268, 53),
    "fchownat": (260, 54),
    "finit_module": (313, 273),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "init_module": (175, 105),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "ioctl": (16, 29),
    "ioperm": (173, None),
    "iopl": (172, None),
    "kcmp": (312, 272),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "lookup_dcookie": (212, 18),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "mkdirat": (258, 34),
    "modify_ldt": (154, None),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "mq_open": (240, 180),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "open_tree_attr": (467, 467),
    "openat": (257, 56),
    "perf_event_open": (298, 241),
    "pidfd_getfd": (438, 438),
    "pivot_root": (155, 41),
    "prctl": (157, 167),
    "prlimit64": (302, 261),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "reboot": (169, 142),
    "request_key": (249, 218),
    "setdomainname": (171, 162),
    "setgroups": (116, 159),
    "sethostname": (170, 161),
    "setns": (308, 268),
    "setresgid": (119, 149),
    "setresuid": (117, 147),
    "settimeofday": (164, 170),
    "setxattr": (188, 5),
    "shmget": (29, 194),
    "socket": (41, 198),
    "swapoff": (168, 225),
    "swapon": (167, 224),
    "syslog": (103, 116),
    "umask": (95, 166),
    "umount2": (166, 39),
    "unlinkat": (263, 35),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
    "vhangup": (153, 58),
}
"""Name → its number on each of `MACHINES`, None where there is no such call (Linux: `unistd_64.h`,
`asm-generic/unistd.h`)."""

ANY = -1
"""Every errno."""

_OWN = {"put": -1, "make": -2}
"""What the helper has of its own: put(path, text) replaces the text of a file; make(path, is a directory) makes
what is missing of a path without following a link."""
_CALL = struct.Struct("<IhhII6q")


@functools.lru_cache(4096)
def call(name: str, *args: int | str | bytes, step: str, forgiven: int = 0) -> bytes:
    """One call, by name, for the helper to make. What is not a number is passed as a pointer: a path or text, or the bytes
    of a struct.

    step: what is said with the cause when it fails. forgiven: the errno that is no failure; `ANY`.
    """
    values, data, pointers = [0] * 6, b"", 0
    for place, arg in enumerate(args):
        if isinstance(arg, int):
            values[place] = arg
            continue
        values[place] = _CALL.size + len(data)
        pointers |= 1 << place
        data += os.fsencode(arg) + b"\0" if isinstance(arg, str) else arg
    at = _CALL.size + len(data)
    data += os.fsencode(step) + b"\0"
    data += bytes(-len(data) % 8)
    return _CALL.pack(_CALL.size + len(data), _OWN.get(name) or known(name), forgiven, pointers, at, *values) + data


def known(name: str) -> int:
    """The number of a system call that every machine has."""
    found = number(name)
    assert found is not None, name
    return found


@functools.cache
def number(name: str) -> int | None:
    """The number of a system call on this machine. Raises `Unsupported` on one that is not of `MACHINES`."""
    return NUMBERS[name][machine()]


@functools.cache
def machine() -> int:
    """Which of `MACHINES` this is. Raises `Unsupported` on any other."""
    if (here := platform.machine()) not in MACHINES:
        raise Unsupported(f"sandbox: this machine is {here}; sandboxes run on {' and '.join(MACHINES)}")
    return MACHINES.index(here)
