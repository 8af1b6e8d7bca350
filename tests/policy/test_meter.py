"""Pace and money, by hand."""

import pytest

from policy.meter import Meter, OverBudget, Pace, Prices, Usage


def test_a_pace_spreads_calls_evenly():
    pace = Pace(30)  # one every two seconds
    assert [pace.take(1, now=100) for _ in range(3)] == [0, 2, 4]
    assert pace.take(1, now=103) == 3  # it begins at 106, behind the others
    assert pace.take(1, now=200) == 0  # nothing is saved up meanwhile
    assert pace.take(1, now=200) == 2


def test_large_calls_make_the_next_one_wait_longer():
    pace = Pace(600)  # ten a second
    assert pace.take(50, now=0) == 0
    assert pace.take(1, now=0) == 5
    pace.correct(-20)  # the first used 30
    assert pace.take(1, now=0) == pytest.approx(3.1)
    assert Pace(0).take(1e9, now=0) == Pace(0).take(1e9, now=0) == 0


def test_never_more_than_the_pace_and_one_call_in_any_minute():
    pace, begun = Pace(100), []
    for at in range(400):
        units, now = 1 + at * 7 % 13, at * 0.05
        begun.append((now + pace.take(units, now), units))
    for start, _ in begun:
        inside = [units for at, units in begun if start <= at < start + 60]
        assert sum(inside) <= 100 + max(inside)


def test_money_is_counted_and_bounded():
    prices = Prices(prompt=3, completion=15, cached=0.3)
    usage = Usage(prompt=1_000_000, completion=200_000, cached=400_000)
    assert usage.cost(prices) == pytest.approx(0.6 * 3 + 0.4 * 0.3 + 0.2 * 15)
    assert usage.cost(Prices(prompt=3)) == 3  # what was kept costs the same where nothing else is said
    meter = Meter(prices, most=6.0)
    meter.add(usage)
    meter.check()
    meter.add(usage)
    with pytest.raises(OverBudget, match=r"9\.8400 of max_cost=6 is spent after 2 calls; raise max_cost"):
        meter.check()
    assert meter.read() == {
        "calls": 2,
        "retries": 0,
        "prompt_tokens": 2_000_000,
        "cached_tokens": 800_000,
        "completion_tokens": 400_000,
        "cost": pytest.approx(9.84),
    }
    Meter(prices, most=0).check()


def test_a_negative_price_is_refused():
    with pytest.raises(ValueError, match=r"prices\.completion=-1 is negative"):
        Prices(completion=-1)
