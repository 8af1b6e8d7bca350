"""Which tests a repository has, and which of them can be relied on: its suite is run twice, without network.

A plugin of ours, outside the repository, writes one line for each thing that happens; what pytest prints decides nothing.
"""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from envs.errors import SandboxDead
from envs.sandbox.base import Backend, Limits, Sandbox
from envs.swe.install import TESTBED, Refused
from envs.swe.sentinels import base_id

COMMAND = "python -m pytest --rootdir=. -p no:cacheprovider -p no:randomly"
"""Run in the work directory, with test files or ids as arguments. With `--rootdir` ids are relative to it, whatever is run;
order and state of earlier runs play no part."""
LIMITS = Limits(memory_mb=2048, disk_mb=512, pids=256, output_kb=256)
SECONDS = 900.0
"""Wall clock of one run of a suite."""
RUNS = 2
SLOW = 2.0
"""Wall clock of a test function, seconds, above which tasks do without it: it is not run for them, expected or shown."""
_PLUGIN = "/tmp/codeworld_report.py"
_REPORT = "/tmp/codeworld_report.jsonl"
_JUNIT = "/tmp/codeworld_junit.xml"
_REPORT_MAX = 64 << 20
_EXTRA = {"pytest_cov": "--no-cov", "xdist": "-n0"}
"""Options that switch off what would slow a run or divide it, by the module that knows them."""


@dataclass(frozen=True, kw_only=True)
class Discovery:
    """What running a suite showed."""

    command: str
    """The test command, to be run in the work directory with test files or ids as arguments."""
    tests: Mapping[str, str]
    """Node id → "pass", "fail" or "skip", as all runs had it; doctests and unstable tests are left out."""
    seconds: Mapping[str, float]
    """Test function (an id without parameters) → wall clock of its tests with all that pytest does for them; test file → that
    of collecting it. Mean over the runs."""
    unstable: tuple[str, ...] = ()
    """Ids whose outcome differed between the runs, or that one run had not."""
    broken: tuple[str, ...] = ()
    """Files that could not be collected."""
    doctests: int = 0
    """How many doctests were left out: they lie in the files that an attempt changes."""
    wall: float = 0.0
    """Seconds of one run of the whole suite."""

    @property
    def passing(self) -> tuple[str, ...]:
        """Ids that pass every time."""
        return tuple(test for test, outcome in self.tests.items() if outcome == "pass")

    @property
    def slow(self) -> tuple[str, ...]:
        """Test functions that take longer than `SLOW`."""
        return tuple(name for name, seconds in self.seconds.items() if "::" in name and seconds > SLOW)


@dataclass
class Run:
    """What one run of a suite, or of some of its tests, showed."""

    outcomes: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    doctests: set[str] = field(default_factory=set)
    broken: dict[str, str] = field(default_factory=dict)
    started: str = ""
    ended: bool = False
    wall: float = 0.0
    junit: bytes = b""
    """The JUnit report, where it was asked for (`failures.py` reads it)."""


def discover(
    backend: Backend, image: str, *, limits: Limits = LIMITS, timeout: float = SECONDS, runs: int = RUNS
) -> Discovery:
    """Run the whole suite of an image's repository `runs` times, each in a new sandbox.

    timeout: seconds of one run. Raises `Refused`, one line, where there are no tests, none passes twice, or the suite
    does not end; `InfraError` where the sandbox failed.
    """
    found = []
    command = ""
    for _ in range(runs):
        with backend.create(base=image, workdir=TESTBED, limits=limits) as box:
            command = command or f"{COMMAND}{_options(box)}"
            found.append(run_suite(box, command, timeout))
    return _summary(command, found)


def _options(box: Any) -> str:
    code = f"import importlib.util as u; print(*(o for m, o in {_EXTRA!r}.items() if u.find_spec(m)))"
    options = box.run(f'python -c "{code}"', timeout=60).text().strip()
    return f" {options}" if options else ""


def _summary(command: str, found: Sequence[Run]) -> Discovery:
    """What several runs of one suite have in common."""
    first, tests, unstable = found[0], {}, []
    for test in sorted({test for run in found for test in run.outcomes}):
        outcomes = {run.outcomes.get(test, "") for run in found}
        if any(test in run.doctests for run in found):
            continue
        if len(outcomes) == 1:
            tests[test] = outcomes.pop()
        else:
            unstable.append(test)
    if "pass" not in tests.values():
        raise _refusal(first, tests, unstable)
    timed = sorted({name for run in found for name in run.seconds})
    return Discovery(
        command=command,
        tests=tests,
        seconds={name: round(sum(run.seconds.get(name, 0.0) for run in found) / len(found), 4) for name in timed},
        unstable=tuple(unstable),
        broken=tuple(sorted(first.broken)),
        doctests=len(first.doctests),
        wall=round(sum(run.wall for run in found) / len(found), 2),
    )


