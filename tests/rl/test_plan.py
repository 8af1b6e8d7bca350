"""The planner: simulated runs whose seconds can be worked out by hand, the bounds that every run keeps, and the command."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from agents.trajectory import Segment, Trajectory
from rl import __main__ as command
from rl import plan, train
from rl.admission import Budget
from rl.clock import Clock
from rl.config import ROOT, Config, load
from rl.latencies import Book, Latencies, Played, Turn, Workload, book_of, from_run, line, mean_context
from rl.plan import Forecast, simulate
from rl.virtual import Asked, Replica

RECIPE = str(ROOT / "rl/recipes/tiny.toml")
SLOW = Latencies(decode=0.1, prefill=0.01, learn=0.1, publish=0.4, swap=0.1)
WORTH = (1.0, 0.0)


def config(*more: str) -> Config:
    """One episode at a time, two of them a group and a batch."""
    small = [
        "rollout.spawn=threads",
        "rollout.group_size=2",
        "learn.groups_per_step=1",
        "learn.max_staleness=0",
        "eval.every=0",
        "steps=8",
    ]
    return load(RECIPE, [*small, *more])


def book(*turns: Turn, boot: float = 1.0) -> Book:
    return [[Played(boot=boot, turns=turns, reward=reward) for reward in WORTH]]


ONE = book(Turn(10, 5, 2.0))  # 1 s of boot, 0.1 of prefill, 0.5 of decoding, 2 of tools: 3.6 s


def test_one_episode_at_a_time_without_overlap() -> None:
    """Two episodes, 2 x 15 tokens learnt at 0.1 s, a publish, a swap: 7.2 + 3 + 0.4 + 0.1."""
    found = simulate(config(), SLOW, ONE)
    assert found.step_seconds == pytest.approx(10.7)
    assert (found.staleness_max, found.steps, found.kept) == (0, 8, 1.0)
    assert found.busy["engine"] == pytest.approx((1.2 + 0.1) / 10.7)
    assert found.busy["learner"] == pytest.approx(3.4 / 10.7)
    assert found.busy["episodes"] == pytest.approx(6.0 / 10.7)
    assert found.bottleneck.startswith("bottleneck: episodes")


def test_two_at_a_time_share_the_engine() -> None:
    """Both prompts are prefilled one after the other, 0.2 s; then both decode at 0.1 + 2 x 0.05 s a token, 1 s."""
    found = simulate(config("rollout.workers=2"), replace(SLOW, decode_row=0.05), ONE)
    assert found.step_seconds == pytest.approx(1 + 0.2 + 1 + 2 + 3.5)


def test_overlap_takes_what_is_longer() -> None:
    """With one version of slack the episodes of the next batch are played while the learner has this one."""
    overlap, quick = config("learn.max_staleness=1"), replace(SLOW, swap=0.0)
    assert simulate(overlap, quick, ONE).step_seconds == pytest.approx(7.2)
    found = simulate(overlap, replace(quick, learn=1.0), ONE)
    assert found.step_seconds == pytest.approx(30.4)
    assert found.bottleneck.startswith("bottleneck: learner, busy 9")


def test_the_bottleneck_follows_the_latencies() -> None:
    wide = config("rollout.workers=8", "learn.max_staleness=2")
    quick = replace(SLOW, learn=0.001, decode=0.001, prefill=0.0, publish=0.0, swap=0.0)
    names = [
        simulate(wide, latencies, ONE).bottleneck.split(",")[0]
        for latencies in (quick, replace(quick, learn=1.0), replace(quick, decode=1.0))
    ]
    assert names == ["bottleneck: episodes", "bottleneck: learner", "bottleneck: engine"]


def test_the_most_that_overlap_can_give_on_a_shared_device() -> None:
    """`S_max = f/u + 1 - f`: f is the rollouts' share of the ideal time, u how busy the device is in them.

    On one device (cores = 1) a batch of eight episodes decodes 8 x 4 turns of 5 tokens, one row a step: 16 s at 0.1. Tools
    sleep, so the rollout of a synchronous step takes longer, and training 8 s more.
    """
    turns = [Turn(1, 5, 3.0)] * 4
    device = Latencies(decode=0.0, decode_row=0.1, learn=8 / (8 * 24), cores=1.0)
    shared = ["rollout.workers=8", "rollout.group_size=8", "steps=24"]
    sync = simulate(config(*shared), device, book(*turns)).step_seconds
    both = simulate(config(*shared, "learn.max_staleness=8", "rollout.workers=32"), device, book(*turns)).step_seconds
    f, u = 16 / 24, 16 / (sync - 8)
    assert u < 0.7
    assert both == pytest.approx(24, rel=0.02), "the device is never idle"
    assert sync / both == pytest.approx(f / u + 1 - f, rel=0.02)


@pytest.mark.parametrize("stale", ["wait", "drop"])
@pytest.mark.parametrize("bound", [0, 1, 3])
def test_no_forecast_is_staler_than_the_bound(stale: str, bound: int) -> None:
    rng = random.Random(bound)
    for _ in range(3):
        latencies = Latencies(decode=rng.random() / 50, decode_row=rng.random() / 500, prefill=rng.random() / 1e4, learn=rng.random() / 1e4, publish=rng.random(), swap=rng.random() / 9)  # fmt: skip
        played = Workload(turns=5, tool_seconds=rng.random() * 3, spread=1.0).within(768, 72).book(768)
        chosen = config(f"learn.stale={stale}", f"learn.max_staleness={bound}", "rollout.workers=24", "learn.groups_per_step=3", "steps=12")  # fmt: skip
        found = simulate(chosen, latencies, played)
        assert 0 <= found.staleness_mean <= found.staleness_max <= bound
        assert found == simulate(chosen, latencies, played), "equal inputs give equal forecasts"


def test_a_kv_budget_of_one_episode_makes_them_go_one_by_one() -> None:
    """Eight in flight, room for one: the others boot and wait. 0.6 s of engine and 2 s of tools each, 16 tokens held."""
    eight = config("rollout.workers=8", "policy.max_tokens=5")
    wide, tight = (simulate(eight, SLOW, ONE, kv_tokens=kv).step_seconds for kv in (1e9, 20))
    assert wide == pytest.approx(1 + 0.2 + 0.5 + 2 + 3.5)
    assert tight == pytest.approx(1 + 2 * 2.6 + 3.5)


def test_parked_episodes_are_prefilled_again() -> None:
    """Two episodes of 30 tokens, KV for 40: as the older one's second turn wants 15 more, the younger, at its tools, is parked.
    It waits for the older one's end at 4.3 s, reads 25 tokens instead of 10, and ends at 4.3 + 0.25 + 0.5 + 1; 6 s of learning
    and a publish of 0.5 follow."""
    two = config("rollout.workers=2", "policy.max_tokens=5")
    played = book(Turn(10, 5, 1.0), Turn(10, 5, 1.0))
    wide, tight = (simulate(two, SLOW, played, kv_tokens=kv).step_seconds for kv in (1e9, 40))
    assert wide == pytest.approx(1 + 2 * (0.2 + 0.5 + 1) + 6.5)
    assert tight == pytest.approx(6.05 + 6.5)


def test_the_age_of_a_turn_is_that_of_its_first_token() -> None:
    """Episodes of 10 s, 11 s of learning, one version of slack: a group takes 20 s, and its second half is under way when
    the batch before is published. So every batch but the first has tokens one version old in each episode."""
    row = Latencies(decode=1.0, learn=0.5)
    found = simulate(config("learn.max_staleness=1"), row, book(Turn(1, 10, 0.0), boot=0.0))
    assert (found.step_seconds, found.staleness_mean) == (pytest.approx(20.0), pytest.approx(7 / 8))


def test_a_turn_under_way_goes_on_with_new_weights() -> None:
    clock, told = Clock(), list[int]()
    replica = Replica(clock, Latencies(decode=1.0, learn=1.0), Budget(100), 10)
    replica.ask(Asked("a", 1, 10, told.extend))
    clock.wait(4.0, lambda: replica.chore(0.5, lambda: replica.swap(3)))
    while clock.advance():
        pass
    assert told == [0, 3] and clock.now == pytest.approx(10.5)
    assert replica.ledger.snapshot() == pytest.approx({"idle": 0.0, "prefill": 0.0, "decode": 10.0, "swap": 0.5})


def test_two_replicas_halve_what_the_engine_takes() -> None:
    many = config("rollout.workers=16", "rollout.group_size=16")
    row = Latencies(decode=0.0, decode_row=0.1, learn=1e-9)
    one, two = (simulate(many, row, book(Turn(1, 10, 0.0)), replicas=n).step_seconds for n in (1, 2))
    assert one == pytest.approx(17.0) and two == pytest.approx(9.0)  # 16 or 8 rows x 10 tokens x 0.1, and 1 s of boot


def test_computing_parts_share_the_cores() -> None:
    clock, done = Clock(cores=1.0), []
    clock.computing = 2
    clock.work(1.0, lambda: done.append(clock.now))
    clock.wait(0.5, lambda: done.append(clock.now))
    while clock.advance(10.0):
        pass
    assert done == [0.5, 2.0] and (clock.now, clock.worked) == (10.0, 5.0)


def test_an_episode_past_its_deadline_is_said() -> None:
    """A real worker would be killed for it."""
    ray = config("rollout.spawn=ray", "rollout.deadline=100")
    with pytest.raises(ValueError, match="an episode takes more than rollout.deadline=100 seconds; raise it"):
        simulate(ray, SLOW, book(Turn(10, 5, 200.0)))


def test_a_line_through_what_was_measured() -> None:
    assert line([(1.0, 3.0, 5.0), (4.0, 9.0, 1.0)]) == pytest.approx((1.0, 2.0))
    assert line([(2.0, 4.0, 1.0)]) == (4.0, 0.0)
    assert line([(1.0, 5.0, 1.0), (3.0, 1.0, 1.0)]) == (3.0, 0.0), "no row makes a step faster"


def a_run(directory: Path) -> Path:
    """A record as a run leaves it: two steps of one group of two episodes."""
    steps = [{"kind": "step", "step": n, "tokens": 40, "train_seconds": 2.0} for n in (1, 2)]
    end = {
        "kind": "end",
        "ledgers": {
            "engine": {"prefill": 3.0, "decode": 9.0, "swap": 0.4, "score": 0.2, "idle": 5.0},
            "learner": {"train": 4.0, "publish": 0.6, "idle": 9.0},
        },
        "counts": {"prefilled_tokens": 20, "shared_tokens": 10, "swaps": 2},
        "paces": [[1, 10, 2.0], [3, 10, 4.0]],
    }
    (directory / "trajectories").mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*steps, end]))
    segment = Segment([1] * 9, [0, 0, 1, 1, 1, 0, 0, 0, 1], [0.0] * 9, [-1, -1, 0, 0, 0, -1, -1, -1, 0])
    info = {"boot_seconds": 0.5, "tool_seconds": [0.25, 0.75]}
    lines = [Trajectory("t", n, [segment], reward=float(n), turns=2, info=info).to_json() + "\n" for n in (0, 1)]
    for step in (1, 2):
        (directory / "trajectories" / f"step-{step:06d}.jsonl").write_text("".join(lines))
    return directory


def test_latencies_and_episodes_of_a_run(tmp_path: Path) -> None:
    latencies, found = from_run(a_run(tmp_path / "run"))
    # 0.2 s at one row and 0.4 at three; 3 s for 30 tokens; 0.6 s for 2 swaps; 4 s for 80 tokens; 0.6 s for 2 publishes
    assert latencies == Latencies(decode=pytest.approx(0.1), decode_row=pytest.approx(0.1), prefill=0.1, swap=pytest.approx(0.3), learn=0.05, publish=0.3)  # fmt: skip
    turns = (Turn(2, 3, 0.25), Turn(3, 1, 0.75))
    assert found == [[Played(boot=0.5, turns=turns, reward=n) for n in (0.0, 1.0)]] * 2
    assert mean_context(found) == pytest.approx((3 * 3.5 + 8.5) / 4)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no finished run at"):
        from_run(tmp_path / "empty")
    with pytest.raises(ValueError, match="no trajectories at"):
        book_of(tmp_path / "empty")


SPLIT = ("--learn.dtype=bf16", "--learn.device=cuda", "--learn.ranks=4", "--learn.sequence_parallel=4")


def run(*argv: str) -> dict:
    """The command's JSON."""
    at = argv.index("--json") + 1
    assert command.main(["plan", *argv]) == 0
    return json.loads(Path(argv[at]).read_text())


