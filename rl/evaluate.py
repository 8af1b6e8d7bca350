"""Play held-out tasks with a policy and count: the same engine, worker and episodes as in training, without a learner."""

from __future__ import annotations

import json
import zlib
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from pathlib import Path

from agents.trajectory import Group, Trajectory
from envs.errors import nearest
from envs.registration import make
from rl import spawn as spawning
from rl.config import Config
from rl.parts import START, await_start, start_engines, start_worker
from rl.worker import Order


class Player:
    """An engine and its rollout workers on one model; plays orders and returns trajectories in their order."""

    def __init__(self, config: Config, model: Path | None = None) -> None:
        """`model` replaces the recipe's. The substrate (`spawn.start`) must be up. Errors: as
        `rl.parts.await_start`."""
        if model is not None:
            config = replace(config, policy=replace(config.policy, model=str(model)))
        self.config = config
        self.episodes = min(config.rollout.in_flight, config.admission.sandboxes or config.rollout.in_flight)
        self.engine = start_engines(config)
        self.workers = [start_worker(config, self.engine, i) for i in range(config.rollout.workers)]
        await_start((self.engine, *self.workers), START[config.policy.engine])

    def play(self, orders: Sequence[Order]) -> list[Trajectory]:
        """Play every order; an episode whose infrastructure failed is tried again as often as the recipe says."""
        waiting, done = deque(enumerate(orders)), dict[int, Trajectory]()
        running: dict[Future[Trajectory], tuple[int, Order, int]] = {}
        load = [0] * len(self.workers)
        while waiting or running:
            while waiting and len(running) < self.episodes:
                at, order = waiting.popleft()
                least = min(range(len(load)), key=load.__getitem__)
                load[least] += 1
                running[self.workers[least].call("play", order)] = (at, order, least)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                at, order, worker = running.pop(future)
                load[worker] -= 1
                trajectory = future.result()
                if trajectory.reward is None and order.attempt < self.config.rollout.retries:
                    waiting.append((at, replace(order, attempt=order.attempt + 1)))
                else:
                    done[at] = trajectory
        return [done[i] for i in range(len(orders))]

    def close(self) -> None:
        """End engine and workers."""
        for part in (*self.workers, self.engine):
            part.stop()


def orders(
    split: str, indices: Sequence[int], temperature: float, *, samples: int = 1, seed: int = 0, source: str = "env"
) -> list[Order]:
    """`samples` episodes of each task. The sampling of each is seeded by (seed, task, sample): two policies that play the
    same orders see the same tasks and draw the same random numbers (paired)."""
    return [
        Order(
            group=f"eval/{split}",
            split=split,
            index=index,
            source=source,
            sample=sample,
            temperature=temperature,
            seed=zlib.crc32(f"{seed}/{split}/{index}/{sample}".encode()) & 0x7FFFFFFF,
        )
        for index in indices
        for sample in range(samples)
    ]


def play(config: Config, model: Path | None, work: Sequence[Order]) -> list[Trajectory]:
    """Start a `Player`, let it play, and take it down."""
    spawning.start(config.rollout.spawn, config.rollout.address)
    player = None
    try:
        player = Player(config, model)
        return player.play(work)
    finally:
        if player is not None:
            player.close()
        spawning.stop(config.rollout.spawn)


def solve(config: Config, model: Path) -> dict[str, float]:
    """Share of the recipe's held-out tasks that a model resolves, by evaluation (`Config.evaluations`). Two models play the
    same tasks with the same random numbers; episodes lost to infrastructure count as failed."""
    tasks, temperature = range(config.eval.tasks), config.eval.temperature
    work = [
        order
        for source, split in config.evaluations.values()
        for order in orders(split, tasks, temperature, seed=config.seed, source=source)
    ]
    played = iter(play(config, model, work))
    return {label: sum(next(played).outcome == "resolved" for _ in tasks) / len(tasks) for label in config.evaluations}


def measure(config: Config, source: str, tasks: int, samples: int, out: Path) -> str:
    """Write the solve rates of the first training tasks of a source, as `EnvConfig.rates` reads them; returns a summary.

    tasks: 0 for all of a task set.
    """
    if source not in config.sources:
        raise ValueError(
            f"the recipe has no source {source!r}; it has {', '.join(config.sources)}.{nearest(source, config.sources)}"
        )
    env = config.sources[source]
    made = make(env.id, **env.kwargs)
    size: int | None = getattr(made, "size", lambda split: None)(env.split)
    made.close()
    n = min(tasks or size or 0, size or tasks)
    if n < 1 or samples < 1:
        raise ValueError(
            f"{tasks} tasks of {samples} samples are nothing to play; give --tasks (those of {source} "
            f"{'are ' + str(size) if size else 'have no end'}), and at least one sample"
        )
    indices = range(env.first_task, env.first_task + n)
    work = orders(env.split, indices, config.policy.temperature, samples=samples, seed=config.seed, source=source)
    played = play(config, None, work)
    groups = [Group(str(i), "", played[at * samples : (at + 1) * samples]) for at, i in enumerate(indices)]
    partial = out.with_suffix(".partial")
    partial.write_text("".join(_rate(group) + "\n" for group in groups))
    partial.rename(out)
    rates = [group.solved / group.graded for group in groups if group.graded]
    kept = sum(0.1 <= rate <= 0.7 for rate in rates)
    return f"{len(rates)} tasks, {sum(rates) / max(1, len(rates)):.1%} solved, {kept} with a solve rate within [0.1, 0.7]: {out}"


def _rate(group: Group) -> str:
    task = group.trajectories[0].task_id
    return json.dumps({"index": int(group.id), "task": task, "solved": group.solved, "graded": group.graded})
