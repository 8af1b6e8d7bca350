"""A model under training, by one process or several: the policy is one, a critic another.

What it is: `forward` takes `[B, T]` tensors through the model, `scan` does so with whole sequences and without gradient,
`update` is one optimiser update on rows, accumulated over micro-batches. Among ranks each of them is a collective: all are
given all rows, and take their share.

What it does not do: it knows no loss and no algorithm, and doesn't say when it learns (`rl/learner.py`).

Formula of the optimiser: AdamW (arXiv 1711.05101, algorithm 2); decay is applied to matrices only. An update whose loss
or gradient norm isn't finite leaves weights and optimiser as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rl import shards
from rl.batch import MicroBatch, Row, microbatches
from rl.packing import Sharing
from rl.ranks import Alone, whole
from rl.updates import LearnConfig

BETAS = (0.9, 0.95)
"""AdamW's decay rates of the two moments."""

Forward = Callable[..., tuple[Tensor, ...]]
"""(model, layout, token_ids, targets, mask), the last three [B, T], → numbers of each target, [B, T]. `layout` is how the model
reads rows (`rl/packing.py`); mask is None, or 0 where nothing is asked."""

Loss = Callable[..., tuple[Tensor, dict[str, float]]]
"""(micro-batch, *what the forward gave) → its share of the update's loss, and means over its action tokens."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """What one update was like."""

    loss: float
    grad_norm: float
    """Before clipping."""
    positions: int
    """Computed, padding included."""
    metrics: dict[str, float]
    """Means over action tokens."""

    @property
    def finite(self) -> bool:
        """Whether it was done."""
        return isfinite(self.loss) and isfinite(self.grad_norm)


class Network:
    """A model, the way through it, and its optimiser."""

    def __init__(self, model: Any, forward: Forward, config: LearnConfig, ranks: Alone, sharing: Sharing) -> None:
        """model: with its weights; `forward`: as `rl.ranks.Alone.shard` returned it for that model."""
        self.model, self._forward, self.config, self.ranks, self.sharing = model, forward, config, ranks, sharing
        self.optimizer = _optimizer(model, config)

    def forward(
        self, token_ids: Tensor, targets: Tensor, inside: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """[B, T] each → what the model's forward gives, on the CPU; `inside` is false at padding."""
        device = self.ranks.device
        layout = self.ranks.layout(inside.to(device), self.sharing.packed)
        wanted = None if mask is None else mask.to(device)
        return tuple(y.cpu() for y in self._forward(layout, token_ids.to(device), targets.to(device), wanted))

    @torch.no_grad()
    def scan(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """The first of `forward`'s numbers for each token, given those before it; 0.0 for the first. Nothing is cached."""
        out: list[list[float]] = [[0.0] * len(s) for s in sequences]
        long = [i for i, s in enumerate(sequences) if len(s) > 1]
        lengths = [len(sequences[i]) for i in long]
        for bunch in self.sharing.mine(lengths, self.config.max_tokens):
            rows = [torch.tensor(list(sequences[long[i]])) for i in bunch] or [torch.zeros(2, dtype=torch.int64)]
            ids = pad_sequence(rows, batch_first=True)
            inside = pad_sequence([torch.ones(len(row) - 1, dtype=torch.bool) for row in rows], batch_first=True)
            found = self.forward(ids[:, :-1], ids[:, 1:], inside)[0]
            for row, i in enumerate(bunch):
                out[long[i]][1:] = found[row, : lengths[i] - 1].tolist()
        every = iter(self.ranks.total([x for numbers in out for x in numbers]))
        return [[next(every) for _ in numbers] for numbers in out]

    def update(self, rows: Sequence[Row], loss: Loss, lr: float) -> Update:
        """One optimiser update at the rate `lr`, unless its loss or gradient isn't finite."""
        tokens = sum(row.action_tokens for row in rows)
        sums = {"loss": 0.0, "positions": 0.0}
        for batch in microbatches(rows, self.config.max_tokens, self.sharing):
            share, seen = self._backward(batch, loss)
            sums["loss"] += share
            sums["positions"] += int(batch.inside.sum()) if self.sharing.packed else batch.inside.numel()
            for key, value in seen.items():
                sums[key] = sums.get(key, 0.0) + value * batch.action_tokens / tokens
        metrics = dict(zip(sums, self.ranks.total(list(sums.values())), strict=True))
        norm = float(whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)))
        done = Update(
            loss=metrics.pop("loss"), grad_norm=norm, positions=int(metrics.pop("positions")), metrics=metrics
        )
        if done.finite:
            for parameters in self.optimizer.param_groups:
                parameters["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return done

    def _backward(self, batch: MicroBatch, loss: Loss) -> tuple[float, dict[str, float]]:
        """Forward and backward of one micro-batch; gradients add to those there."""
        share, seen = loss(batch, *self.forward(batch.token_ids, batch.targets, batch.inside, batch.mask))
        share.backward()  # type: ignore[no-untyped-call]
        return float(share.detach()), seen

    def save(self, directory: Path, counters: Mapping[str, Any]) -> None:
        """Weights, optimiser and `counters` into `directory`; see `rl.shards.save`."""
        shards.save(directory, self.model, self.optimizer, counters, alone=self.ranks.alone)

    def load(self, directory: Path, counters: Mapping[str, Any]) -> dict[str, Any]:
        """The inverse of `save`, by any number of ranks; returns the counters. Errors as `rl.shards.load`."""
        return shards.load(directory, self.model, self.optimizer, counters, alone=self.ranks.alone)


def _optimizer(model: torch.nn.Module, config: LearnConfig) -> torch.optim.AdamW:
    """Its rate comes with each update."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=BETAS)
    # Empty moments now, by a step of rate 0 whose count is taken back: left alone, `get_state_dict` takes such a step
    # when a learner without updates is saved, and keeps the count, which would change the bias correction.
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for state in optimizer.state.values():
        state["step"].zero_()
    return optimizer
