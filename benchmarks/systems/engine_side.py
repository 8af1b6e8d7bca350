"""One side of `engine.py` in a process of its own: SIDE MODEL OPTIONS (JSON); its last line is JSON.

Sides `torch`, `transformers` and `vllm` time their sampling; `proofs` compares what vLLM says with `transformers`.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from policy import models
from policy.completion import Completion, Sampling, digest
from policy.engine import Engine
from policy.weights import state_of


def ids_of(seed: int, count: int, vocabulary: int) -> list[int]:
    """Random token ids."""
    draw = random.Random(seed)
    return [draw.randrange(vocabulary) for _ in range(count)]


def together(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """What the calls return, each made in a thread of its own; the first failure is raised."""
    answers: list[Any] = [None] * len(calls)

    def guarded(at: int) -> None:
        try:
            answers[at] = calls[at]()
        except BaseException as error:
            answers[at] = error

    threads = [threading.Thread(target=guarded, args=(at,)) for at in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return answers


# Speed.


def open_engine(side: str, model: Path, slots: int, context: int, threads: int, prefill: int = 2048) -> Engine:
    """The engine of that name."""
    if side == "vllm":
        from policy.vllm_engine import VllmConfig, VllmEngine

        return VllmEngine(model, VllmConfig(slots=slots, max_context=context, threads=threads, prefill_tokens=prefill))
    from policy.torch_engine import EngineConfig, TorchEngine

    return TorchEngine(models.load(model), EngineConfig(slots=slots, max_context=context, threads=threads))


def timed_engine(side: str, model: Path, o: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each batch size, `repeats` times, every row a caller of its own."""
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    began = time.perf_counter()
    with open_engine(side, model, max(o["batches"]), o["prompt"] + o["new"], o["threads"]) as engine:
        start = time.perf_counter() - began

        def batch(size: int, seed: int) -> float:
            calls = []
            for at in range(size):
                prompt, name = ids_of(1000 * seed + at, o["prompt"], vocabulary), f"{seed}-{size}-{at}"
                sampling = Sampling(max_tokens=o["new"], seed=at)
                calls.append(lambda p=prompt, n=name, s=sampling: engine.generate(p, s, n))
            began = time.perf_counter()
            answers = together(calls)
            seconds = time.perf_counter() - began
            assert all(len(answer.token_ids) == o["new"] for answer in answers)
            for at in range(size):
                engine.release(f"{seed}-{size}-{at}")
            return seconds

        batch(max(o["batches"]), 0)  # warms up
        found = {str(size): [batch(size, 1 + n) for n in range(o["inner"])] for size in o["batches"]}
    return {"seconds": found, "start": start}


def timed_transformers(model: Path, o: dict[str, Any]) -> dict[str, Any]:
    """Seconds of `generate` for each batch size; prompts are of one length, so nothing is padded."""
    torch.set_num_threads(o["threads"])
    loaded = models.load(model)
    vocabulary = loaded.config.vocab_size

    def batch(size: int, seed: int) -> float:
        prompts = torch.tensor([ids_of(1000 * seed + at, o["prompt"], vocabulary) for at in range(size)])
        began = time.perf_counter()
        out = loaded.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            max_new_tokens=o["new"],
            eos_token_id=vocabulary,  # none that is sampled
            pad_token_id=vocabulary,
            top_k=0,
        )
        assert out.shape == (size, o["prompt"] + o["new"])
        return time.perf_counter() - began

    batch(max(o["batches"]), 0)
    return {"seconds": {str(size): [batch(size, 1 + n) for n in range(o["inner"])] for size in o["batches"]}}


# Proofs.


@torch.no_grad()
def scored(model: Any, ids: Sequence[int], temperature: float = 1.0) -> list[float]:
    """Log-probs of each token by one forward pass of `transformers`; 0.0 for the first."""
    tokens = torch.tensor([list(ids)])
    logprobs = (model(tokens).logits[0, :-1] / temperature).log_softmax(-1)
    return [0.0, *logprobs.gather(1, tokens[0, 1:, None])[:, 0].tolist()]


@torch.no_grad()
def replayed(by_version: dict[int, Any], prompt: list[int], said: Completion) -> list[float]:
    """Log-probs under KV that several versions made: `transformers` feeds a token at a time into its own cache, each by the
    version that samples after it; the prompt by the first."""
    from transformers import DynamicCache

    cache, logprobs = DynamicCache(), []
    by_version[said.versions[0]](torch.tensor([prompt[:-1]]), past_key_values=cache)
    for fed, token, version in zip([prompt[-1], *said.token_ids], said.token_ids, said.versions, strict=False):
        logits = by_version[version](torch.tensor([[fed]]), past_key_values=cache).logits[0, -1]
        logprobs.append(float(logits.log_softmax(-1)[token]))
    return logprobs


def apart(left: Sequence[float], right: Sequence[float]) -> float:
    """Largest difference."""
    assert len(left) == len(right)
    return max(abs(a - b) for a, b in zip(left, right, strict=True))


def versions_of(model: Path, count: int) -> dict[int, Any]:
    """The model, and others of its shape whose weights differ a little."""
    found = {}
    for version in range(count):
        found[version] = models.load(model)
        draw = torch.Generator().manual_seed(version)
        if version:
            with torch.no_grad():
                for value in found[version].parameters():
                    value += 0.1 * value.std() * torch.randn(value.shape, generator=draw)
    return found


