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
from enum import StrEnum

from envs.errors import InfraError, Unsupported
from envs.sandbox import cgroups, reaper
from envs.sandbox.base import Limits
from envs.sandbox.bases import find_base, layers_dir
from envs.sandbox.brokered import Files, Start, start_from
from envs.sandbox.channel import Channel, SetupError
from envs.sandbox.helper import cache_dir, helper_path, unprivileged
from envs.sandbox.hostbase import DEVICES, bind_paths, check_workdir, etc_files
from envs.sandbox.seccomp import seccomp_filter
from envs.sandbox.stacked import NUMBERS, Live, StackedBackend, StackedSandbox, Store, World, host_uid, store_options

AGENT_ID, ROOT_ID = 1000, 0
"""Who the sandbox is inside a user namespace: on the host's system, in an image."""
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
        """Start a sandbox on "host", an image archive or a local Docker image (see `bases.find_base`)."""
        limits = limits or Limits()
        start = start_from(base, workdir, files, limits)
        check_workdir(workdir, image=base != "host")
        return self.first(start, limits, World(find_base(base), next(NUMBERS)))

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
        request = _request(number, group, start.workdir, limits, world)
        found = cgroups.hierarchy()
        mine, theirs = socket.socketpair()
        with theirs:
            channel = Channel(mine, seccomp_filter(strict=found is None))
            zygote = self._send(request, theirs)
        store = Store(number, functools.partial(zygote.free, number))
        try:
            *origin, store.upper, root = channel.ready(START_TIMEOUT)
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
        with theirs:
            null = subprocess.DEVNULL
            name = cgroups.owner_name()  # by which the reaper knows whose it is
            self._process = subprocess.Popen(
                [name, "zygote", str(theirs.fileno()), str(stores), "user" if unprivileged() else "root"],
                executable=helper_path(),
                stdin=null,
                stdout=null,
                stderr=null,
                cwd="/",
                env={},
                pass_fds=[theirs.fileno()],
            )

    def free(self, store: int) -> None:
        """Let it unmount a store; where it is dead, that is done."""
        if self.owner == os.getpid():
            with contextlib.suppress(OSError):
                self.socket.send(b"R%d" % store)

    def close(self) -> None:
        self.socket.close()
        if self.owner == os.getpid():
            self._process.wait(timeout=30)


def _raise_file_limit() -> None:
    """Each sandbox takes up to seven descriptors of this process; the usual soft limit is for programs that use `select`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class _Op(StrEnum):
    """Operations of a request, called with their arguments, which `helper/launch.c` explains."""

    IDENTITY = "I"
    USER_NAMESPACE = "U"
    JOIN_CGROUP = "G"
    WRITE = "W"
    RLIMIT = "Z"
    STORE = "S"
    LAYERS_DIR = "Y"
    ORIGIN = "N"
    ROOT = "T"
    READ_ONLY = "Q"
    OWN_DIRECTORY = "O"
    BIND = "B"
    DEVICE = "V"
    FILE = "F"
    PROC = "P"
    WORKDIR = "C"

    def __call__(self, *args: object) -> bytes:
        return self.value.encode() + b"".join(os.fsencode(str(arg)) + b"\0" for arg in args)


def _request(number: int, group: str, workdir: str, limits: Limits, world: World) -> bytes:
    """What the launcher is to do, as the operations that `helper/launch.c` lists."""
    root, image = not unprivileged(), world.base.image
    uid = host_uid(world.owner) if root else 0
    inner = ROOT_ID if image else AGENT_ID
    found = cgroups.hierarchy()
    ops = [_Op.IDENTITY(uid)]
    if image or not root:
        ops.append(_Op.USER_NAMESPACE(inner))
    if found:
        dirs, writes = found.plan(group, limits)
        ops += [_Op.JOIN_CGROUP(path, file) for path, file in dirs]
        ops += [_Op.WRITE(file, value) for file, value in writes]
    elif limits.cpus != Limits.cpus:
        raise Unsupported(
            f"limits.cpus={limits.cpus}: without cgroups nothing enforces it; leave it out, start as root, or in a delegated"
            " cgroup (systemd-run --user -p Delegate=yes)"
        )
    ops += _limit_ops(limits, capped=found is not None)
    ops += _root_ops(number, limits, world)
    ops += [_Op.DEVICE(path, path) for path in DEVICES]
    if not image:
        etc = etc_files(uid if root else inner)
        ops += [_Op.BIND(path, path) for path in bind_paths()]
        ops += [_Op.FILE(path, etc[path]) for path in ("/etc/passwd", "/etc/group")]
    ops += [_Op.OWN_DIRECTORY(path) for path in ("/tmp", "/dev/shm", workdir)]
    ops += [_Op.PROC("/proc"), _Op.WORKDIR(workdir)]
    return b"".join(ops)


def _root_ops(number: int, limits: Limits, world: World) -> list[bytes]:
    """The root: the store on top, what is frozen, the base's layers."""
    base = [f"{number}/b/{name}" for name in world.base.layers]
    frozen = [f"{store.number}/u" for store in world.frozen]
    ops = [_Op.STORE(number, store_options(limits)), _Op.LAYERS_DIR(layers_dir())]
    ops += [_Op.ORIGIN(":".join(base))] if world.base.image else [_Op.READ_ONLY()]
    return [*ops, _Op.ROOT(":".join(frozen + base))]


def _limit_ops(limits: Limits, *, capped: bool) -> list[bytes]:
    size = max(limits.disk_mb + 1, 4) << 20  # above the disk, which is to answer first, and the broker's command buffer
    values = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 4096,
        resource.RLIMIT_FSIZE: size,
        resource.RLIMIT_MEMLOCK: 1 << 16,
        resource.RLIMIT_RTPRIO: 0,
        resource.RLIMIT_NICE: 0,
    }
    if not capped:  # where a cgroup caps them, it answers alone: it counts its refusals, which a resource limit doesn't
        values[resource.RLIMIT_AS] = limits.memory_mb << 20
        values[resource.RLIMIT_NPROC] = limits.pids + cgroups.OWN_PIDS
    return [_Op.RLIMIT(int(name), value) for name, value in values.items()]


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
