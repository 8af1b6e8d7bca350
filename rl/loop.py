"""The loop. Four stages that never wait for one another except where a bound says so::

              orders               trajectories             groups                rows
      feed ───────────► roll out ───────────────► batch ───────────────► learn ───────────► publish
       ▲                                                                                       │
       └────────────────────────────── version + 1 ◄───────────────────────────────────────────┘

    stage      consumes        produces        waits for                                unblocked by
    feed       the curriculum  orders          a free episode slot; the staleness       an episode's end;
                                               bound (`Admission.may_issue`)            a publish
    roll out   orders          trajectories    the engine, the sandbox (`worker.py`)    their answers
    batch      trajectories    groups, rows    G trajectories of a group;               an episode's end
                                               `groups_per_step` finished groups
    learn      rows            weights         one batch; the parity check of the       the batch; the engine's scores
                                               last publish

One thread runs this file and never blocks on a part: every call of a part is a future whose end is an event in `inbox`.
Weights are swapped in the engine between decode steps while episodes go on; an evaluation is just more orders.
"""

from __future__ import annotations

import math
import queue
import random
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from agents.trajectory import Group, Trajectory
from envs.errors import InfraError
from rl.admission import Admission, Closed
from rl.batch import BatchReport, rows_of
from rl.config import Config
from rl.curriculum import Exhausted, Pick, curriculum
from rl.ledger import Area, Ledger
from rl.parts import Parts
from rl.record import Record
from rl.spawn import Handle, PartGone
from rl.staleness import Staleness
from rl.worker import Order

LOST_ROUNDS = 2
"""So many times the episodes in flight may be lost to the infrastructure in a row; then the run stops."""

Event = tuple[Callable[..., None], Any, Future[Any]]
"""What handles the end of a call, what else it is told, and the call."""

Scores = Sequence[Sequence[float]]
"""Log-probs of each token of some sequences."""


