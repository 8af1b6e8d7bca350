"""State clocks: where the seconds of a component went, each second under exactly one label.

What it is: `Ledger`, a clock that is always in one state; `Area`, a number summed over time; `Account`, what the ledgers of one component have said since the
run began; `merge`, `busy_share` and `summary` over snapshots, and `bottleneck`, the line that a run ends with. A ledger's
labels sum to its own time by construction; that those of a component sum to the run's wall clock is measured
(`Account.unexplained`).

What it does not do: it measures no CPU seconds, writes no file and knows no component. One ledger serves one thread of
control (an engine's loop, an episode, the learner); components with many threads hold many ledgers and merge their
snapshots.

Example::

    ledger = Ledger(["idle", "decode", "publish"])
    with ledger.spend("decode"):
        ...                                  # an inner `spend` takes over and gives back
    ledger.snapshot()                        # {"idle": 0.2, "decode": 3.1, "publish": 0.0}
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from envs.errors import nearest

Seconds = Mapping[str, float]
"""Label -> seconds."""


class Ledger:
    """A clock that attributes every second since it was made to one of its labels."""

    def __init__(self, labels: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        """`labels[0]` is the state at the start. `clock` gives seconds and never goes back."""
        assert labels and len(set(labels)) == len(labels), f"labels {list(labels)} are empty or not distinct"
        self._clock = clock
        self._lock = threading.Lock()
        self._seconds = dict.fromkeys(labels, 0.0)
        self._label = labels[0]
        self._since = clock()

    def switch(self, label: str) -> str:
        """From now on time goes to `label`; returns the label until now."""
        assert label in self._seconds, f"label {label!r} is unknown.{nearest(label, self._seconds)}"
        with self._lock:
            self._settle()
            before, self._label = self._label, label
        return before

    @contextmanager
    def spend(self, label: str) -> Iterator[None]:
        """Attribute the block to `label`, then go back to the label before it (also after an exception)."""
        before = self.switch(label)
        try:
            yield
        finally:
            self.switch(before)

    def move(self, old: str, new: str, seconds: float) -> None:
        """Of what `old` has, up to `seconds` belong to `new`, as became known afterwards."""
        with self._lock:
            self._settle()
            self._seconds = relabel(self._seconds, old, new, seconds)

    def snapshot(self) -> dict[str, float]:
        """Label -> seconds up to now, from any thread. The values sum to the wall clock since the ledger was made."""
        with self._lock:
            self._settle()
            return dict(self._seconds)

    def _settle(self) -> None:
        now = self._clock()
        self._seconds[self._label] += now - self._since
        self._since = now


class Area:
    """The integral of a number over time, e.g. seconds of empty slots."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._sum, self._height, self._since = 0.0, 0.0, clock()

    def set(self, height: float) -> None:
        """The number from now on."""
        now = self._clock()
        self._sum += self._height * (now - self._since)
        self._height, self._since = height, now

    def read(self) -> float:
        """The integral up to now."""
        return self._sum + self._height * (self._clock() - self._since)


class Account:
    """The seconds of one component, from what its parts tell now and then. Parts begin late, and may die and be replaced."""

    def __init__(self, began: float, clocks: int = 1) -> None:
        """began: start of the run on `time.monotonic`. clocks: ledgers whose snapshots each part merges."""
        self.began, self.clocks = began, clocks
        self._told: dict[str, tuple[int, float, Seconds]] = {}
        self._past: dict[str, float] = {}

    def tell(self, part: str, seconds: Seconds, now: float, process: int = 0) -> None:
        """The snapshot of a part, which came at `now`.

        Of its first one the rest since the run began is `wait_start`. Another `process` is a new part in its place: the
        seconds of the old one stay, and what passed since its last snapshot without a clock is `lost`.
        """
        known, when, before = self._told.get(part, (process, self.began, {}))
        if not before or process != known:
            gap = max(0.0, self.clocks * (now - when) - sum(seconds.values()))
            self._past = merge([self._past, before, {"lost" if before else "wait_start": gap}])
        self._told[part] = (process, now, seconds)

    def seconds(self) -> dict[str, float]:
        """Label -> seconds, all parts and clocks together."""
        return merge([self._past, *(seconds for _, _, seconds in self._told.values())])

    def unexplained(self) -> float:
        """Share of the wall clock, up to each part's last snapshot, by which the labels miss it in either direction."""
        wall = self.clocks * sum(when - self.began for _, when, _ in self._told.values())
        return abs(1 - sum(self.seconds().values()) / wall) if wall else 0.0


