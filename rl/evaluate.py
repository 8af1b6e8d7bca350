"""Play held-out tasks with a policy and count: the same engine, worker and episodes as in training, without a learner."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from pathlib import Path

from agents.trajectory import Trajectory
from rl.config import Config
from rl.parts import EnginePart, await_start, start_worker
from rl.spawn import Handle, spawn
from rl.worker import Order


class Player:
    """An engine and its rollout workers on one model; plays orders and returns trajectories in their order."""

    def __init__(self, config: Config, model: Path | None = None) -> None:
        """`model` replaces the recipe's. The substrate (`spawn.start`) must be up. Errors: as
        `rl.parts.await_start`."""
        if model is not None:
            config = replace(config, policy=replace(config.policy, model=str(model)))
        self.config, mode = config, config.rollout.spawn
        self.episodes = min(config.rollout.in_flight, config.admission.sandboxes or config.rollout.in_flight)
        self.engine: Handle = spawn(EnginePart, config, mode=mode, name="engine", concurrency=self.episodes + 8)
        self.workers = [start_worker(config, self.engine, i) for i in range(config.rollout.workers)]
        await_start((self.engine, *self.workers))

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


def orders(split: str, indices: Sequence[int], temperature: float, *, samples: int = 1, seed: int = 0) -> list[Order]:
    """`samples` episodes of each task. The sampling of each is seeded by (seed, task, sample): two policies that play the
    same orders see the same tasks and draw the same random numbers (paired)."""
    return [
        Order(
            group=f"eval/{split}",
            split=split,
            index=index,
            sample=sample,
            temperature=temperature,
            seed=zlib.crc32(f"{seed}/{split}/{index}/{sample}".encode()) & 0x7FFFFFFF,
        )
        for index in indices
        for sample in range(samples)
    ]
