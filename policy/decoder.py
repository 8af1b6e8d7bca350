"""The forward pass of the embedded engine: a compact decoder of the Llama family with a slot-major KV cache.

It computes what `transformers` computes for Cwm and Llama models (the tests hold it to 1e-5), from weights fused for
few calls per token, in fp32. It does not schedule, wait, or know episodes: `policy.torch_engine` does.

Letters: B rows of a decode step, T packed tokens, V vocabulary, S slots, C positions of a slot, H query heads, K key
heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from policy.weights import Weights, as_tensor

WIDTH = 64
"""Positions of a block of the cache."""

Attend = Callable[[int, Tensor, Tensor, Tensor], "Tensor | None"]
"""(layer, q [T, H, D], k [T, K, D], v [T, K, D]) → mixed values [T, H·D]; None ends the pass: the rest isn't needed."""


@dataclass(frozen=True)
class Row:
    """Tokens to put into a slot's KV, from position `start` on."""

    slot: int
    start: int
    token_ids: Sequence[int]


@dataclass(frozen=True)
class _Layer:
    norm1: Tensor
    qkv: Tensor
    out: Tensor
    norm2: Tensor
    gate_up: Tensor
    down: Tensor


class Decoder:
    """Weights and KV cache of one model. Not thread-safe: one thread calls it, under `torch.inference_mode`."""

    def __init__(self, model: Any, slots: int, max_context: int, device: str = "cpu") -> None:
        config = model.config
        check_supported(config.to_dict(), max_context)
        self.device = torch.device(device)
        self.max_context = max_context
        self.layers_count: int = config.num_hidden_layers
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self.head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.vocab_size: int = config.vocab_size
        self.eps: float = config.rms_norm_eps
        self.weights: dict[str, Tensor] = {}
        """By `named_parameters()` name; views into the fused matrices."""
        self._allocate(config)
        self._rotary(model)
        blocks = -(-max_context // WIDTH)
        shape = (self.layers_count, slots, self.kv_heads, blocks)
        # Keys lie transposed in blocks of WIDTH positions, values plainly: see `_Reading`.
        self.keys = torch.zeros(*shape, self.head_dim, WIDTH, device=self.device)
        self.values = torch.zeros(*shape, WIDTH, self.head_dim, device=self.device)
        self.load(dict(model.named_parameters()))

    def load(self, weights: Weights) -> None:
        """Copy new weights in. The KV in the cache stays as the old ones made it."""
        with torch.no_grad():
            for name, mine in self.weights.items():
                mine.copy_(as_tensor(weights[name]))

    def copy_kv(self, source: int, target: int, length: int) -> None:
        """Give slot `target` the first `length` positions of slot `source`."""
        for cache in (self.keys, self.values):
            blocks = -(-length // WIDTH)
            cache[:, target, :, :blocks] = cache[:, source, :, :blocks]

    def prefill(self, rows: Sequence[Row]) -> None:
        """Put the KV of all rows' tokens into their slots: one packed pass, no padding, no logits."""
        tokens = self._tensor([t for row in rows for t in row.token_ids])
        slots = self._tensor([row.slot for row in rows for _ in row.token_ids])
        positions = self._tensor([row.start + i for row in rows for i in range(len(row.token_ids))])
        where = self._where(slots, positions)
        spans = _spans([len(row.token_ids) for row in rows])
        masks = [self._mask(row.start, len(row.token_ids)) for row in rows]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
            self._write(layer, where, k, v)
            if layer == self.layers_count - 1:
                return None
            mixed = []
            for row, (begin, end), mask in zip(rows, spans, masks, strict=True):
                upto = row.start + end - begin
                blocks = -(-upto // WIDTH)
                keys = self.keys[layer, row.slot, :, :blocks].transpose(-1, -2).flatten(1, 2)[:, :upto]
                values = self.values[layer, row.slot, :, :blocks].flatten(1, 2)[:, :upto]
                mixed.append(self._attention(q[begin:end], keys, values, mask))
            return torch.cat(mixed)

        self._forward(tokens, positions, attend)

    def step(self, tokens: Sequence[int], slots: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Feed one token to each of B slots (ascending, distinct) that hold `lengths` positions; logits [B, V]."""
        position = self._tensor(lengths)
        where = self._where(self._tensor(slots), position)
        reading = self._plan(slots, lengths)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._write(layer, where, k, v)
            return self._read(layer, q, reading)

        return F.linear(self._forward(self._tensor(tokens), position, attend), self.head)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability of each token given those before it, with fresh KV; 0.0 for the first of a sequence."""
        tokens = self._tensor([t for ids in sequences for t in ids])
        positions = self._tensor([i for ids in sequences for i in range(len(ids))])
        spans = _spans([len(ids) for ids in sequences])

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = k.transpose(0, 1), v.transpose(0, 1)
            return torch.cat([self._attention(q[b:e], k[:, b:e], v[:, b:e], None) for b, e in spans])

        hidden = self._forward(tokens, positions, attend)
        scores = []
        for begin, end in spans:
            logits = F.linear(hidden[begin : end - 1], self.head)
            picked = logits.log_softmax(-1).gather(1, tokens[begin + 1 : end, None])[:, 0]
            scores.append([0.0, *picked.tolist()])
        return scores

    def _forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Hidden states [T, hidden] after the last norm."""
        x = F.embedding(tokens, self.embedding)
        cos, sin = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)
        turned = self.heads + self.kv_heads
        for index, layer in enumerate(self.layers):
            qkv = F.linear(self._norm(x, layer.norm1), layer.qkv).view(len(x), -1, self.head_dim)
            qk = qkv[:, :turned]
            qk = torch.addcmul(qk * cos, qk.roll(self.head_dim // 2, -1), sin)
            mixed = attend(index, qk[:, : self.heads], qk[:, self.heads :], qkv[:, turned:])
            if mixed is None:
                return x
            x = torch.addmm(x, mixed, layer.out.t())
            gate, up = F.linear(self._norm(x, layer.norm2), layer.gate_up).chunk(2, -1)
            x = torch.addmm(x, F.silu(gate).mul_(up), layer.down.t())
        return self._norm(x, self.norm)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True).add_(self.eps)) * weight

    def _attention(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """One row's tokens over its own positions; causal where `mask` is None. q [T, H, D] → [T, H·D]."""
        mixed = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys[None],
            values[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=1.0,
            enable_gqa=self.heads != self.kv_heads,
        )
        return mixed[0].transpose(0, 1).reshape(len(q), -1)

    def _plan(self, slots: Sequence[int], lengths: Sequence[int]) -> _Reading:
        """What a decode step reads: each row's own positions and no others, whatever slots and lengths it has."""
        seen = self._tensor(lengths) + 1
        heads = torch.arange(self.heads, device=self.device) // (self.heads // self.kv_heads)
        lane = (self._tensor(slots)[:, None] * self.kv_heads + heads).view(-1)
        seen = seen.repeat_interleave(self.heads)
        blocks = (seen + WIDTH - 1) // WIDTH
        most = int(blocks.max())
        key_block, key_first = _concatenate(lane * self.keys.shape[3], blocks)
        key_rows = (key_block[:, None] * self.head_dim + torch.arange(self.head_dim, device=self.device)).view(-1)
        order = torch.arange(most, device=self.device)
        starts = (key_first[:, None] + torch.minimum(order, blocks[:, None])) * self.head_dim
        value_rows, value_first = _concatenate(lane * (self.values.shape[3] * WIDTH), seen)
        picked, _ = _concatenate(torch.arange(len(lane), device=self.device) * (most * WIDTH), seen)
        closed = torch.arange(most * WIDTH, device=self.device) >= seen[:, None]
        bias = torch.zeros(closed.shape, device=self.device).masked_fill_(closed, -math.inf)
        owner = torch.arange(len(lane), device=self.device).repeat_interleave(blocks)
        return _Reading(key_rows, starts.view(-1), owner, value_rows, value_first, picked, bias)

    def _read(self, layer: int, q: Tensor, r: _Reading) -> Tensor:
        """Attention of one query per row, q [B, H, D] → [B, H·D]."""
        weights = q.reshape(-1, self.head_dim)[r.owner].view(-1)
        keys, values = self.keys[layer].view(-1, WIDTH), self.values[layer].view(-1, self.head_dim)
        scores = F.embedding_bag(r.key_rows, keys, r.key_starts, mode="sum", per_sample_weights=weights)
        shares = scores.view(r.bias.shape).add_(r.bias).softmax(-1).view(-1)[r.picked]
        mixed = F.embedding_bag(r.value_rows, values, r.value_starts, mode="sum", per_sample_weights=shares)
        return mixed.view(len(q), -1)

    def _mask(self, start: int, count: int) -> Tensor | None:
        if start == 0:
            return None
        return torch.ones(count, start + count, dtype=torch.bool, device=self.device).tril(start)

    def _write(self, layer: int, where: tuple[Tensor, Tensor], k: Tensor, v: Tensor) -> None:
        block, offset = where
        self.keys[layer].view(-1, self.head_dim, WIDTH)[block, :, offset] = k.reshape(-1, self.head_dim)
        values = self.values[layer].view(-1, self.head_dim)
        values.index_copy_(0, block * WIDTH + offset, v.reshape(-1, self.head_dim))

    def _where(self, slots: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Block in a layer's cache, and offset in it, of each token and key head [T·K]."""
        heads = torch.arange(self.kv_heads, device=self.device)
        blocks = (slots[:, None] * self.kv_heads + heads) * self.keys.shape[3] + (positions // WIDTH)[:, None]
        return blocks.view(-1), (positions % WIDTH).repeat_interleave(self.kv_heads)

    def _tensor(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self.device)

    def _allocate(self, config: Any) -> None:
        """Fused matrices, and views of their parts under the names of the `transformers` model."""
        hidden, inner = config.hidden_size, config.intermediate_size
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, device=self.device)

        def name(key: str, value: Tensor) -> Tensor:
            self.weights[key] = value
            return value

        self.embedding = name("model.embed_tokens.weight", empty(self.vocab_size, hidden))
        self.layers: list[_Layer] = []
        for i in range(self.layers_count):
            at, qkv, gate_up = f"model.layers.{i}.", empty(q + 2 * kv, hidden), empty(2 * inner, hidden)
            for part, piece in zip("qkv", qkv.split([q, kv, kv]), strict=True):
                name(f"{at}self_attn.{part}_proj.weight", piece)
            out = name(f"{at}self_attn.o_proj.weight", empty(hidden, q))
            name(f"{at}mlp.gate_proj.weight", gate_up[:inner])
            name(f"{at}mlp.up_proj.weight", gate_up[inner:])
            down = name(f"{at}mlp.down_proj.weight", empty(hidden, inner))
            norm1 = name(f"{at}input_layernorm.weight", empty(hidden))
            norm2 = name(f"{at}post_attention_layernorm.weight", empty(hidden))
            self.layers.append(_Layer(norm1, qkv, out, norm2, gate_up, down))
        self.norm = name("model.norm.weight", empty(hidden))
        tied = config.tie_word_embeddings
        self.head = self.embedding if tied else name("lm_head.weight", empty(self.vocab_size, hidden))

    def _rotary(self, model: Any) -> None:
        """Tables [C, D] from the model's own rotary module, whatever its rope type.

        Attention's factor D^-1/2 sits in them, half on the queries and half on the keys; the sign of `rotate_half` sits
        in the sine, so that turning is a roll.
        """
        positions = torch.arange(self.max_context)[None]
        cos, sin = model.model.rotary_emb(torch.zeros(1, dtype=torch.float32), positions)
        sign = torch.ones(self.head_dim)
        sign[: self.head_dim // 2] = -1
        scale = self.head_dim**-0.25
        self.cos = (cos[0] * scale).to(self.device)
        self.sin = (sin[0] * sign * scale).to(self.device)


@dataclass(frozen=True)
class _Reading:
    """What a decode step reads of the cache, for `embedding_bag`: a sum of table rows with weights, bag by bag.

    Rows of different length in scattered slots make padded matrix products read several times what they need, and reading
    is what a decode step waits for. Scores are sums of the rows of transposed keys with the query as weights, a bag per
    block; values are summed with the attention's shares as weights, a bag per head. N = B·H heads, M most blocks.
    """

    key_rows: Tensor
    key_starts: Tensor
    """First of `key_rows` of each of the N·M bags; those beyond a row's last block are empty."""
    owner: Tensor
    """The head of each block that is read."""
    value_rows: Tensor
    value_starts: Tensor
    """First of `value_rows` of each of the N bags."""
    picked: Tensor
    """Where in the [N, M·WIDTH] shares those of `value_rows` are."""
    bias: Tensor
    """[N, M·WIDTH]: 0 where a head may attend, else -inf."""


def _concatenate(first: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The ranges `first[i] : first[i] + counts[i]` one after another, and where each begins in the result."""
    ends = counts.cumsum(0)
    starts = ends - counts
    return torch.arange(int(ends[-1]), device=first.device) + (first - starts).repeat_interleave(counts), starts


def draw(logits: Tensor, temperature: Sequence[float], top_p: Sequence[float], uniform: Sequence[float]) -> list[Any]:
    """Sample one token per row by inverting the CDF at `uniform`; [tokens, log-probs], two lists of B.

    logits [B, V]. Temperature 0 takes the largest logit and reports the log-probability of temperature 1.
    """
    device = logits.device
    heat = torch.tensor(temperature, device=device)
    if any(t != 1.0 for t in temperature):
        logits = logits / torch.where(heat > 0, heat, 1.0)[:, None]
    logprobs = logits.log_softmax(-1)
    if any(p < 1.0 for p in top_p):
        kept = [p if t > 0 else 1.0 for p, t in zip(top_p, temperature, strict=True)]
        logprobs = _nucleus(logprobs, torch.tensor(kept, device=device))
    cdf = logprobs.exp().cumsum(-1, dtype=torch.float64)
    target = torch.tensor(uniform, dtype=torch.float64, device=device)[:, None] * cdf[:, -1:]
    tokens = torch.searchsorted(cdf, target, right=True)
    if any(t == 0 for t in temperature):
        tokens = torch.where(heat[:, None] > 0, tokens, logprobs.argmax(-1, keepdim=True))
    tokens = tokens.clamp_(max=logits.shape[-1] - 1)
    return [tokens[:, 0].tolist(), logprobs.gather(1, tokens)[:, 0].tolist()]


def _nucleus(logprobs: Tensor, top_p: Tensor) -> Tensor:
    """Log-probabilities of the smallest set of tokens with mass at least `top_p`, renormalised; -inf elsewhere."""
    ordered, order = logprobs.sort(-1, descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()
    dropped = (before >= top_p[:, None]) & (top_p[:, None] < 1.0)
    dropped[:, 0] = False
    return logprobs.masked_fill(dropped.scatter(1, order, dropped), -math.inf).log_softmax(-1)


def _spans(lengths: Sequence[int]) -> list[tuple[int, int]]:
    spans, begin = [], 0
    for length in lengths:
        spans.append((begin, begin + length))
        begin += length
    return spans


def check_supported(config: Mapping[str, Any], max_context: int) -> None:
    """`ValueError` where `Decoder` can't run the model of a `config.json` (its values) on so many positions."""
    kind = config.get("model_type")
    if kind not in ("cwm", "llama"):
        raise ValueError(f"the torch engine runs models of type cwm and llama, not {kind!r}; serve it with vllm")
    if config.get("attention_bias") or config.get("mlp_bias") or config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"this {kind} model has biases or no SiLU, which the torch engine lacks; serve it with vllm")
    positions, window = config["max_position_embeddings"], config.get("sliding_window")
    if max_context > positions:
        raise ValueError(f"engine.max_context={max_context} is more than the model's {positions} positions; lower it")
    if "sliding_attention" in (config.get("layer_types") or ()) and window and window < max_context:
        raise ValueError(
            f"engine.max_context={max_context} is more than the model's sliding window of {window}, which the torch "
            "engine does not cut; lower it, or serve the model with vllm"
        )
