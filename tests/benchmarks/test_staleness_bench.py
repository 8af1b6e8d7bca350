"""The staleness study's arithmetic, worked out by hand, and what it refuses."""

import pytest

from benchmarks.__main__ import main
from benchmarks.systems.staleness import at_equal_tokens, curve, difference, figure, rows


def made(bound, seed, tokens, returns, solved):
    steps = [
        {"action_tokens": tokens, "reward": r, "staleness_mean": bound / 2, "wall": 10.0 * (i + 1)}
        for i, r in enumerate(returns)
    ]
    return {"bound": bound, "seed": seed, "solved": solved, "curve": curve(steps)}


def test_runs_are_compared_at_the_tokens_that_all_have_trained():
    slow, fast = made(0, 0, 10, [0.0, 0.1, 0.2, 0.3, 0.4], 0.5), made(4, 0, 20, [0.1, 0.2, 0.3, 0.4, 0.5], 0.5)
    # All reach 50 tokens; the last fifth is 40 to 50: the fifth step of the one, half of the third step of the other.
    assert at_equal_tokens([slow, fast]) == pytest.approx([0.4, 0.3])
    # 15 tokens a step: 75 in all, so that 40 to 50 is 5 tokens of step 3 (0.3) and 5 of step 4 (0.4)
    assert at_equal_tokens([slow, made(1, 0, 15, [0.1, 0.2, 0.3, 0.4, 0.5], 0)])[1] == pytest.approx(0.35)


def test_the_gap_is_told_in_standard_errors():
    gap, error = difference(
        [0.5, 0.6, 0.7], [0.4, 0.6, 0.6]
    )  # gaps 0.1, 0, 0.1: mean 0.0667, deviation 0.0577, / √3 = 0.0333
    assert gap == pytest.approx(0.06667, abs=1e-4) and error == pytest.approx(0.03333, abs=1e-4)
    runs = [made(b, s, 10, [0.1 * s + 0.1 * b * (s != 1)] * 5, 0.5) for b in (0, 1) for s in range(3)]
    found = {r["what"]: r for r in rows(runs)}
    assert found["bound 1 − bound 0: return at equal tokens"]["ours"] == pytest.approx(2.0, abs=1e-3)
    assert found["bound 1 − bound 0: return at equal tokens"]["met"]
    assert found["bound 1: mean age of what was trained"]["ours"] == 0.5
    assert figure(runs).count("<polyline") == 4


@pytest.mark.parametrize("options", [["--bounds", "0"], ["--bounds", "-1", "2"], ["--seeds", "0"]])
def test_a_study_that_compares_nothing_is_refused(options):
    with pytest.raises(ValueError, match=options[0]):
        main(["systems", "staleness", *options])
