"""Sync against async in small: the same work, in strict turns or overlapped; and what the numbers are made of."""

import time
from dataclasses import replace

import pytest

from benchmarks.systems import loop
from benchmarks.systems.loop import ARMS, Arm, bound, idle, occupied, playing, rows
from benchmarks.systems.waits import Ran
from rl import parts

SMALL = Arm(name="small", answer=0.01, sigma=0.5, tool=0.02, staleness=2)


def test_waits_are_the_same_in_every_run_and_their_share_is_exact():
    fixed, tail = ARMS["fixed"], ARMS["long tail"]
    assert fixed.episode(1, 2) == fixed.episode(7, 0) == pytest.approx(3 * (0.04 + 0.2))
    assert fixed.learner(0, 5) == pytest.approx(0.72 * 0.4 / 0.6)
    assert tail.answers(3, 1) == tail.answers(3, 1) != tail.answers(3, 2)
    longest = max(tail.episode(task, sample) for task in range(4, 8) for sample in range(4))
    assert 2 * tail.learner(0, 2) - tail.learner(0, 1) == pytest.approx(longest * 2 / 3)  # the second batch's


def ran(seconds, **ledgers):
    slots = {"reset": 0.0, "wait_policy": 0.0, "wait_turn": 0.0, "env": 16 * 6.0}
    learner, engine = {"train": 3.0, "publish": 1.0, "wait_publish": 0.5}, {"idle": 9.0, "decode": 1.0}
    known = {"episodes": slots, "learner": learner, "engine": engine, "loop": {"work": 0.5}} | ledgers
    step = {"action_tokens": 7, "staleness_max": 1}
    return Ran(steps=[step] * 2, ledgers=known, unexplained=0.002, bottleneck="", seconds=seconds)


def test_the_bound_and_the_rows_by_hand():
    sync, overlapped = ran(12.0), ran(5.0)
    assert (bound(sync), occupied(sync)) == (2.0, 6.0) and idle(sync) == pytest.approx(8 / 12)
    assert playing(sync) == pytest.approx(7.5 / 12)
    assert bound(ran(12.0, loop={"work": 8.0})) == 1.5
    found = {r["what"]: r for r in rows("fixed", [(sync, overlapped), (sync, ran(8.0)), (sync, ran(6.0))])}
    of_bound = found["fixed: the same, of the ledger's bound"]
    assert of_bound["ours"] == 1.0 and of_bound["spread"] == [0.75, 1.2] and of_bound["met"] is True
    assert found["fixed: async, times faster than sync"]["goal"] == ""
    tail = rows("long tail", [(sync, ran(6.0))])
    assert tail[0]["ours"] == 2.0 and tail[0]["met"] is False
    assert all(r["met"] is None or r["goal"] for r in tail)
    with pytest.raises(loop.InfraError, match="sync trained 14 tokens, async 21"):
        rows("fixed", [(sync, replace(overlapped, steps=[*sync.steps, sync.steps[0]]))])


@pytest.fixture
def seen(monkeypatch):
    """(what, begin, end) of every answer and update."""
    spans = []

    def timed(what, call):
        def wrapped(self, *args):
            began = time.monotonic()
            try:
                return call(self, *args)
            finally:
                spans.append((what, began, time.monotonic()))

        return wrapped

    def engine_of(arm):
        engine = engine_before(arm)
        monkeypatch.setattr(engine, "generate", timed("answer", engine.generate))
        return engine

    engine_before = loop.engine_of
    monkeypatch.setattr(loop, "engine_of", engine_of)
    monkeypatch.setattr(parts.LearnerPart, "step", timed("update", parts.LearnerPart.step))
    return spans


def test_sync_takes_strict_turns_and_async_trains_the_same(seen):
    sync = loop.play(SMALL, 0, 3)
    answers, updates = ([s[1:] for s in seen if s[0] == what] for what in ("answer", "update"))
    assert (len(answers), len(updates)) == (3 * 16 * 3, 3)
    assert not any(a < end and begin < b for a, b in answers for begin, end in updates), "an answer during an update"
    overlapped = loop.play(SMALL, SMALL.staleness, 3)
    tokens, more = (sum(step["action_tokens"] for step in ran.steps) for ran in (sync, overlapped))
    assert tokens == more == 3 * 16 * 3 * 8
    assert max(step["staleness_max"] for step in sync.steps) == 0
    assert max(sync.unexplained, overlapped.unexplained) <= 0.01
