"""Is a task sound? `python -m envs validate DIR` proves it for each task of a set, before anybody trains on it.

A sound task: the gold solution is resolved `k` times of `k`; doing nothing is never; each fail-to-pass test fails by itself
without the solution, and they pass with it without the rest of the suite; and no cheat pays (`envs/swe/cheats.py`).
Pass-to-pass tests that the gold solution fails now and then are flaky: they leave `expected` and are named in `quality`. What
was found is appended to `DIR/validation.jsonl` task by task, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from envs.errors import InfraError
from envs.sandbox.base import Backend, Changes, FileChange, Sandbox
from envs.swe.cheats import cheats
from envs.swe.discovery import run_suite
from envs.swe.grading import Verdict, apply, filtered, grade
from envs.swe.install import Refused
from envs.swe.ledger import Ledger
from envs.swe.patches import patch_changes
from envs.swe.sentinels import base_id
from envs.task import Task, load_tasks, save_tasks

Fault = Literal["", "gold", "flaky", "no-op", "alone", "cheat", "task", "infra"]
"""What is wrong with a task: its gold solution fails, or only now and then; doing nothing resolves it; a test does not fail
by itself; a cheat pays; it can't be graded at all; or the sandboxes failed, so that nothing is known. "" for nothing."""
MAX_FLAKY = 0.05
"""Share of the expected tests that may be flaky; more, and the task is refused."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What validation says of one task."""

    id: str
    fault: Fault = ""
    why: str = ""
    """One sentence, with the test or the cheat."""
    quality: Mapping[str, Any] = field(default_factory=dict)
    """Written into the task: `gold`, `no_op` (runs), `alone` (tests), `cheats` (name → outcome), `seconds` (median of a gold
    run); where there are any, `flaky` (ids) and `untwinned` (tests of which a copy behaves otherwise)."""
    seconds: float = 0.0
    """That validation took."""

    @property
    def ok(self) -> bool:
        """The task is sound."""
        return not self.fault

    def to_json(self) -> dict[str, Any]:
        """A row of the report."""
        outcome = self.fault or "valid"
        return {"id": self.id, "expected": "valid", "outcome": outcome, "met": self.ok, "why": self.why} | {
            "quality": dict(self.quality),
            "seconds": round(self.seconds, 2),
        }


class _Unsound(ValueError):
    def __init__(self, fault: Fault, why: str) -> None:
        super().__init__(why)
        self.fault: Fault = fault


def validate(task: Task, backend: Backend, *, k: int = 3) -> tuple[Task, Finding]:
    """Prove one task; returns it with its `quality` and without its flaky tests. Never raises for what a task does."""
    began, quality = time.monotonic(), dict[str, Any]()
    fault, why, task = "", "", replace(task, quality={})
    try:
        task = _gold(task, backend, k, quality)
        _no_op(task, backend, k, quality)
        _alone(task, backend, quality)
        _cheats(task, backend, quality)
    except _Unsound as error:
        fault, why = error.fault, str(error)
    except Refused as error:
        fault, why = "alone", str(error)
    except InfraError as error:
        fault, why = "infra", str(error)
    except (ValueError, KeyError) as error:
        fault, why = "task", " ".join(str(error).split())
    finding = Finding(id=task.id, fault=fault, why=why, quality=quality, seconds=time.monotonic() - began)  # type: ignore[arg-type]
    return replace(task, quality=quality | {"valid": finding.ok}), finding


def gold_changes(task: Task, backend: Backend) -> Changes:
    """A right solution as changes of the repository. Raises `ValueError` for a task that names none, or one that does not
    apply."""
    if task.grader.gold:
        files = task.files(task.grader.gold)
        return {path: FileChange(files.get(path)) for path in task.grader.gold}
    if task.grader.gold_patch:
        patch = task.blob(task.grader.gold_patch, "gold_patch").decode("utf-8", "replace")
        patched = patch_changes(task, patch, backend)
        if patched.why:
            raise _Unsound("gold", f"the gold solution: {patched.why}")
        return patched.changes
    raise _Unsound("gold", f"task {task.id} names no gold solution, so nothing can be proved; give gold or gold_patch")


def _gold(task: Task, backend: Backend, k: int, quality: dict[str, Any]) -> Task:
    changes = gold_changes(task, backend)
    verdicts: list[Verdict] = []
    if task.grader.kind == "tests":
        # every test is copied, those beside the failing ones too, as they are in tasks that say "gold"
        verdict = grade(replace(task, quality={"gold": 0}), changes, backend, most=len(task.grader.expected))
        if verdict.suspects:  # a copy of theirs behaves otherwise
            quality["untwinned"] = sorted(verdict.suspects)
            task = replace(task, quality=quality)
        elif verdict.outcome == "resolved":
            verdicts.append(verdict)
    while len(verdicts) < k:
        verdicts.append(grade(task, changes, backend))
        if verdicts[-1].outcome not in ("resolved", "unresolved"):
            raise _Unsound("gold", f"the gold solution is {verdicts[-1].outcome}: {verdicts[-1].why}")
    quality |= {"gold": k, "seconds": round(statistics.median(verdict.seconds for verdict in verdicts), 3)}
    if all(verdict.outcome == "resolved" for verdict in verdicts):
        return task
    missed = [set(task.grader.expected) - set(verdict.passed) for verdict in verdicts]
    flaky = set.union(*missed)
    if flaky & set(task.grader.fail_to_pass) or not flaky or len(flaky) > MAX_FLAKY * len(task.grader.expected):
        always = set.intersection(*missed)
        raise _Unsound(
            "gold" if always or not flaky else "flaky", f"the gold solution is unresolved: {_worst(verdicts)}"
        )
    sound = {test: want for test, want in task.grader.expected.items() if test not in flaky}
    calmer = replace(task, grader=replace(task.grader, expected=sound))
    for _ in range(k):
        if (verdict := grade(calmer, changes, backend)).outcome != "resolved":
            raise _Unsound(
                "flaky", f"without {len(flaky)} flaky tests the gold solution is {verdict.outcome}: {verdict.why}"
            )
    quality["flaky"] = sorted(flaky)
    return calmer


