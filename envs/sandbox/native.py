"""Sandboxes from Linux namespaces, without a daemon: milliseconds to start, nothing of the host writable or visible but
`/usr` and the running interpreter, read-only.

Started by root, a sandbox runs as a host uid of its own that owns nothing else, in its own cgroups where the host lets
them be made. Started by an ordinary user it runs in a user namespace as that user. Either way: no capabilities, no
network but loopback, a system call filter, and every writable byte on one size-capped tmpfs. The kernel is shared with
the host: an exploit of the kernel itself is not contained.
"""

from __future__ import annotations

import errno
import itertools
import os
import resource
import socket
import subprocess
import threading
import weakref
from enum import StrEnum

from envs.errors import InfraError, Unsupported
from envs.sandbox import cgroups
from envs.sandbox.base import Limits, Sandbox
from envs.sandbox.brokered import BrokeredSandbox, Files, Start, start_from
from envs.sandbox.channel import Channel, SetupError
from envs.sandbox.helper import helper_path
from envs.sandbox.hostbase import bind_paths, check_workdir, environment, etc_files, links

INNER_ID = 1000
"""The uid and gid inside a user namespace."""
FIRST_UID = 1_500_000_000
START_TIMEOUT = 30.0

_DEVICES = ("null", "zero", "full", "random", "urandom")
_DEVICE_LINKS = {
    "/dev/fd": "/proc/self/fd",
    "/dev/stdin": "/proc/self/fd/0",
    "/dev/stdout": "/proc/self/fd/1",
    "/dev/stderr": "/proc/self/fd/2",
}
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
        """Start a sandbox. base: only "host"."""
        if base != "host":
            raise Unsupported(
                f"base={base!r}: the native backend runs base='host' only; use the docker backend for images"
            )
        limits = limits or Limits()
        start = start_from(base, workdir, files, limits)
        check_workdir(workdir)
        return self._launch(start, limits)

    def close(self) -> None:
        """Close every sandbox and the helper."""
        for sandbox in list(self._live.values()):
            sandbox.close()
        with self._lock:
            zygote, self._zygote = self._zygote, None
        if zygote:
            zygote.close()

    def _launch(self, start: Start, limits: Limits) -> NativeSandbox:
        number = next(self._numbers)
        group = f"{cgroups.owner_name()}-{number}"
        request = _request(number, group, start.workdir, limits)
        mine, theirs = socket.socketpair()
        with theirs:
            self._send(request, theirs)
        channel = Channel(mine)
        try:
            workdir_fd = channel.ready(START_TIMEOUT)
        except BaseException as error:
            mine.close()
            if isinstance(error, SetupError):
                raise _explain(error) from None
            raise
        sandbox = NativeSandbox(f"native-{os.getpid()}-{number}", channel, workdir_fd, start, limits, self, group)
        try:
            sandbox.boot(environment())
        except BaseException:
            sandbox.close()
            raise
        self._live[sandbox.id] = sandbox
        return sandbox

    def _send(self, request: bytes, stream: socket.socket) -> None:
        with self._lock:
            for _ in range(2):
                if self._zygote is None or self._zygote.owner != os.getpid():
                    self._zygote = _Zygote()
                try:
                    socket.send_fds(self._zygote.socket, [request], [stream.fileno()])
                    return
                except OSError as error:
                    failure = error
                    self._zygote = None
        raise InfraError(f"sandbox launcher: it can't be reached ({failure}); see the kernel log for why it ended")


class NativeSandbox(BrokeredSandbox):
    """One native sandbox."""

    def __init__(
        self, name: str, channel: Channel, fd: int, start: Start, limits: Limits, backend: NativeBackend, group: str
    ) -> None:
        super().__init__(name, channel, fd, start, limits)
        self._backend = backend
        found = cgroups.hierarchy()
        self._group = found.group(group) if found else None

    def _end(self) -> None:
        stream = self._channel.stream
        try:
            stream.settimeout(10.0)
            stream.shutdown(socket.SHUT_WR)
            while stream.recv(1 << 16):  # the end comes when everything inside is dead and its cgroups are removed
                pass
        except OSError:
            pass
        stream.close()

    def _sibling(self, start: Start) -> Sandbox:
        return self._backend._launch(start, self.limits)

    def _counters(self, *, limits_hit: bool) -> cgroups.Counters:
        return self._group.read(limits_hit=limits_hit) if self._group else cgroups.Counters()


