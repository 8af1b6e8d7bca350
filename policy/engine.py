"""What all embedded engines share: one thread owns a model, and callers leave it requests.

`Engine` is what callers see, `Request` one `generate` call inside of an engine. A subclass starts the thread and says what
it does between and in decode steps.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import numpy as np

from envs.errors import InfraError
from policy.completion import Completion, Sampling, digest
from policy.inbox import LATER, Clock, Inbox

Finish = Literal["stop", "length", "cancelled"]

COUNTS = (
    *("decoded_tokens", "prefilled_tokens", "reused_tokens", "shared_tokens"),
    *("completions", "steps", "swaps", "swaps_in_flight"),
)
"""What an engine counts from its start; its `stats` says how."""

LABELS = ("prefill", "decode", "swap", "score", "idle")
"""What an engine's time is spent on."""


@dataclass(eq=False)
class Request:
    """One `generate` call, from its arrival to its completion. The engine's thread fills it in."""

    episode: str
    ids: list[int]
    sampling: Sampling
    most: int
    """Most tokens to sample: `max_tokens`, or what the context leaves."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    prompt_digest: int | None = None
    asked: float = field(default_factory=time.perf_counter)
    queued: float | None = None
    """Seconds until the engine began with it."""
    future: Future[Completion] = field(default_factory=Future)

    def begin(self, now: float | None = None) -> None:
        """The engine began with it, now or then (`time.perf_counter`); only the first call counts."""
        if self.queued is None:
            self.queued = (time.perf_counter() if now is None else now) - self.asked

    def finish(self, finish: Finish) -> None:
        """Answer the caller. Of a request that the engine had not begun with, the prompt is what it was given."""
        self.begin()
        self.future.set_result(
            Completion(
                token_ids=self.tokens,
                logprobs=self.logprobs,
                versions=self.versions,
                finish=finish,
                prompt_digest=digest(self.ids) if self.prompt_digest is None else self.prompt_digest,
                queued=self.queued or 0.0,
            )
        )


class Engine:
    """A `policy.completion.Policy` whose model one thread owns. Any number of blocked callers cost nothing.

    A subclass has `publish`, `checksum` and `stats` for callers, and `_loop`, `_accept` (which may refuse a request by its
    future), `_forget` and `_score` for that thread.
    """

    request: ClassVar[type[Request]] = Request

    def __init__(self, config: Any, *, vocabulary: int, version: int) -> None:
        self.config = config
        self._vocabulary, self._version = vocabulary, version
        self._inbox = Inbox(config.deadline_s)
        self._random = np.random.default_rng(config.seed)
        self._clock = Clock(LABELS, "idle")
        self._counts = dict.fromkeys(COUNTS, 0)
        self._paces: dict[int, list[float]] = {}  # rows of a decode step -> steps, seconds
        self._thread = threading.Thread(target=self._loop, name=type(self).__name__, daemon=True)
        # A thread inside torch while the interpreter shuts down would abort the process.
        atexit.register(self.close)

    @property
    def version(self) -> int:
        """Version of the weights that sample the next token."""
        return self._version

    def generate(self, token_ids: Sequence[int], sampling: Sampling, episode: str) -> Completion:
        """Continue `token_ids`; blocks. ValueError for ids that can't be run, InfraError if the engine failed."""
        ids = [int(token) for token in token_ids]
        self._check_ids(ids)
        room = self.config.max_context - len(ids)
        if room < 1:
            raise ValueError(
                f"the prompt has {len(ids)} tokens and engine.max_context is {self.config.max_context}: nothing can be "
                "sampled; end the episode at the context limit, or raise engine.max_context"
            )
        request = self.request(episode, ids, sampling, min(sampling.max_tokens, room))
        self._inbox.post(request.future, self._accept, request)
        try:
            completion: Completion = self._inbox.wait("completion", request.future)
        except InfraError:
            self.release(episode)
            raise
        return completion

    def release(self, episode: str) -> None:
        """Forget the episode's KV; a completion under way ends as "cancelled". Returns at once, never raises."""
        try:
            self._inbox.post(Future(), self._forget, episode)
        except InfraError:
            pass

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability (nats, temperature 1) of each token given those before it; 0.0 for the first.

        Under the current weights with fresh KV, which is thrown away: kept episodes are untouched.
        """
        lists = [[int(token) for token in ids] for ids in sequences]
        for ids in lists:
            self._check_ids(ids)
            if len(ids) > self.config.max_context:
                raise ValueError(
                    f"a sequence of {len(ids)} tokens can't be scored: engine.max_context is {self.config.max_context}"
                )
        scores: list[list[float]] = self._inbox.ask("score", self._score, lists)
        return scores

    def paces(self) -> list[tuple[int, int, float]]:
        """How fast it decodes: rows of a decode step, how many steps had so many, and their seconds."""
        return [(rows, int(steps), seconds) for rows, (steps, seconds) in sorted(self._paces.copy().items())]

    def close(self) -> None:
        """End the thread; whoever still waits gets an InfraError. Safe to call twice."""
        self._inbox.close()
        self._thread.join(min(self.config.deadline_s, 30.0))
        atexit.unregister(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_ids(self, ids: list[int]) -> None:
        if not ids:
            raise ValueError("an empty list of token ids can't be run; give at least one token")
        if min(ids) < 0 or max(ids) >= self._vocabulary:
            bad = next(i for i in ids if not 0 <= i < self._vocabulary)
            raise ValueError(
                f"token id {bad} is outside the model's vocabulary of {self._vocabulary}; use the tokenizer that the model was "
                "made with"
            )

    def _check_order(self, version: int) -> None:
        if version < self._version:
            raise ValueError(f"version {version} is older than the engine's {self._version}; publish in order")

    def publish(self, version: int, weights: Any, recompute: bool = False) -> None:
        """Swap the weights between two decode steps; blocks until they sample."""
        raise NotImplementedError

    def checksum(self) -> str:
        """`policy.weights.checksum` of the weights: equal to the learner's for the same version."""
        raise NotImplementedError

    def stats(self) -> dict[str, float]:
        """Seconds since the start by `LABELS`, their sum as `wall`, `COUNTS`, and what there is now: `running`, `waiting`,
        `episodes`, `kv_tokens`, `version`."""
        raise NotImplementedError

    # What runs in the engine's thread.

    def _loop(self) -> None:
        raise NotImplementedError

    def _accept(self, request: Any) -> object:
        raise NotImplementedError

    def _forget(self, episode: str) -> None:
        raise NotImplementedError

    def _score(self, sequences: list[list[int]]) -> list[list[float]]:
        raise NotImplementedError

    def _busy(self, request: Request) -> object:
        """Refuse a second call of an episode while the first is under way."""
        busy = f"episode {request.episode!r} is already generating; make its calls one after the other"
        request.future.set_exception(ValueError(busy))
        return LATER

    def _paced(self, rows: int, began: float) -> None:
        """A decode step of so many rows, begun then (`time.perf_counter`), has ended."""
        pace = self._paces.setdefault(rows, [0, 0.0])
        pace[0], pace[1] = pace[0] + 1, pace[1] + time.perf_counter() - began
