"""Attention within packed rows, and packs split over ranks (Ulysses).

What it is: `attend`, registered with `transformers` under `NAME`, computes attention as a layout says; `Split` is the
layout of a pack whose tokens are spread over P ranks. Models are not patched: `use` chooses the function by its name, and
the layout travels with the call, as a keyword.

What it does not do: anything for padded rows; those go through the model's own attention.

Ulysses (Jacobs et al., arXiv 2309.14509, section 3). Outside attention each rank holds N / P tokens. For attention an
all-to-all makes of that all N tokens of 1 / P of the heads, with the whole pack's mask, and another takes it back::

    queries, keys, values   [1, H, N/P, D]  ──►  [1, H/P, N, D]      output   [1, N, H/P, D]  ──►  [1, N/P, H, D]

Log-probabilities are gathered at the end, and every rank computes the loss of the whole pack. Backward, each takes the
gradient of its own tokens alone: parameters then have parts of the gradient that add up to the whole over the ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rl.packing import Packed

NAME = "codeworld_packed"


def use(model: Any) -> None:
    """From now on `model` is called with the arguments of a `Packed` layout."""
    model.set_attn_implementation(NAME)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    layout: Packed,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each token to those of its row, at most `sliding_window` of them, itself included.

    Args:
        module: the attention layer.
        query: [1, H, n, D], for n of the pack's N tokens.
        key: [1, K, n, D] for K key-value heads.
        value: as `key`.
        attention_mask: the layout has its own.
        layout: of the pack.

    Returns [1, n, H, D].
    """
    query, key, value = (layout.to_heads(x) for x in (query, key, value))
    if query.is_cuda and query.dtype == torch.bfloat16:
        output = _varlen(query, key, value, layout, scaling, sliding_window)
    else:
        mask = layout.mask(sliding_window)
        output = sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling)[0]
    return layout.to_tokens(output), None


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, layout: Packed, scaling: float | None, sliding_window: int | None
) -> Tensor:
    """FlashAttention within the bounds of rows: no [N, N] anywhere."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    bounds, longest = layout.bounds()
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    output = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=window, enable_gqa=True)
    return output.unsqueeze(0)  # type: ignore[union-attr]


AttentionInterface.register(NAME, attend)


def check_heads(kv_heads: int, sequence: int) -> None:
    """`ValueError` unless each of `sequence` ranks gets whole key-value heads."""
    if kv_heads % sequence:
        fit = ", ".join(str(n) for n in range(1, kv_heads + 1) if kv_heads % n == 0)
        raise ValueError(
            f"learn.sequence_parallel={sequence} does not divide the {kv_heads} key-value heads of the model; choose one of {fit}"
        )


class Split(Packed):
    """A pack, each rank of `group` holding as many of its tokens, in order."""

    def __init__(self, inside: Tensor, group: dist.ProcessGroup) -> None:
        super().__init__(inside)
        self.group, self.size, self.rank = group, group.size(), group.rank()
        self.tokens = self.positions.shape[1]
        self.missing = -self.tokens % self.size
        self.positions = torch.cat(
            (self.positions, torch.arange(self.missing, device=inside.device)[None]), 1
        )  # a row of padding

    def pack(self, x: Tensor) -> Tensor:
        """[B, T] -> [1, N / P], this rank's tokens."""
        return self._own(pad(super().pack(x), (0, self.missing)))

    def unpack(self, y: Tensor) -> Tensor:
        """[1, N / P] -> [B, T] of all ranks' tokens; backward, this rank's alone."""
        everything: Tensor = _Gather.apply(y, self.group)  # type: ignore[no-untyped-call]
        return super().unpack(everything[:, : self.tokens])

    def arguments(self) -> dict[str, Any]:
        """See `Packed.arguments`."""
        return {"position_ids": self._own(self.positions), "layout": self}

    def to_heads(self, x: Tensor) -> Tensor:
        """[1, H, N / P, D] -> [1, H / P, N, D]."""
        return _Swap.apply(x, self.group, 1, 2)  # type: ignore[no-any-return, no-untyped-call]

    def to_tokens(self, x: Tensor) -> Tensor:
        """[1, N, H / P, D] -> [1, N / P, H, D]."""
        return _Swap.apply(x, self.group, 1, 2)  # type: ignore[no-any-return, no-untyped-call]

    def _own(self, x: Tensor) -> Tensor:
        return x.chunk(self.size, 1)[self.rank]


def _swap(x: Tensor, group: dist.ProcessGroup, scatter: int, join: int) -> Tensor:
    """The all-to-all: dimension `scatter` is cut into P pieces, one for each rank; what comes is joined along `join`."""
    sent = torch.stack(x.chunk(group.size(), scatter))
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return torch.cat(received.unbind(0), join)


class _Swap(torch.autograd.Function):
    """`_swap`, whose gradient takes the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, scatter: int, join: int) -> Tensor:
        ctx.way_back = (group, join, scatter)
        return _swap(x, group, scatter, join)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return _swap(gradient, *ctx.way_back), None, None, None


class _Gather(torch.autograd.Function):
    """[1, n] of each rank -> [1, P n] on all of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        received = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(received, x.contiguous(), group=group)
        return torch.cat(received, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient.chunk(ctx.group.size(), 1)[ctx.group.rank()], None
