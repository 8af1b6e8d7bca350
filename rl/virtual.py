"""A run on a virtual clock: `rl/loop.py` itself, with parts that only take time.

    Engine    replicas, each behind its `rl.admission.Budget`: prefill and decode at the pace of `Latencies`
    Worker    plays orders by the book: a `Played` episode says how many tokens and seconds each turn takes
    Learner   takes its seconds per token
    Tally     what the loop reports, as numbers

Nothing of what a run decides is here: staleness, admission, groups, filters and batches are the code of a real run
(`rl/loop.py`, `rl/admission.py`, `rl/staleness.py`, `rl/batch.py`), so that a forecast can't keep to other bounds than the
run. A virtual token stands for a run of tokens: its id is their number.

What it does not do: nothing fails, and an engine's decode steps are a stream. A turn under way gets 1 / pace(n) tokens a
second while n turns are decoded; prompts are prefilled one after the other while decoding stands still.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from agents.trajectory import Segment, Trajectory
from rl.admission import Budget
from rl.batch import BatchReport, Row
from rl.clock import Clock, Do
from rl.config import Config
from rl.latencies import Book, Latencies, Played
from rl.ledger import Ledger, merge
from rl.worker import Order


@dataclass(eq=False)
class Asked:
    """A turn that an engine was asked for."""

    episode: str
    context: int
    """Tokens before it."""
    said: int
    done: Callable[[list[int]], None]
    """Told the versions that sampled."""
    versions: list[int] = field(default_factory=list)


class Replica:
    """One engine: a server that swaps weights, prefills, decodes, in this order, one at a time."""

    LABELS = ("idle", "prefill", "decode", "swap")

    def __init__(self, clock: Clock, latencies: Latencies, budget: Budget, most: int) -> None:
        """most: tokens that a turn may grow to."""
        self.clock, self.latencies, self.budget, self.most = clock, latencies, budget, most
        self.version = self.episodes = 0
        self.ledger = Ledger(self.LABELS, clock)
        self._held: dict[str, int] = {}
        self._places: dict[str, Asked] = {}
        self._chores: deque[tuple[float, Do]] = deque()
        self._prompts: deque[Asked] = deque()
        self._running: list[tuple[float, int, Asked]] = []  # by the token, of the stream, that ends it
        self._stream = 0.0  # tokens that a turn would have that always ran
        self._since: float | None = None  # work clock at which this stretch of decoding began
        self._order = count()
        self._alone = False  # a chore or a prefill is under way

    def ask(self, turn: Asked) -> None:
        """An episode wants a turn."""
        most = min(turn.context + self.most, int(min(self.budget.tokens, 1 << 60)))
        self.budget.ask(turn.episode, max(most, turn.context + turn.said))
        self._places[turn.episode] = turn
        self._decide()

    def end(self, episode: str) -> None:
        """An episode is over."""
        self.budget.end(episode)
        self._held.pop(episode, None)
        self._decide()

    def chore(self, seconds: float, do: Do) -> None:
        """Stand still for something."""
        self._chores.append((seconds, do))
        self._next()

    def swap(self, version: int) -> None:
        """Turns under way go on with other weights."""
        self.version = version
        for _, _, turn in self._running:
            turn.versions.append(version)

    @property
    def load(self) -> tuple[int, int]:
        """Turns that wait, and all that were asked for."""
        waiting = self.budget.waiting + len(self._prompts)
        return waiting, waiting + len(self._running)

    def _decide(self) -> None:
        if not self._places:
            return
        turns = self.budget.decide()
        for episode in turns.park:
            self._held[episode] = 0
        self._prompts.extend(self._places.pop(episode) for episode in turns.run)
        if turns.run:
            self._next()

    def _next(self) -> None:
        """Begin what comes next; called whenever that may have changed."""
        if self._alone:
            return
        self._settle()
        if self._chores:
            self._serve("swap", *self._chores.popleft())
        elif self._prompts:
            turn = self._prompts.popleft()
            new = turn.context - self._held.get(turn.episode, 0)
            self._serve("prefill", self.latencies.prefill * new, lambda: self._begin(turn))
        elif self._running:
            self.ledger.switch("decode")
            self._since = began = self.clock.worked
            self.clock.computing += 1
            left = (self._running[0][0] - self._stream) * self._pace
            self.clock.work(max(0.0, left), lambda: self._decoded(began))
        else:
            self.ledger.switch("idle")

    @property
    def _pace(self) -> float:
        return self.latencies.decode + self.latencies.decode_row * len(self._running)

    def _settle(self) -> None:
        """End the stretch of decoding under way."""
        if self._since is not None:
            self._stream += (self.clock.worked - self._since) / self._pace
            self._since = None
            self.clock.computing -= 1

    def _serve(self, label: str, seconds: float, do: Do) -> None:
        def done() -> None:
            self._alone = False
            self.clock.computing -= 1
            do()
            self._next()

        self.ledger.switch(label)
        self._alone = True
        self.clock.computing += 1
        self.clock.work(seconds, done)

    def _begin(self, turn: Asked) -> None:
        turn.versions.append(self.version)
        heapq.heappush(self._running, (self._stream + turn.said, next(self._order), turn))

    def _decoded(self, began: float) -> None:
        if self._since != began:  # something came between, and began another stretch
            return
        self._settle()
        ended = []
        while self._running and self._running[0][0] <= self._stream + 1e-9:
            ended.append(heapq.heappop(self._running)[2])
        for turn in ended:
            self._held[turn.episode] = turn.context + turn.said
            self.budget.done(turn.episode, turn.context + turn.said)
            turn.done(turn.versions)
        self._decide()
        self._next()


class Engine:
    """All replicas behind one handle (`rl.spawn.Handle`). An episode stays where it began: at the one with the fewest."""

    name = "engine"

    def __init__(self, clock: Clock, latencies: Latencies, replicas: Sequence[Replica]) -> None:
        self.clock, self.latencies, self.replicas = clock, latencies, replicas
        self.cancelled: set[str] = set()
        self._home: dict[str, Replica] = {}

    def ask(self, turn: Asked) -> None:
        """See `Replica.ask`."""
        home = self._home.get(turn.episode)
        if home is None:
            home = self._home[turn.episode] = min(self.replicas, key=lambda replica: replica.episodes)
            home.episodes += 1
        home.ask(turn)

    def release(self, episode: str) -> None:
        """See `Replica.end`."""
        if (home := self._home.pop(episode, None)) is not None:
            home.episodes -= 1
            home.end(episode)

    def call(self, method: str, *args: Any) -> Future[Any]:
        """What the loop asks of an engine: publish, score, load, cancel."""
        future: Future[Any] = Future()
        if method == "publish":
            self._publish(args[0], future)
            return future
        if method == "cancel":
            self.cancelled.add(args[0])
        waiting, asked = (sum(numbers) for numbers in zip(*(replica.load for replica in self.replicas), strict=True))
        future.set_result({"score": [[0.0]], "load": waiting / max(1, asked), "cancel": None}[method])
        return future

    def _publish(self, version: int, future: Future[Any]) -> None:
        left = list(self.replicas)

        def swapped(replica: Replica) -> None:
            replica.swap(version)
            left.remove(replica)
            if not left:
                future.set_result(version)

        for replica in self.replicas:
            replica.chore(self.latencies.swap, lambda replica=replica: swapped(replica))  # type: ignore[misc]


class Worker:
    """All rollout workers behind one handle: plays orders from a book."""

    name = "worker"

    def __init__(self, clock: Clock, engine: Engine, book: Book, config: Config) -> None:
        self.clock, self.engine, self.book = clock, engine, book
        self.deadline = config.rollout.deadline
        self.seconds = {"reset": 0.0, "env": 0.0, "wait_policy": 0.0}

    def call(self, method: str, order: Order) -> Future[Trajectory]:
        """`play`; the same order finds the same episode in every simulation."""
        assert method == "play"
        group = self.book[order.index % len(self.book)]
        return _Play(self, order, group[order.sample % len(group)]).future

    def kill(self) -> None:
        """A real worker would die here."""
        raise ValueError(
            f"an episode takes more than rollout.deadline={self.deadline:g} seconds; raise it, or have fewer episodes wait"
        )


class _Play:
    """An episode under way."""

    def __init__(self, worker: Worker, order: Order, played: Played) -> None:
        self.worker, self.clock, self.name, self.played = worker, worker.clock, order.episode, played
        self.future: Future[Trajectory] = Future()
        self.trajectory = Trajectory(task_id=f"{order.index}", sample=order.sample)
        self.lengths: list[int] = []  # of runs of tokens
        self.versions: list[int] = []  # that sampled each; -1: none
        self.at = self.context = 0
        worker.seconds["reset"] += played.boot
        self.clock.wait(played.boot, self.turn)

    def turn(self) -> None:
        """Ask for the next one."""
        if self.at == len(self.played.turns) or self.name in self.worker.engine.cancelled:
            self._end()
            return
        seen, said, _ = self.played.turns[self.at]
        self._note(seen, [-1])
        self.context += seen
        self.asked = self.clock.now
        self.worker.engine.ask(Asked(self.name, self.context, said, self._answered))

    def _answered(self, versions: list[int]) -> None:
        _, said, tool = self.played.turns[self.at]
        self._note(said, versions)
        self.trajectory.turns += 1
        self.at, self.context = self.at + 1, self.context + said
        self.worker.seconds["wait_policy"] += self.clock.now - self.asked
        self.worker.seconds["env"] += tool
        self.clock.wait(tool, self.turn)

    def _note(self, tokens: int, versions: list[int]) -> None:
        self.lengths += [tokens - len(versions) + 1, *[1] * (len(versions) - 1)]
        self.versions += versions

    def _end(self) -> None:
        mask = [int(version >= 0) for version in self.versions]
        runs = Segment(self.lengths, mask, [0.0] * len(mask), self.versions)
        self.trajectory.segments.append(runs)
        self.worker.engine.release(self.name)
        if self.name not in self.worker.engine.cancelled:
            self.trajectory.reward = self.played.reward
            self.trajectory.outcome = "resolved" if self.played.reward > 0 else "unresolved"
            self.trajectory.stop = "submitted"
        self.future.set_result(self.trajectory)


class Learner:
    """One thing after the other: train, publish."""

    name = "learner"
    LABELS = ("idle", "train", "publish")

    def __init__(self, clock: Clock, latencies: Latencies) -> None:
        self.clock, self.latencies = clock, latencies
        self.version = 0
        self.ledger = Ledger(self.LABELS, clock)
        self._calls: deque[tuple[str, float, Any, Future[Any]]] = deque()
        self._busy = False

    def call(self, method: str, *args: Any) -> Future[Any]:
        """What the loop asks of a learner: step, weights, score."""
        future: Future[Any] = Future()
        if method == "step":
            self.version += 1
            rows: Sequence[Row] = args[0]
            seconds = self.latencies.learn * sum(sum(row.token_ids) for row in rows)
            self._calls.append(("train", seconds, {}, future))
        elif method == "weights":
            self._calls.append(("publish", self.latencies.publish, (self.version, {}), future))
        else:
            self._calls.append(("publish", 0.0, [[0.0]], future))
        self._next()
        return future

    def _next(self) -> None:
        if self._busy or not self._calls:
            return
        label, seconds, answer, future = self._calls.popleft()

        def done() -> None:
            self._busy = False
            self.clock.computing -= 1
            self.ledger.switch("idle")
            future.set_result(answer)
            self._next()

        self.ledger.switch(label)
        self._busy = True
        self.clock.computing += 1
        self.clock.work(seconds, done)


class Parts:
    """The parts of a virtual run, as `rl.parts.Parts` names them."""

    def __init__(
        self, config: Config, latencies: Latencies, book: Book, replicas: int, kv_tokens: float, page: int
    ) -> None:
        self.clock = Clock(latencies.cores)
        most = config.policy.max_tokens
        budgets = [Budget(kv_tokens, page=page) for _ in range(replicas)]
        self.engine = Engine(self.clock, latencies, [Replica(self.clock, latencies, b, most) for b in budgets])
        self.learner = Learner(self.clock, latencies)
        self.workers = [Worker(self.clock, self.engine, book, config)]

    def ledgers(self, slots: int) -> dict[str, dict[str, float]]:
        """Seconds by part and label, as a run's record has them."""
        episodes = dict(self.workers[0].seconds)
        episodes["idle"] = max(0.0, slots * self.clock.now - sum(episodes.values()))
        engine = merge(replica.ledger.snapshot() for replica in self.engine.replicas)
        return {"engine": engine, "episodes": episodes, "learner": self.learner.ledger.snapshot()}


class _NoJournal:
    """Keeps nothing: no virtual run is resumed."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


class Tally:
    """What the loop reports, as numbers (in the place of `rl.record.Record`)."""

    vocabulary = 1 << 30

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.journal = _NoJournal()
        self.walls: list[float] = []
        """When each batch was published and proven, seconds."""
        self.reports: list[BatchReport] = []
        self.in_flight: list[int] = []

    def step(self, loop: Any, groups: Any, report: BatchReport, step: Any) -> None:
        """A batch was trained."""
        self.reports.append(report)

    def parity(self, loop: Any, parity: float) -> None:
        """A publish is proven."""
        self.walls.append(self.parts.clock.now)
        self.in_flight.append(loop.admission.in_flight)

    def evaluation(self, evaluation: Any) -> None:
        """Nothing is kept."""

    def view(self, loop: Any) -> None:
        """Nothing is shown."""

    def checkpoint(self, loop: Any) -> None:
        """Takes no time here."""
