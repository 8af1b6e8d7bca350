"""From groups to padded tensors: advantages, filters, and the loss mask, which is built here and nowhere else.

What it is: `rows_of` turns groups of trajectories into `Row`s (one per branch) and says in a `BatchReport` what it left
out; `microbatches` makes tensors of rows that are computed together.

What it does not do: it computes no loss, issues no warnings and decides nothing about staleness bounds of the loop
(`rl/admission.py`); which rows are computed together is `rl/packing.py`'s.

Alignment. Column t of a micro-batch holds what is known when token t has been read and token t + 1 is to be predicted.
One row whose prompt is `5 6`, whose turn is `17 2`, then an observation `8` and a second turn `9`::

    row         token_ids  [   5,    6,   17,    2,    8,    9]
                loss_mask  [   0,    0,    1,    1,    0,    1]
                logprobs   [   0,    0, -0.1, -0.9,    0, -0.5]
    micro-batch token_ids  [   5,    6,   17,    2,    8      ]    what the model reads
                targets    [   6,   17,    2,    8,    9      ]    what it should predict there
                mask       [   0,    1,    1,    0,    1      ]    1 where the target was sampled
                behaviour  [   0, -0.1, -0.9,    0, -0.5      ]
                advantages [   A,    A,    A,    A,    A      ]

What follows the last sampled token of a row is cut: causal attention makes it irrelevant. Padding is 0 with mask 0.

Departures from the paper of `cwm`:

1. Its gibberish rule is written for its vocabulary: id > 100000 and log-prob < -ln(128256) - 2. Here the second is
   -ln V - 2, and the first the recipe's `gibberish_id` or the same share of V, which gives CWM's two numbers at
   V = 128256.
2. Trajectories that a filter removes still count in the baseline of their group (prime-rl does so; the paper
   does not say).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import log

import torch
from torch import Tensor

from agents.trajectory import Group, Trajectory
from rl.advantages import Algorithm, batch_advantages
from rl.packing import Sharing

ALONE = Sharing()
CWM_VOCABULARY = 128_256
CWM_RARE_ID = 100_000
ZERO = 1e-9
"""Advantages up to this size count as zero (rounding of a weighted mean)."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One branch of a kept trajectory with its advantage: four parallel lists and a number."""

    token_ids: Sequence[int]
    loss_mask: Sequence[int]
    """1 where the policy sampled the token."""
    logprobs: Sequence[float]
    """Behaviour log-probabilities, nats, where the mask is 1."""
    versions: Sequence[int]
    advantage: float
    """Of every action token; the trajectory's return until a critic has given each its own (`advantages`)."""
    advantages: Sequence[float] | None = None
    """Of each action token."""
    values: Sequence[float] | None = None
    """What the critic expected before each action token, when it began the batch."""
    returns: Sequence[float] | None = None
    """What it should have expected (`rl.advantages.gae`)."""
    old: Sequence[float] | None = None
    """Log-probabilities under the weights that began the batch, where the loss corrects the mismatch with `logprobs`."""
    trajectory: str = ""
    """Names the trajectory: rows of one trajectory share it and count once in a constant normaliser."""

    @property
    def action_tokens(self) -> int:
        """Sampled tokens of this branch."""
        return sum(self.loss_mask)


@dataclass(kw_only=True)
class BatchReport:
    """What became of the trajectories of a batch."""

    groups: int = 0
    live_groups: int = 0
    """Groups with two different returns: only these carry a signal."""
    trajectories: int = 0
    kept: int = 0
    """Trajectories in the gradient: kept + sum of dropped = trajectories."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason (infra, empty, stale, gibberish, zero_advantage) -> trajectories; the first that applies, in this
    order."""
    dropped_groups: dict[str, str] = field(default_factory=dict)
    """Group id -> most frequent reason, for groups none of whose trajectories was kept."""
    rows: int = 0
    tokens: int = 0
    """Tokens of the kept rows."""
    action_tokens: int = 0
    """Sampled tokens of the kept rows."""
    solve_rate: float = 0.0
    """Share of graded trajectories with outcome `resolved`."""
    reward: float = 0.0
    """Mean return of the graded trajectories."""
    turns: float = 0.0
    """Mean turns of the graded trajectories."""
    branches: float = 0.0
    """Mean branches of the graded trajectories."""
    staleness_mean: float = 0.0
    """Mean over kept trajectories of version - oldest version."""
    staleness_max: int = 0
    stops: dict[str, int] = field(default_factory=dict)
    """Stop reason -> trajectories."""


