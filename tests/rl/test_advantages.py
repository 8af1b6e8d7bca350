"""Advantages against numbers worked out by hand."""

from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.advantages import PRESETS, algorithm, batch_advantages, batch_scaled, gae, group_advantages

GRPO, CWM = PRESETS["grpo"], PRESETS["cwm"]


def test_grpo_by_hand() -> None:
    # mean 0.5; deviations +-0.5; sample variance (4 * 0.25) / 3 = 1/3, std 0.57735; 0.5 / (0.57735 + 0.0001) = 0.865875
    assert group_advantages([1, 0, 0, 1], [1, 9, 9, 1], GRPO) == pytest.approx(
        [0.865875, -0.865875, -0.865875, 0.865875]
    )


def test_cwm_by_hand() -> None:
    # mu = (10 * 1 + 30 * -1 + 20 * -1 + 40 * 1) / 100 = 0; no scale
    assert group_advantages([1, -1, -1, 1], [10, 30, 20, 40], CWM) == [1, -1, -1, 1]
    # mu = (10 * 1 + 30 * 0) / 40 = 0.25
    assert group_advantages([1, 0], [10, 30], CWM) == [0.75, -0.25]


def test_leave_one_out_by_hand() -> None:
    # others' means: (0+2)/2 = 1, (1+2)/2 = 1.5, (1+0)/2 = 0.5
    rloo = algorithm("cwm", baseline="leave_one_out")
    assert group_advantages([1, 0, 2], [1, 1, 1], rloo) == [0, -1.5, 1.5]


def test_two_returns_with_std() -> None:
    # one of four solved: mean .25, std sqrt((.5625 + 3 * .0625) / 3) = .5; .75 / .5001, -.25 / .5001
    assert group_advantages([1, 0, 0, 0], [5, 5, 5, 5], GRPO) == pytest.approx([0.75 / 0.5001] + [-0.25 / 0.5001] * 3)
    assert sqrt((0.5625 + 3 * 0.0625) / 3) == 0.5


def test_batch_normalisation_by_hand() -> None:
    # Action tokens 1, 3, 4 with values 1, 0, 0.5: mean (1 + 0 + 2) / 8 = 0.375;
    # squares 0.625^2 = 0.390625, 3 * 0.375^2 = 0.421875, 4 * 0.125^2 = 0.0625: 0.875 / 8 = 0.109375, root 0.3307189
    expected = [0.625 / 0.3308189, -0.375 / 0.3308189, 0.125 / 0.3308189]
    assert batch_scaled([1, 0, 0.5], [1, 3, 4]) == pytest.approx(expected, rel=1e-6)
    # without a baseline the returns themselves are normalised, over all groups; with one their differences are:
    # (1 - 0.5, 0 - 0.5) and 0: mean (0.5 - 1.5 + 0) / 8 = -0.125; 0.625^2 + 3 * 0.375^2 + 4 * 0.125^2 = 0.875 again
    for baseline in ("none", "mean"):
        row = algorithm("reinforce++", baseline=baseline)
        first, second = batch_advantages([[1, 0], [0.5]], [[1, 3], [4]], row)
        assert [*first, *second] == pytest.approx(expected, rel=1e-6)
    assert batch_scaled([0.1] * 3, [1, 2, 3]) == [0, 0, 0] and batch_scaled([], []) == []
    assert batch_advantages([[1, 0], []], [[1, 1], []], GRPO)[1] == []


def test_gae_by_hand() -> None:
    # Actions at positions 1, 2 and 4; discount 0.5, decay 0.5, so that errors fade by 0.25 per action.
    # delta: 4: 1 - 0.4 = 0.6;  2: 0 + 0.5 * 0.4 - 0.8 = -0.6;  1: 0.25 + 0.5 * 0.8 - 0.5 = 0.15
    # A: 4: 0.6;  2: -0.6 + 0.25 * 0.6 = -0.45;  1: 0.15 - 0.25 * 0.45 = 0.0375;  returns: A + V
    nan = float("nan")
    advantages, returns = gae([nan, 0.25, 0, nan, 1], [nan, 0.5, 0.8, nan, 0.4], [0, 1, 1, 0, 1], 0.5, 0.5)
    assert advantages == pytest.approx([0, 0.0375, -0.45, 0, 0.6])
    assert returns == pytest.approx([0, 0.5375, 0.35, 0, 1.0])
    # decay 1 without discount: what was still to come, minus the value
    assert gae([1, 0, 2], [5, 6, 7], [1, 1, 1], decay=1.0) == ([-2, -4, -5], [3, 2, 2])
    assert gae([], [], []) == ([], []) and gae([1.0], [1.0], [0]) == ([0], [0])


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in ("ppo", "reinforce++")])
def test_equal_returns_give_exactly_zero(name: str) -> None:
    row = algorithm(name)
    assert group_advantages([0.1] * 7, [3, 1, 4, 1, 5, 9, 2], row) == [0.0] * 7
    assert group_advantages([1.0], [3], row) == [0.0]
    assert group_advantages([], [], row) == []


