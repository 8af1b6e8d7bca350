"""Grading: what an attempt is worth, decided outside the agent's sandbox.

    changes ─► filter ─► fresh sandbox: setup + kept changes + hidden files + sentinels ─► run tests ─► Verdict

The test process shares its interpreter with the attempt's code, so what it says is a claim. `resolved` needs, together: an
explicit verdict for every expected id, an exit status that agrees with them, every *sentinel* failed, and every *control*
passed (`envs/swe/sentinels.py`). Verdicts of pytest are sealed records in a file outside the repository
(`envs/swe/reporter.py`), those of the tiny family's runner are lines of its output. There is no network.

What stays open: code that, inside the interpreter, takes the reporter's key out of its memory, or forges *and* tells
sentinels from tests by reading their source (a control equals its test's file) or the caller's frame; values that equal
anything, in tests whose assertions all stand where they may not run (`sentinels.py`). Such an attempt is not recognised.
"""

from __future__ import annotations

import functools
import importlib
import json
import random
import re
import secrets
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from importlib import resources
from pathlib import PurePosixPath

from envs.env import Outcome
from envs.errors import InfraError, SandboxDead
from envs.sandbox.base import Backend, Changes, FileChange, Result, Sandbox
from envs.swe import reporter
from envs.swe.candidate import TEST_PARTS
from envs.swe.sentinels import MOST, Twins, base_id, parameters, twins
from envs.swe.similarity import diffs, patch_similarity
from envs.task import Task

DROPPED_NAMES = frozenset(
    [
        "pytest.ini",
        ".pytest.ini",
        "pytest.toml",
        ".pytest.toml",
        "tox.ini",
        "setup.cfg",
        "pyproject.toml",
        ".coveragerc",
    ]
)
DROPPED_STEMS = frozenset({"conftest", "sitecustomize", "usercustomize"})
DROPPED_PARTS = frozenset({".git", "__pycache__", ".pytest_cache"})
DROPPED_TOPS = frozenset({"pytest", "_pytest"})
DROPPED_SUFFIXES = frozenset({".pyc", ".pyo", ".pth", ".so", ".egg", ".egg-info", ".egg-link", ".dist-info"})
MAX_PATCH = 1 << 20
"""Bytes of the files of an attempt that are kept, with their names."""
MAX_FILE = 16 << 20
"""Bytes of a file of the base, or of the records, that are read."""
_PYTEST = re.compile(
    r"(?:(?P<python>[^\s=]*python[\d.]*)(?P<flags>(?:\s+-[WX]\s+\S+|\s+-[^m\s]\S*)*)\s+-m\s+)?\b(?:pytest|py\.test)(?=\s|$)"
)
_ENVIRONMENT = (
    "unset PYTEST_ADDOPTS PYTEST_PLUGINS PYTEST_CURRENT_TEST PYTHONOPTIMIZE PYTHONSTARTUP PYTHONINSPECT PYTHONWARNINGS; "
    "export PYTHONHASHSEED=0 PYTHONDONTWRITEBYTECODE=1; "
)
_CLEAR = """mapfile -d '' -t gone
for path in "${gone[@]}"; do
  parent=$path
  while [[ $parent == */* ]]; do
    parent=${parent%/*}
    if [[ -L $parent || ( -e $parent && ! -d $parent ) ]]; then rm -f -- "$parent"; fi
  done
  if [[ -e $path || -L $path ]]; then rm -rf -- "$path"; fi
done"""


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
    found: Mapping[str, str] = field(default_factory=dict)
    """Test id → what was reported of it: pass, fail, error, skip, xfail or xpass."""
    seconds: float = 0.0
    """Wall clock of the test run."""
    suspects: tuple[str, ...] = ()
    """Tests that contradict their sentinel or control. Where a right solution has some, a copy of theirs behaves otherwise:
    put them into the task's `quality["untwinned"]`."""
    log: str = ""
    """What the test run printed, for people; never shown to the agent."""


Grade = Callable[[Task, Changes, Backend], Verdict]
"""How an attempt at a task is judged."""