def is_gibberish(trajectory: Trajectory, vocabulary: int = CWM_VOCABULARY, rare: int | None = None) -> bool:
    """Whether some sampled token is rare (id > `rare`, or 0.78 V) and far below chance (log-prob < -ln V - 2), the rule
    of `cwm`."""
    rare, floor = vocabulary * CWM_RARE_ID // CWM_VOCABULARY if rare is None else rare, -log(vocabulary) - 2
    return any(
        mask and token > rare and logprob < floor
        for s in trajectory.segments
        for token, mask, logprob in zip(s.token_ids, s.loss_mask, s.logprobs, strict=True)
    )


def rows_of(
    groups: Sequence[Group],
    algorithm: Algorithm,
    version: int,
    *,
    vocabulary: int = CWM_VOCABULARY,
    shuffled: random.Random | None = None,
) -> tuple[list[Row], BatchReport]:
    """Rows to train on, and a report.

    Args:
        groups: finished groups. Trajectories without a reward (infra) or without a sampled token enter neither baseline
            nor gradient.
        algorithm: baseline, scale and filters. A `batch_std` is that of all groups, before the filters.
        version: version of the weights that are about to be trained; ages are counted from it.
        vocabulary: V, for the gibberish rule.
        shuffled: the negative control. The advantages are permuted over the kept trajectories of the batch: same sizes,
            same tokens, no information. A run that still learns under it learns from something else. (With a critic: the
            returns.)
    """
    report = BatchReport(groups=len(groups))
    kept: list[tuple[str, Trajectory, float]] = []
    for group, advantages in zip(groups, _advantages(groups, algorithm), strict=True):
        reasons: Counter[str] = Counter()
        report.live_groups += len({group.trajectories[i].reward for i in advantages}) > 1
        for index, trajectory in enumerate(group.trajectories):
            advantage = advantages.get(index, 0.0)
            reason = _reason(trajectory, advantage, algorithm, version, vocabulary)
            if reason is None:
                kept.append((f"{group.id}/{index}", trajectory, advantage))
            else:
                reasons[reason] += 1
        if reasons.total() == len(group.trajectories):
            report.dropped_groups[group.id] = reasons.most_common(1)[0][0] if reasons else "empty"
        report.dropped = dict(Counter(report.dropped) + reasons)
    if shuffled is not None:
        permuted = [a for _, _, a in kept]
        shuffled.shuffle(permuted)
        kept = [(name, t, a) for (name, t, _), a in zip(kept, permuted, strict=True)]
    rows = [row for name, t, a in kept for row in _rows(name, t, a)]
    _describe(report, groups, [t for _, t, _ in kept], rows, version)
    return rows, report


def _advantages(groups: Sequence[Group], algorithm: Algorithm) -> list[dict[int, float]]:
    """For each group: index in it -> advantage, of the trainable trajectories."""
    members = [
        [
            (i, t.reward, t.action_tokens)
            for i, t in enumerate(g.trajectories)
            if t.reward is not None and t.action_tokens
        ]
        for g in groups
    ]
    returns, lengths = [[r for _, r, _ in m] for m in members], [[n for _, _, n in m] for m in members]
    advantages = batch_advantages(returns, lengths, algorithm)
    return [{i: a for (i, _, _), a in zip(m, v, strict=True)} for m, v in zip(members, advantages, strict=True)]


def _reason(t: Trajectory, advantage: float, algorithm: Algorithm, version: int, vocabulary: int) -> str | None:
    """Why a trajectory is left out of the gradient, or None."""
    if t.reward is None:
        return "infra"
    if t.action_tokens == 0:
        return "empty"
    if algorithm.filter_stale is not None and version - t.newest_version > algorithm.filter_stale:
        return "stale"
    if algorithm.filter_gibberish and is_gibberish(t, vocabulary, algorithm.gibberish_id):
        return "gibberish"
    if algorithm.filter_zero_advantage and abs(advantage) <= ZERO:
        return "zero_advantage"
    return None


def _rows(name: str, trajectory: Trajectory, advantage: float) -> list[Row]:
    """One row for each branch with a sampled token."""
    rows = []
    for s in trajectory.segments:
        if not any(s.loss_mask):
            continue
        assert not s.loss_mask[0], f"trajectory {name} begins with a sampled token: nothing predicts it"
        rows.append(
            Row(
                token_ids=s.token_ids,
                loss_mask=s.loss_mask,
                logprobs=s.logprobs,
                versions=s.versions,
                advantage=advantage,
                trajectory=name,
            )
        )
    return rows


