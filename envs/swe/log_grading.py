"""Grading by log, as SWE-bench defines it, and what is asked beyond it.

    changes ─► filter ─► fresh sandbox: image + kept changes ─► script ─► log ─► official rule ─► our checks ─► Verdict

A verdict is what SWE-bench 5.0.2 says of the same log, except that an attempt which it calls resolved may be `invalid` here:

- the log holds markers or an exit status that the script didn't write;
- an expected id has a word that is no status, or is an expected failure where no test file speaks of one;
- the *control*: the same script with only the fail-to-pass tests, each made to fail at its end, must report failures. Code
  that forges passes (by printing them, by patching the runner, by ending the process) forges those of the control, too, or
  leaves it without a verdict. It is left out where none of these tests is a function in the test files.

Runner configuration (`conftest.py` and its like) is dropped from an attempt unless the gold patch touches it, and so is what
it changed in files of the test patch. What stays open: code that tells the control apart at run time, for example by reading
the test files.
"""

from __future__ import annotations

import ast
import glob
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from envs.env import Outcome
from envs.errors import SandboxDead
from envs.sandbox.base import Backend, Changes, FileChange, Result
from envs.swe import patches
from envs.swe.grading import MAX_PATCH, Verdict, apply, keep
from envs.swe.grading import grade as any_grade
from envs.swe.log_parsers import END, EXIT, FAILING, PASSING, READERS, START, Report, official, status_of
from envs.swe.similarity import patch_similarity
from envs.task import Task

_QUIET = ("git show", "git status", "git -c core.fileMode=false diff")
"""Lines of official scripts that only inform, at length."""
_PLACE = "/tmp/.evaluation"
_ENVIRONMENT = " ".join(f"{k}='{v}'" for k, v in (patches.GIT | {"PIP_NO_INDEX": "1"}).items())


def instrumented(script: str) -> str:
    """The script as it is run: it tells the tests' exit status as SWE-bench has it do, and ends with that status. Before the
    tests what lies below `_PLACE/late` is put into the work directory, and no trace of that is left there."""
    lines = [line for line in script.split("\n") if not line.startswith(_QUIET)]
    at = next(i for i, line in enumerate(lines) if END in line)
    lines[at : at + 1] = ["CODEWORLD_EXIT=$?", lines[at], f'echo "{EXIT}: $CODEWORLD_EXIT"']
    start = next(i for i, line in enumerate(lines) if START in line)
    lines.insert(start, f"mkdir -p {_PLACE}/late; cp -R {_PLACE}/late/. .; rm -rf {_PLACE}/late")
    return "\n".join([*lines, 'exit "$CODEWORLD_EXIT"']) + "\n"


def grade(task: Task, changes: Changes, backend: Backend) -> Verdict:
    """Judge an attempt at a task whose grader is "swe_bench". Raises `InfraError` when a sandbox failed."""
    return evaluate(task, changes, backend)[0]


def evaluate(task: Task, changes: Changes, backend: Backend) -> tuple[Verdict, Report]:
    """As `grade`, with what the official rule alone says of the log. Raises `ValueError` for a task whose log could not be
    read."""
    script = task.blob(task.grader.script, "script").decode()
    if task.grader.parser not in READERS or START not in script or END not in script:
        raise ValueError(
            f"task {task.id}: its script prints no markers, or its parser {task.grader.parser!r} is none of"
            f" {', '.join(READERS)}; import it again"
        )
    gold = _gold(task)
    kept, dropped = kept_of(task, changes)
    result, before = _run(task, kept, instrumented(script), backend, patches.paths(gold))
    outcome, why, report = judge(task, result)
    if outcome == "resolved":
        why = _forged(task, kept, script, report, backend)
        outcome = "invalid" if why else outcome
    old, mine = ({path: change.data for path, change in side.items()} for side in (before, kept))
    verdict = Verdict(
        outcome=outcome,
        why=why,
        passed=report.passed,
        kept=kept,
        dropped=tuple(dropped),
        similarity=1.0 if outcome == "resolved" else patch_similarity(old, mine, gold),
        seconds=result.wall,
        log=result.text(),
    )
    return verdict, report


