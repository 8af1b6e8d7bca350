"""The gate: where an engine's callers wait until `Budget` gives them a turn. The only place that turns its decisions
into deeds.

Parking an episode is `release` of its KV in the engine, which computes it again at the episode's next turn. The engine
carries out its callers' wishes in order, so what is parked is gone before the turn that needs the room begins.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from envs.errors import InfraError
from policy.completion import Completion, Sampling
from rl.admission import Budget


class Gate:
    """A policy (`policy.completion.Policy`) in front of a `TorchEngine`. Thread-safe."""

    def __init__(self, engine: Any, budget: Budget) -> None:
        self.engine, self.budget = engine, budget
        self.parked = 0
        """Episodes parked since the start."""
        self._lock = threading.Lock()
        self._places: dict[str, Future[None]] = {}  # of the episodes that wait
        self._cancelled: set[str] = set()

    def generate(self, token_ids: Sequence[int], sampling: Sampling, episode: str) -> Completion:
        """Wait for a turn, then the engine's answer. InfraError where the episode was cancelled, or the engine failed."""
        most = min(len(token_ids) + sampling.max_tokens, self.engine.config.max_context)
        place: Future[None] = Future()
        asked = time.perf_counter()
        with self._lock:
            if episode in self._cancelled:
                raise _cancelled(episode)
            self.budget.ask(episode, most)
            self._places[episode] = place
            self._decide()
        try:
            self._wait(place)
            waited = time.perf_counter() - asked
            completion: Completion = self.engine.generate(token_ids, sampling, episode)
        except BaseException:
            self._end(episode)
            raise
        with self._lock:
            self.budget.done(episode, len(token_ids) + len(completion.token_ids))
            self._decide()
        return replace(completion, queued=completion.queued + waited)

    def release(self, episode: str) -> None:
        """The episode is over. Never raises."""
        self._end(episode)
        self._cancelled.discard(episode)

    def cancel(self, episode: str) -> None:
        """End an episode from outside, wherever it is: its turn under way ends as "cancelled", and there is no next one."""
        self._cancelled.add(episode)
        self._end(episode)

    def load(self) -> float:
        """Share of asked turns that wait, here or in the engine, 0 to 1."""
        stats = self.engine.stats()
        with self._lock:
            waiting = self.budget.waiting + stats["waiting"]
        return waiting / max(1, waiting + stats["running"])

    def close(self) -> None:
        """Whoever waits gets an InfraError."""
        with self._lock:
            for episode, place in self._places.items():
                place.set_exception(InfraError(f"episode {episode} waits for an engine that is closed; make a new one"))
            self._places.clear()

    def _wait(self, place: Future[None]) -> None:
        seconds = self.engine.config.deadline_s
        try:
            place.result(seconds)
        except TimeoutError:
            raise InfraError(
                f"no place in the KV budget within {seconds:g} seconds; raise admission.kv_tokens or rollout.deadline, or "
                "lower rollout.episodes"
            ) from None

    def _end(self, episode: str) -> None:
        with self._lock:
            self.budget.end(episode)
            if (place := self._places.pop(episode, None)) is not None:
                place.set_exception(_cancelled(episode))
            self.engine.release(episode)
            self._decide()

    def _decide(self) -> None:
        turns = self.budget.decide()
        for episode in turns.park:
            self.engine.release(episode)
        self.parked += len(turns.park)
        for episode in turns.run:
            self._places.pop(episode).set_result(None)


def _cancelled(episode: str) -> InfraError:
    return InfraError(f"episode {episode} was cancelled")