def test_the_command_plans_a_recipe_from_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "plan.json")
    found = run(RECIPE, "--from", str(a_run(tmp_path / "run")), "--json", out, "--learn.max_staleness=1", "--steps=6")
    text = capsys.readouterr().out
    assert "bottleneck: " in text and "96 episodes of 768 tokens" in text and str(tmp_path / "run") in text
    assert found["forecast"]["staleness_max"] <= 1 and found["placement"]["gpus"] == 0


def test_the_command_places_the_target_on_gpus(tmp_path: Path) -> None:
    """32 k tokens, four ranks a sequence: engines of two GPUs hold a group of eight, and the fastest split is taken, not the first
    that fits."""
    fields = ["--policy.max_context=32768", "--learn.max_tokens=32768", "--policy.max_tokens=2048", "--rollout.episodes=64", "--learn.groups_per_step=4", "--steps=4", "--eval.every=0"]  # fmt: skip
    reads = ["--turn-tokens", "40", "--seen-tokens", "2000"]  # much is learnt of little that is sampled
    found = run(RECIPE, "--model", "cwm-32b", "--gpus", "64", *reads, "--json", str(tmp_path / "p"), *fields, *SPLIT, "--learn.checkpoint_activations=true")  # fmt: skip
    at = found["placement"]
    assert at["tensor_parallel"] == 2 and at["engine"]["episodes"] == 19  # 2 x 69 - 65.2 = 72.8 GB, 3.76 each
    assert at["gpus"] <= 64 and [other["ranks"] for other in found["others"]] == [16, 32]
    assert at["layout"]["ranks"] == 32
    assert found["forecast"]["step_seconds"] == min(other["step_seconds"] for other in found["others"])