def relabel(seconds: Seconds, old: str, new: str, amount: float) -> dict[str, float]:
    """Up to `amount` seconds of `old` are `new` instead; the sum stays."""
    had = seconds.get(old, 0.0)
    moved = max(0.0, min(amount, had))
    return {**seconds, old: had - moved, new: seconds.get(new, 0.0) + moved}


def merge(snapshots: Iterable[Seconds]) -> dict[str, float]:
    """Sum per label, e.g. over the rollout workers of a run."""
    total: dict[str, float] = {}
    for snapshot in snapshots:
        for label, seconds in snapshot.items():
            total[label] = total.get(label, 0.0) + seconds
    return total


def is_idle(label: str) -> bool:
    """Whether a label means that the component did nothing: `idle`, `lost`, or one that begins with `wait`."""
    return label in ("idle", "lost") or label.startswith("wait")


def busy_share(seconds: Seconds) -> float:
    """Share of the time (0 to 1) that isn't idle; 0 where there is no time."""
    total = sum(seconds.values())
    return sum(s for label, s in seconds.items() if not is_idle(label)) / total if total > 0 else 0.0


def summary(components: Mapping[str, Seconds]) -> str:
    """One line per component: its seconds, then its labels by size with their share."""
    lines, width = [], max((len(name) for name in components), default=0)
    for name, seconds in components.items():
        total = sum(seconds.values())
        ordered = sorted(seconds.items(), key=lambda item: -item[1])
        parts = [f"{label} {s / total:.0%}" for label, s in ordered if s > 0] if total > 0 else ["nothing"]
        lines.append(f"{name:<{width}} {total:9.1f} s  {', '.join(parts)}")
    return "\n".join(lines)


LIMITS = {
    "wait_turn": "places in the engine",
    "wait_publish": "the way of the weights",
    "wait_staleness": "the staleness bound",
}
"""Waits that no component's work explains, and what they are for."""


def bottleneck(components: Mapping[str, Seconds]) -> str:
    """What held the run back, on one line, and how busy the components were.

    That is the busiest component, with its largest busy label, unless a wait of `LIMITS` is larger, counting of the wait
    only the time in which the component was not busy: who waits while another works at its limit waits for that one. Waits
    are weighed in the order of `LIMITS`, each against what was found so far: who waits for weights waits for a publish.

    Examples: `bottleneck: engine, busy 83% (decode 61%); learner 24%, episodes 12%` and
    `bottleneck: places in the engine, awaited 75% of the time (wait_turn of episodes); episodes 25%, engine 20%`.
    """
    busy = {name: busy_share(seconds) for name, seconds in components.items()}
    ranked = sorted(busy, key=lambda name: -busy[name])
    most, line = 0.0, "bottleneck: none, nothing was busy"
    if ranked and busy[ranked[0]] > 0:
        first, seconds = ranked[0], components[ranked[0]]
        label = max((label for label in seconds if not is_idle(label)), key=lambda label: seconds[label])
        most, ranked = busy[first], ranked[1:]
        line = f"bottleneck: {first}, busy {most:.0%} ({label} {_share(seconds, label):.0%})"
    for label, what in LIMITS.items():
        for name, seconds in components.items():
            if (wait := _share(seconds, label)) * (1 - most) > most:
                most, ranked = wait, sorted(busy, key=lambda name: -busy[name])
                line = f"bottleneck: {what}, awaited {wait:.0%} of the time ({label} of {name})"
    others = ", ".join(f"{name} {busy[name]:.0%}" for name in ranked) if most else ""
    return f"{line}; {others}" if others else line


def _share(seconds: Seconds, label: str) -> float:
    total = sum(seconds.values())
    return seconds.get(label, 0.0) / total if total > 0 else 0.0
