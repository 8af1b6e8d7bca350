"""Sandboxes from Linux namespaces, without a daemon: milliseconds to start, nothing of the host writable or visible.

Started by root, a sandbox runs as a host uid of its own that owns nothing else, in its own cgroups where the host lets
them be made. Started by an ordinary user it runs in a user namespace as that user. Either way: no capabilities, no
network but loopback, a system call filter, and its root an overlay: a read-only base below (the host's `/usr` and
the running interpreter, or an unpacked image), and every byte that it writes on one size-capped tmpfs, its *store*. A
snapshot freezes the store, and what starts from it has it as one more layer, so a fork copies nothing. The kernel is
shared with the host: an exploit of the kernel itself is not contained.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import resource
import socket
import subprocess
import threading

from envs.errors import InfraError, Unsupported
from envs.sandbox import cgroups, launch, reaper
from envs.sandbox.base import Limits
from envs.sandbox.bases import standing_on
from envs.sandbox.brokered import Files, Start, start_from
from envs.sandbox.channel import Channel, SetupError
from envs.sandbox.helper import cache_dir, helper_path, unprivileged
from envs.sandbox.hostbase import check_workdir
from envs.sandbox.seccomp import seccomp_filter
from envs.sandbox.stacked import NUMBERS, Live, StackedBackend, StackedSandbox, Store, World

START_TIMEOUT = 30.0

_FORBIDDEN = frozenset((errno.EPERM, errno.EACCES, errno.ENOSPC, errno.EINVAL, errno.ENOSYS, errno.EUSERS))


class NativeSandbox(StackedSandbox):
    """One native sandbox."""


class NativeBackend(StackedBackend):
    """Makes native sandboxes through one helper process, started with the first of them. Thread-safe, and safe to use
    after a fork of this process (the child starts its own helper)."""

    name = "native"
    kind = NativeSandbox

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._zygote: _Zygote | None = None

    def create(
        self, *, base: str = "host", workdir: str = "/repo", files: Files | None = None, limits: Limits | None = None
    ) -> StackedSandbox:
        """Start a sandbox on "host", an image archive, a local Docker image or one of a registry (see `bases.find_base`)."""
        limits = limits or Limits()
        start = start_from(base, workdir, files, limits)
        check_workdir(workdir, image=base != "host")
        with standing_on(base) as found:
            return self.first(start, limits, World(found, next(NUMBERS)))

    def close(self) -> None:
        """Close every sandbox and the helper."""
        super().close()
        with self._lock:
            zygote, self._zygote = self._zygote, None
        if zygote:
            zygote.close()

    def start(self, start: Start, limits: Limits, world: World) -> Live:
        """Namespaces and a broker in them."""
        number = next(NUMBERS)
        group = f"{cgroups.owner_name()}-{number}"
        request = launch.sandbox(number, group, start.workdir, limits, world)
        found = cgroups.hierarchy()
        mine, theirs = socket.socketpair()
        with theirs:
            channel = Channel(mine, seccomp_filter(strict=found is None))
            zygote = self._send(request, theirs)
        store = Store(number, functools.partial(zygote.free, number))
        try:
            *origin, store.upper, root, channel.proc = channel.ready(START_TIMEOUT)
        except BaseException as error:
            mine.close()
            store.drop()
            if isinstance(error, SetupError):
                raise _explain(error, start.workdir, again=bool(world.frozen)) from None
            raise
        counted = found.group(group) if found else None
        stop = functools.partial(_end, mine, counted)
        return Live(channel, root, next(iter(origin), None), store, world, start.workdir, counted, stop)

    def _send(self, request: bytes, stream: socket.socket) -> _Zygote:
        with self._lock:
            for _ in range(2):
                if self._zygote is None or self._zygote.owner != os.getpid():
                    self._zygote = _Zygote()
                try:
                    socket.send_fds(self._zygote.socket, [request], [stream.fileno()])
                    return self._zygote
                except OSError as error:
                    failure = error
                    self._zygote = None
        raise InfraError(f"sandbox launcher: it can't be reached ({failure}); see the kernel log for why it ended")


def _end(stream: socket.socket, group: cgroups.Group | None) -> None:
    """Close a control stream and wait until everything inside is dead and its cgroups are removed."""
    try:
        stream.settimeout(10.0)
        stream.shutdown(socket.SHUT_WR)
        while stream.recv(1 << 16):
            pass
    except OSError:
        pass
    stream.close()
    if group:
        group.remove()  # does nothing but where the helper was killed


class _Zygote:
    """The helper process that clones the sandboxes of this process; it ends with its socket or its owner."""

    def __init__(self) -> None:
        reaper.on_start("native")
        self.owner = os.getpid()
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stores = cache_dir() / "stores"  # stays empty: what is mounted there, only the helper sees
        stores.mkdir(exist_ok=True)
        _raise_file_limit()
        null, name = subprocess.DEVNULL, cgroups.owner_name()  # by which the reaper knows whose it is
        with theirs:
            self._process = subprocess.Popen(
                [name, "zygote", str(theirs.fileno())],
                executable=helper_path(),
                stdin=null,
                stdout=null,
                stderr=null,
                cwd="/",
                env={},
                pass_fds=[theirs.fileno()],
            )
        mine, theirs = socket.socketpair()
        with mine:
            with theirs:
                socket.send_fds(self.socket, [launch.nursery(str(stores))], [theirs.fileno()])
            try:
                Channel(mine).ready(START_TIMEOUT)
            except BaseException as error:
                self.close()
                raise _explain(error, "", again=False) if isinstance(error, SetupError) else error from None

    def free(self, store: int) -> None:
        """Let it unmount a store; where it is dead, that is done."""
        if self.owner == os.getpid():
            with contextlib.suppress(OSError):
                self.socket.send(launch.free(str(store)))

    def close(self) -> None:
        self.socket.close()
        if self.owner == os.getpid():
            self._process.wait(timeout=30)


def _raise_file_limit() -> None:
    """Each sandbox takes up to eight descriptors of this process; the usual soft limit is for programs that use `select`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _explain(error: SetupError, workdir: str, *, again: bool) -> Exception:
    """again: it goes on from a world that was possible, which may have been broken from inside."""
    step = str(error).partition(" ")[0]
    if not again and step == "make":
        return Unsupported(f"workdir={workdir!r}: {error}; it must be, or become, a directory without links on the way")
    if step in ("write", "rlimit") and error.errno in (errno.EINVAL, errno.ERANGE):
        return Unsupported(f"limits: the kernel refuses one ({error}); lower it")
    if again or error.errno not in _FORBIDDEN:
        return InfraError(f"sandbox start: {error}")
    if not unprivileged():
        return Unsupported(
            f"native sandbox: {error}; root here may not make namespaces (a container without CAP_SYS_ADMIN?, a kernel"
            " before 5.12?): start as an ordinary user, or use the docker backend"
        )
    return Unsupported(
        f"native sandbox: {error}; this host gives ordinary users no user namespaces: ask for `sysctl -w"
        " user.max_user_namespaces=65536` (and kernel.apparmor_restrict_unprivileged_userns=0 where it exists), start as"
        " root, or use the docker backend"
    )