@pytest.mark.parametrize(("name", "gpus"), [("swe_grpo_32b", 64), ("swe_grpo_8b_1node", 8)])
def test_recipes_for_gpus_place_themselves(
    name: str, gpus: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the longest contexts that they allow; large models are shown beside published runs."""
    few = ["--steps=2", "--learn.groups_per_step=2", "--rollout.workers=1"]
    found = run(f"rl/recipes/{name}.toml", "--json", str(tmp_path / "p"), *few)
    assert found["placement"]["gpus"] == gpus and found["placement"]["engine"]["episodes"] >= 8
    assert ("s a step: DeepSWE (rLLM), Qwen3-32B on 64 H100" in capsys.readouterr().out) == (name == "swe_grpo_32b")
    with pytest.raises(ValueError, match="learn.max_tokens=.* activations"):
        run(f"rl/recipes/{name}.toml", "--json", str(tmp_path / "p"), *few, "--learn.checkpoint_activations=false")


def test_a_card_that_is_shared_is_one_card(tmp_path: Path) -> None:
    found = run(
        "rl/recipes/gpu1.toml", "--model", "cwm-1b", "--device", "h200", "--json", str(tmp_path / "p"), "--steps=2"
    )
    at = found["placement"]
    assert at["gpus"] == 1 and at["engine"]["kv"] == int(0.3 * 141e9 - 3e9) - 2 * 1_431_373_824
    with pytest.raises(ValueError, match="a rank has 21.1 GB"):  # 0.95 - 0.8 of 141 GB
        run("rl/recipes/gpu1.toml", "--model", "cwm-1b", "--device", "h200", "--json", str(tmp_path / "p"), "--policy.vllm.gpu_memory_utilization=0.8")  # fmt: skip


def test_a_context_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^learn.max_tokens=131072 needs .* GB of activations") as error:
        command.main(["plan", RECIPE, "--model", "cwm-32b", "--gpus", "64", "--policy.max_context=131072", "--learn.max_tokens=131072", "--learn.dtype=bf16", "--learn.checkpoint_activations=true"])  # fmt: skip
    assert "set learn.sequence_parallel above 1" in str(error.value)
    with pytest.raises(ValueError, match="gpus=2 is too few: an engine takes 2, the learner 1; give at least 3"):
        command.main(["plan", RECIPE, "--model", "cwm-32b", "--gpus", "2", "--policy.max_context=32768", "--learn.max_tokens=32768"])  # fmt: skip
    with pytest.raises(ValueError, match="argument '--learn' is not understood"):
        command.main(["plan", RECIPE, "--learn"])


def test_a_dry_run_shows_the_recipe_and_its_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([RECIPE, "--dry-run", "--steps=3", "--learn.groups_per_step=2"]) == 0
    text = capsys.readouterr().out
    assert "groups_per_step = 2" in text and "CPUs: engines x 1, learner ranks x 1" in text and "bottleneck: " in text


def test_forecasts_are_plain_numbers() -> None:
    assert isinstance(simulate(config(), SLOW, ONE), Forecast) and plan.step_seconds([1.0, 3.0, 8.0]) == 3.5
