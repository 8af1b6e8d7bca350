"""The critic of `ppo`: a value model, the advantages that follow from its values, and its updates.

What it is: `ValueModel` (the policy's architecture with a scalar for a head), `valued` (rows and values → rows with an
advantage and a target per action token), and what `rl.network.Network` needs to train the one with the other: `values_of`,
`loss_of`.

What it does not do: it samples nothing, and no gradient passes between it and the policy: a trunk of its own, which begins
as the policy's, so that neither loss has to be weighed against the other (as in verl and OpenRLHF; PPO's paper, arXiv
1707.06347, section 5, allows both). The head begins at zero, so that before its first update every value is 0.

A value is asked for before each action token: what return is to be expected, given all tokens before it. Values, advantages
and targets are computed once, when a batch begins, and stay as they are for all its updates. Among ranks each computes the
values of its share, and then has all: advantages, whitening and `quality` are of the whole batch on every one.

Branches. The rows of a trajectory are its branches in the order in which they were played, and each action token is in one of
them. GAE runs over all of them in that order, as over one list: the value that follows the last action of a branch is
that of the first action of the next, in its own context. The return is earned by the last action of the last one.
However an episode ended (submitted, or at a limit of turns or tokens), nothing follows: there is no value behind the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from rl.advantages import Algorithm, batch_scaled, gae
from rl.batch import MicroBatch, Row, by_trajectory
from rl.losses import value_loss
from rl.network import Loss
from rl.packing import Padded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ValueModel(nn.Module):
    """The trunk of a causal language model with one number per position instead of logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        """`model`: its trunk is taken, its head left behind."""
        super().__init__()
        self.model = model.model
        self.head = nn.Linear(model.config.hidden_size, 1, device=model.device, dtype=model.dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, token_ids: Tensor, **layout: Any) -> Tensor:
        """[B, T] ids → [B, T] values: the return to be expected when the tokens up to there have been read. In fp32 or wider."""
        hidden = self.model(input_ids=token_ids, use_cache=False, **layout).last_hidden_state
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return linear(hidden.to(wide), self.head.weight.to(wide), self.head.bias.to(wide)).squeeze(-1)


def valued(rows: Sequence[Row], values: Sequence[Sequence[float]], algorithm: Algorithm) -> list[Row]:
    """Rows with `values`, GAE's `advantages` and `returns`; under `scale="batch_std"` the advantages are whitened.

    Args:
        rows: of one batch; those of a trajectory in the order of its branches. `Row.advantage` is its return.
        values: one list per row, as long as the row; read at action tokens.
        algorithm: its `gae_decay` and `scale`.
    """
    found = list(rows)
    for members in by_trajectory(rows):
        estimates = [v for i in members for v, m in zip(values[i], rows[i].loss_mask, strict=True) if m]
        rewards = [0.0] * len(estimates)
        rewards[-1:] = [rows[members[0]].advantage] if estimates else []
        of_actions = zip(*gae(rewards, estimates, [1] * len(estimates), decay=algorithm.gae_decay), strict=True)
        for i in members:
            pairs = [next(of_actions) if m else (0.0, 0.0) for m in rows[i].loss_mask]
            advantages, targets = [a for a, _ in pairs], [r for _, r in pairs]
            found[i] = replace(rows[i], values=values[i], advantages=advantages, returns=targets)
    return whitened(found) if algorithm.scale == "batch_std" else found


def whitened(rows: Sequence[Row]) -> list[Row]:
    """(A - mean) / (std + 1e-4), mean and std over the action tokens of all rows (`rl.advantages.batch_scaled`)."""
    flat = [a for row in rows for a, m in zip(row.advantages or (), row.loss_mask, strict=True) if m]
    scaled = iter(batch_scaled(flat, [1] * len(flat)))
    return [replace(row, advantages=[next(scaled) if m else 0.0 for m in row.loss_mask]) for row in rows]


def quality(rows: Sequence[Row]) -> dict[str, float]:
    """Of valued rows, over action tokens: `value` (mean) and `explained_variance` of the returns of their trajectories.

    1 - Var(R - V) / Var(R); 1 is a critic that knows every return beforehand, 0 one that knows their mean. R is what was
    really returned, not GAE's target, which contains V; 0 where all returns are equal.
    """
    pairs = [(row.advantage, v) for row in rows for v, m in zip(row.values or (), row.loss_mask, strict=True) if m]
    if not pairs:
        return {}
    returns, values = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    spread = float(returns.var(correction=0))
    explained = 1 - float((returns - values).var(correction=0)) / spread if spread else 0.0
    return {"value": float(values.mean()), "explained_variance": explained}


def values_of(
    model: ValueModel, layout: Padded, token_ids: Tensor, targets: Tensor, mask: Tensor | None
) -> tuple[Tensor]:
    """[B, T] → the value before each target; see `rl.network.Forward`."""
    return (layout.unpack(model.forward(layout.pack(token_ids), **layout.arguments())),)


def loss_of(rows: Sequence[Row], clip: float) -> Loss:
    """Half the mean squared error over the action tokens of valued rows, clipped (`rl.losses.value_loss`)."""
    tokens = sum(row.action_tokens for row in rows)

    def loss(batch: MicroBatch, values: Tensor) -> tuple[Tensor, dict[str, float]]:
        assert batch.values is not None and batch.returns is not None, "rows without values: see `valued`"
        return value_loss(values, batch.values, batch.returns, batch.mask, clip, tokens), {}

    return loss
