"""The learner: turns rows into optimiser updates of one model. A plain class; `rl/spawn.py` may make it an actor.

What it is: `Learner.step` trains one batch (split into `minibatches` updates, each accumulated over micro-batches),
publishes weights by version, scores sequences for the check against the engine, and saves and loads its whole state.

What it does not do: it neither filters trajectories nor computes advantages (`rl/batch.py`; of a critic's values,
`rl/critic.py`); it knows no journal, and atomicity of checkpoints is `rl/checkpoint.py`'s.

Words: the *version* counts batches trained, i.e. weights published; *updates* counts optimiser updates, which the
learning-rate schedule reads. A batch whose update was skipped still advances the version: it was consumed.

With a correction of the mismatch (`Algorithm.correction`) and several updates per batch, the rows are scored under the
weights that begin the batch first: one more forward pass. A critic looks at the rows first, too, and is updated on the
same minibatches; while it warms up the policy stays as it is, and its versions are counted on.

With `lora_rank` only adapters are trained (`policy/lora.py`), published and checkpointed, the critic's trunk likewise; the
base is the model directory's, which has to stay as it is.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from policy import lora, models
from policy.weights import state_of
from rl import attention
from rl.batch import MicroBatch, Row, by_trajectory
from rl.critic import ValueModel, loss_of, quality, valued, values_of
from rl.losses import normaliser, policy_loss, token_logprobs
from rl.network import Forward, Loss, Network, Update
from rl.packing import Padded
from rl.ranks import Place
from rl.updates import LearnConfig, StepReport

CRITIC = "critic"
"""Folder of the critic's state in a checkpoint."""

ALONE = Place()


