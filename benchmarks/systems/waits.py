"""Small training runs whose time is waiting, for measurements of the loop: the waits are known, everything else is real.

Real are the loop, admission, workers, journal, record, the publish of weights and its parity check, on threads of this process.
`Turns` is an environment whose steps only wait, `model` a policy whose computing hardly counts, `train` one run.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import envs
from rl.config import ROOT, Config, EnvConfig, EvalConfig, LearnConfig, PolicyConfig, RolloutConfig
from rl.metrics import read

TURNS = 3
"""Turns of an episode of `Turns`."""


class Turns(envs.Env):
    """Some turns without a meaning; the last action's checksum decides the reward, so that groups have a signal."""

    context_tokens = 256

    def __init__(self, tool: float = 0.0) -> None:
        """tool: seconds that each step waits."""
        self.tool, self.turn = tool, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """A statement that differs by task."""
        super().reset(seed=seed)
        self.turn = 0
        return f"Task {self.index(seed)}.", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """One more turn."""
        time.sleep(self.tool)
        self.turn += 1
        last = self.turn == TURNS
        return "go on", float(last and zlib.crc32(action.encode()) % 2), last, False, {}


def model(directory: Path) -> Path:
    """A random policy of 20,000 parameters with the tiny recipe's tokenizer, in Hugging Face format."""
    from policy import models
    from policy.renderer import load

    tiny = ROOT / "policy/cwm_tiny"
    size = models.ModelConfig(
        vocab_size=load(tiny).vocab_size,
        hidden_size=16,
        layers=1,
        heads=2,
        kv_heads=2,
        intermediate_size=32,
        max_context=256,
    )
    policy = models.build(size)
    models.save(policy, directory)
    shutil.copy(tiny / "tokenizer.json", directory)
    return directory


def config(
    directory: Path, *, groups: int, size: int, slots: int, steps: int, staleness: int, tool: float = 0.0
) -> Config:
    """The recipe of one run: `slots` episodes in flight, batches of `groups` x `size`."""
    return Config(
        name="run",
        runs=str(directory),
        steps=steps,
        checkpoint_every=steps,
        keep_trajectories=False,
        track=(),
        env=EnvConfig(id="benchmarks.systems.waits:Turns", kwargs={"tool": tool}),
        policy=PolicyConfig(model=str(directory / "model"), max_tokens=8, max_context=256),
        rollout=RolloutConfig(spawn="threads", workers=slots, group_size=size),
        learn=LearnConfig(algorithm="grpo", groups_per_step=groups, max_staleness=staleness, minibatches=1),
        eval=EvalConfig(every=0),
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the view of the run, and the progress bars of whom it calls."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        yield


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What a run left."""

    steps: Sequence[dict[str, Any]]
    """Its rows of metrics."""
    ledgers: dict[str, dict[str, float]]
    unexplained: float
    bottleneck: str
    """Its last line."""
    seconds: float
    """From the start of the loop to the last batch's proven publish."""


def train(**sizes: Any) -> Ran:
    """Train once, with a directory and a model of its own; `sizes` as in `config`."""
    from rl import train as command

    with tempfile.TemporaryDirectory() as name, _quiet():
        model(Path(name) / "model")
        one = config(Path(name), **sizes)
        summary = command.train(one)
        rows = read(one.directory / "metrics.jsonl")
    steps, end = [row for row in rows if row["kind"] == "step"], rows[-1]
    return Ran(
        steps=steps,
        ledgers=end["ledgers"],
        unexplained=end["unexplained"],
        bottleneck=summary.splitlines()[-1],
        seconds=steps[-1]["wall"] - end["ledgers"]["loop"]["wait_start"],
    )
