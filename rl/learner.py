"""The learner: turns rows into optimiser updates of one model. A plain class; `rl/spawn.py` may make it an actor.

What it is: `Learner.step` trains one batch (split into `minibatches` updates, each accumulated over micro-batches),
publishes weights by version, scores sequences for the check against the engine, and saves and loads its whole state.

What it does not do: one process and one device, no sharding; it neither filters trajectories nor computes advantages
(`rl/batch.py`; of a critic's values, `rl/critic.py`); it knows no journal, and atomicity of checkpoints is
`rl/checkpoint.py`'s.

Words: the *version* counts batches trained, i.e. weights published; *updates* counts optimiser updates, which the
learning-rate schedule reads. A batch whose update was skipped still advances the version: it was consumed.

With a correction of the mismatch (`Algorithm.correction`) and several updates per batch, the rows are scored under the
weights that begin the batch first: one more forward pass. A critic looks at the rows first, too, and is updated on the
same minibatches; while it warms up the policy stays as it is, and its versions are counted on.

With `lora_rank` only adapters are trained (`policy/lora.py`), published and checkpointed, the critic's trunk likewise; the
base is the model directory's, which has to stay as it is.

Formula of the optimiser: AdamW (arXiv 1711.05101, algorithm 2); decay is applied to matrices only. An update whose loss
or gradient norm isn't finite is skipped and counted, and leaves weights and optimiser as they were.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policy import lora, models
from policy.weights import load_into, state_of
from rl import shards
from rl.advantages import Algorithm, algorithm
from rl.batch import MicroBatch, Row, by_trajectory, microbatches
from rl.critic import Critic, ValueModel, quality, valued
from rl.losses import normaliser, policy_loss, token_logprobs

CRITIC = "critic"
"""Folder of the critic's state in a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """How a batch becomes updates."""

    algorithm: str = "cwm"
    """Name of a row in `rl.advantages.PRESETS`."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of that row to replace, e.g. {"clip_high": 0.28}."""
    lr: float = 3e-4
    """Learning rate after warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the two moments."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay, matrices only."""
    grad_clip: float = 1.0
    """Largest gradient norm (2-norm over all parameters); larger ones are scaled down to it."""
    warmup_steps: int = 0
    """Optimiser updates over which the learning rate rises linearly from lr / warmup_steps to lr."""
    decay_updates: int = 0
    """Optimiser updates over which it falls linearly to 0; 0 keeps it constant."""
    minibatches: int = 1
    """Optimiser updates per batch; trajectories are dealt to them at random."""
    context: int = 512
    """Longest context of the recipe, tokens: the constant of `aggregation = "constant"`."""
    critic_lr: float | None = None
    """The critic's constant learning rate; None takes `lr`. Its other settings are the policy's."""
    critic_warmup_steps: int = 0
    """Batches, from the first one on, in which only the critic learns."""
    lora_rank: int = 0
    """Rank of the adapters on all linear layers; 0 trains all weights."""
    lora_alpha: float = 32.0
    """Their product is scaled by lora_alpha / lora_rank."""
    max_tokens: int = 8192
    """Most positions (padding included) of one micro-batch."""
    threads: int = 1
    """Torch threads of this process; 0 leaves the setting alone."""
    seed: int = 0
    """Seeds the dealing of trajectories to minibatches."""

    def __post_init__(self) -> None:
        if self.max_tokens < self.context:
            raise ValueError(
                f"learner.max_tokens={self.max_tokens} is less than learner.context={self.context}:"
                " one trajectory might not fit; raise it"
            )
        for name in ("lr", "grad_clip", "minibatches", "context"):
            if getattr(self, name) <= 0:
                raise ValueError(f"learner.{name}={getattr(self, name)} must be positive")
        self.row()

    def row(self) -> Algorithm:
        """The algorithm with its overrides."""
        return algorithm(self.algorithm, **self.overrides)


def learning_rate(config: LearnerConfig, updates: int) -> float:
    """Rate of the next update when `updates` are done: linear warm-up, times linear decay where one is asked for."""
    rise = min(1.0, (updates + 1) / max(1, config.warmup_steps))
    fall = max(0.0, 1 - updates / config.decay_updates) if config.decay_updates else 1.0
    return config.lr * rise * fall


@dataclass(kw_only=True)
class StepReport:
    """What one `Learner.step` did."""

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