def _gold(task: Task) -> str:
    """The gold patch; "" where there is none."""
    return task.blob(task.grader.gold_patch, "gold_patch").decode() if task.grader.gold_patch else ""


def kept_of(task: Task, changes: Changes) -> tuple[dict[str, FileChange], list[str]]:
    """The changes that are graded, and the paths that are not. Runner configuration that gold touches is."""
    kept, dropped = keep(changes, task.grader.protected)
    gold = set(patches.paths(_gold(task)))
    own = [p for p in dropped if p in gold and not patches.unsafe(p) and glob.escape(p) not in task.grader.protected]
    ours = {p for p in own if len(changes[p].data or b"") <= MAX_PATCH}
    graded = {p: FileChange(c.data, c.mode & 0o777) for p, c in changes.items() if p in kept or p in ours}
    return graded, [p for p in dropped if p not in ours]


def judge(task: Task, result: Result) -> tuple[Outcome, str, Report]:
    """Outcome, reason and report of one run of the script, before our own checks but those of the log itself. Pure."""
    if result.cause == "timeout":
        return "timeout", "the tests ran out of time", Report(applied=False)
    log, grader = result.text(), task.grader
    report = official(
        log,
        fail_to_pass=grader.fail_to_pass,
        pass_to_pass=[t for t, want in grader.expected.items() if want == "pass" and t not in set(grader.fail_to_pass)],
        parser=grader.parser,
    )
    if not report.applied:
        cause = f"the script ended by {result.cause}" if result.cause != "exit" else "the log shows no test run"
        return "unresolved", cause, report
    if not report.resolved:
        wrong = report.failed
        return "unresolved", f"{len(wrong)} of {len(grader.expected)} tests not as expected, first {wrong[0]}", report
    status = report.status or {}
    if odd := [t for t, want in grader.expected.items() if want == "fail" and status_of(t, status) not in FAILING]:
        return "unresolved", f"{odd[0]} does not fail, as it does with a right solution", report
    if any(log.count(mark) > 1 for mark in (START, END)) or (result.cause, result.exit) != ("exit", report.exit):
        return "invalid", "the log holds markers or an exit status that the script did not write", report
    if report.ignored:
        return "invalid", f"{report.ignored[0]} has a verdict that is none", report
    return "resolved", "", report


def _run(
    task: Task,
    kept: Mapping[str, FileChange],
    script: str,
    backend: Backend,
    wanted: Iterable[str] = (),
    late: Mapping[str, bytes] | None = None,
) -> tuple[Result, dict[str, FileChange]]:
    """Run a script on the image with changes; its result, and the files at `wanted` as they were before the changes."""
    limits = replace(task.limits, output_kb=4096)
    with backend.create(base=task.base, workdir=task.workdir, files=task.files(task.setup), limits=limits) as sandbox:
        before = patches.originals(sandbox, list(wanted))
        hidden = {path: FileChange(data) for path, data in task.files(task.grader.hidden).items()}
        apply(sandbox, task.workdir, {**kept, **hidden})
        sandbox.write(f"{_PLACE}/eval.sh", script.encode())
        for path, data in (late or {}).items():
            sandbox.write(f"{_PLACE}/late/{path}", data)
        result = sandbox.run(f"{_ENVIRONMENT} bash {_PLACE}/eval.sh 2>&1", timeout=task.grader.seconds)
    if result.cause == "dead":
        raise SandboxDead(f"the grading sandbox of {task.id} died")
    return result, before


