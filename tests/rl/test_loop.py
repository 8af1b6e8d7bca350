"""The loop with real parts on threads: scripted actions through real workers, sandboxes, learner and engine."""

import json
import math
import os
import random
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from agents.trajectory import Trajectory
from envs.errors import InfraError
from envs.tiny import repairs
from envs.tiny.experts import Expert, Noise
from policy.scripted import ScriptedPolicy
from rl import parts, train
from rl.config import ROOT, load
from rl.journal import Journal
from rl.loop import parity_of

SMALL = [
    "rollout.spawn=threads", "rollout.workers=4", "rollout.group_size=4", "learn.groups_per_step=2", "steps=2", "eval.tasks=4", "eval.every=1",
    "checkpoint_every=1",
]  # fmt: skip


class Experts:
    """A script per episode: the task is known by the statement, the noise by the episode's name."""

    def __init__(self):
        self.tasks = {}
        self.experts = {}

    def __call__(self, episode, observation):
        if episode not in self.experts:
            group, index = (
                episode.split("/")[:2] if episode.startswith("g") else (episode.split("/")[1], episode.split("/")[3])
            )
            split = "train" if group.startswith("g") else group.split(".")[-1]
            task = repairs.task(split, int(index))
            noise = Noise(right=0.5, miss=0.0, skip=0.0, detour=0.0, test=0.0)
            self.experts[episode] = Expert(task, random.Random(episode), noise)
        return self.experts[episode](observation)


class ScriptedEngine(parts.EnginePart):
    """The engine with a scripted mouth: weights, versions and scores are real."""

    def __init__(self, config):
        super().__init__(config)
        from policy.renderer import CwmRenderer

        self.script = ScriptedPolicy(CwmRenderer(config.model), Experts())

    def generate(self, *args):
        return self.script.generate(*args)

    def release(self, episode):
        self.script.release(episode)

    def publish(self, version, weights):
        self.script.version = super().publish(version, weights)
        return version


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setattr(parts, "EnginePart", ScriptedEngine)


def config(tmp_path, *more):
    return load(ROOT / "rl/recipes/tiny.toml", [*SMALL, f"runs={tmp_path}", *more])


def test_scripted_experts_through_the_real_loop(scripted, tmp_path):
    summary = train.train(config(tmp_path))
    assert "16 trajectories trained, token ids asserted on every one" in summary and "bottleneck:" in summary
    lines = [line for p in (tmp_path / "tiny" / "trajectories").iterdir() for line in p.read_text().splitlines()]
    played = [Trajectory.from_json(line) for line in lines]
    assert {t.outcome for t in played} == {"resolved", "unresolved"}
    assert all((t.reward == 1.0) == (t.outcome == "resolved") for t in played)
    assert all(t.stop == "submitted" and t.turns == 3 for t in played)
    rows = [json.loads(line) for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert [(r["kind"], r["step"]) for r in rows if r["kind"] == "step"] == [("step", 1), ("step", 2)]
    assert sorted(r["step"] for r in rows if r["kind"] == "eval") == [0, 1, 2]


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="a sandbox's uid is known where root made it")
def test_infrastructure_failures_are_masked_and_refilled(scripted, tmp_path, monkeypatch):
    """Every fourth sandbox is killed at its first command: no reward comes of it, and every batch is full all the same."""
    from envs.sandbox import native

    real, calls = native.NativeSandbox.run, [0]

    def run(self, script, **kwargs):
        if script.startswith("cat"):
            calls[0] += 1
            if calls[0] % 4 == 0:
                kill_sandbox(self)
        return real(self, script, **kwargs)

    monkeypatch.setattr(native.NativeSandbox, "run", run)
    summary = train.train(config(tmp_path, "eval.every=0"))
    assert "episodes lost to infrastructure: 0" not in summary
    journal = Journal(tmp_path / "tiny" / "journal.sqlite")
    trained = [e for e in journal.entries() if e.state == "trained"]
    journal.close()
    assert sorted(e.trained_step for e in trained) == [1, 1, 2, 2]
    for path in (tmp_path / "tiny" / "trajectories").iterdir():
        for line in path.read_text().splitlines():
            trajectory = Trajectory.from_json(line)
            assert (trajectory.reward is None) == (trajectory.outcome == "infra")


def test_a_broken_parity_stops_the_run(scripted, tmp_path, monkeypatch):
    monkeypatch.setattr(
        ScriptedEngine, "score", lambda self, s: [[x + 0.001 for x in row] for row in self.engine.score(s)]
    )
    with pytest.raises(InfraError, match="differ by 1.0.e-03 nats under version 1"):
        train.train(config(tmp_path))


