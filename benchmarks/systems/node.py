"""What a training node feels: many native sandboxes at once, commands beside running tests, timeouts under load."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.systems.base import row, tree
from benchmarks.systems.workload import docker, spread
from envs.sandbox import Sandbox
from envs.sandbox.native import NativeBackend

KERNEL = ("Slab", "KernelStack", "PageTables", "Percpu", "Shmem")
"""Lines of /proc/meminfo that hold what a sandbox costs beside its processes."""
TESTS = """\
import json, tempfile, unittest

class Load(unittest.TestCase):
    pass

def case(i):
    def test(self):
        data = {str(k): list(range(k % 50)) for k in range(400)}
        with tempfile.TemporaryFile("w+") as f:
            json.dump(data, f); f.seek(0)
            self.assertEqual(json.load(f), data)
    return test

for i in range(150):
    setattr(Load, f"test_{i}", case(i))
"""
PER_CORE = 4
BURN = "import time\nwhile time.process_time() < {}: pass"


def measure(live: int, busy: int, ready: int, cpu: float, seconds: float) -> Iterator[list[dict[str, Any]]]:
    """Lists of rows: `ready` sandboxes from cold; latency with `live` of them, `busy` running tests; false timeouts."""
    yield from_cold(ready)
    yield beside_tests(live, busy, seconds)
    yield false_timeouts(cpu)


def from_cold(n: int) -> list[dict[str, Any]]:
    """`n` sandboxes, each with its first answer, and what they hold while idle."""
    before, own = meminfo(), set(tree(os.getpid()))
    began = time.perf_counter()
    with kept(n) as boxes:
        seconds = time.perf_counter() - began
        after = meminfo()
        processes = pss([pid for pid, _ in set(tree(os.getpid())) - own])
        charged = [box.usage().memory for box in boxes]
    kernel = sum(after[k] - before[k] for k in KERNEL if k in before) / 1024
    drop = (before["MemAvailable"] - after["MemAvailable"]) / 1024
    unreadable = (
        "" if processes is not None else "the kernel shows an ordinary user no memory of the sandboxes' processes"
    )
    each = None if processes is None else (processes + kernel) / n
    rows = [
        row(f"{n} sandboxes ready from cold", seconds, unit="s", backend="native"),
        row(f"{n} sandboxes: MemAvailable drop", drop, unit="MiB", backend="native"),
        row(f"{n} sandboxes: PSS of processes", processes, unit="MiB", backend="native", why=unreadable),
        row(
            "memory of an idle sandbox: PSS, slab, kernel stacks, page tables, per-cpu, tmpfs",
            each,
            unit="MiB",
            goal="<=1",
            n=n,
            backend="native",
            why=unreadable,
        ),
        row("memory of an idle sandbox: MemAvailable drop", drop / n, unit="MiB", n=n, backend="native"),
    ]
    counted = [c for c in charged if c is not None]
    if counted:
        mean = sum(counted) / len(counted) / 2**20
        rows.append(row("memory of an idle sandbox: charged to its cgroup", mean, unit="MiB", n=n, backend="native"))
    return rows


def beside_tests(live: int, busy: int, seconds: float) -> list[dict[str, Any]]:
    """Latency of commands in idle sandboxes while others run test suites."""
    times: dict[str, list[float]] = {"true": [], "cat load.py": []}
    stop = threading.Event()

    def load(box: Sandbox) -> int:
        runs = 0
        while not stop.is_set():
            runs += box.run("python3 -m unittest -q load", timeout=120).ok
        return runs

    def probe(_: Sandbox) -> int:
        end, at = time.perf_counter() + seconds, 0
        try:
            while time.perf_counter() < end:
                at = (at + 1) % len(idle)
                for script, taken in times.items():
                    began = time.perf_counter()
                    idle[at].run(script, timeout=60)
                    taken.append(time.perf_counter() - began)
        finally:
            stop.set()
        return 0

    with kept(live, {"load.py": TESTS.encode()}) as boxes:
        working, idle = boxes[:busy], boxes[busy:]
        runs = spread(lambda job: job[0](job[1]), [(probe, idle[0]), *((load, box) for box in working)])
    return [
        row(
            f"`{script}` with {live} live, {busy} running tests: p99",
            1e3 * sorted(taken)[int(0.99 * (len(taken) - 1))],
            unit="ms",
            n=len(taken),
            spread={"p50": round(1e3 * sorted(taken)[len(taken) // 2], 3), "suites": sum(runs)},
            backend="native",
        )
        for script, taken in times.items()
    ]


def false_timeouts(cpu: float) -> list[dict[str, Any]]:
    """Commands that need `cpu` CPU seconds and may take twice as many, 4 at once for each core: how many time out."""
    n = PER_CORE * (os.cpu_count() or 1)
    with kept(n) as boxes:
        results = spread(lambda box: box.run(f"python3 -c '{BURN.format(cpu)}'", timeout=2 * cpu), boxes)
    false = sum(result.cause == "timeout" for result in results)
    what = f"false timeouts: {cpu:g} CPU s, timeout {2 * cpu:g} s, {PER_CORE} a core"
    return [row(what, false, unit=f"of {n}", goal="<=0", n=n, backend="native")]


@contextlib.contextmanager
def kept(n: int, files: dict[str, bytes] | None = None, base: str = "host") -> Iterator[list[Sandbox]]:
    """`n` native sandboxes of a backend of their own, each after its first answer."""
    backend = NativeBackend()

    def one(_: int) -> Sandbox:
        sandbox: Sandbox = backend.create(base=base, files=files)
        sandbox.run("true", timeout=60)
        return sandbox

    boxes: list[Sandbox] = []
    try:
        boxes += spread(one, range(n), 4)
        yield boxes
    finally:
        spread(lambda box: box.close(), boxes, 4)
        backend.close()


def pss_of_containers(label: str) -> list[float]:
    """MiB of each container with the label: its shim and all processes below. Empty where the kernel doesn't show it."""
    time.sleep(2)  # commands that have answered are still being put away
    found = []
    for container in docker("ps", "-q", "--no-trunc", "--filter", f"label={label}").split():
        lines = {int(pid): command_line(int(pid)) for pid in os.listdir("/proc") if pid.isdigit()}
        shims = [pid for pid, line in lines.items() if container in line and "shim" in line.partition("\0")[0]]
        memory = pss(list({pid for shim in shims for pid, _ in tree(shim)}))
        if shims and memory:
            found.append(memory)
    return found


def command_line(pid: int) -> str:
    """The arguments of a process; empty where it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def meminfo() -> dict[str, int]:
    """/proc/meminfo: name → KiB."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return {fields[0].rstrip(":"): int(fields[1]) for fields in lines}


def pss(pids: list[int]) -> float | None:
    """Proportional memory of processes, MiB; None where the kernel doesn't show it. One that has ended counts nothing."""
    total = 0
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except PermissionError:
            return None
        except OSError:
            continue
        total += next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
    return total / 1024
