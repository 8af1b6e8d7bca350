"""Who owns what a sandbox leaves on the host. A run is one process, and its life is the lease: what carries the name of a
process that has ended is free to be reaped (`envs/sandbox/reaper.py`)."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from pathlib import Path
from typing import NamedTuple

PREFIX = "codeworld-"
_NAME = re.compile(rf"(?:{PREFIX})?([1-9]\d{{0,6}})-(\d+)\.([0-9a-f]{{8}})(?:-.*)?", re.DOTALL)


class Owner(NamedTuple):
    """One process, for good: a reused pid has another start time, another boot or container another `host`."""

    pid: int
    start: str
    """Clock ticks from boot to its start."""
    host: str
    """Digest of the boot and the pid namespace in which `pid` means something."""

    @property
    def tag(self) -> str:
        """`PID-START.HOST`, by which resources are named."""
        return f"{self.pid}-{self.start}.{self.host}"

    @classmethod
    def parse(cls, name: str) -> Owner | None:
        """The owner in a name `[codeworld-]PID-START.HOST[-ANYTHING]`; None for any other name."""
        match = _NAME.fullmatch(name)
        return cls(int(match[1]), match[2], match[3]) if match else None

    @classmethod
    def of(cls, pid: int) -> Owner:
        """The living process `pid`. Raises `ProcessLookupError`."""
        if (stat := _stat(pid)) is None:
            raise ProcessLookupError(f"no process {pid}")
        return cls(pid, stat[19], _host())

    @property
    def is_here(self) -> bool:
        """Its pid can be looked up from here."""
        return self.host == _host()

    @property
    def ended(self) -> bool:
        """Proven to have ended: gone, a zombie, or another process has its pid. False where that can't be seen from here."""
        if not self.is_here:
            return False
        try:
            stat = _stat(self.pid)
        except OSError:
            return False
        if stat is None:
            return not _exists(self.pid)
        return stat[19] != self.start or (stat[0] in "ZX" and int(stat[17]) <= 1)  # other threads may outlive the first


@functools.cache
def current() -> Owner:
    """This process."""
    return Owner.of(os.getpid())


os.register_at_fork(after_in_child=current.cache_clear)


@functools.cache
def _host() -> str:
    parts = [Path("/proc/sys/kernel/random/boot_id").read_text(), str(Path("/proc/self/ns/pid").readlink())]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:8]


def _stat(pid: int) -> list[str] | None:
    """The fields of its stat file from the state on, or None where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def _exists(pid: int) -> bool:
    """Also where /proc hides the processes of other users."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
