"""Several engines as one: episodes stay with the engine that holds their KV, everything else goes to all.

    generate, release      the episode's own engine; a new episode goes to the one with the fewest of this caller's
    publish, score, …      every engine that is there; answers are put together (`MERGE`)

A handle of it may be given to other actors: each caller keeps its own places. An engine that died loses its episodes and
nothing else: the owner starts another, which gets no episode before it samples from the newest weights and scores as the
others do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any

from envs.errors import InfraError
from rl.spawn import Handle, PartGone

STICKY = ("generate", "release")
"""Calls whose last argument is an episode, which one engine alone knows."""

START = 300.0
"""Seconds in which an engine must have started, and taken the weights."""


def _stats(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`seconds` as the mean engine spends them, so that they sum to the wall clock; counts added up."""
    merged: dict[str, Any] = {}
    for name, first in answers[0].items():
        values = [answer[name] for answer in answers]
        if name == "seconds":
            merged[name] = {label: sum(v[label] for v in values) / len(values) for label in first}
        elif name == "paces":
            merged[name] = [tuple(pace) for value in values for pace in value]
        else:
            merged[name] = min(values) if name == "version" else sum(values)
    return merged


MERGE: Mapping[str, Callable[[Sequence[Any]], Any]] = {
    "publish": min,
    "score": lambda answers: [
        scores for answer in answers for scores in answer
    ],  # of each engine, one behind the other
    "load": lambda answers: sum(answers) / len(answers),
    "stats": _stats,
}
"""How the engines' answers become one; of other calls it is the first."""


class Replicas:
    """A `rl.spawn.Handle` of several engines. Thread-safe."""

    def __init__(
        self,
        name: str,
        parts: Sequence[Handle],
        start: Callable[[int], Handle] | None = None,
        changed: Callable[[], None] = lambda: None,
        tolerance: float = 1e-4,
    ) -> None:
        """start: makes engine number i anew; without it a dead one is only left out. changed: called when an engine is back.
        tolerance: largest difference of two engines' log-probs under the same weights, nats."""
        self.name, self.parts = name, list(parts)
        self._start, self._changed, self._tolerance = start, changed, tolerance
        self._lock = threading.RLock()
        self._homes: dict[str, int] = {}  # episode -> engine
        self._down: set[int] = set()
        self._published: tuple[Any, ...] = ()  # what the engines were last told to sample from
        self._probe: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Replicas, (self.name, [self.parts[i] for i in self._up] or self.parts)

    def call(self, method: str, *args: Any) -> Future[Any]:
        """See `rl.spawn.Handle.call`. Where no engine is left: `PartGone`."""
        if method in STICKY:
            return self._routed(method, args)
        with self._lock:
            if method == "publish":
                self._published = args
            elif method == "score":
                self._probe = args
            calls = {i: self.parts[i].call(method, *args) for i in self._up}
        answer: Future[Any] = Future()

        def settle() -> None:
            try:
                answer.set_result(self._together(method, calls))
            except BaseException as error:
                answer.set_exception(error)

        threading.Thread(target=settle, name=f"{self.name} {method}", daemon=True).start()
        return answer

    def ask(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        """See `rl.spawn.Handle.ask`."""
        try:
            return self.call(method, *args).result(timeout)
        except TimeoutError:
            raise PartGone(f"{self.name} did not answer {method!r} within {timeout} seconds") from None

    def kill(self) -> None:
        """See `rl.spawn.Handle.kill`."""
        for part in self.parts:
            part.kill()

    def stop(self) -> None:
        """End all; none is started again."""
        self._start = None
        for part in list(self.parts):
            part.stop()

    @property
    def _up(self) -> list[int]:
        return [i for i in range(len(self.parts)) if i not in self._down]

    def _routed(self, method: str, args: tuple[Any, ...]) -> Future[Any]:
        episode = str(args[-1])
        with self._lock:
            home = self._homes.get(episode)
            if home is None and method == "generate":
                home = self._homes[episode] = self._emptiest(episode)
            elif method == "release":
                self._homes.pop(episode, None)
            if home is None or home in self._down:
                answer: Future[Any] = Future()
                if method == "generate":
                    answer.set_exception(PartGone(f"the engine of episode {episode} is gone"))
                else:
                    answer.set_result(None)
                return answer
            future = self.parts[home].call(method, *args)
        future.add_done_callback(lambda done: self._noticed(home, done))
        return future

    def _emptiest(self, episode: str) -> int:
        up = self._up
        if not up:
            raise PartGone(f"no engine of {len(self.parts)} is left for episode {episode}")
        held = list(self._homes.values())
        return min(up, key=held.count)

    def _noticed(self, index: int, done: Future[Any]) -> None:
        if isinstance(done.exception(), PartGone):
            self._lose(index)

    def _together(self, method: str, calls: Mapping[int, Future[Any]]) -> Any:
        wait(calls.values())
        answers, gone = [], None
        for index, future in calls.items():
            try:
                answers.append(future.result())
            except PartGone as error:
                self._lose(index)
                gone = error
        if not answers:
            raise gone or PartGone(f"no engine of {len(self.parts)} is left")
        return MERGE.get(method, lambda values: values[0])(answers)

    def _lose(self, index: int) -> None:
        """Engine `index` is gone: its episodes are lost with it, and another is started."""
        with self._lock:
            if index in self._down:
                return
            self._down.add(index)
            if self._start is not None:
                print(f"{self.parts[index].name} is gone, with its episodes; another is started", flush=True)
                threading.Thread(target=self._return, args=(index, self._start), daemon=True).start()

    def _return(self, index: int, start: Callable[[int], Handle]) -> None:
        """Start engine `index` anew and let it in once it samples as the others do. It stays out where it does not."""
        try:
            part = start(index)
            while True:
                with self._lock:
                    told, probe, other = self._published, self._probe, next((self.parts[i] for i in self._up), None)
                if told:
                    part.ask("publish", *told, timeout=START)
                agrees = (
                    not (probe and other)
                    or _gap(*(p.ask("score", *probe, timeout=START) for p in (part, other))) <= self._tolerance
                )
                with self._lock:
                    if told is not self._published:
                        continue  # the others sample from newer weights by now
                    if not agrees:
                        raise InfraError("its log-probs are not those of the other engines")
                    self.parts[index] = part
                    self._down.discard(index)
                break
        except InfraError as error:
            print(f"engine {index} stays out: {error}", flush=True)
            return
        print(f"{part.name} is back", flush=True)
        self._changed()


def _gap(mine: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float:
    pairs = [(a, b) for x, y in zip(mine, theirs, strict=True) for a, b in zip(x, y, strict=True)]
    return max(abs(a - b) for a, b in pairs)
