"""Advantages, and the table of algorithms: one row per named preset, each a product of independent choices.

What it is: `Algorithm` (a row), `PRESETS` (the table), `algorithm` (look-up with overrides) and `group_advantages`,
which turns the returns of one group into one number per trajectory. Plain floats: no torch here, nothing is random.

What it does not do: it neither filters trajectories (`rl/batch.py` applies the `filter_*` fields) nor computes a loss
(`rl/losses.py` applies `ratio`, the clips and `aggregation`). No critic and no per-token returns.

Sources: GRPO is DeepSeekMath (arXiv 2402.03300, section 4.1.2), RLOO is Ahmadian et al. (arXiv 2402.14740),
CWM is *CWM: An Open-Weights LLM for Research on Code Generation with World Models* (objective of its RL section).
Departures:

1. `grpo` aggregates over the action tokens of the whole update (as DAPO, arXiv 2503.14476, section 3.3) instead of the
   mean per trajectory followed by the mean over trajectories, and has no KL term: a reference model is not kept.
2. `std` is the sample deviation (divisor G - 1) plus 1e-4, as in TRL; the paper leaves the divisor open.
3. The paper of `cwm` says that the summed loss is divided by a constant N (its context, 131072) and leaves the mean
   over trajectories open. Here the divisor is N times the trajectories of the update: the constant must not depend on
   how long they are, yet the size of a step should not grow with how many there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import fsum, sqrt
from typing import Any, Literal, get_args

from envs.errors import nearest

Baseline = Literal["mean", "length_weighted", "leave_one_out"]
Scale = Literal["none", "std"]
Ratio = Literal["token", "sequence"]
Aggregation = Literal["token", "constant"]

STD_EPSILON = 1e-4
"""Added to the deviation before dividing (TRL, `GRPOTrainer`)."""


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """One row of the table: baseline x scale x ratio level x clip x aggregation x filters."""

    name: str
    baseline: Baseline
    """What is subtracted from a return: the group's mean, its mean weighted by action tokens, or the mean of the
    others."""
    scale: Scale
    """What the difference is divided by: nothing, or the group's standard deviation."""
    ratio: Ratio
    """Importance ratio per token, or one per row: the geometric mean over its action tokens (GSPO, arXiv 2507.18071,
    equation 7)."""
    clip_low: float
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float
    """The ratio is clipped above at 1 + clip_high."""
    aggregation: Aggregation
    """The summed loss is divided by the action tokens of the update, or by context x trajectories of the update."""
    filter_zero_advantage: bool = False
    """Leave trajectories without an advantage out of the batch; they add no gradient but would count in the divisor."""
    filter_stale: int | None = None
    """Leave out trajectories whose *newest* token is more than this many versions old; None keeps all."""
    filter_gibberish: bool = False
    """Leave out trajectories with a sampled token that is both rare and very unlikely (`rl.batch.is_gibberish`)."""

    def __post_init__(self) -> None:
        choices = {"baseline": Baseline, "scale": Scale, "ratio": Ratio, "aggregation": Aggregation}
        for name, kind in choices.items():
            value, known = getattr(self, name), get_args(kind)
            if value not in known:
                raise ValueError(
                    f"algorithm.{name}={value!r} is unknown; one of {', '.join(known)}.{nearest(str(value), known)}"
                )
        if not 0 <= self.clip_low < 1:
            raise ValueError(
                f"algorithm.clip_low={self.clip_low} must be in [0, 1): the ratio is clipped at 1 - clip_low"
            )
        if self.clip_high < 0:
            raise ValueError(f"algorithm.clip_high={self.clip_high} is negative; the ratio is clipped at 1 + clip_high")
        if self.filter_stale is not None and self.filter_stale < 0:
            raise ValueError(f"algorithm.filter_stale={self.filter_stale} is negative; 0 keeps only the newest version")


PRESETS: dict[str, Algorithm] = {
    "grpo": Algorithm(
        name="grpo", baseline="mean", scale="std", ratio="token", clip_low=0.2, clip_high=0.2, aggregation="token"
    ),
    "cwm": Algorithm(
        name="cwm",
        baseline="length_weighted",
        scale="none",
        ratio="token",
        clip_low=0.2,
        clip_high=0.25,
        aggregation="constant",
        filter_zero_advantage=True,
        filter_stale=100,
        filter_gibberish=True,
    ),
}


def algorithm(name: str, **overrides: Any) -> Algorithm:
    """The preset `name` with some fields replaced, e.g. `algorithm("cwm", clip_high=0.28)`.

    Raises `ValueError` for an unknown preset, field or value.
    """
    if name not in PRESETS:
        raise ValueError(f"algorithm={name!r} is unknown; one of {', '.join(sorted(PRESETS))}.{nearest(name, PRESETS)}")
    known = [f.name for f in fields(Algorithm) if f.name != "name"]
    for key in overrides:
        if key not in known:
            raise ValueError(f"algorithm.{key} is unknown; one of {', '.join(known)}.{nearest(key, known)}")
    return replace(PRESETS[name], **overrides)


def group_advantages(rewards: Sequence[float], lengths: Sequence[int], algorithm: Algorithm) -> list[float]:
    """Advantage of each trajectory of one group, shared by all its action tokens.

    Args:
        rewards: returns R [G]; trajectories without a reward must have been left out.
        lengths: action tokens L over all branches [G]; only `length_weighted` reads them.
        algorithm: its `baseline` and `scale` are applied.

    Returns:
        [G], with mu = mean(R), sum(L R) / sum(L) (cwm) or mean of the other returns (RLOO) and
        A = R - mu, or (R - mu) / (std(R) + 1e-4) (GRPO, outcome supervision). Equal returns give exactly 0.
    """
    assert len(rewards) == len(lengths), f"{len(rewards)} rewards, {len(lengths)} lengths"
    if len(rewards) < 2 or min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    size, total = len(rewards), fsum(rewards)
    if algorithm.baseline == "leave_one_out":
        baselines = [(total - r) / (size - 1) for r in rewards]
    elif algorithm.baseline == "length_weighted" and sum(lengths) > 0:
        weighted = fsum(r * n for r, n in zip(rewards, lengths, strict=True)) / sum(lengths)
        baselines = [weighted] * size
    else:
        baselines = [total / size] * size
    differences = [r - b for r, b in zip(rewards, baselines, strict=True)]
    if algorithm.scale == "none":
        return differences
    mean = total / size
    deviation = sqrt(fsum((r - mean) ** 2 for r in rewards) / (size - 1))
    return [d / (deviation + STD_EPSILON) for d in differences]
