"""The embedded engine against `transformers`: the same models, another implementation."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CwmConfig, CwmForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from envs.errors import InfraError
from policy import models
from policy.completion import Completion, Sampling, digest
from policy.decoder import Decoder, draw
from policy.models import ModelConfig
from policy.slots import common
from policy.torch_engine import EngineConfig, TorchEngine
from policy.weights import checksum, state_of

VOCAB = 96
CONFIG = ModelConfig(
    vocab_size=VOCAB, hidden_size=48, layers=3, heads=4, kv_heads=2, intermediate_size=64, max_context=256
)
CLOSE = 1e-5


def sharp(seed: int) -> CwmForCausalLM:
    """A random model whose distributions are far from flat, so that wrong weights, masks or positions show."""
    model = models.build(CONFIG, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    return model


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def old() -> CwmForCausalLM:
    return sharp(0)


@pytest.fixture(scope="module")
def new() -> CwmForCausalLM:
    return sharp(1)


@pytest.fixture
def engine(old: CwmForCausalLM) -> Iterator[TorchEngine]:
    with TorchEngine(old, EngineConfig(slots=16, max_context=256, deadline_s=60)) as engine:
        yield engine


def ids_of(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, count).tolist()


@torch.no_grad()
def reference(model: CwmForCausalLM, ids: Sequence[int], temperature: float = 1.0) -> list[float]:
    """Log-probabilities of all tokens by one plain forward pass of `transformers`; 0.0 for the first."""
    tokens = torch.tensor([list(ids)])
    logprobs = (model(tokens).logits[0, :-1] / temperature).log_softmax(-1)
    return [0.0, *logprobs.gather(1, tokens[0, 1:, None])[:, 0].tolist()]


def apart(left: Sequence[float], right: Sequence[float]) -> float:
    assert len(left) == len(right)
    return max((abs(a - b) for a, b in zip(left, right, strict=True)), default=0.0)


def check(model: CwmForCausalLM, prompt: list[int], completion: Completion) -> None:
    """The completion has the log-probs that `transformers` gives it after this very prompt."""
    assert completion.prompt_digest == digest(prompt)
    expected = reference(model, prompt + completion.token_ids)[len(prompt) :]
    assert apart(completion.logprobs, expected) <= CLOSE


def together(*calls: Callable[[], None]) -> None:
    """Run calls in threads at once; the first failure is raised here."""
    errors: list[BaseException] = []

    def guarded(call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a caller hangs"
    if errors:
        raise errors[0]


def until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < limit, "it did not come to pass in 30 s"
        time.sleep(0.001)


def play(engine: TorchEngine, model: CwmForCausalLM, seed: int, turns: int = 3, episode: str | None = None) -> None:
    """One episode of several turns with observations between them, each checked."""
    ids, name = ids_of(seed, 5 + seed % 37), episode or f"episode-{seed}"
    for turn in range(turns):
        completion = engine.generate(ids, Sampling(max_tokens=4 + (seed + turn) % 11, seed=seed * 100 + turn), name)
        check(model, ids, completion)
        ids = ids + completion.token_ids + ids_of(seed * 10 + turn, 1 + (seed * 7 + turn) % 13)
    engine.release(name)


def test_greedy_tokens_are_those_of_hf_generate(engine: TorchEngine, old: CwmForCausalLM) -> None:
    prompts = [ids_of(i, n) for i, n in enumerate((1, 2, 17, 64, 65, 130))]
    answers: dict[int, Completion] = {}

    def ask(i: int) -> Callable[[], None]:
        sampling = Sampling(temperature=0, max_tokens=40)
        return lambda: answers.update({i: engine.generate(prompts[i], sampling, f"e{i}")})

    together(*(ask(i) for i in range(len(prompts))))
    for i, prompt in enumerate(prompts):
        tokens = torch.tensor([prompt])
        # An eos that can't be sampled, or generate would stop early.
        out = old.generate(tokens, do_sample=False, max_new_tokens=40, eos_token_id=VOCAB, pad_token_id=VOCAB)
        assert answers[i].token_ids == out[0, len(prompt) :].tolist()
        check(old, prompt, answers[i])


def test_episodes_of_several_turns_are_exact_in_ragged_batches(engine: TorchEngine, old: CwmForCausalLM) -> None:
    together(*(lambda i=i: play(engine, old, i) for i in range(16)))  # type: ignore[misc]
    stats = engine.stats()
    assert stats["reused_tokens"] > 0 and stats["evictions"] == 0
    until(lambda: engine.stats()["episodes"] == 0)


def test_48_threads_at_once(old: CwmForCausalLM) -> None:
    with TorchEngine(old, EngineConfig(slots=48, max_context=256)) as engine:
        together(*(lambda i=i: play(engine, old, i, turns=2) for i in range(48)))  # type: ignore[misc]
        stats = engine.stats()
    assert stats["completions"] == 96
    assert stats["steps"] < stats["decoded_tokens"] / 4, "the rows were hardly batched"


def test_more_episodes_than_slots_wait_or_evict_and_stay_exact(old: CwmForCausalLM) -> None:
    with TorchEngine(old, EngineConfig(slots=3, max_context=256, prefill_tokens=20)) as engine:
        together(*(lambda i=i: play(engine, old, i) for i in range(10)))  # type: ignore[misc]
        assert engine.stats()["completions"] == 30
        # One after the other: six episodes take turns in three slots.
        held = {f"t{i}": ids_of(i, 20 + i) for i in range(6)}
        for turn in range(3):
            for name, ids in held.items():
                completion = engine.generate(ids, Sampling(max_tokens=5, seed=turn), name)
                check(old, ids, completion)
                held[name] = ids + completion.token_ids + [turn]
        stats = engine.stats()
    assert stats["evictions"] >= 15 and stats["episodes"] == 3


def test_a_completion_says_how_long_it_had_no_slot(old: CwmForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    real, held, said = Decoder.step, [False], {}

    def slow(*args: Any) -> Any:
        if not held[0]:  # until the second waits; then for 0.2 s more
            held[0] = engine.stats()["waiting"] == 1
            time.sleep(0.2 if held[0] else 0.05)
        return real(*args)

    def ask(name: str, tokens: int) -> None:
        said[name] = engine.generate(ids_of(1, 9), Sampling(max_tokens=tokens, seed=0), name)

    def second() -> None:
        until(lambda: engine.stats()["running"] == 1)
        ask("second", 1)

    monkeypatch.setattr(Decoder, "step", slow)
    with TorchEngine(old, EngineConfig(slots=1, max_context=256)) as engine:
        began = time.perf_counter()
        together(lambda: ask("first", 40), second)
    assert held[0] and 0.2 <= said["second"].queued <= time.perf_counter() - began


def test_the_least_recently_used_idle_episode_is_evicted(old: CwmForCausalLM) -> None:
    with TorchEngine(old, EngineConfig(slots=2, max_context=256)) as engine:
        prompts = {name: ids_of(i, 30) for i, name in enumerate("abc")}
        for name in "aba":
            prompts[name] += engine.generate(prompts[name], Sampling(max_tokens=3), name).token_ids
        engine.generate(prompts["c"], Sampling(max_tokens=3), "c")  # takes b's slot
        before = engine.stats()["reused_tokens"]
        engine.generate(prompts["a"], Sampling(max_tokens=3), "a")
        assert engine.stats()["reused_tokens"] - before == len(prompts["a"]) - 1


def test_a_prompt_that_does_not_extend_the_kept_one_is_exact(engine: TorchEngine, old: CwmForCausalLM) -> None:
    ids = ids_of(5, 40)
    first = engine.generate(ids, Sampling(max_tokens=10, seed=1), "e")
    check(old, ids, first)
    for changed in (ids[:25] + ids_of(6, 9), ids[:10], ids[:10], ids, [ids[0] ^ 1, *ids[1:]]):
        check(old, changed, engine.generate(changed, Sampling(max_tokens=10, seed=1), "e"))


def test_equal_prompts_share_their_prefill(engine: TorchEngine, old: CwmForCausalLM, new: CwmForCausalLM) -> None:
    prompt = ids_of(7, 50)

    def ask(i: int) -> Callable[[], None]:
        def call() -> None:
            check(old, prompt, engine.generate(prompt, Sampling(max_tokens=12, seed=i), f"g{i}"))

        return call

    # Hold the engine until all have arrived: they are then admitted at once, the source not yet prefilled.
    held, gate = threading.Event(), threading.Event()
    engine._inbox.post(Future(), lambda: (held.set(), gate.wait(20)))
    assert held.wait(20)

    def release() -> None:
        until(lambda: len(engine._inbox._commands) == 9)
        gate.set()

    together(*(ask(i) for i in range(8)), release)
    stats = engine.stats()
    assert stats["shared_tokens"] == 7 * 49 and stats["prefilled_tokens"] == 50 + 7
    engine.publish(1, state_of(new))
    # The kept KV is the old version's: a new episode must not copy it.
    check(new, prompt, engine.generate(prompt, Sampling(max_tokens=12, seed=1), "later"))
    assert engine.stats()["shared_tokens"] == stats["shared_tokens"]


@torch.no_grad()
def replay(by_version: dict[int, CwmForCausalLM], first: int, prompt: list[int], c: Completion) -> list[float]:
    """Log-probs under mixed KV, independently: `transformers` feeds one token at a time into its own cache.

    The prompt but its last token is fed by version `first`; each later token by the version that samples after it.
    """
    cache = DynamicCache()
    if len(prompt) > 1:
        by_version[first](torch.tensor([prompt[:-1]]), past_key_values=cache)
    logprobs = []
    for fed, token, version in zip([prompt[-1], *c.token_ids], c.token_ids, c.versions, strict=False):
        logits = by_version[version](torch.tensor([[fed]]), past_key_values=cache).logits[0, -1]
        logprobs.append(float(logits.log_softmax(-1)[token]))
    return logprobs


def generate_through_a_swap(
    engine: TorchEngine, prompts: list[list[int]], swap: Callable[[], None]
) -> list[Completion]:
    """Long completions of all prompts, with `swap` called while they run."""
    answers: dict[int, Completion] = {}
    calls = [
        lambda i=i, p=p: answers.update({i: engine.generate(p, Sampling(max_tokens=150, seed=i), f"e{i}")})
        for i, p in enumerate(prompts)
    ]
    start = engine.stats()["steps"]

    def meanwhile() -> None:
        until(lambda: engine.stats()["steps"] > start + 20 and engine.stats()["running"] == len(prompts))
        swap()

    together(*calls, meanwhile)  # type: ignore[arg-type]
    return [answers[i] for i in range(len(prompts))]


def test_a_swap_in_flight_keeps_the_kv(engine: TorchEngine, old: CwmForCausalLM, new: CwmForCausalLM) -> None:
    prompts = [ids_of(i, n) for i, n in enumerate((1, 9, 66))]
    completions = generate_through_a_swap(engine, prompts, lambda: engine.publish(1, state_of(new)))
    assert engine.version == 1 and engine.stats()["swaps_in_flight"] == 1
    for prompt, completion in zip(prompts, completions, strict=True):
        assert set(completion.versions) == {0, 1} and completion.versions == sorted(completion.versions)
        assert completion.prompt_digest == digest(prompt)
        assert apart(completion.logprobs, replay({0: old, 1: new}, 0, prompt, completion)) <= CLOSE
        whole = reference(new, prompt + completion.token_ids)[len(prompt) :]
        assert apart(completion.logprobs[-50:], whole[-50:]) > 1e-3, "the KV was not kept, or the models are too alike"


def test_recompute_equals_fresh_kv(engine: TorchEngine, old: CwmForCausalLM, new: CwmForCausalLM) -> None:
    prompts = [ids_of(i, n) for i, n in enumerate((1, 9, 66))]
    idle = ids_of(9, 30)
    idle += engine.generate(idle, Sampling(max_tokens=5), "idle").token_ids
    completions = generate_through_a_swap(engine, prompts, lambda: engine.publish(1, state_of(new), recompute=True))
    for prompt, completion in zip(prompts, completions, strict=True):
        swapped = completion.versions.index(1)
        before, after = (reference(model, prompt + completion.token_ids)[len(prompt) :] for model in (old, new))
        assert apart(completion.logprobs[:swapped], before[:swapped]) <= CLOSE
        assert apart(completion.logprobs[swapped:], after[swapped:]) <= CLOSE
    check(new, idle, engine.generate(idle, Sampling(max_tokens=5), "idle"))


def test_later_turns_of_an_episode_keep_older_kv(engine: TorchEngine, old: CwmForCausalLM, new: CwmForCausalLM) -> None:
    ids = ids_of(3, 20)
    first = engine.generate(ids, Sampling(max_tokens=8, seed=1), "e")
    engine.publish(4, state_of(new))
    then = [*ids, *first.token_ids, 5, 6]
    second = engine.generate(then, Sampling(max_tokens=8, seed=2), "e")
    assert first.versions == [0] * 8 and second.versions == [4] * 8
    with torch.no_grad():  # old KV up to the last token that was fed, new KV from the last sampled one on
        cache, known = DynamicCache(), len(ids) + 7
        old(torch.tensor([then[:known]]), past_key_values=cache)
        logits = new(torch.tensor([[*then[known:], *second.token_ids]]), past_key_values=cache).logits[0]
    expected = logits.log_softmax(-1)[len(then) - known - 1 : -1].gather(1, torch.tensor(second.token_ids)[:, None])
    assert apart(second.logprobs, expected[:, 0].tolist()) <= CLOSE


def test_engine_and_learner_agree_after_a_publish(engine: TorchEngine, new: CwmForCausalLM) -> None:
    state = state_of(new)
    for value in state.values():
        value.flags.writeable = False
    engine.publish(2, state)
    assert engine.checksum() == checksum(state)
    sequences = [ids_of(i, n) for i, n in enumerate((1, 2, 63, 64, 65, 200, 7))]
    for ids, scores in zip(sequences, engine.score(sequences), strict=True):
        assert apart(scores, reference(new, ids)) <= CLOSE


def test_score_leaves_running_episodes_alone(engine: TorchEngine, old: CwmForCausalLM) -> None:
    prompts = [ids_of(i, 20) for i in range(3)]
    scored: list[list[float]] = []
    sequence = ids_of(1, 120)
    completions = generate_through_a_swap(engine, prompts, lambda: scored.extend(engine.score([sequence] * 40)))
    for prompt, completion in zip(prompts, completions, strict=True):
        check(old, prompt, completion)
    assert all(apart(scores, reference(old, sequence)) <= CLOSE for scores in scored) and len(scored) == 40


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda w: w.pop("model.norm.weight"), "missing"),
        (lambda w: w.update(extra=np.zeros(3, np.float32)), "unknown"),
        (lambda w: w.update({"model.norm.weight": np.zeros(3, np.float32)}), "shape (3,)"),
        (lambda w: w["model.norm.weight"].fill(np.inf), "infinity"),
    ],
)
def test_weights_that_do_not_fit_are_refused_in_one_line(
    engine: TorchEngine, old: CwmForCausalLM, change: Callable[[dict[str, np.ndarray]], object], part: str
) -> None:
    state = state_of(old)
    change(state)
    with pytest.raises(ValueError) as error:
        engine.publish(1, state)
    assert part in str(error.value) and "\n" not in str(error.value)
    assert engine.version == 0
    engine.publish(3, state_of(old))
    with pytest.raises(ValueError, match="older than the engine's 3"):
        engine.publish(2, state_of(old))


def test_a_seed_makes_a_completion_independent_of_its_batch(engine: TorchEngine) -> None:
    prompt, sampling = ids_of(1, 30), Sampling(max_tokens=40, seed=-7, temperature=1.3)
    alone = engine.generate(prompt, sampling, "alone")
    crowded: list[Completion] = []
    mates = [lambda i=i: engine.generate(ids_of(i, 10 * i), Sampling(max_tokens=60), f"m{i}") for i in range(1, 13)]
    together(*mates, lambda: crowded.append(engine.generate(prompt, sampling, "crowded")))  # type: ignore[arg-type]
    assert alone.token_ids == crowded[0].token_ids
    assert apart(alone.logprobs, crowded[0].logprobs) <= CLOSE
    other = engine.generate(prompt, Sampling(max_tokens=40, seed=8, temperature=1.3), "other")
    assert other.token_ids != alone.token_ids


def test_without_seeds_the_engine_seed_decides(old: CwmForCausalLM) -> None:
    def tokens(seed: int) -> list[list[int]]:
        with TorchEngine(old, EngineConfig(slots=2, max_context=256, seed=seed)) as engine:
            return [engine.generate(ids_of(1, 9), Sampling(max_tokens=20), f"e{i}").token_ids for i in range(2)]

    first = tokens(1)
    assert first == tokens(1) != tokens(2) and first[0] != first[1]


def test_temperature_and_nucleus_give_the_log_probs_that_were_sampled_from(
    engine: TorchEngine, old: CwmForCausalLM
) -> None:
    prompt = ids_of(2, 20)
    hot = engine.generate(prompt, Sampling(max_tokens=60, temperature=1.7, seed=1), "hot")
    assert apart(hot.logprobs, reference(old, prompt + hot.token_ids, 1.7)[20:]) <= CLOSE
    few = engine.generate(prompt, Sampling(max_tokens=60, top_p=0.6, seed=1), "few")
    with torch.no_grad():
        logits = old(torch.tensor([prompt + few.token_ids])).logits[0, 19:-1]
    for row, token, logprob in zip(logits.softmax(-1), few.token_ids, few.logprobs, strict=True):
        ordered = row.sort(descending=True).values
        mass = ordered.cumsum(0)
        size = int((mass < 0.6).sum()) + 1
        assert row[token] >= ordered[size - 1] - 1e-6
        assert logprob == pytest.approx(float(row[token].log() - mass[size - 1].log()), abs=CLOSE)


def test_draw_inverts_the_cdf() -> None:
    logits = torch.tensor([0.0, 1.0, -2.0, 0.5, -30.0])
    n = 20_000
    grid = [(i + 0.5) / n for i in range(n)]
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.7)):
        tokens, logprobs = draw(logits.expand(n, -1), [temperature] * n, [top_p] * n, grid)
        shares = np.bincount(tokens, minlength=5) / n
        for token in set(tokens):
            assert shares[token] == pytest.approx(np.exp(logprobs[tokens.index(token)]), abs=2 / n)
        assert 4 not in tokens
    assert set(tokens) == {1, 3}, "0.7 needs the two most likely"
    edge = draw(torch.tensor([[5.0, -200.0]]), [1.0], [1.0], [np.nextafter(1.0, 0.0)])
    assert edge[0] == [0], "a token of probability zero was drawn"


def test_a_mixed_batch_of_samplings(engine: TorchEngine, old: CwmForCausalLM) -> None:
    prompt = ids_of(4, 12)
    kinds = [
        Sampling(temperature=0, max_tokens=30),
        Sampling(max_tokens=30, seed=1),
        Sampling(top_p=0.5, max_tokens=30),
    ]
    alone = [engine.generate(prompt, s, f"a{i}") for i, s in enumerate(kinds[:2])]
    answers: dict[int, Completion] = {}
    calls = [
        lambda i=i, s=s: answers.update({i: engine.generate(prompt, s, f"b{i}")})  # type: ignore[misc]
        for i, s in enumerate(kinds)
    ]
    together(*calls)
    assert [answers[i].token_ids for i in range(2)] == [c.token_ids for c in alone]
    check(old, prompt, answers[0])  # greedy reports the log-probs of temperature 1


def test_stop_and_length(engine: TorchEngine) -> None:
    prompt = ids_of(1, 30)
    free = engine.generate(prompt, Sampling(max_tokens=20, seed=5), "e")
    assert free.finish == "length" and len(free.token_ids) == 20
    stop = free.token_ids[7]
    stopped = engine.generate(prompt, Sampling(max_tokens=20, seed=5, stop_ids=(stop, 9999)), "f")
    assert stopped.finish == "stop" and stopped.token_ids == free.token_ids[: free.token_ids.index(stop) + 1]
    long = ids_of(2, 250)
    assert len(engine.generate(long, Sampling(max_tokens=100), "g").token_ids) == 6
    last = engine.generate(ids_of(2, 255), Sampling(max_tokens=100), "h")
    assert last.finish == "length" and len(last.token_ids) == 1


@pytest.mark.parametrize(
    ("ids", "parts"),
    [
        ([1] * 256, ["256 tokens", "engine.max_context is 256"]),
        ([1] * 300, ["300 tokens", "engine.max_context is 256"]),
        ([], ["empty"]),
        ([1, VOCAB], [f"token id {VOCAB}", f"vocabulary of {VOCAB}"]),
        ([-1], ["token id -1"]),
    ],
)
def test_a_prompt_that_cannot_be_run_is_one_line(engine: TorchEngine, ids: list[int], parts: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        engine.generate(ids, Sampling(), "e")
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)
    assert len(engine.generate([1], Sampling(max_tokens=3), "e").token_ids) == 3


def test_one_call_at_a_time_for_an_episode(engine: TorchEngine) -> None:
    def second() -> None:
        until(lambda: engine.stats()["running"] == 1)
        with pytest.raises(ValueError, match="already generating"):
            engine.generate([1, 2], Sampling(max_tokens=5), "e")

    first: list[Completion] = []
    together(lambda: first.append(engine.generate([3], Sampling(max_tokens=250), "e")), second)
    assert len(first[0].token_ids) == 250


def test_release_cancels_what_runs_and_what_waits(old: CwmForCausalLM) -> None:
    with TorchEngine(old, EngineConfig(slots=1, max_context=256)) as engine:
        answers: dict[str, Completion] = {}
        prompts = {"runs": ids_of(1, 9), "waits": ids_of(2, 7)}

        def ask(name: str) -> None:
            answers[name] = engine.generate(prompts[name], Sampling(max_tokens=247), name)

        def stop() -> None:
            until(lambda: engine.stats()["steps"] > 3)
            threading.Thread(target=ask, args=("waits",), daemon=True).start()
            until(lambda: engine.stats()["waiting"] == 1)
            engine.release("waits")
            until(lambda: "waits" in answers)
            engine.release("runs")

        together(lambda: ask("runs"), stop)
        assert {c.finish for c in answers.values()} == {"cancelled"} and answers["waits"].token_ids == []
        check(old, prompts["runs"], answers["runs"])
        assert 0 < len(answers["runs"].token_ids) < 247
        engine.release("nobody")
        play(engine, old, 3, episode="runs")
        until(lambda: engine.stats()["episodes"] == 0)


def test_a_failure_of_the_engine_thread_reaches_every_caller(old: CwmForCausalLM) -> None:
    engine = TorchEngine(old, EngineConfig(slots=2, max_context=256))
    step, failures = engine._decoder.step, []

    def fail_later(*arguments: object) -> torch.Tensor:
        if engine.stats()["steps"] > 20:
            raise RuntimeError("the disk\nis on fire")
        return step(*arguments)  # type: ignore[arg-type]

    engine._decoder.step = fail_later  # type: ignore[method-assign]

    def ask(i: int) -> None:
        with pytest.raises(InfraError) as error:
            engine.generate(ids_of(i, 9), Sampling(max_tokens=200), f"e{i}")
        failures.append(str(error.value))

    together(*(lambda i=i: ask(i) for i in range(6)))  # type: ignore[misc]
    assert len(failures) == 6 and all("RuntimeError: the disk is on fire" in text for text in failures)
    for call in (lambda: engine.generate([1], Sampling(), "x"), lambda: engine.score([[1]]), engine.checksum):
        with pytest.raises(InfraError, match="on fire"):
            call()
    engine.release("x")
    engine.close()


def test_weights_that_overflow_end_the_engine_and_become_no_samples(old: CwmForCausalLM) -> None:
    state = state_of(old)
    state["model.norm.weight"][:] = 3e38
    with TorchEngine(old, EngineConfig(slots=2, max_context=256)) as engine:
        engine.publish(1, state)
        with pytest.raises(InfraError, match="version 1 gives NaN"):
            engine.generate([1, 2, 3], Sampling(), "e")


def test_close_ends_those_who_wait_and_refuses_those_who_come(old: CwmForCausalLM) -> None:
    engine = TorchEngine(old, EngineConfig(slots=1, max_context=256))

    def ask(i: int) -> None:
        with pytest.raises(InfraError, match="closed"):
            while True:
                engine.generate(ids_of(i, 5), Sampling(max_tokens=200), f"e{i}")

    def close() -> None:
        until(lambda: engine.stats()["steps"] > 5)
        engine.close()

    together(lambda: ask(1), lambda: ask(2), close)
    engine.close()
    with pytest.raises(InfraError, match="closed"):
        engine.publish(1, state_of(old))


def test_a_program_that_forgets_to_close_ends_well() -> None:
    program = """
