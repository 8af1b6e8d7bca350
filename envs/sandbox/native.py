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
import itertools
import os
import resource
import socket
import subprocess
import threading
import weakref
from dataclasses import dataclass, replace
from enum import StrEnum

from envs.errors import InfraError, Unsupported
from envs.sandbox import cgroups, reaper
from envs.sandbox.base import Changes, Limits, Snapshot
from envs.sandbox.bases import Base, find_base, layers_dir
from envs.sandbox.brokered import BrokeredSandbox, Files, Start, start_from
from envs.sandbox.channel import Channel, SetupError
from envs.sandbox.helper import cache_dir, helper_path, unprivileged
from envs.sandbox.hostbase import DEVICES, bind_paths, check_workdir, etc_files
from envs.sandbox.walk import overlay_changes

AGENT_ID, ROOT_ID = 1000, 0
"""Who the sandbox is inside a user namespace: on the host's system, in an image."""
FIRST_UID = 1_500_000_000
START_TIMEOUT = 30.0

_FORBIDDEN = frozenset((errno.EPERM, errno.EACCES, errno.ENOSPC, errno.EINVAL, errno.ENOSYS, errno.EUSERS))


class NativeBackend:
    """Makes native sandboxes through one helper process, started with the first of them. Thread-safe, and safe to use
    after a fork of this process (the child starts its own helper)."""

    name = "native"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._zygote: _Zygote | None = None
        self._numbers = itertools.count()
        self._live: weakref.WeakValueDictionary[str, NativeSandbox] = weakref.WeakValueDictionary()

    def create(
        self, *, base: str = "host", workdir: str = "/repo", files: Files | None = None, limits: Limits | None = None
    ) -> NativeSandbox:
        """Start a sandbox on "host", an image archive or a local Docker image (see `bases.find_base`)."""
        limits = limits or Limits()
        start = start_from(base, workdir, files, limits)
        check_workdir(workdir, image=base != "host")
        found = find_base(base)
        return self._launch(start, limits, _World(found, next(self._numbers)))

    def close(self) -> None:
        """Close every sandbox and the helper."""
        for sandbox in list(self._live.values()):
            sandbox.close()
        with self._lock:
            zygote, self._zygote = self._zygote, None
        if zygote:
            zygote.close()

    def _launch(self, start: Start, limits: Limits, world: _World) -> NativeSandbox:
        live = self._start(start, limits, world)
        sandbox = NativeSandbox(f"native-{os.getpid()}-{live.store.number}", live, start, limits, self)
        try:
            sandbox.boot(world.base.env)
        except BaseException:
            sandbox.close()
            raise
        self._live[sandbox.id] = sandbox
        return sandbox

    def _start(self, start: Start, limits: Limits, world: _World) -> _Live:
        """Namespaces and a broker in them, nothing booted yet."""
        number = next(self._numbers)
        group = f"{cgroups.owner_name()}-{number}"
        request = _request(number, group, start.workdir, limits, world)
        mine, theirs = socket.socketpair()
        with theirs:
            zygote = self._send(request, theirs)
        channel, store = Channel(mine), _Store(number, zygote)
        try:
            *origin, store.upper, root = channel.ready(START_TIMEOUT)
        except BaseException as error:
            mine.close()
            store.drop()
            if isinstance(error, SetupError):
                raise _explain(error) from None
            raise
        found = cgroups.hierarchy()
        return _Live(channel, root, next(iter(origin), None), store, world, found.group(group) if found else None)

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


