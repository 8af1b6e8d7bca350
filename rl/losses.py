"""Losses as pure functions: token log-probabilities without a `[B T, V]` table, the policy loss and the value loss.

What it is: `token_logprobs` (chunked over tokens), `normaliser` (what the summed loss of one update is divided by),
`policy_loss` (ratio x bound x mismatch correction x aggregation of a row of `rl/advantages.py`) and `value_loss`. Nothing
here keeps state, knows a model or calls an optimiser.

What it does not do: no KL term and no entropy bonus; advantages are given (`rl/advantages.py`).

Sources: clipping is PPO (arXiv 1707.06347, equation 7) with the two sides apart as in DAPO (arXiv 2503.14476, section
3.1); dual clip is arXiv 1912.09729; clipped weights are CISPO (MiniMax-M1, arXiv 2506.13585, section 3.1); sequence
ratios are GSPO (arXiv 2507.18071, equation 7); truncated importance sampling is Yao et al., *Your Efficient RL Framework
Secretly Brings You Off-Policy RL Training* (2025); masking is IcePop, Zhao et al., *Small Leak Can Sink a Great Ship*
(2025); k3 is Schulman, *Approximating KL Divergence* (2020).
Departures:

1. The log-ratio is held in [-20, 20] before `exp` (as verl does): e^20 is outside every clip, and inf x 0 is NaN.
2. The ratio of a sequence is that of a row, i.e. of a branch; GSPO knows no branches. A trajectory with several weighs as
   much as one with a single branch: under `aggregation="sequence"` each of its rows is divided by the action tokens of all.
3. The sampler's log-probs are those recorded at sampling, of several versions where weights were swapped in between, so
   that a correction holds engine and staleness together; its sources correct the engine alone. It is at the level of the
   ratio: a sequence's weight is the geometric mean too.
4. A learner with one update per batch has no old log-probs but the current ones. Under a correction the ratio is then 1,
   which no bound reaches, and the weight alone bounds what is off-policy: `clip` and `clip_weight` have equal gradients.
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


def normaliser(algorithm: Algorithm, *, action_tokens: int, trajectories: int, context: int) -> float:
    """What the summed loss of one update is divided by.

    Counts are those of the whole update (over micro-batches and ranks); `context` is the longest context of the recipe,
    in tokens. `token`: action tokens. `sequence`: trajectories. `constant`: context x trajectories, whatever their lengths.
    """
    divisors = {"token": action_tokens, "sequence": trajectories, "constant": context * max(1, trajectories)}
    return float(max(1, divisors[algorithm.aggregation]))


def policy_loss(
    logprobs: Tensor,
    behaviour: Tensor,
    advantages: Tensor,
    mask: Tensor,
    algorithm: Algorithm,
    normaliser: float,
    *,
    old: Tensor | None = None,
    entropy: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Policy-gradient loss -sum_t M w F / normaliser, each row divided by its trajectory's action tokens under `sequence`.

    rho = exp(logprobs - behaviour), w = 1; with a correction rho = exp(logprobs - old), and w = exp(old - behaviour) is
    truncated or masked. Per token, or exp of the mean over the action tokens of a row. With low and high the clips,
    F = min(rho A, clip(rho, low, high) A), for A < 0 at least dual_clip A (`clip`), or F = clip(rho, low, high) A logprobs
    with a constant factor (`clip_weight`). As every micro-batch of an update is given the same normaliser, their losses
    and gradients add up to those of the update.

    Args:
        logprobs: [B, T] log-probabilities of the targets under the weights in training, nats, differentiable.
        behaviour: [B, T] log-probabilities when they were sampled.
        advantages: A [B, T].
        mask: M [B, T], 1 where the target was sampled; nothing else enters, whatever the other tensors hold there.
        algorithm: its `ratio`, `bound`, clips, `correction` and `aggregation`.
        normaliser: of the whole update, see `normaliser`.
        old: [B, T] log-probabilities under the weights that began the batch, for a correction; None: those in training.
        entropy: [B, T], only reported.
        lengths: [B] action tokens of each row's trajectory, over all its branches; None: each row is one.

    Returns the loss (scalar) and metrics, see `_metrics`.
    """
    inside = mask > 0
    advantages, logprobs = torch.where(inside, advantages, 0.0), torch.where(inside, logprobs, 0.0)
    mismatch = _log_ratio(logprobs, behaviour, inside)
    if algorithm.correction == "none":
        log_ratio, weight, corrected = mismatch, None, None
    else:
        old = logprobs.detach() if old is None else old
        log_ratio = _log_ratio(logprobs, old, inside)
        weight, corrected = _correction(_level(_log_ratio(old, behaviour, inside), inside, algorithm).exp(), algorithm)
    ratio = _level(log_ratio, inside, algorithm).exp()
    objective = _bounded(ratio, logprobs, advantages, algorithm)
    if weight is not None:
        objective = weight * objective
    if algorithm.aggregation == "sequence":
        objective = objective / (inside.sum(-1) if lengths is None else lengths).clamp(min=1)[:, None]
    loss = -objective.sum() / normaliser
    return loss, _metrics(ratio.detach(), mismatch.detach(), advantages, inside, algorithm, corrected, entropy)


