"""The environment interface: a plain, synchronous `gymnasium.Env` over text turns.

An author writes `reset` and `step`; concurrency is threads, one per episode. Environments speak messages, never token ids.
The training loop resets with `seed=index, options={"split": split}`: equal arguments must give the equal task, as the
members of a group are compared with one another. How an episode ended is `info["stop"]` and `info["outcome"]`; an env that
says nothing gets "submitted" on `terminated`, "turn_limit" on `truncated`, and an outcome from the sign of its return.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, SupportsFloat

import gymnasium
import numpy as np

StopReason = Literal[
    "submitted", "answered", "turn_limit", "context_limit", "format_error", "timeout", "infra", "cancelled"
]
Outcome = Literal["resolved", "unresolved", "invalid", "timeout", "infra"]
STOP_REASONS: tuple[StopReason, ...] = (
    "submitted",
    "answered",
    "turn_limit",
    "context_limit",
    "format_error",
    "timeout",
    "infra",
    "cancelled",
)
OUTCOMES: tuple[Outcome, ...] = ("resolved", "unresolved", "invalid", "timeout", "infra")


class Text(gymnasium.spaces.Space[str]):
    """Any Unicode text up to `max_length` characters (Gymnasium's own `Text` takes only a small alphabet)."""

    def __init__(self, max_length: int = 1 << 20, seed: int | None = None) -> None:
        self.max_length = max_length
        super().__init__(shape=None, dtype=None, seed=seed)

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        """Random printable text of up to 32 characters."""
        size = int(self.np_random.integers(0, min(32, self.max_length) + 1))
        return "".join(chr(c) for c in self.np_random.integers(32, 0x2FF, size=size))

    def contains(self, x: Any) -> bool:
        """A string that is not too long."""
        return isinstance(x, str) and len(x) <= self.max_length

    @property
    def is_np_flattenable(self) -> bool:
        """Text has no fixed-size array form."""
        return False

    def __repr__(self) -> str:
        return f"Text({self.max_length})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Text) and other.max_length == self.max_length

    def __hash__(self) -> int:
        return hash(("Text", self.max_length))


class Env(gymnasium.Env[str, str]):
    """Base of text environments: spaces are set, `fork` is refused unless overridden.

    A whole environment::

        class Echo(envs.Env):
            def reset(self, *, seed=None, options=None):
                super().reset(seed=seed)
                self.word = ["red", "blue"][self.index(seed) % 2]
                return f"Say {self.word}.", {}

            def step(self, action):
                return "", float(self.word in action), True, False, {}
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (Gymnasium's own attribute)
    tools: Sequence[str] = ()
    """Tool names the statement may mention; empty for plain text actions."""
    turn_tokens: int = 64
    """Most tokens of one action, unless the task says otherwise."""
    context_tokens: int = 512
    """Most tokens of the whole episode, unless the task says otherwise."""
    turns: int = 0
    """Most actions of an episode, where the agent is to be told how many are left; 0: it is not."""

    observation_space: gymnasium.spaces.Space[str] = Text()
    action_space: gymnasium.spaces.Space[str] = Text()

    def index(self, seed: int | None) -> int:
        """The task index that a seed stands for: the seed itself, or a draw from `np_random` where there is none."""
        return int(self.np_random.integers(1 << 31)) if seed is None else seed

    def size(self, split: str) -> int | None:
        """After how many task indices the tasks of a split come round again; None: never, or not known."""
        return None

    def truncate(self, stop: StopReason) -> tuple[float, dict[str, Any]]:
        """The agent had to end the episode (its context is full): last reward and info. Override it to grade what is there."""
        return 0.0, {}

    def fork(self, n: int) -> list[Env]:
        """`n` environments that go on from this one's state."""
        raise NotImplementedError(
            f"{type(self).__name__} cannot be forked; implement fork(n) to use it in groups from one state"
        )


Step = tuple[str, SupportsFloat, bool, bool, dict[str, Any]]
"""Observation, reward, terminated, truncated, info: Gymnasium's five-tuple."""


def finite(reward: SupportsFloat) -> float:
    """The reward as a float, never -0.0; NaN, infinities and text are a `ValueError`, as they would poison a whole batch."""
    value = np.nan if isinstance(reward, str | bytes) else float(reward)
    if not np.isfinite(value):
        raise ValueError(f"an environment returned the reward {reward!r}; rewards are finite numbers")
    return value + 0.0
