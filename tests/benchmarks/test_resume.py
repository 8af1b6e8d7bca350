"""Runs killed at random moments: exactly once relative to the surviving weights, all lengths, the same weights in the end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from agents.trajectory import Group, Segment, Trajectory
from benchmarks.systems.resume import trained_once
from rl.journal import Journal

ROOT = Path(__file__).parents[2]


def measured(out, *arguments):
    """The rows of the command, in a process of its own: it forks."""
    command = [sys.executable, "-m", "benchmarks", "systems", "resume", "--json", str(out), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return {row["what"]: row for row in json.loads(out.read_text())["rows"]}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_group_is_trained_once_or_dropped_whenever_runs_are_killed(tmp_path):
    """50 kills and more: at statements of the journal, at files, between events and in the middle of episodes."""
    rows = measured(tmp_path / "rows.json", "--kills", "50", "--episodes", "0", "--real-kills", "0")
    violations = rows["killed runs: violations"]
    assert violations["ours"] == 0, violations["spread"]
    assert (
        violations["n"] >= 50 and min(violations["spread"][kind] for kind in ("statement", "file", "event", "turn")) > 3
    )
    assert set(rows["killed runs: groups issued"]["spread"]) >= {"trained", "dropped: infra", "dropped: window"}
    assert rows["lengths issued and trained: KS"]["met"]


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.timeout(3600)
def test_lengths_are_those_that_were_issued(tmp_path):
    """And what leaving interrupted groups out would do is seen by the same statistic: the kills hit long episodes."""
    rows = measured(tmp_path / "rows.json", "--kills", "200", "--real-kills", "0")
    ours, without = (
        rows[f"lengths issued and trained{more}: KS"] for more in ("", ", were interrupted groups left out")
    )
    assert ours["met"] and ours["n"] >= 2000
    assert without["ours"] > float(without["spread"].split()[1].rstrip(","))


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.timeout(3600)
def test_deterministic_runs_end_with_the_same_weights(tmp_path):
    rows = measured(tmp_path / "rows.json", "--kills", "0", "--real-kills", "4")
    (row,) = (row for what, row in rows.items() if "differ" in what)
    assert row["ours"] == 0 and sum(row["spread"].values()) >= 4


def test_what_the_check_finds(tmp_path):
    """Weights that have seen what the journal doesn't say, and the other way round."""
    journal = Journal(tmp_path / "journal.sqlite")
    trajectory = Trajectory("t", segments=[Segment([5, 6], [0, 1], [0.0, -0.1], [-1, 0])], reward=1.0)
    for index, name in enumerate("abcd"):
        journal.issue(name, index, "t")
        journal.start(name, 0)
        journal.finish(Group(name, "t", [trajectory]))
    journal.drop("d", "stale")
    journal.train(["a", "b"], 1)
    journal.train(["c"], 2)
    assert trained_once(journal, [["a", "b"], ["c"]]) == []
    assert trained_once(journal, [["a", "b"]]) == ["trained and not in the weights: [('c', 2)]"]
    assert trained_once(journal, [["a", "b"], ["c", "d"]]) == ["in the weights, but not trained: [('d', 2)]"]
    twice = trained_once(journal, [["a", "b"], ["c"], ["a"]])
    assert twice == ["in the weights, but not trained: [('a', 3)]", "trained twice: ['a']"]
    journal.close()
