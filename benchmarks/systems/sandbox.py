"""How fast are sandboxes? Ours, mini-swe-agent's and SWE-ReX's, and the floor, side by side in one run.

Every round asks all of them in a new random order; numbers are medians over rounds, and ratios are of medians. The peers
are installed into a venv of their own under the user's cache. Containers have no network (SWE-ReX, which is reached over
one, has the bridge, or the host's where there is none); ours have all their limits set, the peers' none. `true` in ours
is a builtin of a living shell, as the policy's is; `cat` starts a process.

Times are `ours` and `peer` in ms and the ratio says how many times faster ours is, of rates as of times; against the floor
it is ours / floor. `spread` holds the least, the 25th and the 75th percentile of each.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from benchmarks.systems import images, node
from benchmarks.systems.base import row
from benchmarks.systems.lanes import IMAGE, Failed, Floor, Ours, Peer, Peers, install
from envs.errors import CodeworldError
from envs.sandbox import BACKENDS, make_backend

NAME = "sandbox"
MINI, BWRAP, REX, REX_SESSION = "mini-swe-agent docker", "mini-swe-agent bwrap", "SWE-ReX execute", "SWE-ReX session"
WORLDS = {MINI: "mini-docker", BWRAP: "mini-bwrap", REX: "rex-execute", REX_SESSION: "rex-session"}
FLOORS = {"floor: fork, exec, wait": "fork", "floor: bash": "bash", "floor: bash in a box": "box"}
FORKS = 8


def options(p: argparse.ArgumentParser) -> None:
    """This measurement's own options."""
    p.add_argument("--quick", action="store_true", help="few rounds, fewer sandboxes: about a minute")
    p.add_argument(
        "--rounds", type=int, help="rounds of single sandboxes; heavier parts take a quarter (default: 10; quick: 2)"
    )
    p.add_argument("--no-peers", action="store_true", help="ours and the floor only; nothing is installed")
    p.add_argument("--backends", default=",".join(BACKENDS), help="which of ours, by comma (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of the order within rounds (default: %(default)s)")


class Lane(Protocol):
    """One of those measured: see `lanes`."""

    name: str

    def ask(self, call: str, args: dict[str, Any]) -> dict[str, float]:
        """Take a measurement; raises `Failed`."""

    def close(self) -> None:
        """Free what is kept."""


class Missing:
    """A lane that this host can't have; every question is answered by why."""

    def __init__(self, name: str, why: str) -> None:
        self.name, self.why = name, why

    def ask(self, call: str, args: dict[str, Any]) -> dict[str, float]:
        """Always `Failed`."""
        raise Failed(self.why)

    def close(self) -> None:
        """Nothing is kept."""


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rounds: int
    heavy: int
    workers: tuple[int, ...]
    window: float
    """Seconds of one round of episodes, after which none is started."""
    many: int
    ready: int
    live: int
    busy: int
    cpu: float
    """CPU seconds of a command that must not time out."""
    beside: float
    """Seconds of commands beside running tests."""
    image_rounds: int
    work: int
    """How much a test of a repository on an image computes: 100000 is about 30 ms."""


