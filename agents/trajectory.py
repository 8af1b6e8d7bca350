"""Episodes as exact tokens: append-only parallel lists, checked on every append.

A trajectory is one finished episode. Its tokens are the very ids that the engine read and sampled: nothing is decoded and
encoded again. Where the next prompt does not extend the tokens so far (`policy.renderer`), it opens a new *branch*
(`Segment`); the return is shared by all branches of a trajectory.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from policy.completion import Completion, digest


@dataclass
class Segment:
    """One branch: four parallel lists.

    Example: a prompt of two tokens, a sampled turn of two, an observation of one::

        token_ids [5, 6, 17, 2, 8]   loss_mask [0, 0, 1, 1, 0]   logprobs [0, 0, -.1, -.9, 0]   versions [-1, -1, 4, 5, -1]
    """

    token_ids: list[int] = field(default_factory=list)
    loss_mask: list[int] = field(default_factory=list)
    """1 where the policy sampled the token, else 0."""
    logprobs: list[float] = field(default_factory=list)
    """Behaviour log-probability where the mask is 1, else 0."""
    versions: list[int] = field(default_factory=list)
    """Version of the weights that sampled the token where the mask is 1, else -1."""

    def __len__(self) -> int:
        return len(self.token_ids)

    def observe(self, token_ids: Sequence[int]) -> None:
        """Append tokens that the policy did not sample."""
        n = len(token_ids)
        self._extend(list(token_ids), [0] * n, [0.0] * n, [-1] * n)

    def act(self, completion: Completion) -> None:
        """Append a sampled turn. Asserts that the engine attended to exactly the tokens held here."""
        mine = digest(self.token_ids)
        assert completion.prompt_digest == mine, (
            f"token drift: the engine read ids with digest {completion.prompt_digest}, the trajectory holds {mine} ({len(self)} tokens)"
        )
        n = len(completion.token_ids)
        self._extend(completion.token_ids, [1] * n, completion.logprobs, completion.versions)

    def _extend(self, ids: list[int], mask: list[int], logprobs: list[float], versions: list[int]) -> None:
        self.token_ids += ids
        self.loss_mask += mask
        self.logprobs += logprobs
        self.versions += versions
        self.check()

    def check(self) -> None:
        """Equal lengths, or an AssertionError."""
        lengths = {len(self.token_ids), len(self.loss_mask), len(self.logprobs), len(self.versions)}
        assert len(lengths) == 1, f"parallel lists differ in length: {lengths}"


@dataclass
class Trajectory:
    """One finished episode: tokens, return, and how it ended."""

    task_id: str
    sample: int = 0
    """Index in its group."""
    segments: list[Segment] = field(default_factory=list)
    reward: float | None = None
    """Return of the episode; None where grading gave none (`infra`): such a trajectory is never trained on."""
    outcome: str = "infra"
    """How grading ended: resolved, unresolved, invalid, timeout or infra."""
    stop: str = "infra"
    """How the episode ended: submitted, answered, turn_limit, context_limit, format_error, timeout, infra, cancelled."""
    turns: int = 0
    info: dict[str, Any] = field(default_factory=dict)
    """For people and measurements: reasons, timings, names, an environment's `notes`. Training computes nothing from it."""

    @property
    def action_tokens(self) -> int:
        """Sampled tokens over all branches."""
        return sum(sum(s.loss_mask) for s in self.segments)

    @property
    def oldest_version(self) -> int:
        """Smallest version that sampled a token; -1 for a trajectory without actions."""
        return min((v for s in self.segments for v in s.versions if v >= 0), default=-1)

    @property
    def newest_version(self) -> int:
        """Largest version that sampled a token; -1 for a trajectory without actions."""
        return max((v for s in self.segments for v in s.versions), default=-1)

    @property
    def trainable(self) -> bool:
        """It has a reward and at least one sampled token."""
        return self.reward is not None and self.action_tokens > 0

    def to_json(self) -> str:
        """One JSON line."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> Trajectory:
        """The inverse of `to_json`."""
        raw = json.loads(line)
        raw["segments"] = [Segment(**s) for s in raw["segments"]]
        trajectory = cls(**raw)
        for segment in trajectory.segments:
            segment.check()
        return trajectory


@dataclass
class Group:
    """The trajectories of one task: what a baseline is computed over."""

    id: str
    task_id: str
    trajectories: list[Trajectory] = field(default_factory=list)

    @property
    def solved(self) -> int:
        """Trajectories with outcome resolved."""
        return sum(t.outcome == "resolved" for t in self.trajectories)

    @property
    def graded(self) -> int:
        """Trajectories with a reward."""
        return sum(t.reward is not None for t in self.trajectories)

    @property
    def oldest_version(self) -> int:
        """Smallest version that sampled a token of any trajectory; -1 where none was sampled."""
        return min((t.oldest_version for t in self.trajectories if t.action_tokens), default=-1)
