"""One episode, from a task to a trajectory: the specification that every faster path is tested against.

The renderer says what is to be read, the policy samples, the environment acts. The tokens of the trajectory are the tokens
that the engine read and sampled. A failure of the infrastructure ends the episode as data (`stop` and `outcome` "infra", no
reward); a mistake of the environment's author is an exception with its traceback.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import gymnasium

from agents.prompts import STYLES, spoken
from agents.trajectory import Segment, Trajectory
from envs.env import finite
from envs.errors import InfraError
from policy.completion import Policy, Sampling
from policy.renderer import Renderer

Clock = Callable[[str], object]
"""Told what the episode is about to spend its time on: "reset", "wait_policy" or "env" (whose end counts as well)."""


def run_episode(
    env: gymnasium.Env[str, str],
    policy: Policy,
    renderer: Renderer,
    sampling: Sampling,
    *,
    episode: str,
    seed: int,
    options: dict[str, Any] | None = None,
    sample: int = 0,
    style: str = "plain",
    max_context: int = 0,
    max_turns: int = 0,
    clock: Clock = lambda label: None,
) -> Trajectory:
    """Play task `seed` of `options["split"]` to its end.

    sampling: `max_tokens` is the most per turn; the task's own bound may lower it. `seed` and the turn number seed each
    completion where `sampling.seed` is set.
    max_context, max_turns: most tokens and actions of the episode, where that is less than the environment's; 0: no bound.
    Never raises `InfraError`; the environment is left closed.
    """
    trajectory, began = Trajectory(task_id=f"{seed}", sample=sample), time.monotonic()
    marks: list[tuple[str, float]] = []

    def mark(label: str) -> None:
        marks.append((label, time.monotonic()))
        clock(label)

    try:
        most = max_context or 1 << 30, max_turns or 1 << 30
        _play(env, policy, renderer, sampling, trajectory, episode, seed, options or {}, style, most, mark)
    except InfraError as error:
        trajectory.reward, trajectory.outcome, trajectory.stop = None, "infra", "infra"
        trajectory.info["why"] = str(error)
    finally:
        clock("env")
        policy.release(episode)
        env.close()
    marks.append(("end", time.monotonic()))
    spent = [(label, round(end - at, 4)) for (label, at), (_, end) in pairwise(marks)]
    trajectory.info["boot_seconds"] = sum(s for label, s in spent if label == "reset")
    trajectory.info["tool_seconds"] = [s for label, s in spent if label == "env"]
    trajectory.info["seconds"] = round(marks[-1][1] - began, 4)
    return trajectory


def _play(
    env: gymnasium.Env[str, str],
    policy: Policy,
    renderer: Renderer,
    sampling: Sampling,
    trajectory: Trajectory,
    episode: str,
    seed: int,
    options: dict[str, Any],
    style: str,
    most: tuple[int, int],
    clock: Clock,
) -> None:
    clock("reset")
    statement, info = env.reset(seed=seed, options=options)
    trajectory.task_id = str(info.get("task_id", f"{options.get('split', 'train')}/{seed}"))
    trajectory.info |= info.get("provenance", {})
    words = STYLES[style]
    # Bounds of `envs.Env`, which other Gymnasium environments lack.
    turn_tokens = min(sampling.max_tokens, getattr(env, "turn_tokens", sampling.max_tokens))
    context = min(int(getattr(env, "context_tokens", 1 << 30)), most[0])
    turns = min(int(getattr(env, "turns", 0)), most[1])
    dialogue = renderer.open(statement, words.system(getattr(env, "tools", ())), think=words.think)
    total = 0.0
    while True:
        prompt = dialogue.prompt()
        if prompt.branch:
            segment = Segment()
            trajectory.segments.append(segment)
        segment.observe(prompt.token_ids)
        room = context - len(segment)
        if room < 2:
            return truncate(env, trajectory, total, "context_limit")
        asked = replace(
            sampling,
            max_tokens=min(turn_tokens, room),
            stop_ids=renderer.stop_ids,
            seed=None if sampling.seed is None else (sampling.seed * 1_000_003 + trajectory.turns) & 0x7FFFFFFF,
        )
        clock("wait_policy")
        completion = policy.generate(segment.token_ids, asked, episode)
        segment.act(completion)
        trajectory.turns += 1
        if completion.finish == "cancelled":
            raise InfraError("the engine cancelled the episode")
        clock("env")
        action = spoken(dialogue.say(completion.token_ids))
        text, reward, terminated, truncated, info = env.step(action)
        total += finite(reward)
        if terminated or truncated:
            return end(trajectory, total, terminated, info)
        if trajectory.turns >= most[1]:
            return truncate(env, trajectory, total, "turn_limit")
        shown = words.observation(text, turns - trajectory.turns, context - len(segment))
        dialogue.hear(str(info.get("tool", "bash")), shown)


def end(trajectory: Trajectory, total: float, terminated: bool, info: dict[str, Any]) -> None:
    """The environment ended the episode, with its last word `info`; `total` is the sum of its rewards."""
    trajectory.reward = total
    trajectory.stop = str(info.get("stop", "submitted" if terminated else "turn_limit"))
    trajectory.outcome = str(info.get("outcome", "resolved" if total > 0 else "unresolved"))
    trajectory.info |= _kept(info)


def truncate(env: gymnasium.Env[str, str], trajectory: Trajectory, total: float, stop: str) -> None:
    """The agent's own limit ended the episode: graded as it stands where the environment can (`truncate`), else failed."""
    finish: Callable[[str], tuple[float, dict[str, Any]]] | None = getattr(env, "truncate", None)
    reward, info = finish(stop) if finish else (0.0, {})
    trajectory.reward, trajectory.stop = total + finite(reward), stop
    trajectory.outcome = str(info.get("outcome", "unresolved"))
    trajectory.info |= _kept(info)


def _kept(info: dict[str, Any]) -> dict[str, Any]:
    """What is put on record of an environment's last word; `notes` is whatever the environment wants there, as JSON."""
    return {k: info[k] for k in ("why", "similarity", "dropped", "notes") if info.get(k)}
