"""Admission: hand-made cases, then whole runs under random and adversarial orders of events."""

import random
import zlib
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.admission import Admission, Budget, Closed, Limits
from rl.staleness import Staleness


def admission(max_in_flight: int = 4, *, batch: int = 1, staleness: int = 1, **limits: float) -> Admission[str]:
    bound = Staleness(groups_per_batch=batch, max_staleness=staleness)
    return Admission(bound, Limits(**limits), max_in_flight=max_in_flight)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- by hand


def test_a_run_of_one_group() -> None:
    run = admission(2)
    assert run.may_issue()
    run.issue("g0", ["a", "b", "c"])
    assert not run.may_issue()  # its episodes are in line
    assert run.start() == ["a", "b"] and run.start() == []
    assert run.ended("b", usable=True, oldest=0) is None
    assert run.start() == ["c"] and not run.may_issue()  # two in flight
    assert run.ended("a", usable=True, oldest=0) is None and run.batch() == []
    assert run.ended("c", usable=True, oldest=0) == Closed(drop=None, cancel=[])
    assert run.batch() == ["g0"] and run.outstanding == run.training == 1
    run.trained()
    assert (run.version, run.engine, run.outstanding) == (1, 0, 0)
    run.published(1)
    assert run.engine == 1


def test_a_lost_episode_is_played_again_before_others() -> None:
    run = admission(1)
    run.issue("g0", ["a", "b"])
    assert run.start() == ["a"]
    run.retry("a", "a2")
    assert run.start() == ["a2"]
    assert run.ended("a2", usable=True, oldest=0) is None and run.start() == ["b"]
    assert run.ended("b") == Closed(drop="infra", cancel=[])  # one alone is no group


@pytest.mark.parametrize("versions", [(1, 3), (3, 1)])
def test_a_group_is_as_old_as_its_oldest_token(versions: tuple[int, int]) -> None:
    run = admission(2)
    run.resume(3, {})
    run.issue("g0", ["a", "b"])
    run.start()
    assert run.ended("a", usable=True, oldest=versions[0]) is None
    assert run.ended("b", usable=True, oldest=versions[1]) == Closed(drop=None, cancel=[])
    assert run.stale() == ["g0"] and run.batch() == [] and run.outstanding == 0  # 3 - 1 > 1


def test_sandboxes_bind_before_episodes_in_flight() -> None:
    run = admission(4, sandboxes=1)
    run.queue(["e0", "e1"])
    assert run.start() == ["e0"] and run.start() == []
    assert run.ended("e0") is None and run.start() == ["e1"]


def test_spare_episodes_are_cancelled_or_never_start() -> None:
    run = admission(4, spare=2)
    run.issue("g0", ["a", "b", "c", "d", "e"])  # G = 3
    assert run.start() == ["a", "b", "c", "d"]
    assert run.ended("d", usable=True, oldest=0) is None
    assert run.ended("b", usable=False) is None  # without a reward it fills no place
    assert run.start() == ["e"] and run.ended("a", usable=True, oldest=0) is None
    closed = run.ended("c", usable=True, oldest=0)
    assert closed == Closed(drop=None, cancel=["e"]) and run.in_flight == 1
    assert run.ended("e", usable=True, oldest=0) is None and run.in_flight == 0  # too late to count
    assert run.batch() == ["g0"]
    run.issue("g1", ["a", "b", "c", "d"])
    run.limit = 2
    assert run.start() == ["a", "b"]
    assert run.ended("a", usable=True) is None and run.ended("b", usable=True) == Closed(drop=None, cancel=[])
    assert run.start() == [] and run.in_flight == 0


def test_aimd_by_hand() -> None:
    run = admission(8, load=0.25, interval=10.0, factor=0.5)
    seen = []
    for now, load in [(0, 0.5), (9, 0.5), (10, 0.3), (20, 0.9), (30, 1.0), (40, 0.25), (45, 0.0), (50, 0.0)]:
        run.measured(load, now)
        seen.append(run.limit)
    assert seen == [4, 4, 2, 1, 1, 2, 2, 3]  # halved; too soon; halved; halved; never 0; +1 at the bound; too soon; +1
    for now in range(60, 200, 10):
        run.measured(0.0, now)
    assert run.limit == 8
    still = admission(8)  # load = 1: off
    still.measured(1.0, 0.0)
    assert still.limit == 8


