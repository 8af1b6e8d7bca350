"""Rows, filters and the alignment of the loss mask."""

import random
from math import log

import pytest

from agents.trajectory import Group, Segment, Trajectory
from rl.advantages import PRESETS, algorithm
from rl.batch import Row, is_gibberish, microbatches, rows_of
from rl.losses import normaliser, policy_loss

CWM = PRESETS["cwm"]
PLAIN = algorithm("cwm", filter_zero_advantage=False, filter_stale=None, filter_gibberish=False)


def segment(actions: int, version: int = 0, token: int = 7, logprob: float = -0.5) -> Segment:
    """A prompt of two tokens, then `actions` sampled ones."""
    n = actions
    return Segment([5, 6] + [token] * n, [0, 0] + [1] * n, [0.0, 0.0] + [logprob] * n, [-1, -1] + [version] * n)


def episode(reward: float | None, *lengths: int, version: int = 0, token: int = 7, logprob: float = -0.5) -> Trajectory:
    outcome = "infra" if reward is None else "resolved" if reward > 0 else "unresolved"
    segments = [segment(n, version, token, logprob) for n in lengths]
    return Trajectory("task", segments=segments, reward=reward, outcome=outcome, stop="submitted", turns=len(lengths))


def test_the_drawing_of_the_docstring() -> None:
    row = Row(
        token_ids=[5, 6, 17, 2, 8, 9],
        loss_mask=[0, 0, 1, 1, 0, 1],
        logprobs=[0, 0, -0.125, -0.875, 0, -0.5],
        versions=[-1, -1, 4, 4, -1, 5],
        advantage=0.5,
    )
    (batch,) = microbatches([row], 100)
    assert batch.token_ids.tolist() == [[5, 6, 17, 2, 8]]
    assert batch.targets.tolist() == [[6, 17, 2, 8, 9]]
    assert batch.mask.tolist() == [[0, 1, 1, 0, 1]]
    assert batch.behaviour.tolist() == [[0, -0.125, -0.875, 0, -0.5]]
    assert batch.advantages.tolist() == [[0.5] * 5]
    assert batch.action_tokens == 3


def test_padding_and_the_tail_after_the_last_action() -> None:
    short = Row(
        token_ids=[5, 17, 8, 8], loss_mask=[0, 1, 0, 0], logprobs=[0, -1, 0, 0], versions=[-1, 0, -1, -1], advantage=1.0
    )
    long = Row(token_ids=[5, 17, 3], loss_mask=[0, 1, 1], logprobs=[0, -2, -3], versions=[-1, 0, 0], advantage=-1.0)
    (batch,) = microbatches([long, short], 100)
    # `short` needs one column (token 5 predicts 17): the observation after its last action is cut.
    assert batch.token_ids.tolist() == [[5, 0], [5, 17]]
    assert batch.mask.tolist() == [[1, 0], [1, 1]]
    assert batch.advantages.tolist() == [[1, 0], [-1, -1]]


def test_microbatches_hold_the_budget_and_every_row_once() -> None:
    rng = random.Random(0)
    rows = []
    for i in range(50):
        s = segment(rng.randint(1, 30))
        rows.append(
            Row(token_ids=s.token_ids, loss_mask=s.loss_mask, logprobs=s.logprobs, versions=s.versions, advantage=i)
        )
    batches = microbatches(rows, 64)
    assert all(b.token_ids.numel() <= 64 for b in batches)
    seen = [float(a) for b in batches for a in b.advantages.max(dim=1).values]
    assert sorted(seen) == list(range(50))
    assert sum(b.action_tokens for b in batches) == sum(r.action_tokens for r in rows)
    with pytest.raises(ValueError, match=r"max_tokens=5 is less than a row of \d+ tokens; raise it"):
        microbatches(rows, 5)


def test_infra_enters_neither_baseline_nor_gradient() -> None:
    group = Group("g", "task", [episode(1.0, 10), episode(None, 99), episode(0.0, 30)])
    rows, report = rows_of([group], CWM, 0)
    # mu = (10 * 1 + 30 * 0) / 40 = 0.25: the infra trajectory's 99 tokens do not count
    assert [r.advantage for r in rows] == [0.75, -0.25]
    assert report.dropped == {"infra": 1}
    assert (report.trajectories, report.kept, report.solve_rate, report.reward) == (3, 2, 0.5, 0.5)
    assert (report.action_tokens, report.tokens) == (40, 44)


