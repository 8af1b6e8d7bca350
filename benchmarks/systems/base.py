"""What every system measurement shares: the form of a row, the commit and host it was made on, CPU time of a process tree."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

from rl.config import ROOT

TICK = os.sysconf("SC_CLK_TCK")


def row(
    what: str,
    ours: float | None,
    *,
    peer: float | None = None,
    peer_name: str = "",
    unit: str = "",
    goal: str = "",
    n: int = 1,
    spread: Any = None,
    backend: str = "",
    times_better: bool = False,
    why: str = "",
) -> dict[str, Any]:
    """One measured number. `goal` (">=20", "<=1") is of `ratio` (ours / peer), else of `ours`; absent, the row only reports.

    times_better: both are costs, so that `ratio` is peer / ours, how many times less ours is. A number that could not be
    measured is None and `why` says the reason; a goal on it is neither met nor missed.
    """
    pair = (peer, ours) if times_better else (ours, peer)
    ratio = None if ours is None or peer is None else round(pair[0] / pair[1], 4)  # type: ignore[operator]
    measured = ours if peer is None else ratio
    met = None
    if goal and measured is not None and not why:
        bound = float(goal[2:])
        met = measured >= bound if goal.startswith(">=") else measured <= bound
    return {
        "what": what,
        "backend": backend,
        "ours": None if ours is None else round(ours, 4),
        "peer": peer,
        "peer_name": peer_name,
        "unit": unit,
        "ratio": ratio,
        "goal": goal,
        "met": met,
        "n": n,
        "spread": spread,
        **({"why": why} if why else {}),
    }


def commit() -> str:
    """The commit that is measured; "+" where the tree has changes."""
    done = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def host() -> str:
    """Cores, memory and system of this machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "",
    )
    return f"{os.cpu_count()} cores ({model}), {memory:.0f} GiB, Linux {platform.release()}, Python {platform.python_version()}"


def cpu_seconds(process: subprocess.Popen[Any], every: float = 1.0) -> float:
    """Wait for a process; CPU seconds (user and system) of it and all its descendants, reaped ones included.

    Read from /proc every second, so what a process used in its last second may be missing.
    """
    last: dict[tuple[int, str], float] = {}
    most = 0.0
    while process.poll() is None:
        last = tree(process.pid)
        most = max(most, sum(last.values()))
        time.sleep(every)
    return most


def tree(root: int) -> dict[tuple[int, str], float]:
    """(pid, start time) → CPU seconds, for a process and its living descendants; each includes children it has reaped."""
    stats = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            stats[int(entry.name)] = (int(fields[1]), fields[19], sum(map(int, fields[11:15])) / TICK)
    inside = {root}
    grew = True
    while grew:
        grew = False
        for pid, (parent, _, _) in stats.items():
            if parent in inside and pid not in inside:
                inside.add(pid)
                grew = True
    return {(pid, stats[pid][1]): stats[pid][2] for pid in inside if pid in stats}