import threading, time
from policy import models
from policy.completion import Sampling
from policy.torch_engine import TorchEngine
engine = TorchEngine(models.build(models.ModelConfig()))
ask = lambda: engine.generate([1, 2], Sampling(max_tokens=1000), "e")
threading.Thread(target=ask, daemon=True).start()
while not engine.stats()["steps"]: time.sleep(0.01)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0 and "terminate called" not in ended.stderr, ended.stderr


def test_a_caller_does_not_wait_for_ever(old: CwmForCausalLM) -> None:
    with TorchEngine(old, EngineConfig(slots=1, max_context=256, deadline_s=0.5)) as engine:
        step, gate = engine._decoder.step, threading.Event()

        def hang(*arguments: object) -> torch.Tensor:
            gate.wait(20)
            return step(*arguments)  # type: ignore[arg-type]

        engine._decoder.step = hang  # type: ignore[method-assign]
        with pytest.raises(InfraError, match=r"deadline_s=0\.5"):
            engine.generate([1, 2], Sampling(), "e")
        gate.set()
        until(lambda: engine.stats()["episodes"] == 0)


def test_seconds_by_label_sum_to_the_wall_clock(engine: TorchEngine, old: CwmForCausalLM, new: CwmForCausalLM) -> None:
    begin = engine.stats()
    start = time.perf_counter()
    together(*(lambda i=i: play(engine, old, i) for i in range(4)))  # type: ignore[misc]
    engine.publish(1, state_of(new))
    engine.score([ids_of(1, 100)])
    time.sleep(0.1)
    end, wall = engine.stats(), time.perf_counter() - start
    spent = {label: end[label] - begin[label] for label in ("prefill", "decode", "swap", "score", "idle")}
    assert sum(spent.values()) == pytest.approx(wall, rel=0.01)
    assert all(seconds > 0 for seconds in spent.values()) and spent["idle"] > 0.09
    assert end["wall"] == pytest.approx(sum(end[label] for label in spent), rel=1e-6)
    assert end["prefilled_tokens"] + end["reused_tokens"] + end["shared_tokens"] > end["decoded_tokens"] > 0


