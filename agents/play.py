"""Play tasks of an environment with a policy behind an endpoint, many at once, and count."""

from __future__ import annotations

import json
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agents.chat import Calling, run_chat_episode
from agents.episode import run_episode
from agents.prompts import STYLES
from agents.trajectory import Trajectory
from envs.errors import nearest
from envs.registration import make
from policy import renderer as rendering
from policy.completion import Sampling
from policy.endpoint import ChatPolicy, Endpoint, EndpointPolicy


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is played, and how."""

    env: str
    """Registered id, or `module:Class`."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Constructor arguments of the environment."""
    split: str = "validation"
    first: int = 0
    """Index of the first task."""
    tasks: int = 20
    samples: int = 1
    """Episodes of each task."""
    episodes: int = 8
    """Episodes at once."""
    retries: int = 2
    """Fresh tries of an episode that was lost to infrastructure."""
    tokenizer: str = ""
    """Model directory with tokenizer.json: play on the token level, with exact trajectories; empty: chat messages."""
    style: str = "cwm"
    """How an agent words things (`agents/prompts.py`)."""
    calling: Calling = "text"
    """Chat level: how tools are called (`agents/chat.py`)."""
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 4096
    """Most tokens of a turn; the task's bound may be lower."""
    max_context: int = 0
    """Most tokens of an episode; the task's and the server's bounds may be lower; 0: those alone."""
    max_turns: int = 0
    """Most actions of an episode, likewise."""
    seed: int = 0
    """With a task's index and the sample's, seeds each episode's sampling where the server honours seeds."""

    def __post_init__(self) -> None:
        for name in ("tasks", "samples", "episodes", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        for name in ("first", "retries", "max_context", "max_turns"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must not be negative")
        if self.style not in STYLES:
            raise ValueError(f"--style {self.style!r}: one of {', '.join(STYLES)}.{nearest(self.style, STYLES)}")
        if self.tokenizer and self.calling == "json":
            raise ValueError("--tools json: only messages have tool calls; leave out --tokenizer, or --tools")


Play = Callable[[int, int, int], Trajectory]
"""(task index, sample, attempt) → episode."""


def player(plan: Plan, endpoint: Endpoint) -> Play:
    """Who plays a plan's episodes. Asks the server which model and context it has; errors as `Endpoint.model`."""
    make(plan.env, **plan.kwargs).close()  # a bad id or argument fails here
    renderer = rendering.load(plan.tokenizer) if plan.tokenizer else None
    tokens, chat = EndpointPolicy(endpoint), ChatPolicy(endpoint)
    bounds = [n for n in (plan.max_context, endpoint.model()[1]) if n]

    def play(index: int, sample: int, attempt: int) -> Trajectory:
        seed = zlib.crc32(f"{plan.seed}/{plan.split}/{index}/{sample}".encode()) & 0x7FFFFFFF
        sampling = Sampling(temperature=plan.temperature, top_p=plan.top_p, max_tokens=plan.max_tokens, seed=seed)
        env = make(plan.env, **plan.kwargs)
        common: dict[str, Any] = {
            "episode": f"play/{plan.split}/{index}/{sample}.{attempt}",
            "seed": index,
            "options": {"split": plan.split},
            "sample": sample,
            "style": plan.style,
            "max_context": min(bounds, default=0),
            "max_turns": plan.max_turns,
        }
        if renderer:
            return run_episode(env, tokens, renderer, sampling, **common)
        return run_chat_episode(env, chat, sampling, calling=plan.calling, **common)

    return play


def played(plan: Plan, play: Play) -> Iterator[Trajectory]:
    """Every episode of the plan as it ends; one that is lost to infrastructure is tried again.

    The first other error ends it: nothing more begins, what runs is played to its end and yielded, then it is raised.
    """
    todo = [(plan.first + index, sample) for index in range(plan.tasks) for sample in range(plan.samples)]
    waiting, running = iter(todo), set[Future[Trajectory]]()
    failed: BaseException | None = None

    def tries(index: int, sample: int) -> Trajectory:
        for attempt in range(plan.retries):
            if (trajectory := play(index, sample, attempt)).reward is not None:
                return trajectory
        return play(index, sample, plan.retries)

    with ThreadPoolExecutor(plan.episodes) as pool:
        while True:
            while not failed and len(running) < plan.episodes and (order := next(waiting, None)):
                running.add(pool.submit(tries, *order))
            if not running:
                break
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                if error := future.exception():
                    failed = failed or error
                else:
                    yield future.result()
    if failed:
        raise failed


def run(plan: Plan, endpoint: Endpoint, out: Path | None, say: Callable[[str], object] = print) -> dict[str, Any]:
    """Play a plan, a line for each episode; the summary. out: directory for `trajectories.jsonl`, written as they end.

    An error that ended it early is in the summary's `error`, unless nothing had been played yet: then it is raised.
    """
    play, began = player(plan, endpoint), time.monotonic()
    of, found, error = plan.tasks * plan.samples, list[Trajectory](), ""
    file = None
    if out:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / "trajectories.jsonl").open("w")
    try:
        for trajectory in played(plan, play):
            found.append(trajectory)
            if file:
                file.write(trajectory.to_json() + "\n")
                file.flush()
            say(f"[{len(found)}/{of}] {_line(trajectory)}")
    except ValueError as stopped:
        if not found:
            raise
        error = str(stopped)
    finally:
        if file:
            file.close()
    outcomes = Counter(t.outcome for t in found)
    return {
        "ok": not error and len(found) == of and outcomes["infra"] < of,
        "error": error,
        "env": plan.env,
        "split": plan.split,
        "model": endpoint.model()[0],
        "endpoint": endpoint.config.url,
        "level": "tokens" if plan.tokenizer else "chat",
        "planned": of,
        "played": len(found),
        "resolved": outcomes["resolved"],
        "rate": outcomes["resolved"] / of,
        "outcomes": dict(outcomes),
        "stops": dict(Counter(t.stop for t in found)),
        "usage": endpoint.meter.read(),
        "seconds": round(time.monotonic() - began, 3),
        "episodes": [_row(t) for t in found],
    }


def _row(trajectory: Trajectory) -> dict[str, Any]:
    names = ("task_id", "sample", "outcome", "stop", "reward", "turns")
    return {name: getattr(trajectory, name) for name in names} | {"why": trajectory.info.get("why", "")}


def _line(trajectory: Trajectory) -> str:
    why = f": {trajectory.info['why']}" if trajectory.outcome == "infra" else ""
    seconds = trajectory.info.get("seconds", 0.0)
    return (
        f"{trajectory.task_id} #{trajectory.sample}: {trajectory.outcome} "
        f"({trajectory.stop}, {trajectory.turns} turns, {seconds:.1f} s){why}"
    )


def summary(found: Mapping[str, Any]) -> str:
    """The last line for people."""
    usage, outcomes = found["usage"], found["outcomes"]
    cost = f", cost {usage['cost']:.4f}" if usage["cost"] else ""
    lost = f", {outcomes['infra']} lost to infrastructure" if outcomes.get("infra") else ""
    left = f", {found['planned'] - found['played']} not played" if found["played"] < found["planned"] else ""
    return (
        f"{found['model']}: {found['resolved']} of {found['planned']} resolved ({found['rate']:.1%}){lost}{left}; "
        f"{usage['calls']} calls, {usage['retries']} retries, {usage['prompt_tokens']:,} tokens read, "
        f"{usage['completion_tokens']:,} written{cost}; {found['seconds']:.1f} s"
    )


def save(found: Mapping[str, Any], path: Path) -> None:
    """The summary as JSON."""
    path.write_text(json.dumps(found, indent=1) + "\n")
