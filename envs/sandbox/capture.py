"""Layers of images, made: from files, and from what a sandbox wrote.

A layer is an uncompressed tar archive as the OCI image specification (`layer.md`) has it: a file that a layer below has is
removed by an empty entry `.wh.NAME` beside its place, a directory's whole former content by `.wh..wh..opq` in it. Equal
content gives equal bytes: owners are 0:0, times are `TIME`, entries are in path order.
"""

from __future__ import annotations

import io
import os
import stat
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO

from envs.errors import Unsupported
from envs.sandbox.walk import DEPTH, is_opaque

TIME = 1_577_836_800
"""Seconds since 1970 of every file: 2020-01-01, which zip archives (from 1980 on) can hold."""
WHITEOUT, OPAQUE = ".wh.", ".wh..wh..opq"
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY


@dataclass(frozen=True)
class Entry:
    """One path of a tree: a regular file, or a symbolic link."""

    data: bytes = b""
    """Content; of a link, empty."""
    mode: int = 0o644
    """Permission bits of a file."""
    link: str | None = None
    """Where a link leads, as it is written in it; None: a file."""


Tree = Mapping[str, Entry]
"""Relative POSIX path → file or link. Directories are those that the paths need."""


def tree_layer(tree: Mapping[str, Entry | None], at: str) -> bytes:
    """A layer with `tree` below the directory `at` (such as "testbed"); None removes what the layers below have there."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        made: set[str] = set()
        for path, entry in sorted(tree.items()):
            parts = f"{at}/{path}".strip("/").split("/")
            for depth in range(1, len(parts)):
                if (parent := "/".join(parts[:depth])) not in made:
                    made.add(parent)
                    tar.addfile(_info(parent, tarfile.DIRTYPE, 0o755))
            name = "/".join(parts)
            if entry is None:
                tar.addfile(_info("/".join((*parts[:-1], WHITEOUT + parts[-1])), tarfile.REGTYPE, 0o644))
            elif entry.link is not None:
                tar.addfile(_info(name, tarfile.SYMTYPE, 0o777, link=entry.link))
            else:
                info = _info(name, tarfile.REGTYPE, entry.mode & 0o777)
                info.size = len(entry.data)
                tar.addfile(info, io.BytesIO(entry.data))
    return out.getvalue()


def read_layer(file: IO[bytes], at: str = "") -> dict[str, Entry]:
    """The files and links of a layer of ours below `at`, removals left out: the inverse of `tree_layer`."""
    prefix, found = f"{at.strip('/')}/" if at else "", {}
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for info in tar:
            path = info.name.removeprefix(prefix)
            if not info.name.startswith(prefix) or path.rpartition("/")[2].startswith(WHITEOUT):
                continue
            if info.issym():
                found[path] = Entry(link=info.linkname)
            elif info.isreg() or info.islnk():
                content = tar.extractfile(info)
                found[path] = Entry(content.read() if content else b"", info.mode & 0o777)
    return found


def capture(upper: int, out: IO[bytes], keep: Callable[[str], bool], budget: int) -> None:
    """Write what lies in an overlay's upper directory (descriptor `upper`) to `out`, as a layer.

    keep: told each path (relative, of a directory before what is in it), says whether it belongs to the layer.
    budget: the bytes that the files may have together, those of holes included. Raises `Unsupported` for more.
    Walked by descriptors, following no link: names and links that a process made lead nowhere else. Left out: devices,
    FIFOs, sockets, names that read as marks of a layer, and what is deeper than `DEPTH` of `walk`.
    """
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        _Capture(tar, keep, budget).directory(upper, "", 0)


class _Capture:
    def __init__(self, tar: tarfile.TarFile, keep: Callable[[str], bool], budget: int) -> None:
        self._tar, self._keep, self._budget = tar, keep, budget
        self._links: dict[tuple[int, int], str] = {}

    def directory(self, at: int, prefix: str, depth: int) -> None:
        """Add what is in the directory `at`, whose paths begin with `prefix`."""
        for name in sorted(os.listdir(at), key=os.fsencode):
            path = prefix + name
            if name.startswith(WHITEOUT) or not self._keep(path):
                continue
            info = os.stat(name, dir_fd=at, follow_symlinks=False)
            if stat.S_ISDIR(info.st_mode):
                if depth < DEPTH:
                    self._below(at, name, path, depth)
            elif stat.S_ISLNK(info.st_mode):
                self._tar.addfile(_info(path, tarfile.SYMTYPE, 0o777, link=os.readlink(name, dir_fd=at)))
            elif stat.S_ISREG(info.st_mode):
                self._file(at, name, path)
            elif stat.S_ISCHR(info.st_mode) and info.st_rdev == 0:
                self._tar.addfile(_info(f"{prefix}{WHITEOUT}{name}", tarfile.REGTYPE, 0o644))

    def _below(self, at: int, name: str, path: str, depth: int) -> None:
        below = os.open(name, _DIRECTORY, dir_fd=at)
        try:
            self._tar.addfile(_info(path, tarfile.DIRTYPE, os.fstat(below).st_mode & 0o1777))
            if is_opaque(below):
                self._tar.addfile(_info(f"{path}/{OPAQUE}", tarfile.REGTYPE, 0o644))
            self.directory(below, f"{path}/", depth + 1)
        finally:
            os.close(below)

    def _file(self, at: int, name: str, path: str) -> None:
        with os.fdopen(os.open(name, _FILE, dir_fd=at), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return
            first = self._links.get((status.st_dev, status.st_ino))
            if first is not None:
                self._tar.addfile(_info(path, tarfile.LNKTYPE, 0o644, link=first))
                return
            self._budget -= status.st_size
            if self._budget < 0:
                raise Unsupported(f"layer: {path[:200]!r} is larger than what the disk holds (a file with holes?)")
            info = _info(path, tarfile.REGTYPE, status.st_mode & 0o777)
            info.size = status.st_size
            self._tar.addfile(info, file)
            if status.st_nlink > 1:
                self._links[status.st_dev, status.st_ino] = path


def _info(name: str, kind: bytes, mode: int, *, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.mtime, info.linkname = kind, mode, TIME, link
    return info
