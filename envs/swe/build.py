"""Repositories become task sets: `python -m envs build --from SOURCE[,SOURCE…] --tasks mutate:25 --out DIR`.

    source ─► image ─► suite, run twice ─► candidates ─► which tests notice? ─► task ─► validation ─► DIR/tasks.jsonl

A candidate is a bug with its repair, made by mutation (`mutate.py`) or found in history (`history.py`). Its task is the
repository with the bug and without the tests that notice it; those are hidden, and expected to pass, as are other tests of
the suite, as many as fit in a moment (`assemble.py`). What became of each candidate is a row of `DIR/ledger.jsonl`, written
before the next one counts, so that a run that was killed goes on where it stopped: equal arguments give equal candidates.
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
from envs.sandbox.base import Backend, FileChange
from envs.sandbox.capture import Tree
from envs.sandbox.imagestore import ImageStore
from envs.swe import discovery, images, sources
from envs.swe.assemble import chosen, make_task
from envs.swe.candidate import Candidate, Rejected, is_test
from envs.swe.discovery import Discovery, Run
from envs.swe.failures import failures
from envs.swe.hiding import without_tests
from envs.swe.images import Environment
from envs.swe.install import TESTBED, Refused
from envs.swe.ledger import Ledger
from envs.swe.sentinels import base_id
from envs.swe.setup import named, set_up
from envs.swe.statement import leaks, statement
from envs.swe.validate import validate
from envs.task import Task, load_tasks, save_blobs, save_tasks, sha256, task_from_json

HANGS = 3.0
"""A suite that takes so many times its own wall clock, or says nothing for so many times that of its slowest test, hangs (ten
seconds are added to both); a bug that makes it hang is refused."""
MOST_SECONDS = 5.0
"""Wall clock of the quickest test that notices a bug, with or without it; each grading would wait for it."""
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
    setup: str = ""
    """`module:callable` that makes images (`setup.py`); "": what a repository declares is installed."""
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
    """Build and validate the tasks of every source. A source that can't be built is a line of the report; tasks of it that
    are known stay.

    names: see `sources.fetch`. backend: native, as images are built in it. cache: what is fetched is kept there. Raises
    `ValueError` for a base that can't be used, and for a name where it is the only one.
    """
    builder = _Builder(plan, out, backend, cache, report)
    done, known = Report(), {name: builder.remembered(name) for name in names}
    for name in names:
        why, fates = "", []
        try:
            for fate in builder.fates(name):
                fates.append(fate)
                if fate.task is not None:  # a run that is killed leaves the tasks it has proved
                    save_tasks(_tasks({**known, name: _joined(fates, known[name])}), out)
        except (InfraError, ValueError) as error:
            if len(names) == 1 and not isinstance(error, InfraError | Refused):
                raise
            why, fates = str(error), _joined(fates, known[name])
        known[name] = fates
        done.fates += fates
        done.refused.update(fate.reason for fate in fates if fate.reason)
        done.sources[name] = why or f"{sum(f.task is not None for f in fates)} tasks of {len(fates)} candidates"
        save_tasks(_tasks(known), out)
        report(f"{name}: {done.sources[name]}")
    done.tasks = _tasks(known)
    builder.tidy()
    return done


def _tasks(known: Mapping[str, Sequence[Fate]]) -> list[Task]:
    return [fate.task for fates in known.values() for fate in fates if fate.task]


def _joined(fates: Sequence[Fate], before: Sequence[Fate]) -> list[Fate]:
    """What is known now, and of other candidates what was known before."""
    seen = {fate.candidate for fate in fates}
    return [*fates, *(fate for fate in before if fate.candidate not in seen)]


class _Builder:
    def __init__(self, plan: Plan, out: Path, backend: Backend, cache: Path, report: Callable[[str], None]) -> None:
        self.plan, self.out, self.backend, self.cache, self.report = plan, out, backend, cache, report
        named(plan.setup)
        self.store = ImageStore(out / "images")
        offer(self.store.directory)
        self.base = self.store.add_base(plan.base)
        self.ledger = Ledger(out / "ledger.jsonl")
        self.environments: set[str] = {self.base}
        self.known = {(row["source"], row["candidate"], row["plan"]): row for row in self._rows()}
        kept = out / "tasks.jsonl"
        self.before = [task.id for task in load_tasks(out)] if kept.exists() else []
        issues = f" {sha256(plan.issues.read_bytes())[:12]}" if plan.issues else ""
        self.plain = f"{plan.maker} {plan.seed} {plan.k}{issues}"

    def fates(self, name: str) -> Iterator[Fate]:
        """Of the candidates of one source, until there are tasks enough. Raises `Refused`, `InfraError` or `ValueError` where
        it has none."""
        began = time.monotonic()
        source = sources.fetch(name, self.cache)
        if self.plan.maker == "history" and source.repository is None:
            raise ValueError(f"{source.origin}: it has no history; use --tasks mutate:N, or a git repository")
        ledger = Ledger(self.out / "environments.jsonl")
        env, found = set_up(self.plan.setup, ledger, self.store, self.base, source, self.backend, cache=self.cache)
        self.environments |= {env.digest, env.installed}
        self.environments |= set(images.interpreter(self.store, self.base, self.backend, cache=self.cache))
        tree = images.repository(self.store, env.digest)
        left_out = self._quarantine(name, env.digest, found.unstable)
        left_out += f", {len(found.slow)} slow left out" if found.slow else ""
        self.report(
            f"{name}: image {env.digest[7:19]}, {len(found.passing)} tests pass in {found.wall:.1f} s{left_out} "
            f"({time.monotonic() - began:.0f} s)"
        )
        tasks = 0
        for fate in self._fates(name, _Repository(source, env, found, tree)):
            yield fate
            tasks += fate.task is not None
            if tasks == self.plan.count:
                return

    def _quarantine(self, name: str, image: str, tests: Sequence[str]) -> str:
        """Write down which tests don't end alike each time; words for the report."""
        row = {"source": name, "image": image, "fault": "flaky", "tests": list(tests)}
        ledger = Ledger(self.out / "quarantine.jsonl")
        if tests and row not in ledger.rows():
            ledger.append(row)
        return f", {len(tests)} flaky left out" if tests else ""

    def _candidates(self, repository: _Repository) -> Iterator[Candidate | Rejected]:
        if self.plan.maker == "history":
            from envs.swe.history import mine

            path = repository.source.repository
            assert path is not None, "checked by source()"
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
        key = f"{self.plain} {repository.environment.digest}"
        if (row := self.known.get((name, candidate.id, key))) is not None:
            return self._recall(row)
        began, task, reason, why = time.monotonic(), None, "", ""
        try:
            task = self._task(repository, candidate)
            task, finding = validate(task, self.backend, k=self.plan.k)
            if not finding.ok:
                raise _No(finding.fault, finding.why)
            save_blobs(task, self.out)
        except (_No, InfraError, ValueError) as error:
            other = "infra" if isinstance(error, InfraError) else "unreadable"
            reason, why, task = getattr(error, "reason", other), " ".join(str(error).split()), None
        fate = Fate(name, candidate.id, task, reason, why, round(time.monotonic() - began, 2))
        row = asdict(replace(fate, task=None)) | {"plan": key, "task": task.to_json() if task else None}
        if reason != "infra":  # it is tried again next time
            self.ledger.append(row)
        self.report(f"  {candidate.id}: {'task' if task else f'{reason}: {why}'} ({fate.seconds:.0f} s)")
        return fate

    def remembered(self, name: str) -> list[Fate]:
        """The fates that earlier runs of the plan wrote down, with the tasks that the set had before this one."""
        fates = [
            self._recall(row)
            for (source, _, plan), row in self.known.items()
            if source == name and plan.startswith(f"{self.plain} ")
        ]
        fates = [fate for fate in fates if fate.task is None or fate.task.id in self.before]
        return sorted(fates, key=lambda fate: self.before.index(fate.task.id) if fate.task else -1)

    def tidy(self) -> None:
        """Forget the images that no task of the ledger stands on."""
        self.store.retain({row["task"]["base"] for row in self._rows() if row["task"]} | self.environments)

    def _rows(self) -> Iterator[dict[str, Any]]:
        """Rows of the ledger, but of tasks whose image is gone."""
        images = self.store.images()
        return (row for row in self.ledger.rows() if not row["task"] or row["task"]["base"] in images)

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
        unfit = {*found.unstable, *found.slow}
        good = [t for t, outcome in outcomes.items() if outcome == "pass" and unfit.isdisjoint((t, base_id(t)))]
        failing = [test for test in good if before.outcomes.get(test) != "pass"]
        kept = [test for test in good if before.outcomes.get(test) == "pass"]
        if not failing:
            raise _No("unnoticed", "no test fails with the bug")
        if len({base_id(test) for test in failing}) > MOST_FAILING or len(failing) > len(kept):
            raise _No("broad", f"{len(failing)} tests fail with the bug, {len(kept)} pass")
        tests = {path: entry.data for path, entry in tree.items() if is_test(path)} | dict(candidate.tests)
        seen = self._visible(candidate, tree, tests, [*failing, *found.slow])
        seconds = {
            name: max(seconds.get(name, 0.0), before.seconds.get(name, 0.0)) for name in {*seconds, *before.seconds}
        }
        failing, kept = chosen(failing, kept, seconds)
        if (slow := seconds.get(base_id(failing[0]), 0.0)) > MOST_SECONDS:
            raise _No("slow", f"{failing[0]}, the quickest that fails, takes {slow:.0f} s")
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
                slowest = max((s for name, s in found.seconds.items() if name not in found.slow), default=0.0)
                timeout, silence = (10.0 + HANGS * usual for usual in (found.wall, slowest))
                run = discovery.run_suite
                return run(box, found.command, timeout, silence=silence, without=found.slow, junit=True)
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
        """Test files as the agent finds them: without tests that notice the bug, or may. A commit's own tests are not there yet."""
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
