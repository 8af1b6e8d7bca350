"""Does the loop learn? Trains the tiny recipe with several seeds and controls, and plays unseen tasks before and after.

Paired throughout: before and after play the same tasks with the same random numbers. No task of the evaluation shares its
normalised buggy source with any training task (`tests/envs/test_repairs.py`), and evaluation tasks are distinct by it.
Finished parts are kept in `--out` and not done again, so an interrupted measurement goes on where it stopped.

With `--table` it also answers "is it learning, and is it multi-turn?": the warm start at its best temperature,
rejection-sampling fine-tuning on the RL run's own samples, pass@k before and after, and observations blanked.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from agents.trajectory import Trajectory
from benchmarks.stats import paired, pass_at_k, wilson
from benchmarks.systems.base import cpu_seconds, row
from envs.tiny import repairs
from rl import spawn
from rl.config import ROOT, Config, dump, load
from rl.evaluate import Player, orders
from rl.metrics import read

NAME = "learning"
Solved = list[float]


def options(p: argparse.ArgumentParser) -> None:
    """This measurement's own options."""
    p.add_argument(
        "--seeds", type=int, default=3, help="training seeds; 0 measures the warm start alone (default: %(default)s)"
    )
    p.add_argument("--tasks", type=int, default=600, help="unseen tasks per evaluation (default: %(default)s)")
    p.add_argument("--recipe", default="rl/recipes/tiny.toml", help="what is trained (default: %(default)s)")
    p.add_argument(
        "--table", action="store_true", help="also temperatures, rejection sampling, pass@k, blank observations"
    )
    p.add_argument(
        "--out",
        type=Path,
        default=Path("runs/learning"),
        help="where runs and finished parts are kept (default: %(default)s)",
    )


def distinct(split: str, n: int) -> list[int]:
    """Indices of the first `n` tasks of a split that are distinct by normalised source."""
    seen: set[str] = set()
    found: list[int] = []
    index = 0
    while len(found) < n:
        source = repairs.task(split, index).provenance["normalised"]
        if source not in seen:
            seen.add(source)
            found.append(index)
        index += 1
    return found


class Lab:
    """Trains and plays; every result is a small JSON file in `out`, made once."""

    NAME = NAME

    def __init__(self, args: argparse.Namespace, overrides: Sequence[str] = (), about: str = "") -> None:
        """`overrides` of the recipe hold for all that is trained and played; `about` says what else parts depend on.
        `ValueError` where `out` holds parts of another measurement."""
        self.args, self.out, self.overrides = args, args.out.absolute(), tuple(overrides)
        self.out.mkdir(parents=True, exist_ok=True)
        self.config = load(ROOT / args.recipe, self.overrides)
        weights = hashlib.sha256((self.config.model / "model.safetensors").read_bytes()).hexdigest()
        measured = f"# {args.tasks} tasks{about}, warm start {weights}\n{dump(self.config)}"
        kept = self.out / "measured.toml"
        if kept.exists() and kept.read_text() != measured:
            raise ValueError(
                f"{self.out} holds parts of another recipe, warm start or number of tasks (measured.toml there says which); "
                "give another --out, or delete it"
            )
        kept.write_text(measured)

    def once(self, name: str, make: Any) -> Any:
        """The finished part `name`, or make it."""
        path = self.out / f"{name}.json"
        if not path.exists():
            print(f"{self.NAME}: {name}", flush=True)
            result = make()
            partial = path.with_suffix(".tmp")
            partial.write_text(json.dumps(result))
            partial.rename(path)
        return json.loads(path.read_text())

    def train(self, name: str, *overrides: str) -> dict[str, Any]:
        """Train by the user's command; CPU seconds of all its processes, minutes, tokens."""

        def make() -> dict[str, Any]:
            command = [
                sys.executable,
                str(ROOT / "rl/train.py"),
                str(ROOT / self.args.recipe),
                f"--runs={self.out}",
                f"--name={name}",
                *(f"--{override}" for override in self.overrides),
                *overrides,
            ]
            resume = ["--resume"] if (self.out / name / "journal.sqlite").exists() else []
            began = time.monotonic()
            process = subprocess.Popen(
                [*command, *resume], stdout=(self.out / f"{name}.log").open("a"), stderr=subprocess.STDOUT
            )
            spent = cpu_seconds(process)
            if process.returncode:
                raise ValueError(f"training {name} ended with status {process.returncode}; see {self.out / name}.log")
            steps = [r for r in read(self.out / name / "metrics.jsonl") if r["kind"] == "step"]
            return {
                "cpu_s": round(spent, 1),
                "minutes": round((time.monotonic() - began) / 60, 2),
                "tokens": steps[-1]["decoded_tokens"],
                "steps": len(steps),
                "parity": max(r["parity"] for r in steps),
            }

        result: dict[str, Any] = self.once(f"train-{name}", make)
        return result

    def solve(
        self, name: str, model: Path, split: str, temperature: float, *, samples: int = 1, tasks: int = 0, **kwargs: Any
    ) -> Solved:
        """1.0 or 0.0 for each (task, sample) of a split, in order; episodes lost to infrastructure count as failed."""

        def make() -> Solved:
            indices = distinct(split, tasks or self.args.tasks)
            played = play(self.config, model, orders(split, indices, temperature, samples=samples, seed=17), kwargs)
            return [float(t.outcome == "resolved") for t in played]

        result: Solved = self.once(f"solve-{name}-{split}-{temperature:g}-{samples}", make)
        return result

    def model(self, name: str) -> Path:
        """The model a run ended with."""
        return self.out / name / "model"


