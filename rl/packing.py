"""Which rows are computed together, and how a model reads them: padded side by side, or one behind the other.

What it is: `Sharing` deals rows to ranks and cuts each rank's into micro-batches, as many on every rank; `Padded` and
`Packed` are the two ways in which `[B, T]` tensors pass through a model. Pure functions of lengths and tensors.

What it does not do: it knows no process group and no loss. Losses always see `[B, T]`, one line a row.

A pack of rows of 3 and 2 tokens, as `Packed` gives it to the model::

    [B, T]   [[11, 12, 13],            token_ids     [1, N]   [[11, 12, 13, 21, 22]]
              [21, 22,  0]]            position_ids  [1, N]   [[ 0,  1,  2,  0,  1]]

Positions that begin again mark the rows: attention (`rl/attention.py`) is within them, and within the window in layers
that have one.

Costs. n tokens cost n + `pair_cost` n^2, in units of a token's matrix products. Each row goes, largest first, to the
cheapest place that holds it (LPT; Graham, *Bounds on Multiprocessing Timing Anomalies*, 1969). Packs of like cost are
computed at the same time: ranks wait for one another in every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf
from typing import Any

import torch
from torch import Tensor

Cut = list[list[int]]
"""The micro-batches of one rank, as indices of rows."""


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """How rows are shared out, and which share is taken."""

    packed: bool = False
    """Rows are packed, not padded."""
    ranks: int = 1
    rank: int = 0
    pair_cost: float = 0.0
    """Cost of a pair of tokens (attention) in units of that of a token (matrix products)."""

    def all(self, lengths: Sequence[int], max_tokens: int) -> list[Cut]:
        """Rows of `lengths` positions -> the micro-batches of each rank, the same number on every rank.

        A micro-batch is a single row, or has at most `max_tokens` positions: those of its rows together where they are
        packed, else their number times the longest. It is empty where a rank has nothing to do while others have.
        """
        if not lengths:
            return [[] for _ in range(self.ranks)]
        if self.packed:
            return _deal(_packs(lengths, max_tokens, self), lengths, self)
        rows = _largest_first(lengths, self.ranks, inf, self)
        assert rows is not None
        cuts = [_buckets(sorted(mine), lengths, max_tokens) for mine in rows]
        return [cut + [[] for _ in range(max(map(len, cuts)) - len(cut))] for cut in cuts]

    def mine(self, lengths: Sequence[int], max_tokens: int) -> Cut:
        """The micro-batches of `rank`."""
        return self.all(lengths, max_tokens)[self.rank]

    def cost(self, length: int) -> float:
        """Of a row."""
        return length + self.pair_cost * length**2


def _largest_first(lengths: Sequence[int], places: int, room: float, sharing: Sharing) -> list[list[int]] | None:
    """Rows in `places` of `room` positions (or with a single row), or None where one finds no place."""
    content: list[list[int]] = [[] for _ in range(places)]
    filled, cost = [0] * places, [0.0] * places
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        free = [p for p in range(places) if not content[p] or filled[p] + lengths[i] <= room]
        if not free:
            return None
        place = min(free, key=cost.__getitem__)
        content[place].append(i)
        filled[place] += lengths[i]
        cost[place] += sharing.cost(lengths[i])
    return content


def _packs(lengths: Sequence[int], max_tokens: int, sharing: Sharing) -> list[list[int]]:
    """As many packs on every rank, as few as largest-first finds room in."""
    rounds = ceil(sum(lengths) / (sharing.ranks * max_tokens))
    while (packs := _largest_first(lengths, rounds * sharing.ranks, max_tokens, sharing)) is None:
        rounds += 1
    return packs


def _deal(packs: list[list[int]], lengths: Sequence[int], sharing: Sharing) -> list[Cut]:
    """Packs in rounds of like cost, the most expensive first; every other round begins with the last rank."""
    ranks = sharing.ranks
    order = sorted(packs, key=lambda pack: -sum(sharing.cost(lengths[i]) for i in pack))
    rounds = [order[at : at + ranks] for at in range(0, len(order), ranks)]
    return [[r[rank if k % 2 == 0 else -1 - rank] for k, r in enumerate(rounds)] for rank in range(ranks)]


def _buckets(rows: Sequence[int], lengths: Sequence[int], max_tokens: int) -> Cut:
    """Rows in order of length, cut so that longest x count stays within `max_tokens`."""
    cut: Cut = []
    for i in sorted(rows, key=lengths.__getitem__):
        if cut and lengths[i] * (len(cut[-1]) + 1) <= max_tokens:
            cut[-1].append(i)
        else:
            cut.append([i])
    return cut


class Padded:
    """`[B, T]` as it is: rows are padded on the right, so causal attention needs no mask."""

    def pack(self, x: Tensor) -> Tensor:
        """What the model reads of `x`."""
        return x

    def unpack(self, y: Tensor) -> Tensor:
        """The inverse of `pack`, for what the model gives."""
        return y

    def arguments(self) -> dict[str, Any]:
        """What the model's forward needs beside its input."""
        return {}


class Packed(Padded):
    """The positions inside of rows one behind the other, `[1, N]`."""

    def __init__(self, inside: Tensor) -> None:
        """`inside` [B, T] bool: false at padding."""
        self.inside = inside
        self.positions = inside.cumsum(1)[inside].unsqueeze(0) - 1
        self._masks: dict[int | None, Tensor] = {}

    def pack(self, x: Tensor) -> Tensor:
        """[B, T] -> [1, N]."""
        return x[self.inside].unsqueeze(0)

    def unpack(self, y: Tensor) -> Tensor:
        """[1, N] -> [B, T], 0 at padding."""
        return y.new_zeros(self.inside.shape).masked_scatter(self.inside, y)

    def arguments(self) -> dict[str, Any]:
        """Positions that begin again at every row, and this, for `rl.attention.attend`."""
        return {"position_ids": self.positions, "layout": self}

    def bounds(self) -> tuple[Tensor, int]:
        """Where rows begin, and N at last [rows + 1] (int32); the longest."""
        begins = (self.positions[0] == 0).nonzero().squeeze(1)
        bounds = torch.cat((begins, begins.new_tensor([self.positions.shape[1]]))).to(torch.int32)
        return bounds, int(bounds.diff().max())

    def mask(self, window: int | None) -> Tensor:
        """[1, 1, N, N] bool: whether a token (third axis) sees another: of its row, not behind it, less than `window`
        before it."""
        if window not in self._masks:
            row = (self.positions[0] == 0).cumsum(0)
            at = torch.arange(len(row), device=row.device)
            before = at[:, None] - at
            sees = (row[:, None] == row) & (before >= 0) & (before < (window or inf))
            self._masks[window] = sees[None, None]
        return self._masks[window]

    def to_heads(self, x: Tensor) -> Tensor:
        """[1, H, n, D] -> what attention needs: all tokens of some heads."""
        return x

    def to_tokens(self, x: Tensor) -> Tensor:
        """The way back of attention's output, [1, N, H, D]."""
        return x
