"""Advantages against numbers worked out by hand."""

from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.advantages import PRESETS, algorithm, group_advantages

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


@pytest.mark.parametrize("row", PRESETS.values(), ids=PRESETS)
def test_equal_returns_give_exactly_zero(row: object) -> None:
    assert group_advantages([0.1] * 7, [3, 1, 4, 1, 5, 9, 2], row) == [0.0] * 7  # type: ignore[arg-type]
    assert group_advantages([1.0], [3], row) == [0.0]  # type: ignore[arg-type]
    assert group_advantages([], [], row) == []  # type: ignore[arg-type]


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
    assert all(row.name == name for name, row in PRESETS.items())


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("grpoo", {}, r"algorithm='grpoo' is unknown; one of cwm, grpo\. Did you mean 'grpo'\?"),
        ("cwm", {"clip_hihg": 1}, r"algorithm\.clip_hihg is unknown; .* Did you mean 'clip_high'\?"),
        ("cwm", {"baseline": "means"}, r"algorithm\.baseline='means' is unknown; .* Did you mean 'mean'\?"),
        ("cwm", {"clip_low": 1.0}, r"algorithm\.clip_low=1\.0 must be in \[0, 1\)"),
        ("cwm", {"clip_high": -0.1}, r"algorithm\.clip_high=-0\.1 is negative"),
        ("cwm", {"filter_stale": -1}, r"algorithm\.filter_stale=-1 is negative"),
    ],
)
def test_mistakes_are_named(name: str, overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        algorithm(name, **overrides)
    assert algorithm("cwm", clip_high=0.28).clip_high == 0.28
