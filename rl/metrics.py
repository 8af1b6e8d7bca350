"""Every number that a run logs: its name, meaning and reduction, once; and the sinks they go to.

`metrics.jsonl` has one object a line with `kind` "step", "eval" or "end". TensorBoard gets the numeric fields of steps and
evaluations under `step/…` and `eval/<split>/…`, and so does W&B where `track` has it.
"""

from __future__ import annotations

import json
import os
import secrets
import tomllib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agents.trajectory import Group

GLOSSARY: dict[str, str] = {
    "kind": "what the row is about: a step, an evaluation (eval), or the end of the run",
    "step": "batches trained on so far",
    "wall": "seconds since the run (or its resumption) started",
    "trajectories": "trajectories of the batch",
    "version": "version of the weights after the step",
    "reward": "mean return of the graded trajectories, of the batch or the evaluation",
    "solve_rate": "share of the batch's graded trajectories with outcome resolved",
    "live_groups": "share of groups with two different returns; only these carry a signal",
    "kept": "share of the batch's trajectories in the gradient",
    "turns": "mean turns of the batch's trajectories",
    "branches": "mean branches of the batch's trajectories: over 1 where the chat template changes what was said before",
    "tokens": "tokens of the rows in the gradient",
    "action_tokens": "sampled tokens in the gradient",
    "train_seconds": "seconds that the learner took for the batch",
    "loss": "mean policy loss of the step's updates",
    "value_loss": "half the mean squared error of the critic at action tokens, clipped, mean of the step's updates",
    "explained_variance": "1 − Var(return − value) / Var(return) over action tokens, of values from before the step",
    "value": "mean value at action tokens, from before the step: what return the critic expects",
    "grad_norm": "mean gradient norm before clipping",
    "entropy": "mean entropy of the policy at sampled tokens, nats",
    "clip_low": "share of action tokens whose ratio was clipped below",
    "clip_high": "share of action tokens whose ratio was clipped above",
    "corrected": "share of action tokens whose weight against the sampler's mismatch was truncated or masked",
    "ratio": "mean importance ratio of action tokens",
    "mismatch_kl": "k3 estimate of KL(behaviour ‖ current) at the step's first update, nats a token: engine and staleness",
    "parity": "largest |log-prob of the engine − log-prob of the learner| on the probe sequences after the publish, nats",
    "staleness_max": "largest age in versions of any token in the batch",
    "staleness_mean": "mean over trajectories of the age of their oldest token",
    "mixed": "share of trajectories with tokens of two or more versions",
    "dropped": "trajectories of the batch that are not in the gradient, by reason",
    "stops": "trajectories of the batch by what ended them",
    "infra": "episodes lost to infrastructure since the run started; each was tried again or left out",
    "dropped_groups": "groups dropped since the run started, with or without a try at training",
    "source_groups": "groups of the batch by source of tasks, where a recipe has several",
    "source_reward": "mean return of the batch's graded trajectories, by source",
    "source_solve": "share of the batch's graded trajectories with outcome resolved, by source",
    "outside": "groups dropped since the run started for a solve rate outside of their source's window, by source",
    "in_flight": "episodes in flight when the step ended",
    "engine_busy": "share of the step's wall clock in which the engine computed",
    "env_busy": "mean episodes in an environment's reset or step (sandbox work), over the step's wall clock",
    "learner_busy": "share of the step's wall clock in which the learner trained",
    "decoded_tokens": "tokens sampled since the run started",
    "unexplained": "largest share of a component's wall clock since the run started that no label of its ledger has",
    "split": "what the evaluation's tasks are of",
    "solve": "share of the evaluation's episodes with outcome resolved",
    "n": "episodes of the evaluation",
    "ledgers": "seconds by component (episodes: of all slots) and label since the run started; they sum to its wall clock",
    "counts": "the engine's tokens, completions, steps and swaps since the run started",
    "paces": "of the engine's decode steps: rows, how many had so many, their seconds",
    "summary": "the run's last words",
}