def test_llama_with_scaled_rope_and_its_own_head() -> None:
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        head_dim=16,
        max_position_embeddings=128,
        initializer_range=0.2,
        pad_token_id=0,
        rope_parameters={**rope, "original_max_position_embeddings": 32},
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with TorchEngine(model, EngineConfig(slots=2, max_context=128)) as engine:
        ids = ids_of(1, 90)
        assert apart(engine.score([ids])[0], reference(model, ids)) <= CLOSE
        check(model, ids, engine.generate(ids, Sampling(max_tokens=30, seed=1), "e"))


def test_models_that_the_engine_cannot_run_are_refused_in_one_line() -> None:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    window = CwmForCausalLM(CwmConfig(**sizes, **heads, sliding_window=32, rope_parameters={"rope_type": "default"}))
    Decoder(window, 1, 32)
    for context, part in ((33, "sliding window of 32"), (65, "64 positions")):
        with pytest.raises(ValueError, match=part) as error:
            Decoder(window, 1, context)
        assert "\n" not in str(error.value)
    biased = LlamaForCausalLM(LlamaConfig(**sizes, **heads, attention_bias=True))
    with pytest.raises(ValueError, match="biases"):
        Decoder(biased, 1, 32)
    with pytest.raises(ValueError, match=r"engine\.slots=0"):
        EngineConfig(slots=0)
    with pytest.raises(ValueError, match="'tpu' is unknown"):
        EngineConfig(device="tpu")


def test_common_prefix() -> None:
    random = np.random.default_rng(0)
    for _ in range(2000):
        left, right = (random.integers(0, 2, random.integers(0, 9)).tolist() for _ in range(2))
        most = int(random.integers(0, 9))
        expected = 0
        while expected < min(len(left), len(right), most) and left[expected] == right[expected]:
            expected += 1
        assert common(left, right, most) == expected
