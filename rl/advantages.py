"""Advantages, and the table of algorithms: one row per named preset, each a product of independent choices.

What it is: `Algorithm` (a row), `PRESETS` (the table), `algorithm` (look-up with overrides), `batch_advantages`, which
turns the returns of a batch into one number per trajectory by way of `group_advantages` and `batch_scaled`, and `gae`,
one number per action token, of a critic's values. Plain floats: no torch here, nothing is random.

What it does not do: it neither filters trajectories (`rl/batch.py` applies the `filter_*` fields) nor computes a loss
(`rl/losses.py` applies ratio, bound, correction and aggregation), nor values (`rl/critic.py`). No row has a KL or entropy
term.

Sources. `grpo`: DeepSeekMath (arXiv 2402.03300, section 4.1.2). `cwm`: *CWM: An Open-Weights LLM for Research on Code
Generation with World Models* (arXiv 2510.02387, objective of its RL section). `dapo`: arXiv 2503.14476 (clip-higher,
section 3.1; dynamic sampling, 3.2; token-level loss, 3.3). `dr_grpo`: *Understanding R1-Zero-Like Training* (arXiv
2503.20783). `gspo`: *Group Sequence Policy Optimization* (arXiv 2507.18071, clips in section 5.1). `cispo`: MiniMax-M1
(arXiv 2506.13585, section 3.1). `rloo`: *Back to Basics* (Ahmadian et al., arXiv 2402.14740). `reinforce++`: arXiv
2501.03262. `ppo`: arXiv 1707.06347, with GAE (arXiv 1506.02438).
Departures:

1. `grpo` aggregates over the action tokens of the whole update, as DAPO does, instead of the mean per trajectory
   followed by the mean over trajectories (`aggregation="sequence"`), and has no KL term: no reference model is kept.
2. `std` is the sample deviation (divisor G - 1) plus 1e-4, as in TRL; the papers leave the divisor open. `batch_std`
   adds the same 1e-4.
3. The paper of `cwm` says that the summed loss is divided by a constant N (its context, 131072) and leaves the mean
   over trajectories open. Here the divisor is N times the trajectories of the update, and N the recipe's longest
   context: the constant must not depend on how long they are, yet the size of a step should not grow with how many there
   are. `dr_grpo` and `rloo` share it.
4. The paper of `cwm` looks at the newest token alone. The loop bounds the oldest too (`max_staleness`).
5. `dapo` and `cispo` leave out trajectories without an advantage instead of sampling until the batch is full, and shape
   no reward by length.
6. MiniMax-M1 gives no number for the cap of `cispo`'s weights; 5 is what TRL recommends (after ScaleRL, arXiv
   2510.13786). There is no lower bound, as in the paper.
7. `rloo` is on-policy in its paper, without ratio or bound; here batches are a few versions old, so that the ratio of
   PPO and its clip are applied.
8. `reinforce++` has no KL in its reward; the ratio has PPO's clip, as in OpenRLHF; mean and deviation are over action
   tokens. `baseline="mean"` makes it the paper's variant with a baseline.
9. `ppo` subtracts the mean of the batch's advantages and divides by their deviation, over its action tokens, as verl does
   (`compute_gae_advantage_return`); PPO's paper leaves them as they are. `gae_decay` is 1, verl's and OpenRLHF's default:
   with one reward at the end of hundreds of tokens, 0.95 would hide it from all but the last (arXiv 2503.01491).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from math import fsum, sqrt
from typing import Any, Literal

from envs.errors import nearest
from envs.fields import build

STD_EPSILON = 1e-4
"""Added to the deviation before dividing (TRL, `GRPOTrainer`)."""


@dataclass(frozen=True)
class Algorithm:
    """One row of the table: baseline x scale x ratio level x bound x mismatch correction x aggregation, and filters."""

    baseline: Literal["none", "mean", "length_weighted", "leave_one_out", "critic"]
    """What is subtracted from a return: nothing, the group's mean, its mean weighted by action tokens, the mean of the
    others, or a critic's value."""
    scale: Literal["none", "std", "batch_std"]
    """What the difference is divided by: nothing, the group's deviation, or that of the batch, whose mean is subtracted
    first (`batch_scaled`). Of a critic's advantages the batch's are those of all its action tokens."""
    ratio: Literal["token", "sequence"]
    """Importance ratio per token, or one per row: the geometric mean over its action tokens (GSPO, equation 7)."""
    bound: Literal["clip", "clip_weight"]
    """PPO's minimum of clipped and unclipped, which stops the gradient of tokens that went far, or CISPO's clipped ratio
    as a constant weight of the log-prob, which keeps it."""
    clip_low: float
    """The ratio is clipped below at 1 - clip_low; 1 sets no bound."""
    clip_high: float
    """The ratio is clipped above at 1 + clip_high."""
    aggregation: Literal["token", "sequence", "constant"]
    """Mean over the action tokens of the update, mean over its trajectories of their means, or the sum divided by longest
    context x trajectories. A trajectory counts once, whatever its branches."""
    _: KW_ONLY
    dual_clip: float | None = None
    """With `bound="clip"`: the objective of a token of negative advantage A is at least dual_clip x A (dual clip, arXiv
    1912.09729); None sets no bound."""
    correction: Literal["none", "truncate", "mask"] = "none"
    """Of the mismatch between sampler and learner. `none`: ratios are against the sampler's log-probs. Otherwise they are
    against the learner's when it began the batch (old), and each objective is multiplied by the constant weight old /
    sampler, cut at correction_high (`truncate`: truncated importance sampling) or 0 outside of [correction_low,
    correction_high] (`mask`: IcePop)."""
    correction_low: float = 0.5
    correction_high: float = 2.0
    gae_decay: float = 1.0
    """With a critic: lambda of `gae`. 1: an advantage is return minus value."""
    value_clip: float = 0.2
    """With a critic: how far an update may move a value from that before the batch, in units of returns
    (`rl.losses.value_loss`)."""
    max_staleness: int = 2
    """Admission (`rl/admission.py`) keeps the *oldest* token of a batch within this many versions, unless the recipe's
    `learn.max_staleness` says otherwise."""
    filter_stale: int | None = None
    """Leave out trajectories whose *newest* token is more than this many versions old; None keeps all."""
    filter_zero_advantage: bool = False
    """Leave trajectories without an advantage out of the batch; they add no gradient but would count in the divisor."""
    filter_gibberish: bool = False
    """Leave out trajectories with a sampled token that is both rare and very unlikely (`rl.batch.is_gibberish`)."""
    gibberish_id: int | None = None
    """Token ids above it are rare; None: above 0.78 V, which is CWM's 100,000 at its V = 128,256."""

    def __post_init__(self) -> None:
        if not 0 <= self.clip_low <= 1:
            raise ValueError(f"clip_low={self.clip_low} must be in [0, 1]: the ratio is clipped at 1 - clip_low")
        if self.clip_high < 0:
            raise ValueError(f"clip_high={self.clip_high} is negative; the ratio is clipped at 1 + clip_high")
        if self.dual_clip is not None and (self.dual_clip <= 1 or self.bound != "clip"):
            raise ValueError(
                f"dual_clip={self.dual_clip} with bound={self.bound!r}; it must be over 1, with bound='clip'"
            )
        if not 0 <= self.correction_low <= 1 <= self.correction_high:
            raise ValueError(
                f"correction_low={self.correction_low}, correction_high={self.correction_high} must enclose 1, the"
                " weight of a token without mismatch"
            )
        if self.filter_stale is not None and self.filter_stale < 0:
            raise ValueError(f"filter_stale={self.filter_stale} is negative; 0 keeps only the newest version")
        if not 0 <= self.gae_decay <= 1 or self.value_clip <= 0:
            raise ValueError(
                f"gae_decay={self.gae_decay}, value_clip={self.value_clip}: the first must be in [0, 1], the second positive"
            )
        if self.baseline == "critic" and (self.scale == "std" or self.filter_zero_advantage):
            raise ValueError(
                f"baseline='critic' with scale={self.scale!r}, filter_zero_advantage={self.filter_zero_advantage}: a critic"
                " compares no group; take scale='batch_std' or 'none', and no such filter"
            )


