"""The user's command, in a subprocess: two steps, resume after Ctrl-C and kill -9, a dead worker, and one-line errors."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agents.trajectory import Trajectory
from benchmarks.systems.base import tree
from policy.renderer import CwmRenderer
from rl.journal import Journal, RunLock

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "--learn.groups_per_step=3",
    "--rollout.group_size=4",
    "--rollout.episodes=16",
    "--eval.tasks=8",
    "--eval.every=2",
]


def command(*args, runs):
    return [
        sys.executable,
        str(ROOT / "rl/train.py"),
        str(ROOT / "rl/recipes/tiny.toml"),
        f"--runs={runs}",
        *SMALL,
        *args,
    ]


def train(*args, runs, **kwargs):
    return subprocess.run(command(*args, runs=runs), capture_output=True, text=True, timeout=280, **kwargs)


def rows(directory, kind):
    return [r for r in map(json.loads, (directory / "metrics.jsonl").read_text().splitlines()) if r["kind"] == kind]


def finished(directory):
    """Every issued group ended trained once or dropped with a reason, or was still on its way at the end."""
    journal = Journal(directory / "journal.sqlite")
    entries = journal.entries()
    journal.close()
    assert all(e.reason for e in entries if e.state == "dropped")
    return {s: [e for e in entries if e.state == s] for s in ("trained", "dropped", "done", "running", "pending")}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps of the committed recipe through Ray, at a small size."""
    runs = tmp_path_factory.mktemp("runs")
    done = train("--steps=2", runs=runs)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return runs / "tiny", done.stdout


def test_two_steps_leave_everything(run):
    directory, out = run
    for name in (
        "recipe.toml",
        "journal.sqlite",
        "metrics.jsonl",
        "report.html",
        "model/config.json",
        "model/model.safetensors",
        "model/tokenizer.json",
    ):
        assert (directory / name).is_file(), name
    assert list((directory / "tensorboard").iterdir()) and list((directory / "checkpoints").glob("step-000002"))
    assert [r["step"] for r in rows(directory, "step")] == [1, 2]
    assert {r["step"] for r in rows(directory, "eval")} == {0, 2}
    assert "bottleneck: " in out and "agreed within" in out and "token ids asserted" in out
    assert "<svg" in (directory / "report.html").read_text()


def test_trajectories_are_exact_tokens(run):
    directory, _ = run
    renderer = CwmRenderer(directory / "model")
    lines = [line for p in sorted((directory / "trajectories").iterdir()) for line in p.read_text().splitlines()]
    assert len(lines) == 2 * 3 * 4
    for line in lines:
        trajectory = Trajectory.from_json(line)
        (segment,) = trajectory.segments
        assert segment.token_ids[0] == renderer.start("")[0]
        assert sum(segment.loss_mask) == sum(p < 0 for p in segment.logprobs) or 0.0 in segment.logprobs
        assert all((v >= 0) == bool(m) for v, m in zip(segment.versions, segment.loss_mask, strict=True))


def test_parity_and_ledger_are_in_the_record(run):
    directory, _ = run
    assert all(0 <= r["parity"] <= 1e-4 for r in rows(directory, "step"))
    first, second = (r["mismatch_kl"] for r in rows(directory, "step"))
    assert abs(first) < 1e-6 < second, "the first batch is of the very weights that train on it, the second is older"
    (end,) = rows(directory, "end")
    assert set(end["ledgers"]) == {"engine", "episodes", "learner", "loop"}
    assert end["unexplained"] <= 0.01 and "labels miss the wall clock by 0." in end["summary"]
    for part, labels in end["ledgers"].items():
        assert sum(labels.values()) == pytest.approx(end["wall"] * (16 if part == "episodes" else 1), rel=0.02), part
        assert labels["wait_start"] < 0.9 * sum(labels.values())


