"""Learner ranks, as real processes over gloo: the weights, scores and checkpoints of one rank, from two and four."""

import importlib.util
import os
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from policy import lora, models
from policy.weights import state_of
from rl.critic import ValueModel, values_of
from rl.learner import Learner
from rl.ranks import Place, whole
from rl.updates import LearnConfig
from tests.rl.packs import mixed_model, on_ranks, some_rows

torch.set_num_threads(1)
ROWS = [r.token_ids for r in some_rows(9, 77)]
needs_peft = pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="needs peft (extra train)")
BOTH = {"algorithm": "ppo", "critic_lr": 2e-3, "lora_rank": 4}


def learner(place: Place, settings: dict[str, Any], dtype: torch.dtype = torch.float64) -> Learner:
    config = {"max_tokens": 96, "lr": 1e-3, "minibatches": 2, "grad_clip": 0.05, **settings}
    return Learner(LearnConfig(**config), mixed_model().to(dtype), place, context=64)


def full(x: Learner) -> dict[str, torch.Tensor]:
    """Copies of the weights, gathered, in their own precision; a critic's as `critic.NAME`."""
    named = list(x.policy.model.named_parameters())
    named += [(f"critic.{name}", p) for name, p in x.critic.model.named_parameters()] if x.critic else []
    return {name: whole(p).detach().clone() for name, p in named}


