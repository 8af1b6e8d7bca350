"""Is the ledger honest? Delays of known length, one kind at a time, in real runs: do they land on the right label?

Each kind of delay is put in front of the one call that it names, in a run of its own; the run's summary is then asked where the
seconds went and what the bottleneck was. From a label's seconds those of a run without delays are subtracted.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from unittest.mock import patch

from benchmarks.systems.base import row
from benchmarks.systems.waits import Ran, train

SIZES = {"groups": 2, "size": 2, "slots": 4, "steps": 3, "staleness": 1}


@dataclass(frozen=True)
class Delay:
    """One kind."""

    place: str
    """module:Class.method before which it waits."""
    seconds: float
    """Before each call."""
    component: str
    label: str
    named: str
    """How the closing line begins, after "bottleneck: "."""
    skip: int = 0
    """First calls, which are not the run's."""


DELAYS = {
    "boot": Delay("benchmarks.systems.waits:Turns.reset", 0.5, "episodes", "reset", "episodes"),
    "boot, construction": Delay(
        "benchmarks.systems.waits:Turns.__init__", 0.5, "episodes", "reset", "episodes", skip=SIZES["slots"]
    ),
    "tool": Delay("benchmarks.systems.waits:Turns.step", 0.2, "episodes", "env", "episodes"),
    "engine stall": Delay("policy.decoder:Decoder.step", 0.05, "engine", "decode", "engine"),
    "publish, in the engine": Delay("policy.decoder:Decoder.load", 0.6, "engine", "swap", "engine", skip=1),
    "publish, on the way": Delay(
        "rl.parts:EnginePart.publish", 0.6, "learner", "wait_publish", "the way of the weights"
    ),
    "learner": Delay("rl.learner:Learner.step", 0.6, "learner", "train", "learner"),
    "queue": Delay("rl.gate:Gate._wait", 0.2, "episodes", "wait_turn", "places in the engine"),
}


@contextmanager
def injected(delay: Delay, scale: float = 1.0) -> Iterator[list[float]]:
    """While this is open the delay happens; yields the list of how long each really took, seconds."""
    module, _, name = delay.place.partition(":")
    owner, method = name.split(".")
    cls = getattr(import_module(module), owner)
    real, slept, skip = getattr(cls, method), list[float](), [delay.skip]

    @functools.wraps(real)
    def slow(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        if skip[0]:
            skip[0] -= 1
        else:
            time.sleep(delay.seconds * scale)
            slept.append(time.perf_counter() - began)
        return real(*args, **kwargs)

    with patch.object(cls, method, slow):
        yield slept


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a run with a delay said about it."""

    seconds: float
    """Injected."""
    label_seconds: float
    """On the delay's label."""
    named: bool
    """The closing line is right, about the component and its label."""
    ran: Ran


def find(delay: Delay, scale: float = 1.0) -> Found:
    """One run with one kind of delay."""
    with injected(delay, scale) as slept:
        ran = train(**SIZES)
    line = ran.bottleneck
    named = line.startswith(f"bottleneck: {delay.named}") and f"({delay.label} " in line
    return Found(seconds=sum(slept), label_seconds=ran.ledgers[delay.component][delay.label], named=named, ran=ran)


def options(p: argparse.ArgumentParser) -> None:
    """This measurement's own options."""
    p.add_argument("--repeats", type=int, default=3, help="runs of each kind of delay (default: %(default)s)")
    p.add_argument(
        "--scale", type=float, default=2.0, help="how many times its delays are longer (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The measurement: runs without a delay and with each kind, interleaved."""
    plain: list[Ran] = []
    found: dict[str, list[Found]] = {kind: [] for kind in DELAYS}
    for _ in range(args.repeats):
        plain.append(train(**SIZES))
        for kind, delay in DELAYS.items():
            found[kind].append(find(delay, args.scale))
    return {"rows": rows(plain, found)}


def rows(plain: list[Ran], found: dict[str, list[Found]]) -> list[dict[str, Any]]:
    """One row for each kind of delay, and what holds for all."""
    out = []
    for kind, delay in DELAYS.items():
        usual = statistics.median(ran.ledgers[delay.component].get(delay.label, 0.0) for ran in plain)
        shares = [(one.label_seconds - usual) / one.seconds for one in found[kind]]
        seconds = statistics.median(one.seconds for one in found[kind])
        out.append(
            row(
                f"{kind}: share of {seconds:.1f} s on {delay.component}, {delay.label}",
                statistics.median(shares),
                goal=">=0.95",
                n=len(shares),
                spread=[round(min(shares), 3), round(max(shares), 3)],
            )
        )
    every = [one for many in found.values() for one in many]
    missed = sorted({kind for kind, many in found.items() if not all(one.named for one in many)})
    out.append(
        row(
            "closing lines that name the bottleneck",
            sum(one.named for one in every),
            goal=f">={len(every)}",
            n=len(every),
            spread=f"missed: {', '.join(missed)}" if missed else "",
        )
    )
    runs = [*plain, *(one.ran for one in every)]
    out.append(
        row("most of a wall clock without a label", max(r.unexplained for r in runs), goal="<=0.01", n=len(runs))
    )
    return out
