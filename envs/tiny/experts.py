"""Deliberately imperfect scripted experts of `tiny-repairs`: what the default policy's warm start imitates.

They know the right line (from the task's provenance) and act on it only sometimes. The noise is stated by `Noise`, and it
is of four sorts: a plausible wrong edit (the wrong token turned into another wrong one, or another line changed), an edit of
a neighbouring line, where nothing matches, no edit at all, and giving up: submitting without a test, or in spite of a failing
one. They read with `cat -n` and edit with `sed`, by line number: naming a line takes one token, where the SEARCH of an `edit`
call copies it, which a policy of this size learned last.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest

from envs.task import Task
from envs.tiny.templates import TOKEN, changes


@dataclass(frozen=True, kw_only=True)
class Noise:
    """How imperfect an expert is; each field is a probability."""

    right: float = 0.5
    """An edit makes the right change."""
    wrong_line: float = 0.3
    """A wrong edit hits another line of the same function (else the right token, which it turns into a wrong one)."""
    miss: float = 0.06
    """An edit names a neighbouring line, where it changes nothing."""
    skip: float = 0.06
    """No edit is made at all."""
    test: float = 0.35
    """The tests are run after an edit."""
    retry: float = 0.5
    """A failing test is answered by another look and attempt instead of a submission."""
    detour: float = 0.1
    """The episode starts with `ls` or the tests instead of reading the module."""


def bash(command: str) -> str:
    """A bash action."""
    return f"<tool: bash>\n{command}\n</tool>"


def edit(path: str, search: str, replace: str) -> str:
    """An edit action."""
    return f"<tool: edit>\n{path}\n<<<<<<< SEARCH\n{search}\n=======\n{replace}\n>>>>>>> REPLACE\n</tool>"


def read(path: str) -> str:
    """The action that shows a file with its line numbers."""
    return bash(f"cat -n {path}")


def patch(path: str, number: int, old: str, new: str) -> str:
    """The action that turns line `number` (from 1) of a file from `old` into `new`: the changed tokens with as many before
    them as make the first match the right one. A changed digit is matched by `.`: which it was need not be said."""
    before, after = TOKEN.findall(old), TOKEN.findall(new)
    first = next(i for i, (a, b) in enumerate(zip_longest(before, after)) if a != b)
    tail = next(i for i, (a, b) in enumerate(zip_longest(before[::-1], after[::-1])) if a != b)
    tail = min(tail, len(before) - first, len(after) - first)
    changed = before[first : len(before) - tail]
    wild = "." if len(changed) == 1 and len(changed[0]) == 1 and changed[0].isdigit() else None
    for start in range(first - 1, -1, -1):
        lead, was, becomes = "".join(before[start:first]), "".join(changed), "".join(after[start : len(after) - tail])
        match = re.escape(lead) + (wild or re.escape(was))
        if lead.strip() and re.sub(match, becomes.replace("\\", r"\\"), old, count=1) == new:
            break
    was = re.sub(r"([\\/*.\[\]^$])", r"\\\1", lead) + (wild or re.sub(r"([\\/*.\[\]^$])", r"\\\1", was))
    becomes = re.sub(r"([\\/&])", r"\\\1", becomes)
    return bash(f"sed -i '{number}s/{was}/{becomes}/' {path}")


SUBMIT = "<tool: submit>\n</tool>"


class Expert:
    """One expert on one task: call it with the newest observation, it returns the next action."""

    def __init__(self, task: Task, rng: random.Random, noise: Noise | None = None) -> None:
        self.rng, self.noise = rng, noise or Noise()
        self.path = str(task.provenance["module"])
        self.command = task.grader.command
        text = task.files(task.setup)[self.path].decode()
        self.gold = task.files(task.grader.gold)[self.path].decode().split("\n")
        self.lines = text.split("\n")
        self.bug = next(i for i, (a, b) in enumerate(zip(self.lines, self.gold, strict=True)) if a != b)
        start = max(i for i in range(self.bug) if self.lines[i].startswith("def "))
        end = next((i for i in range(self.bug, len(self.lines)) if not self.lines[i]), len(self.lines))
        self.body = [i for i in range(start + 2, end) if variants(self.lines[i])]
        self.wrong: int | None = None
        self.next: Callable[[str], str] = self._open

    def __call__(self, observation: str) -> str:
        """The next action."""
        return self.next(observation)

    def _open(self, observation: str) -> str:
        if self.rng.random() < self.noise.detour:
            self.next = self._read
            return bash(self.rng.choice(("ls", self.command)))
        return self._read(observation)

    def _read(self, observation: str) -> str:
        self.next = self._attempt
        return read(self.path)

    def _attempt(self, observation: str) -> str:
        self.next = self._after_edit
        if self.wrong is not None:  # take the wrong change back first, unless this edit changes the same line
            line, self.wrong = self.wrong, None
            if line != self.bug:
                self.next = self._attempt
                return self._change(line, self.gold[line])
        roll = self.rng.random()
        if roll < self.noise.skip:
            return self._after_edit(observation)
        if roll < self.noise.skip + self.noise.miss:
            return patch(self.path, self.bug, self.lines[self.bug], self.gold[self.bug])  # one line too high
        if self.rng.random() < self.noise.right:
            return self._change(self.bug, self.gold[self.bug])
        others = [i for i in self.body if i != self.bug]
        options = siblings(self.lines[self.bug], self.gold[self.bug])
        at = self.bug
        if others and (not options or self.rng.random() < self.noise.wrong_line):
            at = self.rng.choice(others)
            options = self.rng.choice(changes_by_token(self.lines[at]))
        options = [t for t in options if t not in (self.gold[at], self.lines[at])]
        self.wrong = at
        return self._change(at, self.rng.choice(options) if options else self.gold[at])

    def _change(self, at: int, new: str) -> str:
        old, self.lines[at] = self.lines[at], new
        return patch(self.path, at + 1, old, new)

    def _after_edit(self, observation: str) -> str:
        if self.rng.random() < self.noise.test:
            self.next = self._after_test
            return bash(self.command)
        return SUBMIT

    def _after_test(self, observation: str) -> str:
        if "failed" not in observation or self.rng.random() >= self.noise.retry:
            return SUBMIT
        return self._read(observation)


def changes_by_token(line: str) -> list[list[str]]:
    """Every one-token change of a line of code, as far as the line alone tells which, by the token that is changed."""
    tokens = TOKEN.findall(line)
    names = sorted({t for t in tokens if t.isidentifier() and len(t) == 1} | ({"out"} if "out" in tokens else set()))
    found = []
    for at, token in enumerate(tokens):
        scope = names if not line.lstrip().startswith("for") and "=" not in tokens[at + 1 : at + 3] else []
        found.append(["".join([*tokens[:at], new, *tokens[at + 1 :]]) for _, new in changes(token, scope)])
    return [options for options in found if options]


def variants(line: str) -> list[str]:
    """The same, in one list."""
    return [option for options in changes_by_token(line) for option in options]


def siblings(line: str, right: str) -> list[str]:
    """The other wrong turns of the token that makes a line wrong. Edits of this sort are of the same kinds as right ones: a
    policy that learns to avoid them need not learn to avoid a kind."""
    found = next((options for options in changes_by_token(line) if right in options), [])
    return [option for option in found if option != right]
