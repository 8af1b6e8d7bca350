"""What a recipe asks of the learner (`[learn]`), and what the learner reports: plain values, read without torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rl.advantages import Algorithm, algorithm


@dataclass(frozen=True, kw_only=True)
class LearnConfig:
    """How the policy is updated."""

    algorithm: str = "cwm"
    """A preset of `rl/advantages.py`: grpo, cwm, dapo, dr_grpo, gspo, cispo, rloo, reinforce++ or ppo."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the preset to replace (`rl.advantages.Algorithm`), e.g. `--learn.overrides.clip_high=0.28`."""
    groups_per_step: int = 16
    """Groups of one batch."""
    lr: float = 5e-4
    """Learning rate after warm-up."""
    schedule: Literal["constant", "linear"] = "constant"
    """Of the learning rate behind the warm-up; "linear" falls to 0 at the last of `steps`."""
    warmup_steps: int = 0
    """Optimiser updates over which the learning rate rises linearly from lr / warmup_steps to lr."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay, matrices only."""
    grad_clip: float = 1.0
    """Largest gradient norm (2-norm over all parameters); larger ones are scaled down to it."""
    critic_lr: float | None = None
    """Learning rate of the critic, constant; left out: `lr`. For algorithms with a critic (ppo) alone."""
    critic_warmup_steps: int = 0
    """Batches, from the first one on, in which only the critic learns."""
    lora_rank: int = 0
    """Train adapters of this rank on all linear layers (`policy/lora.py`), which alone travel to the engine; 0 trains all
    weights. Needs peft."""
    lora_alpha: float = 32.0
    """Adapters are scaled by lora_alpha / lora_rank."""
    minibatches: int = 2
    """Optimiser updates per batch; trajectories are dealt to them at random."""
    max_tokens: int = 8192
    """Positions of one micro-batch, padding included."""
    packing: Literal["auto", "packed", "padded"] = "auto"
    """Rows of a micro-batch one behind the other, kept apart by their positions, or padded side by side. "auto": packed
    where variable-length attention exists (a GPU, in bf16); elsewhere padded, which is faster than attention under a mask."""
    ranks: int = 1
    """Processes of the learner: each holds a share of weights, gradients and moments (FSDP2), and trains on a share of each
    batch. Ray's: under `threads` there is one. A checkpoint can be resumed with another number."""
    sequence_parallel: int = 1
    """So many ranks hold the tokens of a micro-batch together (Ulysses), for rows too long for one; a divisor of `ranks` and
    of the model's key-value heads. Rows are then packed, and `max_tokens` are those of all these ranks."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the learner computes; rank r takes GPU r."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """What its matrix products are computed in; weights, gradients that are added up, and moments stay fp32."""
    checkpoint_activations: bool = False
    """Keep only the inputs of layers for the backward pass and compute the rest again: less memory, a third more work."""
    threads: int = 1
    """Torch threads of a rank; 0 leaves torch's own setting."""
    max_staleness: int | None = None
    """No token is trained on that was sampled more than this many versions before; left out: the preset's bound."""
    stale: Literal["wait", "drop"] = "wait"
    """Keep the bound by issuing fewer groups, or by dropping late ones."""
    control: Literal["none", "shuffle"] = "none"
    """"shuffle" permutes the advantages of each batch: the negative control."""

    def __post_init__(self) -> None:
        bound = self.row().max_staleness
        for name, least in (("groups_per_step", 1), ("minibatches", 1), ("ranks", 1), ("sequence_parallel", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"learn.{name}={getattr(self, name)} is too small; give at least {least}")
        if bound < 0:
            raise ValueError(f"learn.max_staleness={bound} is too small; give at least 0")
        for name in ("lr", "grad_clip"):
            if getattr(self, name) <= 0:
                raise ValueError(f"learn.{name}={getattr(self, name)} must be positive")
        self._check_critic()
        if self.lora_rank < 0 or self.lora_alpha <= 0:
            raise ValueError(
                f"learn.lora_rank={self.lora_rank}, learn.lora_alpha={self.lora_alpha}: give a rank of 0 (off) or more, and "
                "a positive alpha"
            )
        if self.lora_rank and importlib.util.find_spec("peft") is None:
            raise ValueError(f"learn.lora_rank={self.lora_rank} needs the package peft; pip install peft, or give 0")
        self._check_ranks()

    def _check_critic(self) -> None:
        if self.row().baseline != "critic" and (self.critic_lr is not None or self.critic_warmup_steps):
            raise ValueError(
                f"learn.critic_lr={self.critic_lr}, learn.critic_warmup_steps={self.critic_warmup_steps}: "
                f"learn.algorithm={self.algorithm!r} has no critic; leave them out, or take 'ppo'"
            )
        if self.critic_warmup_steps < 0 or (self.critic_lr is not None and self.critic_lr <= 0):
            raise ValueError(
                f"learn.critic_lr={self.critic_lr}, learn.critic_warmup_steps={self.critic_warmup_steps}: the rate must be "
                "positive, the steps 0 or more"
            )

    def _check_ranks(self) -> None:
        if self.ranks % self.sequence_parallel:
            raise ValueError(
                f"learn.sequence_parallel={self.sequence_parallel} does not divide learn.ranks={self.ranks}; "
                "give a divisor, or other ranks"
            )
        if self.sequence_parallel > 1 and self.packing == "padded":
            raise ValueError(
                f"learn.packing='padded' has no packs to split over learn.sequence_parallel={self.sequence_parallel} "
                "ranks; leave it at auto"
            )

    def row(self) -> Algorithm:
        """The preset with what this recipe replaces."""
        bound = {} if self.max_staleness is None else {"max_staleness": self.max_staleness}
        return algorithm(self.algorithm, **{**self.overrides, **bound})

    def rate(self, updates: int, steps: int) -> float:
        """Learning rate of the next update when `updates` are done, in a run of `steps` batches."""
        rise = min(1.0, (updates + 1) / max(1, self.warmup_steps))
        if self.schedule == "constant":
            return self.lr * rise
        last = max(1, steps - self.critic_warmup_steps) * self.minibatches
        return self.lr * rise * max(0.0, 1 - updates / last)


@dataclass(kw_only=True)
class StepReport:
    """What one `rl.learner.Learner.step` did."""

    version: int
    """After the step."""
    loss: float = 0.0
    """Mean over the updates of this batch."""
    grad_norm: float = 0.0
    """Mean over the updates, before clipping."""
    lr: float = 0.0
    """Of the last update."""
    updates: int = 0
    """Optimiser updates done."""
    skipped: int = 0
    """Updates left out because their loss or gradient wasn't finite."""
    tokens: int = 0
    """Sampled tokens trained on."""
    positions: int = 0
    """Positions computed, padding included."""
    rows: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    """Means over tokens of `policy_loss`'s metrics. `mismatch_kl` is of the first update alone: before it the weights
    are those that were published, so it measures engine and staleness; afterwards it would measure the updates."""
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
