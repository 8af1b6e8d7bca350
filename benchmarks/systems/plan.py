"""Does a forecast hold? `python -m rl plan` against real runs on this machine's CPUs, and against a real learner's memory.

Time: one synchronous run (`learn.max_staleness=0`) gives latencies and episodes; from its record alone both it and its
asynchronous twin (2) are forecast, and the ratio of their steps is compared with that of pairs of real runs, one after the other,
in turns. The episodes' tools sleep, as two cores have nothing to overlap when everything computes; `--wait 0` leaves that out.
Memory: the peak of a learner in a process of its own, for models and contexts that no constant of `rl/memory.py` was fitted to.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.systems.base import row
from envs.swe.env import SWEEnv
from rl.config import ROOT, Config, load
from rl.latencies import from_run
from rl.memory import Layout, Shape, on_cpu
from rl.metrics import read
from rl.plan import simulate, step_seconds

RUN = ("eval.every=0", "checkpoint_every=1000", "rollout.episodes=48", "learn.groups_per_step=6")
SYNC, ASYNC = 0, 2
MODELS: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "91M, 2 k tokens": ({"layers": 12, "hidden_size": 768, "heads": 12, "kv_heads": 12, "intermediate_size": 2048, "vocab_size": 8192}, 2048, 1, 2),
    "38M, 3 x 1 k tokens, large vocabulary": ({"layers": 4, "hidden_size": 768, "heads": 12, "kv_heads": 4, "intermediate_size": 2048, "vocab_size": 16384}, 1024, 1, 3),
    "29M, 4 x 512 tokens a micro-batch": ({"layers": 8, "hidden_size": 512, "heads": 8, "kv_heads": 8, "intermediate_size": 1536, "vocab_size": 4096}, 512, 4, 8),
    "129M, 4 k tokens": ({"layers": 10, "hidden_size": 1024, "heads": 16, "kv_heads": 4, "intermediate_size": 2816, "vocab_size": 8192}, 4096, 1, 2),
}  # fmt: skip
"""What is measured -> model, tokens of a row, rows of a micro-batch, rows. `rl.memory.HEAP` and `LIBRARIES` are fitted to another
model: 6 layers of 512, a vocabulary of 4096, 1024 tokens."""


class Waiting(SWEEnv):
    """`codeworld/SWE-v0` whose tools take a while without computing: each call sleeps, log-normally around `wait` seconds."""

    def __init__(self, *, wait: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._wait = wait

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """See `SWEEnv.step`."""
        time.sleep(self._wait * random.lognormvariate(-0.125, 0.5))
        return super().step(action)


def options(p: argparse.ArgumentParser) -> None:
    """This measurement's own options."""
    p.add_argument("--recipe", default="rl/recipes/tiny.toml", help="what is run (default: %(default)s)")
    p.add_argument("--pairs", type=int, default=5, help="pairs of real runs; 0: memory alone (default: %(default)s)")
    p.add_argument("--steps", type=int, default=8, help="batches of a run (default: %(default)s)")
    p.add_argument("--wait", type=float, default=0.5, help="mean seconds that a tool sleeps (default: %(default)s)")
    p.add_argument(
        "--models",
        type=int,
        default=len(MODELS),
        help="models whose memory is measured; 0: none (default: %(default)s)",
    )
    p.add_argument("--out", type=Path, default=Path("runs/plan"), help="where runs are kept (default: %(default)s)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The measurement; returns rows, and what every run took."""
    if args.pairs < 0 or args.steps < 3:
        raise ValueError(f"--pairs {args.pairs} --steps {args.steps}: give at least 0 pairs of at least 3 steps")
    shown, found = ([], {}) if args.pairs == 0 else speed(args)
    shown += [one for name in list(MODELS)[: args.models] for one in memory(name)]
    return {"rows": shown, **found}


# ---------------------------------------------------------------------- time


def speed(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Forecast from one run, then pairs of others."""
    first = real(args, "first", SYNC)
    latencies, book = from_run(args.out / "first")
    cores = min(capacity(), os.cpu_count() or 1)
    print(f"cores: two that compute at once get {cores:.2f} times what one gets", flush=True)
    latencies = replace(latencies, cores=cores)
    took = {
        bound: simulate(config(args, bound), latencies, book, steps=args.steps).step_seconds for bound in (SYNC, ASYNC)
    }
    print(f"forecast: {took[SYNC]:.2f} s a step, {took[ASYNC]:.2f} s overlapped", flush=True)
    pairs: list[dict[int, float]] = []
    for index in range(args.pairs):
        order = (SYNC, ASYNC) if index % 2 == 0 else (ASYNC, SYNC)
        pairs.append({bound: real(args, f"{'async' if bound else 'sync'}-{index}", bound) for bound in order})
    facts = {"first": first, "pairs": pairs, "forecast": took, "latencies": asdict(latencies)}
    return speed_rows(took, pairs), facts


def speed_rows(took: dict[int, float], pairs: Sequence[dict[int, float]]) -> list[dict[str, Any]]:
    """The ratio with its goal, and the seconds that it is made of."""
    ratios = [pair[SYNC] / pair[ASYNC] for pair in pairs]
    ours, real = took[SYNC] / took[ASYNC], median(ratios)
    spread = [round(min(ratios), 3), round(max(ratios), 3)]
    n = len(pairs)
    shown = [
        row("async:sync, forecast", ours, peer=round(real, 4), peer_name="measured, median", n=n, spread=spread),
        row("async:sync, forecast off by", 100 * abs(ours / real - 1), unit="%", goal="<=15", n=n),
    ]
    for bound, name in ((SYNC, "sync"), (ASYNC, "async")):
        walls = [pair[bound] for pair in pairs]
        between = [round(min(walls), 3), round(max(walls), 3)]
        shown.append(
            row(f"seconds a step, {name}, forecast", took[bound], peer=round(median(walls), 4), peer_name="measured, median", unit="s", n=n, spread=between)
        )  # fmt: skip
    return shown


COUNT = """
import sys, time, torch
torch.set_num_threads(1)
a, n = torch.ones(192, 192), 0
sys.stdin.readline()
end = time.time() + float(sys.argv[1])
while time.time() < end:
    a @ a
    n += 1
print(n)
"""


def capacity(seconds: float = 4.0) -> float:
    """How many of engine and learner this machine lets compute at full speed: products of two processes at once over those of
    one. Less than its cores where these share caches, or others use them as well."""
    found = []
    for together in (1, 2, 2, 1):
        command = [sys.executable, "-c", COUNT, str(seconds)]
        processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(together)
        ]
        time.sleep(seconds)  # they import
        for process in processes:
            assert process.stdin
            process.stdin.write("\n")
            process.stdin.flush()
        found.append(sum(int(process.communicate()[0]) for process in processes))
    return (found[1] + found[2]) / (found[0] + found[3])


def overrides(args: argparse.Namespace, bound: int) -> list[str]:
    """What a run changes in the recipe."""
    waits = ["env.id=benchmarks.systems.plan:Waiting"] if args.wait else []
    kwargs = {**load(ROOT / args.recipe).env.kwargs, **({"wait": args.wait} if args.wait else {})}
    table = ", ".join(f"{name} = {json.dumps(value)}" for name, value in kwargs.items())
    return [*waits, f"env.kwargs={{{table}}}", *RUN, f"steps={args.steps}", f"learn.max_staleness={bound}"]


def config(args: argparse.Namespace, bound: int) -> Config:
    """The run's config."""
    return load(ROOT / args.recipe, overrides(args, bound))


def real(args: argparse.Namespace, name: str, bound: int) -> float:
    """Seconds a step of a real run."""
    args.out.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        str(ROOT / "rl/train.py"),
        str(ROOT / args.recipe),
        f"--runs={args.out}",
        f"--name={name}",
    ]
    command += [f"--{change}" for change in overrides(args, bound)]
    with (args.out / f"{name}.log").open("w") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
    if done.returncode:
        raise ValueError(f"run {name} ended with status {done.returncode}; see {args.out / name}.log, and empty --out")
    seconds = step_seconds([r["wall"] for r in read(args.out / name / "metrics.jsonl") if r["kind"] == "step"])
    print(f"{name}: {seconds:.2f} s a step", flush=True)
    return seconds


# ---------------------------------------------------------------------- memory


def memory(name: str) -> list[dict[str, Any]]:
    """The peak of a learner, forecast and measured; what lives, and what the C library keeps besides."""
    from policy.models import ModelConfig, build, save

    size, tokens, together, count = MODELS[name]
    with tempfile.TemporaryDirectory() as home:
        save(build(ModelConfig(max_context=8192, **size)), home)
        shape = Shape.named(home)
        command = [
            sys.executable,
            "-m",
            "benchmarks.systems.plan_side",
            home,
            *map(str, (tokens, tokens * together, count)),
        ]
        environments = {
            "living": {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"},
            "resident": {},
        }
        shown = []
        for kind, extra in environments.items():
            done = subprocess.run(command, cwd=ROOT, env=os.environ | extra, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{name}: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
            peak = json.loads(done.stdout.strip().splitlines()[-1])["peak"]
            ours = on_cpu(shape, Layout(tokens=tokens * together), kept=kind == "resident")
            print(f"{name}: {kind} {ours / 1e6:.0f} MB forecast, {peak / 1e6:.0f} MB measured", flush=True)
            shown += [
                row(f"peak memory, {kind}, {name}", ours / 1e6, peer=round(peak / 1e6, 1), peer_name="measured", unit="MB"),
                row(f"the same, forecast off by, {name}", 100 * abs(ours / peak - 1), unit="%", goal="<=10"),
            ]  # fmt: skip
    return shown
