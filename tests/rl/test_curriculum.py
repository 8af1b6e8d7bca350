"""The curriculum: exact shares, windows and stages by hand, and that a journal restores it."""

import json
from collections import Counter
from fractions import Fraction
from math import ceil, floor
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.trajectory import Group, Trajectory
from envs.task import save_tasks
from envs.tiny import repairs
from rl.config import ROOT, Config, dump, load
from rl.curriculum import PATIENCE, Curriculum, curriculum, fair, read_rates
from rl.journal import Journal
from rl.loop import Loop

MIXED = """
name = "mixed"
steps = 9
[envs.easy]
id = "examples.reading_list:ReadingList"
first_task = 100
weight = 2
[envs.hard]
kwargs = { tasks = "tiny-repairs" }
[policy]
max_context = 768
[learn]
groups_per_step = 2
"""


def recipe(tmp_path, text=MIXED, *overrides) -> Config:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return load(path, overrides)


def names(machine: Curriculum, n: int, step: int = 0) -> list[str]:
    return [machine.next(step).group for _ in range(n)]


# ---------------------------------------------------------------------- mixing


@given(
    st.lists(st.one_of(st.integers(1, 50), st.floats(0.01, 9.0)), min_size=1, max_size=5),
    st.integers(1, 40),
)
@settings(max_examples=100, deadline=None)
def test_shares_are_exact_within_one_after_every_choice(weights, n):
    shares = {str(i): weight for i, weight in enumerate(weights)}
    total, counts = sum(map(Fraction, weights)), Counter()
    for k in range(1, n + 1):
        counts[fair(shares, counts)] += 1
        for name, weight in shares.items():
            quota = k * Fraction(weight) / total
            assert floor(quota) <= counts[name] <= ceil(quota)


def test_one_environment_is_fed_as_it_was():
    tiny = load(ROOT / "rl/recipes/tiny.toml")
    machine = Curriculum(tiny)
    picks = [machine.next(0) for _ in range(3)]
    assert [(p.group, p.source, p.index, p.stage) for p in picks] == [
        (f"g{i}", "env", i, 0) for i in (1_000_000, 1_000_001, 1_000_002)
    ]


def test_the_seeds_of_orders_depend_on_run_group_and_sample():
    """CRC-32 of "0/g1000000/1000000/0" and so on, 31 bits: a run of before is the same run now."""
    tiny = load(ROOT / "rl/recipes/tiny.toml")
    orders = list(Loop._orders(SimpleNamespace(config=tiny), Curriculum(tiny).next(0), "train", 2, 1.0))
    assert [(o.seed, o.episode) for o in orders] == [
        (1786429952, "g1000000/1000000/0.0"),
        (494793366, "g1000000/1000000/1.0"),
    ]


def test_two_environments_take_turns_by_weight(tmp_path):
    machine = Curriculum(recipe(tmp_path))
    assert " ".join(names(machine, 6)) == "g100.easy g101.easy g1000000.hard g102.easy g103.easy g1000001.hard"


def test_weight_zero_is_never_played(tmp_path):
    machine = Curriculum(recipe(tmp_path, MIXED, "envs.hard.weight=0"))
    assert names(machine, 3) == ["g100.easy", "g101.easy", "g102.easy"]


# ---------------------------------------------------------------------- window

WINDOW = MIXED + "[rollout]\ngroup_size = 10\n"


def windowed(tmp_path, size, *overrides, rates=None) -> Curriculum:
    config = recipe(tmp_path, WINDOW, "envs.hard.weight=0", "envs.easy.window=[0.1, 0.7]", *overrides)
    return Curriculum(config, {(s, "easy"): size for s in range(3)}, {(s, "easy"): rates or {} for s in range(3)})


def test_a_group_outside_is_dropped_and_another_is_issued(tmp_path):
    machine = windowed(tmp_path, None)
    for solved, kept in ((0, False), (1, True), (7, True), (8, False)):
        assert machine.observe(machine.next(0).group, solved, 10) is kept
    assert machine.outside == {"easy": 2} and names(machine, 1) == ["g104.easy"]


def test_tasks_of_a_set_that_were_outside_are_passed_over(tmp_path):
    """Three tasks: 100 is task 1 of the set, 101 is task 2, 102 is task 0. Task 2 is too easy."""
    machine = windowed(tmp_path, 3)
    for solved in (5, 9, 2):
        machine.observe(machine.next(0).group, solved, 10)
    assert names(machine, 4) == ["g103.easy", "g105.easy", "g106.easy", "g108.easy"]
    machine.observe("g103.easy", 0, 10)  # its latest group decides: task 1 has become too hard
    assert names(machine, 2) == ["g111.easy", "g114.easy"]
    machine.observe("g105.easy", 10, 10)
    assert machine.next(0) is None
    assert machine.none_left(0) == (
        "zero tasks left after filters: all 3 tasks of easy have solve rates outside of its window [0.1, 0.7]; "
        "widen the window, or add tasks"
    )