def test_the_authors_mistake_is_an_exception_with_its_line(scripted, tmp_path, monkeypatch):
    from envs.swe.env import SWEEnv

    def step(self, action):
        raise ZeroDivisionError("in the env")

    monkeypatch.setattr(SWEEnv, "step", step)
    with pytest.raises(ZeroDivisionError, match="in the env"):
        train.train(config(tmp_path))


def kill_sandbox(sandbox):
    """SIGKILL to every process of a native sandbox: as root each has a uid of its own."""
    from envs.sandbox.stacked import host_uid

    uid = host_uid(sandbox._live.world.owner)
    killed = 0
    for process in Path("/proc").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # the first one's end is the end of all
            if process.name.isdigit() and process.stat().st_uid == uid:
                os.kill(int(process.name), signal.SIGKILL)
                killed += 1
    assert killed, "no process of the sandbox was found"


@pytest.mark.parametrize("stale", ["wait", "drop"])
def test_staleness_is_bounded(scripted, tmp_path, stale):
    train.train(config(tmp_path, f"learn.stale={stale}", "learn.max_staleness=1", "steps=4", "eval.every=0"))
    rows = [json.loads(line) for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert max(r["staleness_max"] for r in rows if r["kind"] == "step") <= 1


def test_an_engine_that_always_fails_ends_the_run(scripted, tmp_path, monkeypatch):
    def generate(self, *args):
        raise InfraError("the engine is gone")

    monkeypatch.setattr(ScriptedEngine, "generate", generate)
    with pytest.raises(InfraError, match="episodes in a row were lost to the infrastructure.*the engine is gone"):
        train.train(config(tmp_path))


def test_no_number_is_no_parity():
    assert parity_of([[-1.0], [-2.0]], [[-1.0], [-2.00005]], 1) == pytest.approx(5e-5)
    for value in (math.nan, math.inf, -1.001):
        with pytest.raises(InfraError, match="under version 3"):
            parity_of([[-1.0, -1.0]], [[-1.0, value]], 3)


def arguments(tmp_path, *more):
    return [str(ROOT / "rl/recipes/tiny.toml"), *(f"--{item}" for item in (*SMALL, f"runs={tmp_path}", *more))]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("learn.minibatches=0", "minibatches"),
        ("learn.max_staleness=-1", "max_staleness"),
        ('eval.splits=["valid"]', "split"),
        ("env.split=trian", "split"),
        ('env.kwargs.tasks="tiny-repair"', "tiny-repair"),
        ("policy.model={torn}", "torn/model.safetensors can't be read"),
        ("policy.model={other}", "vocab_size=96, its tokenizer.json 629 tokens; give the tokenizer"),
        ("policy.model={qwen}", "runs models of type cwm and llama, not 'qwen3'; serve it with vllm"),
        ("policy.model={dumb}", "tokenizer .*dumb/tokenizer.json can't be read"),
        ("policy.model={mute}", "chat template of .*mute shows no dialogue of user and assistant"),
        ("policy.max_context=1025", "policy.max_context=1025 is more than the 1024 positions"),
        ("learn.max_tokens=700", "max_tokens=700 is less than learner.context=768"),
        ('env.kwargs.tasks="{empty}"', "empty' is empty; add at least one task"),
    ],
)
def test_what_can_not_be_run_starts_nothing_and_leaves_nothing(tmp_path, monkeypatch, override, said):
    for name in ("torn", "other", "qwen", "mute", "dumb"):
        shutil.copytree(ROOT / "policy/cwm_tiny", tmp_path / name)
    torn = tmp_path / "torn/model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    other = json.loads((tmp_path / "other/config.json").read_text())
    (tmp_path / "other/config.json").write_text(json.dumps(other | {"vocab_size": 96}))
    (tmp_path / "qwen/config.json").write_text(json.dumps(other | {"model_type": "qwen3"}))
    (tmp_path / "mute/chat_template.jinja").write_text("hello")
    (tmp_path / "dumb/tokenizer.json").write_text("{")
    (tmp_path / "empty/blobs").mkdir(parents=True)
    (tmp_path / "empty/tasks.jsonl").touch()
    monkeypatch.setattr("rl.spawn.start", lambda mode: pytest.fail("a part was started"))
    paths = {name: tmp_path / name for name in ("torn", "other", "qwen", "mute", "dumb", "empty")}
    with pytest.raises(ValueError, match=said) as error:
        train.main(arguments(tmp_path, override.format(**paths)))
    assert "\n" not in str(error.value) and not (tmp_path / "tiny").exists()


