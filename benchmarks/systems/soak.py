"""Is anything left? Many live sandboxes at once, then episodes whose processes are killed at random; what remains is counted.

Workers play episodes (commands with background processes, writes, forks) and are killed by SIGKILL at random moments, or
their helper is; killed workers are replaced until all episodes are done. Then the reaper runs, and processes, mounts,
cgroups, directories, descriptors and containers of all those runs are counted: none may be left.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.systems.base import row, tree
from envs.errors import CodeworldError, InfraError
from envs.sandbox import Backend, Limits, Sandbox, cgroups, make_backend
from envs.sandbox.helper import cache_dir
from envs.sandbox.owner import PREFIX, Owner, current
from envs.sandbox.reaper import OWNER_LABEL, reap
from rl.config import ROOT

KINDS = ("processes", "mounts", "cgroups", "directories", "descriptors", "containers")
EPISODE_SECONDS = {"native": 0.05, "docker": 1.5}
"""About how long an episode takes, within which its worker is killed."""
SETTLE_SECONDS = 10.0
"""How long things may take to go after the kill."""
LOST = "episodes lost with their helper"
LIMITS = Limits(memory_mb=64, disk_mb=4, pids=16)


def options(p: argparse.ArgumentParser) -> None:
    """This measurement's own options."""
    p.add_argument("--live", type=int, default=500, help="native sandboxes alive at once (default: %(default)s)")
    p.add_argument("--episodes", type=int, default=200, help="native episodes under SIGKILL (default: %(default)s)")
    p.add_argument(
        "--docker-live",
        type=int,
        default=20,
        help="containers alive at once; 0 leaves docker out (default: %(default)s)",
    )
    p.add_argument("--docker-episodes", type=int, default=20, help="docker episodes (default: %(default)s)")
    p.add_argument("--workers", type=int, default=4, help="processes that play (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of what is killed when (default: %(default)s)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Rows of each backend that works here; at least one must."""
    for name in ("live", "episodes", "workers", "docker_live", "docker_episodes"):
        if getattr(args, name) < (least := 0 if name.startswith("docker") else 1):
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(args, name)}: at least {least}; leave it out for the default"
            )
    rows, skipped = [], {}
    for name, live, episodes in (
        ("native", args.live, args.episodes),
        ("docker", args.docker_live, args.docker_episodes),
    ):
        if not live:
            continue
        try:
            make_backend(name).close()
        except CodeworldError as error:
            skipped[name] = str(error)
            print(f"{name}: left out: {error}", file=sys.stderr)
            continue
        rows += soak(name, live, episodes, args.workers, random.Random(args.seed))
    if not rows:
        raise InfraError("soak: no sandbox backend works here; `python -m envs doctor` says why")
    return {"rows": rows, "skipped": skipped}


def soak(name: str, live: int, episodes: int, workers: int, rng: random.Random) -> list[dict[str, Any]]:
    """One backend's rows."""
    adopt_orphans(True)
    try:
        reap()
        runs = Runs()
        before = runs.count()
        rows = hold(name, live)
        rows += play(name, episodes, workers, rng, runs)
        freed, after = settle(runs, before)
    finally:
        adopt_orphans(False)
    rows.append(row(f"{name}: what the reaper had to free", freed, backend=name))
    for kind in KINDS:
        rows.append(row(f"{name}: {kind} left", after[kind] - before[kind], goal="<=0", n=episodes, backend=name))
    return rows


def settle(runs: Runs, before: dict[str, int]) -> tuple[int, dict[str, int]]:
    """Reap until nothing is left or the time is up: how many things were freed, and what is there at last."""
    deadline, freed = time.monotonic() + SETTLE_SECONDS, 0
    while True:
        freed += sum(not found.why for found in reap())
        collect_orphans()
        after = runs.count()
        if time.monotonic() > deadline or all(after[kind] <= before[kind] for kind in KINDS):
            return freed, after
        time.sleep(0.2)


# ---- many at once ----


def hold(name: str, live: int) -> list[dict[str, Any]]:
    """Start `live` sandboxes, ask each of them twice, close them."""
    backend = make_backend(name)
    free = _available()
    begin = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        boxes = list(pool.map(lambda number: _started(backend, number), range(live)))
        ready = time.perf_counter() - begin
        used = free - _available()
        answers = list(pool.map(_ask, boxes))
        begin = time.perf_counter()
        list(pool.map(lambda box: box.close(), boxes))
    closed = time.perf_counter() - begin
    backend.close()
    wrong = sum(answer != f"{number}\n" for number, answer in enumerate(answers))
    return [
        row(f"{name}: {live} live at once, wrong answers", wrong, goal="<=0", n=live, backend=name),
        row(f"{name}: {live} started", ready, unit="s", n=live, backend=name),
        row(f"{name}: {live} closed", closed, unit="s", n=live, backend=name),
        row(f"{name}: host memory for each live one", used / live / 2**20, unit="MiB", n=live, backend=name),
    ]


def _started(backend: Backend, number: int) -> Sandbox:
    return backend.create(files={"number": b"%d\n" % number}, limits=LIMITS)


def _ask(box: Sandbox) -> str:
    return box.run("cat number", timeout=60).text()


def _available() -> int:
    """Bytes of memory that the host could give."""
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) << 10


# ---- episodes under SIGKILL ----