def play(config: Config, model: Path, work: list[Any], kwargs: dict[str, Any]) -> list[Trajectory]:
    """Play orders with a model through the recipe's own engine and workers."""
    changed = replace(config, env=replace(config.env, kwargs={**config.env.kwargs, **kwargs}))
    spawn.start(changed.rollout.spawn, changed.rollout.address)
    player = Player(changed, model)
    try:
        return player.play(work)
    finally:
        player.close()
        spawn.stop(changed.rollout.spawn)


def mean(values: Solved) -> float:
    """Mean, rounded for the record."""
    return round(sum(values) / len(values), 4)


def by_kind(tasks: int, before: Solved, after: Solved) -> dict[str, list[float]]:
    """Kind of bug → share of the validation tasks, solved before, solved after."""
    kinds = [str(repairs.task("validation", i).provenance["bug"]) for i in distinct("validation", tasks)]
    rows = {k: [at for at, kind in enumerate(kinds) if kind == k] for k in sorted(set(kinds))}
    return {
        k: [mean([float(i in at) for i in range(tasks)]), *(mean([v[i] for i in at]) for v in (before, after))]
        for k, at in rows.items()
    }


def per_seed(lab: Lab, seed: int) -> dict[str, Any]:
    """One training seed and its control."""
    start = lab.config.model
    run, control = f"rl-{seed}", f"control-{seed}"
    cost = lab.train(run, f"--seed={seed}")
    lab.train(control, f"--seed={seed}", "--learn.control=shuffle", "--eval.every=0")
    before = {k: lab.solve("start", start, *k) for k in (("validation", 1.0), ("validation", 0.0), ("templates", 1.0))}
    after = {k: lab.solve(run, lab.model(run), *k) for k in before}
    shuffled = lab.solve(control, lab.model(control), "validation", 1.0)
    t1, greedy, held = before
    return {
        "seed": seed,
        "solve_before": mean(before[t1]),
        "solve_after": mean(after[t1]),
        "greedy_before": mean(before[greedy]),
        "greedy_after": mean(after[greedy]),
        "template_before": mean(before[held]),
        "template_after": mean(after[held]),
        "control_after": mean(shuffled),
        "n": lab.args.tasks,
        **cost,
        "gain": paired(before[t1], after[t1]),
        "greedy_gain": paired(before[greedy], after[greedy]),
        "template_gain": paired(before[held], after[held]),
        "control_gain": paired(before[t1], shuffled),
        "greedy_by_kind": by_kind(lab.args.tasks, before[greedy], after[greedy]),
    }


def before(lab: Lab) -> list[dict[str, Any]]:
    """What the warm start solves; `--seeds 0` measures nothing else."""
    rows = []
    for split in ("validation", "templates"):
        for temperature, name in ((1.0, "temperature 1"), (0.0, "greedy")):
            solved = lab.solve("start", lab.config.model, split, temperature)
            rows.append(
                row(
                    f"warm start, {split}, {name}",
                    100 * mean(solved),
                    unit="%",
                    n=len(solved),
                    spread=_interval(solved),
                )
            )
    return rows