class _Zygote:
    """The helper process that clones the sandboxes of this process; it ends with its socket or its owner."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            null = subprocess.DEVNULL
            command = [str(helper_path()), "zygote", str(theirs.fileno())]
            self._process = subprocess.Popen(
                command, stdin=null, stdout=null, stderr=null, cwd="/", env={}, pass_fds=[theirs.fileno()]
            )

    def close(self) -> None:
        self.socket.close()
        if self.owner == os.getpid():
            self._process.wait(timeout=30)


class _Op(StrEnum):
    """Operations of a request, called with their arguments, which `helper/launch.c` explains."""

    USER_NAMESPACE = "U"
    IDENTITY = "I"
    JOIN_CGROUP = "G"
    WRITE = "W"
    REFUSE_MEMORY = "M"
    RLIMIT = "Z"
    ROOT = "T"
    DIRECTORY = "D"
    OWN_DIRECTORY = "O"
    BIND = "B"
    DEVICE = "V"
    LINK = "L"
    FILE = "F"
    PROC = "P"
    WORKDIR = "C"

    def __call__(self, *args: object) -> bytes:
        return self.value.encode() + b"".join(os.fsencode(str(arg)) + b"\0" for arg in args)


def _request(number: int, group: str, workdir: str, limits: Limits) -> bytes:
    """What the launcher is to do, as the operations that `helper/launch.c` lists."""
    root = os.geteuid() == 0
    uid = FIRST_UID + (os.getpid() % 32768) * 16384 + number % 16384 if root else INNER_ID
    found = cgroups.hierarchy()
    ops = [] if root else [_Op.USER_NAMESPACE()]
    ops.append(_Op.IDENTITY(uid, uid))
    if found:
        dirs, writes = found.plan(group, limits)
        ops += [_Op.JOIN_CGROUP(path, file) for path, file in dirs]
        ops += [_Op.WRITE(file, value) for file, value in writes]
    else:
        ops.append(_Op.REFUSE_MEMORY())
    ops += _limit_ops(limits, capped=found is not None)
    inodes = max(4096, limits.disk_mb * 256)
    ops.append(_Op.ROOT(f"size={limits.disk_mb}m,nr_inodes={inodes},mode=755"))
    ops += _system_ops(uid)
    ops += [
        _Op.OWN_DIRECTORY("/tmp"),
        _Op.OWN_DIRECTORY("/dev/shm"),
        _Op.OWN_DIRECTORY(workdir),
        _Op.PROC("/proc"),
        _Op.WORKDIR(workdir),
    ]
    return b"".join(ops)


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


def _system_ops(uid: int) -> list[bytes]:
    """The file system of `base="host"`."""
    ops = [_Op.BIND(path, path) for path in bind_paths()]
    ops += [_Op.LINK(target, path) for path, target in {**links(), "/var/tmp": "/tmp", **_DEVICE_LINKS}.items()]
    ops += [_Op.DEVICE(f"/dev/{name}", f"/dev/{name}") for name in _DEVICES]
    ops += [_Op.FILE(path, text) for path, text in etc_files(uid).items()]
    return [*ops, _Op.DIRECTORY("/run")]


def _explain(error: SetupError) -> Exception:
    if error.errno not in _FORBIDDEN:
        return InfraError(f"sandbox start: {error}")
    if os.geteuid() == 0:
        return Unsupported(
            f"native sandbox: {error}; root here may not make namespaces (a container without CAP_SYS_ADMIN?, a kernel"
            " before 5.12?): start as an ordinary user, or use the docker backend"
        )
    return Unsupported(
        f"native sandbox: {error}; this host gives ordinary users no user namespaces: ask for `sysctl -w"
        " user.max_user_namespaces=65536` (and kernel.apparmor_restrict_unprivileged_userns=0 where it exists), start as"
        " root, or use the docker backend"
    )
