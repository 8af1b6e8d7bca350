"""One part of `gpu.py` in a process of its own, which begins with an empty card: PART JSON; prints one line of JSON.

JSON has `recipe` and `overrides`, by which engine and learner are built as a run builds them, and the part's own numbers.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from agents.trajectory import Trajectory
from policy.completion import Sampling
from policy.models import ModelConfig, build, save
from policy.words import word_tokenizer
from rl.batch import Row
from rl.config import Config, load
from rl.memory import Shape, learner
from rl.metrics import read
from rl.parts import LearnerPart, engine_part
from rl.plan import layout_of

OBSERVATION = 64
"""Tokens read between two turns."""


def make(config: Config, *, preset: str, size: Mapping[str, Any]) -> dict[str, Any]:
    """A model directory with random weights and words as its tokens."""
    device, directory = config.learn.device, config.model
    model = build(ModelConfig(name=preset, **size), dtype=_dtype(config), device=device)
    save(model, directory)
    word_tokenizer(int(model.config.vocab_size)).save(str(directory / "tokenizer.json"))
    return {"parameters": sum(p.numel() for p in model.parameters())}


def serve(config: Config, *, episodes: int, prompt: int, tokens: int, turns: int) -> dict[str, Any]:
    """Seconds of `episodes` that all play `turns` at once, and what the engine counted."""
    with engine_part(config) as engine:
        _play(engine, "warm", _vocabulary(config), prompt, 4, 1)
        before, began = engine.stats(), time.perf_counter()
        sampled = _together(engine, config, episodes, prompt, tokens, turns)
        seconds, after = time.perf_counter() - began, engine.stats()
    counted: dict[str, Any] = {
        k: after[k] - before[k] for k in ("decoded_tokens", "prefilled_tokens", "reused_tokens") if k in after
    }
    return {"seconds": seconds, "sampled": sampled, **counted}


def publish(config: Config, *, episodes: int, prompt: int, tokens: int, times: int, length: int) -> dict[str, Any]:
    """Weights of a learner go to the engine beside it while episodes are sampled; then both score the same sequences."""
    rng, vocabulary = random.Random(0), _vocabulary(config)
    part = LearnerPart(config)
    with engine_part(config) as engine:
        stop, found = threading.Event(), []

        def sample() -> None:
            while not stop.is_set():
                _together(engine, config, episodes, prompt, tokens, 1)

        busy = threading.Thread(target=sample)
        busy.start()
        try:
            for version in range(1, times + 1):
                before, began = engine.stats()["swap"], time.perf_counter()
                _, weights = part.weights()
                gathered = time.perf_counter()
                engine.publish(version, weights)
                ended = time.perf_counter()
                stalled = engine.stats()["swap"] - before
                found.append({"gather": gathered - began, "publish": ended - gathered, "stalled": stalled})
        finally:
            stop.set()
            busy.join()
        texts = [[rng.randrange(vocabulary) for _ in range(length)] for _ in range(8)]
        pairs = zip(engine.score(texts), part.score(texts), strict=True)
        gaps = [abs(a - b) for mine, theirs in pairs for a, b in zip(mine, theirs, strict=True)]
    return {"publishes": found, "gap_max": max(gaps), "gap_mean": sum(gaps) / len(gaps)}


def learn(config: Config, *, tokens: int, steps: int) -> dict[str, Any]:
    """Seconds of learner steps on rows of the recipe's whole context, and memory: the peak, and what was foretold."""
    context, vocabulary = config.policy.max_context, _vocabulary(config)
    positions = json.loads((config.model / "config.json").read_text())["max_position_embeddings"]
    if context > positions:
        raise ValueError(f"policy.max_context={context} is more than the {positions} positions of the model")
    rng, part = random.Random(0), LearnerPart(config)
    texts = [[rng.randrange(vocabulary) for _ in range(context)] for _ in range(max(1, tokens // context))]
    rows = [_row(text, scores, i) for i, (text, scores) in enumerate(zip(texts, part.score(texts), strict=True))]
    seconds = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        part.step(rows)
        seconds.append(time.perf_counter() - began)
    shape = Shape.named(config.model)
    foretold = learner(shape, layout_of(config)).total
    peak = torch.cuda.max_memory_allocated() if config.learn.device == "cuda" else 0
    return {"seconds": seconds[1:], "tokens": len(texts) * context, "peak": peak, "foretold": foretold, "parameters": shape.parameters}  # fmt: skip


def loop(config: Config) -> dict[str, Any]:
    """A whole run, engine and learner on the one card: the rewards of its batches, and the seconds of its steps."""
    from rl.train import check, train

    check(config)
    train(config)
    steps = [row for row in read(config.directory / "metrics.jsonl") if row["kind"] == "step"]
    peak = torch.cuda.max_memory_allocated() if config.learn.device == "cuda" else 0
    files = sorted((config.directory / "trajectories").iterdir())
    return {"rewards": [_rewards(path) for path in files], "walls": [s["wall"] for s in steps], "parity": max(s.get("parity", 0.0) for s in steps), "peak": peak}  # fmt: skip


def _rewards(path: Path) -> list[float]:
    played = map(Trajectory.from_json, path.read_text().splitlines())
    return [t.reward for t in played if t.reward is not None]


def _row(text: Sequence[int], scores: Sequence[float], index: int) -> Row:
    half = len(text) // 2
    return Row(
        token_ids=list(text),
        loss_mask=[0] * half + [1] * (len(text) - half),
        logprobs=list(scores),
        versions=[0] * len(text),
        advantage=1.0 if index % 2 else -1.0,
        trajectory=str(index),
    )


def _together(engine: Any, config: Config, episodes: int, prompt: int, tokens: int, turns: int) -> int:
    vocabulary = _vocabulary(config)
    with ThreadPoolExecutor(episodes) as pool:
        names = [f"{time.monotonic_ns()}/{i}" for i in range(episodes)]
        return sum(pool.map(lambda name: _play(engine, name, vocabulary, prompt, tokens, turns), names))


def _play(engine: Any, name: str, vocabulary: int, prompt: int, tokens: int, turns: int) -> int:
    """One episode of random observations; how many tokens it sampled."""
    rng, sampled = random.Random(name), 0
    ids = [rng.randrange(vocabulary) for _ in range(prompt)]
    for _ in range(turns):
        completion = engine.generate(ids, Sampling(max_tokens=tokens, seed=rng.randrange(1 << 30)), name)
        sampled += len(completion.token_ids)
        ids = [*ids, *completion.token_ids, *(rng.randrange(vocabulary) for _ in range(OBSERVATION))]
    engine.release(name)
    return sampled


def _vocabulary(config: Config) -> int:
    return int(json.loads((config.model / "config.json").read_text())["vocab_size"])


def _dtype(config: Config) -> torch.dtype:
    return torch.bfloat16 if config.learn.dtype == "bf16" else torch.float32


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "make": make,
    "serve": serve,
    "publish": publish,
    "learn": learn,
    "loop": loop,
}


def main(name: str, text: str) -> None:
    """Run one part."""
    given = json.loads(text)
    config = load(given.pop("recipe"), given.pop("overrides"))
    print(json.dumps(PARTS[name](config, **given)))


if __name__ == "__main__":
    main(*sys.argv[1:])