def _worst(verdicts: Iterable[Verdict]) -> str:
    return next(verdict.why for verdict in verdicts if verdict.outcome != "resolved")


def _no_op(task: Task, backend: Backend, k: int, quality: dict[str, Any]) -> None:
    for _ in range(k):
        verdict = grade(task, {}, backend)
        if verdict.outcome == "resolved":
            raise _Unsound("no-op", "doing nothing resolves it")
        known = set(task.grader.fail_to_pass) & set(verdict.passed)
        if known:
            raise _Unsound("no-op", f"{sorted(known)[0]} passes without the solution")
    quality["no_op"] = k


def _alone(task: Task, backend: Backend, quality: dict[str, Any]) -> None:
    tests = task.grader.fail_to_pass
    if task.grader.kind != "tests" or not tests:
        return
    functions = sorted({base_id(test) for test in tests})
    hidden = {path: FileChange(task.blob(name, path) if name else None) for path, name in task.grader.hidden.items()}
    with _fresh(task, backend) as box:
        apply(box, task.workdir, hidden)
        for function in functions:
            run = run_suite(box, task.grader.command, task.grader.seconds, tests=[function])
            for test in tests:
                if base_id(test) == function and run.outcomes.get(test) == "pass":
                    raise _Unsound("alone", f"{test} by itself passes without the solution")
    with _fresh(task, backend) as box:
        apply(box, task.workdir, {**gold_changes(task, backend), **hidden})
        run = run_suite(box, task.grader.command, task.grader.seconds, tests=functions)
        if wrong := [test for test in tests if run.outcomes.get(test) != "pass"]:
            raise _Unsound("alone", f"{wrong[0]} does not pass with the solution when the other tests don't run")
    quality["alone"] = len(tests)


def _fresh(task: Task, backend: Backend) -> Sandbox:
    return backend.create(base=task.base, workdir=task.workdir, files=task.files(task.setup), limits=task.limits)


def _cheats(task: Task, backend: Backend, quality: dict[str, Any]) -> None:
    with _fresh(task, backend) as box:
        patches = cheats(task, lambda path: box.read(f"{task.workdir}/{path}"))
    graded = {frozenset(dict[str, FileChange]().items()): "unresolved"}  # nothing of it is kept: it is the no-op
    outcomes: dict[str, str] = {}
    for name, changes in patches.items():
        kept = frozenset(filtered(task, changes)[0].items())
        if kept not in graded:
            graded[kept] = grade(task, changes, backend).outcome
        outcomes[name] = graded[kept]
        if outcomes[name] == "resolved":
            raise _Unsound("cheat", f"the cheat {name!r} is resolved")
    quality["cheats"] = outcomes


# ---- task sets ----


def validate_set(
    directory: Path,
    backend: Backend,
    *,
    k: int = 3,
    jobs: int = 2,
    report: Callable[[Finding, int, int], None] = lambda *_: None,
) -> list[Finding]:
    """Prove every task of a set. Sound ones get their `quality` in `tasks.jsonl`; the others go to `quarantine.jsonl`.

    report: called with each finding, how many are done, and how many there are.
    Raises `ValueError` for a set that can't be read.
    """
    tasks = load_tasks(directory)
    ledger = Ledger(directory / "validation.jsonl")
    known = {row["digest"]: row for row in ledger.rows()}
    done: dict[str, tuple[Task, Finding]] = {}
    for task in tasks:
        if (row := known.get(_digest(task, k))) is not None:
            done[task.id] = _recall(task, row)
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(validate, task, backend, k=k): task for task in tasks if task.id not in done}
        for future in as_completed(running):
            before = running[future]
            task, finding = done[before.id] = future.result()
            if finding.fault != "infra":  # it is tried again next time
                expected = list(task.grader.expected)
                ledger.append({"digest": _digest(before, k), **asdict(finding), "expected": expected})
            report(finding, len(done), len(tasks))
    save_tasks(
        [done[task.id][0] for task in tasks if done[task.id][1].ok or done[task.id][1].fault == "infra"], directory
    )
    bad = [done[task.id] for task in tasks if done[task.id][1].fault not in ("", "infra")]
    if bad:
        Ledger(directory / "quarantine.jsonl").extend(
            {"why": f.why, "fault": f.fault, "task": t.to_json()} for t, f in bad
        )
    return [done[task.id][1] for task in tasks]


def count(findings: Iterable[Finding]) -> str:
    """`"150 valid; 3 cheat, 1 flaky refused"`."""
    faults = Counter(finding.fault for finding in findings)
    valid = faults.pop("", 0)
    return f"{valid} valid" + (
        f"; {', '.join(f'{n} {fault}' for fault, n in sorted(faults.items()))} refused" if faults else ""
    )


def _digest(task: Task, k: int) -> str:
    return f"{replace(task, quality={}).digest}-{k}"


def _recall(task: Task, row: Mapping[str, Any]) -> tuple[Task, Finding]:
    finding = Finding(**{name: row[name] for name in ("id", "fault", "why", "quality", "seconds")})
    expected = {test: task.grader.expected[test] for test in row["expected"]}
    grader = replace(task.grader, expected=expected)
    return replace(task, grader=grader, quality=dict(finding.quality) | {"valid": finding.ok}), finding
