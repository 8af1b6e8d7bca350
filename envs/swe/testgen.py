"""`codeworld/SWE-testgen-v0`: write a script that tells whether an issue is there, without repairing it.

The agent works as in `codeworld/SWE-v0`, on the repository with the bug, and leaves `test_issue.py`. Of its changes only
this file is graded, in fresh sandboxes, one for each tree whose answer is known:

    tree                                                    must say                   else
    as the agent found it                                   "Issue reproduced" only    unresolved
    the same, rewritten so that it behaves as it did        "Issue reproduced" only    invalid
    repaired                                                "Issue resolved" only      unresolved
    repaired, rewritten so that it behaves as it did        "Issue resolved" only      invalid
    repaired, but what was repaired raises when called      not "Issue resolved"       unresolved

The rewritten trees (`envs/swe/decoys.py`) catch a script that decides by a digest, a time stamp, git's state or a piece
of the source; the last one a script that reads the syntax tree and never runs the code. With `gold=False` (at test time,
where the repair is not known) only the first tree is judged, and such scripts pass. What stays open in both: a script
that runs the repaired code, drops what it gives, and decides by the syntax tree or bytecode.

Source: facebookresearch/cwm `cwm/rl/envs/envs/swerl_testgen_tool.py` (the three phrases, the first tree, +1 / -1, 120 s).
"""

from __future__ import annotations

import random
import shlex
from collections.abc import Mapping
from typing import Any

from envs.env import Outcome
from envs.errors import SandboxDead
from envs.sandbox.base import Backend, Changes, FileChange, Result
from envs.swe.decoys import raising, rewritten
from envs.swe.env import SWEEnv
from envs.swe.grading import MAX_PATCH, Verdict
from envs.task import Task

SCRIPT = "test_issue.py"
REPRODUCED, RESOLVED, OTHER = "Issue reproduced", "Issue resolved", "Other issues"
SECONDS = 120.0
"""Wall clock of one run of the script."""
ROOM = 256
"""Tokens that a script may take beside what the task's budget gives, which may be sized for small repairs."""
ASKED = f"""

Leave the bug as it is: your task is to write a test that shows it. Put {SCRIPT} into the root of the repository, a script \
that needs no test framework: `python3 {SCRIPT}` runs the code that the issue is about and prints, for each case that it \
tries, one of these as a line of its own:
{REPRODUCED}   (the code still does what the issue complains about)
{RESOLVED}   (the code does what the issue asks for)
{OTHER}   (neither: another error, say)
The script is judged on copies of this repository to which nothing else of yours is added: with the bug every line must be \
the first, once it is repaired every line must be the second. Decide by what the code does when it runs; how its source \
reads may change. Submit when the script is there."""
BRIEF = f" Leave the bug. Create {SCRIPT}, a script that runs it and prints {REPRODUCED}, {RESOLVED} or {OTHER}."
"""The same for a context of less than 4,096 tokens."""


class SWETestgenEnv(SWEEnv):
    """A repository with a bug, four tools; the script that shows the bug is the answer."""

    def __init__(self, *, gold: bool = True, **kwargs: Any) -> None:
        """
        Args:
            gold: grade on the repaired repository, too. False where the repair must not be used: at test time.
            kwargs: those of `SWEEnv`; the reward "cwm" is +1 / -1 here.
        """
        super().__init__(**kwargs)
        self._gold = gold

    def _begin(self, task: Task) -> str:
        if self._gold and not task.grader.gold:
            raise ValueError(
                f"task {task.id} names no repaired files (grader.gold), on which a script is graded; set gold=False"
            )
        statement = super()._begin(task)
        brief = task.budget.tokens < 4096
        self.turn_tokens, self.context_tokens = self.turn_tokens + ROOM, self.context_tokens + ROOM
        return statement + (BRIEF if brief else ASKED)

    def _grade(self, task: Task, changes: Changes) -> Verdict:
        return grade_script(task, changes, self.backend, gold=self._gold)


def grade_script(
    task: Task, changes: Changes, backend: Backend, *, gold: bool = True, rng: random.Random | None = None
) -> Verdict:
    """Judge the `test_issue.py` among an agent's changes. Raises `InfraError` when a sandbox failed, never for what the
    script did."""
    change = changes.get(SCRIPT)
    outcome, why = _grade(task, change, backend, gold, rng or random.SystemRandom())
    return Verdict(
        outcome=outcome,
        why=why,
        kept={SCRIPT: change} if change else {},
        dropped=tuple(sorted(set(changes) - {SCRIPT})),
        similarity=float(outcome == "resolved"),
    )