def run_suite(
    box: Sandbox,
    command: str,
    timeout: float,
    *,
    silence: float | None = None,
    tests: Iterable[str] = (),
    without: Iterable[str] = (),
    junit: bool = False,
) -> Run:
    """Run the suite in a sandbox, or only `tests` (files or ids), `without` some (ids).

    silence: seconds that one test may take. junit: say how tests fail; else asserts run as they stand, as in grading.
    Raises `Refused` where it does not end by itself or says nothing, `SandboxDead`.
    """
    box.write(_PLUGIN, _SOURCE.encode())
    options = "-q --tb=short --assert=plain"
    if junit:
        options = f"-vv --tb=auto --junitxml={_JUNIT} -o junit_family=xunit1"
    named = " ".join(shlex.quote(test) for test in [*tests, *(f"--deselect={test}" for test in without)])
    script = (
        f"cd {TESTBED}; rm -f {_REPORT}; export PYTHONPATH=/tmp PYTHONUNBUFFERED=1; "
        f"{command} -p codeworld_report --continue-on-collection-errors"
    )
    result = box.run(f"({script} {options} {named})", timeout=timeout, silence=silence)
    if result.cause == "dead":
        raise SandboxDead("the sandbox died while a suite ran")
    run = Run(wall=result.wall)
    try:
        lines = box.read(_REPORT, limit=_REPORT_MAX).decode("utf-8", "replace").splitlines()
    except FileNotFoundError:
        lines = []
    for line in lines:
        _note(run, line)
    if junit:
        with contextlib.suppress(OSError):
            run.junit = box.read(_JUNIT, limit=_REPORT_MAX)
    if result.cause != "exit":
        last = f", the last test that started is {run.started}" if run.started else ""
        raise Refused("tests", f"the suite ended by {result.cause} after {result.wall:.0f} s{last}")
    if not run.ended and not run.broken:
        shown = [line.strip() for line in result.text().splitlines() if line.strip()][-3:]
        raise Refused("tests", f"pytest ended with {result.exit} and no report: {' / '.join(shown)[-300:]}")
    return run


def _note(run: Run, line: str) -> None:
    """Take in one line of the report; one that makes no sense (a test may write there) is passed over."""
    try:
        entry = json.loads(line)
        what, test = entry["what"], str(entry.get("id", ""))
        if what == "start":
            run.started = test
            if entry["doctest"]:
                run.doctests.add(test)
        elif what == "phase":
            run.outcomes[test] = _worst(run.outcomes.get(test, "pass"), str(entry["outcome"]))
        elif what == "spent":
            run.seconds[base_id(test)] = run.seconds.get(base_id(test), 0.0) + float(entry["seconds"])
        elif what == "broken":
            run.broken[test] = str(entry["why"])
        elif what == "end":
            run.ended = True
    except (ValueError, KeyError, TypeError):
        pass


def _worst(one: str, other: str) -> str:
    order = ("pass", "skip", "fail")
    return max(one, other, key=lambda outcome: order.index(outcome) if outcome in order else len(order))


def _refusal(run: Run, tests: Mapping[str, str], unstable: Sequence[str]) -> Refused:
    if not tests and not unstable:
        if run.broken:
            file, why = next(iter(run.broken.items()))
            return Refused("tests", f"none could be collected; {file}: {why}")
        only = f", but {len(run.doctests)} doctests" if run.doctests else ""
        return Refused("tests", f"the repository has none that pytest finds{only}")
    count = {word: list(tests.values()).count(word) for word in ("fail", "skip")}
    return Refused(
        "tests",
        f"none passes every time: {count['fail']} fail, {count['skip']} are skipped, {len(unstable)} are unstable",
    )


_SOURCE = f'''
"""Writes what pytest does to {_REPORT}, one JSON object a line."""
import json
from time import perf_counter as _now

import pytest

_file = open({_REPORT!r}, "a", buffering=1)
_dump = json.dumps


def _say(**entry):
    _file.write(_dump(entry) + "\\n")


@pytest.hookimpl(tryfirst=True, wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    _say(what="start", id=item.nodeid, doctest=type(item).__name__ == "DoctestItem")
    began = _now()
    result = yield
    _say(what="spent", id=item.nodeid, seconds=_now() - began)
    return result


@pytest.hookimpl(tryfirst=True, wrapper=True)
def pytest_make_collect_report(collector):
    began = _now()
    report = yield
    if isinstance(collector, pytest.Module):
        _say(what="spent", id=collector.nodeid, seconds=_now() - began)
    return report


def pytest_runtest_logreport(report):
    outcome = "fail" if report.failed else "skip" if report.skipped else "pass"
    _say(what="phase", id=report.nodeid, outcome=outcome)


def pytest_collectreport(report):
    if report.failed:
        text = str(getattr(report.longrepr, "longrepr", report.longrepr)).strip().splitlines()
        _say(what="broken", id=report.nodeid, why=text[-1].removeprefix("E").strip()[-200:] if text else "")


def pytest_sessionfinish(session, exitstatus):
    _say(what="end")
'''


__all__ = ["COMMAND", "Discovery", "discover"]
