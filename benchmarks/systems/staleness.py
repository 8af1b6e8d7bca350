"""Is learning worse for being asynchronous? The tiny recipe at several bounds of staleness, same seeds, at equal trained tokens.

Bound 0 samples each batch from the newest weights and waits for them; at 1 and 4 episodes go on while the learner works, and are trained
up to so many versions late. Two numbers of each run: the mean return of what it trained on while the last fifth of the tokens
was trained that *every* run reached, and unseen tasks solved at its end. Noise is the difference's standard error over seeds.
Finished parts are kept in `--out` and not done again.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.systems.base import row
from benchmarks.systems.learning import Lab
from envs.errors import check_output
from rl.metrics import read
from rl.report import CHART_STYLE, chart

Run = dict[str, Any]


def options(p: argparse.ArgumentParser) -> None:
    """This measurement's own options."""
    p.add_argument("--seeds", type=int, default=3, help="training seeds of each bound (default: %(default)s)")
    p.add_argument(
        "--bounds", type=int, nargs="+", default=[0, 1, 4], help="the first is the peer (default: %(default)s)"
    )
    p.add_argument("--steps", type=int, default=40, help="batches of a training run (default: %(default)s)")
    p.add_argument("--tasks", type=int, default=400, help="unseen tasks per evaluation (default: %(default)s)")
    p.add_argument("--recipe", default="rl/recipes/tiny.toml", help="what is trained (default: %(default)s)")
    p.add_argument("--figure", type=Path, help="write the curves to an SVG file")
    p.add_argument(
        "--out", type=Path, default=Path("runs/staleness"), help="where runs and parts are kept (default: %(default)s)"
    )


class Study(Lab):
    """Trains at every bound; every result is made once."""

    NAME = "staleness"

    def of(self, bound: int, seed: int) -> Run:
        """One run: its cost, its curve, and what it solves in the end."""
        name = f"bound-{bound}-{seed}"
        cost = self.train(name, f"--seed={seed}", f"--learn.max_staleness={bound}")
        solved = self.solve(name, self.model(name), "validation", 1.0)
        steps = [r for r in read(self.out / name / "metrics.jsonl") if r["kind"] == "step"]
        return {"bound": bound, "seed": seed, **cost, "solved": mean(solved), "curve": curve(steps)}


def curve(steps: Sequence[dict[str, Any]]) -> list[list[float]]:
    """Of each step: tokens trained so far, mean return of the batch, mean age of its trajectories, wall clock."""
    total, made = 0, []
    for step in steps:
        total += step["action_tokens"]
        made.append([total, step["reward"], step["staleness_mean"], step["wall"]])
    return made


def at_equal_tokens(runs: Sequence[Run]) -> list[float]:
    """Each run's mean return over the last fifth of the tokens that all have trained, token by token."""
    reach = min(r["curve"][-1][0] for r in runs)
    return [_mean_between(r["curve"], 0.8 * reach, reach) for r in runs]


def _mean_between(steps: Sequence[Sequence[float]], low: float, high: float) -> float:
    starts = [0.0, *(step[0] for step in steps)]
    shares = [max(0.0, min(high, step[0]) - max(low, start)) for start, step in zip(starts, steps, strict=False)]
    return sum(share * step[1] for share, step in zip(shares, steps, strict=True)) / sum(shares)


def difference(ours: Sequence[float], peer: Sequence[float]) -> tuple[float, float]:
    """Mean of ours − peer over seeds, and its standard error (0 for one seed)."""
    gaps = [a - b for a, b in zip(ours, peer, strict=True)]
    return mean(gaps), stdev(gaps) / sqrt(len(gaps)) if len(gaps) > 1 else 0.0


def rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Of each bound: both numbers, and beside the first bound the gap in standard errors: -2 and more is noise."""
    rewards = dict(zip(((r["bound"], r["seed"]) for r in runs), at_equal_tokens(runs), strict=True))
    bounds = list(dict.fromkeys(r["bound"] for r in runs))
    shown = []
    for bound in bounds:
        own = [r for r in runs if r["bound"] == bound]
        peer = [r for r in runs if r["bound"] == bounds[0]]
        numbers = {
            "return at equal tokens": [[rewards[r["bound"], r["seed"]] for r in arm] for arm in (own, peer)],
            "unseen tasks solved": [[r["solved"] for r in arm] for arm in (own, peer)],
        }
        for what, (ours, theirs) in numbers.items():
            spread = [round(100 * value, 1) for value in (min(ours), max(ours))]
            shown.append(row(f"bound {bound}: {what}", 100 * mean(ours), unit="%", n=len(ours), spread=spread))
            gap, error = difference(ours, theirs)
            if bound != bounds[0] and error:
                what = f"bound {bound} − bound {bounds[0]}: {what}"
                shown.append(
                    row(what, gap / error, unit="standard errors", goal=">=-2", n=len(ours), spread=round(100 * gap, 2))
                )
        age = mean(point[2] for r in own for point in r["curve"])
        shown.append(row(f"bound {bound}: mean age of what was trained", age, unit="versions", n=len(own)))
        walls = [r["curve"][-1][3] for r in own]
        shown.append(
            row(f"bound {bound}: wall clock", mean(walls), unit="s", n=len(own), spread=[min(walls), max(walls)])
        )
    return shown


def figure(runs: Sequence[Run]) -> str:
    """An SVG: mean return of each step, by step and by minute, the mean over seeds for each bound."""
    bounds, panels = list(dict.fromkeys(r["bound"] for r in runs)), []
    for at, (title, column, unit) in enumerate((("Mean return, by trained tokens", 0, 1.0), ("by seconds", 3, 1.0))):
        curves = []
        for bound in bounds:
            points = zip(*(r["curve"] for r in runs if r["bound"] == bound), strict=True)
            means = [(mean(p[column] for p in step) * unit, mean(p[1] for p in step)) for step in points]
            curves.append((f"bound {bound}", means))
        panels.append(f'<g transform="translate({390 * at})">{chart(title, curves).replace(">step ", ">")}</g>')
    inner = re.sub(r"<svg [^>]*>|</svg>", "", "".join(panels))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 770 200"><rect width="770" height="200" fill="#fff"/>'
        f"<style>text{{font:10px sans-serif}}{CHART_STYLE}</style>{inner}</svg>\n"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The measurement; returns rows and every run's curve."""
    for name in ("seeds", "steps", "tasks"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} is too small; give at least 1")
    if len(set(args.bounds)) < 2 or min(args.bounds) < 0:
        raise ValueError(f"--bounds {args.bounds}: give two different ones at least, none negative, e.g. 0 1 4")
    check_output("--figure", args.figure)
    study = Study(args, [f"steps={args.steps}", "eval.every=0"])
    runs = [study.of(bound, seed) for seed in range(args.seeds) for bound in args.bounds]
    if args.figure:
        args.figure.write_text(figure(runs))
    return {"rows": rows(runs), "runs": runs}
