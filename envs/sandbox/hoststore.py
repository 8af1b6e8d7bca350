"""The stores of containers: mounted on the host, where the engine binds from, one directory of `ROOT` for each.

A store is a size-capped tmpfs with one overlay for each directory that a container may write in, over what the image and
the sandboxes that it was forked from hold there; so one cap covers them all, and all of it goes on in a fork.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from envs.errors import InfraError, SandboxDead, Unsupported
from envs.sandbox import cgroups, launch
from envs.sandbox.base import Limits
from envs.sandbox.bases import layers_at
from envs.sandbox.channel import Channel, SetupError
from envs.sandbox.helper import helper_path
from envs.sandbox.layers import layers_dir
from envs.sandbox.stacked import Store, World

ROOT = Path("/run/codeworld")
"""Only root may enter. A store is called as its owner's cgroups are, so that it can be told whose it was."""
TIMEOUT = 30.0


@dataclass
class HostStore:
    """A mounted store, with descriptors of the work directory and of what it was at first."""

    store: Store
    path: Path
    binds: dict[Path, str]
    """The overlays and where in the container they belong; the work directory's comes first."""
    root: int
    origin: int | None

    @property
    def socket(self) -> Path:
        """A directory for the control stream's socket."""
        return self.path / "socket"

    def hide(self) -> None:
        """Unmount the overlays here: the container has them."""
        _free(*self.binds)

    def close(self) -> None:
        """Free all of it, where no container was started on it."""
        for fd in (self.root, self.origin):
            if fd is not None:
                os.close(fd)
        self.store.drop()


def mount_store(number: int, places: Sequence[str], limits: Limits, world: World, uid: int) -> HostStore:
    """Mount a new store for `places`, the work directory first, whose files belong to `uid`.

    Raises `Unsupported` where this process may not mount, or the base holds a link or a file at one of them.
    """
    ROOT.mkdir(mode=0o700, exist_ok=True)
    path = _path(number)
    store = Store(number, functools.partial(_free, path))
    lists, origin, image = [], "", world.base.image
    for index, place in enumerate(places):
        frozen = [f"../{_path(below.number).name}/u/{index}" for below in world.frozen]
        base = [f"b/{layer}{_escaped(place)}" for layer in layers_at(world.base, place)] if image else []
        lists.append(":".join((*frozen, *base, "empty")))
        if base and not index:
            origin = ":".join((*base, "empty"))
    try:
        request = launch.host_store(path.name, uid, limits, str(layers_dir()) if image else "", origin, lists)
        *first, store.upper, root = _carry_out(request)
    except BaseException as error:
        store.drop()
        raise _explain(error) if isinstance(error, SetupError) else error from None
    binds = {path / "m" / str(index): place for index, place in enumerate(places)}
    return HostStore(store, path, binds, root, next(iter(first), None))


def _path(number: int) -> Path:
    return ROOT / f"{cgroups.owner_name()}-{number}"


def _escaped(path: str) -> str:
    """As overlayfs reads a path in its options."""
    return re.sub(r"([\\:,])", r"\\\1", path)


def _free(*paths: Path) -> None:
    with contextlib.suppress(OSError, SandboxDead, SetupError, subprocess.SubprocessError):
        _carry_out(launch.free(*map(str, paths)))


def _carry_out(request: bytes) -> list[int]:
    """Have the helper make calls in `ROOT`; returns the descriptors that they left open. Raises `SetupError`."""
    mine, theirs = socket.socketpair()
    with mine:
        with theirs:
            mine.sendall(request)
            command = [str(helper_path()), "calls", str(theirs.fileno())]
            keep, null = (theirs.fileno(),), subprocess.DEVNULL
            subprocess.run(
                command, stdin=null, stdout=null, stderr=null, cwd=ROOT, env={}, pass_fds=keep, timeout=TIMEOUT
            )
        return Channel(mine).ready(TIMEOUT)


def _explain(error: SetupError) -> Exception:
    if error.errno not in (1, 22, 38):  # EPERM, EINVAL, ENOSYS
        return InfraError(f"docker sandbox: {error}")
    return Unsupported(
        f"docker sandbox: {error}; root here may not mount (a container without CAP_SYS_ADMIN?), or can't map owners (a"
        " kernel before 5.19?, a cache on a network file system?): start on the engine's host, or use the native backend"
    )