def test_a_lower_limit_ends_no_episode() -> None:
    run = admission(4, load=0.5)
    run.queue("abcdef")
    assert run.start() == ["a", "b", "c", "d"]
    run.measured(1.0, 0.0)
    assert run.room == -2 and run.start() == []
    for episode in "abc":
        run.ended(episode)
    assert run.start() == ["e"]


def test_the_youngest_is_parked_and_resumed_in_order() -> None:
    engine = Budget(10)
    for episode in "abc":
        engine.ask(episode, 3)
    assert engine.decide() == ([], ["a", "b", "c"]) and engine.used == 9
    for episode, tokens in (("a", 3), ("b", 3), ("c", 2)):
        engine.done(episode, tokens)
    engine.ask("c", 5)
    assert engine.decide() == ([], []) and engine.used == 8  # 8 + 3 > 10, and nobody is younger: c waits, with its KV
    engine.ask("b", 6)
    assert engine.decide() == (["c"], ["b"]) and engine.used == 9  # 3 + 6
    engine.ask("a", 4)
    assert engine.decide() == ([], ["a"])  # one more token is free
    engine.done("b", 6)
    assert engine.decide() == ([], [])  # c needs 5, a and b hold 10, older both
    engine.end("a")
    assert engine.decide() == ([], []) and engine.waiting == 1
    engine.end("b")
    assert engine.decide() == ([], ["c"])


def test_nobody_goes_first_while_an_older_one_waits() -> None:
    engine = Budget(10)
    for episode, most in (("a", 6), ("b", 5), ("c", 1)):
        engine.ask(episode, most)
    assert engine.decide() == ([], ["a"])  # c would fit
    engine.done("a", 4)
    assert engine.decide() == ([], ["b", "c"])


