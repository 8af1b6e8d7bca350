"""What every sandbox with a broker inside has in common: commands and files over the control stream, the work directory
read from outside. How it is isolated, started and ended is the subclass's business."""

from __future__ import annotations

import errno
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Self

from envs.errors import SandboxDead, Unsupported
from envs.sandbox.base import Cause, Changes, FileChange, Limits, Result, Sandbox, Snapshot, Usage
from envs.sandbox.cgroups import OWN_PIDS, Counters
from envs.sandbox.channel import OUTPUT_MAX, SCRIPT_MAX, STDIN_MAX, Channel, Reply

Files = Mapping[str, "bytes | FileChange"]

MOST_CPUS = 4096
_SHELL_OWN = frozenset(("_", "SHLVL", "PWD"))


@dataclass(frozen=True, kw_only=True)
class Start:
    """From what a sandbox starts, beside its limits: the same for a new one and for a fork."""

    base: str
    workdir: str
    files: Mapping[str, FileChange]
    origin: Mapping[str, FileChange]
    """What `changes()` counts from."""
    cwd: str | None = None
    """Where the shell starts, and with which environment, if it goes on from a snapshot."""
    exports: Mapping[str, str] | None = None


def start_from(base: str, workdir: str, files: Files | None, limits: Limits) -> Start:
    """Check what `create` was given. Raises `ValueError` for a path that leaves the work directory."""
    if limits.output_kb << 10 > OUTPUT_MAX:
        raise Unsupported(f"limits.output_kb={limits.output_kb}: at most {OUTPUT_MAX >> 10}; redirect output to a file")
    if (
        workdir != os.path.normpath(workdir)
        or not workdir.startswith("/")
        or workdir.startswith("//")
        or "\0" in workdir
    ):
        raise ValueError(f"workdir={workdir!r}: it must be an absolute path without '..'; e.g. '/repo'")
    _check_host(limits)
    tree = {}
    for path, value in (files or {}).items():
        if not isinstance(value, bytes | FileChange):
            raise ValueError(f"files[{path!r}]: {type(value).__name__}; give bytes, or a FileChange")
        if any(parent in (files or {}) for parent in map(str, PurePosixPath(path).parents)):
            raise ValueError(f"files[{path!r}]: it lies below another of the files, which can't be a directory then")
        parts = path.split("/")
        if not path or "\0" in path or any(part in ("", ".", "..") for part in parts):
            raise ValueError(f"files[{path!r}]: paths are relative to the work directory, without '.', '..' or '//'")
        tree[path] = value if isinstance(value, FileChange) else FileChange(value)
    return Start(base=base, workdir=workdir, files=tree, origin=tree)


