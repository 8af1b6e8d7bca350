"""Repositories become task sets: `python -m envs build --from SOURCE[,SOURCE…] --tasks mutate:25 --out DIR`.

    source ─► image ─► suite, run twice ─► candidates ─► which tests notice? ─► task ─► validation ─► DIR/tasks.jsonl

A candidate is a bug with its repair, made by mutation (`mutate.py`) or found in history (`history.py`). Its task is the
repository with the bug and without the tests that notice it; those are hidden, and expected to pass, as are other tests of
the suite, as many as fit in `SUITE_SECONDS`. What became of each candidate is a row of `DIR/ledger.jsonl`, written before
the next one counts, so that a run that was killed goes on where it stopped: equal arguments give the equal set.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from envs.errors import InfraError
from envs.sandbox.archives import offer
from envs.sandbox.base import Backend, FileChange, Limits
from envs.sandbox.capture import Tree
from envs.sandbox.imagestore import ImageStore
from envs.swe import discovery, images, sources
from envs.swe.candidate import Candidate, Rejected, is_test
from envs.swe.discovery import Discovery, Run
from envs.swe.failures import failures
from envs.swe.hiding import without_tests
from envs.swe.images import Environment
from envs.swe.install import TESTBED, Refused
from envs.swe.ledger import Ledger
from envs.swe.sentinels import base_id
from envs.swe.statement import leaks, statement
from envs.swe.validate import validate
from envs.task import Grader, Task, save_blobs, save_tasks, sha256, task_from_json

LIMITS = Limits(memory_mb=1024, disk_mb=256, pids=128)
"""Of a task's sandbox."""
SUITE_SECONDS = 0.3
"""Wall clock of the tests of one grading that notice the bug, the quickest first, one at least; and as much of other tests."""
HANGS = 3.0
"""A suite that takes so many times its own wall clock, or says nothing for so many times that of its slowest test, hangs (ten
seconds are added to both); a bug that makes it hang is refused."""
MOST_FAILING = 20
"""Test functions that notice a bug; a candidate that more of them notice breaks the package as a whole."""
TRIES = 6
"""Candidates that are tried for each task that is asked for."""
MAKERS = ("mutate", "history")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to build; equal plans give equal sets."""

    maker: str
    """"mutate" or "history"."""
    count: int
    """Tasks of each source at most."""
    base: str = "codeworld-base"
    """Image that task images stand on."""
    seed: int = 0
    k: int = 3
    """Times that validation repeats what must not vary."""
    jobs: int = 2
    """Candidates tried at once."""
    issues: Path | None = None
    """Of "history": a JSON-lines file of issue texts (`{"id": …, "text": …}`)."""


@dataclass(frozen=True)
class Fate:
    """What became of a candidate."""

    source: str
    candidate: str
    task: Task | None = None
    reason: str = ""
    """One word, by which refusals are counted; "" for a task."""
    why: str = ""
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """A row of the report."""
        outcome = "task" if self.task else self.reason
        found = {"id": self.task.id if self.task else self.candidate, "expected": "task", "outcome": outcome}
        return found | {"met": self.task is not None, "why": self.why, "source": self.source, "seconds": self.seconds}


@dataclass
class Report:
    """What was built."""

    tasks: list[Task] = field(default_factory=list)
    fates: list[Fate] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    """Reason → candidates."""
    sources: dict[str, str] = field(default_factory=dict)
    """Source → how it went, in a line."""


class _No(Exception):
    """A candidate that makes no task."""

    def __init__(self, reason: str, why: str) -> None:
        super().__init__(why)
        self.reason = reason


@dataclass(frozen=True)
class _Repository:
    source: sources.Source
    environment: Environment
    found: Discovery
    tree: Tree
    """What lies at the work directory."""


def parse_plan(text: str) -> tuple[str, int]:
    """ "mutate:25" → ("mutate", 25). Raises `ValueError`."""
    maker, _, count = text.partition(":")
    if maker not in MAKERS or (count and not (count.isdigit() and int(count))):
        raise ValueError(f"--tasks {text}: not of the form mutate:N or history:N; e.g. mutate:25")
    return maker, int(count or 25)


def parse_sources(text: str) -> list[str]:
    """ "pypi:a,b,./c" → ["pypi:a", "pypi:b", "./c"]: a bare name after a package is a package."""
    names: list[str] = []
    for name in filter(None, text.split(",")):
        bare = names and names[-1].startswith("pypi:") and not any(mark in name for mark in ":/.")
        names.append(f"pypi:{name}" if bare else name)
    if not names:
        raise ValueError(f"--from {text!r}: names no source; e.g. pypi:humanize or a path")
    return names


def build(
    names: Sequence[str], plan: Plan, out: Path, backend: Backend, *, cache: Path, report: Callable[[str], None] = print
) -> Report:
    """Build and validate the tasks of every source. A source that can't be built is a line of the report.

    names: see `sources.fetch`. backend: native, as images are built in it. cache: what is fetched is kept there. Raises
    `ValueError` for a base that can't be used.
    """
    builder = _Builder(plan, out, backend, cache, report)
    done = Report()
    for name in names:
        fates = builder.source(name)
        if isinstance(fates, str):
            done.sources[name] = fates
            report(f"{name}: {fates}")
            continue
        tasks = [fate.task for fate in fates if fate.task]
        done.tasks += tasks
        done.fates += fates
        done.refused.update(fate.reason for fate in fates if fate.reason)
        done.sources[name] = f"{len(tasks)} tasks of {len(fates)} candidates"
        save_tasks(done.tasks, out)
        report(f"{name}: {done.sources[name]}")
    save_tasks(done.tasks, out)
    builder.store.retain({task.base for task in done.tasks} | builder.environments)
    return done


class _Builder:
    def __init__(self, plan: Plan, out: Path, backend: Backend, cache: Path, report: Callable[[str], None]) -> None:
        self.plan, self.out, self.backend, self.cache, self.report = plan, out, backend, cache, report
        self.store = ImageStore(out / "images")
        offer(self.store.directory)
        self.base = self.store.add_base(plan.base)
        self.ledger = Ledger(out / "ledger.jsonl")
        self.environments: set[str] = {self.base}
        self.known = {(row["source"], row["candidate"], row["plan"]): row for row in self.ledger.rows()}

    def source(self, name: str) -> list[Fate] | str:
        """The fates of the candidates of one source, or why it has none."""
        began = time.monotonic()
        try:
            source = sources.fetch(name, self.cache)
            env = images.environment(self.store, self.base, source, self.backend, cache=self.cache)
            self.environments |= {env.digest, env.installed}
            self.environments |= set(images.interpreter(self.store, self.base, self.backend, cache=self.cache))
            found = discovery.discover(self.backend, env.digest)
        except (Refused, InfraError) as error:
            return str(error)
        tree = images.repository(self.store, env.digest)
        self.report(
            f"{name}: image {env.digest[7:19]}, {len(found.passing)} tests pass in {found.wall:.1f} s "
            f"({time.monotonic() - began:.0f} s)"
        )
        repository = _Repository(source, env, found, tree)
        fates: list[Fate] = []
        for fate in self._fates(name, repository):
            fates.append(fate)
            if sum(f.task is not None for f in fates) == self.plan.count:
                break
        return fates

    def _candidates(self, repository: _Repository) -> Iterator[Candidate | Rejected]:
        if self.plan.maker == "history":
            from envs.swe.history import mine

            path = repository.source.repository
            if path is None:
                raise ValueError(
                    f"{repository.source.origin}: it has no history; use --tasks mutate:N, or a git repository"
                )
            left: list[Rejected] = []
            for candidate in mine(path, n=self.plan.count * TRIES, issues=self.plan.issues, on_rejected=left.append):
                yield from left
                left.clear()
                yield candidate
            yield from left
            return
        from envs.swe.mutate import mutations

        files = {path: entry.data for path, entry in repository.tree.items() if entry.link is None}
        yield from mutations(files, self.plan.seed, self.plan.count * TRIES)

    def _fates(self, name: str, repository: _Repository) -> Iterator[Fate]:
        """In the candidates' order, a few tried at once."""
        running: deque[Future[Fate]] = deque()
        with ThreadPoolExecutor(self.plan.jobs) as pool:
            try:
                for candidate in itertools.chain(self._candidates(repository), [None] * self.plan.jobs):
                    if candidate is not None:
                        running.append(pool.submit(self._fate, name, repository, candidate))
                    if running and (candidate is None or len(running) > self.plan.jobs):
                        yield running.popleft().result()
            finally:
                for future in running:
                    future.cancel()

    def _fate(self, name: str, repository: _Repository, candidate: Candidate | Rejected) -> Fate:
        if isinstance(candidate, Rejected):
            return Fate(name, candidate.id, reason=candidate.reason.partition(":")[0], why=candidate.reason)
        key = f"{self.plan.maker} {self.plan.seed} {self.plan.k} {repository.environment.digest}"
        if (row := self.known.get((name, candidate.id, key))) is not None:
            return self._recall(row)
        began, task, reason, why = time.monotonic(), None, "", ""
        try:
            task = self._task(repository, candidate)
            task, finding = validate(task, self.backend, k=self.plan.k)
            if not finding.ok:
                raise _No(finding.fault, finding.why)
            save_blobs(task, self.out)
        except (_No, InfraError) as error:
            reason, why, task = getattr(error, "reason", "infra"), str(error), None
        fate = Fate(name, candidate.id, task, reason, why, round(time.monotonic() - began, 2))
        row = asdict(replace(fate, task=None)) | {"plan": key, "task": task.to_json() if task else None}
        if reason != "infra":  # it is tried again next time
            self.ledger.append(row)
        self.report(f"  {candidate.id}: {'task' if task else f'{reason}: {why}'} ({fate.seconds:.0f} s)")
        return fate

    def _recall(self, row: Mapping[str, Any]) -> Fate:
        from envs.task import BlobStore

        task = row["task"] and replace(task_from_json(row["task"]), blobs=BlobStore(self.out / "blobs"))
        return Fate(row["source"], row["candidate"], task, row["reason"], row["why"], row["seconds"])

    def _task(self, repository: _Repository, candidate: Candidate) -> Task:
        """The task of a candidate, not validated yet. Raises `_No`."""
        env, found = repository.environment, repository.found
        tree, image = repository.tree, env.digest
        if candidate.commit:
            tree = {**repository.source.tree(candidate.commit), **env.made}
            image = images.at_commit(self.store, env, tree)
        before = self._run(image, found, {**candidate.broken, **candidate.tests})
        outcomes, seconds = found.tests, found.seconds
        if candidate.commit:
            after = self._run(image, found, {**candidate.fixed, **candidate.tests})
            outcomes, seconds = after.outcomes, after.seconds
        good = [test for test, outcome in outcomes.items() if outcome == "pass" and test not in found.unstable]
        failing = [test for test in good if before.outcomes.get(test) != "pass"]
        kept = [test for test in good if before.outcomes.get(test) == "pass"]
        if not failing:
            raise _No("unnoticed", "no test fails with the bug")
        if len({base_id(test) for test in failing}) > MOST_FAILING or len(failing) > len(kept):
            raise _No("broad", f"{len(failing)} tests fail with the bug, {len(kept)} pass")
        tests = {path: entry.data for path, entry in tree.items() if is_test(path)} | dict(candidate.tests)
        seen = self._visible(candidate, tree, tests, failing)
        failing, kept = chosen(failing, kept, seconds)
        text = candidate.statement or self._statement(repository, candidate, before, failing, tests)
        hidden = {test.partition("::")[0] for test in failing} | set(candidate.tests)
        base = images.task_image(self.store, image, tree, {**candidate.broken, **seen})
        return make_task(
            repository.source,
            candidate,
            text,
            base,
            found.command,
            kept,
            failing,
            {path: tests.get(path) for path in hidden},
        )

    def _run(self, image: str, found: Discovery, files: Mapping[str, bytes | None]) -> Run:
        """The suite with files put in."""
        with self.backend.create(base=image, workdir=TESTBED, limits=discovery.LIMITS) as box:
            from envs.swe.grading import apply

            apply(box, TESTBED, {path: FileChange(data) for path, data in files.items()})
            try:
                timeout, silence = (10.0 + HANGS * usual for usual in (found.wall, max(found.seconds.values())))
                return discovery.run_suite(box, found.command, timeout, silence=silence, junit=True)
            except Refused as error:
                raise _No("hangs" if "timeout" in str(error) else "suite", str(error)) from None

    def _statement(
        self,
        repository: _Repository,
        candidate: Candidate,
        before: Run,
        failing: Sequence[str],
        tests: Mapping[str, bytes | None],
    ) -> str:
        files = {path: data for path, data in tests.items() if data is not None}
        failed = [failure for failure in failures(before.junit, files) if failure.test in failing]
        if not failed:
            raise _No("silent", "no failing test says how it fails")
        text = statement(repository.source.name, failed, candidate)
        if said := leaks(text, candidate, failed):
            raise _No("leak", f"the statement would say {said[0]!r}")
        return text

    def _visible(
        self, candidate: Candidate, tree: Tree, tests: Mapping[str, bytes | None], failing: Sequence[str]
    ) -> dict[str, bytes | None]:
        """Test files as the agent finds them: without the tests that notice the bug. A commit's own tests are not there yet."""
        seen: dict[str, bytes | None] = {}
        by_file: dict[str, list[str]] = {}
        for test in failing:
            path, _, name = test.partition("::")
            if path not in candidate.tests:
                by_file.setdefault(path, []).append(name)
        for path, names in by_file.items():
            if (data := tests.get(path)) is not None:
                seen[path] = without_tests(data, names)
        return seen