def plan(quick: bool, rounds: int | None) -> Plan:
    """The plan of the options. Raises `ValueError` for less than one round."""
    if rounds is not None and rounds < 1:
        raise ValueError(f"--rounds {rounds}: at least 1; leave it out for the default")
    n = rounds or (2 if quick else 10)
    if quick:
        return Plan(n, max(1, n // 4), (8,), 1.0, 32, 64, 32, 4, 0.25, 1.0, 1, 2000)
    return Plan(n, max(1, n // 4), (1, 8, 32), 4.0, 32, 512, 256, 32, 1.0, 20.0, 5, 60_000)


class Record:
    """What was measured, and why something was not."""

    def __init__(self, seed: int) -> None:
        self.began = time.monotonic()
        self.order = random.Random(seed)
        self.samples: dict[tuple[str, str], list[float]] = defaultdict(list)
        self.whys: dict[tuple[str, str], str] = {}
        self.failures: dict[tuple[str, str], int] = defaultdict(int)

    def say(self, what: str) -> None:
        """A line of progress."""
        print(f"sandbox: {time.monotonic() - self.began:4.0f} s  {what}", flush=True)

    def rounds(
        self, times: int, lanes: Sequence[Lane], call: str, keys: Sequence[str], tag: str = "", **args: Any
    ) -> None:
        """Ask all lanes so many times, in a new order each time. A lane that failed twice isn't asked again."""
        for at in range(times):
            self.say(f"{call}{tag}, round {at + 1} of {times}")
            for lane in self.order.sample(list(lanes), len(lanes)):
                if self.failures[lane.name, call + tag] < 2:
                    self.take(lane, call, keys, tag, args)

    def take(self, lane: Lane, call: str, keys: Sequence[str], tag: str, args: dict[str, Any]) -> None:
        """Ask one lane once."""
        try:
            for key, value in lane.ask(call, args).items():
                self.samples[lane.name, key + tag].append(value)
        except Failed as error:
            self.failures[lane.name, call + tag] += 1
            self.whys.update({(lane.name, key + tag): str(error) for key in keys})

    def known(self, name: str, key: str) -> bool:
        """The lane was asked for it."""
        return (name, key) in self.samples or (name, key) in self.whys


class Quantity(NamedTuple):
    """A row of the table for each of ours and each peer."""

    key: str
    what: str
    unit: str = "ms"
    goals: Mapping[str, str] = MappingProxyType({})
    """Of ours, by name, against mini-swe-agent's Docker environment."""


BOTH = {"native": ">=200", "docker": ">=200"}
EPISODES = {"native": ">=40", "native, image": ">=40", "docker": ">=3"}


def quantities(p: Plan) -> list[Quantity]:
    """All that is compared."""
    return [
        Quantity("start", "start to first answer", goals={"native": ">=25"}),
        Quantity("first", "first command"),
        Quantity("builtin", "`true`", goals=BOTH),
        Quantity("cat", "`cat` of 8 KiB", goals=dict.fromkeys(BOTH, ">=20")),
        Quantity("teardown", "teardown"),
        Quantity("fork", f"fork({FORKS}) until all answer", goals={"native": ">=25"}),
        Quantity("changes", "changes: 20 edits in 5000 files"),
        *(Quantity(f"episodes {n}", f"light episodes, {n} at once", "/min", EPISODES) for n in p.workers),
        Quantity("episodes python", "episodes with 3 Python processes, 8 at once", "/min"),
        Quantity("commands", f"`true` in {p.many} sandboxes at once", "/s", {"native": ">=200"}),
        Quantity("p99", f"`true` in {p.many} sandboxes at once, p99"),
        Quantity("idle", "memory of an idle container: PSS of shim and processes", "MiB"),
    ]


def spread_of(values: Sequence[float]) -> list[float]:
    """Least, 25th and 75th percentile."""
    several = values if len(values) > 1 else [*values, *values]
    low, _, high = statistics.quantiles(several, n=4, method="inclusive")
    return [round(v, 4) for v in (min(values), low, high)]


def compared(record: Record, q: Quantity, ours: Sequence[str], peers: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of one quantity."""
    rows = []
    for name in ours:
        if not record.known(name, q.key):
            continue
        rivals = [peer for peer in peers if record.known(peer, q.key)] or [""]
        for peer in rivals if (name, q.key) in record.samples else rivals[:1]:
            rows.append(versus(record, q, name, peer, q.goals.get(name, "") if peer == MINI else ""))
    return rows


def versus(
    record: Record, q: Quantity, name: str, peer: str, goal: str, *, better: bool | None = None
) -> dict[str, Any]:
    """One row. better: times_better of `row`, by default for all that is no rate."""
    scale = 1e3 if q.unit == "ms" else 1.0
    values, others = ([scale * v for v in record.samples.get((who, q.key), [])] for who in (name, peer))
    why = "" if values else record.whys.get((name, q.key), "")
    if peer and not others:
        why = why or f"{peer}: {record.whys.get((peer, q.key), 'not measured')}"
    spread: Any = {"ours": spread_of(values)} if values else None
    if values and others:
        spread["peer"] = spread_of(others)
    return row(
        q.what,
        statistics.median(values) if values else None,
        peer=round(statistics.median(others), 4) if others else None,
        peer_name=peer,
        unit=q.unit,
        goal=goal,
        n=len(values),
        spread=spread,
        backend=name,
        times_better=q.unit in ("ms", "MiB") if better is None else better,
        why=why,
    )


def above_floor(record: Record, ours: Sequence[str]) -> list[dict[str, Any]]:
    """Starts as multiples of the floor."""
    q = Quantity("start", "start to first answer, times the floor")
    rows = []
    for name in ours:
        if (name, q.key) in record.samples:
            for floor in FLOORS:
                goal = "<=4" if (name, FLOORS[floor]) == ("native", "box") else ""
                rows.append(versus(record, q, name, floor, goal, better=False))
    return rows


def ours_of(names: Sequence[str], stack: ExitStack) -> list[Lane]:
    """Our lanes; a backend that doesn't work here is `Missing`."""
    lanes: list[Lane] = []
    for name in names:
        bases = {"native": "host", "native, image": IMAGE} if name == "native" else {name: IMAGE}
        try:
            backend = make_backend(name)
        except CodeworldError as error:
            lanes += [Missing(lane, str(error)) for lane in bases]
            continue
        stack.callback(backend.close)
        lanes += [Ours(lane, backend, base) for lane, base in bases.items()]
    return lanes


def peers_of(stack: ExitStack) -> list[Lane]:
    """The peers' lanes, their packages installed where they aren't yet."""
    try:
        peers = Peers(install())
    except (Failed, RuntimeError, OSError) as error:
        return [Missing(name, " ".join(str(error).split())) for name in WORLDS]
    stack.callback(peers.close)
    return [Peer(name, world, peers) for name, world in WORLDS.items()]


def floors_of(stack: ExitStack) -> list[Lane]:
    """The floor's lanes."""
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="codeworld-floor-")))
    lanes: list[Lane] = []
    for name, mode in FLOORS.items():
        try:
            lanes.append(Floor(name, mode, directory))
        except CodeworldError as error:
            lanes.append(Missing(name, str(error)))
    return lanes


def play(record: Record, p: Plan, ours: Sequence[Lane], peers: Sequence[Lane], floors: Sequence[Lane]) -> None:
    """Take all that is compared."""
    everyone = [*ours, *peers]
    by_name = {lane.name: lane for lane in everyone}
    record.rounds(p.rounds, [*everyone, *floors], "single", ("start", "first", "builtin", "cat", "teardown"))
    forking = [lane for lane in everyone if lane.name not in (BWRAP, REX, REX_SESSION)]
    record.rounds(p.heavy, forking, "fork", ("fork",), n=FORKS)
    record.rounds(p.heavy, forking, "changes", ("changes",), files=5000, edits=20)
    playing = [*forking, *(by_name[name] for name in (BWRAP,) if name in by_name)]
    for n in p.workers:
        lanes = [*playing, *(by_name[name] for name in (REX,) if name in by_name and n == 8)]
        record.rounds(p.heavy, lanes, "episodes", ("episodes",), f" {n}", workers=n, seconds=p.window)
    record.rounds(p.heavy, playing, "episodes", ("episodes",), " python", workers=8, seconds=p.window, python=3)
    crowd = [*playing, *(by_name[name] for name in (REX,) if name in by_name and len(p.workers) > 1)]
    record.rounds(1, crowd, "fill", ("commands", "p99"), n=p.many)
    filled = [lane for lane in crowd if (lane.name, "fill") in record.samples]
    idle(record, filled)
    record.rounds(p.heavy + 1, filled, "commands", ("commands", "p99"), seconds=p.window / 2)
    record.rounds(1, filled, "drain", ())


def idle(record: Record, lanes: Sequence[Lane]) -> None:
    """Memory of the containers that a lane keeps now."""
    for lane in lanes:
        label = lane.peers.label if isinstance(lane, Peer) and lane.name == MINI else ""
        if isinstance(lane, Ours) and lane.backend.name == "docker":
            label = f"codeworld.run={getattr(lane.backend, 'run', '')}"
        if label and (found := node.pss_of_containers(label)):
            record.samples[lane.name, "idle"] += found


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The measurement; returns rows. Nothing is left, also after Ctrl-C."""
    names = [name for name in args.backends.split(",") if name]
    if not names or set(names) - set(BACKENDS):
        raise ValueError(f"--backends {args.backends!r}: known are {', '.join(BACKENDS)}")
    p, record = plan(args.quick, args.rounds), Record(args.seed)
    with ExitStack() as stack:
        ours = ours_of(names, stack)
        peers = [] if args.no_peers else peers_of(stack)
        floors = floors_of(stack)
        for lane in (*ours, *peers):
            stack.callback(lane.close)
        play(record, p, ours, peers, floors)
    rows = []
    for q in quantities(p):
        rows += compared(record, q, [lane.name for lane in ours], [lane.name for lane in peers])
    rows += above_floor(record, [lane.name for lane in ours])
    if "native" in names and not isinstance(ours[names.index("native")], Missing):
        node_rows = node.measure(p.live, p.busy, p.ready, p.cpu, p.beside)
        for found in itertools.chain(node_rows, images.measure(p.image_rounds, p.work, 16)):
            record.say(f"done: {found[0]['what']}")
            rows += found
    return {"rows": rows}


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table, a quantity after the other; reasons below it."""
    print(f"\n{'':24} {'ours':>10} {'(p25-p75)':>17} {'peer':>10} {'unit':5} {'ratio':>8} {'goal':>7}")
    last = ""
    whys: dict[str, int] = {}
    for r in rows:
        if r["what"] != last:
            print(r["what"])
            last = r["what"]
        note = f" [{whys.setdefault(r['why'], len(whys) + 1)}]" if r.get("why") else ""
        print(f"  {line(r)}{note}")
    for why, at in whys.items():
        print(f"[{at}] {why}")


def number(value: float | None) -> str:
    """Four digits, or "-"."""
    return "-" if value is None else f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def line(r: dict[str, Any]) -> str:
    """One row of the table."""
    ours = (r["spread"] or {}).get("ours")
    between = f"({number(ours[1])}-{number(ours[2])})" if ours else ""
    verdict = {True: "met", False: "NOT MET", None: "not measured" if r["goal"] else ""}[r["met"]]
    text = f"{r['backend']:22} {number(r['ours']):>10} {between:>17} {number(r['peer']):>10} {r['unit']:5}"
    return f"{text} {number(r['ratio']):>8} {r['goal']:>7} {verdict:8} {r['peer_name']}".rstrip()
