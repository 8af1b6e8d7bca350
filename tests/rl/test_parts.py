"""Parts that don't start are reported, not waited for."""

import os
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from envs.errors import InfraError
from rl import spawn
from rl.config import ROOT, load
from rl.parts import await_start, place_of
from rl.spawn import JointHandle, Place


def part(name: str, answer: Future[Any]) -> Any:
    return SimpleNamespace(name=name, call=lambda method: answer)


def test_a_part_that_does_not_start_is_named():
    ready: Future[Any] = Future()
    ready.set_result({})
    with pytest.raises(InfraError, match=r"^worker-1 did not start within 0\.1 seconds; [^\n]*$"):
        await_start((part("worker-0", ready), part("worker-1", Future())), deadline=0.1)


def test_what_a_constructor_raised_passes_through():
    broken: Future[Any] = Future()
    broken.set_exception(ValueError("no such model"))
    with pytest.raises(ValueError, match="no such model"):
        await_start((part("engine", broken),))


class Rank:
    """A handle whose call ends as it is told: in an answer, an exception, or never (None)."""

    def __init__(self, name: str, end: object):
        self.name, self.end, self.killed = name, end, False

    def call(self, method: str, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        if isinstance(self.end, BaseException):
            future.set_exception(self.end)
        elif self.end is not None:
            future.set_result((self.end, method, args))
        return future

    def kill(self) -> None:
        self.killed = True


def test_ranks_answer_as_the_first():
    ranks = [Rank("learner-0", "a"), Rank("learner-1", "b")]
    assert JointHandle("learner", ranks).ask("step", 1, 2, timeout=10) == ("a", "step", (1, 2))
    assert not any(r.killed for r in ranks)


DEAD, SAID = (
    InfraError("learner-1 is gone or late: ActorDiedError"),
    RuntimeError("collective\nConnection closed by peer"),
)


@pytest.mark.parametrize(
    ("ends", "kind", "message"),
    [
        ((SAID, DEAD), InfraError, "^learner-1 is gone or late: ActorDiedError$"),
        ((None, DEAD), InfraError, "^learner-1 is gone or late: ActorDiedError$"),
        (("a", SAID), RuntimeError, "Connection closed by peer$"),
        ((SAID, None), InfraError, "^learner-1 did not answer within 0.05 seconds after learner-0 failed: Connection closed by peer$"),
        ((ValueError("max_tokens=5"), ValueError("max_tokens=5")), ValueError, "^max_tokens=5$"),
    ],
)  # fmt: skip
def test_when_one_rank_fails_all_end_and_the_cause_is_told(monkeypatch, ends, kind, message):
    monkeypatch.setattr(spawn, "GRACE", 0.05)
    ranks = [Rank(f"learner-{i}", end) for i, end in enumerate(ends)]
    with pytest.raises(kind, match=message):
        JointHandle("learner", ranks).ask("step", timeout=10)
    assert all(r.killed for r in ranks)


def test_a_late_answer_of_ranks_is_an_infra_error():
    with pytest.raises(InfraError, match="^learner did not answer 'save' within 0.05 seconds$"):
        JointHandle("learner", [Rank("learner-0", None)]).ask("save", timeout=0.05)


@pytest.mark.parametrize(
    ("recipe", "address", "engine", "learner", "sandbox"),
    [
        ("tiny", "", Place(), Place(), Place()),
        ("tiny", "auto", Place(resource="engine"), Place(resource="learner"), Place(resource="sandbox")),
        ("swe_grpo_8b_1node", "", Place(gpus=1), Place(gpus=1), Place()),
        ("swe_grpo_32b", "auto", Place(gpus=8), Place(gpus=1), Place(resource="sandbox")),
        ("gpu1", "", Place(gpus=0.5), Place(gpus=0.5), Place()),
    ],
)
def test_parts_take_gpus_or_nodes(recipe, address, engine, learner, sandbox):
    config = load(ROOT / f"rl/recipes/{recipe}.toml", [f"rollout.address={address}"] if address else [])
    assert [place_of(config, part) for part in ("engine", "learner", "sandbox")] == [engine, learner, sandbox]


class Eyes:
    """What a part sees of GPUs."""

    def cards(self) -> str:
        return os.environ.get("CUDA_VISIBLE_DEVICES", "")


@pytest.mark.slow
def test_ray_gives_each_part_its_own_cards():
    """With cards that Ray believes in."""
    import ray

    ray.init(address="local", num_gpus=4, num_cpus=1, include_dashboard=False, logging_level="ERROR")
    try:
        parts = [spawn.spawn(Eyes, mode="ray", name="x", place=Place(gpus=n)) for n in (2, 1, 0.5, 0.5)]
        whole, own, *shared = [part.ask("cards", timeout=60).split(",") for part in parts]
        assert len(whole) == 2 and shared[0] == shared[1] and sorted(whole + own + shared[0]) == list("0123")
    finally:
        ray.shutdown()
