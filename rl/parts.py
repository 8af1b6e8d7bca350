"""The parts of a run (engine, learner, rollout workers), built from its config and started by `spawn`."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from envs.errors import InfraError
from envs.fields import build
from policy import renderer
from policy.engine import LABELS, Engine
from rl.admission import Budget
from rl.config import Config
from rl.gate import Gate
from rl.replicas import Replicas
from rl.spawn import Handle, JointHandle, Place, spawn
from rl.worker import RolloutWorker

if TYPE_CHECKING:
    from policy.torch_engine import EngineConfig
    from policy.vllm_engine import VllmConfig


PADDING = 1024
"""Most rows that an embedding may have beyond its tokenizer: vocabularies are padded to multiples of up to 512."""


def check_model(config: Config) -> None:
    """`ValueError` where the model directory, its tokenizer and the recipe don't fit together."""
    from safetensors import SafetensorError, safe_open

    from policy.decoder import check_supported

    vocabulary = renderer.load(config.model).vocab_size
    path = config.model / "config.json"
    try:
        model = json.loads(path.read_text())
        rows, positions = int(model["vocab_size"]), int(model["max_position_embeddings"])
        for path in config.model.glob("model*.safetensors"):
            safe_open(path, "pt")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(
            f"model {path} can't be read ({error}); copy or save it again, in Hugging Face format"
        ) from None
    if not vocabulary <= rows <= vocabulary + PADDING:
        raise ValueError(
            f"model {config.model} has vocab_size={rows}, its tokenizer.json {vocabulary} tokens; give the tokenizer that the "
            "model was made with"
        )
    if config.policy.max_context > positions:
        raise ValueError(
            f"policy.max_context={config.policy.max_context} is more than the {positions} positions of model {config.model}; "
            "lower it"
        )
    if config.policy.engine == "torch":
        check_supported(model, config.policy.max_context)


def engine_settings(config: Config) -> EngineConfig | VllmConfig:
    """The engine's: its slots are the episodes in flight, or as many as the KV budget holds."""
    fit = config.admission.kv_tokens // config.policy.max_context
    derived: dict[str, Any] = {
        "slots": min(config.rollout.in_flight, fit or config.rollout.in_flight),
        "max_context": config.policy.max_context,
        "threads": config.policy.threads,
        "seed": config.seed,
        "deadline_s": config.rollout.deadline if config.rollout.spawn == "ray" else 1e9,
    }
    if config.policy.engine == "torch":
        from policy.torch_engine import EngineConfig

        return EngineConfig(**derived, device=config.policy.device)
    from policy.vllm_engine import VllmConfig

    if twice := derived.keys() & config.policy.vllm.keys():
        raise ValueError(f"policy.vllm.{min(twice)} follows from the rest of the recipe; leave it out")
    return build(VllmConfig, {**derived, **config.policy.vllm}, "policy.vllm")


def check_engine(config: Config) -> None:
    """`ValueError` where the engine can't be had here, or not so."""
    settings = engine_settings(config)
    if config.policy.engine == "vllm":
        from policy import vllm_engine

        if vllm_engine.installed()[1] != (config.policy.device == "cpu"):
            raise ValueError(
                f"policy.device={config.policy.device!r}, and the vLLM that is installed is built for the other; change one of them"
            )
        vllm_engine.check(config.model, cast("VllmConfig", settings))


def engine_part(config: Config) -> Engine:
    """The recipe's engine on its model."""
    settings = engine_settings(config)
    if config.policy.engine == "vllm":
        from policy.vllm_engine import VllmEngine

        return VllmEngine(config.model, cast("VllmConfig", settings))
    from policy import models
    from policy.torch_engine import TorchEngine

    return TorchEngine(models.load(config.model), cast("EngineConfig", settings))


class EnginePart:
    """The engine behind its gate as a part: made where it runs, from the config alone."""

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

    def check(self) -> None:
        """`InfraError` where the engine can't answer any more."""
        self.engine.score([[0]])

    def publish(self, version: int, weights: Any) -> int:
        """Swap the weights between two decode steps; returns the version."""
        self.engine.publish(version, weights, self.recompute)
        return version

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """See `Engine.score`."""
        return self.engine.score(sequences)

    def stats(self) -> dict[str, Any]:
        """`seconds` per label, the counts of the engine's `stats`, and its `paces`; `parked`: episodes whose KV was given up for
        older ones."""
        stats = self.engine.stats()
        seconds = {label: stats.pop(label) for label in LABELS}
        return {"seconds": seconds, **stats, "paces": self.engine.paces(), "parked": self.gate.parked}

    def close(self) -> None:
        """End the engine's thread, and all waiting."""
        self.gate.close()
        self.engine.close()


class LearnerPart:
    """`Learner` as a part, or one rank of it, with a ledger of what it does."""

    def __init__(self, config: Config, rank: int = 0, rendezvous: str = "") -> None:
        """`rendezvous`: see `rl.ranks.Place`."""
        from rl.learner import Learner
        from rl.ledger import Ledger
        from rl.ranks import Place

        place = Place(
            rank=rank,
            ranks=config.learn.ranks,
            sequence=config.learn.sequence_parallel,
            device=config.learn.device,
            dtype=config.learn.dtype,
            rendezvous=rendezvous,
            deadline=config.rollout.deadline,
        )
        facts = {"context": config.policy.max_context, "steps": config.steps, "seed": config.seed}
        self.learner = Learner(config.learn, config.model, place, **facts)
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
        with self.ledger.spend("checkpoint"):
            self.learner.load(Path(directory))
        return self.learner.version

    def export(self, directory: str) -> None:
        """The model in the form that `policy.models.load` reads."""
        with self.ledger.spend("checkpoint"):
            self.learner.export(Path(directory))

    def stats(self) -> dict[str, Any]:
        """`seconds` per label; they sum to the wall clock."""
        return {"seconds": self.ledger.snapshot()}

    def close(self) -> None:
        """Leave the other ranks; nothing outlives the process."""
        self.learner.ranks.close()