class _Store:
    """What one sandbox wrote: freed when neither it nor any that started from it needs it."""

    def __init__(self, number: int, zygote: _Zygote) -> None:
        self.number, self.upper = number, -1
        self._zygote, self._users, self._lock = zygote, 1, threading.Lock()

    def hold(self) -> None:
        with self._lock:
            self._users += 1

    def drop(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users:
                return
        if self.upper >= 0:
            os.close(self.upper)
        self._zygote.free(self.number)


@dataclass(frozen=True)
class _World:
    """What a new sandbox stands on."""

    base: Base
    owner: int
    """From which its host uid is made; a fork has its parent's, whose files it goes on with."""
    frozen: tuple[_Store, ...] = ()
    """Stores of those it started from, the newest first."""

    def hold(self) -> None:
        for store in self.frozen:
            store.hold()

    def drop(self) -> None:
        for store in self.frozen:
            store.drop()


@dataclass
class _Live:
    """A started sandbox: its broker, and descriptors of its root and of the root that it started with."""

    channel: Channel
    root: int
    origin: int | None
    store: _Store
    world: _World
    group: cgroups.Group | None
    ended: bool = False

    def end(self) -> None:
        """End its processes; its store is still there. May be called twice."""
        if self.ended:
            return
        self.ended = True
        stream = self.channel.stream
        try:
            stream.settimeout(10.0)
            stream.shutdown(socket.SHUT_WR)
            while stream.recv(1 << 16):  # the end comes when everything inside is dead and its cgroups are removed
                pass
        except OSError:
            pass
        stream.close()
        for fd in (self.root, self.origin):
            if fd is not None:
                os.close(fd)
        if self.group:
            self.group.remove()  # does nothing but where the helper was killed


class NativeSandbox(BrokeredSandbox):
    """One native sandbox."""

    def __init__(self, name: str, live: _Live, start: Start, limits: Limits, backend: NativeBackend) -> None:
        super().__init__(name, live.channel, live.root, start, limits)
        self._live, self._backend = live, backend
        live.world.hold()

    def changes(self) -> Changes:
        """What differs in the work directory from its origin."""
        self._check_open()
        live, start = self._live, self._start
        uppers = [store.upper for store in (live.store, *live.world.frozen)]
        budget = self.limits.disk_mb << 20
        return overlay_changes(live.root, uppers, live.origin, start.workdir, start.origin, budget)

    def snapshot(self) -> Snapshot:
        """The file system and the shell's state. Every process of this sandbox ends for it."""
        self._check_open()
        exports, live = self._exports(), self._live
        start = replace(self._start, files={}, cwd=self._cwd, exports=exports)
        world = replace(live.world, frozen=(live.store, *live.world.frozen))
        world.hold()  # for the snapshot
        live.end()
        try:
            self._adopt(self._backend._start(start, self.limits, world))
            self.boot(world.base.env, start)
        except BaseException:
            self.close()
            world.drop()
            raise
        return Snapshot(self._cwd, exports, lambda: self._backend._launch(start, self.limits, world), world.drop)

    def _adopt(self, live: _Live) -> None:
        """Go on as another sandbox."""
        live.world.hold()
        self._free()
        self._live, self._channel, self._disk = live, live.channel, live.root
        self._cpu, self._ooms, self._refusals = None, 0, 0

    def _free(self) -> None:
        self._live.store.drop()
        self._live.world.drop()

    def _end(self) -> None:
        self._live.end()
        self._free()

    def _counters(self, *, limits_hit: bool) -> cgroups.Counters:
        group = self._live.group
        return group.read(limits_hit=limits_hit) if group else cgroups.Counters()


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
    """Each sandbox takes five descriptors of this process; the usual soft limit is for programs that use `select`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class _Op(StrEnum):
    """Operations of a request, called with their arguments, which `helper/launch.c` explains."""

    IDENTITY = "I"
    USER_NAMESPACE = "U"
    JOIN_CGROUP = "G"
    WRITE = "W"
    REFUSE_MEMORY = "M"
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


def _request(number: int, group: str, workdir: str, limits: Limits, world: _World) -> bytes:
    """What the launcher is to do, as the operations that `helper/launch.c` lists."""
    root, image = not unprivileged(), world.base.image
    uid = FIRST_UID + (os.getpid() % 32768) * 16384 + world.owner % 16384 if root else 0
    inner = ROOT_ID if image else AGENT_ID
    found = cgroups.hierarchy()
    ops = [_Op.IDENTITY(uid)]
    if image or not root:
        ops.append(_Op.USER_NAMESPACE(inner))
    if found:
        dirs, writes = found.plan(group, limits)
        ops += [_Op.JOIN_CGROUP(path, file) for path, file in dirs]
        ops += [_Op.WRITE(file, value) for file, value in writes]
    else:
        ops.append(_Op.REFUSE_MEMORY())
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


def _root_ops(number: int, limits: Limits, world: _World) -> list[bytes]:
    """The root: the store on top, what is frozen, the base's layers."""
    inodes = max(4096, limits.disk_mb * 256)
    base = [f"{number}/b/{name}" for name in world.base.layers]
    frozen = [f"{store.number}/u" for store in world.frozen]
    ops = [_Op.STORE(number, f"size={limits.disk_mb}m,nr_inodes={inodes},mode=755"), _Op.LAYERS_DIR(layers_dir())]
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


def _explain(error: SetupError) -> Exception:
    if error.errno not in _FORBIDDEN:
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
