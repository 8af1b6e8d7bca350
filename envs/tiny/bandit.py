"""`codeworld/TokenBandit-v0`: say words; the reward is the share of them that belong to a hidden set.

A task for models with random weights, which solve nothing that has to be understood: every episode earns something, groups
differ, and a policy that learns at all learns this. With a tokenizer whose tokens are words (`policy/words.py`) it is the
share of sampled ids.
"""

from __future__ import annotations

import zlib
from typing import Any

from envs.env import Env, StopReason


class TokenBandit(Env):
    """One turn of `length` words, all tasks alike.

    Example::

        env = TokenBandit(share=0.25, length=32)
        env.reset(seed=0)
        env.step("w7 w12 w900")  # a reward of k / 32 for k words of the set
    """

    def __init__(self, share: float = 0.25, length: int = 32, secret: str = "bandit") -> None:
        """share: of all words that are in the set, and so the mean reward of a policy that knows nothing.
        length: words of a full answer; fewer earn less. secret: names the set."""
        if not 0 < share < 1 or length < 1:
            raise ValueError(f"share={share}, length={length}: give a share between 0 and 1, and at least one word")
        self.share, self.length, self.secret = share, length, secret
        self.turn_tokens, self.context_tokens = length, 4 * length + 64

    def member(self, word: str) -> bool:
        """Whether a word is in the set."""
        return zlib.crc32(f"{self.secret}/{word}".encode()) < self.share * 2**32

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """The same words for every task."""
        super().reset(seed=seed)
        split = (options or {}).get("split", "train")
        return "Say words.", {"task_id": f"{split}/{self.index(seed)}"}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Ends the episode with its reward, 0 to 1."""
        words = action.split()
        hits = sum(map(self.member, words))
        reward = hits / max(self.length, len(words))
        outcome = "resolved" if reward > 0.5 else "unresolved"
        return "", reward, True, False, {"stop": "answered", "outcome": outcome}

    def truncate(self, stop: StopReason) -> tuple[float, dict[str, Any]]:
        """An answer that found no room earns nothing."""
        return 0.0, {"outcome": "unresolved"}
