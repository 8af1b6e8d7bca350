"""A checkpoint is whole or absent, also under kill -9."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rl import checkpoint

ROOT = Path(__file__).resolve().parents[2]


def fill(text: str):  # type: ignore[no-untyped-def]
    def inner(directory: Path) -> None:
        (directory / "a.bin").write_bytes(text.encode() * 100)
        (directory / "deep").mkdir()
        (directory / "deep" / "b.bin").write_bytes(b"b")

    return inner


def test_newest_wins_and_old_ones_go(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "none") is None and checkpoint.steps(tmp_path) == []
    for step in (1, 2, 10, 1_000_000):
        path = checkpoint.write(tmp_path, step, fill(f"{step}"), keep=2)
        assert checkpoint.latest(tmp_path) == path and checkpoint.step_of(path) == step
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000010", "step-1000000"]


def test_a_failing_fill_changes_nothing(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, 1, fill("x"))

    def fails(directory: Path) -> None:
        fill("y")(directory)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.write(tmp_path, 2, fails)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


def test_left_overs_are_removed_and_a_step_is_written_once(tmp_path: Path) -> None:
    (tmp_path / ".tmp-step-000007").mkdir()
    (tmp_path / ".tmp-step-000007" / "half").write_text("x")
    checkpoint.write(tmp_path, 7, fill("x"))
    path = checkpoint.write(tmp_path, 7, fill("y"))
    assert (path / "a.bin").read_bytes() == b"x" * 100
    assert [p.name for p in tmp_path.iterdir()] == ["step-000007"]


@pytest.mark.parametrize(
    ("harm", "cause"),
    [
        (lambda p: (p / "a.bin").write_bytes(b"x" * 99 + b"z"), "a.bin has another CRC-32 than when it was written"),
        (lambda p: (p / "a.bin").write_bytes(b"x" * 50), "a.bin has 50 bytes instead of 100"),
        (lambda p: (p / "deep" / "b.bin").unlink(), "deep/b.bin is missing"),
        (lambda p: (p / "manifest.json").unlink(), "it has no manifest.json"),
        (lambda p: (p / "manifest.json").write_text("{"), "manifest.json can't be read"),
        (lambda p: (p / "manifest.json").write_text("[]"), "manifest.json can't be read"),
        (lambda p: (p / "manifest.json").write_text('{"step": 4, "files": {}}'), "it was written for step 4"),
    ],
)
def test_damage_is_named_with_a_remedy(tmp_path: Path, harm: object, cause: str) -> None:
    path = checkpoint.write(tmp_path, 5, fill("x"))
    harm(path)  # type: ignore[operator]
    with pytest.raises(ValueError) as error:
        checkpoint.latest(tmp_path)
    assert str(path) in str(error.value) and cause in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).endswith("remove it to start anew")
    checkpoint.write(tmp_path, 3, fill("x"))
    with pytest.raises(ValueError, match=r"remove it to go on from .*step-000003$"):
        checkpoint.latest(tmp_path)


def test_other_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="isn't step-NNNNNN"):
        checkpoint.check(tmp_path / "final")


WRITER = """
import sys
from pathlib import Path
from rl import checkpoint
def fill(directory):
    for i in range(5):
        (directory / f"{i}.bin").write_bytes(bytes([i]) * 200_000)
for step in range(int(sys.argv[2]), 10**6):
    checkpoint.write(Path(sys.argv[1]), step, fill, keep=2)
    print(step, flush=True)
"""


def test_kill_at_random_moments(tmp_path: Path) -> None:
    """After kill -9 the newest checkpoint is whole and at most one step beyond the last that was reported."""
    rng, done = random.Random(0), 0
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(done)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert process.stdout is not None
        reported = int(process.stdout.readline())
        time.sleep(rng.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        reported = max([reported, *(int(line) for line in process.stdout)])
        process.wait()
        path = checkpoint.latest(tmp_path)
        assert path is not None and checkpoint.step_of(path) in (reported, reported + 1)
        done = checkpoint.step_of(path) + 1
    assert done > 6


STEPPER = """
import os, sys
from pathlib import Path
from rl import checkpoint
calls = 0
os.fsync = lambda descriptor: None  # matters for a power cut, not for the end of a process; and is slow
def fill(directory):
    (directory / "a.bin").write_bytes(b"a" * 100)
for limit in range(10**6):
    root = Path(sys.argv[1]) / str(limit)
    checkpoint.write(root, 0, fill, keep=1)
    child = os.fork()
    if not child:
        def count(frame, event, argument):
            global calls
            calls += event == "c_call"
            if calls > limit:
                os._exit(9)
        sys.setprofile(count)
        checkpoint.write(root, 1, fill, keep=1)
        os._exit(0)
    os.waitpid(child, 0)
    steps = checkpoint.steps(root)
    assert steps in ([0], [0, 1], [1]), steps
    assert checkpoint.step_of(checkpoint.latest(root)) == steps[-1]
    checkpoint.write(root, 2, fill, keep=1)
    assert os.listdir(root) == ["step-000002"], "left-overs stay"
    if steps == [1]:
        break
print(limit)
"""


def test_an_end_at_every_single_call(tmp_path: Path) -> None:
    """The process ends at the first call, the second, ...: each time the newest checkpoint is whole."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", STEPPER, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 50
