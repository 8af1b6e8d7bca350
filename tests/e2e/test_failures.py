"""The user's command when a process of the run is killed: engine or learner, under Ray."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from agents.trajectory import Trajectory
from benchmarks.systems.base import tree
from rl.journal import Journal

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    *("--learn.groups_per_step=3", "--rollout.group_size=4", "--rollout.episodes=16", "--eval.every=0"),
    *("--checkpoint_every=2", "--steps=10"),
]


def command(runs, *more):
    return [
        sys.executable,
        str(ROOT / "rl/train.py"),
        str(ROOT / "rl/recipes/tiny.toml"),
        f"--runs={runs}",
        *SMALL,
        *more,
    ]


@contextmanager
def begun(log, runs, *more):
    """The run, which ends here at the latest."""
    with log.open("w") as handle:
        process = subprocess.Popen(command(runs, *more), stdout=handle, stderr=handle)
    try:
        yield process
    finally:
        process.kill()


def kill(process, name):
    """SIGKILL to the actor of that class."""
    for pid, _ in tree(process.pid):
        try:
            if name in Path(f"/proc/{pid}/cmdline").read_text():
                os.kill(pid, signal.SIGKILL)
                return
        except (FileNotFoundError, ProcessLookupError):  # sandboxes come and go
            continue
    raise AssertionError(f"no process {name}")


def wait_for(log, text, process, seconds=600):
    limit = time.monotonic() + seconds
    while time.monotonic() < limit and process.poll() is None:
        if text in log.read_text():
            return
        time.sleep(0.1)
    raise AssertionError(f"{text!r} did not appear: {log.read_text()[-3000:]}")


def whole(directory, steps=10):
    """Steps of three whole groups, each trained once; no reward for what was lost."""
    journal = Journal(directory / "journal.sqlite")
    entries = journal.entries()
    journal.close()
    assert sorted(e.trained_step for e in entries if e.state == "trained") == sorted([*range(1, steps + 1)] * 3)
    assert all(e.reason for e in entries if e.state == "dropped")
    assert {e.state for e in entries} <= {"trained", "dropped"}
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if r["kind"] == "step"] == list(range(1, steps + 1))
    for path in (directory / "trajectories").iterdir():
        played = [Trajectory.from_json(line) for line in path.read_text().splitlines()]
        assert len(played) == 12 and all((t.reward is None) == (t.outcome == "infra") for t in played)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_run_goes_on_by_itself_when_engine_and_learner_die(tmp_path):
    log = tmp_path / "log"
    with begun(log, tmp_path) as process:
        wait_for(log, "step 3/10", process)
        kill(process, "ray::EnginePart")
        wait_for(log, "engine is gone or late", process)
        wait_for(log, "step 7/10", process)
        kill(process, "ray::LearnerPart")
        wait_for(log, "learner is gone or late", process)
        assert process.wait(600) == 0, log.read_text()[-3000:]
    assert log.read_text().count("on from the last checkpoint") == 2
    whole(tmp_path / "tiny")


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_one_of_two_engines_dies_and_the_run_goes_on_with_the_other(tmp_path):
    log = tmp_path / "log"
    with begun(log, tmp_path, "--policy.replicas=2", "--restarts=0", "--steps=24") as process:
        wait_for(log, "step 2/24", process)
        kill(process, "ray::EnginePart")
        wait_for(log, "is gone, with its episodes; another is started", process)
        assert process.wait(900) == 0, log.read_text()[-3000:]
    assert "is back" in log.read_text() and "on from the last checkpoint" not in log.read_text()
    whole(tmp_path / "tiny", steps=24)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize(
    ("part", "settings"),
    [
        pytest.param("engine", [], marks=pytest.mark.proof),
        pytest.param(
            "learner",
            ["--learn.ranks=2", "--learn.algorithm=ppo", "--learn.lora_rank=4"],
            marks=pytest.mark.proof,
        ),
    ],
)
def test_without_restarts_it_stops_in_one_line_and_is_resumed(tmp_path, part, settings):
    log = tmp_path / "log"
    with begun(log, tmp_path, "--restarts=0", *settings) as process:
        wait_for(log, "step 3/10", process)
        kill(process, f"ray::{part.capitalize()}Part")
        assert process.wait(600) == 1, log.read_text()[-3000:]
    text = log.read_text()
    assert "Traceback" not in text
    assert re.search(
        rf"error: the run stopped: {part}(-\d)? is gone or late: ActorDiedError; go on with --resume", text
    )
    done = subprocess.run(command(tmp_path, "--resume"), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and "resumed at step 2" in done.stdout, done.stderr[-3000:]
    whole(tmp_path / "tiny")
