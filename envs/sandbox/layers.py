"""The cache of unpacked layers: nobody writes a layer again, and it stays as long as somebody stands on it.

    layers/NAME       a whole layer; it comes and goes by one rename
    layers/.use/NAME  its size in bytes, and as its time, when it was last used. Whoever stands on the layer has a shared lock
                      on this file; whoever unpacks or evicts it, an exclusive one
    layers/.draft-NAME  .gone-NAME-…    being unpacked, being evicted; rubbish where nobody has the lock
    layers/.lock      held by the one process that looks what to evict

The locks are the kernel's (flock), which end with their process however it ends, so nothing here depends on a clean exit.
Where the layers take more than `cap()` bytes, those used longest ago go, but none that a process of this user stands on.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import math
import os
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from envs.errors import InfraError, Unsupported
from envs.sandbox.helper import cache_dir
from envs.sandbox.unpack import FULL, DiskFull, remove_tree, room, unpack

CAP = "CODEWORLD_CACHE_GB"
"""Environment variable: how many gigabytes (10⁹ bytes) of layers are kept."""
DEFAULT_GB = 40.0
NAME = 24
"""Hexadecimal digits of a digest in a layer's name: the kernel takes the names of all layers on one page."""

_USE, _DRAFT, _GONE = ".use", ".draft-", ".gone-"
_TRIES, _WAIT = 200, 3600.0
_held: dict[str, list[int]] = {}
"""Of this process, by path: the descriptor with the shared lock, and how many stand on the layer."""
_table = threading.Lock()
os.register_at_fork(before=_table.acquire, after_in_parent=_table.release, after_in_child=_table.release)


def layers_dir() -> Path:
    """Where layers are kept."""
    return _layers_dir(os.environ.get("XDG_CACHE_HOME"), os.environ.get("HOME"))


@functools.lru_cache(maxsize=8)
def _layers_dir(*_: str | None) -> Path:
    path = cache_dir() / "layers"
    path.mkdir(mode=0o700, exist_ok=True)
    if not (path / _USE).is_dir():
        (path / _USE).mkdir(exist_ok=True)
        _known(path)  # layers that were there before get their records
    return path


def cap() -> int:
    """How many bytes of layers are kept. Raises `Unsupported` where the environment variable is no such number."""
    text = os.environ.get(CAP, "") or str(DEFAULT_GB)
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not found >= 0:
        raise Unsupported(
            f"{CAP}={text!r}: not a number of gigabytes; give one, e.g. {DEFAULT_GB:g}, or inf for no cap"
        )
    return int(min(found * 1e9, 1 << 62))


def usage() -> tuple[int, int]:
    """How many layers are in the cache, and their bytes."""
    sizes = [size for _, size, _ in _known(layers_dir())]
    return len(sizes), sum(sizes)


# ---- standing on layers ----


def hold(names: Sequence[str]) -> bool:
    """Count one more user of each layer: none is evicted before `release`. False where one isn't there; none counts then."""
    root = str(layers_dir())
    with _table:
        for at, name in enumerate(names):
            entry = _held.get(f"{root}/{name}")
            if entry is not None:
                entry[1] += 1
            elif (fd := _share(root, name)) >= 0:
                _held[f"{root}/{name}"] = [fd, 1]
            else:
                _release(root, names[:at])
                return False
    return True


def release(names: Sequence[str]) -> None:
    """Count one user of each layer less."""
    root = str(layers_dir())
    with _table:
        _release(root, names)


def _release(root: str, names: Sequence[str]) -> None:
    for name in names:
        entry = _held.get(f"{root}/{name}")
        if entry is None:  # of another cache: the environment has changed meanwhile
            continue
        entry[1] -= 1
        if not entry[1]:
            del _held[f"{root}/{name}"]
            with contextlib.suppress(OSError):
                os.utime(entry[0])
            os.close(entry[0])  # not unlocked: a process forked from this one may still stand on it


