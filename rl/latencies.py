"""How long things take, and what episodes are like: from a run's record, or assumed from a model and its hardware.

A run's record (`runs/NAME/`) has all of it: `metrics.jsonl` ends with the seconds of engine and learner and with the pace of
decoding by the number of rows, `trajectories/` says of every turn its tokens and seconds.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from agents.trajectory import Trajectory
from rl.memory import Layout, Shape
from rl.metrics import read


class Turn(NamedTuple):
    """One turn of a played episode."""

    seen: int
    """Tokens before it: the prompt, or the last observation."""
    said: int
    """Tokens that the policy samples."""
    tool: float
    """Seconds that the environment then takes; in the last turn its end and the grading."""


@dataclass(frozen=True, kw_only=True)
class Played:
    """An episode, as it goes in every simulation."""

    boot: float
    """Seconds until the first prompt."""
    turns: tuple[Turn, ...]
    reward: float


Book = Sequence[Sequence[Played]]
"""Groups of episodes: those of one task, which resemble one another."""


@dataclass(frozen=True, kw_only=True)
class Latencies:
    """How long what takes. Seconds are those of a part that has its core or its GPUs to itself."""

    decode: float
    """Seconds of a decode step, whatever its rows: reading the weights, launching."""
    decode_row: float = 0.0
    """Seconds more for each row."""
    prefill: float = 0.0
    """Seconds per prompt token that is new to the engine."""
    swap: float = 0.0
    """Seconds that a publish stops an engine: copying the weights, the parity check."""
    learn: float
    """Seconds per token of the rows in the gradient."""
    publish: float = 0.0
    """Seconds from the end of training until the weights are at the engines."""
    cores: float = math.inf
    """So many of engine and learner compute at full speed at once; the others share. Infinite where each has its GPUs."""


def from_run(directory: Path) -> tuple[Latencies, Book]:
    """Of a finished run. `ValueError` where the directory holds none, or no trajectories."""
    path = directory / "metrics.jsonl"
    rows = read(path) if path.is_file() else []
    end = next((row for row in reversed(rows) if row["kind"] == "end" and row.get("paces")), None)
    if end is None:
        raise ValueError(
            f"no finished run at {directory}: metrics.jsonl has no row of kind end with paces; name another run"
        )
    steps = [row for row in rows if row["kind"] == "step"]
    engine, learner, counts = end["ledgers"]["engine"], end["ledgers"]["learner"], end["counts"]
    base, slope = line([(float(n), seconds / steps, float(steps)) for n, steps, seconds in end["paces"]])
    prompts = counts["prefilled_tokens"] + counts["shared_tokens"]
    trained = sum(row["tokens"] for row in steps)
    latencies = Latencies(
        decode=base,
        decode_row=slope,
        prefill=engine["prefill"] / max(1, prompts),
        swap=(engine["swap"] + engine["score"]) / max(1, counts["swaps"]),
        learn=sum(row["train_seconds"] for row in steps) / max(1, trained),
        publish=learner["publish"] / max(1, len(steps)),
    )
    return latencies, book_of(directory)


def book_of(directory: Path) -> Book:
    """The trained groups of a run, as episodes to play again."""
    groups: dict[tuple[str, str], list[Played]] = {}
    for path in sorted((directory / "trajectories").glob("*.jsonl")):
        for text in path.read_text().splitlines():
            trajectory = Trajectory.from_json(text)
            if trajectory.reward is not None and trajectory.turns and "tool_seconds" in trajectory.info:
                groups.setdefault((path.name, trajectory.task_id), []).append(played(trajectory))
    if not groups:
        raise ValueError(f"no trajectories at {directory}; name a run with keep_trajectories")
    return list(groups.values())


def played(trajectory: Trajectory) -> Played:
    """Its turns: runs of tokens that were seen and said, and the seconds of the environment behind them."""
    runs: list[list[int]] = []  # [seen, said]
    for segment in trajectory.segments:
        for mask, before in zip(segment.loss_mask, [1, *segment.loss_mask], strict=False):
            if before and not mask:
                runs.append([0, 0])
            runs[-1][mask] += 1
    turns = zip((r for r in runs if r[1]), trajectory.info["tool_seconds"], strict=False)
    return Played(
        boot=trajectory.info["boot_seconds"],
        turns=tuple(Turn(seen, said, tool) for (seen, said), tool in turns),
        reward=trajectory.reward or 0.0,
    )


def line(points: list[tuple[float, float, float]]) -> tuple[float, float]:
    """Least squares of y = a + b x over (x, y, weight), both at least 0."""
    total = sum(w for _, _, w in points)
    x0 = sum(x * w for x, _, w in points) / total
    y0 = sum(y * w for _, y, w in points) / total
    spread = sum(w * (x - x0) ** 2 for x, _, w in points)
    slope = sum(w * (x - x0) * (y - y0) for x, y, w in points) / spread if spread else 0.0
    slope = min(max(0.0, slope), y0 / x0 if x0 else 0.0)
    return y0 - slope * x0, slope


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Episodes, where no run has played any. Means; each turn and episode differs by a log-normal factor."""

    turns: float = 0.0
    """0: as many as fill half of the context."""
    prompt_tokens: int = 0
    """0: an eighth of the context."""
    turn_tokens: int = 0
    """Sampled tokens of a turn; 0: a quarter of the most."""
    seen_tokens: int = 0
    """Tokens of an observation; 0: twice those of a turn."""
    tool_seconds: float = 1.0
    boot_seconds: float = 1.0
    spread: float = 0.5
    """Standard deviation of the factor's logarithm."""
    solved: float = 0.5
    """Share of episodes with reward 1; a task's own share is drawn evenly around it."""

    def within(self, context: int, most: int) -> Workload:
        """Without zeros: for a recipe with so much context and at most so many tokens a turn."""
        prompt, said = self.prompt_tokens or context // 8, self.turn_tokens or max(1, most // 4)
        seen = self.seen_tokens or 2 * said
        turns = self.turns or max(1.0, (context / 2 - prompt) / (said + seen))
        return replace(self, turns=turns, prompt_tokens=prompt, turn_tokens=said, seen_tokens=seen)

    def book(self, context: int, groups: int = 64, size: int = 8, seed: int = 0) -> Book:
        """Groups of episodes of at most `context` tokens."""
        rng = random.Random(seed)

        def about(mean: float) -> float:
            return mean * math.exp(rng.gauss(-(self.spread**2) / 2, self.spread))

        def episode(solved: float) -> Played:
            turns: list[Turn] = []
            left, seen = context, self.prompt_tokens
            for _ in range(max(1, round(about(self.turns)))):
                said = min(max(1, round(about(self.turn_tokens))), left - seen)
                if said < 1:
                    break
                turns.append(Turn(seen, said, about(self.tool_seconds)))
                left, seen = left - seen - said, max(1, round(about(self.seen_tokens)))
            return Played(boot=about(self.boot_seconds), turns=tuple(turns), reward=float(rng.random() < solved))

        if self.prompt_tokens >= context:
            raise ValueError(
                f"prompt_tokens={self.prompt_tokens} leaves no room in policy.max_context={context}; lower it"
            )
        width = min(self.solved, 1 - self.solved)
        tasks = [self.solved + rng.uniform(-width, width) for _ in range(groups)]
        return [[episode(solved) for _ in range(size)] for solved in tasks]


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A device's speeds, for a first guess where no run was measured."""

    name: str
    memory: float
    """Bytes of one device."""
    flops: float
    """Operations a second in matrix products, dense, in the numbers of `bytes`."""
    bandwidth: float
    """Bytes a second of its memory."""
    network: float
    """Bytes a second that leave it, to another host."""
    number: int = 2
    """Bytes of a number in matrix products."""


