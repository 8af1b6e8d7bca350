"""Every second has one label."""

import threading
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.ledger import Account, Area, Ledger, bottleneck, busy_share, merge, relabel, summary

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


@settings(deadline=None)
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


def test_seconds_move_to_another_label_and_stay() -> None:
    clock = Clock()
    ledger = Ledger(LABELS, clock)
    ledger.switch("decode")
    clock.now += 4
    ledger.move("decode", "prefill", 3)  # what was not settled yet can be moved, too
    ledger.move("decode", "prefill", 9)  # no more than there is
    ledger.move("prefill", "decode", -1)
    assert ledger.snapshot() == {"idle": 0, "decode": 0, "prefill": 4}
    assert relabel({"idle": 5, "x": 1}, "idle", "y", 2) == {"idle": 3, "x": 1, "y": 2}
    assert relabel({}, "idle", "y", 2) == {"idle": 0, "y": 0}


def test_an_area_by_hand() -> None:
    clock = Clock()
    area = Area(clock)
    clock.now += 5
    area.set(3)
    clock.now += 2
    assert area.read() == 6
    area.set(1)
    clock.now += 4
    area.set(0)
    clock.now += 10
    assert area.read() == 10


def test_an_account_is_settled_with_the_wall_clock() -> None:
    """Two clocks a part. It is there 3 s after the start; its process dies, and the one in its
    place has clocks for 10 of the 15 s since the last word."""
    account = Account(100.0, clocks=2)
    account.tell("worker-0", {"idle": 1.0, "env": 3.0}, 105.0)  # 4 of 10: its clocks began 3 s late
    assert account.seconds() == {"wait_start": 6, "idle": 1, "env": 3} and account.unexplained() == 0
    account.tell("worker-0", {"idle": 1.0, "env": 13.0}, 110.0)
    assert account.seconds() == {"wait_start": 6, "idle": 1, "env": 13} and account.unexplained() == 0
    account.tell("worker-0", {"idle": 20.0, "env": 0.0}, 125.0, 7)  # another process: 10 of 30 are nobody's
    assert account.seconds() == {"wait_start": 6, "idle": 21, "env": 13, "lost": 10} and account.unexplained() == 0
    account.tell("worker-1", {"idle": 50.0}, 125.0)
    assert sum(account.seconds().values()) == 2 * 2 * 25 and account.unexplained() == 0
    account.tell("worker-1", {"idle": 58.0}, 130.0)  # 8 of 10: a clock that stands still does not pass unseen
    assert account.unexplained() == pytest.approx(2 / (2 * (25 + 30)))
    assert Account(0.0).unexplained() == 0


def test_a_wait_is_the_bottleneck_only_where_no_component_explains_it() -> None:
    learner = {"wait_batch": 9.0, "train": 1.0}
    episodes = {"wait_turn": 30.0, "env": 10.0}
    run = {"engine": {"idle": 8.0, "decode": 2.0}, "episodes": episodes, "learner": learner}  # 0.75 * (1 - 0.25) > 0.25
    assert bottleneck(run) == (
        "bottleneck: places in the engine, awaited 75% of the time (wait_turn of episodes); episodes 25%, engine 20%, learner 10%"
    )
    run["engine"] = {"idle": 4.0, "decode": 6.0}  # 0.75 * (1 - 0.6) < 0.6: they queue for a busy engine
    assert bottleneck(run) == "bottleneck: engine, busy 60% (decode 60%); episodes 25%, learner 10%"
    bound = {"learner": {"wait_publish": 9.0, "train": 1.0}, "episodes": {"wait_staleness": 38.0, "env": 2.0}}
    assert bottleneck(bound).startswith("bottleneck: the way of the weights, awaited 90%"), (
        "the cause, not what follows"
    )
    assert bottleneck({"episodes": {"wait_staleness": 3, "env": 1}}) == (
        "bottleneck: the staleness bound, awaited 75% of the time (wait_staleness of episodes); episodes 25%"
    )
