"""Staleness: hand-made cases, then a simulated run under random orders of events."""

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.staleness import Staleness


def test_capacity_by_hand() -> None:
    # B = 4, S = 2: (e + 2 - v + 1) * 4
    limits = Staleness(groups_per_batch=4, max_staleness=2)
    assert limits.capacity(5, 5) == 12
    assert limits.capacity(4, 5) == 8  # the engines are one publish behind
    assert limits.capacity(2, 5) == 0  # tokens would be 3 old when trained at 5
    assert limits.capacity(0, 9) == 0


def test_may_issue_by_hand() -> None:
    limits = Staleness(groups_per_batch=2, max_staleness=0)
    assert limits.may_issue(0, 0, outstanding=0)
    assert limits.may_issue(0, 0, outstanding=1)
    assert not limits.may_issue(0, 0, outstanding=2)  # on-policy: one batch at a time
    assert not limits.may_issue(0, 1, outstanding=0)  # on-policy: wait for the publish


def test_accept_by_hand() -> None:
    limits = Staleness(max_staleness=1)
    assert [limits.accept(v, 5) for v in (3, 4, 5, 6)] == ["drop:stale", "train", "train", "train"]


def test_select_takes_the_oldest() -> None:
    limits = Staleness(groups_per_batch=2, max_staleness=3, policy="drop")
    assert limits.select({"a": 5, "b": 3, "c": 4, "d": 3}, {}, 6) == ["b", "d"]
    assert limits.select({"a": 5, "b": 2}, {}, 6) == []  # b is too old, one is no batch


def test_wait_waits_for_the_group_that_would_be_too_old() -> None:
    # S = 1, B = 2, v = 3. The running group of version 2 has deadline 3: it must be in this very batch.
    limits = Staleness(groups_per_batch=2, max_staleness=1)
    assert limits.select({"a": 3, "b": 3}, {"slow": 2}, 3) == []
    assert limits.select({"a": 3, "b": 3, "slow": 2}, {}, 3) == ["slow", "a"]
    # Of version 3 it has deadline 4, and a place in the batch at 4.
    assert limits.select({"a": 3, "b": 3}, {"slow": 3}, 3) == ["a", "b"]
    # Three of version 3 don't fit in the batch at 4 (two places).
    assert limits.select({"a": 3, "b": 3}, {"s": 3, "t": 3, "u": 3}, 3) == []
    # One past its deadline can't be helped: it does not block (accept refuses it later).
    assert limits.select({"a": 3, "b": 3}, {"hopeless": 1}, 3) == ["a", "b"]
    assert Staleness(groups_per_batch=2, max_staleness=1, policy="drop").select({"a": 3, "b": 3}, {"s": 2}, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_staleness": -1}, "staleness.max_staleness=-1 must be at least 0"),
        ({"groups_per_batch": 0}, "staleness.groups_per_batch=0 must be at least 1"),
        ({"policy": "dorp"}, "staleness.policy='dorp'; one of wait, drop. Did you mean 'drop'"),
    ],
)
def test_mistakes_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Staleness(**settings)  # type: ignore[arg-type]