def test_a_run_goes_on_with_its_own_recipe_and_counts_as_one(scripted, tmp_path, capsys):
    train.main(arguments(tmp_path, "learn.algorithm=grpo", "steps=1"))
    train.main(arguments(tmp_path, "resume", "steps=2"))
    out = capsys.readouterr().out
    assert "changed by this command line: steps = 2" in out and "16 trajectories trained" in out
    assert 'algorithm = "grpo"' in (tmp_path / "tiny/recipe.toml").read_text()
    assert "16 trajectories trained" in (tmp_path / "tiny/report.html").read_text()


def ctrl_c_behind(real):
    def method(self, *args):
        real(self, *args)
        raise KeyboardInterrupt

    return method


def test_ctrl_c_keeps_the_update_under_way_and_writes_the_report(scripted, tmp_path, monkeypatch):
    from rl.loop import Loop

    monkeypatch.setattr(Loop, "publish", ctrl_c_behind(Loop.publish))
    with pytest.raises(KeyboardInterrupt):
        train.train(config(tmp_path, "checkpoint_every=100"))
    assert (tmp_path / "tiny/checkpoints/step-000001").is_dir()
    assert "<svg" in (tmp_path / "tiny/report.html").read_text()


def groups_of(directory):
    """Trained trajectories by group of their task, from the run's record."""
    found = {}
    for path in (directory / "trajectories").iterdir():
        for line in path.read_text().splitlines():
            trajectory = Trajectory.from_json(line)
            found.setdefault(trajectory.task_id, []).append(trajectory.sample)
    return found


def test_spare_episodes_are_played_and_left_out(scripted, tmp_path):
    """Six start, the first four that end make the group; what the others come to is no failure of the infrastructure."""
    summary = train.train(config(tmp_path, "admission.spare=2", "eval.every=0"))
    groups = groups_of(tmp_path / "tiny")
    assert len(groups) == 4 and all(len(set(samples)) == 4 for samples in groups.values())
    assert "16 trajectories trained" in summary and "episodes lost to infrastructure: 0" in summary


def test_no_more_sandboxes_than_allowed(scripted, tmp_path, monkeypatch):
    from envs.swe.env import SWEEnv

    live, most = set(), [0]

    def reset(self, **kwargs):
        found = real_reset(self, **kwargs)  # begins with a `close`
        live.add(id(self))
        most[0] = max(most[0], len(live))
        return found

    def close(self):
        live.discard(id(self))
        real_close(self)

    real_reset, real_close = SWEEnv.reset, SWEEnv.close
    monkeypatch.setattr(SWEEnv, "reset", reset)
    monkeypatch.setattr(SWEEnv, "close", close)
    train.train(config(tmp_path, "admission.sandboxes=2"))
    assert most[0] == 2


def test_a_loaded_engine_has_fewer_episodes(scripted, tmp_path, monkeypatch):
    from rl.loop import Loop

    limits = []
    real = Loop._send
    monkeypatch.setattr(ScriptedEngine, "load", lambda self: 1.0, raising=False)
    monkeypatch.setattr(Loop, "_send", lambda self, order: (limits.append(self.admission.limit), real(self, order)))
    train.train(config(tmp_path, "admission.load=0.5", "admission.interval=0.01", "steps=1", "eval.every=0"))
    assert limits[0] == 4 and limits[-1] == 1


def test_a_real_engine_with_room_for_two_of_four_episodes(tmp_path):
    """Nothing scripted: what the model says is graded and trained as ever, two at a time."""
    summary = train.train(
        config(tmp_path, "admission.kv_tokens=1600", "steps=1", "eval.every=0", "learn.groups_per_step=1")
    )
    assert "4 trajectories trained, token ids asserted on every one" in summary


