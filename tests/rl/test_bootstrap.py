"""Rounds of RL, rejection sampling and SFT with the real model; and the solve rates that a window reads."""

import json

import pytest

from rl.__main__ import main
from rl.config import ROOT
from rl.journal import Journal

SMALL = [
    "--rollout.spawn=threads", "--rollout.workers=2", "--rollout.group_size=4", "--learn.groups_per_step=2",
    "--steps=1", "--eval.tasks=2", "--name=b",
]  # fmt: skip
RECIPE = str(ROOT / "rl/recipes/tiny_bootstrap.toml")


@pytest.mark.slow
def test_rounds_begin_with_what_the_last_one_made_and_are_not_done_again(tmp_path, capsys, monkeypatch):
    from rl import sft

    real, begun = sft.imitate, []
    monkeypatch.setattr(
        sft, "imitate", lambda run, model, *rest: (begun.append(model.name), real(run, model, *rest))[1]
    )
    arguments = ["bootstrap", RECIPE, *SMALL, f"--runs={tmp_path}"]
    assert main([*arguments, "--rounds=1"]) == 0
    first = (tmp_path / "b/round-1/sft/model.safetensors").read_bytes()
    capsys.readouterr()
    assert main([*arguments, "--rounds=2"]) == 0
    table = capsys.readouterr().out.split("held-out tasks solved (of 2)\n")[1].splitlines()
    assert [line.split()[0] for line in table] == ["start", "round-1-rl", "round-1-sft", "round-2-rl", "round-2-sft"]
    assert (tmp_path / "b/round-1/sft/model.safetensors").read_bytes() == first
    assert begun == ["cwm_tiny", "cwm_tiny"]  # each SFT begins with the first model
    recipe = (tmp_path / "b/round-2/recipe.toml").read_text()
    assert f'model = "{tmp_path}/b/round-1/sft"' in recipe
    with pytest.raises(ValueError, match="holds rounds of another recipe; choose another --name"):
        main([*arguments, "--steps=2"])


@pytest.mark.slow
def test_measured_rates_are_what_a_window_reads(tmp_path, capsys):
    out = tmp_path / "rates.jsonl"
    assert main(["rates", RECIPE, *SMALL, "--tasks=3", "--samples=2", f"--out={out}"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["index"], r["task"], r["graded"]) for r in rows] == [
        (i, f"tiny-repairs/train/{i}", 2) for i in range(1_000_000, 1_000_003)
    ]
    out.write_text(
        "".join(json.dumps({"index": r["index"], "solved": r["index"] % 2, "graded": 2}) + "\n" for r in rows)
    )
    from rl.train import main as train

    train([RECIPE, *SMALL, f"--runs={tmp_path}", "--env.window=[0.1, 1]", f'--env.rates="{out}"', "--eval.every=0"])
    journal = Journal(tmp_path / "b/journal.sqlite")
    played = [e.task_index for e in journal.entries()]
    journal.close()
    assert played[:2] == [1_000_001, 1_000_003]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bootstrap", RECIPE, "--rounds=0"], "0 rounds with 2 epochs of SFT are nothing to do"),
        (["bootstrap", RECIPE, "--lr"], "argument '--lr' is not understood"),
        (["rates", RECIPE, "--out=/nowhere/x"], "--out /nowhere/x: its directory is missing"),
        (
            ["rates", RECIPE, "--out=x"],
            "0 tasks of 8 samples are nothing to play; give --tasks .those of env have no end",
        ),
        (["rates", RECIPE, "--env=evn", "--out=x"], "no source 'evn'; it has env. Did you mean 'env'"),
        (["sft", "--out=x", "--epoch=3", "--lr=1"], "argument '--lr=1' is not understood"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said):
        main(arguments)
    assert not list(tmp_path.iterdir())