def test_rates_measured_before_leave_tasks_out(tmp_path):
    assert names(windowed(tmp_path, 4, rates={0: 0.9, 1: 0.1, 3: 0.05}), 4) == [
        "g101.easy", "g102.easy", "g105.easy", "g106.easy",
    ]  # fmt: skip
    assert names(windowed(tmp_path, None, rates={100: 0.0, 102: 0.8, 103: 0.5}), 3) == [
        "g101.easy", "g103.easy", "g104.easy",
    ]  # fmt: skip


def test_a_source_that_is_always_outside_is_given_up(tmp_path):
    """Two groups a step: after 20 in a row. One inside begins the count again."""
    machine = windowed(tmp_path, None)
    for i in range(PATIENCE * 2 + 5):
        machine.observe(machine.next(0).group, 5 if i == 4 else 0, 10)
    assert machine.next(0) is None
    assert machine.none_left(0).startswith("zero tasks left after filters: the last 20 groups of easy have solve rates")


def test_the_share_of_a_source_without_tasks_goes_to_the_others(tmp_path):
    config = recipe(tmp_path, MIXED, "envs.easy.window=[0.5, 1]")
    machine = Curriculum(config, {(0, "easy"): 1})
    machine.observe(machine.next(0).group, 0, 4)
    assert names(machine, 3) == ["g1000000.hard", "g1000001.hard", "g1000002.hard"]


def test_a_group_outside_is_replaced_by_one_of_its_source(tmp_path):
    """Shares 2 : 1 of the groups that are trained, though half of one source's are dropped."""
    machine = Curriculum(recipe(tmp_path, MIXED, "envs.easy.window=[0.5, 1]"))
    kept, played = Counter(), 0
    while kept.total() < 30:
        pick = machine.next(0)
        kept[pick.source] += machine.observe(pick.group, pick.index % 2, 1)
        played += 1
    assert kept == {"easy": 20, "hard": 10} and played == 50 and machine.outside == {"easy": 20}


# ---------------------------------------------------------------------- stages

STAGED = (
    WINDOW
    + """
[[stages]]
step = 3
envs.hard.weight = 4
envs.hard.window = [0.1, 0.7]
envs.hard.kwargs.reward = "binary"
rollout.group_size = 16
[[stages]]
step = 6
envs.hard.max_context = 300
policy.temperature = 0.8
"""
)


def test_stages_change_the_recipe_one_after_the_other(tmp_path):
    config = recipe(tmp_path, STAGED)
    first, second, third = config.staged
    assert first is config and [c.rollout.group_size for c in config.staged] == [10, 16, 16]
    assert [c.sources["hard"].weight for c in config.staged] == [1, 4, 4]
    assert second.sources["hard"].kwargs == {"tasks": "tiny-repairs", "reward": "binary"}
    assert (second.sources["hard"].max_context, third.sources["hard"].max_context) == (0, 300)
    assert third.sources["hard"].window == (0.1, 0.7) and third.policy.temperature == 0.8
    again = tmp_path / "again.toml"
    again.write_text(dump(config))
    assert load(again, ["stages.1.step=9"]).stages[1].step == 9
    assert load(again) == config and "[env]" not in dump(config)


def test_shares_begin_again_with_a_stage(tmp_path):
    machine = Curriculum(recipe(tmp_path, STAGED))
    assert Counter(machine.next(2).source for _ in range(3)) == {"easy": 2, "hard": 1}
    picks = [machine.next(3) for _ in range(6)]
    assert Counter(p.source for p in picks) == {"hard": 4, "easy": 2} and {p.stage for p in picks} == {1}
    assert machine.next(6).stage == 2


def test_a_stage_measures_anew(tmp_path):
    machine = windowed(tmp_path, 1, "stages=[{step = 5, rollout = {group_size = 4}}]")
    machine.observe(machine.next(0).group, 0, 10)
    assert machine.next(4) is None and machine.next(5).group == "g101.easy"


# ---------------------------------------------------------------------- restart


