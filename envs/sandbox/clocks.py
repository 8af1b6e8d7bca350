"""When a command has had its time: by the wall clock, unless the host is too busy to give it the CPU that it asks for.

Past its limit a command goes on while it is starved: while all processes of the sandbox together have used fewer CPU seconds
than the limit, and don't sleep. `GUARD` times the limit ends it at the latest. See `base.Sandbox.run`.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from envs.sandbox.base import Clock

GUARD = 10
TIMEOUT_MAX = 4e6

_TICKS = os.sysconf("SC_CLK_TCK")
_SLEEPS = 0.05
"""Of a core: what processes that sleep use less than."""


@dataclass
class _Limit:
    seconds: float
    since: float
    cpu: float | None = None
    """What all had used when this was first looked at."""

    def over(self, now: float, cpu: float, idle: bool) -> bool:
        """Whether it is, at `now` with `cpu` seconds used in all; idle: they sleep."""
        self.cpu = cpu if self.cpu is None else self.cpu
        wall = now - self.since
        return wall >= self.seconds and (idle or cpu - self.cpu >= self.seconds or wall >= GUARD * self.seconds)


class Clocks:
    """The clocks of one command, which begin to run now.

    proc: a descriptor of the sandbox's /proc. every: seconds between looks, the second no later than the first limit.
    """

    def __init__(self, proc: int, timeout: float, silence: float | None) -> None:
        """Raises `ValueError` for a silence that is not above 0."""
        if silence is not None and not silence > 0:
            raise ValueError(f"silence={silence}: it must be above 0 seconds; None turns the clock off")
        timeout, now = min(max(timeout, 0.0), TIMEOUT_MAX), time.monotonic()
        self._limits: dict[Clock, _Limit] = {"total": _Limit(timeout, now)}
        if silence is not None:
            self._limits["silence"] = _Limit(min(silence, TIMEOUT_MAX), now)
        least = min(limit.seconds for limit in self._limits.values())
        self.every = max(0.001, min(least / 20, 1.0) if least > 4 else min(least / 2, 0.2))
        self._proc, self._at, self._cpu, self._total = proc, now, -1.0, 0

    def over(self, total: int) -> Clock | None:
        """The clock that has run out. total: bytes that the command has written until now."""
        now = time.monotonic()
        if total != self._total and "silence" in self._limits:
            self._limits["silence"] = _Limit(self._limits["silence"].seconds, now)
        cpu, busy = _used(self._proc)
        idle = not busy and self._cpu >= 0 and cpu - self._cpu < _SLEEPS * (now - self._at)
        self._total, self._cpu, self._at = total, cpu, now
        return next((name for name, limit in self._limits.items() if limit.over(now, cpu, idle)), None)


def _used(proc: int) -> tuple[float, bool]:
    """CPU seconds that all that ran in a sandbox has used but its PID 1; whether a process has a core now, or waits for one.

    What a parent that ignores SIGCHLD has reaped is missing: hiding there makes a command look idle, which ends it sooner.
    """
    ticks, busy = 0, False
    for name in os.listdir(proc):
        if not name.isdigit():
            continue
        try:
            fd = os.open(f"{name}/stat", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
        except OSError:
            continue
        try:
            fields = os.read(fd, 1024).rpartition(b")")[2].split()  # the name before it may hold anything
        except OSError:
            continue
        finally:
            os.close(fd)
        first = 13 if name == "1" else 11  # utime, stime, those of children that were waited for
        ticks += sum(map(int, fields[first:15]))
        busy |= name != "1" and fields[0] == b"R"
    return ticks / _TICKS, busy
