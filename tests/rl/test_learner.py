"""The learner on a model of 26 k parameters: accumulation, scores, resuming, and a toy that it must learn."""

import random
from pathlib import Path

import pytest
import torch

from policy import models
from rl.advantages import PRESETS
from rl.batch import Row
from rl.learner import Learner
from rl.metrics import GLOSSARY
from rl.updates import LearnConfig

torch.set_num_threads(1)
V = 32
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    config = models.ModelConfig(vocab_size=V, hidden_size=32, layers=2, heads=4, intermediate_size=64, max_context=64)
    models.save(models.build(config, seed=0), directory)
    return directory


def learner(model_dir: Path, **changes: object) -> Learner:
    settings = {"max_tokens": 128, "lr": 3e-4, "minibatches": 1, **changes}
    return Learner(LearnConfig(**settings), model_dir, context=64)  # type: ignore[arg-type]


def some_rows(n: int, seed: int = 0) -> list[Row]:
    rng, rows = random.Random(seed), []
    for i in range(n):
        length = rng.randint(5, 20)
        mask = [0, 0] + [rng.randint(0, 1) for _ in range(length - 3)] + [1]
        rows.append(
            Row(
                token_ids=[rng.randrange(V) for _ in range(length)],
                loss_mask=mask,
                logprobs=[-3.5 * m for m in mask],
                versions=[m - 1 for m in mask],
                advantage=rng.choice([-1.0, 0.5, 1.0]),
                trajectory=f"t{i // 2}",
            )
        )
    return rows


def flat(x: Learner) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in x.policy.model.parameters()])


def test_score_is_the_models_log_softmax(model_dir: Path) -> None:
    x = learner(model_dir)
    sequences = [[1, 2, 3, 4], [5], [], [7, 8, 9, 10, 11, 12, 13]]
    scores = x.score(sequences)
    assert [len(s) for s in scores] == [4, 1, 0, 7]
    for sequence, score in zip(sequences, scores, strict=True):
        if len(sequence) < 2:
            assert score == [0.0] * len(sequence)
            continue
        with torch.no_grad():
            table = x.policy.model(torch.tensor([sequence])).logits[0].log_softmax(-1)
        expected = [float(table[t, sequence[t + 1]]) for t in range(len(sequence) - 1)]
        assert score[0] == 0.0 and score[1:] == pytest.approx(expected, abs=1e-5)


def test_small_microbatches_give_the_gradient_of_one_batch(model_dir: Path) -> None:
    """Split by length into many micro-batches or padded into one: the same update."""
    for preset, overrides in (*((name, {}) for name in PRESETS if name != "ppo"), ("dapo", {"correction": "mask"})):
        results = []
        for budget in (64, 4096):
            x = learner(model_dir, algorithm=preset, overrides=overrides, max_tokens=budget)
            report = x.step(some_rows(12))
            results.append((report, flat(x)))
        (few, a), (many, b) = results
        assert few.loss == pytest.approx(many.loss, rel=1e-4) and few.grad_norm == pytest.approx(
            many.grad_norm, rel=1e-4
        )
        assert few.metrics == pytest.approx(many.metrics, rel=1e-3, abs=1e-6)
        assert few.positions < many.positions
        # Adam's first step is lr * sign(g): entries whose gradient is rounding noise may differ
        assert float(((a - b).abs() < 1e-6).float().mean()) > 0.999


def test_the_constant_counts_trajectories_not_branches(model_dir: Path) -> None:
    rows = some_rows(2)  # two branches of one trajectory
    apart = [Row(**{**vars(r), "trajectory": f"alone {i}"}) for i, r in enumerate(rows)]
    one, two = learner(model_dir).step(rows), learner(model_dir).step(apart)
    assert one.loss == pytest.approx(2 * two.loss, rel=1e-5)


def test_branches_of_a_trajectory_stay_in_one_minibatch(model_dir: Path) -> None:
    x = learner(model_dir, minibatches=3)
    parts = x._minibatches(some_rows(12))
    assert sorted(len(p) for p in parts) == [4, 4, 4]
    names = [{r.trajectory for r in p} for p in parts]
    assert sum(len(n) for n in names) == 6 and set.union(*names) == {f"t{i}" for i in range(6)}