def keep(
    changes: Changes, protected: Collection[str] = (), owned: Collection[str] = ()
) -> tuple[dict[str, FileChange], list[str]]:
    """Split changes into what is graded and what is left out.

    Left out are bytecode, libraries, git, path hooks, package metadata, the configuration of test runners, what matches a
    `protected` glob, the paths `owned` by the hidden tests, what would replace a directory of those, and what exceeds
    `MAX_PATCH`.
    """
    kept: dict[str, FileChange] = {}
    dropped, size = [], 0
    tops = {str(parent) for path in owned for parent in PurePosixPath(path).parents}
    for path, change in sorted(changes.items()):
        pure = PurePosixPath(path)
        more = len(path) + len(change.data or b"")
        bad = (
            pure.name in DROPPED_NAMES
            or not DROPPED_PARTS.isdisjoint(pure.parts)
            or any(PurePosixPath(part).suffix in DROPPED_SUFFIXES for part in pure.parts)
            or any(part.partition(".")[0] in DROPPED_STEMS for part in pure.parts)
            or pure.parts[0].removesuffix(".py") in DROPPED_TOPS
            or pure.is_absolute()
            or ".." in pure.parts
            or path in owned
            or path in tops
            or any(fnmatch(path, g) for g in protected)
            or size + more > MAX_PATCH
        )
        if bad:
            dropped.append(path)
        else:
            kept[path] = change
            size += more
    below = {str(parent) for path in dropped for parent in PurePosixPath(path).parents}
    swaps = [path for path, change in kept.items() if path in below and change.data is not None]
    return {p: c for p, c in kept.items() if p not in swaps}, sorted(dropped + swaps)


def guarded(task: Task) -> tuple[set[str], tuple[str, ...]]:
    """What of the repository is the hidden tests' own: paths, and globs of the `TEST_PARTS` that they lie in, with their
    helpers and data. No path that a right solution changes is."""
    gold = set(task.grader.gold)
    owned = {test.partition("::")[0] for test in task.grader.expected} | set(task.grader.hidden)
    parents = {parent for path in owned for parent in PurePosixPath(path).parents if parent.name in TEST_PARTS}
    trees = [str(parent) for parent in parents if not any(path.startswith(f"{parent}/") for path in gold)]
    globs = tuple(re.sub(r"([\[*?])", r"[\1]", tree) + "/*" for tree in sorted(trees))
    return owned - gold, (*task.grader.protected, *globs)


def filtered(task: Task, changes: Changes) -> tuple[dict[str, FileChange], list[str]]:
    """What of an attempt is graded, and the paths that are left out. Attempts of which the same is kept get the same grade."""
    if task.grader.kind == "swe_bench":
        return importlib.import_module("envs.swe.log_grading").kept_of(task, changes)  # type: ignore[no-any-return]
    owned, globs = guarded(task)
    return keep(changes, globs, owned)


def apply(sandbox: Sandbox, workdir: str, changes: Changes) -> None:
    """Make `changes` in a sandbox in which nothing has run yet: deletions, then files with their modes. A file takes the
    place of a directory or a link, and the other way round. Raises `InfraError` where the sandbox refuses."""
    if not changes:
        return
    paths = "".join(f"{path}\0" for path in changes).encode()
    result = sandbox.run(f"(cd {shlex.quote(workdir)} && {_CLEAR})", timeout=120.0, stdin=paths)
    if not result.ok:
        raise InfraError(f"the changes can't be made in a fresh sandbox: {result.cause} {result.text()[-200:]}")
    for path, change in changes.items():
        if change.data is not None:
            try:
                sandbox.write(f"{workdir}/{path}", change.data, mode=change.mode)
            except OSError as error:
                raise InfraError(f"{path} can't be written in a fresh sandbox: {error.strerror}") from error


