"""`python -m rl sft`: supervised fine-tuning of a policy on trajectories, through TRL's `SFTTrainer`.

Two uses: the committed warm start (imperfect scripted experts, a tokenizer and a model made from nothing) and
rejection-sampling fine-tuning (a run's own resolved trajectories). Trajectories are trained as the tokens they are; the
loss weighs what the policy says by 1 and what it reads by `observation_weight`, so that a tiny model learns to copy.

The optimiser is Muon (Jordan et al. 2024) on the layers' matrices and AdamW on the rest: measured here
on this family, it reaches in 0.4 M tokens the loss that AdamW alone reaches in 0.9 M.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from agents.trajectory import Trajectory
from envs.swe.env import SWEEnv
from envs.task import Task
from envs.tiny import repairs
from envs.tiny.experts import Expert, Noise, bash, edit
from policy import models
from policy.models import ModelConfig
from policy.renderer import END, Renderer, train_tokenizer

Message = tuple[str, str]
"""Role and content; "assistant" is the policy."""


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """The recipe of a warm start; the defaults rebuild the committed one."""

    drills: int = 50_000
    """Drills among the episodes: a module is read and its line repaired, without noise and without running anything. They
    carry the skill at two thirds of an episode's tokens; trained apart from the episodes they are forgotten."""
    episodes: int = 4000
    """Expert episodes, with their noise, on tasks 0, 1, … of the train split."""
    epochs: float = 1.0
    """Passes over both."""
    tokens_per_step: int = 4096
    """Padded tokens of one optimiser step; trajectories of like length share one."""
    muon_lr: float = 0.02
    adam_lr: float = 4e-3
    warmup: int = 40
    """Optimiser steps of linear warm-up; then linear decay to 5 %."""
    observation_weight: float = 0.3
    """Loss weight of tokens that the policy reads; its own have 1."""
    vocab_size: int = 640
    seed: int = 0
    threads: int = 1
    noise: Noise = field(default_factory=Noise)
    model: ModelConfig = field(default_factory=lambda: ModelConfig(hidden_size=96, intermediate_size=256))


def play_expert(env: SWEEnv, task: Task, noise: Noise, seed: int) -> tuple[list[Message], float]:
    """One expert episode through the real environment, as messages, and its reward."""
    expert = Expert(task, random.Random(f"expert/{seed}/{task.id}"), noise)
    observation, _ = env.reset(options={"task": task})
    messages: list[Message] = [("user", observation)]
    while True:
        action = expert(observation)
        messages.append(("assistant", action))
        observation, reward, terminated, truncated, info = env.step(action)
        if terminated or truncated:
            return messages, reward
        messages.append((f"tool: {info['tool']}", observation))


DRILLS_FROM = 2_000_000
"""Index of the first drill's task in the train split; reinforcement learning starts at 1,000,000."""


def drill(task: Task) -> list[Message]:
    """The two turns that carry the skill, as messages: read the module, repair the line."""
    path, text = str(task.provenance["module"]), task.files(task.setup)[str(task.provenance["module"])].decode()
    wrong, right = (x.split("\n") for x in (text, task.files(task.grader.gold)[path].decode()))
    at = next(i for i, (a, b) in enumerate(zip(wrong, right, strict=True)) if a != b)
    return [
        ("user", path),
        ("assistant", bash(f"cat {path}")),
        ("tool: bash", text),
        ("assistant", edit(path, wrong[at], right[at])),
    ]


def collect(config: WarmStart, path: Path, backend: str = "auto") -> float:
    """Play the experts into a JSON-lines file of [messages, reward]; returns their mean reward. Resumes a partial file."""
    env = SWEEnv(backend=backend, reward="binary", context_lines=0)
    done = path.read_text().splitlines(keepends=True) if path.exists() else []
    done = [line for line in done if line.endswith("\n")][: config.episodes]
    path.write_text("".join(done))
    with path.open("a") as handle:
        for index in range(len(done), config.episodes):
            handle.write(json.dumps(play_expert(env, repairs.task("train", index), config.noise, config.seed)) + "\n")
            if (index + 1) % 500 == 0:
                print(f"collected {index + 1}/{config.episodes} expert episodes", flush=True)
    rewards = [json.loads(line)[1] for line in path.read_text().splitlines()]
    return sum(rewards) / len(rewards)