def rows_of(directory):
    """The run's steps on record, and its groups."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    journal = Journal(directory / "journal.sqlite")
    entries = journal.entries()
    journal.close()
    return [row for row in rows if row["kind"] == "step"], entries


MIXED = [
    "env={}", "rollout.group_size=2", "learn.groups_per_step=3", "learn.max_staleness=0", "envs.a.weight=2", "envs.b.first_task=50",
    *(f'envs.{n}.kwargs={{tasks = "tiny-repairs", reward = "binary", context_lines = 0}}' for n in "ab"),
    "stages=[{step = 1, rollout.group_size = 4, envs.b.weight = 4, envs.b.max_turns = 2}]",
]  # fmt: skip


def test_sources_are_mixed_and_stages_change_the_mixture(scripted, tmp_path):
    """Two steps of three groups: 2 of a and 1 of b, then 1 of a and 2 of b in groups of four, those of b cut after two turns."""
    train.train(config(tmp_path, *MIXED, "eval.every=2", "eval.tasks=1"))
    rows, entries = rows_of(tmp_path / "tiny")
    assert [row["source_groups"] for row in rows] == [{"a": 2, "b": 1}, {"a": 1, "b": 2}]
    assert [(e.id, e.stage) for e in entries if e.source == "b"] == [("g50.b", 0), ("g51.b", 1), ("g52.b", 1)]
    second = (tmp_path / "tiny/trajectories/step-000002.jsonl").read_text().splitlines()
    cut = {b: [t for t in map(Trajectory.from_json, second) if ("/5" in t.task_id) is b] for b in (True, False)}
    assert (len(cut[True]), len(cut[False])) == (8, 4)
    assert {(t.turns, t.stop) for t in cut[True]} == {(2, "turn_limit")} and {t.turns for t in cut[False]} == {3}
    solved = sum(t.outcome == "resolved" for t in cut[True]) / 8
    assert rows[1]["source_solve"]["b"] == rows[1]["source_reward"]["b"] == solved > 0
    kept = sorted(p.name for p in (tmp_path / "tiny/evaluations").iterdir())
    assert kept == [f"{source}.validation-00000{step}.jsonl" for source in "ab" for step in (0, 2)]
    assert "Solve rate by source of tasks" in (tmp_path / "tiny/report.html").read_text()


@pytest.mark.slow
def test_an_interrupted_mixture_goes_on_as_it_would_have(scripted, tmp_path, monkeypatch):
    from rl.loop import Loop

    more = (*MIXED, "eval.every=0", "steps=3", "envs.b.window=[0.3, 1.0]")
    train.main(arguments(tmp_path, *more, "name=whole"))
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "publish", ctrl_c_behind(Loop.publish))
        with pytest.raises(KeyboardInterrupt):
            train.main(arguments(tmp_path, *more, "name=torn"))
    train.main([*arguments(tmp_path, *more, "name=torn"), "--resume"])
    whole, torn = ([(e.id, e.source, e.stage) for e in rows_of(tmp_path / name)[1]] for name in ("whole", "torn"))
    assert whole == torn and {stage for *_, stage in whole} == {0, 1}


def test_groups_outside_of_the_window_are_replaced(scripted, tmp_path):
    train.train(config(tmp_path, "env.window=[0.3, 0.8]", "eval.every=0", "steps=2"))
    rows, entries = rows_of(tmp_path / "tiny")
    inside = {e.state for e in entries if e.graded and 0.3 <= e.solved / e.graded <= 0.8}
    outside = [(e.state, e.reason) for e in entries if e.graded and not 0.3 <= e.solved / e.graded <= 0.8]
    assert inside <= {"trained", "done"} and set(outside) == {("dropped", "window")}
    assert [e.trained_step for e in entries if e.trained_step].count(2) == 2
    assert 0 < rows[-1]["outside"]["env"] <= len(outside) and rows[-1]["dropped_groups"] <= len(outside)


def test_no_task_left_is_a_clean_stop_and_a_wider_window_goes_on(scripted, tmp_path, capsys):
    """Of two episodes 40 % can't be resolved: ten batches of groups are played in vain."""
    few = ("rollout.group_size=2", "learn.groups_per_step=1", "eval.every=0", "steps=1")
    with pytest.raises(
        ValueError, match=r"zero tasks left .*: the last 1\d groups of env have .* window \[0.4, 0.4\]; widen"
    ):
        train.main(arguments(tmp_path, *few, "env.window=[0.4, 0.4]"))
    assert (
        tmp_path / "tiny/report.html"
    ).exists() and "stopped at step 0; go on with --resume" in capsys.readouterr().out
    before = rows_of(tmp_path / "tiny")[1]
    assert len(before) >= 10 and {(e.state, e.reason) for e in before} == {("dropped", "window")}
    train.main([*arguments(tmp_path, *few, "env.window=[0, 1]"), "--resume"])
    after = rows_of(tmp_path / "tiny")[1]
    assert after[: len(before)] == before and after[-1].state == "trained"
    assert [e.task_index for e in after] == list(range(1_000_000, 1_000_000 + len(after)))
