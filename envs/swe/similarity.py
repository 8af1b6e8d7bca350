"""Patch similarity: how much of a right solution's text an attempt has. Pure functions of file contents."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

Contents = Mapping[str, bytes | None]
"""Path → file; None: there is none."""
WORK = 5_000_000
"""Equal pairs of elements that a comparison may look at at first: about a second."""


def patch_similarity(old: Contents, mine: Contents, gold: Contents | str) -> float:
    """Mean over the gold patch's files of the sequence ratio of the two unified diffs, in [0, 1]; a missing side counts 0.

    old: the files before. mine: the changed files of the attempt. gold: those of a right solution, or its unified diff.
    Only files of the gold patch count. Source: facebookresearch/cwm `cwm/rl/swerl/similarities.py` (after swe-rl). Apart
    from it, diffs too long to be compared by characters are compared by lines, and those too long for that count 0.
    """
    right = diffs(gold) if isinstance(gold, str) else {path: hunks(old.get(path), data) for path, data in gold.items()}
    ratios = [_ratio(hunks(old.get(path), mine[path]), text) if path in mine else 0.0 for path, text in right.items()]
    return sum(ratios) / len(ratios) if ratios else 0.0


def hunks(old: bytes | None, new: bytes | None) -> str:
    """The lines of a unified diff with three lines of context, without its headers."""
    a, b = ((x or b"").decode("utf-8", "replace").splitlines() for x in (old, new))
    lines = difflib.unified_diff(a, b, lineterm="", n=3)
    return "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@")))


def diffs(patch: str) -> dict[str, str]:
    """Path → the lines of its hunks, of a unified diff of several files; a deleted file has its old path."""
    found: dict[str, list[str]] = {}
    path, left = "", [0, 0]
    for line in patch.splitlines():
        if max(left) > 0:  # in a hunk, whose header says how many lines it has
            found.setdefault(path, []).append(line)
            for side, mark in enumerate("-+"):
                left[side] -= line[:1] in (mark, " ", "")
        elif line.startswith(("--- ", "+++ ")):
            name = line[4:].partition("\t")[0].strip()
            path = path if name == "/dev/null" else re.sub(r"^[ab]/", "", name)
        elif match := re.match(r"@@ -\d+(?:,(\d+))? \+\d+(?:,(\d+))? @@", line):
            left = [int(size) if size else 1 for size in match.groups()]
    return {path: "\n".join(lines) for path, lines in found.items()}


def _ratio(mine: str, right: str) -> float:
    if not mine or not right:
        return 0.0
    for a, b in ((mine, right), (mine.split("\n"), right.split("\n"))):
        if _work(a, b) <= WORK:
            return difflib.SequenceMatcher(None, a, b, autojunk=False).ratio()
    return 0.0


def _work(a: Iterable[str], b: Sequence[str]) -> int:
    """Pairs of equal elements."""
    theirs = Counter(b)
    return sum(count * theirs[element] for element, count in Counter(a).items())