def test_report_and_version(model_dir: Path) -> None:
    x = learner(model_dir, minibatches=2, warmup_steps=4, lr=1e-3)
    rows = some_rows(8)
    report = x.step(rows)
    assert (x.version, x.updates, report.version, report.updates, report.skipped) == (1, 2, 1, 2, 0)
    assert report.tokens == sum(r.action_tokens for r in rows) and report.rows == 8
    assert report.lr == pytest.approx(5e-4)  # the second of four warm-up updates
    assert {"ratio", "clip_low", "clip_high", "mismatch_kl", "entropy"} == set(report.metrics)
    assert report.wall_seconds > 0 and report.cpu_seconds > 0
    empty = x.step([])
    assert (x.version, x.updates, empty.updates, empty.tokens) == (2, 2, 0, 0)


def test_a_correction_is_against_the_weights_that_began_the_batch(model_dir: Path, monkeypatch) -> None:
    """Every update of a batch sees the same old log-probs: the ratio is 1 in the first and moves in the second."""
    x = learner(model_dir, minibatches=2, lr=1e-2, overrides={"correction": "truncate", "correction_high": 1.05})
    rows, seen = some_rows(8), []
    before = {tuple(r.token_ids): s for r, s in zip(rows, x.score([r.token_ids for r in rows]), strict=True)}
    update = x._update
    monkeypatch.setattr(x, "_update", lambda part, *a, **k: (seen.extend(part), update(part, *a, **k)))
    report = x.step(rows)
    assert len(seen) == 8 and all(list(r.old) == before[tuple(r.token_ids)] for r in seen)
    assert 0 < report.metrics["corrected"] < 1 and report.metrics["ratio"] != pytest.approx(1, abs=1e-4)
    assert set(report.metrics) <= set(GLOSSARY)
    # one update: nothing to score, and the ratio is 1
    x = learner(model_dir, overrides={"correction": "truncate"})
    monkeypatch.setattr(x, "score", None)
    assert x.step(rows).metrics["ratio"] == 1


def test_what_is_masked_as_mismatch_is_not_learned(model_dir: Path) -> None:
    x = learner(model_dir, overrides={"correction": "mask"})
    rows = [Row(**{**vars(r), "logprobs": [-30.0 * m for m in r.loss_mask]}) for r in some_rows(4)]
    report = x.step(rows)
    assert (report.metrics["corrected"], report.grad_norm, report.loss) == (1, 0, 0)


def test_mismatch_is_measured_before_the_first_update(model_dir: Path) -> None:
    x = learner(model_dir, minibatches=4, lr=1e-2)
    rows = some_rows(16)
    scored = [
        Row(**{**vars(r), "logprobs": s}) for r, s in zip(rows, x.score([r.token_ids for r in rows]), strict=True)
    ]
    report = x.step(scored)
    assert report.metrics["mismatch_kl"] < 1e-6 and report.metrics["ratio"] != pytest.approx(1, abs=1e-4)


def test_the_first_update_is_adams(model_dir: Path) -> None:
    """With fresh moments Adam's first step is lr * g / (|g| + eps): lr wherever the gradient is far above eps."""
    x = learner(model_dir, lr=1e-3, algorithm="grpo", grad_clip=1e9)
    before = flat(x)
    x.step(some_rows(8))
    changes = (flat(x) - before).abs()
    assert float(changes.max()) == pytest.approx(1e-3, rel=1e-2)
    assert float(changes[changes > 0].median()) == pytest.approx(1e-3, rel=1e-2)


