"""Memory of a learner rank and of an engine replica, in bytes: arithmetic alone, asked before anything is started or rented.

Letters: P parameters, L layers, D hidden size, H query heads, K key heads, d head size, F inner size, V vocabulary, T tokens
that are computed at a time. A *number* is one element of a tensor; `compute` and `master` say how many bytes it takes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rl.losses import CHUNK


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a model of the Llama family without biases (`policy.models`)."""

    vocab_size: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    tied: bool
    """One matrix for embedding and head."""
    windowed: int = 0
    """Layers that attend to the last `window` tokens alone; the others attend to all."""
    window: int = 0

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """From the values of a `config.json`."""
        window, kinds = config.get("sliding_window") or 0, config.get("layer_types") or ()
        return cls(
            vocab_size=config["vocab_size"],
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            inner=config["intermediate_size"],
            tied=config["tie_word_embeddings"],
            windowed=sum(kind == "sliding_attention" for kind in kinds) if window else 0,
            window=window,
        )

    @classmethod
    def named(cls, model: str | Path) -> Shape:
        """Of a model directory, or of a preset of `policy.models`. `ValueError` where it is neither."""
        path = Path(model) / "config.json"
        if path.is_file():
            return cls.of(json.loads(path.read_text()))
        from policy.models import PRESETS, ModelConfig, describe

        if str(model) not in PRESETS:
            raise ValueError(
                f"model {model} is no directory with a config.json and no preset; presets are {', '.join(PRESETS)}"
            )
        return cls.of(describe(ModelConfig(name=str(model))).to_dict())

    @property
    def layer(self) -> int:
        """Parameters of a layer: q and o (2 D H d), k and v (2 D K d), gate, up and down (3 D F), two norms (2 D)."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        return attention + 3 * self.hidden * self.inner + 2 * self.hidden

    @property
    def ends(self) -> int:
        """Parameters outside the layers: embedding, head where it is not the same matrix, last norm."""
        return self.vocab_size * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        """P."""
        return self.layers * self.layer + self.ends

    def adapters(self, rank: int) -> int:
        """Parameters of LoRA adapters of `rank` r at the seven matrices of each layer: r (inputs + outputs) a matrix (arXiv
        2106.09685, section 4.1)."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        sides = 2 * (self.hidden + q) + 2 * (self.hidden + kv) + 3 * (self.hidden + self.inner)
        return rank * sides * self.layers

    def kv_bytes(self, tokens: int, number: int = 2) -> int:
        """KV of an episode of `tokens`: a key and a value of K d numbers per token in each layer; a layer with a window holds
        no more tokens than that (vLLM's hybrid KV manager frees the others)."""
        seen = (self.layers - self.windowed) * tokens + self.windowed * min(tokens, self.window)
        return 2 * self.kv_heads * self.head_dim * number * seen


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a learner's tensors are laid out."""

    tokens: int
    """T: most positions of a micro-batch, padding included (`learn.max_tokens`)."""
    ranks: int = 1
    """Ranks that share weights, gradients and moments (FSDP)."""
    sequence_parallel: int = 1
    """Ranks that share a sequence."""
    checkpoint: bool = False
    """Keep the input of each layer alone, and compute the rest again in the backward pass."""
    lora_rank: int = 0
    """Train adapters of this rank; 0: all weights."""
    critic: bool = False
    """A second model of the same size is trained beside."""
    master: int = 4
    """Bytes of a weight, a gradient, a moment."""
    compute: int = 4
    """Bytes of an activation, and of a weight gathered from other ranks: 4, or 2 for bf16."""


@dataclass(frozen=True, kw_only=True)
class LearnerMemory:
    """Most bytes of one learner rank, part by part; `total` is the peak, in the backward pass of an update's last
    micro-batch."""

    weights: int
    gradients: int
    """Of one model: those of an update are let go when it is done."""
    moments: int
    """AdamW's two (arXiv 1711.05101, algorithm 2)."""
    gathered: int
    """Weights of other ranks that are at work: two layers (one is fetched ahead) with their adapters, and embedding and head,
    which stay. 0 with one rank."""
    activations: int
    workspace: int
    """The larger of two that are never there together: at the loss, logits, their log-softmax and two more tables of a chunk;
    behind it, the gradients of a layer's activations."""

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(getattr(self, f.name) for f in fields(self))


