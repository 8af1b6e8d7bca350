"""Grading: what an attempt is worth, decided outside the agent's sandbox.

    changes ─► filter ─► fresh sandbox: setup files + kept changes + hidden files + sentinels ─► run tests ─► Verdict

The test process shares its interpreter with the attempt's code, so what it prints is a claim. `resolved` needs, together:
an explicit verdict for every expected id, an exit status that agrees with them, and every *sentinel* failed. A sentinel is
a copy of a hidden test whose first assert expects another value, under a random name: code that forges passes wholesale
passes a test and its sentinel, and is `invalid`. What stays open: code that tells sentinels apart at run time (it would have to read the test source or
the caller's frame; such an attempt is not recognised).
"""

from __future__ import annotations

import ast
import difflib
import importlib
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import PurePosixPath

from envs.env import Outcome
from envs.errors import SandboxDead
from envs.sandbox.base import Backend, Changes, Result
from envs.syntax import parse
from envs.task import Task

DROPPED_NAMES = frozenset(
    [
        "conftest.py",
        "pytest.ini",
        "tox.ini",
        "setup.cfg",
        ".coveragerc",
        "sitecustomize.py",
        "usercustomize.py",
        "pyproject.toml",
        "pytest.py",
    ]
)
DROPPED_PARTS = frozenset({".git", "__pycache__", ".pytest_cache"})
DROPPED_SUFFIXES = frozenset({".pyc", ".pyo", ".pth", ".so"})
MAX_PATCH = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How grading ended."""

    outcome: Outcome
    why: str = ""
    """One sentence for people; never shown to the agent."""
    passed: tuple[str, ...] = ()
    """Expected ids that were reported as expected."""
    kept: Changes = field(default_factory=dict)
    """Changes that were graded."""
    dropped: tuple[str, ...] = ()
    """Changed paths that the filter left out."""
    similarity: float = 0.0
    """Patch similarity with the gold patch in [0, 1]; 1 for a resolved attempt."""


def keep(changes: Changes, protected: tuple[str, ...] = ()) -> tuple[dict[str, bytes | None], list[str]]:
    """Split changes into what is graded and what is left out: bytecode, git, path hooks, runner config, protected globs."""
    kept: dict[str, bytes | None] = {}
    dropped, size = [], 0
    for path, change in sorted(changes.items()):
        pure = PurePosixPath(path)
        size += len(change.data or b"")
        bad = pure.name in DROPPED_NAMES or pure.suffix in DROPPED_SUFFIXES or not DROPPED_PARTS.isdisjoint(pure.parts)
        if (
            bad
            or pure.is_absolute()
            or ".." in pure.parts
            or any(fnmatch(path, g) for g in protected)
            or size > MAX_PATCH
        ):
            dropped.append(path)
        else:
            kept[path] = change.data
    return kept, dropped


def _twin(node: ast.Assert) -> ast.Assert:
    """An assert that fails where `node` holds: another expected value where there is a literal one, else its negation.

    The other value comes first because an object that equals everything passes it too, and so gives itself away.
    """
    test = node.test
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq):
        try:
            value = ast.literal_eval(test.comparators[0])
        except ValueError:
            value = ...
        if value is not ...:
            other = not value if isinstance(value, bool) else value + 1 if isinstance(value, int | float) else [value]
            shown = parse(repr(other)).body[0]
            assert isinstance(shown, ast.Expr)
            return ast.Assert(test=ast.Compare(left=test.left, ops=test.ops, comparators=[shown.value]), msg=None)
    return ast.Assert(test=ast.UnaryOp(op=ast.Not(), operand=test), msg=None)


def sentinels(hidden: Mapping[str, bytes], rng: random.Random) -> tuple[dict[str, bytes], dict[str, str]]:
    """Twins of hidden test files that must fail, as files under random names, and twin id → id of its original.

    Only the first assert of each test is kept, so that code for which the original passes fails the twin for certain.
    """
    files, ids = {}, {}
    for path, data in hidden.items():
        tree = parse(data)
        twin = f"{PurePosixPath(path).parent}/test_{rng.getrandbits(48):012x}.py"
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
                asserts = [i for i, s in enumerate(node.body) if isinstance(s, ast.Assert)]
                if asserts:
                    node.body = [*node.body[: asserts[0]], _twin(node.body[asserts[0]])]  # type: ignore[arg-type]
                    original, node.name = node.name, f"test_{rng.getrandbits(48):012x}"
                    ids[f"{twin}::{node.name}"] = f"{path}::{original}"
                else:
                    node.name = "_" + node.name
        files[twin] = ast.unparse(ast.fix_missing_locations(tree)).encode()
    return files, ids


def grade(task: Task, changes: Changes, backend: Backend, *, rng: random.Random | None = None) -> Verdict:
    """Judge an attempt in a fresh sandbox. Raises `InfraError` when the sandbox failed, never for what the attempt did."""
    if task.grader.kind == "swe_bench":
        return importlib.import_module("envs.swe.log_grading").grade(task, changes, backend)  # type: ignore[no-any-return]
    rng = rng or random.SystemRandom()
    kept, dropped = keep(changes, task.grader.protected)
    hidden = task.files(task.grader.hidden)
    twins, originals = sentinels(hidden, rng)
    world = task.files(task.setup)
    for path, data in kept.items():
        if data is None:
            world.pop(path, None)
        else:
            world[path] = data
    world |= {**hidden, **twins}
    files = [*hidden, *twins]
    rng.shuffle(files)
    flags = " --verdicts " if "runner.py" in task.grader.command else " -p no:cacheprovider --noconftest -rA --tb=no "
    sandbox = backend.create(base=task.base, workdir=task.workdir, files=world, limits=task.limits)
    try:
        result = sandbox.run(task.grader.command + flags + " ".join(files), timeout=task.grader.seconds)
    finally:
        sandbox.close()
    if result.cause == "dead":
        raise SandboxDead(f"the grading sandbox of {task.id} died")
    outcome, why, passed = judge(result, task.grader.expected, originals)
    similarity = 1.0 if outcome == "resolved" else patch_similarity(task, kept)
    return Verdict(
        outcome=outcome,
        why=why,
        passed=tuple(passed),
        kept={p: changes[p] for p in kept},
        dropped=tuple(dropped),
        similarity=similarity,
    )


def claims(output: str) -> dict[str, str]:
    """Test id → "pass" or "fail" as reported; an id reported both ways counts as failed."""
    words = {"PASS": "pass", "PASSED": "pass", "FAIL": "fail", "FAILED": "fail", "ERROR": "fail"}
    found: dict[str, str] = {}
    for line in output.splitlines():
        word, _, rest = line.partition(" ")
        test = rest.split(" - ")[0].strip()
        if word in words and "::" in test:
            found[test] = "fail" if found.get(test, words[word]) != words[word] else words[word]
    return found


def judge(result: Result, expected: Mapping[str, str], originals: Mapping[str, str]) -> tuple[Outcome, str, list[str]]:
    """Outcome, reason and passed ids from one test run; `originals` maps sentinels to their tests. Pure."""
    if result.cause == "timeout":
        return "timeout", "the tests ran out of time", []
    found = claims(result.text())
    passed = [t for t, want in expected.items() if found.get(t) == want]
    forged = [t for t, original in originals.items() if found.get(t) == found.get(original) == "pass"]
    if forged:
        return "invalid", f"{originals[forged[0]]} passes and so does its sentinel", passed
    if result.cause != "exit":
        return "unresolved", f"the test process ended by {result.cause}", passed
    wrong = [t for t in expected if t not in passed]
    if wrong:
        missing = [t for t in wrong if t not in found]
        if missing and result.exit == 0:
            return "invalid", f"exit status 0 although {missing[0]} has no verdict", passed
        return "unresolved", f"{len(wrong)} of {len(expected)} tests not as expected, first {wrong[0]}", passed
    if any(t not in found for t in originals):
        return "invalid", "a sentinel has no verdict", passed
    if result.exit != 1:
        return "invalid", f"exit status {result.exit} although sentinels failed", passed
    return "resolved", "", passed


def patch_similarity(task: Task, kept: Mapping[str, bytes | None]) -> float:
    """Mean over the gold patch's files of the sequence ratio between the two unified diffs; a missing side counts 0.

    Source: facebookresearch/cwm `cwm/rl/swerl/similarities.py` (after swe-rl): only files of the gold patch count.
    """
    start, gold = task.files(task.setup), task.files(task.grader.gold)
    ratios = []
    for path, right in gold.items():
        mine = kept.get(path)
        if mine is None:
            ratios.append(0.0)
            continue
        old = start.get(path, b"")
        ratios.append(difflib.SequenceMatcher(None, _hunks(old, mine), _hunks(old, right), autojunk=False).ratio())
    return sum(ratios) / len(ratios) if ratios else 0.0


def _hunks(old: bytes, new: bytes) -> str:
    a, b = (x.decode("utf-8", "replace").splitlines() for x in (old, new))
    lines = difflib.unified_diff(a, b, lineterm="", n=3)
    return "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@")))


def reward_binary(verdict: Verdict) -> float:
    """1 if resolved, else 0."""
    return float(verdict.outcome == "resolved")


def reward_cwm(verdict: Verdict) -> float:
    """+1 resolved; 0 if the patch similarity is at least 0.5; -1 otherwise (CWM, §5.3 hybrid reward). Tampering: -1."""
    if verdict.outcome == "resolved":
        return 1.0
    return 0.0 if verdict.outcome != "invalid" and verdict.similarity >= 0.5 else -1.0


REWARDS = {"cwm": reward_cwm, "binary": reward_binary}
"""Reward functions by name; the worst reward of each is what an episode without a submission gets."""
WORST = {"cwm": -1.0, "binary": 0.0}
