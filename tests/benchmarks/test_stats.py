"""Estimators against numbers worked out by hand."""

import pytest

from benchmarks.stats import ks, ks_critical, paired, pass_at_k, wilson
from benchmarks.systems.base import row
from benchmarks.systems.learning import distinct
from envs.tiny import repairs


def test_wilson_by_hand():
    # 50 of 100: centre (0.5 + 3.8415 / 200) / (1 + 3.8415 / 100) = 0.5; half 1.96 sqrt(0.0025 + 0.000096) / 1.0384 = 0.0962
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(0, 10)[0] == pytest.approx(0.0, abs=1e-12)
    assert wilson(0, 0) == (0.0, 1.0)


def test_paired_by_hand():
    # differences 1, 0, 1, 0: mean 0.5, variance 1/3, error sqrt(1/12) = 0.288675, times 1.959964
    assert paired([0, 0, 0, 1], [1, 0, 1, 1]) == pytest.approx((0.5, 0.5 - 0.565793, 0.5 + 0.565793), abs=1e-5)
    with pytest.raises(ValueError, match="equally long"):
        paired([1], [1])


def test_pass_at_k_by_hand():
    assert pass_at_k(4, 1, 1) == 0.25
    assert pass_at_k(4, 1, 2) == pytest.approx(1 - 3 / 6)  # C(3,2) / C(4,2)
    assert pass_at_k(4, 0, 4) == 0.0 and pass_at_k(4, 1, 4) == 1.0
    with pytest.raises(ValueError, match="at least 5 samples"):
        pass_at_k(4, 1, 5)


def test_a_goal_is_of_the_ratio_where_there_is_a_peer():
    assert row("x", 10.0, peer=2.0, goal=">=5")["met"] is True
    assert row("x", 10.0, peer=2.0, goal="<=4")["met"] is False
    assert row("x", 10.0, goal=">=20")["met"] is False and row("x", 10.0)["met"] is None


def test_evaluation_tasks_are_distinct_by_source():
    indices = distinct("validation", 200)
    sources = [repairs.task("validation", i).provenance["normalised"] for i in indices]
    assert len(set(sources)) == 200 and indices == sorted(indices)


def test_ks_by_hand():
    # distribution functions at 1, 2, 3, 4: 1/2, 3/4, 1, 1 and 0, 1/2, 1/2, 1
    assert ks([1, 1, 2, 3], [2, 4]) == 0.5
    assert ks([1, 2, 3], [3, 1, 2]) == 0.0 and ks([1, 1], [2]) == 1.0
    # -ln(0.005) / 2 = 2.649159, its root 1.627624; times sqrt(4000 / 4e6)
    assert ks_critical(2000, 2000) == pytest.approx(0.051470, abs=1e-6)
