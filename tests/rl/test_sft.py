"""The warm start's way, small: experts through the real environment, a tokenizer and a model from nothing, imitation."""

import json
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from agents.trajectory import Segment, Trajectory
from envs.swe.env import SWEEnv
from envs.tiny import repairs
from envs.tiny.drills import comeback, drill, inspection
from envs.tiny.experts import SUBMIT, Noise
from policy import models
from policy.models import ModelConfig
from policy.renderer import CwmRenderer
from rl.config import ROOT
from rl.sft import Muon, WarmStart, _orthogonal, collect, imitate, inspected, render, warm_start

SMALL = WarmStart(
    drills=40, comebacks=8, inspections=8, probe_layer=1, episodes=12, epochs=1.0, tokens_per_step=1024, warmup=2, vocab_size=480, model=ModelConfig(hidden_size=32, layers=1, heads=2, kv_heads=2, intermediate_size=32)
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("sft")
    return root, warm_start(SMALL, root / "out", root / "work")


def test_a_warm_start_is_a_model_a_tokenizer_and_its_facts(made):
    root, facts = made
    model, renderer = models.load(root / "out"), CwmRenderer(root / "out")
    assert model.config.vocab_size == renderer.vocab_size
    assert facts["config"]["noise"]["right"] == 0.5 and 0 <= facts["expert_solve_rate"] <= 1
    assert json.loads((root / "out" / "warm_start.json").read_text()) == json.loads(json.dumps(facts))


def test_it_is_rebuilt_bit_for_bit(made, tmp_path):
    root, _ = made
    warm_start(SMALL, tmp_path / "out", tmp_path / "work")
    for name in ("tokenizer.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (root / "out" / name).read_bytes(), name


def test_collecting_goes_on_after_a_torn_line(made, tmp_path):
    root, _ = made
    lines = (root / "work" / "experts-0.jsonl").read_text()
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "experts-0.jsonl").write_text(lines[: len(lines) // 2])
    warm_start(SMALL, tmp_path / "out", tmp_path / "work")
    assert (tmp_path / "work" / "experts-0.jsonl").read_text() == lines


def test_episodes_of_other_experts_are_not_kept(tmp_path, capsys):
    path = tmp_path / "experts.jsonl"
    few = replace(SMALL, episodes=4)
    collect(few, path)
    before = path.read_text()
    collect(few, path)
    assert path.read_text() == before and "again" not in capsys.readouterr().out
    collect(replace(few, noise=Noise(right=1.0, skip=0.0, miss=0.0)), path)
    assert path.read_text() != before and "other tasks or experts" in capsys.readouterr().out


def play(task, messages):
    """The reward of a drill's actions in the real environment, where every observation must be the drill's."""
    env = SWEEnv(reward="binary", context_lines=0)
    env.reset(options={"task": task})
    for (_, action), (_, shown) in zip(messages[1::2], messages[2::2], strict=False):
        assert env.step(action)[0] == shown
    if messages[-1][1] != SUBMIT:
        assert env.step(messages[-1][1])[0] == ""
    return env.step(SUBMIT)[1]


def said(renderer, messages):
    ids, mask = render(renderer, messages)
    return renderer.decode([i for i, m in zip(ids, mask, strict=True) if m == 1])


def test_a_drill_is_what_happens_in_the_sandbox_and_repairs_the_bug(made):
    task = repairs.task("train", 9)
    messages = drill(task)
    assert [r for r, _ in messages] == ["user", "assistant", "tool: bash", "assistant"]
    assert said(CwmRenderer(made[0] / "out"), messages) == messages[1][1] + messages[3][1]
    assert play(task, messages) == 1.0


def test_a_comeback_repairs_its_own_mistakes_which_are_not_taught(made):
    renderer, undone, wrong, stated = CwmRenderer(made[0] / "out"), 0, set(), set()
    for index in range(20):
        task = repairs.task("train", index)
        messages = comeback(task, 0)
        wrong.add(sum(role == "mistake" for role, _ in messages))
        stated.add(messages[0][1] == task.prompt)
        assert play(task, messages) == 1.0
        taught = said(renderer, messages)
        assert taught == "".join(text for role, text in messages if role == "assistant")
        assert task.grader.command not in taught
        ids, mask = render(renderer, messages)
        passed_over = renderer.decode([i for i, m in zip(ids, mask, strict=True) if m == -1])
        assert passed_over == "".join(text for role, text in messages if role == "mistake")
        undone += taught.count("sed -i") > 1
    assert undone and wrong == {2, 4} and stated == {True, False}


def test_the_probe_is_told_which_tokens_are_wrong(made):
    renderer, several = CwmRenderer(made[0] / "out"), 0
    for index in range(40):
        task = repairs.task("train", index)
        row = inspected(renderer, drill(task), task)
        assert len(row.wrong) == len(row.token_ids) and row.wrong.count(1) == 1
        at = row.wrong.index(1)
        shown = renderer.decode(row.token_ids[:at]).rsplit("\n", 1)[1]
        line = task.provenance["line"]
        assert shown.split("\t")[1] in f"    {line}" and row.wrong[0] == row.wrong[-1] == -1
        several += inspected(renderer, inspection(task, 0), task).wrong.count(1) > 1
    assert several > 10


def test_imitation_uses_resolved_trajectories_only(made, tmp_path):
    root, _ = made
    ids, mask = render(CwmRenderer(root / "out"), drill(repairs.task("train", 9)))
    segment = Segment(ids, mask, [-1.0 * m for m in mask], [m - 1 for m in mask])
    (tmp_path / "trajectories").mkdir()
    lines = [
        Trajectory(task_id="t", segments=[segment], reward=r, outcome=o)
        for r, o in ((1.0, "resolved"), (0.0, "unresolved"), (None, "infra"))
    ]
    (tmp_path / "trajectories" / "step-000001.jsonl").write_text("".join(t.to_json() + "\n" for t in lines))
    facts = imitate(tmp_path, root / "out", tmp_path / "out", SMALL, tmp_path / "work")
    assert (facts["resolved"], facts["of"]) == (1, 3)
    before, after = (models.load(p / "out").model.embed_tokens.weight for p in (root, tmp_path))
    assert not torch.equal(before, after)
    with pytest.raises(ValueError, match="no trajectories under"):
        imitate(tmp_path / "none", root / "out", tmp_path / "x", SMALL, tmp_path / "work")


def test_a_negative_count_is_one_line():
    with pytest.raises(ValueError, match=r"^drills=-3 is negative; 0 leaves them out$"):
        WarmStart(drills=-3)


def test_muon_orthogonalises():
    matrix = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(_orthogonal(matrix))
    assert bool((singular > 0.5).all()) and bool((singular < 1.3).all())
    weight = torch.nn.Parameter(torch.zeros(4, 4))
    weight.grad = torch.eye(4)
    Muon([weight], lr=0.1).step()
    assert torch.allclose(weight, -0.1 * _orthogonal(torch.eye(4)))
    heavy = torch.nn.Parameter(torch.ones(4, 4))
    heavy.grad = torch.eye(4)
    Muon([heavy], lr=0.1, decay=0.5).step()
    assert torch.allclose(heavy, 0.95 * torch.ones(4, 4) - 0.1 * _orthogonal(torch.eye(4)))


def test_the_committed_warm_start_says_what_made_it():
    facts = json.loads(Path(ROOT / "policy/cwm_tiny/warm_start.json").read_text())
    assert facts["made_by"] == "python -m rl sft --seed 0 --out DIR"
    assert facts["sha256"] == sha256(Path(ROOT / "policy/cwm_tiny/model.safetensors").read_bytes()).hexdigest()
    assert facts["config"] == json.loads(json.dumps(asdict(WarmStart())))