def rows_of_seed(s: dict[str, Any]) -> list[dict[str, Any]]:
    """The goals that one seed must meet, in points."""
    goals = (
        ("solve rate at temperature 1, gain", s["gain"], ">=30"),
        ("greedy, gain", s["greedy_gain"], ">=8"),
        ("held-out templates, gain", s["template_gain"], ">=10"),
        ("control with shuffled advantages, gain", s["control_gain"], "<=5"),
    )
    rows = [
        row(
            f"seed {s['seed']}: {w}",
            100 * g[0],
            unit="points",
            goal=goal,
            n=s["n"],
            spread=[round(100 * x, 1) for x in g[1:]],
        )
        for w, g, goal in goals
    ]
    rows.append(
        row(f"seed {s['seed']}: solve rate at the end", 100 * s["solve_after"], unit="%", goal=">=60", n=s["n"])
    )
    rows.append(
        row(
            f"seed {s['seed']}: greedy gain, lower end of its interval",
            100 * s["greedy_gain"][1],
            unit="points",
            goal=">=0",
            n=s["n"],
        )
    )
    rows += [
        row(f"seed {s['seed']}: greedy gain on {kind} bugs", 100 * (new - old), unit="points", n=round(share * s["n"]))
        for kind, (share, old, new) in s["greedy_by_kind"].items()
    ]
    rows.append(row(f"seed {s['seed']}: CPU of the training run", s["cpu_s"], unit="s", goal="<=1600", n=1))
    return rows


def table(lab: Lab, seed: int = 0) -> list[dict[str, Any]]:
    """Is it learning, and is it multi-turn? All on the same unseen tasks with the same random numbers."""
    start, end = lab.config.model, lab.model(f"rl-{seed}")
    temperatures = (0.0, 0.25, 0.5, 0.75, 1.0)
    warm = {t: lab.solve("start", start, "validation", t) for t in temperatures}
    trained = {t: lab.solve(f"rl-{seed}", end, "validation", t) for t in temperatures}
    rejected = lab.out / f"rs-{seed}"
    lab.once(f"sft-rs-{seed}", lambda: _imitate(lab, seed, rejected))
    sft = {t: lab.solve(f"rs-{seed}", rejected, "validation", t) for t in temperatures}
    best = {
        name: max(by.values(), key=sum)
        for name, by in (("warm start", warm), ("rejection sampling SFT", sft), ("RL", trained))
    }
    at = {
        name: next(t for t, v in by.items() if v is best[name])
        for name, by in (("warm start", warm), ("rejection sampling SFT", sft), ("RL", trained))
    }
    rows = [
        row(f"{n} at its best temperature ({at[n]:g})", 100 * mean(v), unit="%", n=len(v), spread=_interval(v))
        for n, v in best.items()
    ]
    rival = max(("warm start", "rejection sampling SFT"), key=lambda n: sum(best[n]))
    headline = paired(best[rival], best["RL"])
    rows.append(
        row(
            f"RL minus {rival}, both at their best",
            100 * headline[0],
            unit="points",
            n=lab.args.tasks,
            spread=[round(100 * x, 1) for x in headline[1:]],
        )
    )
    for name, model in (("start", start), (f"rl-{seed}", end)):
        flat = lab.solve(f"passk-{name}", model, "validation", 1.0, samples=64, tasks=40)
        counts = [int(sum(flat[i : i + 64])) for i in range(0, len(flat), 64)]
        rows += [
            row(
                f"pass@{k}, {name}",
                100 * sum(pass_at_k(64, c, k) for c in counts) / len(counts),
                unit="%",
                n=len(counts),
            )
            for k in (1, 2, 4, 8, 16, 32, 64)
        ]
    blind = lab.solve(f"blind-{seed}", end, "validation", 1.0, blind=True)
    loss = paired(blind, trained[1.0])
    rows.append(
        row(
            "lost when observations are blanked",
            100 * loss[0],
            unit="points",
            goal=">=10",
            n=lab.args.tasks,
            spread=[round(100 * x, 1) for x in loss[1:]],
        )
    )
    return rows


def _interval(values: Solved) -> list[float]:
    return [round(100 * x, 1) for x in wilson(int(sum(values)), len(values))]


def _imitate(lab: Lab, seed: int, out: Path) -> Any:
    from rl.sft import WarmStart, imitate

    return imitate(lab.out / f"rl-{seed}", lab.config.model, out, WarmStart(epochs=2.0, seed=seed), lab.out)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The measurement; returns rows and seeds."""
    lab = Lab(args)
    rows = before(lab)
    seeds = [per_seed(lab, seed) for seed in range(args.seeds)]
    rows += [r for s in seeds for r in rows_of_seed(s)]
    if args.table:
        rows += table(lab)
    return {"rows": rows, "seeds": seeds}
