"""What a server allows and charges: a pace a minute, and money. Pure: whoever calls brings the time, and waits."""

from __future__ import annotations

import threading
from dataclasses import dataclass


class OverBudget(ValueError):
    """The money that the user allowed is spent."""


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Money for a million tokens, in any one currency; 0: free."""

    prompt: float = 0.0
    completion: float = 0.0
    cached: float | None = None
    """Of prompt tokens that the server had kept; left out: `prompt`."""

    def __post_init__(self) -> None:
        for name in ("prompt", "completion", "cached"):
            if (getattr(self, name) or 0.0) < 0:
                raise ValueError(f"prices.{name}={getattr(self, name)} is negative; give money per million tokens")


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens of one call, as the server counts them."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    """Of `prompt`, those that the server had kept."""

    def cost(self, prices: Prices) -> float:
        """Money, unrounded."""
        cached = prices.prompt if prices.cached is None else prices.cached
        paid = (self.prompt - self.cached) * prices.prompt + self.cached * cached + self.completion * prices.completion
        return paid / 1e6


class Pace:
    """At most `per_minute` units a minute, spread evenly (a token bucket without a burst); first come, first served.

    In any span of s seconds at most `per_minute` · s / 60 units begin, and those of one more call. 0: no bound.
    """

    def __init__(self, per_minute: float) -> None:
        self._seconds = 60.0 / per_minute if per_minute else 0.0
        self._free = 0.0  # when the next call may begin
        self._lock = threading.Lock()

    def take(self, units: float, now: float) -> float:
        """Seconds that a call of so many units has to wait from `now` on; its units are taken."""
        with self._lock:
            begins = max(now, self._free)
            self._free = begins + units * self._seconds
            return begins - now

    def correct(self, units: float) -> None:
        """So many units more were used than taken; negative: fewer."""
        with self._lock:
            self._free += units * self._seconds


class Meter:
    """Calls, tokens and money so far. Thread-safe."""

    def __init__(self, prices: Prices, most: float) -> None:
        """most: money after which `check` refuses; 0: no bound."""
        self.prices, self.most = prices, most
        self.cost = 0.0
        self._counts = {"calls": 0, "retries": 0, "prompt_tokens": 0, "cached_tokens": 0, "completion_tokens": 0}
        self._lock = threading.Lock()

    def check(self) -> None:
        """`OverBudget` once the bound is reached. Calls under way then are still paid, so the end may lie above it."""
        if self.most and self.cost >= self.most:
            raise OverBudget(
                f"{self.cost:.4f} of max_cost={self.most:g} is spent after {self._counts['calls']} calls; raise max_cost to go on"
            )

    def add(self, usage: Usage) -> None:
        """A call was answered."""
        with self._lock:
            self.cost += usage.cost(self.prices)
            self._counts["calls"] += 1
            self._counts["prompt_tokens"] += usage.prompt
            self._counts["cached_tokens"] += usage.cached
            self._counts["completion_tokens"] += usage.completion

    def retry(self) -> None:
        """A call has to be made again."""
        with self._lock:
            self._counts["retries"] += 1

    def read(self) -> dict[str, float]:
        """Counts, and `cost`."""
        with self._lock:
            return {**self._counts, "cost": self.cost}