def some_steps(
    place: Place, settings: dict[str, Any], steps: int, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """Weights, reports and scores after `steps` batches, of which the second holds a row that is not finite."""
    x = learner(place, settings, dtype)
    reports = []
    for i in range(steps):
        rows = some_rows(11, i)
        if i == 1:
            rows[2] = replace(rows[2], advantage=float("nan"))
        reports.append(asdict(x.step(rows)))
    return {
        "weights": full(x),
        "reports": reports,
        "scores": x.score([*ROWS, [3], []]),
        "published": {name: value.shape for name, value in x.weights().items()},
    }


def same(one: dict[str, Any], many: list[dict[str, Any]], tolerance: float) -> None:
    """`tolerance`: elementwise where it is for fp64, else of the norm of the difference relative to that of the weights; of an
    adapter's B, which begins at 0, to that of its A."""
    for rank, other in enumerate(many):
        for name, weight in one["weights"].items():
            difference = other["weights"][name] - weight
            size = one["weights"][name.replace("lora_B", "lora_A")].norm()
            error = difference.abs().max() if tolerance <= 1e-9 else difference.norm() / size
            assert error <= tolerance, (name, float(error))
        for a, b in zip(one["reports"], other["reports"], strict=True):
            assert a["metrics"] == pytest.approx(b["metrics"], abs=1e-4 if tolerance > 1e-9 else 1e-9, nan_ok=True)
            for key in ("loss", "grad_norm"):
                assert a[key] == pytest.approx(b[key], rel=1e-4 if tolerance > 1e-9 else 1e-9)
            for key in ("version", "lr", "updates", "skipped", "tokens", "rows"):
                assert a[key] == b[key]
        for a, b in zip(one["scores"], other["scores"], strict=True):
            assert a == pytest.approx(b, abs=1e-4 if tolerance > 1e-9 else 1e-9)
        assert other["published"] == ({} if rank else one["published"])


@pytest.mark.parametrize(
    ("sequence", "settings", "skipped"),
    [
        (1, {"algorithm": "dapo", "overrides": {"correction": "truncate"}}, 1),
        pytest.param(2, BOTH, 3, marks=needs_peft),  # of a batch that is whitened together, both of the policy's
    ],
    ids=["apart", "together"],
)
def test_two_ranks_train_like_one(sequence: int, settings: dict[str, Any], skipped: int, tmp_path: Path) -> None:
    """Packed, each with its packs or both with all; gradients are clipped, and some updates are skipped on both."""
    settings = {"packing": "packed", **settings}
    one = some_steps(Place(), settings, 2)
    assert [r["skipped"] for r in one["reports"]] == [0, skipped] and one["reports"][0]["grad_norm"] > 0.05
    same(one, on_ranks(2, some_steps, tmp_path / "two", settings, 2, sequence=sequence), 1e-9)


def gradients(place: Place, settings: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient of one update."""
    x = learner(place, {"minibatches": 1, "grad_clip": 1e9, **settings})
    x.policy.optimizer.zero_grad = lambda **_: None  # type: ignore[method-assign]
    loss = x.step(some_rows(11)).loss
    return loss, {name: whole(p.grad) for name, p in x.policy.model.named_parameters()}  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("algorithm", ["cwm", pytest.param("gspo", marks=pytest.mark.proof)])
def test_split_packs_have_the_gradient_of_whole_ones(algorithm: str, tmp_path: Path) -> None:
    """Layers with and without a window; packs of lengths that two and four do not divide."""
    settings = {"packing": "packed", "algorithm": algorithm, "checkpoint_activations": True}
    loss, expected = gradients(Place(), {**settings, "checkpoint_activations": False})
    assert max(float(g.abs().max()) for g in expected.values()) > 1e-3
    for ranks, sequence in ((2, 2), (4, 4), (4, 2)):
        for found, each in on_ranks(ranks, gradients, tmp_path / f"{ranks} {sequence}", settings, sequence=sequence):
            assert found == pytest.approx(loss, abs=1e-9)
            for name, gradient in expected.items():
                assert (each[name] - gradient).abs().max() <= 1e-9, name


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("ranks", "sequence"), [(2, 1), (4, 1), (4, 2)])
@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({"algorithm": "cwm", "packing": "auto", "weight_decay": 0.1}, torch.float64),
        ({"algorithm": "grpo", "packing": "packed"}, torch.float32),
        pytest.param({**BOTH, "packing": "packed", "checkpoint_activations": True}, torch.float64, marks=needs_peft),
        pytest.param(BOTH, torch.float32, marks=[needs_peft, pytest.mark.proof]),
    ],
    ids=["auto", "fp32", "both", "both-fp32"],
)
def test_any_number_of_ranks_gives_the_same_weights(
    ranks: int, sequence: int, settings: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    """After 5 batches of 2 updates; the budget leaves a rank of four without rows now and then."""
    one = some_steps(Place(), settings, 5, dtype)
    many = on_ranks(ranks, some_steps, tmp_path / "ranks", settings, 5, dtype, sequence=sequence, seconds=800)
    same(one, many, 1e-9 if dtype is torch.float64 else 1e-6)


def saved(place: Place, directory: Path, settings: dict[str, Any]) -> None:
    """Two batches, then the state and the model."""
    x = learner(place, settings)
    for i in range(2):
        x.step(some_rows(11, i))
    x.save(directory / "state")
    x.export(directory / "model")


def resumed(place: Place, directory: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The state, and a third batch."""
    x = learner(place, settings)
    x.step(some_rows(11, 99))  # whatever it held is replaced
    x.load(directory / "state")
    report = asdict(x.step(some_rows(11, 2)))
    return {"report": report, "weights": full(x)}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("more", [{}, pytest.param(BOTH, marks=needs_peft)], ids=["plain", "both"])
def test_a_checkpoint_of_any_number_of_ranks_is_resumed_by_any(more: dict[str, Any], tmp_path: Path) -> None:
    settings = {"warmup_steps": 20, "weight_decay": 0.1, **more}
    plain = learner(Place(), settings)
    for i in range(2):
        plain.step(some_rows(11, i))
    exported = {name: np.asarray(value) for name, value in lora.merged_of(plain.policy.model).items()}
    expected = asdict(plain.step(some_rows(11, 2)))
    last = full(plain)
    for count in (1, 2):
        directory = tmp_path / f"by {count}"
        directory.mkdir()
        if count == 1:
            saved(Place(), directory, settings)
        else:
            on_ranks(2, saved, tmp_path / "saving", directory, settings)
        loaded = state_of(models.load(directory / "model"))
        assert loaded.keys() == exported.keys()
        assert all(np.array_equal(loaded[name], value) for name, value in exported.items())
        for other in (1, 2, 4):
            where = (directory, settings)
            found = (
                [resumed(Place(), *where)]
                if other == 1
                else on_ranks(other, resumed, directory / f"to {other}", *where)
            )
            for key in ("version", "updates", "lr", "loss", "grad_norm"):
                assert found[0]["report"][key] == pytest.approx(expected[key], rel=1e-9)
            for name, value in last.items():
                assert (found[0]["weights"][name] - value).abs().max() < 1e-9


def halved(place: Place) -> tuple[list[list[float]], set[torch.dtype]]:
    """Scores after a batch in bf16, and what the weights are kept in."""
    x = learner(place, {"packing": "packed", "lr": 1e-4}, torch.float32)
    x.step(some_rows(11))
    return x.score(ROWS), {p.dtype for p in x.policy.model.parameters()}


@pytest.mark.slow
def test_bf16_computes_in_it_and_keeps_fp32(tmp_path: Path) -> None:
    one, kept = halved(Place())
    for other, also in on_ranks(2, halved, tmp_path / "two", dtype="bf16"):
        gaps = [abs(a - b) for mine, theirs in zip(one, other, strict=True) for a, b in zip(mine, theirs, strict=True)]
        assert 1e-4 < max(gaps) < 0.5 and kept == also == {torch.float32}


def status(field: str) -> int:
    """Of this process, bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def loaded(place: Place, directory: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """Most bytes that a model took while it was loaded, as a critic's rank loads it, and its weights."""
    ranks = place.join()
    for each in (directory.with_name("small"), directory):  # what libraries take at first is not counted
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        before = status("VmRSS")
        model = ValueModel(models.skeleton(each))
        ranks.shard(model, values_of)
        models.fill(model, each)
        peak = status("VmHWM") - before
    weights = {name: whole(p).detach().clone() for name, p in model.named_parameters()}
    ranks.close()
    return peak, weights


def scored(place: Place, directory: Path, settings: dict[str, Any]) -> tuple[list[list[float]], dict[str, Any]]:
    """Scores and adapters of a learner on a directory."""
    x = Learner(LearnConfig(**settings), directory, place, context=64)
    x.step([])
    return x.score([[t % 64 for t in row] for row in ROWS]), x.weights()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs /proc/self/clear_refs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rank_reads_its_share_alone(dtype: torch.dtype, tmp_path: Path) -> None:
    """84 MB of weights in fp32, the largest of them 8 MB: a rank takes its share, and one of them at a time."""
    size = {"vocab_size": 4099, "hidden_size": 512, "layers": 6, "heads": 8, "intermediate_size": 1536}
    model = models.build(models.ModelConfig(**size)).to(dtype)
    weights, largest = (4 * of(p.numel() for p in model.parameters()) for of in (sum, max))
    models.save(model, tmp_path / "model")
    models.save(models.build(models.ModelConfig(vocab_size=64, hidden_size=32)), tmp_path / "small")
    ((alone, expected),) = on_ranks(1, loaded, tmp_path / "one", tmp_path / "model")
    print(f"\n{weights / 1e6:.1f} MB: alone {alone / 1e6:.1f}", end="")
    assert alone > weights
    for ranks in (2, 4):
        for peak, found in on_ranks(ranks, loaded, tmp_path / f"{ranks}", tmp_path / "model"):
            print(f", of {ranks} {peak / 1e6:.1f}", end="")
            assert peak < weights / ranks + largest + 16e6 and peak < 0.75 * alone
            for name, value in expected.items():
                assert torch.equal(found[name], value), name


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_peft
@pytest.mark.parametrize("tied", [True, False])
def test_ranks_on_a_directory_are_the_model(tied: bool, tmp_path: Path) -> None:
    """Tied weights, rotary tables, adapters' first values; 65 rows are shared unevenly."""
    size = {"vocab_size": 65, "hidden_size": 32, "layers": 2, "heads": 4, "intermediate_size": 48, "max_context": 64}
    models.save(models.build(models.ModelConfig(**size, tie_embeddings=tied), 1), tmp_path / "model")
    for settings in ({"algorithm": "grpo"}, BOTH):
        place = tmp_path / settings["algorithm"]
        one, adapters = scored(Place(), tmp_path / "model", settings)
        for rank, (many, theirs) in enumerate(on_ranks(4, scored, place, tmp_path / "model", settings)):
            for a, b in zip(one, many, strict=True):
                assert a == pytest.approx(b, abs=1e-5)
            assert rank or all(np.array_equal(theirs[name], value) for name, value in adapters.items())
