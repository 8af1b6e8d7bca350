"""Reads a sandbox's work directory from outside, through directory descriptors, trusting nothing in it.

No process of the sandbox takes part. Links are never followed, and every open is relative to a directory that was
opened before, so a swap between check and use leads nowhere else. Left out, as though absent: everything that is not a
regular file, names that are not UTF-8, what is deeper than `DEPTH`, what its own mode hides from this user, and what
is larger than the disk limits allow (a file with holes may seem to be).
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from envs.sandbox.base import Changes, FileChange

DEPTH = 128
"""Directories below each other; one descriptor is held for each."""

_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_DIRECTORY = _OPEN | os.O_DIRECTORY


def read_tree(root: int, budget: int) -> dict[str, FileChange]:
    """Every regular file below descriptor `root`: relative POSIX path → content and permission bits, in path order.

    At most `budget` bytes are held; hard links share theirs. What is written meanwhile may or may not be seen.
    """
    return _read(_files(root, "", 0), budget)


def overlay_changes(
    root: int, uppers: Sequence[int], origin: int | None, workdir: str, given: Mapping[str, FileChange], budget: int
) -> Changes:
    """What differs in `workdir` from its start, looking only at what was touched.

    root: the sandbox's root as it is. uppers: upper directories of the overlay, where whatever was touched is. origin: the
    root as it was before `given` (the files put into `workdir` at the start); None where it had no work directory.
    """
    paths = set(given)
    for upper in uppers:
        paths.update(_touched(upper, workdir))
    if origin is None:
        return diff(given, _read(_some(root, workdir, paths), budget))
    for prefix in tuple(paths - given.keys()):  # a file or link `x` now: the origin's `x/a` and `x/b` are gone
        paths.update(_names(origin, workdir, prefix))
    now = _read(_some(root, workdir, paths), budget)
    sizes = {path: len(change.data or b"") for path, change in now.items()}
    was = _read(_some(origin, workdir, paths - given.keys()), 1 << 62, sizes)
    return diff(was | dict(given), now)


def diff(origin: Mapping[str, FileChange], now: Mapping[str, FileChange]) -> Changes:
    """What differs: new and changed files as they are now, missing ones as deleted; in path order."""
    changed = {path: change for path, change in now.items() if origin.get(path) != change}
    changed.update({path: FileChange(None) for path in origin if path not in now})
    return MappingProxyType(dict(sorted(changed.items())))


File = tuple[str, int, os.stat_result]
"""Path, open descriptor (the receiver closes it), status."""


def _read(files: Iterable[File], budget: int, sizes: Mapping[str, int] | None = None) -> dict[str, FileChange]:
    """The content of files, `budget` bytes in all. With `sizes`, only of those that have theirs; the rest are only named."""
    links: dict[tuple[int, int], bytes] = {}
    found = {}
    for path, fd, info in files:
        inode = (info.st_dev, info.st_ino)
        with os.fdopen(fd, "rb", buffering=0) as file:
            if sizes is not None and sizes.get(path) != info.st_size:
                found[path] = FileChange(b"", 0)
                continue
            data = links.get(inode)
            if data is None:
                data = _content(file.fileno(), info.st_size) if info.st_size <= budget else None
            if data is None:
                continue
        if info.st_nlink > 1:
            budget -= 0 if inode in links else len(data)
            links[inode] = data
        else:
            budget -= len(data)
        found[path] = FileChange(data, stat.S_IMODE(info.st_mode) & 0o777)
    return dict(sorted(found.items()))


def _open(directory: int, name: str) -> tuple[int, os.stat_result] | None:
    """Descriptor and status of a directory or a regular file."""
    try:
        name.encode()
        kind = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
            return None  # before the open: opening a device or FIFO can act
        fd = os.open(name, _OPEN, dir_fd=directory)
    except (OSError, ValueError):
        return None
    info = os.fstat(fd)
    if stat.S_ISDIR(info.st_mode) or stat.S_ISREG(info.st_mode):
        return fd, info
    os.close(fd)
    return None


def _files(directory: int, prefix: str, depth: int) -> Iterator[File]:
    """The regular files below `directory`."""
    for name in sorted(os.listdir(directory)):
        opened = _open(directory, name)
        if opened is None:
            continue
        fd, info = opened
        if stat.S_ISREG(info.st_mode):
            yield prefix + name, fd, info
            continue
        try:
            if depth < DEPTH:
                yield from _files(fd, f"{prefix}{name}/", depth + 1)
        finally:
            os.close(fd)


def _some(root: int, workdir: str, paths: Iterable[str]) -> Iterator[File]:
    """Those of `paths` below `workdir` that are regular files."""
    trail: list[tuple[str, int]] = []  # the open directories on the way to the last path
    top = _descend(root, workdir)
    if top is None:
        return
    try:
        for path in sorted(paths):
            *parents, name = path.split("/")
            common = next(
                (i for i, (a, b) in enumerate(zip(trail, parents, strict=False)) if a[0] != b),
                min(len(trail), len(parents)),
            )
            while len(trail) > common:
                os.close(trail.pop()[1])
            for part in parents[common:]:
                below = None if len(trail) > DEPTH else _directory(trail[-1][1] if trail else top, part)
                if below is None:
                    break
                trail.append((part, below))
            else:
                opened = _open(trail[-1][1] if trail else top, name)
                if opened and stat.S_ISREG(opened[1].st_mode):
                    yield path, *opened
                elif opened:
                    os.close(opened[0])
    finally:
        for fd in (*(fd for _, fd in trail), top):
            os.close(fd)


def _directory(at: int, name: str) -> int | None:
    try:
        return os.open(name, _DIRECTORY, dir_fd=at)
    except (OSError, ValueError):
        return None


def _descend(root: int, path: str) -> int | None:
    """A descriptor of the directory `path` below `root`; None where there is none, or a link on the way."""
    at: int | None = os.dup(root)
    for part in path.split("/"):
        if part and at is not None:
            below = _directory(at, part)
            os.close(at)
            at = below
    return at


def _names(root: int, workdir: str, prefix: str) -> Iterator[str]:
    """Paths of the files of `workdir` below `prefix`."""
    top = _descend(root, f"{workdir}/{prefix}")
    if top is None:
        return
    try:
        for path, fd, _ in _files(top, f"{prefix}/" if prefix else "", prefix.count("/")):
            os.close(fd)
            yield path
    finally:
        os.close(top)


def _touched(upper: int, workdir: str) -> Iterator[str]:
    """Paths of `workdir` that an upper directory replaces, with all that was below them; "" is `workdir` itself."""
    at = os.dup(upper)
    try:
        for part in filter(None, workdir.split("/")):
            below = _directory(at, part)
            if below is None:
                if exists_at(at, part):
                    yield ""
                return
            os.close(at)
            at = below
            if is_opaque(at):
                yield ""
        yield from _touched_below(at, "", 0)
    finally:
        os.close(at)


def _touched_below(directory: int, prefix: str, depth: int) -> Iterator[str]:
    for name in sorted(os.listdir(directory)):
        path = prefix + name
        try:
            mode = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
        except OSError:
            continue
        if not stat.S_ISDIR(mode):
            yield path  # a file, a whiteout, a link
            continue
        below = _directory(directory, name)
        if below is None:
            continue
        try:
            if is_opaque(below):
                yield path
            if depth < DEPTH:
                yield from _touched_below(below, f"{path}/", depth + 1)
        finally:
            os.close(below)


def is_opaque(directory: int | Path) -> bool:
    """Whether overlayfs shows nothing of the layers below this directory."""
    for kind in ("trusted", "user"):
        with contextlib.suppress(OSError):
            return os.getxattr(directory, f"{kind}.overlay.opaque") == b"y"
    return False


def exists_at(directory: int, name: str) -> bool:
    """Whether there is anything, a dangling link included, called `name` in a directory."""
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _content(fd: int, size: int) -> bytes:
    parts = []
    while size > 0 and (part := os.read(fd, min(size, 1 << 20))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
