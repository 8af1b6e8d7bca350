"""Several engines as one: where episodes go, how answers are put together, and what happens when an engine dies."""

from __future__ import annotations

import pickle
import threading
import time
from concurrent.futures import Future

import pytest

from envs.errors import InfraError
from rl.replicas import Replicas
from rl.spawn import PartGone


class Engine:
    """A handle that answers by itself: its version is what was published, a score tells it, a dead one answers nothing."""

    def __init__(self, name, skew=0.0):
        self.name, self.skew = name, skew
        self.version, self.asked, self.dead = 0, [], False

    def call(self, method, *args):
        future = Future()
        if self.dead:
            future.set_exception(PartGone(f"{self.name} is gone"))
        else:
            self.asked.append((method, *args))
            future.set_result(getattr(self, method)(*args))
        return future

    def ask(self, method, *args, timeout=None):
        return self.call(method, *args).result(timeout)

    def generate(self, ids, sampling, episode):
        return self.name, self.version

    def release(self, episode):
        pass

    def publish(self, version, weights):
        self.version = version
        return version

    def score(self, sequences):
        return [[-float(self.version) - self.skew] * len(ids) for ids in sequences]

    def load(self):
        return 0.5 if self.name == "a" else 1.0

    def stats(self):
        return {"seconds": {"decode": 3.0 if self.name == "a" else 1.0, "idle": 1.0}, "steps": 2, "version": self.version, "paces": [(1, 2, 0.5)]}  # fmt: skip

    def check(self):
        pass

    def kill(self):
        self.dead = True


def eventually(true, seconds=20.0):
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.01)


def generate(engines, episode):
    return engines.ask("generate", [1], None, episode, timeout=5)[0]


def test_an_episode_stays_and_new_ones_go_where_few_are():
    engines = Replicas("engine", [Engine("a"), Engine("b")])
    homes = {episode: generate(engines, episode) for episode in "wxyz"}
    assert sorted(homes.values()) == ["a", "a", "b", "b"]
    assert all(generate(engines, episode) == home for episode, home in homes.items())
    for episode in [e for e, home in homes.items() if home == "a"]:
        engines.ask("release", episode)
    assert [generate(engines, "new 1"), generate(engines, "new 2")] == ["a", "a"]


def test_answers_are_put_together():
    engines = Replicas("engine", [Engine("a"), Engine("b")])
    assert engines.ask("publish", 7, {}, timeout=5) == 7
    assert engines.ask("score", [[1, 2], [3]], timeout=5) == [[-7.0, -7.0], [-7.0]] * 2
    assert engines.ask("load", timeout=5) == 0.75
    stats = engines.ask("stats", timeout=5)
    assert stats["seconds"] == {"decode": 2.0, "idle": 1.0}  # a mean engine's, which sum to the wall clock
    assert stats["steps"] == 4 and stats["version"] == 7 and stats["paces"] == [(1, 2, 0.5)] * 2


def test_a_dead_engine_loses_its_episodes_alone_and_comes_back_with_the_newest_weights():
    a, b, again = Engine("a"), Engine("b"), Engine("again")
    may, back = threading.Event(), threading.Event()

    def start(index):
        assert index == 0 and may.wait(20)
        return again

    engines = Replicas("engine", [a, b], start, back.set)
    engines.ask("publish", 1, {}, timeout=5)
    engines.ask("score", [[1]], timeout=5)
    assert [generate(engines, "x"), generate(engines, "y")] == ["a", "b"]
    a.dead = True
    with pytest.raises(PartGone):
        generate(engines, "x")
    assert generate(engines, "y") == "b"
    with pytest.raises(PartGone):  # its KV, and what was said, is gone
        generate(engines, "x")
    engines.ask("release", "x", timeout=5)
    assert generate(engines, "x") == generate(engines, "z") == "b"  # the dead one gets none
    assert engines.ask("publish", 2, {}, timeout=5) == 2
    may.set()
    assert back.wait(20)
    assert again.version == 2 and again.asked[0][:2] == ("publish", 2)
    assert generate(engines, "late") == "again"


def test_an_engine_that_samples_otherwise_stays_out():
    a, b, wrong = Engine("a"), Engine("b"), Engine("wrong", skew=1e-3)
    engines = Replicas("engine", [a, b], lambda index: wrong)
    engines.ask("publish", 1, {}, timeout=5)
    engines.ask("score", [[1, 2]], timeout=5)
    a.dead = True
    engines.ask("check", timeout=5)
    eventually(lambda: ("score", [[1, 2]]) in wrong.asked)
    assert [generate(engines, episode) for episode in "xyz"] == ["b"] * 3


def test_weights_that_came_while_it_started_are_taken_too():
    a, b, again = Engine("a"), Engine("b"), Engine("again")
    back = threading.Event()
    engines = Replicas("engine", [a, b], lambda index: again, back.set)
    engines.ask("publish", 1, {}, timeout=5)
    publish = again.publish

    def late(version, weights):  # another version is published while this one takes the first
        if version == 1:
            engines.ask("publish", 2, {}, timeout=5)
        return publish(version, weights)

    again.publish = late
    a.dead = True
    engines.ask("check", timeout=5)
    assert back.wait(20) and again.version == b.version == 2


def test_where_none_is_left_the_run_is_told():
    a, b = Engine("a"), Engine("b")
    engines = Replicas("engine", [a, b], start=lambda index: (_ for _ in ()).throw(InfraError("no place for it")))
    a.dead = b.dead = True
    with pytest.raises(PartGone):
        engines.ask("check", timeout=5)
    with pytest.raises(PartGone, match="no engine of 2 is left"):
        engines.ask("score", [[1]], timeout=5)
    with pytest.raises(PartGone, match="no engine of 2 is left for episode x"):
        generate(engines, "x")


class Plain(Engine):
    """One that can be sent elsewhere."""


def test_a_copy_elsewhere_has_its_own_places_and_starts_nothing():
    engines = Replicas("engine", [Plain("a"), Plain("b")], lambda index: Plain("again"))
    copy = pickle.loads(pickle.dumps(engines))
    assert generate(engines, "x") == generate(copy, "y") == "a"
    copy.parts[0].dead = True
    copy.ask("check", timeout=5)
    assert copy._start is None and generate(copy, "z") == "b"