def finished(name: str, solved: int, graded: int) -> Group:
    outcomes = ["resolved"] * solved + ["unresolved"] * (graded - solved)
    return Group(name, "t", [Trajectory("t", sample=i, reward=0.0, outcome=o) for i, o in enumerate(outcomes)])


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=40), st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_an_interrupted_run_plays_what_an_uninterrupted_one_plays(staged, events, at):
    """Groups finish late and in any order. A machine that is rebuilt from the journal goes on as the first one does."""
    sizes = {(stage, "easy"): 3 for stage in range(3)}
    machines, journal, waiting = [Curriculum(staged, sizes)], Journal(Path(":memory:")), []
    for number, (which, solved) in enumerate(events):
        if number == at:
            machines.append(Curriculum(staged, sizes))
            machines[1].resume(journal.entries())
        picks = [machine.next(number // 5) for machine in machines]
        assert picks[0] == picks[-1]
        if picks[0] is not None:
            journal.issue(picks[0].group, picks[0].index, "t", picks[0].source, picks[0].stage)
            journal.start(picks[0].group, 0)
            waiting.append(picks[0].group)
        if which < len(waiting):
            group = finished(waiting.pop(which), solved, 4)
            kept = [machine.observe(group.id, group.solved, group.graded) for machine in machines]
            assert kept[0] == kept[-1]
            journal.finish(group) if kept[0] else journal.reject(group, "window")
    assert machines[0].outside == machines[-1].outside
    journal.close()


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    more = ("envs.easy.window=[0.2, 0.8]", "learn.groups_per_step=1")
    return recipe(tmp_path_factory.mktemp("recipe"), STAGED, *more)


def test_a_journal_of_another_recipe_is_refused(tmp_path):
    journal = Journal(Path(":memory:"))
    journal.issue("g5", 5, "train/5")
    machine = Curriculum(load(ROOT / "rl/recipes/tiny.toml"))
    machine.resume(journal.entries())
    assert machine.next(0).index == 1_000_000  # the feed begins where the recipe says
    with pytest.raises(ValueError, match="group g5 of the journal is of source 'env' in stage 0, which this recipe"):
        Curriculum(recipe(tmp_path)).resume(journal.entries())


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("env.split=train", None),
        ("env.split=validation", r"both \[env\] and \[envs.easy\] are given; keep one"),
        ("envs.easy.weight=-1", r"envs.easy: weight=-1.0 is no share"),
        ("envs.easy.window=[0.7, 0.1]", r"window=\[0.7, 0.1\] is no range of solve rates"),
        ("envs.easy.window=[0.1]", r"is no range"),
        ("envs.easy.rates=r.jsonl", r"is of no use without a window"),
        ("envs.easy.max_turns=-1", r"max_turns=-1 is negative"),
        ("envs.easy.max_context=900", r"max_context=900 of easy is more than the engine holds"),
        ("envs.easy.wieght=1", r"envs.easy: unknown key 'wieght'.*Did you mean 'weight'"),
        ("envs={a.weight=0, b.weight=0}", r"weight is 0 for every source"),
        ('envs={"a/b".weight=1}', r"envs.'a/b' is no name of a source"),
        ("stages=[{step=0}]", r"step=0 is the recipe itself"),
        ("stages=[{step=2},{step=2}]", r"stages\[1\].step=2 is not above the one before"),
        ("stages=[{step=2,learn.lr=1}]", r"stages\[0\]: unknown key 'learn'; remove it, known are step, env, envs"),
        ("stages=[{step=2,rollout.workers=2}]", r"rollout.workers can't change .* may change rollout.group_size"),
        ("stages=[{step=2,envs.hard.id='x'}]", r"envs.hard.id can't change while a run goes on"),
        ("stages=[{step=2,envs.hrad.weight=1}]", r"changes envs.hrad, which the recipe has not. Did you mean 'hard'"),
        ("stages=[{step=2,env.weight=1}]", r"changes \[env\], but the recipe has \[envs.NAME\]"),
        ("stages=[{step=2,rollout=2}]", r"rollout=2 must be Mapping"),
        ("stages=[{step=2,envs.easy=2}]", r"envs.easy=2 is no section"),
        ("stages=[{step=2,rollout.group_size=1}]", r"stages\[0\] \(step 2\): rollout.group_size=1 is too small"),
        ("stages.0.step=4", r"there is no '0' among 0"),
    ],
)
def test_mistakes_are_one_line(tmp_path, override, said):
    text = MIXED.replace("[envs.easy]", "stages = []\n[envs.easy]", 1)
    if said is None:
        assert recipe(tmp_path, text, override).envs
        return
    with pytest.raises(ValueError, match=said) as error:
        recipe(tmp_path, text, override)
    assert "\n" not in str(error.value)


def test_rates_that_can_not_be_read_or_leave_nothing(tmp_path):
    rates, tasks = tmp_path / "rates.jsonl", tmp_path / "tasks"
    save_tasks([repairs.task("train", i) for i in range(2)], tasks)
    text = MIXED + f'[[stages]]\nstep = 2\nenvs.hard = {{ window = [0.1, 0.7], rates = "{rates}" }}\n'
    config = recipe(tmp_path, text, f'envs.hard.kwargs.tasks="{tasks}"')
    with pytest.raises(ValueError, match="no such file; make it with `python -m rl rates`"):
        curriculum(config)
    rates.write_text('{"index": 1}\n')
    with pytest.raises(ValueError, match="a line is not"):
        curriculum(config)
    rates.write_text("".join(json.dumps({"index": i, "solved": 8 * (i % 2), "graded": 8}) + "\n" for i in (4, 7)))
    with pytest.raises(ValueError, match=r"zero tasks of hard left after filters: .* has none of its 2 tasks within"):
        curriculum(config)
    rates.write_text(json.dumps({"index": 7, "solved": 4, "graded": 8}) + "\n")
    assert curriculum(config).sizes == {(1, "hard"): 2} and read_rates("") == []