def render(renderer: Renderer, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Token ids and loss mask of an episode, laid out exactly as `agents.episode.run_episode` lays it out."""
    ids = renderer.start(messages[0][1])
    mask = [0] * len(ids)
    for role, content in messages[1:]:
        new = (
            [*renderer.encode(content), renderer.end_id]
            if role == "assistant"
            else renderer.extend(ids[-1], role, content)
        )
        ids += new
        mask += [int(role == "assistant")] * len(new)
    return ids, mask


def from_trajectories(trajectories: Iterable[Trajectory]) -> list[tuple[list[int], list[int]]]:
    """Token ids and loss masks of trajectories, branch by branch."""
    return [(s.token_ids, s.loss_mask) for t in trajectories for s in t.segments]


class _Pair(torch.optim.Optimizer):
    """Two optimisers behind one interface, so that one schedule and one trainer drive both."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        super().__init__([p for o in optimizers for g in o.param_groups for p in g["params"]], {})
        self.param_groups = [g for o in optimizers for g in o.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group, own in zip(self.param_groups, (g for o in self.optimizers for g in o.param_groups), strict=True):
            own["lr"] = group["lr"]  # a trainer may have replaced our group dicts by copies
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by five Newton–Schulz steps, for matrices (Jordan et al. 2024, coefficients as there).

    `torch.optim.Muon` iterates in bfloat16, which on a CPU without bfloat16 units took ten times as long as a forward
    and backward pass of the tiny model; this one iterates in the parameters' own type.
    """

    def __init__(self, params: Iterable[torch.Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update: Nesterov momentum, orthogonalised, scaled by sqrt(max(1, rows / columns))."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = _orthogonal(p.grad.lerp(buffer, group["momentum"]))
                p.add_(update, alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def _optimizer(model: torch.nn.Module, config: WarmStart) -> _Pair:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "layers" in n)]
    return _Pair(
        Muon(matrices, lr=config.muon_lr),
        torch.optim.AdamW(rest, lr=config.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    )


def _bunches(
    rows: Sequence[tuple[list[int], list[int]]], budget: int, epochs: float, rng: random.Random
) -> list[list[int]]:
    """Row indices per optimiser step: like lengths together, at most `budget` padded tokens, in random order."""
    total, steps = int(len(rows) * epochs), []
    while total > 0:
        order = list(range(len(rows)))[: max(total, 1)] if total < len(rows) else list(range(len(rows)))
        total -= len(order)
        rng.shuffle(order)
        order.sort(key=lambda i: len(rows[i][0]) // 16)
        bunch: list[int] = []
        epoch = []
        for i in order:
            longest = max([len(rows[j][0]) for j in bunch] + [len(rows[i][0])])
            if bunch and longest * (len(bunch) + 1) > budget:
                epoch.append(bunch)
                bunch = []
            bunch.append(i)
        epoch.append(bunch)
        rng.shuffle(epoch)
        steps += epoch
    return steps


def fit(
    model: Any, rows: Sequence[tuple[list[int], list[int]]], config: WarmStart, tokenizer: Path, workdir: Path
) -> list[dict[str, float]]:
    """Train `model` in place on (token ids, loss mask) rows; returns TRL's log. `tokenizer` is its tokenizer.json. Deterministic for a seed and thread count."""
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(config.threads)
    steps = _bunches(rows, config.tokens_per_step, config.epochs, random.Random(config.seed))

    def collate(bunch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        picked = [rows[i] for i in bunch[0]["rows"]]
        width = max(len(ids) for ids, _ in picked)
        ids = torch.zeros(len(picked), width, dtype=torch.long)
        weights = torch.zeros(len(picked), width)
        for at, (tokens, mask) in enumerate(picked):
            ids[at, : len(tokens)] = torch.tensor(tokens)
            own = torch.tensor(mask, dtype=torch.float32)
            weights[at, : len(tokens)] = own + (1 - own) * config.observation_weight
        return {"input_ids": ids, "weights": weights}

    class Weighted(SFTTrainer):  # type: ignore[misc]
        """SFTTrainer with a weight per token; right padding under causal attention needs no mask."""

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            logits = model(input_ids=inputs["input_ids"], use_cache=False).logits[:, :-1]
            weights = inputs["weights"][:, 1:]
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), inputs["input_ids"][:, 1:].flatten(), reduction="none"
            )
            return (loss * weights.flatten()).sum() / weights.sum()

        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    def schedule(step: int) -> float:
        return min(1.0, (step + 1) / config.warmup) * (1 - 0.95 * min(1.0, step / len(steps)))

    optimizer = _optimizer(model, config)
    arguments = SFTConfig(
        output_dir=str(workdir),
        per_device_train_batch_size=1,
        max_steps=len(steps),
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_grad_norm=1.0,
        seed=config.seed,
        disable_tqdm=True,
    )
    trainer = Weighted(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"rows": steps}),
        data_collator=collate,
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)),
        processing_class=PreTrainedTokenizerFast(tokenizer_file=str(tokenizer), eos_token=END, pad_token=END),
    )
    trainer.train()
    return list(trainer.state.log_history)


