"""Runs pytest and says what became of each test, in lines that the tests' own output can't be mistaken for.

It is copied into the grading sandbox, outside the repository, and is plain Python from 3.8 on. Its job comes on stdin as JSON
(`key`, `records`, `args`, `only`, `module`), so that neither the command line nor the environment has the key. A record is a line

    HMAC-SHA256(key, number of the record + JSON) JSON

in the file `records`, opened before any product code runs; what a test prints, or another process appends, is no record.
The test ran and passed only where its setup, call and teardown did; a skip, an expected failure and an unexpected pass
are told apart from a pass. The last record has pytest's exit status.

As a script it puts its own directory on the path, not the repository (`module`, as `python -m pytest` does, adds that when
pytest has been imported), and it ends by `os._exit`: exit handlers and threads that live on don't change the status.
"""

import hmac
import json
import os
import sys

PHASES = ("setup", "call", "teardown")


def recorder(path, key):
    """A function that writes one record. Only this process may: a forked child shares the number of the next one."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
    seal, write, pid, count = hmac.new(key, digestmod="sha256"), os.write, os.getpid(), [0]

    def record(**fields):
        if os.getpid() != pid:
            return
        text = json.dumps(fields).encode()
        one = seal.copy()
        one.update(b"%d %s" % (count[0], text))
        count[0] += 1
        write(fd, b"%s %s\n" % (one.hexdigest().encode(), text))

    return record


def read(data, key):
    """The records in a file's bytes, in order; lines that are none are left out."""
    found, seal = [], hmac.new(key, digestmod="sha256")
    for line in data.split(b"\n"):
        mark, _, text = line.partition(b" ")
        one = seal.copy()
        one.update(b"%d %s" % (len(found), text))
        if hmac.compare_digest(one.hexdigest().encode(), mark):
            found.append(json.loads(text))
    return found


class Reporter:
    """A pytest plugin: a record when a test has run, and for a file that can't be collected.

    only: ids without parameters of the tests to run, of all that are collected; none for all.
    """

    def __init__(self, record, only=()):
        self.record, self.only, self.tests, self.config = record, frozenset(only), {}, None

    def pytest_cmdline_main(self, config):
        """Before pytest-xdist looks: no other processes."""
        if getattr(config.option, "numprocesses", None):
            config.option.numprocesses, config.option.dist, config.option.tx = 0, "no", []
        yield

    def pytest_configure(self, config):
        """Node ids are told relative to the work directory."""
        self.config = config

    def pytest_collectreport(self, report):
        """A file that can't be imported."""
        if report.failed:
            self.record(id=self.config.cwd_relative_nodeid(report.nodeid), outcome="error", seconds=0.0)

    def pytest_collection_modifyitems(self, items):
        """The tests that count, in their order."""
        if self.only:
            name = self.config.cwd_relative_nodeid
            items[:] = [item for item in items if name(item.nodeid).partition("[")[0] in self.only]

    def pytest_runtest_logreport(self, report):
        """One phase of a test; a test may have several reports of a phase (subtests, reruns), and one failure is enough."""
        phases, spent = self.tests.setdefault(report.nodeid, ({}, [0.0]))
        spent[0] += report.duration
        outcome = report.outcome
        if hasattr(report, "wasxfail"):
            outcome = {"skipped": "xfail", "passed": "xpass"}.get(outcome, outcome)
        if phases.get(report.when) != "failed":
            phases[report.when] = outcome

    def pytest_runtest_logfinish(self, nodeid):
        """All phases are over."""
        phases, spent = self.tests.pop(nodeid, ({}, [0.0]))
        said = [phases.get(when) for when in PHASES]
        if "rerun" in said:
            return  # pytest-rerunfailures: it runs again
        if "failed" in said:
            outcome = "fail" if phases.get("call") == "failed" else "error"
        elif said == ["passed"] * 3:
            outcome = "pass"
        else:
            outcome = next((word for word in said if word in ("xfail", "xpass")), "skip")
        self.record(id=self.config.cwd_relative_nodeid(nodeid), outcome=outcome, seconds=round(spent[0], 4))


def arguments(args, cache):
    """Of pytest: the suite's own options, then ours, which win: a cache of its own (a suite may name options of the plugin,
    so it stays), every test, in order, in this process, asserts as they stand, and a line for a failure: no source is parsed
    and rewritten to show more, which takes time and fails on CPython before 3.11.8 (gh-106905)."""
    ours = ["-p", "no:randomly", "--maxfail=0", "--continue-on-collection-errors", "--tb=line", "--assert=plain"]
    return [*args, *ours] if "no:cacheprovider" in args else [*args, *ours, "-o", "cache_dir=" + cache]


def main():
    """Run the job that stdin has."""
    leave = os._exit
    job = json.loads(sys.stdin.buffer.read().decode())
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    record = recorder(job["records"], bytes.fromhex(job.pop("key")))
    sys.path.pop(0)
    import pytest

    Reporter.pytest_cmdline_main = pytest.hookimpl(hookwrapper=True)(Reporter.pytest_cmdline_main)
    if job["module"]:
        sys.path.insert(0, os.getcwd())
    args = arguments([*sys.argv[1:], *job["args"]], job["records"] + ".cache")
    sys.argv[0] = "pytest"
    status = int(pytest.main(args, plugins=[Reporter(record, job.get("only", ()))]))
    record(end=status)
    sys.stdout.flush()
    leave(status)


if __name__ == "__main__":
    main()