def _grade(
    task: Task, change: FileChange | None, backend: Backend, gold: bool, rng: random.Random
) -> tuple[Outcome, str]:
    if change is None or change.data is None:
        return "unresolved", f"there is no {SCRIPT}"
    missing = [phrase for phrase in (REPRODUCED, RESOLVED) if phrase.encode() not in change.data]
    if missing or len(change.data) > MAX_PATCH:
        return "unresolved", f"{SCRIPT} has no {missing[0]!r}" if missing else f"{SCRIPT} is too long"
    repaired: dict[str, bytes | None] = dict.fromkeys(task.grader.gold) if gold else {}
    repaired |= task.files(task.grader.gold) if gold else {}
    result, found = _run(task, {}, change.data, backend, read=tuple(repaired))
    outcome, why = judge(result, REPRODUCED)
    if outcome != "resolved":
        return outcome, why
    for tree, files, wanted in _trees(found, repaired, rng):
        outcome, why = judge(_run(task, files, change.data, backend)[0], wanted)
        if outcome == "unresolved" and "rewritten" in tree:
            outcome = "invalid"
        if outcome != "resolved":
            return outcome, f"{tree}: {why}"
    return "resolved", ""


def _trees(
    found: Mapping[str, bytes | None], repaired: Mapping[str, bytes | None], rng: random.Random
) -> list[tuple[str, Mapping[str, bytes | None], str]]:
    """Name, files on top of the task's, and what the script must say ("": anything but `RESOLVED`)."""
    trees = [("rewritten", rewritten(found, repaired, rng), REPRODUCED)]
    if repaired:
        again = rewritten(repaired, found, rng)
        trees += [("repaired", dict(repaired), RESOLVED)]
        trees += [("repaired and rewritten", {**repaired, **again}, RESOLVED)] if again else []
        trees += [("repaired and raising", raising(repaired, found, rng), "")]
    return [tree for tree in trees if tree[1]]


def _run(
    task: Task, files: Mapping[str, bytes | None], script: bytes, backend: Backend, *, read: tuple[str, ...] = ()
) -> tuple[Result, dict[str, bytes | None]]:
    """One run of the script on the task's tree with `files` on top; and these files as they were before it ran."""
    world = {**task.files(task.setup), **files, SCRIPT: script}
    there = {path: data for path, data in world.items() if data is not None}
    sandbox = backend.create(base=task.base, workdir=task.workdir, files=there, limits=task.limits)
    try:
        found = {path: _read(sandbox, f"{task.workdir}/{path}") for path in read}
        gone = shlex.join(path for path, data in world.items() if data is None)
        command = f"rm -f -- {gone} && python3 {SCRIPT}" if gone else f"python3 {SCRIPT}"
        result = sandbox.run(command, timeout=SECONDS)
    finally:
        sandbox.close()
    if result.cause == "dead":
        raise SandboxDead(f"the grading sandbox of {task.id} died")
    return result, found


def _read(sandbox: Any, path: str) -> bytes | None:
    try:
        return bytes(sandbox.read(path))
    except OSError:
        return None


def judge(result: Result, wanted: str) -> tuple[Outcome, str]:
    """Whether a run said what it must: `wanted`, once or more, and no other phrase; "" stands for anything but `RESOLVED`.
    Pure."""
    if result.cause == "timeout":
        return "timeout", f"{SCRIPT} ran out of time"
    if result.cause != "exit" or result.tail:
        return "unresolved", f"{SCRIPT} ended by {result.cause}" if result.cause != "exit" else "too much output"
    lines = [line.strip() for line in result.text().splitlines()]
    said = [phrase for phrase in (REPRODUCED, RESOLVED, OTHER) if phrase in lines]
    if said == [wanted] or (not wanted and RESOLVED not in said):
        return "resolved", ""
    last = next((line for line in reversed(lines) if line), "nothing")
    return "unresolved", f"it said {' and '.join(said) or last[:200]!r}, not {wanted or 'anything but ' + RESOLVED!r}"
