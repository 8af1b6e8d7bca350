"""The critic on a model of 26 k parameters: advantages by hand, targets that it must fit, resuming."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from agents.trajectory import Group, Segment, Trajectory
from policy import models
from rl.advantages import PRESETS, algorithm
from rl.batch import Row, microbatches, rows_of
from rl.critic import loss_of, quality, valued
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
    settings = {"max_tokens": 128, "algorithm": "ppo", "minibatches": 2, "lr": 3e-4, **changes}
    return Learner(LearnConfig(**settings), model_dir, context=64)  # type: ignore[arg-type]


def some_rows(n: int, seed: int = 0) -> list[Row]:
    """Two branches a trajectory; every other trajectory returns 1."""
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
                advantage=float(i // 2 % 2),
                trajectory=f"t{i // 2}",
            )
        )
    return rows


def ids(rows: list[Row]) -> list[list[int]]:
    return [list(r.token_ids) for r in rows]


def flat(*parts: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for part in parts for p in part.parameters()])


def row(mask: list[int], reward: float, trajectory: str = "") -> Row:
    n = len(mask)
    return Row(
        token_ids=[7] * n,
        loss_mask=mask,
        logprobs=[0.0] * n,
        versions=[0] * n,
        advantage=reward,
        trajectory=trajectory,
    )


# ---------------------------------------------------------------------- advantages


def test_three_actions_by_hand() -> None:
    """An observation between the second and the third takes no time; the return is earned by the last action."""
    # Actions at 1, 2 and 4; values .5, .75, .25; return 1; decay .5.
    # delta: 4: 1 - .25 = .75;  2: .25 - .75 = -.5;  1: .75 - .5 = .25
    # A: 4: .75;  2: -.5 + .5 * .75 = -.125;  1: .25 - .5 * .125 = .1875;  targets: A + V
    nan = float("nan")
    ppo = algorithm("ppo", gae_decay=0.5, scale="none")
    (found,) = valued([row([0, 1, 1, 0, 1], 1.0)], [[nan, 0.5, 0.75, nan, 0.25]], ppo)
    assert found.advantages == [0, 0.1875, -0.125, 0, 0.75]
    assert found.returns == [0, 0.6875, 0.625, 0, 1.0]
    # whitened: sum .8125, mean .2708333; deviations -.0833333, -.3958333, .4791667: squares .0069444 + .1566840 +
    # .2296007 = .3932292, over 3 = .1310764, root .3620447, plus 1e-4
    (found,) = valued([row([0, 1, 1, 0, 1], 1.0)], [[nan, 0.5, 0.75, nan, 0.25]], algorithm("ppo", gae_decay=0.5))
    assert found.advantages == pytest.approx(
        [0, -0.0833333 / 0.3621447, -0.3958333 / 0.3621447, 0, 0.4791667 / 0.3621447], rel=1e-5
    )
    assert found.returns == [0, 0.6875, 0.625, 0, 1.0], "targets are not whitened"


def test_branches_are_one_list_of_actions() -> None:
    """The same three actions, the last in a branch of its own, between rows of another trajectory."""
    ppo = algorithm("ppo", gae_decay=0.5, scale="none")
    rows = [row([0, 1, 1, 0], 1.0, "a"), row([0, 1], 0.0, "b"), row([0, 0, 0, 1], 1.0, "a")]
    first, other, second = valued(rows, [[0, 0.5, 0.75, 0], [0, 0.125], [0, 0, 0, 0.25]], ppo)
    assert (first.advantages, second.advantages) == ([0, 0.1875, -0.125, 0], [0, 0, 0, 0.75])
    assert (first.returns, second.returns) == ([0, 0.6875, 0.625, 0], [0, 0, 0, 1.0])
    assert (other.advantages, other.returns) == ([0, -0.125], [0, 0])


def test_a_critic_that_knows_nothing_makes_reinforce(seed: int = 0) -> None:
    """Values of 0 and decay 1: every action has the return, normalised over the batch's tokens."""
    rng, groups = random.Random(seed), []
    for name in "ab":
        episodes = [
            Trajectory(
                "task",
                segments=[Segment([5] + [7] * n, [0] + [1] * n, [0.0] * (n + 1), [-1] + [0] * n)],
                reward=float(rng.random() < 0.5),
                outcome="resolved",
                stop="submitted",
            )
            for n in (1, 5, 2, 9)
        ]
        groups.append(Group(name, "task", episodes))
    known, _ = rows_of(groups, PRESETS["reinforce++"], 0)
    rows, report = rows_of(groups, PRESETS["ppo"], 0)
    assert report.kept == 8 and [r.advantage for r in rows] == [t.reward for g in groups for t in g.trajectories]
    for mine, theirs in zip(valued(rows, [[0.0] * len(r.token_ids) for r in rows], PRESETS["ppo"]), known, strict=True):
        assert mine.advantages == pytest.approx([theirs.advantage * m for m in mine.loss_mask])
    # the control permutes returns
    shuffled, _ = rows_of(groups, PRESETS["ppo"], 0, shuffled=random.Random(1))
    assert [r.advantage for r in shuffled] != [r.advantage for r in rows]
    assert sorted(r.advantage for r in shuffled) == sorted(r.advantage for r in rows)