def _check_host(limits: Limits) -> None:
    """Refuse what no sandbox on this host could be given."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    pids = int(Path("/proc/sys/kernel/pid_max").read_text())
    for name, most, what in (
        ("memory_mb", memory, "MiB"),
        ("disk_mb", memory, "MiB of memory"),
        ("pids", pids, "pids"),
    ):
        if (value := getattr(limits, name)) > most:
            raise Unsupported(f"limits.{name}={value}: this host has {most} {what}; lower it")
    if limits.cpus > MOST_CPUS:
        raise Unsupported(f"limits.cpus={limits.cpus}: more than {MOST_CPUS} cores; lower it")


class BrokeredSandbox(ABC):
    """A sandbox whose PID 1 is the helper's broker. See `base.Sandbox` for what the methods promise.

    disk: a descriptor on the file system that `disk_mb` caps; the subclass closes it.
    """

    def __init__(self, name: str, channel: Channel, disk: int, start: Start, limits: Limits) -> None:
        self.id = name
        self.limits = limits
        self._channel = channel
        self._disk = disk
        self._start = start
        self._cwd = start.cwd or start.workdir
        self._cpu: float | None = None
        self._ooms = self._refusals = 0
        self._closed = False

    def boot(self, env: Mapping[str, str], start: Start | None = None) -> None:
        """Put the files in place and start the shell; the sandbox is ready for commands then."""
        start = start or self._start
        files = [
            (f"{start.workdir}/{path}", change.data, change.mode)
            for path, change in start.files.items()
            if change.data is not None
        ]
        if start.cwd is None:
            self._channel.start(start.workdir, start.workdir, env)  # bash starts while the files are written
        try:
            self._channel.write(files)
        except OSError as error:
            if error.errno in (errno.EISDIR, errno.ENOTDIR, errno.EINVAL, errno.ENAMETOOLONG, errno.ELOOP):
                path = str(error.filename).removeprefix(f"{start.workdir}/")
                raise Unsupported(
                    f"files[{path!r}]: {error.strerror}; the base has something else there: give another path"
                ) from error
            if error.errno not in (errno.ENOSPC, errno.EFBIG):
                raise
            size = sum(len(data) for _, data, _ in files)
            raise Unsupported(
                f"files: {len(files)} files of {size} bytes don't fit in limits.disk_mb={self.limits.disk_mb}; raise it"
            ) from error
        if start.cwd is not None:
            self._channel.start(start.workdir, start.cwd, start.exports or env)

    def run(self, script: str, *, timeout: float, stdin: bytes = b"", silence: float | None = None) -> Result:
        """Run `script` in the persistent shell."""
        self._check_open()
        if not isinstance(timeout, int | float) or timeout != timeout:
            raise ValueError(f"timeout={timeout!r}: not a number of seconds")
        raw = _encode(script)
        if len(stdin) > STDIN_MAX:
            raise ValueError(f"stdin of {len(stdin)} bytes: more than {STDIN_MAX}; write() a file and redirect it")
        if b"\0" in raw or len(raw) > SCRIPT_MAX:
            what = "contains a NUL byte" if b"\0" in raw else f"is longer than {SCRIPT_MAX} bytes"
            return Result(exit=126, cause="exit", head=f"bash: the command {what}\n".encode())
        try:
            reply = self._channel.run(raw, stdin, timeout, max(2, self.limits.output_kb << 10), silence)
        except OSError as error:
            return Result(exit=126, cause="exit", head=f"bash: {error.strerror}\n".encode())
        self._cwd = reply.cwd
        return self._judge(reply)

    def read(self, path: str, *, limit: int = 1 << 20) -> bytes:
        """A regular file's bytes."""
        self._check_open()
        return self._channel.read(path, limit)

    def write(self, path: str, data: bytes, *, mode: int | None = None) -> None:
        """Create or replace a regular file."""
        self._check_open()
        self._channel.write([(path, data, mode)])

    @abstractmethod
    def changes(self) -> Changes:
        """What differs in the work directory from its origin."""

    @abstractmethod
    def snapshot(self) -> Snapshot:
        """The file system and the shell's state."""

    def fork(self, n: int) -> list[Sandbox]:
        """`n` sandboxes that start from here."""
        if n < 1:
            raise ValueError(f"fork({n}): at least 1")
        return self._fork(n)

    def _fork(self, n: int) -> list[Sandbox]:
        children: list[Sandbox] = []
        with self.snapshot() as frozen:
            try:
                for _ in range(n):
                    children.append(frozen.start())
            except BaseException:
                for child in children:
                    child.close()
                raise
        return children

    def kill_all(self) -> None:
        """Kill every process but the broker."""
        self._check_open()
        self._channel.ask(b"X", b"")

    def usage(self) -> Usage:
        """Memory, processes and disk in use now."""
        self._check_open()
        now, disk = self._counters(limits_hit=True), os.fstatvfs(self._disk)
        pids = None if now.pids is None else max(0, now.pids - OWN_PIDS)
        return Usage(now.memory, pids, (disk.f_blocks - disk.f_bfree) * disk.f_frsize)

    def close(self) -> None:
        """End everything; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()

    @abstractmethod
    def _end(self) -> None:
        """End every process and free what the subclass holds; never raises."""

    @abstractmethod
    def _counters(self, *, limits_hit: bool) -> Counters:
        """What the sandbox's cgroups say now (see `cgroups.Group.read`)."""

    def _exports(self) -> dict[str, str]:
        mark = secrets.token_hex(16).encode()
        script = b"builtin printf '%s\\0' " + mark + b"; /usr/bin/env -0"
        reply = self._channel.run(script, b"", 10.0, 2 << 20)
        text = reply.head.partition(mark + b"\0")[2]
        pairs = (os.fsdecode(item).partition("=") for item in text.split(b"\0") if b"=" in item)
        return {key: value for key, _, value in pairs if key not in _SHELL_OWN}

    def _check_open(self) -> None:
        if self._closed:
            raise SandboxDead(f"sandbox {self.id} is closed; create another")

    def _judge(self, reply: Reply) -> Result:
        failed = reply.how != "exit" or reply.status != 0
        cpu, now = self._cpu, self._counters(limits_hit=failed)
        self._cpu = now.cpu
        cause = self._limit_hit(reply, now) if failed and reply.how != "timeout" else reply.how
        return Result(
            exit=reply.status if cause == "exit" else None,
            cause=cause,
            clock=reply.clock,
            head=reply.head,
            tail=reply.tail,
            total=reply.total,
            wall=reply.wall,
            cpu=None if now.cpu is None else max(0.0, now.cpu - (cpu or 0.0)),
            peak_memory=now.peak,
            restarted=reply.restarted,
        )

    def _limit_hit(self, reply: Reply, now: Counters) -> Cause:
        """Which limit a failed command ran into, by the kernel's counters since the last failure; else how it ended."""
        ooms, refusals = (now.ooms or 0) - self._ooms, (now.pid_refusals or 0) - self._refusals
        self._ooms, self._refusals = now.ooms or 0, now.pid_refusals or 0
        if ooms > 0:
            return "oom"
        if refusals > 0:
            return "pids"
        if b"No space left on device" in reply.head + reply.tail and self._disk_full():
            return "disk"
        return reply.how

    def _disk_full(self) -> bool:
        disk = os.fstatvfs(self._disk)
        return disk.f_bavail * disk.f_frsize < 1 << 16 or disk.f_favail == 0


def _encode(script: str) -> bytes:
    try:
        return script.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return script.encode("utf-8", "replace")
