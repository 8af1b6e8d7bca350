"""What a policy is asked and what it answers: the types every engine shares. No torch here."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one completion is drawn."""

    temperature: float = 1.0
    """0 takes the most likely token (greedy); log-probs are then those of temperature 1."""
    top_p: float = 1.0
    """Nucleus mass; log-probs are of the distribution sampled from."""
    max_tokens: int = 128
    """Most tokens of one completion; the stop token counts."""
    stop_ids: tuple[int, ...] = ()
    """Token ids that end a completion; the stop token is part of it."""
    seed: int | None = None
    """Seeds this completion alone, so that it does not depend on what else is in the engine's batch."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"sampling.temperature={self.temperature} is negative; 0 is greedy, 1 the policy itself")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p={self.top_p} must be in (0, 1]; 1 keeps every token")
        if self.max_tokens < 1:
            raise ValueError(f"sampling.max_tokens={self.max_tokens} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One sampled model message, as tokens. The three lists have equal length.

    Example: a turn that was sampled while version 4 was swapped for 5 after its second token::

        Completion(token_ids=[17, 9, 2], logprobs=[-0.1, -1.2, -0.0], versions=[4, 4, 5], finish="stop", prompt_digest=…)
    """

    token_ids: list[int]
    logprobs: list[float]
    """Log-probability of each token under the weights and temperature it was sampled with, nats."""
    versions: list[int]
    """Version of the weights that sampled each token."""
    finish: Literal["stop", "length", "cancelled"]
    """"length": `max_tokens` or the engine's context ended it; "cancelled": `release` was called meanwhile."""
    prompt_digest: int
    """`digest` of the ids the engine really attended to before this completion: the token-exactness assertion
    compares it with the trajectory's own ids."""
    queued: float = 0.0
    """Seconds from the call until the engine began with it: the turn had to wait for a place."""

    def __post_init__(self) -> None:
        assert len(self.token_ids) == len(self.logprobs) == len(self.versions), "completion lists differ in length"


def digest(token_ids: Sequence[int]) -> int:
    """CRC-32 of a list of token ids (as 32-bit little-endian integers)."""
    return zlib.crc32(array("i", token_ids).tobytes())


class Policy(Protocol):
    """Whatever answers: an engine, an endpoint or a script. Thread-safe; `generate` blocks its caller."""

    def generate(self, token_ids: Sequence[int], sampling: Sampling, episode: str) -> Completion:
        """Continue `token_ids`. `episode` names the KV to keep between turns; its next call extends these ids, or at least
        begins as they do (a branch, see `policy.renderer`).

        Raises `envs.errors.InfraError` when the engine failed.
        """

    def release(self, episode: str) -> None:
        """Forget the episode's KV. Unknown episodes are fine."""
