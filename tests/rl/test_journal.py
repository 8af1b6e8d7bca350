"""The journal: moves, resuming, and a writer that is killed at random moments."""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.trajectory import Group, Segment, Trajectory
from rl.journal import Journal, RunLock

ROOT = Path(__file__).resolve().parents[2]


def group(name: str, version: int = 0) -> Group:
    trajectories = [
        Trajectory(
            "t",
            sample=i,
            segments=[Segment([5, 6, 7], [0, 1, 1], [0.0, -0.1, -1 / 3], [-1, version, version + 1])],
            reward=float(i),
            outcome="resolved",
            stop="submitted",
            info={"text": "zwei\nZeilen, äöü"},
        )
        for i in range(2)
    ]
    return Group(name, "t", trajectories)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal.sqlite")


def to(journal: Journal, name: str, state: str, step: int = 1, index: int = 0) -> None:
    """Issue a group and bring it into a state."""
    journal.issue(name, index, "t")
    if state in ("running", "done", "trained"):
        journal.start(name, 3)
    if state in ("done", "trained"):
        journal.finish(group(name))
    if state == "trained":
        journal.train([name], step)
    if state == "dropped":
        journal.drop(name, "stale")


def test_the_way_of_a_group(journal: Journal, tmp_path: Path) -> None:
    to(journal, "g", "done")
    journal.close()
    again = Journal(tmp_path / "journal.sqlite")
    assert again.load("g") == group("g")
    again.train(["g"], 7)
    (entry,) = again.entries()
    assert (entry.state, entry.trained_step, entry.issued_version, entry.attempts) == ("trained", 7, 3, 1)
    assert again.counts() == {"trained": 1}


ALLOWED = {
    "issue": {None},
    "start": {"pending"},
    "retry": {"running"},
    "finish": {"running"},
    "train": {"done"},
    "drop": {"pending", "running", "done"},
}


@pytest.mark.parametrize("move", ALLOWED)
@pytest.mark.parametrize("state", [None, "pending", "running", "done", "trained", "dropped"])
def test_only_the_drawn_moves_are_possible(journal: Journal, move: str, state: str | None) -> None:
    if state:
        to(journal, "g", state)
    calls = {
        "issue": lambda: journal.issue("g", 0, "t"),
        "start": lambda: journal.start("g", 1),
        "retry": lambda: journal.retry("g", "engine died"),
        "finish": lambda: journal.finish(group("g")),
        "train": lambda: journal.train(["g"], 2),
        "drop": lambda: journal.drop("g", "why"),
    }
    if state in ALLOWED[move]:
        calls[move]()
    else:
        with pytest.raises(AssertionError, match="g "):
            calls[move]()
        assert [e.state for e in journal.entries()] == ([state] if state else [])


def test_a_batch_is_trained_whole_or_not(journal: Journal) -> None:
    to(journal, "a", "done")
    to(journal, "b", "running", index=1)
    with pytest.raises(AssertionError, match="group b can't become trained: it is running"):
        journal.train(["a", "b"], 1)
    assert [e.state for e in journal.entries()] == ["done", "running"]


def test_resume_by_hand(journal: Journal) -> None:
    rows = [("a", "trained", 4), ("b", "trained", 5), ("c", "trained", 6), ("d", "running", 0), ("e", "done", 0)]
    rows += [("f", "pending", 0), ("g", "dropped", 0)]
    for i, (name, state, step) in enumerate(rows):
        to(journal, name, state, step, index=i)
    found = journal.resume(5)
    assert (found.returned, found.reissued) == (1, 1)
    assert found.states == {"trained": 2, "done": 2, "pending": 2, "dropped": 1}
    states = {e.id: e.state for e in journal.entries()}
    expected = {
        "a": "trained",
        "b": "trained",
        "c": "done",
        "d": "pending",
        "e": "done",
        "f": "pending",
        "g": "dropped",
    }
    assert states == expected
    assert journal.load("c") == group("c")
    journal.train(["c"], 6)
    assert journal.resume(5).returned == 1  # again, as often as it takes


def test_forgotten_payloads_are_sampled_again(journal: Journal) -> None:
    to(journal, "a", "trained", 4)
    to(journal, "b", "trained", 5, index=1)
    assert journal.forget(4) == 1
    with pytest.raises(AssertionError, match="group a has no trajectories"):
        journal.load("a")
    found = journal.resume(3)
    assert (found.returned, found.reissued) == (1, 1)
    assert {e.id: e.state for e in journal.entries()} == {"a": "pending", "b": "done"}


def test_retry_counts_attempts(journal: Journal) -> None:
    journal.issue("g", 0, "t")
    for version in (1, 2, 3):
        journal.start("g", version)
        journal.retry("g", "sandbox died")
    (entry,) = journal.entries("pending")
    assert (entry.attempts, entry.reason, entry.issued_version) == (3, "sandbox died", 3)


def test_a_rejected_group_keeps_its_solve_rate(journal: Journal) -> None:
    to(journal, "g", "running")
    journal.reject(group("g"), "window")
    (entry,) = journal.entries("dropped")
    assert (entry.reason, entry.solved, entry.graded) == ("window", 2, 2)
    with pytest.raises(AssertionError, match="has no trajectories"):
        journal.load("g")


