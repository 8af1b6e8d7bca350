"""Estimators that every table uses: rates with intervals, paired differences, pass@k. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from math import comb, log, sqrt

Z = 1.959964
"""Two-sided 95 % point of the normal distribution."""


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % Wilson interval of a rate."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, Z * Z
    centre, half = p + z2 / (2 * n), Z * sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return (centre - half) / (1 + z2 / n), (centre + half) / (1 + z2 / n)


def paired(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """Mean difference after − before over the same tasks, and its 95 % interval (normal, from the paired differences)."""
    if len(before) != len(after) or len(before) < 2:
        raise ValueError(f"paired needs two equally long lists of at least 2, not {len(before)} and {len(after)}")
    differences = [b - a for a, b in zip(before, after, strict=True)]
    n = len(differences)
    mean = sum(differences) / n
    error = sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1) / n)
    return mean, mean - Z * error, mean + Z * error


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate of P(at least one of k samples is right) from `correct` of n (Chen et al. 2021, arXiv 2107.03374)."""
    if k > n:
        raise ValueError(f"pass@{k} needs at least {k} samples, there are {n}")
    return 1.0 - comb(n - correct, k) / comb(n, k)


def ks(left: Sequence[float], right: Sequence[float]) -> float:
    """Kolmogorov-Smirnov statistic of two samples: the largest distance of their distribution functions. Ties are fine."""
    one, two = sorted(left), sorted(right)
    return max(abs(bisect_right(one, x) / len(one) - bisect_right(two, x) / len(two)) for x in {*one, *two})


def ks_critical(n: int, m: int, alpha: float = 0.01) -> float:
    """What `ks` exceeds with probability `alpha` where both samples are from one distribution (asymptotic; with ties, less).

    Smirnov 1948: sqrt(-ln(alpha / 2) / 2) sqrt((n + m) / (n m)).
    """
    return sqrt(-log(alpha / 2) / 2 * (n + m) / (n * m))
