"""Every number that a run logs: its name, meaning and reduction, once; and the sinks they go to.

`metrics.jsonl` has one object a line with `kind` "step", "eval" or "end". TensorBoard gets the numeric fields of steps and
evaluations under `step/…` and `eval/<split>/…`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agents.trajectory import Group

GLOSSARY: dict[str, str] = {
    "step": "batches trained on so far",
    "wall": "seconds since the run (or its resumption) started",
    "trajectories": "trajectories of the batch",
    "version": "version of the weights after the step",
    "reward": "mean return of the batch's graded trajectories",
    "solve_rate": "share of the batch's graded trajectories with outcome resolved",
    "live_groups": "share of groups with two different returns; only these carry a signal",
    "kept": "share of the batch's trajectories in the gradient",
    "turns": "mean turns of the batch's trajectories",
    "tokens": "tokens of the rows in the gradient",
    "action_tokens": "sampled tokens in the gradient",
    "train_seconds": "seconds that the learner took for the batch",
    "loss": "mean policy loss of the step's updates",
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
    "solve": "share of the evaluation's episodes with outcome resolved",
    "n": "episodes of the evaluation",
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

    def __init__(self, directory: Path, tensorboard: bool = True, behind: int = 0) -> None:
        """`behind`: the last step that is kept of what TensorBoard has."""
        self.path = directory / "metrics.jsonl"
        self._file = self.path.open("a")
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=behind + 1)

    def write(self, kind: str, row: Mapping[str, Any]) -> None:
        """Append one row."""
        self._file.write(json.dumps({"kind": kind, **row}) + "\n")
        self._file.flush()
        if self._board is not None and kind in ("step", "eval"):
            prefix = "step" if kind == "step" else f"eval/{row['split']}"
            counts = {f"{k}/{name}": n for k, v in row.items() if isinstance(v, dict) for name, n in v.items()}
            for key, value in {**row, **counts}.items():
                if isinstance(value, int | float) and key.split("/")[0] in GLOSSARY and key != "step":
                    self._board.add_scalar(f"{prefix}/{key}", value, row["step"])

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        if self._board is not None:
            self._board.close()


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
