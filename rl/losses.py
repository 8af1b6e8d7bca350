"""Losses as pure functions: token log-probabilities without a `[B T, V]` table, and the clipped policy loss.

What it is: `token_logprobs` (chunked over tokens), `normaliser` (what the summed loss of one update is divided by) and
`policy_loss`. Nothing here keeps state, knows a model or calls an optimiser.

What it does not do: no KL term, no entropy bonus, no value loss, no correction of the sampler's mismatch beyond the
ratio itself.

Sources: clipping is PPO (arXiv 1707.06347, equation 7) with the two sides apart as in DAPO (arXiv 2503.14476, section
3.1); sequence ratios are GSPO (arXiv 2507.18071, equation 7); k3 is Schulman, *Approximating KL Divergence* (2020).
Departures:

1. The log-ratio is held in [-20, 20] before `exp` (as verl does): e^20 is outside every clip, and inf x 0 is NaN.
2. A sequence ratio is per row, i.e. per branch; GSPO knows no branches. Each action token carries it, so that with
   `aggregation="token"` long rows weigh more than in GSPO, which averages rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from rl.advantages import Algorithm

LOG_RATIO_LIMIT = 20.0
CHUNK = 4096
"""Tokens whose logits exist at a time; at V = 128256 in fp32 a chunk takes 2.1 GB."""


def token_logprobs(
    hidden: Tensor, head: Tensor, targets: Tensor, mask: Tensor | None = None, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Log-probability (nats, temperature 1) of each target, and the entropy of each distribution.

    Args:
        hidden: [B, T, D] last hidden states.
        head: [V, D] weight of the language-model head.
        targets: [B, T] token ids.
        mask: [B, T]; where given, only positions with a non-zero mask are computed and the others are 0.
        chunk: positions at a time. The logits of a chunk are dropped after the forward pass and computed again in the
            backward pass, so memory for logits is chunk x V instead of B x T x V.

    Returns:
        log-probabilities [B, T] (differentiable) and entropies [B, T] (nats, detached), both fp32 or wider.
    """
    flat, ids = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    keep = None if mask is None else mask.reshape(-1).nonzero().squeeze(-1)
    if keep is not None:
        flat, ids = flat[keep], ids[keep]
    logprobs, entropies = [], []
    for h, y in zip(flat.split(chunk), ids.split(chunk), strict=True):
        if len(flat) <= chunk:  # one chunk: what it keeps is within the bound
            logprob, entropy = _chunk_logprobs(h, head, y)
        else:
            logprob, entropy = checkpoint(_chunk_logprobs, h, head, y, use_reentrant=False, preserve_rng_state=False)
        logprobs.append(logprob)
        entropies.append(entropy.detach())
    logprob, entropy = torch.cat(logprobs), torch.cat(entropies)
    if keep is not None:
        zeros = logprob.new_zeros(targets.numel())
        logprob, entropy = zeros.index_put((keep,), logprob), zeros.index_put((keep,), entropy)
    return logprob.view(targets.shape), entropy.view(targets.shape)


def _chunk_logprobs(hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """[n, D], [V, D], [n] -> log-probabilities [n], entropies [n]."""
    logits = linear(hidden, head)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    table = logits.log_softmax(-1)
    with torch.no_grad():
        entropy = -(table.exp() * table).sum(-1)
    return table.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropy


def normaliser(algorithm: Algorithm, action_tokens: int, trajectories: int, context: int) -> float:
    """What the summed loss of one update is divided by.

    `action_tokens` and `trajectories` are those of the whole update (over micro-batches and ranks); `context` is the
    longest context of the recipe, in tokens. `token`: action tokens. `constant`: context x trajectories, whatever their
    lengths.
    """
    if algorithm.aggregation == "token":
        return float(max(1, action_tokens))
    return float(context * max(1, trajectories))


def policy_loss(
    logprobs: Tensor,
    behaviour: Tensor,
    advantages: Tensor,
    mask: Tensor,
    algorithm: Algorithm,
    normaliser: float,
    entropy: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Clipped policy-gradient loss: -sum_t M min(rho A, clip(rho, 1 - low, 1 + high) A) / normaliser.

    rho = exp(logprobs - behaviour) per token, or exp of its mean over the action tokens of a row. As every micro-batch
    of an update is given the same normaliser, their losses and gradients add up to those of the update.

    Args:
        logprobs: [B, T] log-probabilities of the targets under the weights in training, nats, differentiable.
        behaviour: [B, T] log-probabilities when they were sampled.
        advantages: [B, T].
        mask: [B, T], 1 where the target was sampled; nothing else enters, whatever the other tensors hold there.
        algorithm: its `ratio` and clips.
        normaliser: of the whole update, see `normaliser`.
        entropy: [B, T], only reported.

    Returns:
        loss (scalar) and means over this call's action tokens: `ratio`, `clip_low` and `clip_high` (share of tokens
        whose gradient the clip removed on that side), `mismatch_kl` (k3 estimate of KL(behaviour || current), nats per
        token), `entropy` (nats).
    """
    inside = mask > 0
    log_ratio = torch.where(inside, logprobs - behaviour, 0.0).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    advantages = torch.where(inside, advantages, 0.0)
    ratio = (log_ratio if algorithm.ratio == "token" else _row_means(log_ratio, inside)).exp()
    low, high = 1 - algorithm.clip_low, 1 + algorithm.clip_high
    objective = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    loss = -objective.sum() / normaliser
    with torch.no_grad():
        columns = {
            "ratio": ratio,
            "clip_low": (ratio < low) & (advantages < 0),
            "clip_high": (ratio > high) & (advantages > 0),
            "mismatch_kl": log_ratio.exp() - 1 - log_ratio,
        }
        if entropy is not None:
            columns["entropy"] = entropy
        means = torch.stack([torch.where(inside, c.to(loss.dtype), 0.0).sum() for c in columns.values()])
        means = means / inside.sum().clamp(min=1)
    return loss, dict(zip(columns, means.tolist(), strict=True))


def _row_means(values: Tensor, inside: Tensor) -> Tensor:
    """[B, T] -> [B, T]: at each inside position the mean over the inside positions of its row, elsewhere 0."""
    means = values.sum(-1, keepdim=True) / inside.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(inside, means, 0.0)
