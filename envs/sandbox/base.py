"""What a sandbox is: the protocol that every backend keeps, and the types that cross it.

A sandbox is the isolation that one episode (or one grading) runs in. Backends differ in how they isolate, not in what
they answer: one conformance suite (`tests/envs/test_sandbox.py`) runs against all of them. A sandbox never raises for
what a command did; it says so in `Result.cause`. It raises `SandboxDead` when it stopped answering and `Unsupported`, at
creation only, for a limit that the host can't enforce.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, Self

from envs.errors import SandboxDead

Cause = Literal["exit", "signal", "timeout", "oom", "pids", "disk", "output", "dead"]
"""Why a command ended: it exited, died by a signal, ran out of time, hit a limit, or the sandbox itself died."""
Clock = Literal["total", "silence"]
"""Which clock ended a command: that of its whole time, or that of its time without output."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one sandbox may use. Every field is enforced as it says, or creation is refused with a line that says why."""

    memory_mb: int = 512
    """Resident memory of all its processes together, MiB. As root: a cgroup. As an ordinary user without cgroup
    delegation: `RLIMIT_AS` on each process (so `pids` × `memory_mb` in the worst case), stated by the doctor."""
    pids: int = 64
    """Processes and threads alive at once."""
    disk_mb: int = 64
    """Bytes that may be written, MiB (a size-capped tmpfs: it counts as memory). A fork has as much again: what its parent
    wrote is a layer below."""
    output_kb: int = 64
    """Output kept of one command, KiB: half from its head, half from its tail. The true total is always reported."""
    cpus: float = 1.0
    """CPU cores; enforced where cgroups are (as root). Without them any other value than the default is refused, and the
    default is only enforced by timeouts, stated by the doctor."""

    def __post_init__(self) -> None:
        least = {"memory_mb": 8, "pids": 1, "disk_mb": 1, "output_kb": 1}
        for name in (*least, "cpus"):
            value, kinds = getattr(self, name), int if name in least else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
                raise ValueError(f"limits.{name}={value!r}: not a number of its kind; leave it out for the default")
            if value < least.get(name, 0.01):
                raise ValueError(f"limits.{name}={value} must be at least {least.get(name, 0.01)}; raise it")


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one command did, as data."""

    exit: int | None
    """Exit status; None unless `cause` is "exit". A process that a signal ended inside the shell is 128 + its number, as
    the shell says it; `cause` is "signal" when the shell itself was ended by one."""
    cause: Cause
    head: bytes
    """First bytes of stdout and stderr, merged in the order they were written."""
    tail: bytes = b""
    """Last bytes, where the output was longer than the limit keeps; else empty."""
    total: int = 0
    """True number of bytes the command wrote."""
    wall: float = 0.0
    """Seconds from sending the command to its end."""
    cpu: float | None = None
    """CPU seconds of the command's processes, where the backend can tell."""
    clock: Clock | None = None
    """The clock that ran out, where `cause` is "timeout"."""
    peak_memory: int | None = None
    """Peak bytes of the sandbox, where the backend can tell."""
    restarted: bool = False
    """The persistent shell was lost (timeout, `exit`, `exec`, kill) and started again with cwd and exports as they were
    after the last command that it survived; functions and other variables are gone."""

    @property
    def ok(self) -> bool:
        """The command exited with status 0."""
        return self.cause == "exit" and self.exit == 0

    def text(self) -> str:
        """The output as text: undecodable bytes replaced, the middle marked where it was cut."""
        head = self.head.decode("utf-8", "replace")
        if not self.tail:
            return head
        cut = self.total - len(self.head) - len(self.tail)
        return f"{head}\n[... {cut} bytes cut ...]\n{self.tail.decode('utf-8', 'replace')}"


@dataclass(frozen=True)
class FileChange:
    """One changed path of the work directory. `data` None means deleted."""

    data: bytes | None
    mode: int = 0o644


Changes = Mapping[str, FileChange]
"""The diff of the work directory against its start: relative POSIX path → change. Regular files only, whose names are
UTF-8 and at most 128 directories deep (`envs/sandbox/walk.py` says what else is left out)."""