def parity_of(engine: Scores, learner: Scores, version: int, limit: float = 1e-4) -> float:
    """Largest difference, nats. `InfraError` above `limit`, or where one is no number: nothing after it could be trusted.

    engine: scores of each replica, one behind the other.
    """
    expected = [*learner] * (len(engine) // max(1, len(learner)))
    gaps = [
        abs(a - b) for mine, theirs in zip(engine, expected, strict=True) for a, b in zip(mine, theirs, strict=True)
    ]
    if not all(gap <= limit for gap in gaps):
        worst = math.nan if any(map(math.isnan, gaps)) else max(gaps)
        raise InfraError(
            f"engine and learner differ by {worst:.2e} nats under version {version} (allowed {limit:g}); resume from the last checkpoint"
        )
    return max(gaps)


@dataclass
class _Evaluation:
    """One evaluation of one split."""

    step: int
    split: str
    """With several sources of tasks: source.split."""
    missing: int
    done: list[Trajectory] = field(default_factory=list)


class Loop:
    """One run, from its first order to its last checkpoint."""

    def __init__(
        self,
        config: Config,
        parts: Parts,
        record: Record,
        *,
        clock: Callable[[], float] = time.monotonic,
        inbox: queue.SimpleQueue[Event] | None = None,
    ) -> None:
        """`clock` gives seconds; `inbox` is where ends of calls are put, and where the loop waits. `rl/virtual.py` replaces both."""
        self.config, self.parts, self.record, self.clock = config, parts, record, clock
        self.algorithm = config.learn.row()
        bound = Staleness(
            groups_per_batch=config.learn.groups_per_step,
            max_staleness=self.algorithm.max_staleness,
            policy=config.learn.stale,
        )
        self.admission = Admission[Order](bound, config.admission, max_in_flight=config.rollout.in_flight)
        self.curriculum = curriculum(config)
        self.step = self.version = 0
        self.inbox = inbox or queue.SimpleQueue[Event]()
        self.open: dict[str, Group] = {}
        self.ready: dict[str, Group] = {}
        self.reissue: deque[Pick] = deque()
        self.evaluations: dict[str, _Evaluation] = {}
        self.infra = self.dropped = 0
        self.lost = 0  # episodes in a row
        self.due: dict[Future[Any], tuple[float, Handle | None]] = {}  # oldest first; the worker, of an episode
        self.load = [0] * len(parts.workers)
        self.measured = -math.inf
        self.learning = False
        self.evaluated: set[int] = set()
        self.probes: list[list[int]] = []
        self.deadline = config.rollout.deadline if config.rollout.spawn == "ray" else math.inf
        self.ledger = Ledger(("work", "wait", "checkpoint"), clock)  # of the thread that runs this
        # Of the learn stage: for a batch, of it, until its weights are proven.
        self.stage = Ledger(("wait", "train", "publish"), clock)
        self.vacant = Area(clock)  # episode slots that the staleness bound keeps empty

    def resume(self, step: int) -> None:
        """Go on after `step`: finished groups are used, unfinished ones are played again under their old names."""
        journal = self.record.journal
        self.step = self.version = step
        journal.resume(step)
        self.ready = {e.id: journal.load(e.id) for e in journal.entries("done")}
        self.admission.resume(step, {name: group.oldest_version for name, group in self.ready.items()})
        self.curriculum.resume(journal.entries())
        self.reissue = deque(self.curriculum.picks[e.id] for e in journal.entries("pending"))
        self.evaluated = self.record.evaluated()
        self.infra, self.dropped = (int(self.record.before.get(k, 0)) for k in ("infra", "dropped_groups"))

    def run(self) -> None:
        """Train to `config.steps`. Raises what a part or the parity check raised; `record` can be resumed from."""
        self.evaluate()
        while self.step < self.config.steps or self.learning or self.evaluations:
            self.learn()
            self.feed()  # behind `learn`: what is dropped as stale makes room
            self.expire()
            self.measure()
            self._handle()
        self.record.checkpoint(self)

    def settle(self, seconds: float = 60.0) -> bool:
        """Finish the update that is under way, so that a checkpoint can be written; False where it does not end in time."""
        limit = time.monotonic() + seconds
        while self.learning and time.monotonic() < limit:
            self._handle()
        return not self.learning

    def _handle(self) -> None:
        try:
            with self.ledger.spend("wait"):
                handler, context, future = self.inbox.get(timeout=1.0)
        except queue.Empty:
            self.record.view(self)
            return
        self.due.pop(future, None)
        handler(context, future)

    # ------------------------------------------------------------------ feed and roll out

    def feed(self) -> None:
        """Start all episodes that may: those in line first (retries, evaluation, open groups), then those of new groups."""
        while True:
            for order in self.admission.start():
                self._send(order)
            if not self._open_group():
                break
        self.vacant.set(self._vacant())

    def _vacant(self) -> int:
        needed = (self.config.steps - self.step) * self.config.learn.groups_per_step
        wanted = self.admission.outstanding < needed and not self.admission.may_issue()
        return max(0, self.admission.room) if wanted else 0

    def _open_group(self) -> bool:
        """Issue a new group if training needs one and admission allows it."""
        needed = (self.config.steps - self.step) * self.config.learn.groups_per_step
        if self.admission.outstanding >= needed or not self.admission.may_issue():
            return False
        if self.reissue:
            self.issue(self.reissue.popleft())
            return True
        pick = self.curriculum.next(self.step)
        if pick is None:  # what is under way may still make a batch
            batch = len(self.ready) >= self.config.learn.groups_per_step
            if not (batch or self.open or self.learning or self.evaluations):
                raise Exhausted(self.curriculum.none_left(self.step))
            return False
        split = self.config.sources[pick.source].split
        self.record.journal.issue(pick.group, pick.index, f"{split}/{pick.index}", pick.source, pick.stage)
        self.issue(pick)
        return True

    def issue(self, pick: Pick) -> None:
        """Note the start of a group in the journal and put its orders in line."""
        self.record.journal.start(pick.group, self.version)
        self.open[pick.group] = Group(pick.group, str(pick.index))
        staged = self.config.staged[pick.stage]
        size = staged.rollout.group_size + self.config.admission.spare
        split, temperature = staged.sources[pick.source].split, staged.policy.temperature
        self.admission.issue(pick.group, self._orders(pick, split, size, temperature))

    def _orders(self, pick: Pick, split: str, size: int, temperature: float) -> Iterator[Order]:
        """One order for each sample. The seed is that of the sample, not of the try: what is played again after a failure or
        a kill is the same draw, or long episodes, which are hit most, would be redrawn and become rare."""
        for sample in range(size):
            seed = zlib.crc32(f"{self.config.seed}/{pick.group}/{pick.index}/{sample}".encode()) & 0x7FFFFFFF
            yield Order(**vars(pick), split=split, sample=sample, temperature=temperature, seed=seed)

    def _send(self, order: Order) -> None:
        at = min(range(len(self.load)), key=self.load.__getitem__)
        worker = self.parts.workers[at]
        self.load[at] += 1
        self._after(worker.call("play", order), self.played, (order, at, worker), worker)

    def expire(self) -> None:
        """Kill a worker whose oldest episode is past its deadline: it hangs. What it played comes back to `played` as lost.
        `PartGone` where it is the engine or the learner."""
        if not self.due:
            return
        future, (deadline, worker) = next(iter(self.due.items()))
        if deadline >= self.clock():
            return
        if worker is None:
            raise PartGone(
                f"engine or learner gave no answer within rollout.deadline={self.deadline:g} seconds; raise it where they need longer"
            )
        del self.due[future]
        worker.kill()

    def _cancel(self, order: Order) -> None:
        self.parts.engine.call("cancel", order.episode)

    def measure(self) -> None:
        """Ask for the engine's load once per interval, where the number of episodes in flight depends on it."""
        now, limits = self.clock(), self.config.admission
        if limits.adaptive and now - self.measured >= limits.interval:
            self.measured = now
            self._after(
                self.parts.engine.call("load"), lambda at, load: self.admission.measured(load.result(), at), now
            )

    def _after(
        self, future: Future[Any], handler: Callable[..., None], context: Any = None, worker: Handle | None = None
    ) -> None:
        self.due[future] = (self.clock() + self.deadline, worker)
        future.add_done_callback(lambda done: self.inbox.put((handler, context, done)))

    # ------------------------------------------------------------------ batch

    def played(self, context: tuple[Order, int, Any], future: Future[Trajectory]) -> None:
        """An episode ended: retry it if the infrastructure failed, else put it where it belongs. Surplus belongs nowhere."""
        order, at, worker = context
        self.load[at] -= 1
        try:
            trajectory = future.result()
        except InfraError as error:
            trajectory = Trajectory(task_id=str(order.index), sample=order.sample, info={"why": str(error)})
            self.parts.replace(at, worker)
            self._cancel(order)  # the engine still knows it
        if order.group not in self.open and order.group not in self.evaluations:
            self.admission.ended(order)
            return
        self.lost = self.lost + 1 if trajectory.reward is None else 0
        if trajectory.reward is None:
            self.infra += 1
            self._after(self.parts.engine.call("check"), self.checked)
            if self.lost > LOST_ROUNDS * self.config.rollout.in_flight + 16:
                raise InfraError(
                    f"{self.lost} episodes in a row were lost to the infrastructure, the last one so: {trajectory.info.get('why', 'no reason given')}"
                )
            if order.attempt < self.config.rollout.retries:
                self.admission.retry(order, replace(order, attempt=order.attempt + 1))
                return
        closed = self.admission.ended(order, usable=trajectory.trainable, oldest=trajectory.oldest_version)
        if order.group in self.evaluations:
            self._evaluated(order.group, trajectory)
            return
        self.open[order.group].trajectories.append(trajectory)
        if closed is not None:
            self._close(self.open.pop(order.group), closed)

    def checked(self, _: None, future: Future[None]) -> None:
        """An episode was lost. Was it the engine? Then the run ends here, before all others are lost, too."""
        future.result()

    def _close(self, group: Group, closed: Closed[Order]) -> None:
        for order in closed.cancel:
            self._cancel(order)
        group.trajectories.sort(key=lambda t: t.sample)
        group.task_id = group.trajectories[0].task_id
        if closed.drop is not None:
            self._drop(group.id, closed.drop)
        elif self.curriculum.observe(group.id, group.solved, group.graded):
            self.record.journal.finish(group)
            self.ready[group.id] = group
        else:
            self.admission.refuse(group.id)
            self.dropped += 1
            self.record.journal.reject(group, "window")

    def _drop(self, name: str, reason: str) -> None:
        self.dropped += 1
        self.record.journal.drop(name, reason)

    # ------------------------------------------------------------------ learn and publish

    def learn(self) -> None:
        """Hand the learner a batch, if it is idle, the last publish is proven, and enough groups are ready."""
        if self.learning or self.step >= self.config.steps or (self.config.deterministic and self.evaluations):
            return
        for name in self.admission.stale():
            del self.ready[name]
            self._drop(name, "stale")
        chosen = self.admission.batch()
        if not chosen:
            return
        groups = [self.ready.pop(name) for name in list(self.ready) if name in chosen]
        shuffled = random.Random(f"{self.config.seed}/{self.step}") if self.config.learn.control == "shuffle" else None
        rows, report = rows_of(
            groups, self.algorithm, self.version, vocabulary=self.record.vocabulary, shuffled=shuffled
        )
        self.probes = self.probes or [t.segments[0].token_ids for g in groups[:4] for t in g.trajectories[:1]]
        self.learning = True
        self.stage.switch("train")
        learner = self.parts.learner
        self._after(learner.call("step", rows), self.trained, (groups, report))
        weights, scores = learner.call("weights"), learner.call("score", self.probes)
        self._after(weights, self.publish, scores)

    def trained(self, context: tuple[list[Group], BatchReport], future: Future[dict[str, Any]]) -> None:
        """The learner took the batch: the journal says so before anything else does."""
        groups, report = context
        step = future.result()
        self.stage.switch("publish")
        self.admission.trained()
        self.step += 1
        self.record.journal.train([group.id for group in groups], self.step)
        self.record.step(self, groups, report, step)

    def publish(self, scores: Future[list[list[float]]], future: Future[tuple[int, Any]]) -> None:
        """Swap the new weights into the engine while it samples."""
        version, weights = future.result()
        self._after(self.parts.engine.call("publish", version, weights), self.published, (version, scores))

    def published(self, context: tuple[int, Future[list[list[float]]]], future: Future[int]) -> None:
        """The engine samples from the new weights: let it score the probes."""
        version, scores = context
        self.version = future.result()
        self.admission.published(self.version)
        self._after(self.parts.engine.call("score", self.probes), self.compare, (version, scores))

    def compare(self, context: tuple[int, Future[list[list[float]]]], future: Future[list[list[float]]]) -> None:
        """Engine and learner must agree on the probes, or the run stops."""
        version, scores = context
        parity = parity_of(future.result(), scores.result(300), version, self.config.policy.parity)
        self.learning = False
        self.stage.switch("wait")
        self.record.parity(self, parity)
        self.evaluate()
        if self.step < self.config.steps and self.step % self.config.checkpoint_every == 0:
            self.record.checkpoint(self)

    # ------------------------------------------------------------------ evaluation

    def evaluate(self) -> None:
        """Where an evaluation is due, queue one episode of each held-out task; training goes on meanwhile."""
        every = self.config.eval.every
        due = every and (self.step % every == 0 or self.step == self.config.steps)
        if not due or self.step in self.evaluated:
            return
        self.evaluated.add(self.step)
        for label, (source, split) in self.config.evaluations.items():
            name = f"eval/{label}/{self.step}"
            self.evaluations[name] = _Evaluation(self.step, label, self.config.eval.tasks)
            for index in range(self.config.eval.tasks):
                pick = Pick(group=name, source=source, index=index, stage=0)
                self.admission.queue(self._orders(pick, split, 1, self.config.eval.temperature))

    def _evaluated(self, name: str, trajectory: Trajectory) -> None:
        evaluation = self.evaluations[name]
        evaluation.done.append(trajectory)
        evaluation.missing -= 1
        if evaluation.missing == 0:
            self.record.evaluation(self.evaluations.pop(name))
