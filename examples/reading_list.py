"""A whole environment in 30 lines: open every file on a list; the reward is the share that was opened.

python rl/train.py examples/reading_list.toml
"""

import random

import envs

NAMES = ("shop.py", "bank.py", "game.py", "farm.py", "trip.py", "mill.py")


class ReadingList(envs.Env):
    """Three files to `cat`, four turns, partial reward."""

    turn_tokens = 24

    def reset(self, *, seed=None, options=None):
        """Equal seeds give equal lists, so that the members of a group can be compared."""
        super().reset(seed=seed)
        rng = random.Random(f"{(options or {}).get('split')}/{self.index(seed)}")
        self.left, self.turn = rng.sample(NAMES, 3), 0
        return f"Read {', '.join(self.left)}.", {}

    def step(self, action):
        """Whatever is named is read; what is left is listed."""
        self.turn += 1
        self.left, before = [name for name in self.left if f" {name}\n" not in action], len(self.left)
        done = not self.left or self.turn == 4
        info = {"outcome": "resolved" if not self.left else "unresolved", "tool": "bash"}
        return "\n".join(self.left) + "\n", (before - len(self.left)) / 3, not self.left, done and bool(self.left), info
