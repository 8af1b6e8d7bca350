"""Every second has one label."""

import threading
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.ledger import Ledger, bottleneck, busy_share, merge, summary

LABELS = ["idle", "decode", "prefill"]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_nested_spending_by_hand() -> None:
    clock = Clock()
    ledger = Ledger(LABELS, clock)
    clock.now += 1  # idle
    with ledger.spend("decode"):
        clock.now += 2
        with ledger.spend("prefill"):
            clock.now += 4
        clock.now += 8  # decode again
    clock.now += 16  # idle again; not settled before the snapshot
    assert ledger.snapshot() == {"idle": 17, "decode": 10, "prefill": 4}


def test_an_exception_gives_the_label_back() -> None:
    clock = Clock()
    ledger = Ledger(LABELS, clock)
    with pytest.raises(RuntimeError), ledger.spend("decode"):
        clock.now += 3
        raise RuntimeError
    clock.now += 5
    assert ledger.snapshot() == {"idle": 5, "decode": 3, "prefill": 0}


@given(st.lists(st.tuples(st.integers(0, 1000), st.sampled_from([*LABELS, "look"]))))
def test_labels_sum_to_the_wall_clock(events: list[tuple[int, str]]) -> None:
    clock = Clock()
    ledger = Ledger(LABELS, clock)
    expected, current = dict.fromkeys(LABELS, 0.0), "idle"
    for seconds, what in events:
        clock.now += seconds
        expected[current] += seconds
        if what == "look":
            assert ledger.snapshot() == expected
        else:
            assert ledger.switch(what) == current
            current = what
    assert ledger.snapshot() == expected
    assert sum(expected.values()) == clock.now - 100


def test_snapshots_from_other_threads_lose_nothing() -> None:
    """The real clock, one writer and three readers: the sum never exceeds the wall clock nor goes back."""
    began = time.monotonic()
    ledger, stop, sums = Ledger(LABELS), threading.Event(), [[], [], []]

    def read(mine: list[float]) -> None:
        while not stop.is_set():
            mine.append(sum(ledger.snapshot().values()))

    readers = [threading.Thread(target=read, args=(mine,)) for mine in sums]
    for reader in readers:
        reader.start()
    for i in range(3000):
        with ledger.spend(LABELS[i % 3]):
            pass
    stop.set()
    for reader in readers:
        reader.join()
    for mine in sums:
        assert all(b >= a - 1e-9 for a, b in pairwise(mine))
    assert sum(ledger.snapshot().values()) <= time.monotonic() - began + 1e-6


def test_unknown_labels_are_ours_to_fix() -> None:
    with pytest.raises(AssertionError, match="Did you mean 'decode'"):
        Ledger(LABELS).switch("decoed")
    with pytest.raises(AssertionError):
        Ledger([])


def test_merge_summary_and_bottleneck_by_hand() -> None:
    workers = merge([{"env": 3, "wait_engine": 7}, {"env": 1, "wait_engine": 8, "grading": 1}])
    assert workers == {"env": 4, "wait_engine": 15, "grading": 1}
    run = {
        "worker": workers,  # busy 5 of 20
        "engine": {"idle": 1, "decode": 6, "prefill": 3},  # busy 9 of 10
        "learner": {"wait_batch": 6, "train": 3, "publish": 1},  # busy 4 of 10
    }
    assert busy_share(workers) == 0.25
    assert bottleneck(run) == "bottleneck: engine, busy 90% (decode 60%); learner 40%, worker 25%"
    assert summary(run).splitlines()[1] == "engine       10.0 s  decode 60%, prefill 30%, idle 10%"
    assert bottleneck({"engine": run["engine"]}) == "bottleneck: engine, busy 90% (decode 60%)"
    assert bottleneck({}) == bottleneck({"engine": {"idle": 3}}) == "bottleneck: none, nothing was busy"
    assert "nothing" in summary({"engine": {"idle": 0}})
