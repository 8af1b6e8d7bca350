"""Finds the cgroups that this process may create, v1 or v2, and turns `Limits` into what the launcher writes there.

Without them (an ordinary user without delegation) memory is `RLIMIT_AS` per process and CPU is not limited. Nothing here
moves a process: the new sandbox joins its own cgroups before it runs anything.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path

from envs.sandbox.base import Limits

_PERIOD = 100_000
_CONTROLLERS = ("memory", "pids", "cpu", "cpuacct")
_PREFIX = "codeworld-"


@dataclass(frozen=True)
class Counters:
    """What the cgroups of one sandbox say. None where this host can't tell."""

    memory: int | None = None
    peak: int | None = None
    pids: int | None = None
    cpu: float | None = None
    ooms: int = 0
    pid_refusals: int = 0


@dataclass(frozen=True)
class Hierarchy:
    """Where cgroups can be made: `parents` maps each controller to a directory. v2 has one directory for all."""

    version: int
    parents: dict[str, Path]

    def plan(self, name: str, limits: Limits) -> tuple[list[tuple[Path, str]], list[tuple[Path, str]]]:
        """The directories to create, each with the file that joins it, and the (file, value) pairs to write first."""
        dirs = {path / name: ("cgroup.procs" if self.version == 2 else "tasks") for path in self.parents.values()}
        values = _v2_values(limits) if self.version == 2 else _v1_values(limits)
        writes = []
        for controller, file, value in values:
            if parent := self.parents.get(controller):
                if (parent / file).exists() or file in _ALWAYS:
                    writes.append((parent / name / file, value))
        return list(dirs.items()), writes

    def counters(self, name: str) -> Counters:
        """The counters of the cgroup `name`."""
        at = {controller: path / name for controller, path in self.parents.items()}
        if self.version == 2:
            return Counters(
                memory=_number(at["memory"] / "memory.current"),
                peak=_number(at["memory"] / "memory.peak"),
                pids=_number(at["pids"] / "pids.current"),
                cpu=_scaled(_field(at["cpu"] / "cpu.stat", "usage_usec"), 1e-6),
                ooms=_field(at["memory"] / "memory.events", "oom_kill") or 0,
                pid_refusals=_field(at["pids"] / "pids.events", "max") or 0,
            )
        return Counters(
            memory=_number(at["memory"] / "memory.usage_in_bytes"),
            peak=_number(at["memory"] / "memory.max_usage_in_bytes"),
            pids=_number(at["pids"] / "pids.current"),
            cpu=_scaled(_number(at["cpuacct"] / "cpuacct.usage"), 1e-9) if "cpuacct" in at else None,
            ooms=_field(at["memory"] / "memory.oom_control", "oom_kill") or 0,
            pid_refusals=_field(at["pids"] / "pids.events", "max") or 0,
        )

    def sweep(self) -> None:
        """Remove the cgroups of owners that are gone."""
        for parent in set(self.parents.values()):
            for path in parent.glob(f"{_PREFIX}*"):
                owner = path.name.removeprefix(_PREFIX).rsplit("-", 1)[0]
                pid, _, start = owner.partition("-")
                if pid.isdigit() and start != _start_time(int(pid)):
                    _remove(path)


_ALWAYS = frozenset(("memory.max", "pids.max", "cpu.max", "memory.limit_in_bytes", "pids.max", "cpu.cfs_quota_us"))
"""Limit files that must take the value (the root of a v2 tree doesn't show them); others are written where present."""


def owner_name() -> str:
    """The prefix of the cgroups that this process owns: its pid and start time, which together are unique."""
    return f"{_PREFIX}{os.getpid()}-{_start_time(os.getpid())}"


def discover(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> Hierarchy | None:
    """The hierarchy in which this process may create cgroups with memory, pids and cpu limits, or None."""
    own: dict[str, str] = {}
    for line in membership.read_text().splitlines():
        _, names, path = line.split(":", 2)
        own.update(dict.fromkeys(names.split(","), path))
    parents = {}
    for name in _CONTROLLERS:
        for path in (root / name / own.get(name, "/").strip("/"), root / name):
            if (path / "tasks").exists() and _may_create(path):
                parents[name] = path
                break
    if {"memory", "pids", "cpu"} <= parents.keys():
        return Hierarchy(1, parents)
    return _discover_v2(root, own.get("", "/"))


@functools.cache
def hierarchy() -> Hierarchy | None:
    """`discover()` for this process, once, after a sweep."""
    found = discover()
    if found:
        found.sweep()
    return found


def _discover_v2(root: Path, own: str) -> Hierarchy | None:
    """A delegated ancestor of this process, or the top, whose children may have all three controllers."""
    if not (root / "cgroup.controllers").exists():
        return None
    here = root / own.strip("/")
    for path in (here, *here.parents):
        if path != root and root not in path.parents:
            break
        try:
            enabled = set((path / "cgroup.subtree_control").read_text().split())
            if not {"memory", "pids", "cpu"} <= enabled:
                (path / "cgroup.subtree_control").write_text("+memory +pids +cpu")
        except OSError:
            continue
        if _may_create(path):
            return Hierarchy(2, dict.fromkeys(("memory", "pids", "cpu"), path))
    return None


def _may_create(path: Path) -> bool:
    probe = path / f"{owner_name()}-probe"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError:
        return False
    return os.access(path / "cgroup.procs", os.W_OK)


def _v1_values(limits: Limits) -> list[tuple[str, str, str]]:
    memory = str(limits.memory_mb << 20)
    return [
        ("memory", "memory.limit_in_bytes", memory),
        ("memory", "memory.memsw.limit_in_bytes", memory),
        ("pids", "pids.max", str(limits.pids + OWN_PIDS)),
        ("cpu", "cpu.cfs_period_us", str(_PERIOD)),
        ("cpu", "cpu.cfs_quota_us", str(max(1000, int(limits.cpus * _PERIOD)))),
    ]


def _v2_values(limits: Limits) -> list[tuple[str, str, str]]:
    return [
        ("memory", "memory.max", str(limits.memory_mb << 20)),
        ("memory", "memory.swap.max", "0"),
        ("pids", "pids.max", str(limits.pids + OWN_PIDS)),
        ("cpu", "cpu.max", f"{max(1000, int(limits.cpus * _PERIOD))} {_PERIOD}"),
    ]


OWN_PIDS = 2
"""The broker and the shell, which `Limits.pids` does not count."""


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _field(path: Path, name: str) -> int | None:
    try:
        return next((int(line.split()[1]) for line in path.read_text().splitlines() if line.split()[:1] == [name]), None)
    except OSError:
        return None


def _scaled(value: int | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _start_time(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return "gone"


def _remove(path: Path) -> None:
    try:
        path.rmdir()
    except OSError:
        pass