# fmt: off
PRESETS: dict[str, Algorithm] = {
    #                        baseline           scale        ratio       bound          low   high  aggregation
    "grpo":        Algorithm("mean",            "std",       "token",    "clip",        0.2,  0.2,  "token"),
    "cwm":         Algorithm("length_weighted", "none",      "token",    "clip",        0.2,  0.25, "constant",
                             max_staleness=2, filter_stale=100, filter_zero_advantage=True, filter_gibberish=True),
    "dapo":        Algorithm("mean",            "std",       "token",    "clip",        0.2,  0.28, "token",
                             filter_zero_advantage=True),
    "dr_grpo":     Algorithm("mean",            "none",      "token",    "clip",        0.2,  0.2,  "constant"),
    "gspo":        Algorithm("mean",            "std",       "sequence", "clip",        3e-4, 4e-4, "sequence"),
    "cispo":       Algorithm("mean",            "std",       "token",    "clip_weight", 1.0,  4.0,  "token",
                             filter_zero_advantage=True),
    "rloo":        Algorithm("leave_one_out",   "none",      "token",    "clip",        0.2,  0.2,  "constant"),
    "reinforce++": Algorithm("none",            "batch_std", "token",    "clip",        0.2,  0.2,  "token"),
    "ppo":         Algorithm("critic",          "batch_std", "token",    "clip",        0.2,  0.2,  "token"),
}
# fmt: on