def _forged(task: Task, kept: Mapping[str, FileChange], script: str, report: Report, backend: Backend) -> str:
    """Why an attempt that the official rule calls resolved is not believed; empty: it is."""
    status = report.status or {}
    files = test_files(task, backend)
    odd = [test for test in task.grader.fail_to_pass if status_of(test, status) == "XFAIL"]
    if odd and not any(b"xfail" in data.lower() or b"expectedfailure" in data.lower() for data in files.values()):
        return f"{odd[0]} is an expected failure, of which no test file speaks"
    control = control_files(files, task.grader.fail_to_pass)
    if not control:
        return ""
    result, _ = _run(task, kept, instrumented(script), backend, late=control)
    if result.cause == "timeout":
        return "the control ran out of time, which the tests did not"
    seen = official(result.text(), fail_to_pass=(), pass_to_pass=(), parser=task.grader.parser).status or {}
    words = {test: status_of(test, seen) for test in task.grader.fail_to_pass}
    if passing := [test for test, word in words.items() if word in PASSING]:
        return f"{passing[0]} passes, and so does its control, which must fail"
    if FAILING.isdisjoint(seen.values()):  # by any name: a runner may tell a failure apart from the id
        return "the control, which must fail, has no verdict"
    return ""


def test_files(task: Task, backend: Backend) -> Mapping[str, bytes]:
    """The test files as the script has them when the tests start; found once for each task in a pristine sandbox."""
    if task.grader.hidden:
        return task.files(task.grader.hidden)
    key = task.digest + task.base
    if key not in _KNOWN:
        script = task.blob(task.grader.script, "script").decode()
        head = [line for line in script.partition(START)[0].split("\n")[:-1] if not line.startswith(_QUIET)]
        with patches.pristine(task, backend) as sandbox:
            sandbox.write(f"{_PLACE}/eval.sh", ("\n".join(head) + "\n").encode())
            sandbox.run(f"{_ENVIRONMENT} bash {_PLACE}/eval.sh", timeout=task.grader.seconds)
            changes = sandbox.changes()
        while len(_KNOWN) >= 256:
            _KNOWN.pop(next(iter(_KNOWN)), None)
        _KNOWN[key] = {p: c.data for p, c in changes.items() if c.data is not None and p.endswith(".py")}
    return _KNOWN[key]


_KNOWN: dict[str, dict[str, bytes]] = {}


def control_files(files: Mapping[str, bytes], fail_to_pass: Iterable[str]) -> dict[str, bytes]:
    """Test files with the fail-to-pass functions alone, each failing at its end; those that have none are left out. Pure."""
    names = {found[-1] for test in fail_to_pass if (found := re.findall(r"\btest\w*", test.partition("[")[0]))}
    made = {}
    for path, data in files.items():
        try:
            tree = ast.parse(data)
        except (SyntaxError, ValueError, RecursionError):
            continue
        control = _Control(names)
        tree = control.visit(tree)
        if control.hits:
            made[path] = ast.unparse(ast.fix_missing_locations(tree)).encode()
    return made


class _Control(ast.NodeTransformer):
    def __init__(self, names: set[str]) -> None:
        self.names, self.hits = names, 0

    def _function(self, node: Any) -> Any:
        if not node.name.startswith("test"):
            return node
        if node.name not in self.names:
            return ast.Pass()
        self.hits += 1
        about = node.body[:1] if ast.get_docstring(node) is not None else []
        fail = ast.parse("raise AssertionError('control')").body
        node.body = [*about, ast.Try(body=node.body, handlers=[], orelse=[], finalbody=fail)]  # whatever way it ends
        return node

    visit_FunctionDef = visit_AsyncFunctionDef = _function


def grade_patch(task: Task, patch: str, backend: Backend) -> Verdict:
    """Judge a patch: applied in a pristine sandbox, then graded as changes are. One that doesn't apply is unresolved."""
    made = patches.patch_changes(task, patch, backend)
    if made.why:
        return Verdict(outcome="unresolved", why=made.why)
    return any_grade(task, made.changes, backend)
