"""Adapters: what is trained, what travels, and that an engine samples from what the learner has."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from policy import lora, models
from policy.torch_engine import EngineConfig, TorchEngine
from policy.weights import checksum, state_of
from rl.batch import Row
from rl.learner import Learner
from rl.updates import LearnConfig

torch.set_num_threads(1)
V = 32
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
needs_peft = pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("peft"), reason="needs peft (extra train)"
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    config = models.ModelConfig(vocab_size=V, hidden_size=32, layers=2, heads=4, intermediate_size=64, max_context=64)
    models.save(models.build(config, seed=0), directory)
    return directory


def learner(model_dir: Path, seed: int = 0, **changes: object) -> Learner:
    settings = {"max_tokens": 128, "algorithm": "grpo", "lora_rank": 4, "lr": 1e-2, "minibatches": 1, **changes}
    return Learner(LearnConfig(**settings), model_dir, context=64, seed=seed)  # type: ignore[arg-type]


def some_rows(n: int, seed: int = 0) -> list[Row]:
    rng, rows = random.Random(seed), []
    for i in range(n):
        ids = [rng.randrange(V) for _ in range(rng.randint(5, 20))]
        mask = [0, 0] + [1] * (len(ids) - 2)
        versions, logprobs = [m - 1 for m in mask], [-3.5 * m for m in mask]
        rows.append(
            Row(
                token_ids=ids,
                loss_mask=mask,
                logprobs=logprobs,
                versions=versions,
                advantage=i % 2 - 0.5,
                trajectory=f"{i}",
            )
        )
    return rows


def flat(x: Learner) -> torch.Tensor:
    parts = [x.policy.model, *([x.critic.model] if x.critic is not None else [])]
    return torch.cat([p.detach().flatten() for part in parts for p in part.parameters()])


def gap(engine: TorchEngine, x: Learner) -> float:
    sequences = [row.token_ids for row in some_rows(6, 7)]
    pairs = zip(engine.score(sequences), x.score(sequences), strict=True)
    return max(abs(a - b) for mine, theirs in pairs for a, b in zip(mine, theirs, strict=True))


# ---------------------------------------------------------------------- without peft


def test_merging_by_hand() -> None:
    base = {"w": np.array([[1.0, 2.0], [3.0, 4.0]], np.float32), "v": np.array([5.0], np.float32)}
    # B A = [1, 2]^T [10, 100] = [[10, 100], [20, 200]]
    adapters = {"w.lora_A": np.array([[10.0, 100.0]], np.float32), "w.lora_B": np.array([[1.0], [2.0]], np.float32)}
    merged = lora.merge(base, adapters)
    assert merged["w"].tolist() == [[11, 102], [23, 204]] and merged["v"].tolist() == [5]
    assert base["w"].tolist() == [[1, 2], [3, 4]], "the base stays"


@pytest.mark.parametrize(
    ("adapters", "cause"),
    [
        ({"x.lora_A": np.ones((1, 2)), "x.lora_B": np.ones((2, 1))}, "adapter of 'x'"),
        ({"w.lora_A": np.ones((1, 2), np.float32)}, "adapter of 'w'"),
        ({"w.lora_A": np.ones((1, 3), np.float32), "w.lora_B": np.ones((2, 1), np.float32)}, "adapter of 'w'"),
    ],
)
def test_what_does_not_fit_is_refused(adapters: dict[str, np.ndarray], cause: str) -> None:
    with pytest.raises(ValueError, match=cause) as error:
        lora.merge({"w": np.ones((2, 2), np.float32)}, adapters)
    assert "\n" not in str(error.value)


def test_an_engine_merges_from_its_base_each_time(model_dir: Path) -> None:
    """Not from what it merged last; and whole weights become a base."""
    model = models.load(model_dir)
    base, name = state_of(model), "model.layers.0.self_attn.q_proj.weight"
    rng = np.random.default_rng(0)

    def adapters() -> dict[str, np.ndarray]:
        a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 32), (32, 2)))
        return {f"{name}.lora_A": a, f"{name}.lora_B": b}

    with TorchEngine(model, EngineConfig(slots=2, max_context=64)) as engine:
        for version in (1, 2, 3):
            given = adapters()
            engine.publish(version, given)
            assert engine.checksum() == checksum(lora.merge(base, given))
        with pytest.raises(ValueError, match="doesn't fit the base"):
            engine.publish(4, {"x.lora_A": np.ones((1, 2)), "x.lora_B": np.ones((2, 1))})
        with pytest.raises(ValueError, match="NaN"):
            engine.publish(4, {k: v * np.nan for k, v in given.items()})
        engine.publish(4, given := adapters())
        assert engine.checksum() == checksum(lora.merge(base, given)), "what was refused left no trace"
        other = {key: value * 2 for key, value in base.items()}
        engine.publish(5, other)
        engine.publish(6, given)
        assert engine.checksum() == checksum(lora.merge(other, given))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_rank": -1}, r"learn\.lora_rank=-1, learn\.lora_alpha=32\.0: give a rank of 0"),
        ({"lora_rank": 4, "lora_alpha": 0.0}, r"learn\.lora_alpha=0\.0: give"),
    ],
)
def test_mistakes_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        LearnConfig(**settings)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_without_peft_nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^learn\.lora_rank=4 needs the package peft; pip install peft, or give 0$"):
        LearnConfig(lora_rank=4)
    assert LearnConfig().lora_rank == 0


# ---------------------------------------------------------------------- the learner


@needs_peft
def test_engine_and_learner_agree_after_each_publish(model_dir: Path) -> None:
    x = learner(model_dir, lora_alpha=16.0)
    with TorchEngine(models.load(model_dir), EngineConfig(slots=2, max_context=64)) as engine:
        start = engine.score([[1, 2, 3, 4]])
        engine.publish(0, x.weights())
        assert engine.score([[1, 2, 3, 4]]) == start, "adapters begin as nothing"
        for version in range(1, 6):
            x.step(some_rows(8, version))
            engine.publish(version, x.weights())
            assert gap(engine, x) <= 1e-5
        assert abs(engine.score([[1, 2, 3, 4]])[0][-1] - start[0][-1]) > 1e-3, "and do something later"


@needs_peft
def test_the_base_is_frozen_and_only_adapters_travel(model_dir: Path) -> None:
    x = learner(model_dir)
    base = {k: v for k, v in state_of(x.policy.model).items() if "lora_" not in k}
    x.step(some_rows(8))
    after = state_of(x.policy.model)
    assert all((after[k] == v).all() for k, v in base.items())
    travels = x.weights()
    # per layer q, k, v, o: rank x (32 + 32); gate, up, down: rank x (32 + 64); two layers of rank 4
    assert sum(v.size for v in travels.values()) == 2 * 4 * (4 * 64 + 3 * 96)
    assert all(np.abs(v).max() > 0 for v in travels.values()), "every adapter learns"
    trained = sum(p.numel() for group in x.policy.optimizer.param_groups for p in group["params"])
    assert trained == sum(v.size for v in travels.values())


@needs_peft
def test_a_critic_has_adapters_too(model_dir: Path) -> None:
    x = learner(model_dir, algorithm="ppo")
    assert x.critic is not None
    trained = {name for name, p in x.critic.model.named_parameters() if p.requires_grad}
    assert {n for n in trained if "lora_" not in n} == {"head.weight", "head.bias"} and len(trained) == 2 + 2 * 2 * 7


@needs_peft
def test_seeds_begin_adapters(model_dir: Path) -> None:
    before = torch.get_rng_state()
    a, b, c = (learner(model_dir, seed=seed).weights() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    name = next(k for k in a if k.endswith(".lora_A"))
    assert (a[name] == b[name]).all() and (a[name] != c[name]).any()


@needs_peft
def test_the_export_is_merged(model_dir: Path, tmp_path: Path) -> None:
    x = learner(model_dir)
    x.step(some_rows(8))
    x.export(tmp_path / "export")
    merged = models.load(tmp_path / "export")
    assert not any("lora" in name for name, _ in merged.named_parameters())
    expected = lora.merge(state_of(models.load(model_dir)), x.weights())
    assert checksum(state_of(merged)) == checksum(expected)
    plain = Learner(LearnConfig(max_tokens=128), tmp_path / "export", context=64)
    sequences = [row.token_ids for row in some_rows(4)]
    for mine, theirs in zip(plain.score(sequences), x.score(sequences), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)


@needs_peft
@pytest.mark.parametrize(("algorithm", "steps"), [("grpo", 0), ("grpo", 2), ("ppo", 2)])
def test_resuming_is_bitwise(model_dir: Path, tmp_path: Path, algorithm: str, steps: int) -> None:
    plain, saved, resumed = (learner(model_dir, algorithm=algorithm, minibatches=2) for _ in range(3))
    for i in range(steps):
        plain.step(some_rows(8, i))
        saved.step(some_rows(8, i))
    saved.save(tmp_path / "state")
    resumed.step(some_rows(8, 99))
    resumed.load(tmp_path / "state")
    for i in range(steps, steps + 2):
        for x in (plain, saved, resumed):
            x.step(some_rows(8, i))
    assert torch.equal(flat(plain), flat(saved)) and torch.equal(flat(plain), flat(resumed))


@needs_peft
def test_a_checkpoint_holds_adapters_alone_and_fits_no_other_rank(tmp_path: Path) -> None:
    config = models.ModelConfig(vocab_size=V, hidden_size=128, layers=2, heads=4, intermediate_size=256, max_context=64)
    models.save(models.build(config), tmp_path / "model")
    sizes = {}
    for rank in (0, 1):
        x = learner(tmp_path / "model", lora_rank=rank)
        x.save(tmp_path / f"{rank}")
        sizes[rank] = sum(p.stat().st_size for p in (tmp_path / f"{rank}").rglob("*") if p.is_file())
    print(sizes)
    assert sizes[1] < sizes[0] / 8
    for rank, other in ((1, 0), (0, 1), (1, 2)):
        with pytest.raises(ValueError, match=r"checkpoint .* does not fit this model") as error:
            learner(tmp_path / "model", lora_rank=rank).load(tmp_path / f"{other}" if other < 2 else tmp_path / "0")
        assert "\n" not in str(error.value)
