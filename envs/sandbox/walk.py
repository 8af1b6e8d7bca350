"""Reads a sandbox's work directory from outside, through one directory descriptor, trusting nothing in it.

No process of the sandbox takes part. Links are never followed, and every open is relative to a directory that was
opened before, so a swap between check and use leads nowhere else. Left out, as though absent: everything that is not a
regular file, sparse files (their apparent size is not bounded by the disk limit), names that are not UTF-8, what is
deeper than `DEPTH`, and what its own mode hides from this user.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from envs.sandbox.base import Changes, FileChange

DEPTH = 128
"""Directories below each other; one descriptor is held for each."""

_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY


def read_tree(root: int, budget: int) -> dict[str, FileChange]:
    """Every regular file below descriptor `root`: relative POSIX path → content and permission bits, in path order.

    At most `budget` bytes are held; hard links share theirs. What is written meanwhile may or may not be seen.
    """
    links: dict[int, bytes] = {}
    found = {}
    for path, fd, info in _files(root, "", 0):
        with os.fdopen(fd, "rb", buffering=0) as file:
            data = links.get(info.st_ino)
            if data is None:
                data = _read(file.fileno(), info.st_size) if info.st_size <= budget else None
            if data is None:
                continue
        if info.st_nlink > 1:
            budget -= 0 if info.st_ino in links else len(data)
            links[info.st_ino] = data
        else:
            budget -= len(data)
        found[path] = FileChange(data, stat.S_IMODE(info.st_mode) & 0o777)
    return dict(sorted(found.items()))


def diff(origin: Mapping[str, FileChange], now: Mapping[str, FileChange]) -> Changes:
    """What differs: new and changed files as they are now, missing ones as deleted; in path order."""
    changed = {path: change for path, change in now.items() if origin.get(path) != change}
    changed.update({path: FileChange(None) for path in origin if path not in now})
    return MappingProxyType(dict(sorted(changed.items())))


def _files(directory: int, prefix: str, depth: int) -> Iterator[tuple[str, int, os.stat_result]]:
    """Open descriptors of the regular files below `directory`; the caller closes each."""
    for name in sorted(os.listdir(directory)):
        try:
            name.encode()
            kind = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
            if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
                continue  # before the open: opening a device or FIFO can act
            fd = os.open(name, _OPEN, dir_fd=directory)
        except (OSError, UnicodeEncodeError):
            continue
        info = os.fstat(fd)
        if stat.S_ISREG(info.st_mode) and info.st_blocks * 512 >= info.st_size:
            yield prefix + name, fd, info
            continue
        try:
            if stat.S_ISDIR(info.st_mode) and depth < DEPTH:
                yield from _files(fd, f"{prefix}{name}/", depth + 1)
        finally:
            os.close(fd)


def _read(fd: int, size: int) -> bytes:
    parts = []
    while size > 0 and (part := os.read(fd, min(size, 1 << 20))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
