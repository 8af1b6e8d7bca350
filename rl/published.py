"""Published agentic RL runs of the 32B class: what `rl plan` prints beside its forecast. Each has its own tasks, lengths and batch."""

from __future__ import annotations

from typing import NamedTuple


class Run(NamedTuple):
    """A run that somebody reported."""

    who: str
    model: str
    gpus: str
    step_seconds: float
    """Wall clock of a step, as reported or as hours divided by steps."""
    source: str


PUBLISHED = (
    Run("SkyRL with ThunderAgent", "Qwen3-32B", "40 H100", 796, "R2E-Gym, 40 steps in 8.84 h (26.58 h without); arXiv 2602.13692"),
    Run("DeepSWE (rLLM)", "Qwen3-32B", "64 H100", 2592, "R2E-Gym, about 200 steps in 6 days; rLLM's report"),
    Run("uni-agent", "30B class", "64 A100", 824, "SWE at 128k tokens and 100 turns, 200 steps in 45.8 h; its documentation"),
    Run("NeMo-RL 0.6", "Nemotron-3-Nano-30B-A3B", "128 H100", 430, "SWE at 31.6k tokens a trajectory; its release notes"),
)  # fmt: skip

LARGE = 10e9
"""Parameters from which these runs are of any interest."""