def learner(shape: Shape, layout: Layout) -> LearnerMemory:
    """Peak memory of a learner rank. Sharded: weights, gradients, moments over `ranks`, tokens over `sequence_parallel`."""
    adapters = shape.adapters(layout.lora_rank)
    trained = adapters or shape.parameters
    tokens = -(-layout.tokens // layout.sequence_parallel)
    models = layout.master * (2 if layout.critic else 1)
    gathered = layout.compute * (2 * (shape.layer + adapters // shape.layers) + shape.ends) if layout.ranks > 1 else 0
    chunk = 4 * min(tokens, CHUNK) * shape.vocab_size * 4  # in fp32 whatever is computed in
    flow = tokens * (3 * shape.inner + 4 * shape.hidden) * layout.compute
    return LearnerMemory(
        weights=models * (shape.parameters + adapters) // layout.ranks,
        gradients=layout.master * trained // layout.ranks,
        moments=2 * models * trained // layout.ranks,
        gathered=gathered,
        activations=activations(shape, tokens, checkpoint=layout.checkpoint, number=layout.compute),
        workspace=max(chunk, flow),
    )


def activations(shape: Shape, tokens: int, *, checkpoint: bool, number: int = 4) -> int:
    """Bytes that the forward pass of T `tokens` keeps for the backward pass; `tests/rl/test_memory.py` counts them in torch.

    With checkpoints a layer keeps its input, D, and one layer at a time is computed again (arXiv 1604.06174, section 3).
    A layer in full keeps these numbers a token (attention is fused: no [T, T]):

        norms        2 (3 D + 1)         input, input / rms, that times the weight (which is read by what follows), 1 / rms
        attention    2 (H + K) d + H     rotated queries and keys, values, output (which is the projection's input), and the
                                         logarithm of the softmax's sum
        MLP          4 F                 gate, silu(gate), up, their product
        outside      3 D + 1 + 2 d       last norm; rotary tables
    """
    layer = 6 * shape.hidden + 2 + 2 * (shape.heads + shape.kv_heads) * shape.head_dim + shape.heads + 4 * shape.inner
    kept = shape.layers * shape.hidden + layer if checkpoint else shape.layers * layer
    return tokens * (kept + 3 * shape.hidden + 1 + 2 * shape.head_dim) * number


LIBRARIES = 33e6
"""Bytes that torch and its libraries take when they first compute, on a CPU."""
HEAP = 1.2
"""Resident bytes of a learner on a CPU for each that lives: glibc keeps freed tensors of up to 32 MB for later. Both constants
were fitted to one learner (6 layers of 512, a vocabulary of 4096, 1024 tokens, torch 2.13, glibc 2.36);
`python -m benchmarks systems plan` tests them on others."""


def on_cpu(shape: Shape, layout: Layout, *, kept: bool = True) -> float:
    """Peak of resident bytes of a learner's process above what its imports took; without `kept`, of those that live."""
    return learner(shape, layout).total * (HEAP if kept else 1.0) + LIBRARIES


def fit(shape: Shape, layout: Layout, limit: float) -> LearnerMemory:
    """Peak memory of a rank that has `limit` bytes; `ValueError` where that is not enough, with what would help."""
    memory = learner(shape, layout)
    if memory.total <= limit:
        return memory
    kept = memory.activations + memory.workspace
    have = memory.total - kept
    if have > limit:
        remedy = f"weights, gradients and moments alone take {gb(have)}: raise learn.ranks or set learn.lora_rank"
    else:
        larger = f"learn.sequence_parallel above {layout.sequence_parallel}, or policy.max_context and learn.max_tokens below {layout.tokens}"
        remedy = f"set {larger}" if layout.checkpoint else f"set learn.checkpoint_activations=true, {larger}"
    raise ValueError(
        f"learn.max_tokens={layout.tokens} needs {gb(kept)} of activations, {gb(memory.total)} with what {layout.ranks} ranks share, "
        f"and a rank has {gb(limit)}; {remedy}"
    )


USED = 0.9
"""Share of a GPU's memory that an engine may use; vLLM's default `gpu_memory_utilization`."""
RESERVED = 3e9
"""Bytes of a GPU beside weights and KV: activations, CUDA graphs. A guess; vLLM measures it when it starts."""


@dataclass(frozen=True, kw_only=True)
class EngineMemory:
    """What a replica holds, bytes over all its GPUs."""

    weights: int
    kv: int
    """Left for KV."""
    episodes: int
    """Episodes of the longest context that fit into that."""
    tokens: int
    """KV budget in tokens, at the bytes per token of such an episode."""


def engine(
    shape: Shape, *, tensor_parallel: int, memory: float, context: int, number: int = 2, used: float = USED
) -> EngineMemory:
    """A replica on `tensor_parallel` GPUs of `memory` bytes, of which it uses a share: KV gets what weights leave. With more GPUs than key heads those
    are held several times, which a K that divides evenly avoids."""
    copies = max(1, tensor_parallel // shape.kv_heads)
    kv = max(0, int(tensor_parallel * (used * memory - RESERVED)) - shape.parameters * number)
    one = shape.kv_bytes(context, number) * copies
    return EngineMemory(weights=shape.parameters * number, kv=kv, episodes=kv // one, tokens=kv * context // one)


def gb(amount: float) -> str:
    """Bytes for people: GB, or MB below one."""
    return f"{amount / 1e9:.1f} GB" if amount >= 1e9 else f"{amount / 1e6:.0f} MB"