class Snapshot:
    """A frozen world (file system, shell's cwd and exports) from which sandboxes start. To be closed."""

    def __init__(
        self, cwd: str, exports: Mapping[str, str], start: Callable[[], Sandbox], free: Callable[[], None]
    ) -> None:
        self.cwd = cwd
        self.exports = exports
        self._start = start
        self._free: Callable[[], None] | None = free

    def start(self) -> Sandbox:
        """A new sandbox that goes on from here; its `changes()` count from the same origin. Errors as `Backend.create`."""
        if self._free is None:
            raise SandboxDead("this snapshot is closed; take another")
        return self._start()

    def close(self) -> None:
        """Free what it holds (sandboxes that started from it go on). May be called twice."""
        free, self._free = self._free, None
        if free:
            free()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


@dataclass(frozen=True)
class Usage:
    """What a sandbox uses now."""

    memory: int | None
    """Bytes, where the backend can tell."""
    pids: int | None
    disk: int | None


class Sandbox(Protocol):
    """One isolated world with a work directory and a persistent shell. Not thread-safe: one episode owns it."""

    id: str

    def run(self, script: str, *, timeout: float, stdin: bytes = b"", silence: float | None = None) -> Result:
        """Run `script` in the persistent bash (cwd, exports and functions are kept).

        At `timeout` seconds, or at `silence` seconds without output (None: no such limit), every process in the sandbox
        is killed, partial output is kept and the shell answers the next command. Both are wall clock, and a busy host
        makes neither run out: past its limit a command goes on while it is starved, that is, while all processes of the
        sandbox together have used fewer CPU seconds than the limit and don't sleep (they use 5 % of a core, or wait for
        one), up to 10 times the limit. What background processes wrote since the last command is part of the output.
        Raises `SandboxDead` only if the sandbox itself is gone.
        """

    def read(self, path: str, *, limit: int = 1 << 20) -> bytes:
        """The regular file at `path` (relative to the shell's cwd unless absolute), as the sandbox's user sees it.

        Raises `FileNotFoundError`, `IsADirectoryError`, `PermissionError` or `OSError` with a one-line message;
        a file longer than `limit` bytes is an `OSError`.
        """

    def write(self, path: str, data: bytes, *, mode: int | None = None) -> None:
        """Create or replace a regular file, and its directories, as the sandbox's user. Errors as `read`; a full disk
        leaves the old file as it was. mode None keeps that of a file that is there, else 0o644."""

    def changes(self) -> Changes:
        """The diff of the work directory since creation, computed outside the sandbox; links and devices are left out."""

    def snapshot(self) -> Snapshot:
        """The file system and the shell's cwd and exports, frozen. A backend may have to end the sandbox's processes for
        it; this sandbox goes on from the snapshot then, its shell started again."""

    def fork(self, n: int) -> list[Sandbox]:
        """`n` new sandboxes that start from this one's `snapshot()`; this one goes on. Their `changes()` count from
        the same origin as this one's."""

    def kill_all(self) -> None:
        """Kill every process inside but the broker; the shell starts again with the next command."""

    def usage(self) -> Usage:
        """Memory, processes and disk in use now."""

    def close(self) -> None:
        """End every process and free everything. May be called twice; never raises."""

    def __enter__(self) -> Self:
        """The sandbox itself, to be closed at the end of the block."""

    def __exit__(self, *_: object) -> None:
        """`close()`."""


class Backend(Protocol):
    """Makes sandboxes of one kind. Thread-safe: many episodes create at once."""

    name: str

    def create(
        self,
        *,
        base: str = "host",
        workdir: str = "/repo",
        files: Mapping[str, bytes] | None = None,
        limits: Limits | None = None,
    ) -> Sandbox:
        """Start a sandbox with `files` (paths relative to `workdir`; bytes have mode 0o644) in place; the shell starts in
        `workdir`.

        base: "host" (the host's `/usr` and this interpreter, read-only), or an image: the path of an archive (a root file
        system as tar, `docker save`, an OCI layout) or the name of a local Docker image.
        Raises `Unsupported` for a limit or base it can't provide, `InfraError` when the start failed.
        """

    def close(self) -> None:
        """Close every sandbox of this backend and its helper."""
