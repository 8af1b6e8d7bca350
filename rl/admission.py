"""Admission: which episodes start, which turns run, which groups are trained. Events in, decisions out.

Two state machines, because a run has one loop and may have several engines; each lives where its events happen.

    machine      beside     events                                        decisions
    `Admission`  the loop   issue, queue, ended, retry, trained,          start, cancel (`Closed`), batch,
                            published, measured                           stale; `may_issue`
    `Budget`     an engine  ask, done, end (of an episode's turns)        run and park (`decide`)

Both are functions of their events: no thread, no clock (`now` is an argument), no randomness. A decision that is handed
out counts as carried out. Five limits hold together:

* *Staleness*: no token is trained more than S versions after it was sampled; `rl/staleness.py` has the rule and its proof.
* *Episodes in flight*: those started and not ended, evaluation included. AIMD on measured load L (Chiu & Jain 1989, who
  show that this rule alone of the linear ones converges to efficiency and fairness): once per interval

      L <= load:  limit <- min(limit + 1, max_in_flight)        L > load:  limit <- max(1, floor(factor * limit))

  A lower limit starts no episodes; it ends none.
* *Sandboxes*: an episode has one from its start until `ended`, which is said after its environment was closed.
* *KV*: see `Budget`.
* *Spare*: a group of G may play G + x episodes. The first G that end with a reward make the group, the others are
  cancelled. That favours short episodes, and with them whatever answers briefly: an episode counts more the sooner it
  ends, and a task's long solutions may never be seen. Hence 0 by default; use it only where stragglers are
  infrastructure's.

Episodes wait in one line, first come first served; a retry goes to its head. New groups are issued only when nobody
waits. So an episode is overtaken by retries alone (their number is bounded), and a group that is waited for
(`Staleness.select`) always has its episodes ahead of every newer group's.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from rl.staleness import Staleness

Episode = TypeVar("Episode", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a run may use at a time; by default all that `[rollout]` asks for."""

    sandboxes: int = 0
    """Most episodes with a live sandbox; 0: as many as are in flight. Sandboxes that grade come on top."""
    kv_tokens: int = 0
    """KV budget of the engine, tokens; 0: room for all episodes in flight. With less, whole episodes wait, `rollout.deadline`
    counting on. The torch engine's memory shrinks with it; as that hands out KV by slots of `policy.max_context` tokens, an
    episode waits before its first turn there, and none is parked later."""
    spare: int = 0
    """x: episodes played beyond `rollout.group_size`. Biased towards short episodes, see `rl/admission.py`."""
    load: float = 1.0
    """Largest share of asked turns that may wait for the engine; above it, fewer episodes are in flight. 1: never (no
    AIMD)."""
    interval: float = 5.0
    """Seconds between two changes of the number of episodes in flight."""
    factor: float = 0.5
    """What that number is multiplied by when the load is too high."""

    def __post_init__(self) -> None:
        for name in ("sandboxes", "kv_tokens", "spare"):
            if getattr(self, name) < 0:
                raise ValueError(f"admission.{name}={getattr(self, name)} is negative; give at least 0")
        if not 0 <= self.load <= 1:
            raise ValueError(f"admission.load={self.load} is a share of the turns; give 0 to 1")
        if not 0 < self.factor < 1:
            raise ValueError(
                f"admission.factor={self.factor} lowers no number of episodes; give more than 0, less than 1"
            )
        if not 0 < self.interval < math.inf:
            raise ValueError(f"admission.interval={self.interval} is no time to wait; give seconds above 0")

    @property
    def adaptive(self) -> bool:
        """Whether load is to be measured at all."""
        return self.load < 1


@dataclass(frozen=True, kw_only=True)
class Closed(Generic[Episode]):
    """A group needs no more episodes."""

    drop: str | None
    """Why it can't be trained; None: it is ready."""
    cancel: list[Episode]
    """Its episodes that are still being played, to be ended; they count until `Admission.ended` says that they have."""


@dataclass
class _Open(Generic[Episode]):
    """A group some of whose episodes are still wanted."""

    version: int
    """What the engines held when it was issued."""
    size: int
    """G."""
    missing: dict[Episode, None]
    """Episodes in line or being played; a dict for its order."""
    oldest: int = -1
    """Oldest version of a token so far; -1: none."""
    usable: int = 0