def test_branches_share_the_return_and_count_once() -> None:
    group = Group("g", "task", [episode(1.0, 4, 6), episode(0.0, 30)])
    rows, report = rows_of([group], CWM, 0)
    # length of the first: 4 + 6 over both branches, so mu = 10 / 40
    assert [(r.trajectory, r.advantage) for r in rows] == [("g/0", 0.75), ("g/0", 0.75), ("g/1", -0.25)]
    assert (report.rows, report.kept) == (3, 2)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        # mean baseline 0.5: advantages 0.5 for A (branches of 1 and 3 action tokens), -0.5 for B (2). On-policy, ratio 1.
        ({"aggregation": "token"}, -(4 * 0.5 - 2 * 0.5) / 6),
        ({"aggregation": "sequence"}, -((1 * 0.5 + 3 * 0.5) / 4 - 0.5) / 2),
        ({"aggregation": "constant"}, -(4 * 0.5 - 2 * 0.5) / (10 * 2)),
        # weighted by action tokens over all branches, mu = 4 / 6: advantages 1/3 and -2/3
        ({"aggregation": "sequence", "baseline": "length_weighted"}, -(1 / 3 - 2 / 3) / 2),
        ({"aggregation": "constant", "baseline": "length_weighted"}, -(4 / 3 - 4 / 3) / (10 * 2)),
    ],
)
def test_a_trajectory_counts_once_whatever_its_branches(overrides: dict[str, str], expected: float) -> None:
    row = algorithm("dr_grpo", **overrides)
    rows, report = rows_of([Group("g", "task", [episode(1.0, 1, 3), episode(0.0, 2)])], row, 0)
    assert report.branches == 1.5
    divisor = normaliser(row, action_tokens=report.action_tokens, trajectories=report.kept, context=10)
    for budget in (4, 100):  # branches apart, or all rows together
        batches = microbatches(rows, budget)
        assert (len(batches) > 1) == (budget == 4)
        losses = [
            policy_loss(b.behaviour, b.behaviour, b.advantages, b.mask, row, divisor, lengths=b.lengths)[0]
            for b in batches
        ]
        assert float(sum(losses)) == pytest.approx(expected, abs=1e-7)


def test_filters_name_their_reason_and_keep_the_baseline() -> None:
    unlikely = -log(128_256) - 2.01
    group = Group(
        "g",
        "task",
        [
            episode(1.0, 10, version=200),
            episode(0.0, 10, version=99),  # newest token 101 versions old
            episode(0.0, 10, version=100),  # 100 old: kept
            episode(1.0, 10, version=200, token=100_001, logprob=unlikely),
            episode(1.0, 0),
        ],
    )
    same = Group("same", "task", [episode(1.0, 3, version=200), episode(1.0, 4, version=200)])
    rows, report = rows_of([group, same], CWM, 200)
    assert report.dropped == {"stale": 1, "gibberish": 1, "empty": 1, "zero_advantage": 2}
    # mu = 2 * 10 / 40 over the four with actions, filtered or not
    assert [(r.trajectory, r.advantage) for r in rows] == [("g/0", 0.5), ("g/2", -0.5)]
    assert report.dropped_groups == {"same": "zero_advantage"}
    assert (report.live_groups, report.staleness_max, report.staleness_mean) == (1, 100, 50)
    assert report.kept + sum(report.dropped.values()) == report.trajectories == 7
    everything, _ = rows_of([group, same], PLAIN, 200)
    assert len(everything) == 6  # all but the empty one


def test_gibberish_needs_both_a_rare_token_and_a_tiny_probability() -> None:
    low, high = -log(128_256) - 2.01, -log(128_256) - 1.99
    assert is_gibberish(episode(1.0, 1, token=100_001, logprob=low))
    assert not is_gibberish(episode(1.0, 1, token=100_000, logprob=low))
    assert not is_gibberish(episode(1.0, 1, token=100_001, logprob=high))
    # relative to V: 512 * 100000 // 128256 = 399; -ln 512 - 2 = -8.24
    assert is_gibberish(episode(1.0, 1, token=400, logprob=-8.3), 512)
    assert not is_gibberish(episode(1.0, 1, token=399, logprob=-8.3), 512)
    assert not is_gibberish(episode(1.0, 1, token=400, logprob=-8.2), 512)