def grade(
    task: Task, changes: Changes, backend: Backend, *, rng: random.Random | None = None, most: int = MOST
) -> Verdict:
    """Judge an attempt in a fresh sandbox. most: tests that get a sentinel and a control; with all of them, a right solution
    shows in `suspects` whose copies can't be trusted. Raises `InfraError` when the sandbox failed, never for what the attempt did;
    `ValueError` for a task whose test command is neither pytest's nor the tiny runner's."""
    if task.grader.kind == "swe_bench":
        return importlib.import_module("envs.swe.log_grading").grade(task, changes, backend)  # type: ignore[no-any-return]
    rng = rng or random.SystemRandom()
    grader = task.grader
    kept, dropped = filtered(task, changes)
    hidden = {p: FileChange(task.blob(name, p) if name else None) for p, name in grader.hidden.items()}
    start = task.files(task.setup)
    gold = _gold(task)
    with backend.create(base=task.base, workdir=task.workdir, files=start, limits=task.limits) as sandbox:
        read = functools.partial(_read, sandbox, task, start)
        files = sorted({test.partition("::")[0] for test in grader.expected})
        sources = {path: hidden[path].data if path in hidden else read(path) for path in files}
        old = {path: read(path) for path in (diffs(gold) if isinstance(gold, str) else gold)}
        copies = _twins(task, {path: data for path, data in sources.items() if data}, rng, most)
        apply(sandbox, task.workdir, {**kept, **hidden, **{p: FileChange(data) for p, data in copies.files.items()}})
        result, found = (_run_tiny if is_tiny(task) else _run_pytest)(sandbox, task, files, copies, rng)
    if result.cause == "dead":
        raise SandboxDead(f"the grading sandbox of {task.id} died")
    outcome, why, passed, suspects = judge(result, found, grader.expected, copies)
    usual = task.quality.get("seconds")
    if outcome == "timeout" and usual is not None and usual > grader.seconds / 2:
        raise InfraError(
            f"{task.id}: the tests ran out of {grader.seconds} s, and a right solution takes {usual} s: raise grader.seconds"
        )
    mine = {path: change.data for path, change in kept.items()}
    return Verdict(
        outcome=outcome,
        why=why,
        passed=tuple(passed),
        kept=kept,
        dropped=tuple(dropped),
        similarity=1.0 if outcome == "resolved" else patch_similarity(old, mine, gold),
        found=found,
        seconds=result.wall,
        suspects=tuple(suspects),
        log=result.text(),
    )


def is_tiny(task: Task) -> bool:
    """Whether the tests run under the tiny family's own runner."""
    return "runner.py" in task.grader.command


def _gold(task: Task) -> Mapping[str, bytes | None] | str:
    """A right solution: files, or a unified diff."""
    grader = task.grader
    if grader.gold or not grader.gold_patch:
        return {path: task.blob(name, path) if name else None for path, name in grader.gold.items()}
    return task.blob(grader.gold_patch, "gold_patch").decode("utf-8", "replace")


def _read(sandbox: Sandbox, task: Task, start: Mapping[str, bytes], path: str) -> bytes | None:
    """A file of the repository as the task starts; None where there is none."""
    if path in start or task.base == "host":
        return start.get(path)
    try:
        return sandbox.read(f"{task.workdir}/{path}", limit=MAX_FILE)
    except OSError:
        return None


def _twins(task: Task, sources: Mapping[str, bytes], rng: random.Random, most: int) -> Twins:
    """Of what must pass now, or of what passes; of the tests beside them where validation has shown which copies to trust."""
    passing = tuple(test for test, want in task.grader.expected.items() if want == "pass")
    if is_tiny(task):
        return twins(sources, passing, rng, most=len(passing))
    also = passing if "gold" in task.quality else ()
    wanted = task.grader.fail_to_pass or passing
    return twins(sources, wanted, rng, most=most, also=also, without=task.quality.get("untwinned", ()))


def _run_tiny(
    sandbox: Sandbox, task: Task, files: Sequence[str], copies: Twins, rng: random.Random
) -> tuple[Result, dict[str, str]]:
    names = [*files, *copies.files]
    rng.shuffle(names)
    result = sandbox.run(f"{task.grader.command} --verdicts {' '.join(names)}", timeout=task.grader.seconds)
    return result, claims(result.text())


def _run_pytest(
    sandbox: Sandbox, task: Task, files: Sequence[str], copies: Twins, rng: random.Random
) -> tuple[Result, dict[str, str]]:
    """The expected tests, in their files' order, as they may count on it; then the copies, in any order."""
    home, key = f"/tmp/{secrets.token_hex(8)}", secrets.token_bytes(32)
    command, module = pytest_command(task, f"{home}/launch.py")
    ids = [*copies.sentinels, *copies.controls]
    rng.shuffle(ids)
    ids.sort(key=lambda test: test.partition("::")[0])  # whose names are random
    only = sorted({base_id(test) for test in task.grader.expected}) + ids
    job = {"key": key.hex(), "records": f"{home}/records", "args": [*files, *ids], "only": only, "module": module}
    sandbox.write(f"{home}/launch.py", _launcher())
    script = f"{_ENVIRONMENT}{command}"
    result = sandbox.run(script, timeout=task.grader.seconds, stdin=json.dumps(job).encode())
    if result.cause == "dead":
        return result, {}
    sandbox.kill_all()
    try:
        records = reporter.read(sandbox.read(f"{home}/records", limit=MAX_FILE), key)
    except OSError:
        records = []
    found: dict[str, str] = {}
    for record in records:
        if "id" in record:
            found[record["id"]] = record["outcome"] if record["id"] not in found else "fail"
    if result.cause == "exit" and (not records or records[-1].get("end") != result.exit):
        found = {test: outcome for test, outcome in found.items() if outcome != "pass"}
    return result, found


