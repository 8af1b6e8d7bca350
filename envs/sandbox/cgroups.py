"""Finds the cgroups that this process may create, v1 or v2, and turns `Limits` into what the launcher writes there.

Without them (an ordinary user without delegation) memory is `RLIMIT_AS` per process and CPU is not limited. Nothing here
moves a process: the new sandbox joins its own cgroups before it runs anything.
"""

from __future__ import annotations

import errno
import functools
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from envs.sandbox.base import Limits
from envs.sandbox.owner import PREFIX, current

_PERIOD = 100_000
_CONTROLLERS = ("memory", "pids", "cpu", "cpuacct")


@dataclass(frozen=True)
class Counters:
    """What the cgroups of one sandbox say. None where this host can't tell."""

    memory: int | None = None
    peak: int | None = None
    pids: int | None = None
    cpu: float | None = None
    ooms: int | None = None
    pid_refusals: int | None = None


@dataclass(frozen=True)
class Group:
    """One sandbox's cgroup: a directory for each controller."""

    version: int
    paths: dict[str, Path]
    _open: dict[str, _File] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Files that are read after every command: opening one costs several times what reading it does."""

    def read(self, *, limits_hit: bool) -> Counters:
        """The counters now; the ones that only tell which limit was hit, if asked for (each is a file to read)."""
        names = _V2_FILES if self.version == 2 else _V1_FILES
        memory, pids, cpu = (
            self.paths.get(name) for name in ("memory", "pids", "cpuacct" if self.version == 1 else "cpu")
        )
        used = self._kept(cpu, names.cpu, names.cpu_field)
        return Counters(
            peak=self._kept(memory, names.peak),
            cpu=None if used is None else used * names.cpu_unit,
            memory=_read(memory, names.memory) if limits_hit else None,
            pids=_read(pids, "pids.current") if limits_hit else None,
            ooms=_read(memory, names.ooms, b"oom_kill") if limits_hit else None,
            pid_refusals=_read(pids, "pids.events", b"max") if limits_hit else None,
        )

    def _kept(self, directory: Path | None, name: str, line: bytes = b"") -> int | None:
        if directory is None:
            return None
        try:
            file = self._open.get(name) or self._open.setdefault(name, _File(f"{directory}/{name}"))
            return file.number(line)
        except (OSError, ValueError):
            return None

    def close(self) -> None:
        """Close the files that `read` keeps open."""
        self._open.clear()

    def remove(self, patience: float = 5.0) -> None:
        """Remove what is there; what has just died leaves a moment later, so a busy one is tried again until `patience`."""
        deadline = time.monotonic() + patience
        for path in self.paths.values():
            while True:
                try:
                    path.rmdir()
                except OSError as error:
                    if error.errno == errno.EBUSY and time.monotonic() < deadline:
                        time.sleep(0.002)
                        continue
                break


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
            parent = self.parents.get(controller)
            if parent and (file in _ALWAYS or (parent / file).exists()):
                writes.append((parent / name / file, value))
        return list(dirs.items()), writes

    def group(self, name: str) -> Group:
        """The cgroup `name` of a sandbox, to be read."""
        return Group(self.version, {controller: path / name for controller, path in self.parents.items()})


_ALWAYS = frozenset(("memory.max", "pids.max", "cpu.max", "memory.limit_in_bytes", "pids.max", "cpu.cfs_quota_us"))
"""Limit files that must take the value (the root of a v2 tree doesn't show them); others are written where present."""


def owner_name() -> str:
    """The prefix of the cgroups that this process owns, by which `Owner.parse` knows it."""
    return PREFIX + current().tag


def discover(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> Hierarchy | None:
    """The hierarchy in which this process may create cgroups with memory, pids and cpu limits, or None."""
    own = _memberships(membership)
    parents: dict[str, Path] = {}
    for controller in _CONTROLLERS:
        for path in (root / controller / own.get(controller, "/").strip("/"), root / controller):
            if controller not in parents and (path / "tasks").exists() and _may_create(path):
                parents[controller] = path
    if {"memory", "pids", "cpu"} <= parents.keys():
        return Hierarchy(1, parents)
    return _discover_v2(root, own.get("", "/"))


def of_process(pid: int, root: Path = Path("/sys/fs/cgroup")) -> Group | None:
    """The cgroup that another program (a container engine) made for process `pid`, where it can be seen from here."""
    try:
        own = _memberships(Path(f"/proc/{pid}/cgroup"))
    except OSError:
        return None
    paths = {name: root / name / own[name].strip("/") for name in _CONTROLLERS if name in own}
    if "memory" in paths and paths["memory"].is_dir():
        return Group(1, paths)
    unified = root / own.get("", "").strip("/")
    return (
        Group(2, dict.fromkeys(("memory", "pids", "cpu"), unified)) if (unified / "memory.current").exists() else None
    )


def _memberships(file: Path) -> dict[str, str]:
    """Controller → path of a process's cgroup; the controller of the v2 tree is ""."""
    found: dict[str, str] = {}
    for line in file.read_text().splitlines():
        _, names, path = line.split(":", 2)
        found.update(dict.fromkeys(names.split(","), path))
    return found


@functools.cache
def hierarchy() -> Hierarchy | None:
    """`discover()` for this process, once."""
    return discover()


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


class _Files(NamedTuple):
    memory: str
    peak: str
    ooms: str
    cpu: str
    cpu_field: bytes
    cpu_unit: float


_V1_FILES = _Files(
    "memory.usage_in_bytes", "memory.max_usage_in_bytes", "memory.oom_control", "cpuacct.usage", b"", 1e-9
)
_V2_FILES = _Files("memory.current", "memory.peak", "memory.events", "cpu.stat", b"usage_usec", 1e-6)


class _File:
    """An open file of a cgroup; it is closed with the last reference."""

    def __init__(self, path: str) -> None:
        self._fd = -1
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def number(self, field: bytes) -> int | None:
        """Its number, or that of its line `field`."""
        text = os.pread(self._fd, 4096, 0)
        if not field:
            return int(text)
        return next((int(line.split()[1]) for line in text.splitlines() if line.startswith(field + b" ")), None)


def _read(directory: Path | None, name: str, field: bytes = b"") -> int | None:
    """A number of a cgroup file; None where there is no such file."""
    try:
        return None if directory is None else _File(f"{directory}/{name}").number(field)
    except (OSError, ValueError):
        return None