class Learner:
    """One model, its optimiser and its counters."""

    def __init__(self, config: LearnerConfig, model_dir: Path | str) -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
        self.config = config
        self.algorithm = config.row()
        self.directory = Path(model_dir)
        self.model = self._start()
        self.optimizer = _optimizer(self.model, config)
        self.critic = self._critic() if self.algorithm.baseline == "critic" else None
        self.random = random.Random(config.seed)
        self.version = 0
        self.updates = 0

    def _start(self) -> Any:
        """The model that the run begins with, its base frozen where there are adapters."""
        model = models.load(self.directory)
        if self.config.lora_rank:
            lora.attach(model, self.config.lora_rank, self.config.lora_alpha, self.config.seed)
        return model.train()

    def _critic(self) -> Critic:
        config, model = self.config, ValueModel(self._start())
        optimizer = _optimizer(model, replace(config, lr=config.critic_lr or config.lr))
        return Critic(model, optimizer, grad_clip=config.grad_clip, max_tokens=config.max_tokens)

    # ------------------------------------------------------------------ training

    def step(self, rows: Sequence[Row]) -> StepReport:
        """Train on one batch of rows and advance the version by one (also where `rows` is empty or an update was
        skipped)."""
        wall, cpu = time.perf_counter(), self._cpu()
        report = StepReport(version=self.version + 1, rows=len(rows), lr=learning_rate(self.config, self.updates))
        if self.algorithm.correction != "none" and self.config.minibatches > 1:
            scores = self.score([row.token_ids for row in rows])
            rows = [replace(row, old=score) for row, score in zip(rows, scores, strict=True)]
        if self.critic is not None:
            rows = valued(rows, self.critic.values(rows), self.algorithm)
            report.metrics |= quality(rows)
        for index, minibatch in enumerate(self._minibatches(rows)):
            if self.critic is not None:
                self._teach(self.critic, minibatch, report)
            if self.version >= self.config.critic_warmup_steps:
                self._update(minibatch, report, first=index == 0)
        report.loss /= max(1, report.updates)
        report.grad_norm /= max(1, report.updates)
        self.version += 1
        report.cpu_seconds, report.wall_seconds = self._cpu() - cpu, time.perf_counter() - wall
        return report

    def _minibatches(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Rows dealt into `minibatches` parts; the rows of one trajectory stay together. Parts without a row are left
        out."""
        trajectories, count = by_trajectory(rows), self.config.minibatches
        self.random.shuffle(trajectories)
        parts = [[rows[i] for members in trajectories[part::count] for i in members] for part in range(count)]
        return [part for part in parts if part]

    def _teach(self, critic: Critic, rows: Sequence[Row], report: StepReport) -> None:
        """One update of the critic. Parts of a batch are about equal: the reported loss is the sum of their shares."""
        loss = critic.update(rows, self.algorithm.value_clip)
        report.skipped += loss is None
        report.metrics["value_loss"] = report.metrics.get("value_loss", 0.0) + (loss or 0.0) / self.config.minibatches

    def _update(self, rows: Sequence[Row], report: StepReport, first: bool) -> None:
        """One optimiser update, accumulated over micro-batches."""
        batches = microbatches(rows, self.config.max_tokens)
        tokens = sum(b.action_tokens for b in batches)
        if not tokens:
            return
        trajectories = len({row.trajectory or f"row {i}" for i, row in enumerate(rows)})
        divisor = normaliser(
            self.algorithm,
            action_tokens=tokens,
            rows=sum(len(b.mask) for b in batches),
            trajectories=trajectories,
            context=self.config.context,
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss, metrics = 0.0, dict[str, float]()
        for batch in batches:
            part, seen = self._backward(batch, divisor)
            loss += part
            for key, value in seen.items():
                metrics[key] = metrics.get(key, 0.0) + value * batch.action_tokens / tokens
            report.positions += batch.token_ids.numel()
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip))
        if not (np.isfinite(loss) and np.isfinite(norm)):
            self.optimizer.zero_grad(set_to_none=True)
            report.skipped += 1
            return
        report.lr = learning_rate(self.config, self.updates)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = report.lr
        self.optimizer.step()
        self.updates += 1
        _merge(report, loss, norm, tokens, metrics, first)

    def _backward(self, batch: MicroBatch, divisor: float) -> tuple[float, dict[str, float]]:
        """Forward and backward of one micro-batch; gradients add to those there."""
        logprobs, entropy = self._logprobs(batch.token_ids, batch.targets, batch.mask)
        loss, metrics = policy_loss(
            logprobs,
            batch.behaviour,
            batch.advantages,
            batch.mask,
            self.algorithm,
            divisor,
            old=batch.old,
            entropy=entropy,
        )
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach()), metrics

    def _logprobs(self, token_ids: Tensor, targets: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[B, T] ids -> log-probabilities and entropies of `targets`. Right padding needs no attention mask."""
        hidden = self.model.model(input_ids=token_ids, use_cache=False).last_hidden_state
        return token_logprobs(hidden, self.model.lm_head.weight, targets, mask)

    def _cpu(self) -> float:
        """CPU seconds: of this thread where it computes alone, else of the process."""
        return time.thread_time() if self.config.threads == 1 else time.process_time()

    # ------------------------------------------------------------------ weights and scores

    def weights(self) -> dict[str, np.ndarray]:
        """The weights of `version`, by parameter name, as copies; where adapters are trained those alone
        (`policy.lora.adapters_of`)."""
        return lora.adapters_of(self.model) if self.config.lora_rank else state_of(self.model)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability (nats, temperature 1) of each token given those before it; 0.0 for the first. Nothing is
        cached."""
        out: list[list[float]] = [[0.0] * len(s) for s in sequences]
        order = sorted((i for i, s in enumerate(sequences) if len(s) > 1), key=lambda i: len(sequences[i]))
        for bunch in _bunches(order, [len(s) for s in sequences], self.config.max_tokens):
            width = max(len(sequences[i]) for i in bunch)
            ids = torch.zeros((len(bunch), width), dtype=torch.int64)
            for row, i in enumerate(bunch):
                ids[row, : len(sequences[i])] = torch.tensor(list(sequences[i]))
            with torch.no_grad():
                logprobs, _ = self._logprobs(ids[:, :-1], ids[:, 1:])
            for row, i in enumerate(bunch):
                out[i][1:] = logprobs[row, : len(sequences[i]) - 1].tolist()
        return out

    # ------------------------------------------------------------------ state

    def export(self, directory: Path) -> None:
        """Write the model alone, in the form that `policy.models.load` reads; adapters are merged into it."""
        model = self.model
        if self.config.lora_rank:
            model = models.load(self.directory)
            load_into(model, lora.merge(state_of(model), self.weights()))
        models.save(model, directory)

    def save(self, directory: Path) -> None:
        """Write weights, optimiser, counters and random state into `directory` (torch.distributed.checkpoint
        shards)."""
        shards.save(directory, self.model, self.optimizer, self._counters())
        if self.critic is not None:
            self.critic.save(directory / CRITIC)

    def load(self, directory: Path) -> None:
        """The inverse of `save`: the next `step` gives bitwise the weights that an uninterrupted run would have.

        Raises `ValueError` where the directory holds the state of another model, or none, or no critic's for a learner
        that has one.
        """
        if self.critic is not None and not (directory / CRITIC).is_dir():
            raise ValueError(
                f"checkpoint {directory} is of a run without a critic, which algorithm={self.config.algorithm!r} has; "
                "resume with the algorithm it was made with, or start a new run"
            )
        if self.critic is not None:
            self.critic.load(directory / CRITIC)
        counters = shards.load(directory, self.model, self.optimizer, self._counters())
        self.version, self.updates = counters["version"], counters["updates"]
        version, internal, gauss = counters["random"]
        self.random.setstate((version, tuple(internal), gauss))

    def _counters(self) -> dict[str, Any]:
        return {"version": self.version, "updates": self.updates, "random": self.random.getstate()}


def _optimizer(model: torch.nn.Module, config: LearnerConfig) -> torch.optim.AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas)
    # Empty moments now, by a step of rate 0 whose count is taken back: left alone, `get_state_dict` takes such a step
    # when a learner without updates is saved, and keeps the count, which would change the bias correction.
    for p in trained:
        p.grad = torch.zeros_like(p)
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        state["step"].zero_()
    return optimizer


def _merge(report: StepReport, loss: float, norm: float, tokens: int, metrics: dict[str, float], first: bool) -> None:
    """Add one update to the report: metrics are means over tokens, `mismatch_kl` that of the first update."""
    report.updates += 1
    report.loss += loss
    report.grad_norm += norm
    share = tokens / (report.tokens + tokens)
    report.tokens += tokens
    for key, value in metrics.items():
        if key == "mismatch_kl":
            if first:
                report.metrics[key] = value
        else:
            report.metrics[key] = report.metrics.get(key, 0.0) * (1 - share) + value * share


def _bunches(order: Iterable[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices in order of length, cut so that length x count stays within `max_tokens` (one sequence at least)."""
    bunches: list[list[int]] = []
    for i in order:
        if bunches and lengths[i] * (len(bunches[-1]) + 1) <= max_tokens:
            bunches[-1].append(i)
        else:
            bunches.append([i])
    return bunches
