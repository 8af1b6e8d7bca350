"""A contract that an author can run against an environment: `check_env(env)`.

It runs Gymnasium's own checker and then what the training loop needs beyond it: text spaces, equal tasks for equal seeds,
finite rewards, an end within the turn limit, and `close` twice. Each failure is one sentence that says what to change.
"""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium
from gymnasium.utils.env_checker import check_env as gymnasium_check

from envs.env import OUTCOMES, STOP_REASONS, finite


def check_env(
    env: gymnasium.Env[str, str],
    *,
    actions: tuple[str, ...] = ("", "hello", "<tool: bash>\ntrue\n</tool>"),
    turns: int = 1000,
) -> None:
    """Raise `ValueError` with one sentence if `env` breaks the contract; resets it several times, closes it at the end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            gymnasium_check(env, skip_render_check=True, skip_close_check=True)
        except (AssertionError, TypeError, ValueError, gymnasium.error.Error) as error:
            raise ValueError(f"{type(env).__name__} fails gymnasium.utils.env_checker: {error}") from error
    first, second = _reset(env, 7), _reset(env, 7)
    if first != second:
        raise ValueError(
            f"{type(env).__name__}: reset(seed=7) gave two different statements; members of a group must see equal tasks"
        )
    _play(env, actions, turns)
    env.close()
    env.close()


def _reset(env: gymnasium.Env[str, str], seed: int) -> str:
    observation, info = env.reset(seed=seed, options={"split": "train"})
    if not isinstance(observation, str) or not isinstance(info, dict):
        raise ValueError(
            f"{type(env).__name__}.reset must return (str, dict), not ({type(observation).__name__}, {type(info).__name__})"
        )
    return observation


def _play(env: gymnasium.Env[str, str], actions: tuple[str, ...], turns: int) -> None:
    name = type(env).__name__
    for turn in range(turns):
        observation, reward, terminated, truncated, info = env.step(actions[turn % len(actions)])
        finite(reward)
        if not isinstance(observation, str):
            raise ValueError(f"{name}.step must return text as its observation, not {type(observation).__name__}")
        if terminated or truncated:
            _check_info(name, info)
            return
    raise ValueError(f"{name}: no end after {turns} actions; bound the episode, say by a turn limit")


def _check_info(name: str, info: dict[str, Any]) -> None:
    for key, known in (("stop", STOP_REASONS), ("outcome", OUTCOMES)):
        if key in info and info[key] not in known:
            raise ValueError(f"{name}: info[{key!r}]={info[key]!r} is none of {', '.join(known)}")