def proofs(model: Path, o: dict[str, Any]) -> dict[str, Any]:
    """What the real vLLM must show; numbers in nats and seconds."""
    torch.set_num_threads(o["threads"])
    by_version = versions_of(model, 4)
    vocabulary = by_version[0].config.vocab_size
    context = o["prompt"] + o["new"]
    began = time.perf_counter()
    # Prompts come in several steps: less fits into one.
    with open_engine("vllm", model, 8, context, o["threads"], prefill=8) as engine:
        found: dict[str, Any] = {"start": time.perf_counter() - began}
        found["parity"] = _parity(engine, by_version[0], vocabulary, o)
        found |= _in_flight(engine, by_version, vocabulary, o)
        found |= _later(engine, by_version, vocabulary, o)
        found["stats"] = engine.stats()
    return found


def _parity(engine: Engine, model: Any, vocabulary: int, o: dict[str, Any]) -> float:
    """Largest difference of sampled log-probs and `transformers`' own, at three temperatures."""
    prompts = [ids_of(at, 1 + (at * 13) % o["prompt"], vocabulary) for at in range(12)]
    kinds = [Sampling(max_tokens=o["new"], temperature=(1.0, 0.0, 1.7)[at % 3], seed=at) for at in range(12)]
    calls = [lambda at=at: engine.generate(prompts[at], kinds[at], f"parity-{at}") for at in range(12)]
    worst = 0.0
    for prompt, kind, said in zip(prompts, kinds, together(calls), strict=True):
        assert said.prompt_digest == digest(prompt) and said.versions == [0] * len(said.token_ids)
        expected = scored(model, prompt + said.token_ids, kind.temperature or 1.0)[len(prompt) :]
        worst = max(worst, apart(said.logprobs, expected))
    alone = engine.generate(prompts[0], kinds[0], "alone")
    assert len(alone.token_ids) == o["new"]
    return worst


def _in_flight(engine: Engine, by_version: dict[int, Any], vocabulary: int, o: dict[str, Any]) -> dict[str, Any]:
    """Versions 1 and 2 published while six requests run and a seventh is released; then the same scores by both."""
    probes = [ids_of(50 + at, 40, vocabulary) for at in range(3)]
    prompts = [ids_of(100 + at, 9, vocabulary) for at in range(7)]
    publishes, scores = [], [_score_gap(engine, by_version[0], probes)]

    def play(at: int) -> Completion:
        return engine.generate(prompts[at], Sampling(max_tokens=o["new"], seed=at), f"flight-{at}")

    def meanwhile() -> None:
        for version in (1, 2):
            _decode(engine, o["new"] // 4)
            began = time.perf_counter()
            engine.publish(version, state_of(by_version[version]))
            publishes.append(time.perf_counter() - began)
            scores.append(_score_gap(engine, by_version[version], probes))
            if version == 1:
                engine.release("flight-6")

    said = together([*(lambda at=at: play(at) for at in range(7)), meanwhile])[:7]
    gaps = [apart(c.logprobs, replayed(by_version, p, c)) for p, c in zip(prompts[:6], said[:6], strict=True)]
    return {
        "mixed": max(gaps),
        "versions": [c.versions for c in said],
        "finishes": [c.finish for c in said],
        "publish": median(publishes),
        "swap": engine.stats()["swap"] / 2,
        "score": max(scores),
    }


def _decode(engine: Engine, steps: int) -> None:
    """Wait until it has decoded so many steps more."""
    goal, limit = engine.stats()["steps"] + steps, time.monotonic() + 60
    while engine.stats()["steps"] < goal:
        assert time.monotonic() < limit, "the engine does not decode"
        time.sleep(0.001)


def _score_gap(engine: Engine, model: Any, probes: list[list[int]]) -> float:
    return max(apart(mine, scored(model, ids)) for mine, ids in zip(engine.score(probes), probes, strict=True))


def _later(engine: Engine, by_version: dict[int, Any], vocabulary: int, o: dict[str, Any]) -> dict[str, Any]:
    """A second turn reuses its KV, a new episode none of old weights, and `recompute` leaves none at all."""
    prompt = ids_of(7, o["prompt"] // 2, vocabulary)
    first = engine.generate(prompt, Sampling(max_tokens=4, seed=1), "old")
    engine.publish(3, state_of(by_version[3]))
    fresh = engine.generate(prompt, Sampling(max_tokens=4, seed=1), "new")
    before = engine.stats()["reused_tokens"]
    engine.generate([*prompt, *first.token_ids, 1], Sampling(max_tokens=4, seed=1), "old")
    reused = engine.stats()["reused_tokens"] - before
    answers: list[Completion] = []
    ids = ids_of(8, 9, vocabulary)
    runner = threading.Thread(
        target=lambda: answers.append(engine.generate(ids, Sampling(max_tokens=o["new"], seed=2), "recompute"))
    )
    runner.start()
    _decode(engine, o["new"] // 3)
    engine.publish(4, state_of(by_version[0]), recompute=True)
    runner.join()
    late = answers[0].versions.index(4)
    expected = scored(by_version[0], ids + answers[0].token_ids)[len(ids) + late :]
    return {
        "fresh": apart(fresh.logprobs, scored(by_version[3], prompt + fresh.token_ids)[len(prompt) :]),
        "reused": reused,
        "recomputed": apart(answers[0].logprobs[late:], expected),
        "recomputed_at": late,
    }


def main(side: str, model: str, options: str) -> None:
    """See the top."""
    o = json.loads(options)
    if side == "proofs":
        found = proofs(Path(model), o)
    elif side == "transformers":
        found = timed_transformers(Path(model), o)
    else:
        found = timed_engine(side, Path(model), o)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