def test_pages_are_held_whole() -> None:
    engine = Budget(32, page=16)
    for episode in "abc":
        engine.ask(episode, 1)
    assert engine.decide() == ([], ["a", "b"]) and engine.used == 32


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sandboxes": -1}, "admission.sandboxes=-1 is negative; give at least 0"),
        ({"load": 1.5}, "admission.load=1.5 is a share of the turns; give 0 to 1"),
        ({"factor": 1.0}, "admission.factor=1.0 lowers no number of episodes"),
        ({"interval": 0.0}, "admission.interval=0.0 is no time to wait"),
    ],
)
def test_mistakes_are_named(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Limits(**values)  # type: ignore[arg-type]


def test_what_can_never_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^episode x may grow to 16 tokens, the KV budget is 8; raise [^\n]*$"):
        Budget(8, page=16).ask("x", 3)
    engine = Budget(8)
    engine.ask("x", 3)
    with pytest.raises(ValueError, match="already generating"):
        engine.ask("x", 3)
    with pytest.raises(ValueError, match="max_in_flight=0"):
        admission(0)


# ---------------------------------------------------------------------- whole runs


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One run: its limits, and what its episodes are like."""

    steps: int = 3
    batch: int = 2
    staleness: int = 1
    policy: str = "wait"
    size: int = 3
    in_flight: int = 6
    limits: Limits = field(default_factory=Limits)
    tokens: int = 40
    page: int = 1
    losses: int = 8
    """Episodes that the infrastructure loses at most."""


EARLY = 2
"""Tokens by which a turn ends before the most that it asked for."""


@dataclass
class Episode:
    name: str
    group: str
    left: list[tuple[int, int]]
    """Turns to come: tokens read, tokens sampled."""
    kv: int = 0
    """What it really holds in the engine."""
    context: int = 0
    oldest: int = -1
    state: str = "env"
    sampling: int = 0
    """Tokens that its turn still samples; up to `EARLY` fewer than it could."""
    cancelled: bool = False


@dataclass
class World:
    """Loop, workers, engine and learner in one place, without time: what can happen next is chosen from outside. It keeps
    its own books and checks them against every decision."""

    setting: Setting
    admission: Admission[str] = field(init=False)
    budget: Budget = field(init=False)
    alive: dict[str, Episode] = field(default_factory=dict)
    ages: list[str] = field(default_factory=list)
    """Episodes known to the engine, the oldest first."""
    fate: dict[str, str] = field(default_factory=dict)
    """Every issued group: "open", "ready", "training", "trained" or the reason why it was dropped."""
    oldest: dict[str, int] = field(default_factory=dict)
    usable: dict[str, int] = field(default_factory=dict)
    batch: list[str] = field(default_factory=list)
    parked: set[str] = field(default_factory=set)
    lost: int = 0
    issued: int = 0
    log: list[object] = field(default_factory=list)

    def __post_init__(self) -> None:
        s = self.setting
        bound = Staleness(groups_per_batch=s.batch, max_staleness=s.staleness, policy=s.policy)  # type: ignore[arg-type]
        self.admission = Admission(bound, s.limits, max_in_flight=s.in_flight)
        self.budget = Budget(s.tokens, s.page)

    # what can happen

    def possible(self) -> list[tuple[str, str]]:
        """Events that change something, each with whom it happens to."""
        a, events = self.admission, []
        done = a.version == self.setting.steps
        if a.may_issue() and a.outstanding < (self.setting.steps - a.version) * self.setting.batch:
            events.append(("issue", ""))
        if a.room > 0 and a._line:
            events.append(("start", ""))
        if a.training:
            events.append(("trained", ""))
        elif not done and any(fate == "ready" for fate in self.fate.values()):
            events.append(("learn", ""))
        if a.engine < a.version:
            events.append(("publish", ""))
        for episode in self.alive.values():
            if episode.cancelled:
                events.append(("end", episode.name))
            elif episode.state == "env":
                events.append(("ask" if episode.left else "end", episode.name))
            elif episode.state == "runs":
                events.append(("sample" if episode.sampling else "done", episode.name))
            if self.lost < self.setting.losses and not episode.cancelled:
                events.append(("lose", episode.name))
        return events

    def happen(self, event: str, name: str, number: int) -> bool:
        """Let it happen; False where it changed nothing."""
        a = self.admission
        before = len(self.log)
        match event:
            case "issue":
                group, self.issued = f"g{self.issued}", self.issued + 1
                self.fate[group] = "open"
                size = self.setting.size + self.setting.limits.spare
                a.issue(group, [f"{group}/{i}.0" for i in range(size)])
                self.log.append(group)
            case "start":
                chosen = a.start()
                assert chosen and len(chosen) + len(self.alive) <= a.limit, "started past the limit"
                self.alive |= {n: Episode(n, n.split("/")[0], turns_of(n, self.setting)) for n in chosen}
                self.log.append(chosen)
            case "learn":
                self.learn()
            case "trained":
                a.trained()
                for group in self.batch:
                    self.move(group, "training", "trained")
                self.batch = []
                self.log.append("trained")
            case "publish":
                a.published(a.engine + 1 + number % (a.version - a.engine))
                self.log.append("published")
            case _:
                self.play(event, self.alive[name])
                self.log.append((event, name))
        a.measured(number % 11 / 10, float(number % 3 + len(self.log)))
        self.decide()
        self.check()
        return len(self.log) > before

    def learn(self) -> None:
        for group in self.admission.stale():
            assert self.admission.version - self.oldest[group] > self.setting.staleness, "dropped without a cause"
            assert self.setting.policy == "drop", "wait drops nothing for its age"
            self.move(group, "ready", "stale")
        self.batch = self.admission.batch()
        for group in self.batch:
            assert self.admission.version - self.oldest[group] <= self.setting.staleness, "trained past the bound"
            self.move(group, "ready", "training")
        assert len(self.batch) in (0, self.setting.batch)

    def move(self, group: str, source: str, target: str) -> None:
        assert self.fate[group] == source, f"{group} is {self.fate[group]}, not {source}"
        self.fate[group] = target
        self.log.append((group, target))

    # what an episode does

    def play(self, event: str, episode: Episode) -> None:
        if event == "ask":
            read, episode.sampling = episode.left[0]
            episode.context += read
            episode.state = "asks"
            if episode.name not in self.ages:
                self.ages.append(episode.name)
            self.budget.ask(episode.name, episode.context + episode.sampling + EARLY)
        elif event == "sample":
            episode.sampling -= 1
            episode.kv = episode.context = episode.context + 1
            episode.oldest = (
                min(episode.oldest, self.admission.engine) if episode.oldest >= 0 else self.admission.engine
            )
        elif event == "done":
            episode.left.pop(0)
            episode.state = "env"
            self.budget.done(episode.name, episode.context)
        else:
            self.leave(episode, lost=event == "lose")

    def leave(self, episode: Episode, lost: bool) -> None:
        self.budget.end(episode.name)
        if episode.name in self.ages:
            self.ages.remove(episode.name)
        del self.alive[episode.name]
        self.parked.discard(episode.name)
        self.lost += lost
        stem, attempt = episode.name.rsplit(".", 1)
        if lost and int(attempt) < 1:
            self.admission.retry(episode.name, f"{stem}.{int(attempt) + 1}")
            return
        closed = self.admission.ended(episode.name, usable=not lost and not episode.cancelled, oldest=episode.oldest)
        if self.fate[episode.group] != "open":
            assert closed is None and episode.cancelled
            return
        if not lost:
            self.usable[episode.group] = self.usable.get(episode.group, 0) + 1
            self.oldest[episode.group] = min(self.oldest.get(episode.group, 1 << 30), episode.oldest)
        if self.usable.get(episode.group) == self.setting.size:
            assert closed is not None and closed.drop is None, "waits for surplus"
        if closed is not None:
            self.move(episode.group, "open", closed.drop or "ready")
            mates = {n for n, e in self.alive.items() if e.group == episode.group}
            assert set(closed.cancel) == mates, "surplus that goes on"
            for name in closed.cancel:
                self.alive[name].cancelled = True

    def decide(self) -> None:
        turns = self.budget.decide()
        for name in turns.park:
            assert self.alive[name].state != "runs", "a running turn lost its KV"
            assert any(self.ages.index(n) < self.ages.index(name) for n in turns.run), "parked for a younger one"
            self.alive[name].kv = 0
            self.parked.add(name)
        for name in turns.run:
            episode = self.alive[name]
            older = self.ages[: self.ages.index(name)]
            assert all(self.alive[n].state != "asks" for n in older), "overtaken by a younger one"
            assert episode.state == "asks"
            episode.state, episode.kv = "runs", episode.context
            self.parked.discard(name)
        self.log.append(turns) if any(turns) else None

    # what holds at any time

    def check(self) -> None:
        s, a = self.setting, self.admission
        pages = sum(-(-e.kv // s.page) * s.page for e in self.alive.values())
        promised = sum(
            -(-(e.kv + e.sampling + EARLY) // s.page) * s.page for e in self.alive.values() if e.state == "runs"
        )
        resting = sum(-(-e.kv // s.page) * s.page for e in self.alive.values() if e.state != "runs")
        assert pages <= s.tokens, "over the KV budget"
        assert self.budget.used == promised + resting <= s.tokens, "the budget's books are wrong"
        assert len(self.alive) == a.in_flight <= s.in_flight
        assert len(self.alive) <= (s.limits.sandboxes or s.in_flight), "too many sandboxes"
        assert 1 <= a.limit <= s.in_flight
        fates = list(self.fate.values())
        assert a.outstanding == sum(fates.count(f) for f in ("open", "ready", "training"))

    def over(self) -> bool:
        return self.admission.version == self.setting.steps and not self.alive and not self.admission.outstanding

    def finish(self, choose: random.Random, slow: int) -> None:
        """Play to the end. `slow` percent of the groups, once they have sampled a token, get on only when nothing else can."""
        salt = choose.random()

        def may_wait(name: str) -> bool:
            episode = self.alive.get(name)
            if episode is None or episode.oldest < 0:
                return False
            return zlib.crc32(f"{salt}/{episode.group}".encode()) % 100 < slow

        idle: set[tuple[str, str]] = set()  # looked at since something changed
        while not self.over():
            events = [e for e in self.possible() if e not in idle]
            assert events, f"deadlock: {self.admission.outstanding} groups outstanding, {self.possible()}"
            first = [e for e in events if not may_wait(e[1])] or events
            event = choose.choice(first)
            idle = set() if self.happen(*event, choose.randrange(1000)) else idle | {event}
            assert len(self.log) < 20_000, "livelock"
        assert not self.parked, "parked for ever"
        assert set(self.fate.values()) <= {"trained", "stale", "infra"}, "a group without an end"
        assert list(self.fate.values()).count("trained") == self.setting.steps * self.setting.batch
        assert self.budget.used == self.budget.waiting == 0


def turns_of(name: str, setting: Setting) -> list[tuple[int, int]]:
    """Turns of an episode, drawn from its name; together they fit into the KV budget."""
    draw, room, turns = random.Random(name), setting.tokens // setting.page * setting.page - EARLY, []
    for _ in range(draw.randint(1, 4)):
        turn = (draw.randint(1, max(1, setting.tokens // 3)), draw.randint(1, 6))
        room -= sum(turn)
        if room >= 0:
            turns.append(turn)
    return turns or [(1, 1)]


limits = st.builds(
    Limits,
    sandboxes=st.sampled_from([0, 0, 1, 4]),
    spare=st.integers(0, 2),
    load=st.sampled_from([0.3, 0.9, 1.0, 1.0]),
    interval=st.sampled_from([1.0, 5.0]),
    factor=st.sampled_from([0.3, 0.9]),
)
scenes = st.builds(
    Setting,
    steps=st.integers(1, 6),
    batch=st.integers(1, 3),
    staleness=st.integers(0, 2),
    policy=st.sampled_from(["wait", "drop"]),
    size=st.integers(2, 4),
    in_flight=st.sampled_from([1, 2, 3, 5, 16]),
    limits=limits,
    tokens=st.integers(8, 60) | st.just(400),
    page=st.sampled_from([1, 4]),
)
choices = st.lists(st.tuples(st.integers(0, 99), st.integers(0, 999)), max_size=80)


@settings(max_examples=150, deadline=None)
@given(scenes, choices, st.integers(0, 2**32), st.sampled_from([0, 15, 60]))
def test_bounds_hold_and_every_group_comes_to_its_end(
    setting: Setting, choices: list[tuple[int, int]], seed: int, slow: int
) -> None:
    world = World(setting)
    for which, number in choices:
        events = world.possible()
        if events:
            world.happen(*events[which % len(events)], number)
    world.finish(random.Random(seed), slow)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(0, 2), st.sampled_from(["wait", "drop"]), st.integers(0, 2**32))
def test_groups_that_are_overtaken_for_long(batch: int, staleness: int, policy: str, seed: int) -> None:
    """With room for all, few slow groups and many batches, groups do get old."""
    setting = Setting(steps=8, batch=batch, staleness=staleness, policy=policy, in_flight=16, tokens=400, losses=2)
    World(setting).finish(random.Random(seed), 15)


@settings(max_examples=20, deadline=None)
@given(scenes, st.integers(0, 2**32))
def test_the_same_events_give_the_same_decisions(setting: Setting, seed: int) -> None:
    logs = []
    for _ in range(2):
        world = World(setting)
        world.finish(random.Random(seed), 50)
        logs.append(world.log)
    assert logs[0] == logs[1]


def test_no_sandbox_no_token_and_no_batch_is_left_unused() -> None:
    """The bounds are reached, not only kept: a world too small for its episodes uses all of it."""
    world, most = World(Setting(in_flight=8, limits=Limits(sandboxes=5), tokens=30, losses=0)), [0, 0]
    choose = random.Random(1)
    while not world.over():
        world.happen(*choose.choice(world.possible()), 0)
        most = [max(most[0], len(world.alive)), max(most[1], sum(e.kv for e in world.alive.values()))]
    assert most[0] == 5 and most[1] > 25 and any("park=['" in str(entry) for entry in world.log)