class Admission(Generic[Episode]):
    """The machine beside the loop. Episodes are any hashable names, unique for the run.

    Example (B = 1, two episodes in flight)::

        admission.may_issue()                       → True
        admission.issue("g0", ["a", "b", "c"])
        admission.start()                           → ["a", "b"]
        admission.ended("b", usable=True, oldest=0) → None
        admission.start()                           → ["c"]
        …                                             the last one → Closed(drop=None, cancel=[])
        admission.batch()                           → ["g0"]
        admission.trained(); admission.published(1)
    """

    def __init__(self, staleness: Staleness, limits: Limits, *, max_in_flight: int) -> None:
        if max_in_flight < 1:
            raise ValueError(f"admission.max_in_flight={max_in_flight} must be at least 1")
        self.staleness, self.limits, self.max_in_flight = staleness, limits, max_in_flight
        self.limit = max_in_flight
        """Episodes in flight that AIMD allows now."""
        self.version = self.engine = 0
        self.training = 0
        """Groups of the batch in the learner."""
        self._open: dict[str, _Open[Episode]] = {}
        self._ready: dict[str, int] = {}  # finished group -> its oldest version, in the order of finishing
        self._line: deque[Episode] = deque()
        self._playing: set[Episode] = set()
        self._group: dict[Episode, str] = {}  # of the missing episodes of open groups
        self._adjusted = -math.inf

    @property
    def in_flight(self) -> int:
        """Episodes started and not ended."""
        return len(self._playing)

    @property
    def outstanding(self) -> int:
        """Groups issued and neither trained nor dropped."""
        return len(self._open) + len(self._ready) + self.training

    @property
    def room(self) -> int:
        """How many more episodes may start now; below 0 while a lowered limit is not reached yet."""
        return min(self.limit, self.limits.sandboxes or self.limit) - len(self._playing)

    # ------------------------------------------------------------------ episodes

    def may_issue(self) -> bool:
        """Whether a new group may be issued: nobody is in line, one of its episodes could start, staleness allows it."""
        free = not self._line and self.room > 0
        return free and self.staleness.may_issue(self.engine, self.version, self.outstanding)

    def issue(self, group: str, episodes: Iterable[Episode]) -> None:
        """A group begins; `limits.spare` of its episodes are surplus."""
        missing = dict.fromkeys(episodes)
        assert group not in self._open and group not in self._ready, f"group {group} was issued already"
        assert len(missing) > self.limits.spare, f"group {group} has no episode but spare ones"
        self._open[group] = _Open(self.engine, len(missing) - self.limits.spare, missing)
        self._group |= dict.fromkeys(missing, group)
        self.queue(missing)

    def queue(self, episodes: Iterable[Episode]) -> None:
        """Episodes that are played for no group (evaluation) get in line."""
        self._line.extend(episodes)

    def start(self) -> list[Episode]:
        """Decision: these episodes start now."""
        chosen = [self._line.popleft() for _ in range(min(self.room, len(self._line)))]
        self._playing.update(chosen)
        return chosen

    def retry(self, episode: Episode, again: Episode) -> None:
        """An episode ended for no fault of the policy's and is played again, under the name `again`."""
        self._playing.remove(episode)
        self._line.appendleft(again)
        if (name := self._group.pop(episode, None)) is not None:
            missing = self._open[name].missing
            del missing[episode]
            missing[again], self._group[again] = None, name

    def ended(self, episode: Episode, *, usable: bool = False, oldest: int = -1) -> Closed[Episode] | None:
        """An episode ended and its sandbox is gone. Returns what that means for its group, if it completes it.

        Args:
            usable: it has a reward and can be trained on. Fewer than two such make no group: dropped as "infra".
            oldest: oldest version of its tokens; -1 where none was sampled.
        """
        self._playing.remove(episode)
        name = self._group.pop(episode, None)
        if name is None:  # of no group, or surplus
            return None
        group = self._open[name]
        del group.missing[episode]
        group.usable += usable
        group.oldest = min((v for v in (group.oldest, oldest) if v >= 0), default=-1)
        return self._close(name, group) if group.usable >= group.size or not group.missing else None

    def _close(self, name: str, group: _Open[Episode]) -> Closed[Episode]:
        del self._open[name]
        for episode in group.missing:
            del self._group[episode]
        self._line = deque(e for e in self._line if e not in group.missing)
        drop = "infra" if group.usable < 2 else None
        if drop is None:
            self._ready[name] = group.oldest
        return Closed(drop=drop, cancel=[e for e in group.missing if e in self._playing])

    # ------------------------------------------------------------------ batches and versions

    def stale(self) -> list[str]:
        """Decision: these finished groups are dropped, too old to be trained."""
        late = [n for n, oldest in self._ready.items() if self.staleness.accept(oldest, self.version) != "train"]
        for name in late:
            del self._ready[name]
        return late

    def refuse(self, group: str) -> None:
        """A finished group is not to be trained."""
        del self._ready[group]

    def batch(self) -> list[str]:
        """Decision: the learner, idle, trains these groups now, or waits (none). Ask `stale` first."""
        assert not self.training, "a batch is being trained"
        running = {name: group.version for name, group in self._open.items()}
        chosen = self.staleness.select(self._ready, running, self.version)
        for name in chosen:
            del self._ready[name]
        self.training = len(chosen)
        return chosen

    def trained(self) -> None:
        """The learner took the batch: its version rises."""
        self.training, self.version = 0, self.version + 1

    def published(self, version: int) -> None:
        """Every engine holds `version` or a newer one."""
        assert version >= self.engine, f"version {version} is older than the engines' {self.engine}"
        self.engine = version

    def resume(self, version: int, ready: Mapping[str, int]) -> None:
        """The run goes on at `version` with these finished groups (and their oldest versions)."""
        self.version = self.engine = version
        self._ready = dict(ready)

    # ------------------------------------------------------------------ load

    def measured(self, load: float, now: float) -> None:
        """`load`: share of asked turns that wait for an engine, 0 to 1. `now`: seconds, never falling."""
        if not self.limits.adaptive or now - self._adjusted < self.limits.interval:
            return
        self._adjusted = now
        if load > self.limits.load:
            self.limit = max(1, math.floor(self.limit * self.limits.factor))
        else:
            self.limit = min(self.limit + 1, self.max_in_flight)