def test_quality_by_hand() -> None:
    # returns 1, 1, 0 with values .5, 1, .25: mean .583333; Var(R) = 2/9; R - V = .5, 0, -.25: mean .083333,
    # squares .173611 + .006944 + .111111 = .291667, over 3 = .0972222; 1 - .0972222 / .2222222 = .5625
    rows = [replace(row([0, 1, 1], 1.0), values=[9, 0.5, 1]), replace(row([0, 1], 0.0), values=[9, 0.25])]
    assert quality(rows) == {"value": pytest.approx(0.583333, rel=1e-5), "explained_variance": pytest.approx(0.5625)}
    assert quality(rows[1:])["explained_variance"] == 0 and quality([]) == {}


def test_each_token_has_its_own_columns() -> None:
    r = replace(row([0, 1, 0, 1], 1.0), advantages=[0, 1, 0, 2], values=[9, 3, 9, 4], returns=[9, 5, 9, 6])
    (batch,) = microbatches([r], 10)
    assert batch.values is not None and batch.returns is not None
    assert [x.tolist() for x in (batch.advantages, batch.values, batch.returns)] == [
        [[1, 0, 2]],
        [[3, 9, 4]],
        [[5, 9, 6]],
    ]


# ---------------------------------------------------------------------- the value model


def test_a_value_knows_what_was_before_its_token(model_dir: Path) -> None:
    critic = learner(model_dir).critic
    assert critic is not None
    rows = some_rows(6)
    assert all(v == 0 for values in critic.scan(ids(rows)) for v in values), "the head begins at zero"
    torch.nn.init.normal_(critic.model.head.weight)
    for r, values in zip(rows, critic.scan(ids(rows)), strict=True):
        assert len(values) == len(r.token_ids) and values[0] == 0
        for t in (1, len(values) - 1):
            with torch.no_grad():
                alone = float(critic.model(torch.tensor([r.token_ids[:t]]))[0, -1])
            assert values[t] == pytest.approx(alone, abs=1e-5)


def test_it_fits_returns_that_its_tokens_tell(model_dir: Path) -> None:
    """The first token says what an episode will return; the policy keeps still, as all is warm-up."""
    x = learner(model_dir, critic_lr=1e-2, critic_warmup_steps=100, grad_clip=1e9)
    rng, before = random.Random(3), flat(x.policy.model)

    def batch() -> list[Row]:
        rows = []
        for i in range(32):
            told = rng.choice([3, 4])
            ids = [told, *(rng.randrange(8, V) for _ in range(6))]
            rows.append(replace(row([0, 0, 1, 1, 0, 1, 1], float(told == 4), str(i)), token_ids=ids))
        return rows

    reports = [x.step(batch()) for _ in range(25)]
    first, last = reports[0].metrics, reports[-1].metrics
    print(first, last)
    assert first["explained_variance"] == 0 and last["explained_variance"] > 0.95
    assert last["value"] == pytest.approx(0.5, abs=0.2) and last["value_loss"] < first["value_loss"] / 10
    assert torch.equal(flat(x.policy.model), before) and x.version == 25 and x.updates == 0
    assert set(last) <= set(GLOSSARY)


def test_the_critic_learns_first_and_the_policy_then(model_dir: Path) -> None:
    x = learner(model_dir, critic_warmup_steps=1)
    assert x.critic is not None
    policy, critic = flat(x.policy.model), flat(x.critic.model)
    report = x.step(some_rows(8))
    assert torch.equal(flat(x.policy.model), policy) and not torch.equal(flat(x.critic.model), critic)
    assert (report.updates, report.tokens, x.version) == (0, 0, 1)
    report = x.step(some_rows(8))
    assert not torch.equal(flat(x.policy.model), policy) and report.updates == 2


def test_all_updates_of_a_batch_have_the_values_that_began_it(model_dir: Path, monkeypatch) -> None:
    x = learner(model_dir, critic_lr=1e-2)
    assert x.critic is not None
    x.step(some_rows(8))
    rows, seen, update = some_rows(8, 1), [], x.critic.update
    expected = {tuple(r.token_ids): v for r, v in zip(rows, x.critic.scan(ids(rows)), strict=True)}
    monkeypatch.setattr(x.critic, "update", lambda part, *a: (seen.extend(part), update(part, *a))[1])
    x.step(rows)
    assert len(seen) == 8 and all(r.values == expected[tuple(r.token_ids)] for r in seen)
    assert any(v for values in expected.values() for v in values)


