"""One episode over chat messages, for models that give no token ids: evaluation only, as its trajectory has no tokens.

The sibling of `agents/episode.py`: the same environments, limits and endings. `info["messages"]` is the conversation,
`info["usage"]` what the server counted over all turns. Bounds in tokens are kept by what the server counts, and by a guess
(`policy.endpoint.length`) of what it has not read yet.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import gymnasium

from agents.episode import end, truncate
from agents.prompts import STYLES, TOOL_HELP, spoken
from agents.trajectory import Trajectory
from envs.env import finite
from envs.errors import InfraError
from policy.calls import schema
from policy.completion import Sampling
from policy.endpoint import ChatPolicy, ContextLimit, length

Calling = Literal["text", "json"]
"""How tools are called: in our text protocol, which every model can be told of, or by the server's own tool calls."""
TOLD = (
    "You are a software engineer who repairs a repository. You are in its root, in a Linux sandbox with a persistent shell. "
    "Each turn is exactly one tool call."
)


def run_chat_episode(
    env: gymnasium.Env[str, str],
    policy: ChatPolicy,
    sampling: Sampling,
    *,
    episode: str,
    seed: int,
    options: dict[str, Any] | None = None,
    sample: int = 0,
    style: str = "cwm",
    calling: Calling = "text",
    max_context: int = 0,
    max_turns: int = 0,
) -> Trajectory:
    """Play task `seed` of `options["split"]` to its end. Arguments are those of `agents.episode.run_episode`.

    Never raises `InfraError`; `ValueError` where the server refuses (at the first turn also for its context) and where the
    money is spent. The environment is left closed.
    """
    trajectory, began = Trajectory(task_id=f"{seed}", sample=sample), time.monotonic()
    try:
        most = max_context or 1 << 30, max_turns or 1 << 30
        _play(env, policy, sampling, trajectory, episode, seed, options or {}, style, calling, most)
    except InfraError as error:
        trajectory.reward, trajectory.outcome, trajectory.stop = None, "infra", "infra"
        trajectory.info["why"] = str(error)
    finally:
        env.close()
    trajectory.info["seconds"] = round(time.monotonic() - began, 4)
    return trajectory


def _play(
    env: gymnasium.Env[str, str],
    policy: ChatPolicy,
    sampling: Sampling,
    trajectory: Trajectory,
    episode: str,
    seed: int,
    options: dict[str, Any],
    style: str,
    calling: Calling,
    most: tuple[int, int],
) -> None:
    statement, info = env.reset(seed=seed, options=options)
    trajectory.task_id = str(info.get("task_id", f"{options.get('split', 'train')}/{seed}"))
    trajectory.info |= info.get("provenance", {})
    words, names = STYLES[style], tuple(getattr(env, "tools", ()))
    turn_tokens = min(sampling.max_tokens, getattr(env, "turn_tokens", sampling.max_tokens))
    context = min(int(getattr(env, "context_tokens", 1 << 30)), most[0])
    turns = min(int(getattr(env, "turns", 0)), most[1])
    tools = [schema(name, TOOL_HELP.get(name, name)) for name in names] if calling == "json" else []
    system = TOLD if tools else words.system(names)
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": statement})
    usage = {"prompt": 0, "completion": 0, "cached": 0}
    trajectory.info |= {"messages": messages, "usage": usage}
    used, total = length(messages), 0.0
    while True:
        room = context - used
        if room < 2:
            return truncate(env, trajectory, total, "context_limit")
        seeded = None if sampling.seed is None else (sampling.seed * 1_000_003 + trajectory.turns) & 0x7FFFFFFF
        asked = replace(sampling, max_tokens=min(turn_tokens, room), seed=seeded)
        try:
            reply = policy.reply(messages, asked, episode, tools)
        except ContextLimit:
            if not trajectory.turns:
                raise
            return truncate(env, trajectory, total, "context_limit")
        messages.append(reply.message)
        trajectory.turns += 1
        for name in usage:
            usage[name] += getattr(reply.usage, name)
        used = reply.usage.prompt + reply.usage.completion or length(messages)
        text, reward, terminated, truncated, info = env.step(spoken(reply.text))
        total += finite(reward)
        if terminated or truncated:
            return end(trajectory, total, terminated, info)
        if trajectory.turns >= most[1]:
            return truncate(env, trajectory, total, "turn_limit")
        heard = _heard(reply.message, words.observation(text, turns - trajectory.turns, context - used))
        messages += heard
        used += length(heard)


def _heard(answer: Mapping[str, Any], observation: str) -> list[dict[str, Any]]:
    """The observation as a message: of the tool that was called (each call wants an answer), else of the user."""
    calls = answer.get("tool_calls") or []
    if not calls:
        return [{"role": "user", "content": observation}]
    return [{"role": "tool", "tool_call_id": str(call.get("id")), "content": observation} for call in calls]
