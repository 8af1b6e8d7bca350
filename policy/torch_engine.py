"""The embedded engine: continuous batching over one small model, in process, on a CPU or one GPU.

One thread owns the model. Callers leave commands in its inbox and wait; between two decode steps it carries them out
(a weight swap among them: running episodes go on with the KV they have), gives waiting requests a slot, prefills what
their slot doesn't hold yet, and decodes one token for all running rows. An episode keeps its slot between turns; whatever
KV was lost is computed again, so exactness never depends on what was kept. It does not tokenize or speak HTTP.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch

from envs.errors import Unsupported
from policy import lora
from policy import weights as weights_of
from policy.completion import digest
from policy.decoder import Decoder, Row, draw
from policy.engine import Engine, Finish, Request
from policy.inbox import LATER
from policy.slots import Slot, Slots, common
from policy.weights import Weights

T = TypeVar("T")

PASS = 512
"""Prompt tokens of one pass on a CPU: what its second-level cache holds; larger passes cost more per token."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Size and habits of a `TorchEngine`."""

    slots: int = 64
    """Episodes whose KV is held at once. More may come: an idle one's KV is dropped, least recently used first."""
    max_context: int = 1024
    """Most tokens of an episode, prompt and completion; at most the model's positions."""
    prefill_tokens: int = 2048
    """Most prompt tokens prefilled between two decode steps (one request may exceed it); bounds the others' stall."""
    threads: int = 1
    """Threads of one torch operation in the engine's thread."""
    device: str = "cpu"
    """"cpu" or "cuda"."""
    seed: int = 0
    """Seeds the requests that bring no seed of their own; their completions then depend on the order of arrival."""
    deadline_s: float = 600.0
    """Longest that a caller waits for one answer, seconds; then InfraError."""

    def __post_init__(self) -> None:
        for name in ("slots", "max_context", "prefill_tokens", "threads", "deadline_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"engine.{name}={getattr(self, name)} must be positive")
        if self.device.split(":")[0] not in ("cpu", "cuda"):
            raise ValueError(f"engine.device={self.device!r} is unknown; cpu or cuda")


@dataclass(eq=False)
class _Request(Request):
    uniform: list[float] = field(default_factory=list)
    """One number in [0, 1) per token to sample: the only randomness, so batch mates can't matter."""


class TorchEngine(Engine):
    """A `policy.completion.Policy` over a Cwm or Llama model of `transformers`; fp32.

    A thread that computes in Python in the same process takes the interpreter lock from every operation of a decode step:
    give the engine a process of its own where that matters.

    Example::

        with TorchEngine(models.build(ModelConfig()), EngineConfig(slots=8)) as engine:
            engine.generate([1, 2, 3], Sampling(max_tokens=16, stop_ids=(0,)), "episode-1")
    """

    config: EngineConfig
    request = _Request

    def __init__(self, model: Any, config: EngineConfig | None = None, *, version: int = 0) -> None:
        self.config = config or EngineConfig()
        if self.config.device != "cpu" and not torch.cuda.is_available():
            raise Unsupported(f"engine.device={self.config.device!r}, but torch finds no CUDA device here; use cpu")
        self._decoder = Decoder(model, self.config.slots, self.config.max_context, self.config.device)
        super().__init__(self.config, vocabulary=self._decoder.vocab_size, version=version)
        self._base: Mapping[str, torch.Tensor] | None = None
        self._slots: Slots[_Request] = Slots(self.config.slots)
        self._running: list[Slot[_Request]] = []
        self._waiting: list[_Request] = []
        self._thread.start()

    # What callers use, from any thread.

    def publish(self, version: int, weights: Weights, recompute: bool = False) -> None:
        """Swap the weights between two decode steps; blocks until they sample. Adapters (`policy.lora`) are merged first.

        Running episodes go on and keep the KV that older weights made; with `recompute` all KV is made anew.
        ValueError for names, shapes or values that don't fit, or for a version older than the current one.
        """
        weights, base = lora.resolve(weights, self._base, self._decoder.weights)
        weights_of.check_fit(weights, {k: v.shape for k, v in self._decoder.weights.items()}, f"version {version}")
        self._check_order(version)
        self._inbox.ask("publish", self._swap, version, weights, recompute)
        self._base = base

    def checksum(self) -> str:
        """`policy.weights.checksum` of the weights that sample: equal to the learner's for the same version."""
        return str(self._inbox.ask("checksum", lambda: weights_of.checksum(self._decoder.weights)))

    def stats(self) -> dict[str, float]:
        """Seconds since the start by label (prefill, decode, swap, score, idle; their sum is `wall`), and counts.

        Counts are cumulative except `running`, `waiting`, `episodes` (slots held) and `kv_tokens` (positions held).
        `prefilled_tokens`, `reused_tokens` (kept from earlier turns) and `shared_tokens` (copied from another episode)
        add up to the prompt tokens of all calls, plus what `recompute` prefilled again.
        """
        now = {
            "evictions": self._slots.evictions,
            "running": len(self._running),
            "waiting": len(self._waiting),
            "episodes": len(self._slots.home),
            "kv_tokens": sum(len(slot.ids) for slot in self._slots.all),
            "version": self._version,
        }
        return {**self._clock.read(), **self._counts, **now}

    # What runs in the engine's thread.

    def _loop(self) -> None:
        reason = "the engine is closed; make a new one"
        try:
            torch.set_num_threads(self.config.threads)
            with torch.inference_mode():
                while self._inbox.obey(bool(self._running or self._waiting), lambda: self._clock.enter("idle")):
                    self._admit()
                    if self._running:
                        self._step()
        except BaseException as error:
            reason = f"the engine failed: {type(error).__name__}: {' '.join(str(error).split())}; make a new one"
        self._clock.enter("idle")
        requests = [*self._waiting, *(slot.request for slot in self._running if slot.request)]
        self._running, self._waiting = [], []
        self._inbox.end(reason, [request.future for request in requests])

    def _accept(self, request: _Request) -> object:
        home = self._slots.home.get(request.episode)
        if (home and home.request) or any(other.episode == request.episode for other in self._waiting):
            return self._busy(request)
        seed = request.sampling.seed
        random = self._random if seed is None else np.random.default_rng(seed % 2**64)
        request.uniform = random.random(request.most).tolist()
        self._waiting.append(request)
        return LATER

    def _forget(self, episode: str) -> None:
        slot = self._slots.home.get(episode)
        if slot is not None:
            if slot.request is not None:
                self._finish(slot, "cancelled")
            self._slots.free(slot)
        for request in [r for r in self._waiting if r.episode == episode]:
            self._waiting.remove(request)
            request.finish("cancelled")

    def _swap(self, version: int, weights: Weights, recompute: bool) -> None:
        self._clock.enter("swap")
        self._decoder.load(weights)
        self._version = version
        self._counts["swaps"] += 1
        self._counts["swaps_in_flight"] += bool(self._running)
        for slot in self._slots.all:
            # An idle episode's KV is made anew at its next turn, where it may have to be extended anyway.
            slot.keep([] if recompute and slot.request is None else slot.ids)
            slot.fresh = not slot.ids
        if recompute:
            self._recompute()

    def _recompute(self) -> None:
        """Make the KV of all running rows anew with the current weights."""
        self._prefill([Row(slot.index, 0, slot.ids) for slot in self._running if slot.ids])
        self._counts["prefilled_tokens"] += sum(len(slot.ids) for slot in self._running)
        for slot in self._running:
            slot.fresh = True

    def _score(self, sequences: list[list[int]]) -> list[list[float]]:
        self._clock.enter("score")
        parts = _parts(sequences, [len(ids) for ids in sequences], self.config.prefill_tokens)
        return [scores for part in parts for scores in self._decoder.score(part)]

    def _admit(self) -> None:
        """Move waiting requests into slots, those whose episode has one first, and prefill what the slots lack."""
        if not self._waiting:
            return
        self._clock.enter("prefill")
        rows: list[Row] = []
        budget = self.config.prefill_tokens
        left = []
        for request in sorted(self._waiting, key=lambda r: r.episode not in self._slots.home):
            slot = self._slots.claim(request.episode) if budget > 0 else None
            if slot is None:
                left.append(request)
                continue
            source, kept = self._reuse(slot, request)
            if source is not None and any(row.slot == source.index for row in rows):
                self._prefill(rows)
                rows = []
            if source is not None:
                self._decoder.copy_kv(source.index, slot.index, kept)
            slot.keep((source or slot).ids[:kept])
            fed = request.ids[kept:-1]
            budget -= len(fed)
            if fed:
                rows.append(Row(slot.index, kept, fed))
            self._start(slot, request, fed)
        self._waiting = left
        self._prefill(rows)
        self._running.sort(key=lambda slot: slot.index)

    def _start(self, slot: Slot[_Request], request: _Request, fed: list[int]) -> None:
        slot.ids.extend(fed)
        # The last prompt token goes through the next decode step with everyone else's, which yields its logits.
        slot.pending = request.ids[-1]
        slot.request = request
        request.begin()
        self._running.append(slot)

    def _reuse(self, slot: Slot[_Request], request: _Request) -> tuple[Slot[_Request] | None, int]:
        """How many prompt tokens need no prefill: the slot's own, or those of another slot (the first answer)."""
        most = len(request.ids) - 1
        source, kept = None, common(slot.ids, request.ids, most)
        if not slot.ids and (donor := self._slots.donor(request.ids, most)):
            source, kept = donor
        self._counts["reused_tokens" if source is None else "shared_tokens"] += kept
        self._counts["prefilled_tokens"] += len(request.ids) - kept
        return source, kept

    def _prefill(self, rows: list[Row]) -> None:
        self._clock.enter("prefill")
        most = PASS if self.config.device == "cpu" else self.config.prefill_tokens
        for part in _parts(rows, [len(row.token_ids) for row in rows], most):
            self._decoder.prefill(part)

    def _step(self) -> None:
        """One token for every running row."""
        self._clock.enter("decode")
        began = time.perf_counter()
        slots = self._running
        requests = [slot.request for slot in slots if slot.request is not None]
        logits = self._decoder.step([s.pending for s in slots], [s.index for s in slots], [len(s.ids) for s in slots])
        uniform = [request.uniform[len(request.tokens)] for request in requests]
        samplings = [request.sampling for request in requests]
        tokens, logprobs = draw(logits, [s.temperature for s in samplings], [s.top_p for s in samplings], uniform)
        if not math.isfinite(sum(logprobs)):
            raise ArithmeticError(f"version {self._version} gives NaN or infinite logits")
        self._counts["steps"] += 1
        self._counts["decoded_tokens"] += len(slots)
        done: list[tuple[Slot[_Request], Finish]] = []
        for slot, request, token, logprob in zip(slots, requests, tokens, logprobs, strict=True):
            slot.ids.append(slot.pending)
            if request.prompt_digest is None:
                request.prompt_digest = digest(slot.ids)
            request.tokens.append(token)
            request.logprobs.append(logprob)
            request.versions.append(self._version)
            slot.pending = token
            if token in request.sampling.stop_ids:
                done.append((slot, "stop"))
            elif len(request.tokens) == request.most:
                done.append((slot, "length"))
        for slot, finish in done:
            self._finish(slot, finish)
        self._paced(len(requests), began)

    def _finish(self, slot: Slot[_Request], finish: Finish) -> None:
        request = slot.request
        assert request is not None, "an idle slot can't finish"
        self._slots.rest(slot)
        self._running.remove(slot)
        self._counts["completions"] += 1
        if request.prompt_digest is None:
            request.prompt_digest = digest([*slot.ids, slot.pending])
        request.finish(finish)


def _parts(items: list[T], sizes: list[int], most: int) -> list[list[T]]:
    """Cut a list into parts whose sizes add up to at most `most`, or that have one item."""
    parts: list[list[T]] = []
    room = 0
    for item, size in zip(items, sizes, strict=True):
        if size > room or not parts:
            parts.append([])
            room = most
        parts[-1].append(item)
        room -= size
    return parts
