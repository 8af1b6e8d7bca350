"""The part of vLLM that `policy/vllm_engine.py` uses, small and deterministic: a stand-in for the package `vllm`.

Its "model" is a hash. Weights are one number (of `model.norm.weight`). The KV of a position remembers its token and the
weights it was made with; logits come of the whole KV, the weights that sample included, so that every log-prob tells which
weights made which position. `logprobs_of` says the same from lists, for tests to compare with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from safetensors.numpy import load_file

__version__ = "0.32.0"
BLOCK = 4  # tokens; prefixes are cached in whole blocks
KV = tuple[int, float]  # token, weights that it was read with


def mark_of(directory: str | Path) -> float:
    """What distinguishes weights."""
    return round(float(load_file(Path(directory) / "model.safetensors")["model.norm.weight"][0]), 4)


def distribution(kv: Sequence[KV], weights: float, vocabulary: int, temperature: float = 1.0) -> np.ndarray:
    """Log-probs [vocabulary] of the next token; the last position is computed with `weights`."""
    key = repr((list(kv), weights)).encode()
    draw = np.random.default_rng(int.from_bytes(hashlib.sha256(key).digest()[:8], "little"))
    logits = draw.normal(0, 2, vocabulary) / (temperature or 1.0)
    return logits - np.log(np.exp(logits).sum())


def logprobs_of(
    prompt: Sequence[int], made: Sequence[float], tokens: Sequence[int], by: Sequence[float], vocabulary: int
) -> list[float]:
    """Log-probs of `tokens` after `prompt`, whose KV (all but of its last token) `made` says the weights of; each of `tokens`
    is sampled by the weights in `by`, which also read the token before it."""
    kv, said = [*zip(prompt[:-1], made, strict=True)], []
    for fed, token, weights in zip([prompt[-1], *tokens], tokens, by, strict=False):
        kv.append((fed, weights))
        said.append(float(distribution(kv, weights, vocabulary)[token]))
    return said


class RequestOutputKind:
    DELTA = "delta"


sampling_params = SimpleNamespace(RequestOutputKind=RequestOutputKind)


@dataclass
class SamplingParams:
    max_tokens: int
    temperature: float
    output_kind: str
    detokenize: bool
    ignore_eos: bool
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: list[int] = field(default_factory=list)
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass
class EngineArgs:
    model: str
    max_model_len: int
    max_num_seqs: int
    async_scheduling: bool
    enable_prefix_caching: bool
    logprobs_mode: str
    skip_tokenizer_init: bool
    generation_config: str
    hf_overrides: dict[str, Any]
    dtype: str
    seed: int
    tensor_parallel_size: int
    max_num_batched_tokens: int
    enable_chunked_prefill: bool
    enforce_eager: bool
    gpu_memory_utilization: float
    kv_cache_memory_bytes: int | None
    block_size: int | None
    disable_log_stats: bool
    use_tqdm_on_load: bool


@dataclass
class _Row:
    name: str
    ids: list[int]
    salt: str
    params: SamplingParams
    random: np.random.Generator
    kv: list[KV] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    cached: int = 0
    spans: list[SimpleNamespace] = field(default_factory=list)


class LLMEngine:
    """What `LLMEngine` of vLLM does, as far as it is used."""

    latest: LLMEngine

    def __init__(self, args: EngineArgs) -> None:
        assert not args.async_scheduling and args.logprobs_mode == "processed_logprobs" and args.skip_tokenizer_init
        self.args = args
        self.vocabulary = json.loads((Path(args.model) / "config.json").read_text())["vocab_size"]
        self.weights, self.version = mark_of(args.model), "default"
        self.running: list[_Row] = []
        self.waiting: list[_Row] = []
        self.cache: dict[tuple[str, tuple[int, ...]], list[KV]] = {}
        self.closed = False
        self.before_step: Any = lambda: None  # tests stop, count and break here
        self.distort: Any = lambda output: output  # and lie here
        capacity = SimpleNamespace(kv_cache_size_tokens=1000)
        self.vllm_config = SimpleNamespace(cache_config=capacity)
        scheduler = SimpleNamespace(
            get_request_counts=lambda: (len(self.running), len(self.waiting)),
            kv_cache_manager=SimpleNamespace(usage=0.5),
        )
        core = SimpleNamespace(scheduler=scheduler)
        self.engine_core = SimpleNamespace(engine_core=core, shutdown=lambda: setattr(self, "closed", True))
        LLMEngine.latest = self

    @classmethod
    def from_engine_args(cls, args: EngineArgs) -> LLMEngine:
        return cls(args)

    def add_request(self, name: str, prompt: dict[str, Any], params: SamplingParams) -> str:
        ids = prompt["prompt_token_ids"]
        if len(ids) >= self.args.max_model_len:
            raise ValueError(f"The prompt (length {len(ids)}) is longer than\n{self.args.max_model_len}")
        assert prompt["type"] == "token" and params.ignore_eos and not params.detokenize
        self.waiting.append(_Row(name, ids, prompt["cache_salt"], params, np.random.default_rng(params.seed)))
        return name

    def abort_request(self, names: list[str]) -> None:
        for rows in (self.running, self.waiting):
            rows[:] = [row for row in rows if row.name not in names]

    def collective_rpc(self, method: str, kwargs: dict[str, str]) -> list[None]:
        assert method == "reload_weights"
        self.weights = mark_of(kwargs["weights_path"])
        return [None]

    def reset_prefix_cache(self, reset_running_requests: bool) -> bool:
        assert reset_running_requests
        self.cache.clear()
        for row in self.running:  # preempted, and read again
            row.kv = [(token, self.weights) for token, _ in row.kv]
        return True

    def set_weight_version(self, version: str) -> None:
        self.version = version

    def step(self) -> list[Any]:
        self.before_step()
        while self.waiting and len(self.running) < self.args.max_num_seqs:
            self._admit(self.waiting.pop(0))
        outputs = [self.distort(self._decode(row)) for row in self.running]
        self.running = [row for row, output in zip(self.running, outputs, strict=True) if not output.finished]
        return outputs

    def _admit(self, row: _Row) -> None:
        most = 0 if row.params.prompt_logprobs is not None else len(row.ids) - 1
        for end in range(most // BLOCK * BLOCK, 0, -BLOCK):
            if (found := self.cache.get((row.salt, tuple(row.ids[:end])))) is not None:
                row.kv, row.cached = list(found), end
                break
        row.kv += [(token, self.weights) for token in row.ids[len(row.kv) : -1]]
        self.running.append(row)

    def _decode(self, row: _Row) -> Any:
        everything = [*row.ids, *row.tokens]
        row.kv.append((everything[-1], self.weights))
        whole = len(row.kv) // BLOCK * BLOCK
        self.cache[row.salt, tuple(everything[:whole])] = row.kv[:whole]
        said = distribution(row.kv, self.weights, self.vocabulary, row.params.temperature)
        mass = np.exp(said).cumsum()
        token = int(said.argmax()) if not row.params.temperature else int((mass < row.random.random() * mass[-1]).sum())
        row.tokens.append(token)
        if not row.spans or row.spans[-1].version != self.version:
            row.spans.append(SimpleNamespace(version=self.version, start=len(row.tokens) - 1))
        row.spans[-1].end = len(row.tokens)
        stop = token in row.params.stop_token_ids
        finished = stop or len(row.tokens) == row.params.max_tokens
        completion = SimpleNamespace(
            token_ids=[token],
            logprobs=[{token: SimpleNamespace(logprob=float(said[token]))}],
            finish_reason=("stop" if stop else "length") if finished else None,
            weight_versions=row.spans if finished else None,
        )
        return SimpleNamespace(
            request_id=row.name,
            prompt_token_ids=row.ids,
            num_cached_tokens=row.cached,
            outputs=[completion],
            finished=finished,
            prompt_logprobs=self._prompt(row) if row.params.prompt_logprobs is not None else None,
        )

    def _prompt(self, row: _Row) -> list[Any]:
        said: list[Any] = [None]
        for at in range(1, len(row.ids)):
            found = distribution(row.kv[:at], self.weights, self.vocabulary)
            said.append({row.ids[at]: SimpleNamespace(logprob=float(found[row.ids[at]]))})
        return said
