"""What breaks under a run: it goes on, or stops in one line and can be resumed; nothing becomes a reward, nothing is lost.

Dead sandboxes are in `test_loop.py`, dead processes in `tests/e2e/test_failures.py`, kills in `tests/benchmarks/test_resume.py`.
"""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import threading
from contextlib import contextmanager, suppress
from dataclasses import replace

import pytest

from agents.trajectory import Trajectory
from benchmarks.systems.killing import Chain, Mouth
from benchmarks.systems.resume import Tally, outcome, real, walk
from envs.errors import InfraError
from envs.tiny import repairs
from policy.decoder import Decoder
from policy.renderer import CwmRenderer
from policy.scripted import ScriptedPolicy, replies
from rl import checkpoint, parts, train
from rl.config import ROOT, load
from rl.journal import Journal
from rl.learner import Learner, LearnerConfig
from rl.loop import Loop
from rl.record import Record
from rl.spawn import PartGone


def trained(directory):
    """The trajectories on record, by step."""
    paths = sorted((directory / "trajectories").iterdir())
    return [[Trajectory.from_json(line) for line in path.read_text().splitlines()] for path in paths]


@contextmanager
def disk(path, megabytes):
    """A file system of that size at `path`."""
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def fill(path):
    """Leave no room there."""
    with suppress(OSError), (path / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


MOMENTS = {
    "a group ends": (Loop, "_close"),
    "a step's trajectories": (Record, "step"),
    "a row of metrics": (Record, "parity"),
    "a checkpoint": (Chain, "save"),
    "an evaluation": (Record, "evaluation"),
    "the model": (Chain, "export"),
}


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_full_disk_stops_the_run_and_loses_nothing(tmp_path, monkeypatch, moment):
    monkeypatch.setattr(parts, "EnginePart", Mouth)
    monkeypatch.setattr(parts, "LearnerPart", Chain)
    where, name = MOMENTS[moment]
    method, calls = getattr(where, name), []

    def hit(self, *arguments, **options):
        calls.append(moment)
        if len(calls) == (1 if where is Chain and name == "export" else 3):
            fill(small)
        return method(self, *arguments, **options)

    with disk(tmp_path / "small", 16) as small:
        config = replace(walk(small, 0, 1, "wait", 2), steps=8)
        monkeypatch.setattr(where, name, hit)
        with pytest.raises(InfraError) as error:
            train.train(config)
        said = f"the disk of {config.directory} is full (0.0 MB free): make room there"
        assert str(error.value) == said
        with pytest.raises(InfraError, match="is full"):  # still
            train.train(config, resume=True)
        (small / "ballast").unlink()
        train.train(config, resume=True)
        assert outcome(config, Tally()) == []
        assert [len(batch) for batch in trained(config.directory)] == [16] * 8
        rows = [json.loads(line) for line in (config.directory / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if row["kind"] == "step"] == list(range(1, 9))


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
def test_a_learner_without_room_for_its_state_says_that_the_disk_is_full(tmp_path):
    """torch's own error is of positions in a file."""
    learner = Learner(LearnerConfig(), ROOT / "policy/cwm_tiny")
    with disk(tmp_path / "small", 3) as small:
        with pytest.raises(OSError) as error:
            checkpoint.write(small / "checkpoints", 1, learner.save)
        assert error.value.errno == errno.ENOSPC
        assert list((small / "checkpoints").iterdir()) == []


def test_a_dead_engine_ends_the_run_at_once(tmp_path, monkeypatch):
    """After the first episodes that it lost, by its own last words; resumed, the run is as if nothing had been."""
    step, calls = Decoder.step, []

    def dies(self, *arguments):
        calls.append(arguments)
        if len(calls) == 40:
            raise FloatingPointError("the card fell off the bus")
        return step(self, *arguments)

    monkeypatch.setattr(Decoder, "step", dies)
    config = replace(real(tmp_path, "run"), steps=2, deterministic=False)
    config = replace(config, rollout=replace(config.rollout, workers=4))
    with pytest.raises(InfraError, match="the engine failed: FloatingPointError: the card fell off the bus"):
        train.train(config)
    journal = Journal(config.directory / "journal.sqlite")
    assert "dropped" not in journal.counts()
    journal.close()
    train.train(config, resume=True)
    batches = trained(config.directory)
    assert [len(batch) for batch in batches] == [8, 8]
    assert all(t.reward is not None and t.outcome != "infra" for batch in batches for t in batch)


def test_a_learner_that_hangs_is_as_good_as_dead(tmp_path, monkeypatch):
    over, learn = threading.Event(), Loop.learn

    class Hangs(Chain):
        def step(self, rows):
            over.wait(60)

    def soon(self):
        self.deadline = 0.5
        learn(self)
        self.deadline = math.inf

    monkeypatch.setattr(parts, "EnginePart", Mouth)
    monkeypatch.setattr(parts, "LearnerPart", Hangs)
    monkeypatch.setattr(Loop, "learn", soon)
    with pytest.raises(PartGone, match=r"no answer within rollout.deadline=\S+ seconds"):
        train.train(walk(tmp_path, 0, 1, "wait", 2))
    over.set()


class Sleeper(parts.EnginePart):
    """Its every episode runs a command that hangs, then hands in."""

    def __init__(self, config):
        super().__init__(config)
        self.script = ScriptedPolicy(
            CwmRenderer(config.model), replies("<tool: bash>\nsleep 1000\n</tool>", "<tool: submit>\n</tool>")
        )

    def generate(self, *args):
        return self.script.generate(*args)


@pytest.mark.native
def test_a_hung_tool_ends_at_its_deadline_and_the_episode_goes_on(tmp_path, monkeypatch):
    """It is the policy's own doing: told to it, graded as it stands, and no failure of the infrastructure."""
    task = repairs.task

    def short(*arguments, **options):
        found = task(*arguments, **options)
        return replace(found, budget=replace(found.budget, command_seconds=0.5))

    monkeypatch.setattr(repairs, "task", short)
    monkeypatch.setattr(parts, "EnginePart", Sleeper)
    small = ["rollout.spawn=threads", "rollout.workers=4", "rollout.group_size=2", "learn.groups_per_step=2", "steps=1"]
    config = load(ROOT / "rl/recipes/tiny.toml", [*small, "eval.every=0", f"runs={tmp_path}"])
    assert "episodes lost to infrastructure: 0" in train.train(config)
    (batch,) = trained(config.directory)
    renderer = CwmRenderer(config.model)
    for trajectory in batch:
        assert (trajectory.stop, trajectory.outcome, trajectory.reward) == ("submitted", "unresolved", 0.0)
        assert "killed after 0.5 seconds" in renderer.decode(trajectory.segments[0].token_ids)