DEVICES = {
    "h100": Hardware(name="h100", memory=80e9, flops=989e12, bandwidth=3.35e12, network=50e9),
    "h200": Hardware(name="h200", memory=141e9, flops=989e12, bandwidth=4.8e12, network=50e9),
    "a100": Hardware(name="a100", memory=80e9, flops=312e12, bandwidth=2.0e12, network=25e9),
    "cpu": Hardware(name="cpu", memory=0.0, flops=30e9, bandwidth=10e9, network=1e9, number=4),
}
"""NVIDIA's data sheets (SXM, bf16 without sparsity; one 400 or 200 Gb/s adapter a device); "cpu" is a rough guess of a core."""

USED = {"flops": 0.4, "bandwidth": 0.75}
"""Shares of the peaks that are reached: 40 % of the operations and 75 % of the bandwidth are what good systems report."""


def trained_token(layout: Layout) -> int:
    """Operations for a trained token, in units of P: forward 2, backward 4 (arXiv 2001.08361, section 2.1), without the
    2 of weights' gradients where those are an adapter's; 2 for what is computed again. A critic takes as many, and 2 for values.
    """
    update = (4 if layout.lora_rank else 6) + 2 * layout.checkpoint
    return 2 * update + 2 if layout.critic else update


def assumed(shape: Shape, device: Hardware, *, tensor_parallel: int, layout: Layout, context: float) -> Latencies:
    """A roofline (Williams et al. 2009): what is limited by memory takes bytes / bandwidth, what is not operations / flops.

    A decode step reads all weights once and each row's KV of `context` tokens; a prompt token costs 2 P operations, a trained
    one what `trained_token` says. A publish sends the weights once, or the adapters, and the engines stand still while they
    copy them.
    """
    p = shape.parameters
    bandwidth, flops = USED["bandwidth"] * device.bandwidth * tensor_parallel, USED["flops"] * device.flops
    weights = p * device.number
    return Latencies(
        decode=weights / bandwidth,
        decode_row=shape.kv_bytes(round(context), device.number) / bandwidth,
        prefill=2 * p / (flops * tensor_parallel),
        swap=2 * weights / bandwidth,
        learn=trained_token(layout) * p / (flops * layout.ranks),
        publish=(shape.adapters(layout.lora_rank) or p) * device.number / (device.network * layout.ranks),
        cores=math.inf,
    )


def mean_context(book: Book) -> float:
    """Tokens that an episode holds on average while it samples."""
    held: list[tuple[float, int]] = []
    for group in book:
        for episode in group:
            at = 0
            for turn in episode.turns:
                at += turn.seen
                held.append((at + turn.said / 2, turn.said))
                at += turn.said
    total = sum(n for _, n in held)
    return sum(at * n for at, n in held) / max(1, total)


def longest(book: Book) -> int:
    """Tokens of the longest episode."""
    return max(sum(turn.seen + turn.said for turn in played.turns) for group in book for played in group)


def facts(book: Book) -> dict[str, Any]:
    """A few means, to print."""
    episodes = [played for group in book for played in group]
    turns = [turn for played in episodes for turn in played.turns]
    return {
        "episodes": len(episodes),
        "turns": len(turns) / len(episodes),
        "seen": sum(t.seen for t in turns) / len(turns),
        "said": sum(t.said for t in turns) / len(turns),
        "tool_seconds": sum(t.tool for t in turns) / len(turns),
        "boot_seconds": sum(p.boot for p in episodes) / len(episodes),
    }