@functools.cache
def _launcher() -> bytes:
    return resources.files("envs.swe").joinpath("reporter.py").read_bytes()


def pytest_command(task: Task, launcher: str) -> tuple[str, bool]:
    """The task's test command with the launcher in pytest's place, and whether it was `python -m pytest`, which puts the work
    directory on the path. Raises `ValueError` for any other command."""
    command = task.grader.command
    match = _PYTEST.search(command)
    if match is None or command[: match.start()].rstrip().endswith("-m"):
        raise ValueError(
            f"task {task.id}: grader.command={command!r} runs neither pytest nor the tiny runner; make it `python -m pytest …`"
        )
    python = f"{match['python']}{match['flags']}" if match["python"] else "python3"
    return f"{command[: match.start()]}{python} -s {launcher}{command[match.end() :]}", bool(match["python"])


def claims(output: str) -> dict[str, str]:
    """Test id → "pass" or "fail" as the tiny runner printed it; an id that was printed both ways counts as failed."""
    words = {"PASS": "pass", "FAIL": "fail"}
    found: dict[str, str] = {}
    for line in output.splitlines():
        word, _, test = line.partition(" ")
        if word in words and "::" in test:
            found[test] = "fail" if found.get(test, words[word]) != words[word] else words[word]
    return found


def judge(
    result: Result, found: Mapping[str, str], expected: Mapping[str, str], copies: Twins
) -> tuple[Outcome, str, list[str], list[str]]:
    """Outcome, reason, passed ids and suspect tests of one test run, of which `found` was reported. Pure."""
    if result.cause == "timeout":
        return "timeout", "the tests ran out of time", [], []
    passed = [test for test, want in expected.items() if found.get(test) == want]
    forged = _contradictions(found, copies.sentinels, ("pass", "xpass"))
    spared = _contradictions(found, copies.controls, ("fail", "error", "skip", "xfail", "xpass"))
    suspects = sorted({*forged, *spared})
    if forged:
        return "invalid", f"{forged[0]} passes and so does its sentinel", passed, suspects
    if spared:
        return "invalid", f"{spared[0]} passes and an exact copy of it does not", passed, suspects
    if result.cause != "exit":
        return "unresolved", f"the test process ended by {result.cause}", passed, []
    wrong = [test for test in expected if test not in passed]
    missing = [test for test in wrong if test not in found]
    if missing and result.exit == 0:
        return "invalid", f"exit status 0 although {missing[0]} has no verdict", passed, []
    if wrong:
        return "unresolved", f"{len(wrong)} of {len(expected)} tests not as expected, first {wrong[0]}", passed, []
    silent = _silent(found, copies)
    if silent:
        return "invalid", f"a sentinel or control of {silent[0]} has no verdict", passed, silent
    failed = any(outcome in ("fail", "error") for outcome in found.values())
    if result.exit != int(failed):
        return "invalid", f"exit status {result.exit} does not agree with the verdicts", passed, []
    return "resolved", "", passed, []


def _contradictions(found: Mapping[str, str], ids: Mapping[str, str], how: Collection[str]) -> list[str]:
    """Tests that pass and whose copy ended in one of these ways: the copy of the same parameters, or the one for all."""
    passing: dict[str, set[str]] = {}
    for test, outcome in found.items():
        if outcome == "pass":
            passing.setdefault(base_id(test), set()).add(parameters(test))
    wrong: set[str] = set()
    for copy, outcome in found.items():
        original = ids.get(base_id(copy), "")
        if original in passing and outcome in how and parameters(copy) in ("", *passing[original]):
            wrong.add(original)
    return sorted(wrong)


def _silent(found: Mapping[str, str], copies: Twins) -> list[str]:
    """Tests that have a verdict and whose sentinel or control has none."""
    bases, said = {base_id(test) for test in found}, {base_id(test) for test in found if found[test] != "skip"}
    pairs = (*copies.sentinels.items(), *copies.controls.items())
    return sorted({original for copy, original in pairs if original in bases and copy not in said})


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