def warm_start(config: WarmStart, out: Path, workdir: Path, backend: str = "auto") -> dict[str, Any]:
    """Collect, train a tokenizer and a model from nothing, and save both in `out` with what they were made from."""
    workdir.mkdir(parents=True, exist_ok=True)
    solved = collect(config, workdir / "experts.jsonl", backend)
    episodes: list[list[Message]] = [
        json.loads(line)[0] for line in (workdir / "experts.jsonl").read_text().splitlines()
    ]
    out.mkdir(parents=True, exist_ok=True)
    texts = (content for messages in episodes[:2000] for _, content in messages)
    train_tokenizer(texts, config.vocab_size).save(str(out / "tokenizer.json"))
    renderer = Renderer(out)
    drills = [render(renderer, drill(repairs.task("train", DRILLS_FROM + i))) for i in range(config.drills)]
    rows = [render(renderer, messages) for messages in episodes]
    size = replace(config.model, vocab_size=renderer.vocab_size, eos_id=renderer.end_id)
    model = models.build(size, config.seed)
    log = fit(model, [*drills, *rows], config, out / "tokenizer.json", workdir)
    models.save(model, out)
    facts = {
        "made_by": "python -m rl sft",
        "config": asdict(config),
        "expert_solve_rate": round(solved, 4),
        "tokens": int(sum(len(ids) for ids, _ in [*drills, *rows]) * config.epochs),
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": [round(row["loss"], 4) for row in log if "loss" in row][-1:],
    }
    (out / "warm_start.json").write_text(json.dumps(facts, indent=1) + "\n")
    return facts


def imitate(run: Path, model_dir: Path, out: Path, config: WarmStart, workdir: Path) -> dict[str, Any]:
    """Rejection-sampling fine-tuning: continue `model_dir` on the resolved trajectories of a run. One optimiser step sees
    what the policy said only (weight 1), nothing that it read."""
    files = sorted((run / "trajectories").glob("*.jsonl"))
    if not files:
        raise ValueError(f"no trajectories under {run}; give a run directory that was trained with keep_trajectories")
    every = [Trajectory.from_json(line) for path in files for line in path.read_text().splitlines()]
    good = [t for t in every if t.outcome == "resolved"]
    if not good:
        raise ValueError(f"none of the {len(every)} trajectories of {run} is resolved; there is nothing to imitate")
    model = models.load(model_dir)
    gentle = replace(config, observation_weight=0.0, muon_lr=config.muon_lr / 10, adam_lr=config.adam_lr / 10)
    log = fit(model, from_trajectories(good), gentle, model_dir / "tokenizer.json", workdir)
    models.save(model, out)
    (out / "tokenizer.json").write_bytes((model_dir / "tokenizer.json").read_bytes())
    return {"resolved": len(good), "of": len(every), "loss": [round(r["loss"], 4) for r in log if "loss" in r][-1:]}