def chosen(failing: Sequence[str], kept: Sequence[str], seconds: Mapping[str, float]) -> tuple[list[str], list[str]]:
    """Of the failing tests those that a repair has to make pass, and of the kept ones, of the same files first, those that it
    must not break: the quickest ones that fit.

    seconds: test function → wall clock of its tests; test file → that of collecting it (`Discovery.seconds`).
    """

    def file(test: str) -> str:
        return test.partition("::")[0]

    def rank(function: str) -> tuple[bool, float, str, float, str]:
        path = file(function)
        return path not in first, seconds.get(path, 0.0), path, seconds.get(function, 0.0), function

    spent, broken = 0.0, set[str]()
    for function in sorted(
        {base_id(test) for test in failing}, key=lambda function: (seconds.get(function, 0.0), function)
    ):
        spent += seconds.get(function, 0.0)
        if broken and spent > SUITE_SECONDS:
            break
        broken.add(function)
    first = {file(function) for function in broken}
    spent, functions, files = 0.0, set(broken), set(first)
    for function in sorted({base_id(test) for test in kept} - {base_id(test) for test in failing}, key=rank):
        path = file(function)
        more = seconds.get(function, 0.0) + (0.0 if path in files else seconds.get(path, 0.0))
        if spent + more <= SUITE_SECONDS:
            spent += more
            functions.add(function)
            files.add(path)
    return [t for t in failing if base_id(t) in broken], [t for t in kept if base_id(t) in functions]


def make_task(
    source: sources.Source,
    candidate: Candidate,
    text: str,
    base: str,
    command: str,
    kept: Sequence[str],
    failing: Sequence[str],
    hidden: Mapping[str, bytes | None],
) -> Task:
    """The task of a candidate whose image is made."""
    contents = [data for data in (*hidden.values(), *candidate.fixed.values()) if data is not None]
    grader = Grader(
        command=command,
        expected=dict.fromkeys(sorted([*failing, *kept]), "pass"),
        fail_to_pass=tuple(sorted(failing)),
        hidden={path: None if data is None else sha256(data) for path, data in hidden.items()},
        gold={path: None if data is None else sha256(data) for path, data in candidate.fixed.items()},
    )
    return Task(
        id=f"{source.name}-{candidate.id}".replace("/", "__"),
        prompt=text,
        base=base,
        workdir=TESTBED,
        limits=LIMITS,
        grader=grader,
        provenance={"source": source.origin, "version": source.version, "commit": candidate.commit or source.commit}
        | dict(candidate.provenance),
        blobs={sha256(data): data for data in contents},
    )