class Turns(NamedTuple):
    """What an engine does next: first park, then run."""

    park: list[str]
    """Episodes whose KV is dropped. They go on as their turn in line comes."""
    run: list[str]
    """Episodes whose turn is sampled now."""


@dataclass
class _Held:
    """An episode that an engine knows, from its first `ask` to its `end`."""

    tokens: int = 0
    """KV it holds; while its turn runs, the most that it can grow to."""
    asked: int | None = None
    """It waits for a turn, which may grow to so many tokens."""
    running: bool = False


@dataclass
class Budget:
    """The machine beside an engine: which turns run, so that all KV ever held fits into `tokens`.

    An episode keeps its KV between turns. Its age is the order of the first `ask`, and the older one goes first:

    * A turn runs when the most that it can grow to is free, and no older one waits. It is never interrupted.
    * Where that is not free, episodes younger than it that don't run are parked, the youngest first, and only if that
      makes room enough. Older ones are never parked for it.

    So sum(tokens of all) <= `tokens` at any time, whatever the turns really sample. No starvation: while an episode waits,
    no younger one is given a turn; it waits for turns under way and for the ends of older episodes. No deadlock: the
    oldest of all waits for turns under way only, as each turn alone fits. Unused is at most what the first in line needs.
    """

    tokens: float
    """KV that the engine can hold."""
    page: int = 1
    """KV is handed out in pieces of so many tokens: blocks, or the torch engine's slots."""
    _held: dict[str, _Held] = field(default_factory=dict)  # oldest first

    @property
    def used(self) -> int:
        """Tokens held or promised."""
        return sum(held.tokens for held in self._held.values())

    @property
    def waiting(self) -> int:
        """Turns asked for that don't run."""
        return sum(held.asked is not None for held in self._held.values())

    def ask(self, episode: str, most: int) -> None:
        """An episode wants a turn at whose end it holds at most `most` tokens. ValueError if it can never have it."""
        pages = -(-most // self.page) * self.page
        if pages > self.tokens:
            raise ValueError(
                f"episode {episode} may grow to {pages} tokens, the KV budget is {self.tokens:g}; raise admission.kv_tokens or "
                "lower policy.max_context"
            )
        held = self._held.setdefault(episode, _Held())
        if held.running or held.asked is not None:
            raise ValueError(f"episode {episode!r} is already generating; make its calls one after the other")
        held.asked = pages

    def done(self, episode: str, tokens: int) -> None:
        """The episode's turn is over, and it holds `tokens`. Nothing happens for one that has ended meanwhile."""
        held = self._held.get(episode)
        if held is not None and held.running:
            pages = -(-tokens // self.page) * self.page
            assert pages <= held.tokens, f"episode {episode} holds {pages} tokens and was promised {held.tokens}"
            held.tokens, held.running = pages, False

    def end(self, episode: str) -> None:
        """The episode is over; its KV is gone. Unknown ones are fine."""
        self._held.pop(episode, None)

    def decide(self) -> Turns:
        """Decision: what is parked and what runs now. Ask after every event."""
        turns, names = Turns([], []), list(self._held)
        free = self.tokens if self.tokens == math.inf else self.tokens - self.used
        for at, name in enumerate(names):
            held = self._held[name]
            if held.asked is None:
                continue
            need = held.asked - held.tokens
            behind = names[at + 1 :] if need > free else []
            younger = [n for n in reversed(behind) if self._held[n].tokens and not self._held[n].running]
            if need > free + sum(self._held[n].tokens for n in younger):
                break  # and nobody behind it goes first
            for other in younger:
                if need <= free:
                    break
                free, self._held[other].tokens = free + self._held[other].tokens, 0
                turns.park.append(other)
            free -= need
            held.tokens, held.asked, held.running = held.asked, None, True
            turns.run.append(name)
        return turns
