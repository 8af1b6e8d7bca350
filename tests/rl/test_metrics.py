"""Sinks get the same numbers, each of which is explained once; what a resumed run lost is gone."""

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest

from rl import train
from rl.config import ROOT, EnvConfig, EvalConfig
from rl.metrics import GLOSSARY, Sink, check, read, truncate


def test_steps_that_did_not_survive_are_in_neither_sink(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, behind in ((1, 0), (2, 1)):
        truncate(tmp_path / "metrics.jsonl", behind)
        sink = Sink(tmp_path, behind=behind)
        for step in range(first, 4):
            sink.write("step", {"step": step, "reward": float(first), "stops": {"submitted": step}})
        sink.close()
    assert [(r["step"], r["reward"]) for r in read(tmp_path / "metrics.jsonl")] == [(1, 1.0), (2, 2.0), (3, 2.0)]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("step/reward")] == [(1, 1.0), (2, 2.0), (3, 2.0)]
    assert [e.value for e in board.Scalars("step/stops/submitted")] == [1.0, 2.0, 3.0]


def test_what_a_run_logs_is_the_glossary(tmp_path):
    from benchmarks.systems import waits

    waits.model(tmp_path / "model")
    config = waits.config(tmp_path, groups=1, size=2, slots=2, steps=1, staleness=0)
    learn = replace(config.learn, algorithm="ppo", overrides={"correction": "truncate"})  # logs most
    sources = {"one": replace(config.env, window=(0.0, 1.0)), "two": config.env}
    config = replace(
        config, env=EnvConfig(), envs=sources, learn=learn, eval=EvalConfig(every=1, tasks=1), track=("tensorboard",)
    )
    train.train(config)
    assert {key for row in read(config.directory / "metrics.jsonl") for key in row} == set(GLOSSARY)


class Standin(ModuleType):
    """Stands in for the package: records what it is told."""

    def __init__(self):
        super().__init__("wandb")
        self.began, self.logged, self.axes, self.ended = [], [], [], 0

    def init(self, **settings):
        self.began.append(settings)
        return SimpleNamespace(
            log=self.logged.append,
            define_metric=lambda name, step_metric: self.axes.append((name, step_metric)),
            finish=self.end,
        )

    def end(self):
        self.ended += 1


def test_wandb_is_one_run_with_the_same_names_as_tensorboard(tmp_path, monkeypatch):
    wandb = Standin()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    (tmp_path / "recipe.toml").write_text("[learn]\nlr = 0.5\n")
    check(("wandb",))
    for step in (1, 2):  # the second time as a resumed run
        sink = Sink(tmp_path, ("wandb",))
        sink.write("step", {"step": step, "reward": 0.5, "stops": {"submitted": 3}})
        sink.write("eval", {"step": step, "split": "validation", "solve": 0.25})
        sink.write("end", {"step": step, "summary": "done"})
        sink.close()
    first, second = wandb.began
    assert first == second and first["resume"] == "allow" and first["project"] == "codeworld"
    assert first["name"] == tmp_path.name and first["config"] == {"learn": {"lr": 0.5}} and len(first["id"]) == 8
    assert wandb.logged[:2] == [
        {"step/reward": 0.5, "step/stops/submitted": 3, "step": 1},
        {"eval/validation/solve": 0.25, "step": 1},
    ]
    assert len(wandb.logged) == 4 and wandb.axes == [("*", "step")] * 2 and wandb.ended == 2
    assert not (tmp_path / "tensorboard").exists()


def test_a_tracker_that_is_not_there_is_told_before_anything_starts(tmp_path, monkeypatch):
    arguments = [str(ROOT / "rl/recipes/tiny.toml"), f"--runs={tmp_path}"]
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r'^track has "wandb", which is not installed; pip install wandb, [^\n]*$'):
        train.main([*arguments, '--track=["wandb"]'])
    with pytest.raises(ValueError, match=r"track='wandbb' is unknown; known are tensorboard, wandb$"):
        train.main([*arguments, '--track=["tensorboard", "wandbb"]'])
    assert not list(tmp_path.iterdir())


def test_a_refused_login_is_one_line(tmp_path, monkeypatch):
    wandb = Standin()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(wandb, "init", lambda **_: 1 / 0)
    (tmp_path / "recipe.toml").touch()
    with pytest.raises(
        ValueError, match=r"^track: wandb does not start \(division by zero\); [^\n]*WANDB_MODE=offline$"
    ):
        Sink(tmp_path, ("wandb",))
