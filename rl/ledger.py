"""State clocks: where the seconds of a component went, each second under exactly one label.

What it is: `Ledger`, a clock that is always in one state; `merge`, `busy_share` and `summary` over snapshots, and
`bottleneck`, the line that a run ends with. Labels sum to the wall clock by construction: time is only ever moved from
"now" to the label in force.

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

    def snapshot(self) -> dict[str, float]:
        """Label -> seconds up to now, from any thread. The values sum to the wall clock since the ledger was made."""
        with self._lock:
            self._settle()
            return dict(self._seconds)

    def _settle(self) -> None:
        now = self._clock()
        self._seconds[self._label] += now - self._since
        self._since = now


def merge(snapshots: Iterable[Seconds]) -> dict[str, float]:
    """Sum per label, e.g. over the rollout workers of a run."""
    total: dict[str, float] = {}
    for snapshot in snapshots:
        for label, seconds in snapshot.items():
            total[label] = total.get(label, 0.0) + seconds
    return total


def is_idle(label: str) -> bool:
    """Whether a label means that the component had nothing to do: `idle`, or one that begins with `wait`."""
    return label == "idle" or label.startswith("wait")


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


def bottleneck(components: Mapping[str, Seconds]) -> str:
    """The component with the least idle share, its largest busy label, and how busy the others were, on one line.

    Example: `bottleneck: engine, busy 83% (decode 61%); learner 24%, sandbox 12%`.
    """
    ranked = sorted(components, key=lambda name: -busy_share(components[name]))
    if not ranked or busy_share(components[ranked[0]]) == 0:
        return "bottleneck: none, nothing was busy"
    first, rest = ranked[0], ranked[1:]
    seconds = components[first]
    label = max((label for label in seconds if not is_idle(label)), key=lambda label: seconds[label])
    share = seconds[label] / sum(seconds.values())
    others = ", ".join(f"{name} {busy_share(components[name]):.0%}" for name in rest)
    line = f"bottleneck: {first}, busy {busy_share(seconds):.0%} ({label} {share:.0%})"
    return f"{line}; {others}" if others else line