def test_a_journal_of_before_the_curriculum_is_read(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    to(Journal(path), "g7", "done", index=7)
    with sqlite3.connect(path) as old:
        for column in ("source", "stage", "solved", "graded"):
            old.execute(f"ALTER TABLE groups DROP COLUMN {column}")
    old.close()
    again = Journal(path)
    (entry,) = again.entries()
    assert (entry.id, entry.task_index, entry.source, entry.stage, entry.graded) == ("g7", 7, "env", 0, 0)
    assert again.load("g7") == group("g7")


def test_many_threads(journal: Journal) -> None:
    def work(k: int) -> None:
        for i in range(10):
            to(journal, f"{k}/{i}", "trained" if i % 2 else "dropped", i, index=k * 10 + i)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert journal.counts() == {"trained": 30, "dropped": 30}


def test_another_file_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "journal.sqlite").write_bytes(b"not a database" * 1000)
    with pytest.raises(ValueError, match=r"journal .*journal.sqlite: file is not a database; remove it"):
        Journal(tmp_path / "journal.sqlite")


moves = st.lists(
    st.tuples(
        st.sampled_from(["issue", "start", "retry", "finish", "batch", "drop", "save", "crash"]), st.integers(0, 99)
    ),
    max_size=60,
)


@settings(max_examples=40, deadline=None)
@given(moves)
def test_exactly_once_relative_to_the_surviving_weights(events: list[tuple[str, int]]) -> None:
    """A model of the weights: the list of groups they have seen. A crash goes back to the last saved list."""
    journal = Journal(Path(":memory:"))
    seen: list[str] = []  # by the weights in memory
    step, issued, saved = 0, 0, (0, list[str]())
    for what, number in events:
        by_state = {s: [e.id for e in journal.entries(s)] for s in ("pending", "running", "done")}
        if what == "issue":
            journal.issue(f"g{issued}", issued, "t")
            issued += 1
        elif what == "batch" and by_state["done"]:
            batch = by_state["done"][:2]
            seen += batch
            step += 1
            journal.train(batch, step)
        elif what == "save":
            saved = (step, list(seen))
        elif what == "crash":
            step, seen = saved[0], list(saved[1])
            journal.resume(step)
        source = {"start": "pending", "retry": "running", "finish": "running", "drop": "done"}.get(what)
        if source and by_state[source]:
            name = by_state[source][number % len(by_state[source])]
            if what == "start":
                journal.start(name, step)
            elif what == "finish":
                journal.finish(group(name))
            else:
                getattr(journal, what)(name, "why")
        assert len(seen) == len(set(seen)), "trained twice"
        assert sorted(seen) == sorted(e.id for e in journal.entries("trained"))
        assert all(e.reason for e in journal.entries("dropped"))
        assert sum(journal.counts().values()) == issued, "lost"
    journal.close()


WRITER = """
import json, random, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from tests_group import group
from rl.journal import Journal, RunLock
from rl import checkpoint
run, rng = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
with RunLock(run):
    journal = Journal(run / "journal.sqlite")
    at = checkpoint.latest(run / "checkpoints")
    step, seen = 0, []
    if at is not None:
        step, seen = checkpoint.step_of(at), json.loads((at / "seen.json").read_text())
    journal.resume(step)
    print("ready", flush=True)
    while True:
        i = sum(journal.counts().values())
        journal.issue(f"g{i}", i, "t")
        for entry in journal.entries("pending"):
            journal.start(entry.id, step)
        for entry in journal.entries("running"):
            if rng.random() < 0.1:
                journal.drop(entry.id, "infra")
            elif rng.random() < 0.6:
                journal.finish(group(entry.id, step))
        done = [e.id for e in journal.entries("done")][:3]
        if len(done) == 3:
            assert all(journal.load(g) for g in done)
            seen += done
            step += 1
            journal.train(done, step)
            if rng.random() < 0.3:
                def fill(directory):
                    (directory / "seen.json").write_text(json.dumps(seen))
                checkpoint.write(run / "checkpoints", step, fill)
"""


def test_kill_at_random_moments(tmp_path: Path) -> None:
    """kill -9 a writer again and again: relative to the surviving weights nothing is lost and nothing trained twice."""
    from rl import checkpoint

    source = Path(__file__).read_text()
    helper = source[source.index("def group(") : source.index("@pytest.fixture")]
    (tmp_path / "tests_group.py").write_text(f"from agents.trajectory import Group, Segment, Trajectory\n\n{helper}")
    run, rng = tmp_path / "run", random.Random(0)
    for attempt in range(8):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(run), str(attempt), str(tmp_path)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(rng.random() * 0.4)
        process.send_signal(signal.SIGKILL)
        process.wait()
        at = checkpoint.latest(run / "checkpoints")
        seen = [] if at is None else json.loads((at / "seen.json").read_text())
        journal = Journal(run / "journal.sqlite")
        journal.resume(0 if at is None else checkpoint.step_of(at))
        assert max(Counter(seen).values(), default=1) == 1, "trained twice"
        assert sorted(seen) == sorted(e.id for e in journal.entries("trained"))
        assert all(e.reason for e in journal.entries("dropped"))
        assert set(journal.counts()) <= {"pending", "done", "trained", "dropped"}
        names = [e.id for e in journal.entries()]
        assert names == [f"g{i}" for i in range(len(names))], "lost"
        assert all(journal.load(e.id).trajectories for e in journal.entries("done"))
        journal.close()
    assert len(seen) > 10


def test_a_run_in_use_is_refused(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from rl.journal import RunLock\n"
        "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match=rf"run directory .* is in use by process {process.pid}; stop it, or") as error:
        RunLock(tmp_path)
    assert "\n" not in str(error.value)
    process.send_signal(signal.SIGKILL)  # the kernel frees the lock
    process.wait()
    with RunLock(tmp_path) as lock:
        assert lock.path.read_text() == f"{os.getpid()}\n"
        with pytest.raises(ValueError, match=f"process {os.getpid()}"):
            RunLock(tmp_path)
    RunLock(tmp_path).release()