def _describe(
    report: BatchReport, groups: Sequence[Group], kept: Sequence[Trajectory], rows: Sequence[Row], version: int
) -> None:
    """Fill in the figures of `report`."""
    everything = [t for g in groups for t in g.trajectories]
    graded = [t for t in everything if t.reward is not None]
    ages = [max(0, version - t.oldest_version) for t in kept]
    report.trajectories, report.kept, report.rows = len(everything), len(kept), len(rows)
    report.tokens = sum(len(r.token_ids) for r in rows)
    report.action_tokens = sum(r.action_tokens for r in rows)
    report.stops = dict(Counter(t.stop for t in everything))
    report.staleness_max = max(ages, default=0)
    report.staleness_mean = sum(ages) / max(1, len(ages))
    report.solve_rate = sum(t.outcome == "resolved" for t in graded) / max(1, len(graded))
    report.reward = sum(t.reward or 0.0 for t in graded) / max(1, len(graded))
    report.turns = sum(t.turns for t in graded) / max(1, len(graded))
    report.branches = sum(len(t.segments) for t in graded) / max(1, len(graded))


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Right-padded rows; see the drawing at the top for the alignment."""

    token_ids: Tensor
    """[B, T] int64: what the model reads."""
    targets: Tensor
    """[B, T] int64: the next token."""
    mask: Tensor
    """[B, T] float32: 1 where the target was sampled by the policy."""
    behaviour: Tensor
    """[B, T] float32: log-probability of the target when it was sampled, nats."""
    old: Tensor | None
    """[B, T] float32: the same under the weights that began the batch, where the rows have it."""
    advantages: Tensor
    """[B, T] float32."""
    inside: Tensor
    """[B, T] bool: false at padding."""
    values: Tensor | None
    """[B, T] float32: the critic's estimate before the target, at the beginning of the batch, where the rows have it."""
    returns: Tensor | None
    """[B, T] float32: the critic's target, likewise."""
    lengths: Tensor
    """[B] float32: action tokens of the row's trajectory, over all its branches."""
    action_tokens: int
    """Sum of the mask."""


def by_trajectory(rows: Sequence[Row]) -> list[list[int]]:
    """Indices of the rows of each trajectory, in their order; a row without a name is one of its own."""
    found: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        found.setdefault(row.trajectory or f"row {i}", []).append(i)
    return list(found.values())


def microbatches(rows: Sequence[Row], max_tokens: int, sharing: Sharing = ALONE) -> list[MicroBatch]:
    """Those of `sharing.rank`, of at most `max_tokens` positions each, over the rows with a sampled token: all rows of their
    trajectories.

    Raises `ValueError` where a single row is longer than `max_tokens`.
    """
    said = {i: sum(rows[j].action_tokens for j in members) for members in by_trajectory(rows) for i in members}
    actions = [said[i] for i, r in enumerate(rows) if r.action_tokens]
    rows = [r for r in rows if r.action_tokens]
    lengths = [_positions(r) for r in rows]
    if max(lengths, default=0) > max_tokens:
        raise ValueError(
            f"max_tokens={max_tokens} is less than a row of {max(lengths)} tokens; raise it to the context of the policy"
        )
    cut = sharing.mine(lengths, max_tokens)
    return [_pad([rows[i] for i in bunch], [actions[i] for i in bunch]) for bunch in cut]


def _positions(row: Row) -> int:
    """Columns that a row needs: those before its last sampled token."""
    return max(i for i, m in enumerate(row.loss_mask) if m)


def _pad(rows: Sequence[Row], actions: Sequence[int]) -> MicroBatch:
    """Tensors of rows, of trajectories of so many action tokens; those of no row are one position of padding."""
    shape = (max(1, len(rows)), max((_positions(r) for r in rows), default=1))
    ids, targets = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    mask, behaviour, advantages = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape)
    inside = torch.zeros(shape, dtype=torch.bool)
    old, values, returns = (_column(rows, shape, name) for name in ("old", "values", "returns"))
    for i, row in enumerate(rows):
        n = _positions(row)
        ids[i, :n] = torch.tensor(row.token_ids[:n])
        targets[i, :n] = torch.tensor(row.token_ids[1 : n + 1])
        mask[i, :n] = torch.tensor(row.loss_mask[1 : n + 1], dtype=torch.float32)
        behaviour[i, :n] = torch.tensor(row.logprobs[1 : n + 1], dtype=torch.float32)
        advantages[i, :n] = row.advantage if row.advantages is None else torch.tensor(row.advantages[1 : n + 1])
        inside[i, :n] = True
    return MicroBatch(
        token_ids=ids,
        targets=targets,
        mask=mask,
        behaviour=behaviour,
        old=old,
        advantages=advantages,
        inside=inside,
        values=values,
        returns=returns,
        lengths=torch.tensor(list(actions) or [1], dtype=torch.float32),
        action_tokens=int(mask.sum()),
    )


def _column(rows: Sequence[Row], shape: tuple[int, int], name: str) -> Tensor | None:
    """[B, T]: what a field of the rows holds for their targets; None where they have none."""
    if not rows or getattr(rows[0], name) is None:
        return None
    table = torch.zeros(shape)
    for i, row in enumerate(rows):
        n = _positions(row)
        table[i, :n] = torch.tensor(getattr(row, name)[1 : n + 1])
    return table