def test_returns_without_a_baseline() -> None:
    assert group_advantages([0.1] * 3, [3, 1, 4], PRESETS["reinforce++"]) == [0.1] * 3
    assert group_advantages([0.1] * 3, [3, 1, 4], algorithm("grpo", baseline="none")) == [0.0] * 3


returns = st.lists(st.tuples(st.sampled_from([-1.0, 0.0, 0.3, 1.0]), st.integers(1, 5000)), min_size=2, max_size=16)


@given(returns)
def test_length_weighted_advantages_have_a_zero_token_mean(members: list[tuple[float, int]]) -> None:
    """The reason for the weights: the advantage averaged over action tokens is zero."""
    lengths = [n for _, n in members]
    advantages = group_advantages([r for r, _ in members], lengths, CWM)
    assert sum(a * n for a, n in zip(advantages, lengths, strict=True)) == pytest.approx(0, abs=1e-8)


@given(returns, st.floats(-3, 3), st.randoms())
def test_shifts_and_orders_do_not_matter(members: list[tuple[float, int]], shift: float, rng: object) -> None:
    for row in (GRPO, CWM, algorithm("grpo", baseline="leave_one_out")):
        before = group_advantages([r for r, _ in members], [n for _, n in members], row)
        order = list(range(len(members)))
        rng.shuffle(order)  # type: ignore[attr-defined]
        moved = [(members[i][0] + shift, members[i][1]) for i in order]
        after = group_advantages([r for r, _ in moved], [n for _, n in moved], row)
        assert after == pytest.approx([before[i] for i in order], abs=1e-6)


def test_the_presets_are_those_of_the_papers() -> None:
    assert (CWM.clip_low, CWM.clip_high, CWM.filter_stale, CWM.scale) == (0.2, 0.25, 100, "none")
    assert (GRPO.clip_low, GRPO.clip_high, GRPO.scale, GRPO.aggregation) == (0.2, 0.2, "std", "token")
    assert (CWM.max_staleness, CWM.filter_zero_advantage, CWM.filter_gibberish) == (2, True, True)
    dapo, gspo, cispo = PRESETS["dapo"], PRESETS["gspo"], PRESETS["cispo"]
    assert (dapo.clip_low, dapo.clip_high, dapo.filter_zero_advantage) == (0.2, 0.28, True)
    assert (gspo.ratio, gspo.clip_low, gspo.clip_high, gspo.aggregation) == ("sequence", 3e-4, 4e-4, "sequence")
    assert (cispo.bound, 1 - cispo.clip_low, 1 + cispo.clip_high) == ("clip_weight", 0, 5)
    assert {name for name, row in PRESETS.items() if row.scale == "none"} == {"cwm", "dr_grpo", "rloo"}
    assert all(row.correction == "none" and row.dual_clip is None for row in PRESETS.values())


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("grpoo", {}, r"algorithm='grpoo' is unknown; one of cispo, cwm, .*\. Did you mean 'grpo'\?"),
        ("cwm", {"clip_hihg": 1}, r"algorithm 'cwm': unknown key 'clip_hihg'; .* Did you mean 'clip_high'\?"),
        ("cwm", {"baseline": "means"}, r"algorithm 'cwm': baseline='means' is none of .* Did you mean 'mean'\?"),
        ("cwm", {"clip_low": "low"}, r"algorithm 'cwm': clip_low='low' must be float"),
        ("cwm", {"clip_low": 1.5}, r"algorithm 'cwm': clip_low=1\.5 must be in \[0, 1\]"),
        ("cwm", {"clip_high": -0.1}, r"clip_high=-0\.1 is negative"),
        ("cwm", {"dual_clip": 0.9}, r"dual_clip=0\.9 with bound='clip'; it must be over 1"),
        ("cispo", {"dual_clip": 3.0}, r"dual_clip=3\.0 with bound='clip_weight'; .* with bound='clip'"),
        ("cwm", {"correction_high": 0.5}, r"correction_low=0\.5, correction_high=0\.5 must enclose 1"),
        ("cwm", {"filter_stale": -1}, r"filter_stale=-1 is negative"),
    ],
)
def test_mistakes_are_named(name: str, overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        algorithm(name, **overrides)
    assert "\n" not in str(error.value)
    assert algorithm("cwm", clip_high=0.28).clip_high == 0.28
