"""The learner: turns rows into optimiser updates of one model. A plain class; `rl/spawn.py` may make it an actor.

What it is: `Learner.step` trains one batch (split into `minibatches` updates, each accumulated over micro-batches),
publishes weights by version, scores sequences for the check against the engine, and saves and loads its whole state.

What it does not do: it neither filters trajectories nor computes advantages (`rl/batch.py`; of a critic's values,
`rl/critic.py`); it knows no journal, and atomicity of checkpoints is `rl/checkpoint.py`'s. Several ranks shard neither a
critic nor adapters.

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
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from policy import lora, models
from policy.weights import load_into, state_of
from rl import attention, shards
from rl.advantages import Algorithm, algorithm
from rl.batch import MicroBatch, Row, by_trajectory, microbatches
from rl.critic import Critic, ValueModel, quality, valued
from rl.losses import normaliser, policy_loss, token_logprobs
from rl.packing import Padded
from rl.ranks import Place, whole

CRITIC = "critic"
"""Folder of the critic's state in a checkpoint."""

ALONE = Place()


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
    packing: Literal["auto", "packed", "padded"] = "auto"
    """How rows share a micro-batch (`rl/packing.py`). "auto": packed where variable-length attention exists, which needs a
    GPU and bf16; elsewhere rows of like length padded, which is faster than attention under a mask."""
    checkpoint_activations: bool = False
    """Keep only the inputs of layers for the backward pass and compute the rest again."""
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

    def __init__(self, config: LearnerConfig, model: PreTrainedModel | Path | str, place: Place = ALONE) -> None:
        """`model`: a directory for `policy.models.load`, or a model that is the learner's own from now on. At a `place`
        among ranks every method is a collective: all ranks call it, with the same arguments."""
        if config.threads:
            torch.set_num_threads(config.threads)
        self.config, self.place = config, place
        self.algorithm = config.row()
        assert place.ranks == 1 or not (config.lora_rank or self.algorithm.baseline == "critic"), "see `rl.config`"
        self.source = model
        self.model = self._start(self._base() if isinstance(model, str | Path) else model)
        packed = config.packing == "packed" or (config.packing == "auto" and (place.varlen or place.sequence > 1))
        assert packed or place.sequence == 1, "padded rows can't be split"
        self.sharing = place.sharing(packed=packed, pair_cost=_pair_cost(self.model))
        if packed:
            attention.check_heads(self.model.config.num_key_value_heads, place.sequence)
            attention.use(self.model)
        if config.checkpoint_activations:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.ranks = place.join()
        self._forward = self.ranks.shard(self.model, _forward)
        self.optimizer = _optimizer(self.model, config)
        self.critic = self._critic() if self.algorithm.baseline == "critic" else None
        self.random = random.Random(config.seed)
        self.version = 0
        self.updates = 0

    def _start(self, model: PreTrainedModel) -> Any:
        """A model ready to be trained, its base frozen where there are adapters."""
        if self.config.lora_rank:
            lora.attach(model, self.config.lora_rank, self.config.lora_alpha, self.config.seed)
        return model.train()

    def _base(self) -> PreTrainedModel:
        assert isinstance(self.source, str | Path), "a critic, and a merged model, begin as the directory's"
        return models.load(Path(self.source))

    def _critic(self) -> Critic:
        config, model = self.config, ValueModel(self._start(self._base())).to(self.ranks.device)
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
        tokens = sum(row.action_tokens for row in rows)
        if not tokens:
            return
        batches = microbatches(rows, self.config.max_tokens, self.sharing)
        trajectories = len({row.trajectory or f"row {i}" for i, row in enumerate(rows)})
        divisor = normaliser(
            self.algorithm,
            action_tokens=tokens,
            trajectories=trajectories,
            context=self.config.context,
        )
        self.optimizer.zero_grad(set_to_none=True)
        sums = {"loss": 0.0, "positions": 0.0}
        for batch in batches:
            loss, seen = self._backward(batch, divisor)
            sums["loss"] += loss
            sums["positions"] += int(batch.inside.sum()) if self.sharing.packed else batch.inside.numel()
            for key, value in seen.items():
                sums[key] = sums.get(key, 0.0) + value * batch.action_tokens / tokens
        metrics = dict(zip(sums, self.ranks.total(list(sums.values())), strict=True))
        loss = metrics.pop("loss")
        report.positions += int(metrics.pop("positions"))
        norm = float(whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)))
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
        logprobs, entropy = self._logprobs(batch.token_ids, batch.targets, batch.inside, batch.mask)
        loss, metrics = policy_loss(
            logprobs,
            batch.behaviour,
            batch.advantages,
            batch.mask,
            self.algorithm,
            divisor,
            old=batch.old,
            entropy=entropy,
            lengths=batch.lengths,
        )
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach()), metrics

    def _logprobs(
        self, token_ids: Tensor, targets: Tensor, inside: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """[B, T] each -> log-probabilities and entropies of `targets`; `inside` is false at padding."""
        device = self.ranks.device
        layout = self.ranks.layout(inside.to(device), self.sharing.packed)
        wanted = None if mask is None else mask.to(device)
        logprobs, entropy = self._forward(layout, token_ids.to(device), targets.to(device), wanted)
        return logprobs.cpu(), entropy.cpu()

    def _cpu(self) -> float:
        """CPU seconds: of this thread where it computes alone, else of the process."""
        return time.thread_time() if self.config.threads == 1 else time.process_time()

    # ------------------------------------------------------------------ weights and scores

    def weights(self) -> dict[str, np.ndarray]:
        """The weights of `version`, by parameter name, as copies; where adapters are trained those alone
        (`policy.lora.adapters_of`). Nothing on ranks but the first."""
        if self.config.lora_rank:
            return lora.adapters_of(self.model)
        return state_of(self.model, keep=not self.place.rank)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability (nats, temperature 1) of each token given those before it; 0.0 for the first. Nothing is
        cached."""
        out: list[list[float]] = [[0.0] * len(s) for s in sequences]
        long = [i for i, s in enumerate(sequences) if len(s) > 1]
        lengths = [len(sequences[i]) for i in long]
        for bunch in self.sharing.mine(lengths, self.config.max_tokens):
            rows = [torch.tensor(list(sequences[long[i]])) for i in bunch] or [torch.zeros(2, dtype=torch.int64)]
            ids = pad_sequence(rows, batch_first=True)
            inside = pad_sequence([torch.ones(len(row) - 1, dtype=torch.bool) for row in rows], batch_first=True)
            with torch.no_grad():
                logprobs, _ = self._logprobs(ids[:, :-1], ids[:, 1:], inside)
            for row, i in enumerate(bunch):
                out[long[i]][1:] = logprobs[row, : lengths[i] - 1].tolist()
        every = iter(self.ranks.total([x for scores in out for x in scores]))
        return [[next(every) for _ in scores] for scores in out]

    # ------------------------------------------------------------------ state

    def export(self, directory: Path) -> None:
        """Write the model alone, in the form that `policy.models.load` reads; adapters are merged into it."""
        if self.config.lora_rank:
            model = self._base()
            load_into(model, lora.merge(state_of(model), self.weights()))
            models.save(model, directory)
            return
        weights = None if self.ranks.alone else self.weights()
        if not self.place.rank:
            models.save(self.model, directory, weights)

    def save(self, directory: Path) -> None:
        """Write weights, optimiser, counters and random state into `directory` (torch.distributed.checkpoint shards); a
        learner of any number of ranks can load it."""
        shards.save(directory, self.model, self.optimizer, self._counters(), alone=self.ranks.alone)
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
        counters = shards.load(directory, self.model, self.optimizer, self._counters(), alone=self.ranks.alone)
        self.version, self.updates = counters["version"], counters["updates"]
        version, internal, gauss = counters["random"]
        self.random.setstate((version, tuple(internal), gauss))

    def _counters(self) -> dict[str, Any]:
        return {"version": self.version, "updates": self.updates, "random": self.random.getstate()}


def _forward(
    model: PreTrainedModel, layout: Padded, token_ids: Tensor, targets: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What `Learner._logprobs` gives; the one place where the model is called."""
    ids, goals = layout.pack(token_ids), layout.pack(targets)
    hidden = model.model(input_ids=ids, use_cache=False, **layout.arguments()).last_hidden_state
    logprobs, entropy = token_logprobs(hidden, model.lm_head.weight, goals, None if mask is None else layout.pack(mask))
    return layout.unpack(logprobs), layout.unpack(entropy)


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


def _pair_cost(model: PreTrainedModel) -> float:
    """Operations of attention for a pair of tokens, relative to those of a token's matrix products: per layer 2 p for p
    parameters, and 2 n d for n causal positions of width d, in layers without a window."""
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"]
    share = kinds.count("full_attention") / len(kinds)
    parameters = sum(p.numel() for p in model.model.layers.parameters()) / len(model.model.layers)
    return float(share * model.config.hidden_size / parameters)