def _share(root: str, name: str) -> int:
    """A descriptor that keeps the layer, or -1 where it is not there, or just being unpacked or evicted."""
    try:
        fd = os.open(f"{root}/{_USE}/{name}", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return -1
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if os.fstat(fd).st_nlink and os.access(f"{root}/{name}", os.F_OK):
            return fd
    except BlockingIOError:
        pass
    os.close(fd)
    return -1


class Lease:
    """Layers that stay in the cache until it is closed."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._made: list[str] = []

    def take(self, names: Sequence[str]) -> bool:
        """Have these stay, too; False where one is not in the cache, and nothing has changed then."""
        if not hold(names):
            return False
        self._names += names
        return True

    def put(self, digest: str, open_: Callable[[], IO[bytes]], what: str, *, image: bool = True) -> str:
        """Have the layer of one archive stay, unpacked if it is not there; returns its name, the first digits of `digest`.

        image: `digest` is what somebody says of the uncompressed archive, so it is checked; else it is ours, of the file.
        Raises `Unsupported` for an archive that is refused, `DiskFull`, and whatever `open_` raises; nothing is left then.
        """
        name, tries = digest[:NAME], 0
        with full_disk(what):
            while not self.take((name,)):
                if (tries := tries + 1) > _TRIES:
                    raise InfraError(f"{what}: layer {name} was removed under a living sandbox; end those on it")
                (layers_dir() / _USE).mkdir(parents=True, exist_ok=True)  # the cache may be deleted at any time
                with _claim(layers_dir(), name, wait=True) as record:
                    mine = record >= 0
                    if mine and _fill(record, name, open_, what, digest if image else None):
                        self._made.append(name)
                if not mine:
                    time.sleep(0.001 * tries)
        return name

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """What is put inside is removed again where the image is refused in the end, or the disk is full. Other failures
        of the infrastructure say nothing against its layers: the next try finds them."""
        before = len(self._names)
        self._made = []
        try:
            yield
        except (Unsupported, DiskFull):
            release(self._names[before:])
            del self._names[before:]
            discard(self._made)
            raise

    def close(self) -> None:
        """Let them go."""
        release(self._names)
        self._names = []


@contextlib.contextmanager
def full_disk(what: str) -> Iterator[None]:
    """Says in one line what a full disk prevented: raises `DiskFull`."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise DiskFull(f"{what}: {cache_dir()}: {error.strerror}; free some space, or lower {CAP}") from None


# ---- unpacking and evicting ----


def discard(names: Sequence[str]) -> None:
    """Remove layers, except those that somebody stands on."""
    root = layers_dir()
    with _locked(root):
        for name in names:
            _evict(root, name)
    _sweep(root)


def make_room(need: int = 0) -> None:
    """Evict until the layers are under the cap, and the disk has room for `need` more bytes, or all are in use."""
    root, most = layers_dir(), cap()
    _sweep(root)
    with _locked(root):
        known = sorted(_known(root))
        over = max(sum(size for _, size, _ in known) - most, need - room(root))
        for _, size, name in known:
            if over <= 0:
                break
            if _evict(root, name):
                over -= size
    _sweep(root)


def _fill(record: int, name: str, open_: Callable[[], IO[bytes]], what: str, digest: str | None) -> bool:
    """Unpack a layer whose record is ours alone; False where it is there already."""
    root = layers_dir()
    layer, draft = root / name, root / f"{_DRAFT}{name}"
    if layer.is_dir():  # unpacked by one that was killed before it wrote the record
        _note(record, layer)
        return False
    try:
        remove_tree(draft)  # of one that was killed
        with open_() as stream:
            make_room(stream.seek(0, os.SEEK_END))
            stream.seek(0)
            found = unpack(stream, draft, what)
        if digest and found != digest:
            raise Unsupported(f"{what}: layer {digest[:12]} has other content than its digest says; fetch it again")
        _note(record, draft)
        draft.rename(layer)
    except BaseException:
        remove_tree(draft)
        (root / _USE / name).unlink(missing_ok=True)
        raise
    make_room()
    return True


def _note(record: int, layer: Path) -> int:
    """Write down how many bytes of the disk a layer takes, each file once however often it is linked."""
    total, linked = 0, set()
    for _, directories, files, at in os.fwalk(layer, follow_symlinks=False):
        for name in (*directories, *files):
            info = os.stat(name, dir_fd=at, follow_symlinks=False)
            if not stat.S_ISDIR(info.st_mode) and info.st_nlink > 1:
                if info.st_ino in linked:
                    continue
                linked.add(info.st_ino)
            total += max(info.st_blocks * 512, info.st_size)  # blocks may not be assigned yet
    os.ftruncate(record, 0)
    os.pwrite(record, b"%d" % total, 0)
    return total


def _known(root: Path) -> list[tuple[int, int, str]]:
    """The layers in the cache: last use (ns), bytes, name."""
    found = []
    for name in os.listdir(root):
        if name.startswith("."):
            continue
        with contextlib.suppress(FileNotFoundError):  # evicted meanwhile
            used, size = (root / name).stat().st_ctime_ns, b""
            with contextlib.suppress(FileNotFoundError), open(root / _USE / name, "rb") as file:
                used, size = os.fstat(file.fileno()).st_mtime_ns, file.read()
            if not size:
                with _claim(root, name) as record:
                    if record < 0:
                        continue
                    size = b"%d" % _note(record, root / name)
            found.append((used, int(size), name))
    return found


def _evict(root: Path, name: str) -> bool:
    """Have a layer gone at once, to be removed by `_sweep`, unless somebody stands on it."""
    with _claim(root, name) as record:
        if record < 0:
            return False
        with contextlib.suppress(FileNotFoundError):
            (root / name).rename(root / f"{_GONE}{name}-{secrets.token_hex(4)}")
        (root / _USE / name).unlink(missing_ok=True)
        return True


def _sweep(root: Path) -> None:
    """Remove what was evicted, and what those left who were killed."""
    for name in os.listdir(root):
        if name.startswith(_GONE):
            remove_tree(root / name)
        elif name.startswith(_DRAFT):
            with _claim(root, name.removeprefix(_DRAFT)) as record:
                if record >= 0:
                    remove_tree(root / name)
    for name in os.listdir(root / _USE):
        if not os.access(root / name, os.F_OK):
            with _claim(root, name) as record:
                if record >= 0 and not os.access(root / name, os.F_OK):
                    (root / _USE / name).unlink(missing_ok=True)


@contextlib.contextmanager
def _claim(root: Path, name: str, *, wait: bool = False) -> Iterator[int]:
    """The record of a layer, ours alone, or -1 where another process (or thread) has it, with `wait` when it is done."""
    fd = os.open(root / _USE / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.fstat(fd).st_nlink > 0
        except BlockingIOError:
            mine = False
            if wait:
                _wait(fd, name)
        yield fd if mine else -1
    finally:
        os.close(fd)


def _wait(record: int, name: str) -> None:
    """Wait until nobody has the record alone."""
    end = time.monotonic() + _WAIT
    while True:
        try:
            return fcntl.flock(record, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise InfraError(
                    f"layer {name}: another process has not unpacked it in {_WAIT:.0f} s; end it"
                ) from None
            time.sleep(0.01)


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """One at a time, of all processes of this user."""
    with (root / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
