"""The parts of a run (engine, learner, rollout workers), built from its config and started by `spawn`."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any

from envs.errors import InfraError
from rl.admission import Budget
from rl.config import Config
from rl.gate import Gate
from rl.spawn import Handle, spawn
from rl.worker import RolloutWorker


def engine_part(config: Config) -> Any:
    """The torch engine on the recipe's model; its slots are the episodes in flight, or as many as the KV budget holds."""
    from policy import models
    from policy.torch_engine import EngineConfig, TorchEngine

    fit = config.admission.kv_tokens // config.policy.max_context
    settings = EngineConfig(
        slots=min(config.rollout.in_flight, fit or config.rollout.in_flight),
        max_context=config.policy.max_context,
        threads=config.policy.threads,
        seed=config.seed,
        deadline_s=config.rollout.deadline if config.rollout.spawn == "ray" else 1e9,
    )
    return TorchEngine(models.load(config.model), settings)


class EnginePart:
    """`TorchEngine` behind its gate as a part: made where it runs, from the config alone."""

    def __init__(self, config: Config) -> None:
        self.engine = engine_part(config)
        self.gate = Gate(self.engine, Budget(config.admission.kv_tokens or math.inf, page=config.policy.max_context))
        self.recompute = config.policy.recompute

    def generate(self, *args: Any) -> Any:
        """See `Gate.generate`."""
        return self.gate.generate(*args)

    def release(self, episode: str) -> None:
        """See `Gate.release`."""
        self.gate.release(episode)

    def cancel(self, episode: str) -> None:
        """See `Gate.cancel`."""
        self.gate.cancel(episode)

    def load(self) -> float:
        """See `Gate.load`."""
        return self.gate.load()

    def publish(self, version: int, weights: Any) -> int:
        """Swap the weights between two decode steps; returns the version."""
        self.engine.publish(version, weights, self.recompute)
        return version

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """See `TorchEngine.score`."""
        scores: list[list[float]] = self.engine.score(sequences)
        return scores

    def stats(self) -> dict[str, Any]:
        """See `TorchEngine.stats` and `TorchEngine.paces`; `parked`: episodes whose KV was given up for older ones."""
        return {**self.engine.stats(), "paces": self.engine.paces(), "parked": self.gate.parked}

    def close(self) -> None:
        """End the engine's thread, and all waiting."""
        self.gate.close()
        self.engine.close()


class LearnerPart:
    """`Learner` as a part, with a ledger of what it does."""

    def __init__(self, config: Config) -> None:
        from rl.learner import Learner, LearnerConfig
        from rl.ledger import Ledger

        learn = config.learn
        settings = LearnerConfig(
            algorithm=learn.algorithm,
            overrides=dict(learn.overrides),
            lr=learn.lr,
            warmup_steps=learn.warmup_steps,
            decay_updates=config.steps * learn.minibatches if learn.schedule == "linear" else 0,
            weight_decay=learn.weight_decay,
            grad_clip=learn.grad_clip,
            minibatches=learn.minibatches,
            context=config.policy.max_context,
            max_tokens=learn.max_tokens,
            threads=learn.threads,
            seed=config.seed,
        )
        self.learner = Learner(settings, config.model)
        self.ledger = Ledger(["idle", "train", "publish", "checkpoint"])

    def step(self, rows: Any) -> dict[str, Any]:
        """Train on rows; the report as plain values."""
        with self.ledger.spend("train"):
            return asdict(self.learner.step(rows))

    def weights(self) -> tuple[int, dict[str, Any]]:
        """Version and weights."""
        with self.ledger.spend("publish"):
            return self.learner.version, self.learner.weights()

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """See `Learner.score`."""
        with self.ledger.spend("publish"):
            return self.learner.score(sequences)

    def save(self, directory: str) -> None:
        """Whole state into an empty directory."""
        with self.ledger.spend("checkpoint"):
            self.learner.save(Path(directory))

    def load(self, directory: str) -> int:
        """The inverse of `save`; returns the version."""
        self.learner.load(Path(directory))
        return self.learner.version

    def export(self, directory: str) -> None:
        """The model in the form that `policy.models.load` reads."""
        self.learner.export(Path(directory))

    def stats(self) -> dict[str, float]:
        """Seconds per label; they sum to the wall clock."""
        return self.ledger.snapshot()

    def close(self) -> None:
        """Nothing outlives the process."""


def start_worker(config: Config, engine: Handle, index: int) -> Handle:
    """Start rollout worker `index`."""
    episodes = config.rollout.in_flight // config.rollout.workers
    mode, name = config.rollout.spawn, f"worker-{index}"
    return spawn(RolloutWorker, config, engine, mode=mode, name=name, concurrency=episodes + 2)


def await_start(parts: Sequence[Handle], deadline: float = 180.0) -> None:
    """Return when every part answers; `InfraError` after `deadline` seconds, and what a constructor raised (a bad model, a
    bad env)."""
    wait = [(part, part.call("stats")) for part in parts]
    limit = time.monotonic() + deadline
    for part, future in wait:
        try:
            future.result(max(1.0, limit - time.monotonic()))
        except TimeoutError:
            raise InfraError(
                f"{part.name} did not start within {deadline:g} seconds; look at the load of this machine"
            ) from None


class Parts:
    """The started parts. A worker that died is started again; an engine or learner that died ends the run."""

    def __init__(self, config: Config) -> None:
        """Start everything; errors as `await_start`."""
        self.config, mode, episodes = config, config.rollout.spawn, config.rollout.in_flight
        self.engine: Handle = spawn(EnginePart, config, mode=mode, name="engine", concurrency=episodes + 8)
        self.learner: Handle = spawn(LearnerPart, config, mode=mode, name="learner")
        self.workers = [start_worker(config, self.engine, i) for i in range(config.rollout.workers)]
        await_start((self.engine, self.learner, *self.workers))

    def replace(self, index: int, dead: Handle) -> None:
        """Start worker `index` again, unless that was done since `dead` was in its place."""
        if self.workers[index] is dead:
            self.workers[index] = start_worker(self.config, self.engine, index)

    def stats(self, timeout: float = 60.0) -> dict[str, Any]:
        """Statistics by part: "engine", "learner" and a list "workers"; a part that can't answer is left out."""
        asked: dict[str, Future[Any]] = {"engine": self.engine.call("stats"), "learner": self.learner.call("stats")}
        asked |= {f"worker-{i}": w.call("stats") for i, w in enumerate(self.workers)}
        found = {}
        for name, future in asked.items():
            try:
                found[name] = future.result(timeout)
            except Exception:  # a dead worker is noticed where its episodes are lost
                continue
        return found

    def stop(self) -> None:
        """End every part; never raises."""
        for part in (*self.workers, self.learner, self.engine):
            try:
                part.stop()
            except Exception:
                continue
