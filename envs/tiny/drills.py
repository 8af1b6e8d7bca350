"""Drills of `tiny-repairs`: short conversations without noise, written without a sandbox, for the default policy's warm start.

Every observation in them is, byte for byte, what the environment would show (a test plays them there).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

from envs.task import Task
from envs.tiny import runner
from envs.tiny.experts import SUBMIT, bash, patch, read, variants

Message = tuple[str, str]
"""Role and content; "assistant" is the policy, "mistake" is the policy where it is not to be imitated."""

DRILLS_FROM = 2_000_000
"""Index of the first drill's task in the train split; reinforcement learning starts at 1,000,000."""


def module_of(task: Task) -> tuple[str, str, str]:
    """Path, buggy text and right text of the module that a task is about."""
    path = str(task.provenance["module"])
    return path, task.files(task.setup)[path].decode(), task.files(task.grader.gold)[path].decode()


def numbered(text: str) -> str:
    """What `cat -n` prints of a text that ends with a line feed."""
    return "".join(f"{i + 1:6}\t{line}\n" for i, line in enumerate(text.split("\n")[:-1]))


def drill(task: Task) -> list[Message]:
    """The two turns that carry the skill, as messages: read the module, repair the line."""
    path, text, gold = module_of(task)
    wrong, right = text.split("\n"), gold.split("\n")
    at = next(i for i, (a, b) in enumerate(zip(wrong, right, strict=True)) if a != b)
    repair = patch(path, at + 1, wrong[at], right[at])
    return [("user", path), ("assistant", read(path)), ("tool: bash", numbered(text)), ("assistant", repair)]


def runner_says(task: Task, text: str) -> str:
    """What `python3 runner.py` prints when the module reads `text`, without a sandbox: the text is our own generator's."""
    name = f"tests/test_{module_of(task)[0]}"
    test = task.files(task.setup)[name].decode()
    space: dict[str, Any] = {}
    exec(text, space)
    exec(compile("\n" + test.partition("\n")[2], name, "exec"), space)  # its import, left blank
    function = next(f for f in space if f.startswith("test_"))
    try:
        space[function]()
    except Exception as error:
        return f"FAIL {function}: {runner.why(error, name, test)}\n1 failed, 2 passed\n"
    return "3 passed\n"


def sed(action: str, text: str) -> str:
    """What a file that reads `text` is after an action that `experts.patch` wrote."""
    found = re.search(r"'(\d+)s/((?:\\.|[^/])*)/((?:\\.|[^/])*)/'", action)
    assert found is not None, action
    number, old, new = found.groups()
    pattern = re.sub(r"\\(.)|([^.])", lambda m: re.escape(m[1] or m[2]), old)
    lines = text.split("\n")
    lines[int(number) - 1] = re.sub(pattern, re.sub(r"\\(.)", r"\1", new), lines[int(number) - 1], count=1)
    return "\n".join(lines)


def differing(text: str, gold: str) -> list[int]:
    """The lines that are wrong, from 0."""
    pairs = zip(text.split("\n"), gold.split("\n"), strict=True)
    return [i for i, (a, b) in enumerate(pairs) if a != b]


def mistake(task: Task, text: str, rng: random.Random) -> tuple[str, str, str]:
    """A wrong edit of a module that reads `text`, the text it leaves and the failing tests: an edit of a wrong line or
    another, of a token that is there or of one that is not."""
    path, _, gold = module_of(task)
    lines, right = text.split("\n"), gold.split("\n")
    places = [i for i in range(2, len(lines)) if variants(lines[i])]
    while True:
        at = rng.choice(differing(text, gold)) if rng.random() < 0.6 else rng.choice(places)
        old = rng.choice(variants(lines[at])) if rng.random() < 0.4 else lines[at]
        new = right[at] if old != lines[at] and rng.random() < 0.7 else rng.choice(variants(lines[at]))
        if new == old:
            continue
        action = patch(path, at + 1, old, new)
        left = sed(action, text)
        try:
            verdict = runner_says(task, left)
        except SyntaxError:
            continue
        if "failed" in verdict:
            return action, left, verdict


def comeback(task: Task, seed: int) -> list[Message]:
    """A drill that goes wrong once or, in 0.3 of them, twice: a failing test, another look, and in the end repairs of all
    that is wrong, from the top, and the submission. Half of them begin with the task's own statement."""
    path, text, gold = module_of(task)
    rng = random.Random(f"comeback/{seed}/{task.id}")
    messages = drill(task)[:3]
    if rng.random() < 0.5:
        messages[0] = ("user", task.prompt)
    for _ in range(2 if rng.random() < 0.3 else 1):
        action, text, verdict = mistake(task, text, rng)
        messages += [("mistake", action), ("tool: bash", "")]
        messages += [("mistake", bash(task.grader.command)), ("tool: bash", verdict)]
        messages += [("assistant", read(path)), ("tool: bash", numbered(text))]
    lines, right = text.split("\n"), gold.split("\n")
    for i in differing(text, gold):
        messages += [("assistant", patch(path, i + 1, lines[i], right[i])), ("tool: bash", "")]
    return [*messages, ("assistant", SUBMIT)]


def inspection(task: Task, seed: int) -> list[Message]:
    """One turn: read the module, in which each line has one changed token with a probability of 0.35."""
    path, _, gold = module_of(task)
    rng = random.Random(f"inspection/{seed}/{task.id}")
    lines = gold.split("\n")
    for i in range(2, len(lines)):
        if (options := variants(lines[i])) and rng.random() < 0.35:
            lines[i] = rng.choice(options)
    return [("user", path), ("assistant", read(path)), ("tool: bash", numbered("\n".join(lines)))]


KINDS: dict[str, Callable[[Task, int], list[Message]]] = {
    "drill": lambda task, seed: drill(task),
    "comeback": comeback,
    "inspection": inspection,
}
"""What a warm start is made of beside episodes."""