class Learner:
    """The policy under training, its critic where there is one, and their counters."""

    def __init__(
        self,
        config: LearnConfig,
        model: PreTrainedModel | Path | str,
        place: Place = ALONE,
        *,
        context: int,
        steps: int = 1,
        seed: int = 0,
    ) -> None:
        """At a `place` among ranks every method is a collective: all ranks call it, with the same arguments.

        Args:
            config: its `ranks`, `sequence_parallel`, `device` and `dtype` are the place's.
            model: a directory for `policy.models.load`, of which each rank reads its share alone, or a model, which is copied.
            place: where among its ranks it stands.
            context: longest context of the recipe, tokens: the constant of `aggregation = "constant"`.
            steps: batches of the run, for `schedule = "linear"`.
            seed: of the dealing of trajectories to minibatches, and of adapters.
        """
        if config.threads:
            torch.set_num_threads(config.threads)
        self.config, self.place, self.context, self.steps, self.seed = config, place, context, steps, seed
        self.algorithm = config.row()
        self.source = Path(model) if isinstance(model, str) else model
        self.ranks = place.join()
        self.policy = self._network(logprobs_of)
        self.critic = self._network(values_of, ValueModel) if self.algorithm.baseline == "critic" else None
        self.random = random.Random(seed)
        self.version = 0
        self.updates = 0

    def _network(self, forward: Forward, of: Callable[[PreTrainedModel], torch.nn.Module] | None = None) -> Network:
        """The model, or what `of` makes of it, sharded before it gets its weights, the base frozen where there are adapters."""
        config, place = self.config, self.place
        stored = isinstance(self.source, Path)
        base: Any = models.skeleton(self.source) if stored else deepcopy(self.source)
        packed = config.packing == "packed" or (config.packing == "auto" and (place.varlen or place.sequence > 1))
        assert packed or place.sequence == 1, "padded rows can't be split"
        sharing = place.sharing(packed=packed, pair_cost=_pair_cost(base))
        if packed:
            attention.check_heads(base.config.num_key_value_heads, place.sequence)
            attention.use(base)
        if config.checkpoint_activations:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        if config.lora_rank:
            lora.attach(base, config.lora_rank, config.lora_alpha)
        model = (of(base) if of else base).train()
        sharded = self.ranks.shard(model, forward)
        if stored:
            models.fill(model, self.source, self.ranks.device)
        lora.begin(model, self.seed)
        return Network(model, sharded, config, self.ranks, sharing)

    # ------------------------------------------------------------------ training

    def step(self, rows: Sequence[Row]) -> StepReport:
        """Train on one batch of rows and advance the version by one (also where `rows` is empty or an update was
        skipped)."""
        wall, cpu = time.perf_counter(), self._cpu()
        report = StepReport(version=self.version + 1, rows=len(rows), lr=self.config.rate(self.updates, self.steps))
        if self.algorithm.correction != "none" and self.config.minibatches > 1:
            scores = self.score([row.token_ids for row in rows])
            rows = [replace(row, old=score) for row, score in zip(rows, scores, strict=True)]
        if self.critic is not None:
            rows = valued(rows, self.critic.scan([row.token_ids for row in rows]), self.algorithm)
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
        """Rows dealt into `minibatches` parts; the rows of one trajectory stay together. Parts without an action token are
        left out."""
        trajectories, count = by_trajectory(rows), self.config.minibatches
        self.random.shuffle(trajectories)
        parts = [[rows[i] for members in trajectories[part::count] for i in members] for part in range(count)]
        return [part for part in parts if any(row.action_tokens for row in part)]

    def _teach(self, critic: Network, rows: Sequence[Row], report: StepReport) -> None:
        """One update of the critic. Parts of a batch are about equal: the reported loss is the sum of their shares."""
        update = critic.update(rows, loss_of(rows, self.algorithm.value_clip), self.config.critic_lr or self.config.lr)
        report.skipped += not update.finite
        loss = update.loss / self.config.minibatches if update.finite else 0.0
        report.metrics["value_loss"] = report.metrics.get("value_loss", 0.0) + loss

    def _update(self, rows: Sequence[Row], report: StepReport, first: bool) -> None:
        """One update of the policy."""
        lr = self.config.rate(self.updates, self.steps)
        update = self.policy.update(rows, self._loss(rows), lr)
        report.positions += update.positions
        if not update.finite:
            report.skipped += 1
            return
        report.lr = lr
        self.updates += 1
        _merge(report, update, sum(row.action_tokens for row in rows), first)

    def _loss(self, rows: Sequence[Row]) -> Loss:
        """The policy's, divided by counts of all of `rows`."""
        divisor = normaliser(
            self.algorithm,
            action_tokens=sum(row.action_tokens for row in rows),
            trajectories=len(by_trajectory(rows)),
            context=self.context,
        )

        def loss(batch: MicroBatch, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, dict[str, float]]:
            terms = (logprobs, batch.behaviour, batch.advantages, batch.mask)
            return policy_loss(*terms, self.algorithm, divisor, old=batch.old, entropy=entropy, lengths=batch.lengths)

        return loss

    def _cpu(self) -> float:
        """CPU seconds: of this thread where it computes alone, else of the process."""
        return time.thread_time() if self.config.threads == 1 else time.process_time()

    # ------------------------------------------------------------------ weights and scores

    def weights(self) -> dict[str, np.ndarray]:
        """The weights of `version`, by parameter name, as copies; where adapters are trained those alone
        (`policy.lora.adapters_of`). Nothing on ranks but the first."""
        model, first = self.policy.model, self.place.rank == 0
        return lora.adapters_of(model, keep=first) if self.config.lora_rank else state_of(model, keep=first)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability (nats, temperature 1) of each token given those before it; 0.0 for the first. Nothing is
        cached."""
        return self.policy.scan(sequences)

    # ------------------------------------------------------------------ state

    def export(self, directory: Path) -> None:
        """Write the model alone, in the form that `policy.models.load` reads; adapters are merged into it."""
        first = self.place.rank == 0
        weights = lora.merged_of(self.policy.model, keep=first)
        if first:
            models.save(self.policy.model, directory, weights)

    def save(self, directory: Path) -> None:
        """Write weights, optimiser, counters and random state into `directory` (torch.distributed.checkpoint shards); a
        learner of any number of ranks can load it."""
        self.policy.save(directory, self._counters())
        if self.critic is not None:
            self.critic.save(directory / CRITIC, {})

    def load(self, directory: Path) -> None:
        """The inverse of `save`: the next `step` gives bitwise the weights that an uninterrupted run would have.

        Raises `ValueError` where the directory holds the state of another model, or none, or no critic's for a learner
        that has one.
        """
        if self.critic is not None:
            if not (directory / CRITIC).is_dir():
                raise ValueError(
                    f"checkpoint {directory} is of a run without a critic, which algorithm={self.config.algorithm!r} has; "
                    "resume with the algorithm it was made with, or start a new run"
                )
            self.critic.load(directory / CRITIC, {})
        counters = self.policy.load(directory, self._counters())
        self.version, self.updates = counters["version"], counters["updates"]
        version, internal, gauss = counters["random"]
        self.random.setstate((version, tuple(internal), gauss))

    def _counters(self) -> dict[str, Any]:
        return {"version": self.version, "updates": self.updates, "random": self.random.getstate()}


def logprobs_of(
    model: PreTrainedModel, layout: Padded, token_ids: Tensor, targets: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """[B, T] → log-probabilities and entropies of the targets; see `rl.network.Forward`."""
    ids, goals = layout.pack(token_ids), layout.pack(targets)
    hidden = model.model(input_ids=ids, use_cache=False, **layout.arguments()).last_hidden_state
    logprobs, entropy = token_logprobs(hidden, model.lm_head.weight, goals, None if mask is None else layout.pack(mask))
    return layout.unpack(logprobs), layout.unpack(entropy)


def _merge(report: StepReport, update: Update, tokens: int, first: bool) -> None:
    """Add an update of `tokens` action tokens to the report: metrics are means over tokens, `mismatch_kl` that of the first
    update."""
    report.updates += 1
    report.loss += update.loss
    report.grad_norm += update.grad_norm
    share = tokens / (report.tokens + tokens)
    report.tokens += tokens
    for key, value in update.metrics.items():
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
