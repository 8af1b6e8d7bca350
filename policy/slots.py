"""Which episode's KV lies in which slot of the engine's cache, and what of it a new prompt can use.

Bookkeeping only: it holds token ids, never tensors, and is called by the engine's thread alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

R = TypeVar("R")

SHARED = 8
"""Shortest prefix, in tokens, that is copied from another episode's slot instead of being prefilled."""


@dataclass(eq=False)
class Slot(Generic[R]):
    """One episode's place in the KV cache; R is whatever runs in it."""

    index: int
    ids: list[int] = field(default_factory=list)
    """The tokens whose KV lies in the cache, in order, recorded as they are fed."""
    episode: str | None = None
    request: R | None = None
    """What runs; None where the episode is idle."""
    pending: int = 0
    """The token to feed next."""
    fresh: bool = True
    """All KV was made by the current weights, so other episodes may copy it."""
    used: int = 0
    """When it last went idle, in calls of `Slots.rest`."""

    def keep(self, ids: list[int]) -> None:
        """Make `ids`, a prefix of what is held or copied, all that is held."""
        self.ids = ids
        self.fresh = self.fresh or not ids


class Slots(Generic[R]):
    """All slots of an engine."""

    def __init__(self, count: int) -> None:
        self.all: list[Slot[R]] = [Slot(index) for index in range(count)]
        self.home: dict[str, Slot[R]] = {}
        """The slot of each episode that has one."""
        self.evictions = 0
        self._tick = 0

    def claim(self, episode: str) -> Slot[R] | None:
        """The episode's slot, a free one, or the least recently used idle one; None where all are running."""
        slot = self.home.get(episode)
        if slot is None:
            idle = [s for s in self.all if s.request is None]
            if not idle:
                return None
            slot = next((s for s in idle if s.episode is None), None) or min(idle, key=lambda s: s.used)
            if slot.episode is not None:
                self.free(slot)
                self.evictions += 1
            slot.episode = episode
            self.home[episode] = slot
        return slot

    def rest(self, slot: Slot[R]) -> None:
        """What ran in the slot ended; the episode keeps it until others need it."""
        self._tick += 1
        slot.request, slot.used = None, self._tick

    def free(self, slot: Slot[R]) -> None:
        """Forget the episode and its KV."""
        if slot.episode is not None:
            del self.home[slot.episode]
        slot.episode = None
        slot.keep([])

    def donor(self, ids: list[int], most: int) -> tuple[Slot[R], int] | None:
        """The slot whose fresh KV shares the longest prefix with `ids`, and its length (at most `most`)."""
        best, longest = None, SHARED - 1
        for slot in self.all:
            if slot.fresh and (length := common(slot.ids, ids, most)) > longest:
                best, longest = slot, length
        return None if best is None else (best, longest)


def common(held: Sequence[int], ids: Sequence[int], most: int) -> int:
    """Length of the common prefix of two lists, at most `most`; by halving, as comparing slices is fast."""
    low, high = 0, min(len(held), most)
    if held[:high] == ids[:high]:
        return high
    while high - low > 1:  # the first `low` tokens agree, the first `high` don't
        middle = (low + high) // 2
        if held[low:middle] == ids[low:middle]:
            low = middle
        else:
            high = middle
    return low