def by_source(groups: Sequence[Group], source_of: Callable[[str], str]) -> dict[str, dict[str, float]]:
    """The metrics `source_*` of a batch; `source_of` names the source of a group by its id."""
    found: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        found[source_of(group.id)].append(group)
    graded = {name: max(1, sum(g.graded for g in of)) for name, of in found.items()}
    paid = {name: sum(t.reward or 0.0 for g in of for t in g.trajectories) for name, of in found.items()}
    return {
        "source_groups": {name: len(of) for name, of in found.items()},
        "source_reward": {name: paid[name] / graded[name] for name in found},
        "source_solve": {name: sum(g.solved for g in of) / graded[name] for name, of in found.items()},
    }


class Sink:
    """Where metrics go. `write` returns at once; files are flushed per row, so a killed run keeps what it logged."""

    def __init__(self, directory: Path, track: Sequence[str] = ("tensorboard",), behind: int = 0) -> None:
        """`track`: names of `TRACKERS`. `behind`: the last step that is kept of what TensorBoard has."""
        self._file = (directory / "metrics.jsonl").open("a")
        self._trackers = [TRACKERS[name](directory, behind) for name in track]

    def write(self, kind: str, row: Mapping[str, Any]) -> None:
        """Append one row."""
        self._file.write(json.dumps({"kind": kind, **row}) + "\n")
        self._file.flush()
        if kind in ("step", "eval"):
            for tracker in self._trackers:
                tracker.add(scalars(kind, row), row["step"])

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


def scalars(kind: str, row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row of kind "step" or "eval", by the names that trackers show."""
    prefix = "step" if kind == "step" else f"eval/{row['split']}"
    counts = {f"{k}/{name}": n for k, v in row.items() if isinstance(v, dict) for name, n in v.items()}
    return {f"{prefix}/{k}": v for k, v in {**row, **counts}.items() if isinstance(v, int | float) and k != "step"}


class _TensorBoard:
    def __init__(self, directory: Path, behind: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(directory / "tensorboard"), purge_step=behind + 1)
        self.close = self._writer.close

    def add(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)


class _Wandb:
    """One W&B run per run directory, also over resumptions; rows that did not survive stay there, under the same steps."""

    def __init__(self, directory: Path, behind: int) -> None:
        import wandb

        identity = directory / "wandb-id"
        if not identity.exists():
            identity.write_text(secrets.token_hex(4))
        project, recipe = (
            os.environ.get("WANDB_PROJECT", "codeworld"),
            tomllib.loads((directory / "recipe.toml").read_text()),
        )
        try:
            self._run: Any = wandb.init(
                project=project,
                name=directory.name,
                id=identity.read_text(),
                resume="allow",
                dir=str(directory),
                config=recipe,
            )
        except Exception as error:
            why = " ".join(str(error).split())[:200]
            raise ValueError(f"track: wandb does not start ({why}); `wandb login`, or set WANDB_MODE=offline") from None
        self._run.define_metric("*", step_metric="step")
        self.close = self._run.finish

    def add(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})


TRACKERS: dict[str, Any] = {"tensorboard": _TensorBoard, "wandb": _Wandb}


def check(track: Sequence[str]) -> None:
    """`ValueError` where a tracker's package is missing."""
    if "wandb" in track:
        try:
            from wandb import init  # noqa: F401 (a directory `wandb` passes for a package, but has no such name)
        except ImportError:
            raise ValueError('track has "wandb", which is not installed; pip install wandb, or leave it out') from None


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a torn last line is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def truncate(path: Path, step: int) -> None:
    """Forget rows after `step`: they belong to weights that did not survive."""
    if path.exists():
        kept = [r for r in read(path) if r.get("step", 0) <= step and r["kind"] != "end"]
        partial = path.with_suffix(".tmp")
        partial.write_text("".join(json.dumps(r) + "\n" for r in kept))
        partial.rename(path)