def algorithm(preset: str, /, **overrides: Any) -> Algorithm:
    """The row that a learner is to run: a preset with some fields replaced, e.g. `algorithm("cwm", clip_high=0.28)`.

    Raises `ValueError` for an unknown preset, field or value.
    """
    if preset not in PRESETS:
        raise ValueError(
            f"algorithm={preset!r} is unknown; one of {', '.join(sorted(PRESETS))}.{nearest(preset, PRESETS)}"
        )
    return build(Algorithm, asdict(PRESETS[preset]) | overrides, f"algorithm {preset!r}")


def batch_advantages(
    returns: Sequence[Sequence[float]], lengths: Sequence[Sequence[int]], algorithm: Algorithm
) -> list[list[float]]:
    """Advantage of each trajectory of a batch, shared by all its action tokens: one list [G] per group. Where a critic is
    the baseline: the returns as they are, of which `rl.critic.valued` makes advantages.

    Args:
        returns: R, one list [G] per group; trajectories without a reward must have been left out.
        lengths: action tokens L over all branches, likewise.
        algorithm: its `baseline` and `scale` are applied.
    """
    if algorithm.baseline == "critic":
        return [list(r) for r in returns]
    groups = [group_advantages(r, n, algorithm) for r, n in zip(returns, lengths, strict=True)]
    if algorithm.scale != "batch_std":
        return groups
    scaled = iter(batch_scaled([a for group in groups for a in group], [n for group in lengths for n in group]))
    return [[next(scaled) for _ in group] for group in groups]


def group_advantages(returns: Sequence[float], lengths: Sequence[int], algorithm: Algorithm) -> list[float]:
    """[G] returns R and action tokens L -> [G] advantages within one group.

    A = R - mu with mu = 0 (`none`), mean(R), sum(L R) / sum(L) (`length_weighted`) or the mean of the other returns
    (`leave_one_out`), divided by std(R) + 1e-4 under `std`. Equal returns give exactly 0 where a group is compared at
    all, by baseline or scale.
    """
    assert len(returns) == len(lengths), f"{len(returns)} returns, {len(lengths)} lengths"
    assert algorithm.baseline != "critic", "values come from a critic: see `gae`"
    baseline, scaled = algorithm.baseline, algorithm.scale == "std"
    if (baseline != "none" or scaled) and (len(returns) < 2 or min(returns) == max(returns)):
        return [0.0] * len(returns)
    size, total = len(returns), fsum(returns)
    if baseline == "none":
        baselines = [0.0] * size
    elif baseline == "leave_one_out":
        baselines = [(total - r) / (size - 1) for r in returns]
    elif baseline == "length_weighted" and sum(lengths) > 0:
        baselines = [fsum(r * n for r, n in zip(returns, lengths, strict=True)) / sum(lengths)] * size
    else:
        baselines = [total / size] * size
    differences = [r - b for r, b in zip(returns, baselines, strict=True)]
    if not scaled:
        return differences
    mean = total / size
    deviation = sqrt(fsum((r - mean) ** 2 for r in returns) / (size - 1))
    return [d / (deviation + STD_EPSILON) for d in differences]


def batch_scaled(advantages: Sequence[float], lengths: Sequence[int]) -> list[float]:
    """[N] advantages A and action tokens L of a batch -> (A - mean) / (std + 1e-4), mean and std over action tokens.

    Global advantage normalisation (REINFORCE++): mean = sum(L A) / sum(L), std^2 = sum(L (A - mean)^2) / sum(L). Equal
    advantages give exactly 0.
    """
    if not advantages or min(advantages) == max(advantages):
        return [0.0] * len(advantages)
    tokens = sum(lengths)
    mean = fsum(a * n for a, n in zip(advantages, lengths, strict=True)) / tokens
    deviation = sqrt(fsum(n * (a - mean) ** 2 for a, n in zip(advantages, lengths, strict=True)) / tokens)
    return [(a - mean) / (deviation + STD_EPSILON) for a in advantages]


def gae(
    rewards: Sequence[float], values: Sequence[float], mask: Sequence[int], discount: float = 1.0, decay: float = 0.95
) -> tuple[list[float], list[float]]:
    """Generalised advantage estimation over the action tokens of one trajectory (arXiv 1506.02438).

    delta_t = r_t + discount V_t' - V_t and A_t = delta_t + discount decay A_t', where t' is the next action token:
    observations take no time. Nothing follows the last one: V = A = 0.

    Args:
        rewards: r [T]; what an action earned stands at its token.
        values: V [T], the critic's estimates before each token.
        mask: [T], 1 at action tokens; the other lists are not read elsewhere.
        discount: gamma.
        decay: lambda; 1 gives return minus value, 0 the one-step difference.

    Returns:
        advantages A [T] and returns A + V [T], the critic's targets; both 0 outside of the mask.
    """
    advantages, returns = [0.0] * len(mask), [0.0] * len(mask)
    advantage = value = 0.0
    for t in reversed([t for t, m in enumerate(mask) if m]):
        advantage = rewards[t] + discount * value - values[t] + discount * decay * advantage
        value = values[t]
        advantages[t], returns[t] = advantage, advantage + value
    return advantages, returns