def test_warmup_by_hand() -> None:
    config = LearnConfig(lr=1.0, warmup_steps=4)
    assert [config.rate(i, 2) for i in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert LearnConfig(lr=1.0).rate(0, 1) == 1.0


def test_decay_by_hand() -> None:
    config = LearnConfig(lr=1.0, warmup_steps=2, schedule="linear", minibatches=2)
    assert [config.rate(i, 2) for i in range(6)] == [0.5, 0.75, 0.5, 0.25, 0.0, 0.0]
    warming = LearnConfig(lr=1.0, schedule="linear", minibatches=2, algorithm="ppo", critic_warmup_steps=3)
    assert [warming.rate(i, 5) for i in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_is_skipped(model_dir: Path, bad: float) -> None:
    x, clean = learner(model_dir), learner(model_dir)
    before = flat(x)
    rows = some_rows(4)
    report = x.step([*rows, Row(**{**vars(rows[0]), "advantage": bad})])
    assert (report.skipped, report.updates, x.version, x.updates) == (1, 0, 1, 0)
    assert torch.equal(flat(x), before)
    # the optimiser is untouched too: the next step is that of a learner which never saw the bad row
    x.step(rows[:2])
    clean.step(rows[:2])
    assert torch.equal(flat(x), flat(clean))


@pytest.mark.parametrize("steps", [0, 3])
def test_resuming_is_bitwise(model_dir: Path, tmp_path: Path, steps: int) -> None:
    """Save, load into a fresh learner, step: the weights of the run that was not interrupted, bit by bit."""
    settings = {"minibatches": 2, "warmup_steps": 20, "weight_decay": 0.1}
    plain, saved, resumed = (learner(model_dir, **settings) for _ in range(3))
    for i in range(steps):
        plain.step(some_rows(8, i))
        saved.step(some_rows(8, i))
    saved.save(tmp_path / "state")
    resumed.step(some_rows(8, 99))  # whatever it held is replaced
    resumed.load(tmp_path / "state")
    assert (resumed.version, resumed.updates) == (steps, 2 * steps)
    for i in range(steps, steps + 2):
        for x in (plain, saved, resumed):
            x.step(some_rows(8, i))
    assert torch.equal(flat(plain), flat(saved)), "saving must not change a run"
    assert torch.equal(flat(plain), flat(resumed))


def test_a_checkpoint_of_another_model_is_refused(model_dir: Path, tmp_path: Path) -> None:
    config = models.ModelConfig(vocab_size=V, hidden_size=16, layers=1, heads=4, intermediate_size=32, max_context=64)
    models.save(models.build(config), tmp_path / "other")
    learner(tmp_path / "other").save(tmp_path / "state")
    x = learner(model_dir)
    before = flat(x)
    with pytest.raises(ValueError, match=r"checkpoint .*state does not fit .*") as error:
        x.load(tmp_path / "state")
    assert "\n" not in str(error.value)
    assert torch.equal(flat(x), before)


def test_weights_are_copies_and_the_export_loads(model_dir: Path, tmp_path: Path) -> None:
    x = learner(model_dir, lr=1e-2)
    before = x.weights()
    kept = {k: v.copy() for k, v in before.items()}
    x.step(some_rows(4))
    assert all((before[k] == kept[k]).all() for k in kept)
    x.export(tmp_path / "export")
    assert torch.equal(flat(learner(tmp_path / "export")), flat(x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"algorithm": "cwn"}, "algorithm='cwn' is unknown; .* Did you mean 'cwm'"),
        ({"lr": 0.0}, "learn.lr=0.0 must be positive"),
        ({"minibatches": 0}, "learn.minibatches=0 is too small; give at least 1"),
        ({"overrides": {"clip": 1}}, "algorithm 'cwm': unknown key 'clip'; .* Did you mean 'clip_low'"),
    ],
)
def test_mistakes_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearnConfig(**settings)  # type: ignore[arg-type]


def bandit(x: Learner, control: str, steps: int = 30) -> float:
    """Sample one of V tokens after a fixed prompt, pay 1 for token 9; the final probability of token 9."""
    rng, prompt, paid = random.Random(1), [1, 2, 3], 9
    probability = 0.0
    for _ in range(steps):
        scores = [s[-1] for s in x.score([[*prompt, a] for a in range(V)])]
        chances = torch.tensor(scores).exp().tolist()
        probability = chances[paid]
        actions = rng.choices(range(V), weights=chances, k=64)
        rewards = [float(a == paid) for a in actions]
        mean = sum(rewards) / len(rewards)
        advantages = [0.0 if control == "zero" else r - mean for r in rewards]
        if control == "shuffled":
            rng.shuffle(advantages)
        rows = [
            Row(
                token_ids=[*prompt, a],
                loss_mask=[0, 0, 0, 1],
                logprobs=[0.0, 0.0, 0.0, scores[a]],
                versions=[-1, -1, -1, x.version],
                advantage=advantage,
                trajectory=str(i),
            )
            for i, (a, advantage) in enumerate(zip(actions, advantages, strict=True))
        ]
        x.step(rows)
    return probability


def test_it_learns_what_is_paid_and_nothing_from_the_controls(model_dir: Path) -> None:
    learned = bandit(learner(model_dir, algorithm="grpo", lr=5e-3), "none")
    zero = bandit(learner(model_dir, algorithm="grpo", lr=5e-3), "zero")
    shuffled = bandit(learner(model_dir, algorithm="grpo", lr=5e-3), "shuffled")
    print(f"learned {learned:.3f}, zero {zero:.3f}, shuffled {shuffled:.3f}")
    assert learned > 0.8
    assert zero == pytest.approx(1 / V, abs=0.03)
    assert shuffled < 0.3
