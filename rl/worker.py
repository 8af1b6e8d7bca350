"""The rollout worker: plays episodes, one per calling thread, and says what their time went into.

It holds the environments and the renderer, never weights: each turn asks the engine. A failure of the infrastructure comes
back as a trajectory without a reward; a mistake in an environment's code is an exception that ends the run.
"""

from __future__ import annotations

import os
import queue
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agents.episode import run_episode
from agents.trajectory import Trajectory
from envs.registration import make
from policy import renderer
from policy.completion import Completion, Sampling
from rl.config import Config
from rl.ledger import Ledger, merge
from rl.spawn import Handle


@dataclass(frozen=True, kw_only=True)
class Order:
    """One episode to play."""

    group: str
    """Group id; evaluation groups begin with "eval/"."""
    split: str
    index: int
    """Task index in the split."""
    source: str = "env"
    """The source of the task, by its name in `Config.sources`."""
    stage: int = 0
    """The stage by whose recipe it is played (`Config.staged`)."""
    sample: int
    """Index in the group."""
    temperature: float
    seed: int | None = None
    """Seeds the sampling of this episode."""
    attempt: int = 0

    @property
    def episode(self) -> str:
        """Names the episode to the engine."""
        return f"{self.group}/{self.index}/{self.sample}.{self.attempt}"


class EnginePolicy:
    """One episode's policy, whose answers come from an engine elsewhere."""

    def __init__(self, engine: Handle, timeout: float | None, ledger: Ledger) -> None:
        """`ledger` is the episode's: of the seconds that an answer took, those before its turn are `wait_turn`."""
        self.engine, self.timeout, self.ledger = engine, timeout, ledger

    def generate(self, token_ids: Sequence[int], sampling: Sampling, episode: str) -> Completion:
        """See `policy.completion.Policy`."""
        answer: Completion = self.engine.ask("generate", token_ids, sampling, episode, timeout=self.timeout)
        self.ledger.move("wait_policy", "wait_turn", answer.queued)
        return answer

    def release(self, episode: str) -> None:
        """See `policy.completion.Policy`."""
        self.engine.call("release", episode)


class RolloutWorker:
    """Plays orders. Thread-safe: every call of `play` is one episode with an environment of its own."""

    LABELS = ("idle", "reset", "wait_policy", "wait_turn", "env")
    """Nothing to play; the environment begins; the engine answers, or has no place for the turn yet; the environment acts."""

    def __init__(self, config: Config, engine: Handle) -> None:
        self.config = config
        self.renderer = renderer.load(config.model)
        self.engine, self.deadline = engine, config.rollout.deadline if config.rollout.spawn == "ray" else None
        slots = 1 if config.rollout.spawn == "threads" else config.rollout.episodes
        self._ledgers = [Ledger(self.LABELS) for _ in range(slots)]
        self._free: queue.SimpleQueue[Ledger] = queue.SimpleQueue()
        for ledger in self._ledgers:
            self._free.put(ledger)
        for source in config.environments:  # a bad id or argument fails here, in one line
            make(source.id, **source.kwargs).close()

    def play(self, order: Order) -> Trajectory:
        """One episode. Never raises for the infrastructure."""
        config = self.config.staged[order.stage]
        source = config.sources[order.source]
        sampling = Sampling(
            temperature=order.temperature,
            top_p=config.policy.top_p,
            max_tokens=config.policy.max_tokens,
            seed=order.seed,
        )
        ledger = self._free.get()  # waits for a slot
        try:
            ledger.switch("reset")
            return run_episode(
                make(source.id, **source.kwargs),
                EnginePolicy(self.engine, self.deadline, ledger),
                self.renderer,
                sampling,
                episode=order.episode,
                seed=order.index,
                options={"split": order.split},
                sample=order.sample,
                style=config.policy.style,
                max_context=source.max_context,
                max_turns=source.max_turns,
                clock=ledger.switch,
            )
        finally:
            ledger.switch("idle")
            self._free.put(ledger)

    def stats(self) -> dict[str, Any]:
        """Seconds per label, summed over the episode slots (each slot's sum to the wall clock), and the process id."""
        return {"seconds": merge(ledger.snapshot() for ledger in self._ledgers), "pid": os.getpid()}

    def close(self) -> None:
        """Nothing outlives the process."""