@pytest.mark.slow
def test_a_finished_run_is_not_overwritten_and_resumes_to_more_steps(run, tmp_path):
    directory, _ = run
    again = train("--steps=2", runs=directory.parent)
    assert again.returncode == 2 and "holds a run; add --resume" in again.stderr and again.stderr.count("\n") == 1
    more = train("--steps=3", "--resume", runs=directory.parent)
    assert more.returncode == 0, more.stderr[-2000:]
    assert "resumed at step 2" in more.stdout
    assert [r["step"] for r in rows(directory, "step")] == [1, 2, 3]
    states = finished(directory)
    assert len(states["trained"]) == 9
    assert sorted(e.trained_step for e in states["trained"]) == [1, 1, 1, 2, 2, 2, 3, 3, 3]


def wait_for(path, text, process, seconds=200):
    limit = time.monotonic() + seconds
    while time.monotonic() < limit and process.poll() is None:
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.2)
    raise AssertionError(f"{text!r} did not appear in {path}")


@pytest.mark.slow
@pytest.mark.parametrize("how", [pytest.param(signal.SIGINT, marks=pytest.mark.proof), signal.SIGKILL])
def test_resume_after(how, tmp_path):
    log = tmp_path / "log"
    with log.open("w") as handle:
        process = subprocess.Popen(
            command("--steps=30", "--checkpoint_every=2", "--eval.every=0", runs=tmp_path),
            stdout=handle,
            stderr=handle,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
        )
    wait_for(log, "step 3/30", process)
    os.killpg(process.pid, how)  # driver, raylet and actors at once, as a terminal does
    code = process.wait(60)
    assert code == (130 if how == signal.SIGINT else -9), log.read_text()[-2000:]
    reached = max(r["step"] for r in rows(tmp_path / "tiny", "step"))
    done = train(f"--steps={reached + 2}", "--eval.every=0", "--resume", runs=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed at step" in done.stdout
    states = finished(tmp_path / "tiny")
    assert sorted(e.trained_step for e in states["trained"]) == sorted(
        s for s in range(1, reached + 3) for _ in range(3)
    )
    assert [r["step"] for r in rows(tmp_path / "tiny", "step")] == list(range(1, reached + 3))


def command_line(pid):
    """Of a process that may end meanwhile, as sandboxes do."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


@pytest.mark.slow
def test_a_dead_rollout_worker_is_replaced(tmp_path):
    log = tmp_path / "log"
    with log.open("w") as handle:
        process = subprocess.Popen(command("--steps=8", "--eval.every=0", runs=tmp_path), stdout=handle, stderr=handle)
    wait_for(log, "step 1/8", process)
    found = [pid for pid, _ in tree(process.pid) if "ray::RolloutWorker" in command_line(pid)]
    assert found, "no rollout worker process"
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    assert process.wait(200) == 0, log.read_text()[-3000:]
    last = rows(tmp_path / "tiny", "step")[-1]
    assert last["step"] == 8 and last["infra"] >= 1
    (end,) = rows(tmp_path / "tiny", "end")
    assert end["unexplained"] <= 0.01 and end["ledgers"]["episodes"]["lost"] > 0
    assert any(r["mixed"] > 0 for r in rows(tmp_path / "tiny", "step")), "no trajectory saw two versions"
    assert any(r["engine_busy"] + r["learner_busy"] > 1.05 for r in rows(tmp_path / "tiny", "step")), "no overlap"
    for path in (tmp_path / "tiny" / "trajectories").iterdir():
        for line in path.read_text().splitlines():
            trajectory = Trajectory.from_json(line)
            assert trajectory.outcome != "infra" or trajectory.reward is None


@pytest.mark.slow
def test_a_dead_learner_rank_ends_the_run_and_another_number_resumes_it(tmp_path):
    log = tmp_path / "log"
    ranks = ("--learn.ranks=2", "--restarts=0", "--checkpoint_every=1", "--eval.every=0")
    with log.open("w") as handle:
        process = subprocess.Popen(command("--steps=30", *ranks, runs=tmp_path), stdout=handle, stderr=handle)
    wait_for(log, "step 2/30", process)
    found = [pid for pid, _ in tree(process.pid) if "ray::LearnerPart" in command_line(pid)]
    assert len(found) == 2
    os.kill(found[-1], signal.SIGKILL)
    assert process.wait(120) == 1, log.read_text()[-3000:]
    assert re.search(
        r"\nerror: the run stopped: learner-\d is gone or late: \w+; go on with --resume\n", log.read_text()
    )
    assert "Traceback" not in log.read_text()
    assert not [pid for pid in found if command_line(pid)]
    reached = max(r["step"] for r in rows(tmp_path / "tiny", "step"))
    done = train(f"--steps={reached + 2}", "--learn.ranks=1", "--resume", runs=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(finished(tmp_path / "tiny")["trained"]) == 3 * (reached + 2)


MISTAKES = {
    "unknown key": (["--learn.lrr=1"], "unknown key 'lrr'"),
    "unknown env": (["--env.id=codeworld/SWE-v9"], "Did you mean 'codeworld/SWE-v0'"),
    "unknown preset": (["--learn.algorithm=gropo"], "Did you mean 'grpo'"),
    "no model": (["--policy.model=/nowhere"], "no tokenizer at /nowhere"),
    "stray argument": (["steps=2"], "argument 'steps=2' is not understood"),
    "nothing to resume": (["--resume"], "nothing to resume"),
    "bad backend": (['--env.kwargs.backend="dockr"'], "dockr"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_status_2_nothing_written(name, tmp_path):
    extra, said = MISTAKES[name]
    done = train("--steps=1", *extra, runs=tmp_path)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "tiny").exists()


def test_a_run_directory_in_use(tmp_path):
    lock = RunLock(tmp_path / "tiny")
    (tmp_path / "tiny/journal.sqlite").touch()
    done = train("--steps=1", runs=tmp_path)
    lock.release()
    assert done.returncode == 2 and f"in use by process {os.getpid()}" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_an_episode_past_its_deadline_is_lost_and_tried_again(tmp_path):
    """Its worker is killed, all that it played is played again, and the run ends as if nothing had been."""
    (tmp_path / "mine.py").write_text(
        "import envs, pathlib, time\n"
        "class Mine(envs.Env):\n"
        "    def reset(self, *, seed=None, options=None):\n"
        "        super().reset(seed=seed)\n"
        "        return 'hi', {}\n"
        "    def step(self, action):\n"
        "        try:\n"
        "            pathlib.Path('MARK').touch(exist_ok=False)\n"
        "        except FileExistsError:\n"
        "            return '', float(len(action) % 2), True, False, {}\n"
        "        time.sleep(1000)\n".replace("MARK", str(tmp_path / "mark"))
    )
    more = ("--steps=1", "--env.id=mine:Mine", "--eval.every=0", "--rollout.deadline=8")
    done = train(*more, runs=tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert rows(tmp_path / "tiny", "step")[-1]["infra"] >= 1


def test_a_corrupt_checkpoint(run):
    directory, _ = run
    newest = sorted((directory / "checkpoints").glob("step-*"))[-1]
    victim = next(p for p in newest.rglob("*") if p.is_file() and p.name != "manifest.json")
    kept = victim.read_bytes()
    victim.write_bytes(kept[:-1])
    done = train("--steps=9", "--resume", runs=directory.parent)
    victim.write_bytes(kept)
    assert done.returncode == 2 and "is damaged" in done.stderr and done.stderr.count("\n") == 1


def test_threads_with_one_worker_is_one_stack(tmp_path):
    """A breakpoint in an env's `step` stops the run with the whole stack, from the loop's worker to the env, in one process."""
    env = tmp_path / "mine.py"
    env.write_text(
        "import envs, os\n"
        "class Mine(envs.Env):\n"
        "    def reset(self, *, seed=None, options=None):\n"
        "        super().reset(seed=seed)\n"
        "        return 'hi', {}\n"
        "    def step(self, action):\n"
        "        breakpoint()\n"
        "        return '', 1.0, True, False, {}\n"
    )
    args = command(
        "--steps=1",
        "--spawn",
        "threads",
        "--workers",
        "1",
        "--env.id=mine:Mine",
        "--eval.every=0",
        runs=tmp_path,
    )
    done = subprocess.run(
        args,
        input="p 'stopped at', action is not None\nq\n",
        capture_output=True,
        text=True,
        timeout=200,
        cwd=tmp_path,
    )
    assert "('stopped at', True)" in done.stdout, done.stdout[-1000:] + done.stderr[-1000:]