def _log_ratio(new: Tensor, reference: Tensor, inside: Tensor) -> Tensor:
    """[B, T] log-probs -> their difference, within limits; 0 outside."""
    return torch.where(inside, new - reference, 0.0).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def _level(log_ratio: Tensor, inside: Tensor, algorithm: Algorithm) -> Tensor:
    """[B, T] -> [B, T]: as it is, or at each inside position the mean over those of its row, elsewhere 0."""
    if algorithm.ratio == "token":
        return log_ratio
    means = log_ratio.sum(-1, keepdim=True) / inside.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(inside, means, 0.0)


def _correction(weight: Tensor, algorithm: Algorithm) -> tuple[Tensor, Tensor]:
    """[B, T] old / sampler -> that weight truncated or masked, and where it was."""
    high = weight > algorithm.correction_high
    if algorithm.correction == "truncate":
        return weight.clamp(max=algorithm.correction_high), high
    removed = high | (weight < algorithm.correction_low)
    return torch.where(removed, 0.0, weight), removed


def _bounded(ratio: Tensor, logprobs: Tensor, advantages: Tensor, algorithm: Algorithm) -> Tensor:
    """[B, T] each -> the objective F of each token [B, T], see `policy_loss`."""
    clipped = ratio.clamp(1 - algorithm.clip_low, 1 + algorithm.clip_high)
    if algorithm.bound == "clip_weight":
        return clipped.detach() * advantages * logprobs
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    if algorithm.dual_clip is None:
        return objective
    return torch.where(advantages < 0, torch.maximum(objective, algorithm.dual_clip * advantages), objective)


@torch.no_grad()
def _metrics(
    ratio: Tensor,
    mismatch: Tensor,
    advantages: Tensor,
    inside: Tensor,
    algorithm: Algorithm,
    corrected: Tensor | None,
    entropy: Tensor | None,
) -> dict[str, float]:
    """Means over this call's action tokens.

    `ratio`; `clip_low` and `clip_high`: share of tokens whose gradient (`clip`) or weight (`clip_weight`) was cut on that
    side; `mismatch_kl`: k3 estimate of KL(behaviour || current), nats per token; with a correction `corrected`: share of
    tokens whose weight was truncated or masked; where given, `entropy` (nats).
    """
    low, high = ratio < 1 - algorithm.clip_low, ratio > 1 + algorithm.clip_high
    if algorithm.bound == "clip":
        low, high = low & (advantages < 0), high & (advantages > 0)
        if algorithm.dual_clip is not None:
            high |= (ratio > algorithm.dual_clip) & (advantages < 0)
    columns = {"ratio": ratio, "clip_low": low, "clip_high": high, "mismatch_kl": mismatch.exp() - 1 - mismatch}
    if corrected is not None:
        columns["corrected"] = corrected
    if entropy is not None:
        columns["entropy"] = entropy
    means = torch.stack([torch.where(inside, c.to(ratio.dtype), 0.0).sum() for c in columns.values()])
    return dict(zip(columns, (means / inside.sum().clamp(min=1)).tolist(), strict=True))


def value_loss(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float, normaliser: float) -> Tensor:
    """Clipped squared error of a critic: sum_t M max((V - R)^2, (old + clip(V - old, -clip, clip) - R)^2) / (2 normaliser).

    The clip is that of OpenAI baselines' PPO (named in arXiv 2005.12729); PPO's paper has the plain square.

    Args:
        values: V [B, T], differentiable.
        old: [B, T] estimates before the batch.
        returns: R [B, T], the targets of `rl.advantages.gae`.
        mask: M [B, T], 1 at action tokens; nothing else enters.
        clip: how far V may move from old before its gradient stops, in units of returns.
        normaliser: action tokens of the whole update.
    """
    inside = mask > 0
    values, old, returns = (torch.where(inside, x, 0.0) for x in (values, old, returns))
    near = old + (values - old).clamp(-clip, clip)
    return torch.maximum((values - returns) ** 2, (near - returns) ** 2).sum() / (2 * normaliser)
