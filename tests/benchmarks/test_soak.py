"""The soak in small: it finds what was left on purpose, and nothing after episodes that were killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.systems.soak import KINDS, Runs
from envs.sandbox import cgroups
from envs.sandbox.owner import PREFIX, Owner, current

ROOT = Path(__file__).parents[2]


def soak(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", "systems", "soak", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_what_is_left_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    runs = Runs()
    before = runs.count()
    (tmp_path / f"{PREFIX}{current().tag}-x").mkdir()
    (tmp_path / f"{PREFIX}{Owner.of(1).tag}-x").mkdir()
    with (ROOT / "README.md").open(), subprocess.Popen(["sleep", "60"]) as child:
        after = runs.count()
        child.kill()
    expected = {kind: int(kind in ("directories", "descriptors", "processes")) for kind in KINDS}
    assert {kind: after[kind] - before[kind] for kind in KINDS} == expected


@pytest.mark.root
def test_mounts_and_cgroups_are_counted(tmp_path: Path) -> None:
    runs = Runs()
    before = runs.count()
    found = cgroups.hierarchy()
    assert found
    group = found.parents["memory"] / f"{PREFIX}{current().tag}-soak"
    mine, others = tmp_path / current().tag, tmp_path / Owner.of(1).tag
    group.mkdir()
    for path in (mine, others):
        path.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "none", path], check=True)
    try:
        after = runs.count()
    finally:
        group.rmdir()
        subprocess.run(["umount", mine, others], check=True)
    assert (after["mounts"] - before["mounts"], after["cgroups"] - before["cgroups"]) == (1, 1)


@pytest.mark.native
def test_killed_episodes_leave_nothing(tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    done = soak("--live", "20", "--episodes", "12", "--workers", "2", "--docker-live", "0", "--json", str(out))
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    rows = {row["what"]: row for row in result["rows"]}
    assert {f"native: {kind} left" for kind in KINDS} <= rows.keys()
    assert result["ok"], [row for row in result["rows"] if row["met"] is False]
    assert rows["native: episodes done"]["ours"] >= 12 and rows["native: workers killed"]["ours"] >= 2


def test_too_few_is_one_line() -> None:
    done = soak("--live", "0")
    assert (done.returncode, done.stderr) == (2, "error: --live 0: at least 1; leave it out for the default\n")
