"""Virtual time: a clock that jumps from event to event, and an inbox that makes it do so."""

from __future__ import annotations

import heapq
import math
import queue
from collections.abc import Callable
from itertools import count
from typing import Any

Do = Callable[[], None]


class Clock:
    """Virtual seconds. `wait` is for what sleeps; `work` for what computes, slower while more compute than `cores` allow."""

    def __init__(self, cores: float = math.inf) -> None:
        self.now = self.worked = 0.0
        """Seconds passed, and those of a part that computed all the while."""
        self.computing = 0
        self._cores = cores
        self._waits: list[tuple[float, int, Do]] = []
        self._works: list[tuple[float, int, Do]] = []
        self._order = count()

    def __call__(self) -> float:
        """Now, for whom a clock is a function."""
        return self.now

    def wait(self, seconds: float, do: Do) -> None:
        """Do something later."""
        heapq.heappush(self._waits, (self.now + seconds, next(self._order), do))

    def work(self, seconds: float, do: Do) -> None:
        """Do something when so much work is done; the caller counts itself in `computing` meanwhile."""
        heapq.heappush(self._works, (self.worked + seconds, next(self._order), do))

    def advance(self, limit: float = math.inf) -> bool:
        """Jump to the next event and let it happen; to `limit` where there is none before, and say False."""
        speed = min(1.0, self._cores / self.computing) if self.computing else 1.0
        wait = self._waits[0][0] if self._waits else math.inf
        work = self.now + (self._works[0][0] - self.worked) / speed if self._works else math.inf
        at = min(wait, work)
        if at > limit or at == math.inf:
            at = self.now if limit == math.inf else limit
            self.worked, self.now = self.worked + (at - self.now) * speed, at
            return False
        event = heapq.heappop(self._waits if wait <= work else self._works)
        self.worked = self.worked + (at - self.now) * speed if wait <= work else event[0]
        self.now = at
        event[2]()
        return True

    @property
    def still(self) -> bool:
        """Nothing will ever happen by itself."""
        return not self._waits and not self._works


class Inbox(queue.SimpleQueue[Any]):
    """The loop's inbox: who waits for it makes time pass."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """The next event; `queue.Empty` where none comes in time. Asserts that something is on its way: a loop that needs a
        timeout to go on stands still in a real run."""
        limit = math.inf if timeout is None else self.clock.now + timeout
        while self.empty():
            assert not self.clock.still, "the loop waits, and nothing is on its way"
            if not self.clock.advance(limit):
                raise queue.Empty
        return super().get(block=False)
