"""The critic of `ppo`: a value model, the advantages that follow from its values, and its updates.

What it is: `ValueModel` (the policy's architecture with a scalar for a head), `valued` (rows and values → rows with an
advantage and a target per action token) and `Critic` (a value model and its optimiser, on whatever batches it is given).

What it does not do: it samples nothing, and no gradient passes between it and the policy: a trunk of its own, which begins
as the policy's, so that neither loss has to be weighed against the other (as in verl and OpenRLHF; PPO's paper, arXiv
1707.06347, section 5, allows both). The head begins at zero, so that before its first update every value is 0.

A value is asked for before each action token: what return is to be expected, given all tokens before it. Values, advantages
and targets are computed once, when a batch begins, and stay as they are for all its updates.

Branches. The rows of a trajectory are its branches in the order in which they were played, and each action token is in one of
them. GAE runs over all of them in that order, as over one list: the value that follows the last action of a branch is
that of the first action of the next, in its own context. The return is earned by the last action of the last one.
However an episode ended (submitted, or at a limit of turns or tokens), nothing follows: there is no value behind the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rl import shards
from rl.advantages import Algorithm, batch_scaled, gae
from rl.batch import Row, by_trajectory, microbatches
from rl.losses import value_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ValueModel(nn.Module):
    """The trunk of a causal language model with one number per position instead of logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        """`model`: its trunk is taken, its head left behind."""
        super().__init__()
        self.model = model.model
        self.head = nn.Linear(model.config.hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, token_ids: Tensor) -> Tensor:
        """[B, T] ids → [B, T] values: the return to be expected when the tokens up to there have been read."""
        hidden = self.model(input_ids=token_ids, use_cache=False).last_hidden_state
        values: Tensor = self.head(hidden).squeeze(-1)
        return values


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


class Critic:
    """A value model and its optimiser. `rl.learner.Learner` says when it looks and when it learns."""

    def __init__(
        self, model: ValueModel, optimizer: torch.optim.Optimizer, *, grad_clip: float, max_tokens: int
    ) -> None:
        """`grad_clip`, `max_tokens`: see `rl.updates.LearnConfig`."""
        self.model, self.optimizer = model.train(), optimizer
        self.grad_clip, self.max_tokens = grad_clip, max_tokens

    def _read(self, token_ids: Tensor) -> Tensor:
        """[B, T] ids → [B, T] values, on the CPU wherever the model is."""
        values: Tensor = self.model(token_ids.to(self.model.head.weight.device)).cpu()
        return values

    @torch.no_grad()
    def values(self, rows: Sequence[Row]) -> list[list[float]]:
        """For each row a list of its length: the value before each token; 0.0 for the first."""
        found = [[0.0] * len(row.token_ids) for row in rows]
        waiting = sorted(range(len(rows)), key=lambda i: len(found[i]))
        while waiting:
            width = len(found[waiting[-1]])
            waiting, bunch = waiting[: -max(1, self.max_tokens // width)], waiting[-max(1, self.max_tokens // width) :]
            ids = [torch.tensor(list(rows[i].token_ids)) for i in bunch]
            table = self._read(pad_sequence(ids, batch_first=True)).tolist()
            for i, line in zip(bunch, table, strict=True):
                found[i][1:] = line[: len(found[i]) - 1]
        return found

    def update(self, rows: Sequence[Row], clip: float) -> float | None:
        """One optimiser update on valued rows, accumulated over micro-batches. Returns the loss (half the mean squared
        error over action tokens, see `rl.losses.value_loss`), or None where it or its gradient was not finite: weights and
        optimiser are then as before."""
        batches = microbatches(rows, self.max_tokens)
        tokens, total = sum(b.action_tokens for b in batches), 0.0
        self.optimizer.zero_grad(set_to_none=True)
        for b in batches:
            assert b.values is not None and b.returns is not None, "rows without values: see `valued`"
            loss = value_loss(self._read(b.token_ids), b.values, b.returns, b.mask, clip, tokens)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        if not (torch.isfinite(norm) and torch.isfinite(torch.tensor(total))):
            self.optimizer.zero_grad(set_to_none=True)
            return None
        self.optimizer.step()
        return total

    def save(self, directory: Path) -> None:
        """Weights and optimiser into `directory`."""
        shards.save(directory, self.model, self.optimizer, {})

    def load(self, directory: Path) -> None:
        """The inverse of `save`; errors as `rl.shards.load`."""
        shards.load(directory, self.model, self.optimizer, {})