def test_an_observation_is_never_gibberish() -> None:
    t = Trajectory("task", segments=[Segment([5, 100_001, 7], [0, 0, 1], [0.0, -99.0, -1.0], [-1, -1, 0])], reward=1.0)
    assert not is_gibberish(t)


def test_shuffled_permutes_the_same_advantages() -> None:
    groups = [Group(f"g{i}", "task", [episode(float(j == i % 4), 5 + j, 2) for j in range(4)]) for i in range(6)]
    plain, _ = rows_of(groups, CWM, 0)
    mixed, report = rows_of(groups, CWM, 0, shuffled=random.Random(3))
    assert sorted(r.advantage for r in mixed) == pytest.approx(sorted(r.advantage for r in plain))
    assert [r.advantage for r in mixed] != [r.advantage for r in plain]
    assert [list(r.token_ids) for r in mixed] == [list(r.token_ids) for r in plain]
    by_name: dict[str, set[float]] = {}
    for r in mixed:
        by_name.setdefault(r.trajectory, set()).add(r.advantage)
    assert all(len(values) == 1 for values in by_name.values())  # branches still share theirs
    assert report.kept == 24


def test_the_bound_of_rare_ids_is_a_field() -> None:
    t = episode(1.0, 3, token=51, logprob=-log(629) - 2.01)
    assert is_gibberish(t, 629, rare=50) and not is_gibberish(t, 629, rare=51)
    assert not is_gibberish(t, 629)  # 629 * 100000 // 128256 = 490
    assert not is_gibberish(episode(1.0, 3, token=51, logprob=-log(629) - 1.99), 629, rare=50)
    group = Group("g", "task", [t, episode(0.0, 3)])
    for row, dropped in ((CWM, {}), (algorithm("cwm", gibberish_id=50), {"gibberish": 1})):
        assert rows_of([group], row, 0, vocabulary=629)[1].dropped == dropped


def test_a_batch_is_normalised_over_all_that_can_be_trained() -> None:
    # Token mean (2 * 1 + 6 * 0 + 8 * 0.5) / 16 = 0.375, as in test_advantages: deviation 0.3307189. What has no reward
    # or no action token is not in it.
    groups = [
        Group("a", "task", [episode(1.0, 2), episode(None, 9), episode(0.0, 6)]),
        Group("b", "task", [episode(0.5, 3, 5), episode(0.5, 0)]),
    ]
    rows, report = rows_of(groups, algorithm("reinforce++"), 0)
    expected = [0.625 / 0.3308189, -0.375 / 0.3308189, 0.125 / 0.3308189, 0.125 / 0.3308189]
    assert [r.advantage for r in rows] == pytest.approx(expected, rel=1e-6)
    assert (report.live_groups, report.dropped) == (1, {"infra": 1, "empty": 1})


def test_old_logprobs_are_aligned_like_the_samplers() -> None:
    row = Row(
        token_ids=[5, 6, 17, 2],
        loss_mask=[0, 0, 1, 1],
        logprobs=[0, 0, -0.25, -0.5],
        versions=[-1, -1, 0, 0],
        advantage=1.0,
        old=[0, -9, -0.125, -0.75],
    )
    (batch,) = microbatches([row], 100)
    assert batch.old is not None and batch.old.tolist() == [[-9, -0.125, -0.75]]
    assert batch.behaviour.tolist() == [[0, -0.25, -0.5]] and batch.mask.tolist() == [[0, 1, 1]]


def test_groups_without_anything() -> None:
    rows, report = rows_of([Group("none", "task"), Group("dead", "task", [episode(None, 3)])], CWM, 7)
    assert rows == [] and microbatches(rows, 10) == []
    assert report.dropped_groups == {"none": "empty", "dead": "infra"}
    assert (report.solve_rate, report.reward, report.staleness_max) == (0, 0, 0)
    assert rows_of([], CWM, 0)[0] == []


def test_a_row_that_begins_with_an_action_is_ours_to_fix() -> None:
    t = Trajectory("task", segments=[Segment([7, 7], [1, 1], [-1.0, -1.0], [0, 0])], reward=1.0)
    with pytest.raises(AssertionError, match="nothing predicts it"):
        rows_of([Group("g", "task", [t])], PLAIN, 0)
