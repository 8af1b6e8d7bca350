"""Finds or builds the helper, the static C program that launches sandboxes and is PID 1 in each of them.

It is compiled once per source text and user, into a content-addressed cache; there is no build step at install time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from envs.errors import Unsupported

KEPT_SECONDS = 7 * 24 * 3600
"""How long what can be made again is kept after its last use."""
SOURCES = sorted(Path(__file__).parent.glob("helper/*.[ch]"))


def cache_dir() -> Path:
    """Where the helper is kept: `$XDG_CACHE_HOME/codeworld` or `~/.cache/codeworld`, else a directory of this user in
    the temporary directory."""
    root = os.environ.get("XDG_CACHE_HOME")
    path = (Path(root) if root else Path.home() / ".cache") / "codeworld"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        path = Path(tempfile.gettempdir()) / f"codeworld-{os.getuid()}"
        path.mkdir(mode=0o700, exist_ok=True)
        if path.stat().st_uid != os.getuid():
            raise Unsupported(
                f"cache {path}: it belongs to another user; set XDG_CACHE_HOME to a directory of yours"
            ) from None
    return path


@functools.cache
def unprivileged() -> bool:
    """Whether this process can't take other users' ids: it isn't root, or only root of a user namespace."""
    spans = (line.split() for line in Path("/proc/self/uid_map").read_text().splitlines())
    return os.geteuid() != 0 or sum(int(count) for _, _, count in spans) < 1 << 31


def helper_path() -> Path:
    """The compiled helper. Raises `Unsupported` where it can't be built."""
    path = _place()
    if not os.access(path, os.X_OK):
        _build(path)
        _prune(path)
    with contextlib.suppress(OSError):
        os.utime(path)  # in use: see `_prune`
    return path


@functools.cache
def _place() -> Path:
    digest = hashlib.sha256(platform.machine().encode() + b"".join(p.read_bytes() for p in SOURCES)).hexdigest()[:16]
    return cache_dir() / f"helper-{digest}"


def _prune(new: Path) -> None:
    """Remove those built of other sources that nobody has started for a week; one that still runs needs its file no more."""
    for other in new.parent.glob("helper-*"):
        with contextlib.suppress(OSError):  # others prune too
            if other != new and time.time() - other.stat().st_mtime > KEPT_SECONDS:
                other.unlink()


def _build(path: Path) -> None:
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise Unsupported(
            "sandbox helper: no C compiler (cc, gcc, clang) on PATH; install one, e.g. apt-get install gcc libc6-dev"
        )
    handle, name = tempfile.mkstemp(dir=path.parent, prefix="helper-")
    os.close(handle)
    draft = Path(name)
    units = [str(p) for p in SOURCES if p.suffix == ".c"]
    error = ""
    for static in (["-static"], []):
        command = [compiler, "-O2", *static, "-o", str(draft), *units]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        if built.returncode == 0:
            draft.chmod(0o755)
            draft.rename(path)  # atomic: others may build at the same time
            return
        error = error or " ".join(built.stderr.split())[-300:]
    draft.unlink(missing_ok=True)
    raise Unsupported(f"sandbox helper: {compiler} failed: {error}; install the C library's headers, e.g. libc6-dev")