def place_of(config: Config, part: Literal["engine", "learner", "sandbox"]) -> Place:
    """Where a part may run: engines and learner ranks on GPUs of their own, where they compute on them. On a cluster rollout
    workers take one `sandbox` of a node, so that GPU nodes need neither Docker nor privileges, and what computes on a CPU takes
    one `engine` or `learner`."""
    gpus = config.gpus.get(part, 0)
    return Place(gpus=gpus, resource="" if gpus or not config.rollout.address else part)


def start_learner(config: Config) -> Handle:
    """Start the learner: an actor per rank, which find one another through a file in the run directory."""
    mode, ranks, meeting = config.rollout.spawn, config.learn.ranks, config.directory / "rendezvous"
    meeting.unlink(missing_ok=True)  # a killed run's
    rendezvous, place = str(meeting), place_of(config, "learner")
    if ranks == 1:
        return spawn(LearnerPart, config, 0, rendezvous, mode=mode, name="learner", place=place)
    parts = [
        spawn(LearnerPart, config, rank, rendezvous, mode=mode, name=f"learner-{rank}", place=place)
        for rank in range(ranks)
    ]
    return JointHandle("learner", parts)


def start_engine(config: Config, index: int = 0) -> Handle:
    """Start engine `index`; that it answers is for `await_start` to say."""
    name = f"engine-{index}" if config.policy.replicas > 1 else "engine"
    return spawn(
        EnginePart,
        config,
        mode=config.rollout.spawn,
        name=name,
        concurrency=config.rollout.in_flight + 8,
        place=place_of(config, "engine"),
    )


def start_engines(config: Config, changed: Callable[[], None] = lambda: None) -> Handle:
    """The engine, or `policy.replicas` of them; `changed` is called when one that died is back."""
    if config.policy.replicas == 1:
        return start_engine(config)

    def again(index: int) -> Handle:
        engine = start_engine(config, index)
        await_start((engine,), START[config.policy.engine])
        return engine

    engines = [start_engine(config, i) for i in range(config.policy.replicas)]
    return Replicas("engine", engines, again, changed, config.policy.parity)


def start_worker(config: Config, engine: Handle, index: int) -> Handle:
    """Start rollout worker `index`."""
    episodes = config.rollout.in_flight // config.rollout.workers
    mode, name = config.rollout.spawn, f"worker-{index}"
    place = place_of(config, "sandbox")
    return spawn(RolloutWorker, config, engine, mode=mode, name=name, concurrency=episodes + 2, place=place)


START = {"torch": 180.0, "vllm": 900.0}
"""Seconds that parts have to start, by engine: vLLM reads, compiles and measures large models."""


def await_start(parts: Sequence[Handle], deadline: float = START["torch"]) -> None:
    """Return when every part answers; `InfraError` after `deadline` seconds, and what a constructor raised (a bad model, a
    bad env)."""
    wait = [(part, part.call("stats")) for part in parts]
    limit = time.monotonic() + deadline
    for part, future in wait:
        try:
            future.result(max(1.0, limit - time.monotonic()))
        except TimeoutError:
            raise InfraError(
                f"{part.name} did not start within {deadline:g} seconds; look at the load of this machine, or at the nodes of the "
                "cluster (`ray status`)"
            ) from None


def _timed(answer: Future[Any]) -> Future[tuple[Any, float]]:
    """The answer, and when it came."""
    timed: Future[tuple[Any, float]] = Future()

    def came(_: Future[Any]) -> None:
        now = time.monotonic()
        try:
            timed.set_result((answer.result(), now))
        except BaseException as error:
            timed.set_exception(error)

    answer.add_done_callback(came)
    return timed


class Parts:
    """The started parts. A worker that died is started again; an engine or learner that died ends the run."""

    def __init__(self, config: Config) -> None:
        """Start everything; errors as `await_start`."""
        self.config = config
        self.engine = start_engines(config, self._connect)
        self.learner = start_learner(config)
        self.workers = [start_worker(config, self.engine, i) for i in range(config.rollout.workers)]
        await_start((self.engine, self.learner, *self.workers), START[config.policy.engine])

    def _connect(self) -> None:
        for worker in self.workers:
            worker.call("connect", self.engine)

    def replace(self, index: int, dead: Handle) -> None:
        """Start worker `index` again, unless that was done since `dead` was in its place."""
        if self.workers[index] is dead:
            self.workers[index] = start_worker(self.config, self.engine, index)

    def stats(self, timeout: float = 60.0) -> dict[str, tuple[dict[str, Any], float]]:
        """By part ("engine", "learner", "worker-0" …) its statistics, and when they came (`time.monotonic`); a part that can't
        answer is left out."""
        asked = {"engine": self.engine, "learner": self.learner} | {
            f"worker-{i}": w for i, w in enumerate(self.workers)
        }
        answers = {name: _timed(part.call("stats")) for name, part in asked.items()}
        found = {}
        for name, future in answers.items():
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
        (self.config.directory / "rendezvous").unlink(missing_ok=True)