def worker(name: str, seed: int) -> None:
    """Play episodes until killed; a line for each that ended."""
    backend, rng = make_backend(name), random.Random(seed)
    while True:
        try:
            episode(backend, rng)
            print("done", flush=True)
        except InfraError:  # its helper was killed
            print(LOST, flush=True)


def episode(backend: Backend, rng: random.Random) -> None:
    """Commands, a background process that outlives them, files, a fork."""
    with backend.create(files={"a": b"1\n"}, limits=LIMITS) as box:
        box.run("setsid sleep 1000 >/dev/null 2>&1 & export A=1; mkdir -p d; cd d", timeout=30)
        for number in range(rng.randrange(1, 6)):
            box.write(f"f{number}", rng.randbytes(2000))
            box.run("cat ../a f* | wc -c; sleep 0.005", timeout=30)
        with box.fork(1)[0] as child:
            child.run("pwd; rm -f f0", timeout=30)
            child.changes()


@dataclass
class Runs:
    """All processes that owned sandboxes in this measurement, and what still bears their names."""

    owners: list[Owner] = field(default_factory=lambda: [current()])

    def count(self) -> dict[str, int]:
        """What is there of each kind now."""
        found = cgroups.hierarchy()
        places = set(found.parents.values()) if found else set()
        directories = [*Path(tempfile.gettempdir()).glob(f"{PREFIX}*"), *(cache_dir() / "mounts").glob("*")]
        return {
            "processes": len(tree(os.getpid())) - 1,
            "mounts": sum(map(self._is_ours, Path("/proc/self/mountinfo").read_text().splitlines())),
            "cgroups": sum(self._has(path.name) for place in places for path in place.glob(f"{PREFIX}*")),
            "directories": sum(self._has(path.name) for path in directories),
            "descriptors": len(os.listdir("/proc/self/fd")),
            "containers": self._containers(),
        }

    def _has(self, name: str) -> bool:
        return Owner.parse(name) in self.owners

    def _is_ours(self, mount: str) -> bool:
        """Everything but what is an engine's or bears the name of a run that is not ours."""
        parts = mount.split()
        named = [owner for part in "/".join(parts).split("/") if (owner := Owner.parse(part))]
        return any(owner in self.owners for owner in named) or (not named and "/docker/" not in mount)

    def _containers(self) -> int:
        try:
            import docker

            client = docker.from_env()
        except Exception:
            return 0
        try:
            found = client.api.containers(all=True, filters={"label": OWNER_LABEL})
            return sum(self._has(container["Labels"][OWNER_LABEL]) for container in found)
        finally:
            client.close()


def play(name: str, episodes: int, workers: int, rng: random.Random, runs: Runs) -> list[dict[str, Any]]:
    """`episodes` in all by `workers` processes at once, which are killed and replaced."""
    tally = dict.fromkeys(("done", LOST, "workers killed", "helpers killed"), 0)
    lock = threading.Lock()

    def lives(seed: int) -> None:
        own = random.Random(seed)
        while tally["done"] < episodes:
            _one_life(name, own, runs, tally, lock)

    begin = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lives, [rng.randrange(1 << 30) for _ in range(workers)]))
    wall = time.perf_counter() - begin
    killed = ["workers killed"] + ["helpers killed", LOST] * (name == "native")
    return [
        row(f"{name}: episodes done", tally["done"], goal=f">={episodes}", n=episodes, backend=name),
        *(row(f"{name}: {what}", tally[what], n=episodes, backend=name) for what in killed),
        row(f"{name}: episodes took", wall, unit="s", n=episodes, backend=name),
    ]


def _one_life(name: str, rng: random.Random, runs: Runs, tally: dict[str, int], lock: threading.Lock) -> None:
    """A worker from its start to SIGKILL, which comes in the middle of an episode; its helper's may come before."""
    code = f"from benchmarks.systems.soak import worker; worker({name!r}, {rng.randrange(1 << 30)})"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True) as process:
        try:
            with lock:
                runs.owners.append(Owner.of(process.pid))
            helper_dies_at = rng.randrange(1, 31) if name == "native" else 0
            dies_at = rng.randrange(1, 16 if name == "native" else 4)
            assert process.stdout
            for number in range(1, dies_at + 1):
                line = process.stdout.readline().strip()
                if not line:
                    raise InfraError(f"soak: a worker ended by itself, status {process.wait()}; see its errors above")
                with lock:
                    tally[line] += 1
                time.sleep(rng.random() * EPISODE_SECONDS[name] if number in (dies_at, helper_dies_at) else 0)
                if number == helper_dies_at and number < dies_at:
                    with lock:
                        tally["helpers killed"] += _kill_helper(process.pid)
        finally:
            process.send_signal(signal.SIGKILL)
    with lock:
        tally["workers killed"] += 1


def _kill_helper(worker: int) -> bool:
    for pid in Path(f"/proc/{worker}/task/{worker}/children").read_text().split():
        if b"\0zygote\0" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(int(pid), signal.SIGKILL)
            return True
    return False


# ---- processes ----


def adopt_orphans(on: bool) -> None:
    """Whether descendants whose parent died become this process's children, so that `tree` sees all that is left."""
    pr_set_child_subreaper = 36
    if ctypes.CDLL(None).prctl(pr_set_child_subreaper, int(on), 0, 0, 0):
        raise InfraError("soak: prctl(PR_SET_CHILD_SUBREAPER) failed; Linux 3.4 or newer is needed")


def collect_orphans() -> None:
    """Take note of the deaths of adopted processes."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
