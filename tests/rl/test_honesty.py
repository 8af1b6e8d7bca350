"""The ledger is honest: delays of known length, injected into real runs, are on the right label and named as the bottleneck."""

import pytest

from benchmarks.systems.honesty import DELAYS, find

QUICK = ("tool", "queue")


@pytest.mark.parametrize("kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in DELAYS])
def test_injected_seconds_are_found_and_named(kind):
    for scale in (0.5, 2, 8):  # on a busy machine only a longer delay is what holds the run back
        found = find(DELAYS[kind], scale)
        assert found.label_seconds >= 0.95 * found.seconds > 0
        assert found.ran.unexplained <= 0.01
        if found.named:
            return
    raise AssertionError(f"{kind} was not named: {found.ran.bottleneck}")
