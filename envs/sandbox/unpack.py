"""Unpacks archives of root file systems, trusting nothing in them.

What comes out is a directory tree of regular files, directories and links, all owned by this user, without setuid bits.
Every path is walked by descriptors without following links, so an entry can't lead outside, whatever links it comes
with. Absolute and `..` paths, devices and FIFOs, and more bytes than fit are refused; nothing is left then.
"""

from __future__ import annotations

import bz2
import contextlib
import errno
import gzip
import hashlib
import lzma
import os
import shutil
import stat
import tarfile
import zlib
from pathlib import Path
from typing import IO, cast

from envs.errors import InfraError, Unsupported
from envs.sandbox.helper import unprivileged
from envs.sandbox.walk import exists_at

ENTRIES_MAX = 4_000_000
KEEP_FREE = 1 << 30
"""Bytes that stay free on the cache's file system, or a twentieth of it where that is less."""
FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a full disk."""
_LATEST = (1 << 31) - 1
"""The last time that a file can have, in seconds."""
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_BROKEN = (tarfile.TarError, EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error, ValueError)
_WHITEOUT, _OPAQUE = ".wh.", ".wh..wh..opq"


class DiskFull(InfraError):
    """What was to be written into the cache does not fit on its disk."""


def room(path: Path) -> int:
    """How many more bytes may be written to the file system of `path`; negative where too many were already."""
    disk = shutil.disk_usage(path)
    return disk.free - min(KEEP_FREE, disk.total // 20)


def unpack(stream: IO[bytes], to: Path, what: str) -> str:
    """Unpack a seekable tar archive, plain or compressed by gzip, bzip2 or xz, into the new directory `to`.

    Entries named `.wh.NAME` delete NAME of the layers below, as in image archives. Returns the SHA-256 of the
    uncompressed archive. Raises `Unsupported` or `DiskFull`, one line that begins with `what`; `to` is gone then.
    """
    to.mkdir()
    to.chmod(0o755)
    try:
        digest = _unpack(stream, to)
    except BaseException as error:
        remove_tree(to)
        if isinstance(error, _BROKEN):
            raise Unsupported(
                f"{what}: not a readable archive ({error}); make it again, e.g. with `docker save`"
            ) from None
        if isinstance(error, _Refused | DiskFull):
            raise (Unsupported if isinstance(error, _Refused) else DiskFull)(f"{what}: {error}") from None
        if isinstance(error, OSError):
            kind = DiskFull if error.errno in FULL else Unsupported
            raise kind(f"{what}: can't be unpacked into {to.parent} ({error.strerror or error})") from None
        raise
    return digest


def remove_tree(path: Path) -> None:
    """Remove a tree whose directories may deny it; never raises."""
    with contextlib.suppress(OSError):  # another may remove it at the same time
        for directory, names, _, at in os.fwalk(path, follow_symlinks=False):
            for name in names:
                with contextlib.suppress(OSError):
                    if stat.S_ISDIR(os.stat(name, dir_fd=at, follow_symlinks=False).st_mode):
                        Path(directory, name).chmod(0o700)
    shutil.rmtree(path, ignore_errors=True)


class _Refused(Exception):
    """Why an archive is not unpacked."""


class _Hashed:
    """A reader that hashes and counts what it passes on."""

    def __init__(self, stream: IO[bytes], most: int) -> None:
        self._stream, self._most = stream, most
        self.hash, self.count = hashlib.sha256(), 0

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self.hash.update(data)
        self.count += len(data)
        if self.count > self._most:
            raise DiskFull(f"it unpacks to more than the {self._most >> 20} MiB that are free; free some space")
        return data


def _unpack(stream: IO[bytes], to: Path) -> str:
    source = _Hashed(_plain(stream), max(0, room(to)))
    root = os.open(to, _DIRECTORY)
    modes: list[tuple[str, int]] = []
    try:
        with tarfile.open(fileobj=cast("IO[bytes]", source), mode="r|") as tar:
            for number, entry in enumerate(tar):
                if number > ENTRIES_MAX:
                    raise _Refused(f"it has more than {ENTRIES_MAX} entries")
                _place(tar, entry, root, modes)
                tar.members = []  # type: ignore[attr-defined]  # a stream needs none, and they add up
        while source.read(1 << 20):
            pass
        for path, mode in reversed(modes):  # a directory may forbid what its later entries need
            _chmod(root, path, mode)
    finally:
        os.close(root)
    return source.hash.hexdigest()


def _plain(stream: IO[bytes]) -> IO[bytes]:
    """The stream, decompressed."""
    head = stream.read(6)
    stream.seek(0)
    if head[:2] == b"\x1f\x8b":
        return cast("IO[bytes]", gzip.GzipFile(fileobj=stream))
    if head[:3] == b"BZh":
        return cast("IO[bytes]", bz2.BZ2File(stream))
    if head == b"\xfd7zXZ\0":
        return cast("IO[bytes]", lzma.LZMAFile(stream))
    if head[:4] == b"\x28\xb5\x2f\xfd":
        raise _Refused("compressed by zstd, which is not read; convert it, e.g. with `docker load` and `docker save`")
    return stream


def _place(tar: tarfile.TarFile, entry: tarfile.TarInfo, root: int, modes: list[tuple[str, int]]) -> None:
    """Make one entry below descriptor `root`."""
    parts = _parts(entry.name)
    if not parts:
        return
    parent = _walk(root, parts[:-1])
    try:
        name, mode = parts[-1], entry.mode & 0o1777
        if name == _OPAQUE:
            os.setxattr(parent, _overlay("opaque"), b"y")
        elif name.startswith(_WHITEOUT):
            _clear(parent, name.removeprefix(_WHITEOUT))
            os.mknod(name.removeprefix(_WHITEOUT), stat.S_IFCHR, 0, dir_fd=parent)
        elif entry.isdir():
            if not _is_directory(parent, name):
                _clear(parent, name)
                os.mkdir(name, 0o700, dir_fd=parent)
            modes.append(("/".join(parts), mode))
        elif entry.issym():
            _clear(parent, name)
            os.symlink(entry.linkname, name, dir_fd=parent)
        elif entry.islnk():
            _link(root, parent, name, entry)
        elif entry.isreg():
            _clear(parent, name)
            _copy(tar, entry, parent, name, mode)
        else:
            raise _Refused(f"{entry.name!r} is a device or FIFO; leave it out (tar --exclude), /dev is made here")
    finally:
        os.close(parent)


def _parts(name: str) -> list[str]:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\0" in name:
        raise _Refused(f"unsafe path {name!r}; paths in an archive are relative, without '..'")
    return parts


def _walk(root: int, parts: list[str]) -> int:
    """A descriptor of the directory, made where missing; links are not followed."""
    at = os.dup(root)
    for part in parts:
        try:
            made = not exists_at(at, part)
            if made:
                os.mkdir(part, dir_fd=at)
            below = os.open(part, _DIRECTORY, dir_fd=at)
            if made:
                os.fchmod(below, 0o755)  # whatever the umask
        except OSError as error:
            raise _Refused(f"{'/'.join(parts)!r} passes through {part!r}, a link or file ({error.strerror})") from None
        finally:
            os.close(at)
        at = below
    return at


def _clear(parent: int, name: str) -> None:
    """Make room for an entry: what was there before is replaced, as `tar` does."""
    try:
        os.unlink(name, dir_fd=parent)
    except FileNotFoundError:
        pass
    except (IsADirectoryError, PermissionError):
        os.rmdir(name, dir_fd=parent)


def _is_directory(parent: int, name: str) -> bool:
    return exists_at(parent, name) and stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)


def _link(root: int, parent: int, name: str, entry: tarfile.TarInfo) -> None:
    parts = _parts(entry.linkname)
    if not parts:
        raise _Refused(f"{entry.name!r} is a link to nothing")
    source = _walk(root, parts[:-1])
    try:
        _clear(parent, name)
        os.link(parts[-1], name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        raise _Refused(f"{entry.name!r} is a link to {entry.linkname!r}, which the archive does not hold") from None
    finally:
        os.close(source)


def _copy(tar: tarfile.TarFile, entry: tarfile.TarInfo, parent: int, name: str, mode: int) -> None:
    source = tar.extractfile(entry)
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=parent)
    with os.fdopen(fd, "wb") as file:
        if source is not None:
            shutil.copyfileobj(source, file, 1 << 20)
        file.flush()
        when = min(max(entry.mtime, 0), _LATEST)  # compiled Python is used only where its source's time is as it was
        os.utime(fd, (when, when))
        os.fchmod(fd, mode)


def _chmod(root: int, path: str, mode: int) -> None:
    parts = path.split("/")
    try:
        fd = _walk(root, parts)
    except _Refused:  # a later entry replaced it
        return
    try:
        os.fchmod(fd, mode)
    finally:
        os.close(fd)


def _overlay(name: str) -> str:
    """The extended attribute that overlayfs reads, by who mounts it."""
    return f"{'user' if unprivileged() else 'trusted'}.overlay.{name}"
