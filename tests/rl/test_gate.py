"""The gate before a real engine: a KV budget smaller than what its episodes hold changes when they run, not what they say."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from envs.errors import InfraError
from policy import models
from policy.completion import Completion, Sampling
from policy.models import ModelConfig
from policy.torch_engine import EngineConfig, TorchEngine
from rl.admission import Budget
from rl.gate import Gate

SMALL = ModelConfig(vocab_size=32, hidden_size=16, layers=1, heads=2, kv_heads=1, intermediate_size=16, max_context=64)
CONTEXT = 64
SEEN: list[tuple[Gate, float]] = []


@pytest.fixture
def small() -> Iterator[Callable[..., Gate]]:
    """Gates before engines of one model; the budget is what the engine's memory holds, in slots, or what is given."""
    made = []

    def make(slots: int, budget: Budget | None = None) -> Gate:
        engine = TorchEngine(models.build(SMALL, 0), EngineConfig(slots=slots, max_context=CONTEXT))
        made.append(Gate(engine, budget or Budget(slots * CONTEXT, page=CONTEXT)))
        return made[-1]

    yield make
    for gate in made:
        gate.close()
        gate.engine.close()


def play(gate: Gate, name: str) -> list[int]:
    """Three turns, with a moment between them; returns all tokens. What the engine held meanwhile goes to `SEEN`."""
    ids = [1, 2, 3, 4 + int(name) % 20]
    for turn in range(3):
        answer = gate.generate(ids, Sampling(max_tokens=4, seed=int(name) * 10 + turn), name)
        ids = [*ids, *answer.token_ids, 5, 6]
        SEEN.append((gate, gate.engine.stats()["kv_tokens"]))
        time.sleep(0.002)
    gate.release(name)
    return ids


def test_parked_episodes_go_on_and_say_the_same(small: Callable[..., Gate]) -> None:
    tight, wide, names = small(5, Budget(48)), small(5), [str(n) for n in range(5)]  # 22 tokens an episode
    with ThreadPoolExecutor(5) as pool:
        said = list(pool.map(lambda name: play(tight, name), names, timeout=120))
    assert said == [play(wide, name) for name in names]
    assert tight.parked > 0 and wide.parked == 0
    assert 22 < max(tokens for gate, tokens in SEEN if gate is tight) <= 48
    assert tight.budget.used == tight.budget.waiting == 0


def test_an_engine_of_few_slots_never_has_to_choose(small: Callable[..., Gate]) -> None:
    gate = small(2)
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(lambda name: play(gate, name), [str(n) for n in range(5)], timeout=120))
    assert gate.engine.stats()["evictions"] == 0


def test_a_turn_waits_for_the_end_of_an_older_episode(small: Callable[..., Gate]) -> None:
    gate, ask = small(2), Sampling(max_tokens=2, seed=0)
    gate.generate([1, 2], ask, "a")
    said = gate.generate([3, 4], ask, "b").token_ids
    with ThreadPoolExecutor(1) as pool:
        asked = time.monotonic()
        waits = pool.submit(gate.generate, [7, 8], ask, "c")
        until(lambda: gate.budget.waiting == 1)
        time.sleep(0.1)
        assert gate.load() == 1.0 and not waits.done()
        gate.generate([3, 4, *said, 5], ask, "b")
        assert gate.engine.stats()["reused_tokens"] == 3, "b's KV was not kept between its turns"
        assert not waits.done()
        gate.release("a")
        answer = waits.result(60)
        assert answer.finish == "length" and gate.load() == 0.0
        assert 0.1 <= answer.queued <= time.monotonic() - asked, "all of it waited for its turn"


def test_a_cancelled_episode_gets_no_turn(small: Callable[..., Gate]) -> None:
    gate = small(1)
    ask = Sampling(max_tokens=2, seed=0)
    gate.generate([1, 2], ask, "a")
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(gate.generate, [1, 2], ask, "b")
        until(lambda: gate.budget.waiting == 1)
        gate.cancel("b")
        with pytest.raises(InfraError, match="episode b was cancelled"):
            waits.result(60)
        with pytest.raises(InfraError, match="episode b was cancelled"):
            gate.generate([1, 2], ask, "b")
        long = pool.submit(gate.generate, [1, 2], Sampling(max_tokens=60, seed=0), "a")
        until(lambda: bool(gate.engine.stats()["running"]) or long.done())
        gate.cancel("a")
        answer: Completion = long.result(60)
        assert answer.finish in ("cancelled", "length") and gate.budget.used == 0
    assert gate.generate([1, 2], ask, "c").finish == "length"


def test_who_waits_too_long_or_for_a_closed_engine_is_told(small: Callable[..., Gate]) -> None:
    gate, ask = small(1), Sampling(max_tokens=2, seed=0)
    gate.generate([1, 2], ask, "a")
    patient = gate.engine.config
    gate.engine.config = replace(patient, deadline_s=0.05)
    with pytest.raises(InfraError, match=r"^no place in the KV budget within 0.05 seconds; raise [^\n]*$"):
        gate.generate([1, 2], ask, "b")
    assert gate.budget.waiting == 0
    gate.engine.config = patient
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(gate.generate, [1, 2], ask, "b")
        until(lambda: gate.budget.waiting == 1)
        gate.close()
        with pytest.raises(InfraError, match="waits for an engine that is closed"):
            waits.result(60)


def until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit, "nothing came of it"
        time.sleep(0.001)