@dataclass
class Run:
    """A run without anything but versions: groups start, finish late and out of order, publishing lags."""

    limits: Staleness
    version: int = 0
    engine: int = 0
    issued: int = 0
    running: dict[str, int] = field(default_factory=dict)
    ready: dict[str, int] = field(default_factory=dict)
    trained: list[int] = field(default_factory=list)
    """Staleness of each trained group."""
    stale: int = 0

    def possible(self) -> list[str]:
        """Events that can happen now."""
        outstanding = len(self.running) + len(self.ready)
        events = ["issue"] * self.limits.may_issue(self.engine, self.version, outstanding)
        events += ["finish", "infra"] * bool(self.running)
        events += ["publish"] * (self.engine < self.version)
        events += ["train"] * bool(self.limits.select(self.ready, self.running, self.version))
        return events

    def happen(self, event: str, number: int) -> None:
        if event == "issue":
            self.running[f"g{self.issued}"] = self.engine
            self.issued += 1
        elif event == "publish":
            self.engine += 1 + number % (self.version - self.engine)
        elif event in ("finish", "infra"):
            name = list(self.running)[number % len(self.running)]
            issued = self.running.pop(name)
            if event == "finish":  # tokens are of the version at the issue, or newer where it was swapped meanwhile
                self.ready[name] = issued + (number // 7) % (self.engine - issued + 1)
        else:
            chosen = self.limits.select(self.ready, self.running, self.version)
            assert len(chosen) == len(set(chosen)) == self.limits.groups_per_batch
            self.trained += [self.version - self.ready.pop(name) for name in chosen]
            self.version += 1
        for name in [n for n, v in self.ready.items() if self.limits.accept(v, self.version) != "train"]:
            del self.ready[name]
            self.stale += 1

    def check(self) -> None:
        assert all(s <= self.limits.max_staleness for s in self.trained), "trained past the bound"
        if self.limits.policy == "wait":
            assert self.stale == 0, "wait drops nothing for its age"
            late = [v for v in self.running.values() if v + self.limits.max_staleness < self.version]
            assert not late, "a running group can no longer be trained in time"
        assert self.possible(), "deadlock"


limits = st.builds(
    Staleness,
    groups_per_batch=st.integers(1, 4),
    max_staleness=st.integers(0, 4),
    policy=st.sampled_from(["wait", "drop"]),
)


@settings(max_examples=150, deadline=None)
@given(limits, st.lists(st.tuples(st.integers(0, 99), st.integers(0, 999)), max_size=120))
def test_the_bound_holds_and_something_can_always_happen(limits: Staleness, choices: list[tuple[int, int]]) -> None:
    run = Run(limits)
    run.check()
    for which, number in choices:
        events = run.possible()
        run.happen(events[which % len(events)], number)
        run.check()


@settings(max_examples=60, deadline=None)
@given(limits, st.integers(0, 2**32))
def test_every_fair_order_trains_batch_after_batch(limits: Staleness, seed: int) -> None:
    """With events drawn at random (infra failures rare) versions go on rising: no deadlock and no livelock."""
    rng, run = random.Random(seed), Run(limits)
    for _ in range(6000):
        events = [e for e in run.possible() if e != "infra" or rng.random() < 0.05]
        if events:
            run.happen(rng.choice(events), rng.randrange(1000))
        if run.version == 10:
            break
    run.check()
    assert run.version == 10


@settings(max_examples=60, deadline=None)
@given(limits, st.integers(0, 2**32))
def test_the_slowest_group_is_never_lost_under_wait(limits: Staleness, seed: int) -> None:
    """An adversary: the first group finishes only when nothing else can happen. Still it is trained, not dropped."""
    rng, run = random.Random(seed), Run(Staleness(**{**vars(limits), "policy": "wait"}))
    for _ in range(400):
        events = [e for e in run.possible() if e != "infra" and not (e == "finish" and list(run.running) == ["g0"])]
        if events:
            event = rng.choice(events)
            slot = rng.randrange(1 if "g0" in run.running and len(run.running) > 1 else 0, max(1, len(run.running)))
            run.happen(event, slot if event == "finish" else rng.randrange(1000))
        else:
            run.happen("finish", 0)
        run.check()
    assert "g0" not in run.running or run.version <= limits.max_staleness


def test_drop_goes_on_where_wait_stands_still() -> None:
    """One group never finishes: `wait` trains S more batches and stops, `drop` goes on."""
    versions = {}
    for policy in ("wait", "drop"):
        run = Run(Staleness(groups_per_batch=2, max_staleness=2, policy=policy))  # type: ignore[arg-type]
        run.happen("issue", 0)
        for _ in range(300):
            events = [e for e in run.possible() if e not in ("infra", "finish")]
            if events:
                run.happen(events[-1], 0)  # train before publish before issue
            elif len(run.running) > 1:
                run.happen("finish", 1)
            else:
                break
        versions[policy] = run.version
    assert versions["wait"] == 2 and versions["drop"] > 10