def test_small_microbatches_give_the_update_of_one_batch(model_dir: Path) -> None:
    losses = []
    for budget in (64, 4096):
        x = learner(model_dir, max_tokens=budget, lr=1e-2)
        assert x.critic is not None
        for _ in range(3):
            rows = valued(some_rows(12), x.critic.scan(ids(some_rows(12))), PRESETS["ppo"])
            losses.append(x.critic.update(rows, loss_of(rows, 0.2), 1e-2).loss)
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-4) and losses[2] < losses[0]
    # values of 0, and targets of 1 in every other trajectory: half the share of its tokens
    paid, tokens = (sum(r.action_tokens for r in rows if r.advantage >= least) for least in (1, 0))
    assert losses[0] == pytest.approx(paid / tokens / 2)


def test_an_update_that_is_not_finite_is_skipped(model_dir: Path) -> None:
    x = learner(model_dir)
    assert x.critic is not None
    before = flat(x.policy.model, x.critic.model)
    report = x.step([*some_rows(4), row([0, 1], float("inf"))])
    assert report.updates == 0 and report.skipped > 0 and x.version == 1
    clean = [v for values in x.critic.scan(ids(some_rows(4))) for v in values]
    assert all(v == v for v in clean) and not torch.isnan(flat(x.policy.model, x.critic.model)).any()
    assert torch.equal(flat(x.policy.model), before[: len(flat(x.policy.model))])


# ---------------------------------------------------------------------- state


@pytest.mark.parametrize("steps", [0, 3])
def test_resuming_is_bitwise(model_dir: Path, tmp_path: Path, steps: int) -> None:
    settings = {"critic_lr": 1e-2, "critic_warmup_steps": 2, "weight_decay": 0.1}
    plain, saved, resumed = (learner(model_dir, **settings) for _ in range(3))
    for i in range(steps):
        plain.step(some_rows(8, i))
        saved.step(some_rows(8, i))
    saved.save(tmp_path / "state")
    resumed.step(some_rows(8, 99))  # whatever it held is replaced
    resumed.load(tmp_path / "state")
    for i in range(steps, steps + 2):
        reports = [x.step(some_rows(8, i)).metrics for x in (plain, saved, resumed)]
        assert reports[0] == reports[1] == reports[2]
    everything = [flat(x.policy.model, x.critic.model) for x in (plain, saved, resumed) if x.critic is not None]
    assert torch.equal(everything[0], everything[1]), "saving must not change a run"
    assert torch.equal(everything[0], everything[2])


def test_a_checkpoint_without_a_critic_is_refused(model_dir: Path, tmp_path: Path) -> None:
    learner(model_dir, algorithm="grpo").save(tmp_path / "state")
    x = learner(model_dir)
    with pytest.raises(ValueError, match=r"checkpoint .* is of a run without a critic, which algorithm='ppo' has") as e:
        x.load(tmp_path / "state")
    assert "\n" not in str(e.value)
    # the other way round the policy goes on by itself
    x.save(tmp_path / "with")
    other = learner(model_dir, algorithm="grpo")
    other.load(tmp_path / "with")
    assert torch.equal(flat(other.policy.model), flat(x.policy.model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"algorithm": "ppo", "overrides": {"scale": "std"}},
            r"baseline='critic' with scale='std'.* compares no group",
        ),
        ({"algorithm": "ppo", "overrides": {"filter_zero_advantage": True}}, "filter_zero_advantage=True: a critic"),
        ({"algorithm": "cwm", "overrides": {"baseline": "critic"}}, "filter_zero_advantage=True: a critic"),
        ({"algorithm": "ppo", "overrides": {"gae_decay": 1.5}}, r"gae_decay=1\.5, value_clip=0\.2: the first"),
        ({"critic_lr": 1e-3}, r"learn\.critic_lr=0\.001, .* learn\.algorithm='cwm' has no critic; leave them out"),
        ({"critic_warmup_steps": 2}, r"learn\.critic_warmup_steps=2: .* has no critic"),
        ({"algorithm": "ppo", "critic_warmup_steps": -1}, r"learn\.critic_warmup_steps=-1"),
    ],
)
def test_mistakes_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        LearnConfig(**settings)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    assert LearnConfig(algorithm="ppo", critic_lr=1e-3, critic_warmup_steps=2).row().baseline == "critic"
