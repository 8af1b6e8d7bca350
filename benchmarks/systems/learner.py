"""Trained tokens a second and peak memory of a learner step, ours beside TRL's `GRPOTrainer`, on ragged multi-turn rows.

Same model, rows, loss (tokens of the batch count alike, clip 0.2, no KL) and threads; each side in a fresh process, in turns.
TRL's whole trainer loop runs; only its sampling is replaced, by the given rows, padded as it pads. It gets its best of several
micro-batch sizes. That both do the same work shows in the gradient norm of the first step.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from math import exp
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.systems.base import row
from rl.config import ROOT

GROUP = 8
DEADLINE = 1800.0
"""Seconds that one process may take."""


def options(p: argparse.ArgumentParser) -> None:
    """This measurement's own options."""
    p.add_argument(
        "--rows", type=int, default=64, help="trajectories of a batch, a multiple of 8 (default: %(default)s)"
    )
    p.add_argument("--context", type=int, default=1024, help="longest trajectory, tokens (default: %(default)s)")
    p.add_argument("--width", type=int, default=256, help="of the model, which has 6 layers (default: %(default)s)")
    p.add_argument("--vocabulary", type=int, default=8192, help="default: %(default)s")
    p.add_argument("--threads", type=int, default=1, help="of torch, both sides (default: %(default)s)")
    p.add_argument(
        "--steps", type=int, default=3, help="timed steps behind the first, of a process (default: %(default)s)"
    )
    p.add_argument("--repeats", type=int, default=3, help="processes of each side, in turns (default: %(default)s)")
    p.add_argument(
        "--micro", type=int, nargs="+", default=[4, 8, 16], help="TRL's micro-batches (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The measurement."""
    for name in ("rows", "context", "width", "vocabulary", "threads", "steps", "repeats"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: must be at least 1")
    for name, values in (("rows", [args.rows]), ("micro", [args.rows % n if n > 0 else 1 for n in args.micro])):
        if any(value % (GROUP if name == "rows" else args.rows) for value in values):
            raise ValueError(
                f"--{name}: {args.rows} rows can't be divided so; give rows in eights and micro-batches that divide them"
            )
    with tempfile.TemporaryDirectory(prefix="codeworld-learner-") as where:
        home = Path(where)
        batch = ragged(args.rows, args.context, args.vocabulary)
        (home / "rows.json").write_text(json.dumps(batch))
        _model(args, home / "model")
        sides = ["ours", *(f"trl {micro}" for micro in args.micro)]
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for repeat in range(args.repeats):
            for side in sides if repeat % 2 == 0 else reversed(sides):
                found[side].append(_side(side, home, args))
                print(f"{side}: {median(found[side][-1]['seconds']):.2f} s a step", flush=True)
    return {"rows": rows(found, batch), "sides": found}


def ragged(count: int, context: int, vocabulary: int, seed: int = 0) -> list[dict[str, Any]]:
    """Trajectories of log-normal lengths (a quarter of the context in the median), by turns read and sampled.

    Each: token_ids; loss_mask, 1 where sampled; prompt, tokens before the first sampled one; advantage.
    """
    draw, made = random.Random(seed), []
    for index in range(count):
        length = int(min(context, max(16, context / 4 * exp(draw.gauss(0, 0.8)))))
        mask: list[int] = []
        while len(mask) < length:
            mask += [0] * draw.randint(4, max(4, length // 4)) + [1] * draw.randint(2, max(2, length // 10))
        mask = [*mask[: length - 1], 1]
        ids = [draw.randrange(vocabulary) for _ in mask]
        made.append(
            {"token_ids": ids, "loss_mask": mask, "prompt": mask.index(1), "advantage": 1.0 if index % 2 else -1.0}
        )
    return made


def _model(args: argparse.Namespace, directory: Path) -> None:
    from policy.models import ModelConfig, build, save

    size = {"hidden_size": args.width, "intermediate_size": 3 * args.width, "layers": 6, "max_context": args.context}
    save(build(ModelConfig(vocab_size=args.vocabulary, **size)), directory)


def _side(side: str, home: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One process: seconds of each step, bytes above what the imports took, gradient norm of the first step."""
    name, _, micro = side.partition(" ")
    command = [sys.executable, "-m", "benchmarks.systems.learner_side", name, str(home), micro or "0"]
    command += [str(args.threads), str(args.steps + 1), str(args.context)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE)
    if done.returncode:
        raise RuntimeError(f"{side}: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def rows(found: dict[str, list[dict[str, Any]]], batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over processes of the medians over their steps; TRL at its fastest micro-batch."""
    tokens = sum(sum(r["loss_mask"]) for r in batch)

    def speeds(side: str) -> list[float]:
        return [tokens / median(process["seconds"]) for process in found[side]]

    best = max((side for side in found if side != "ours"), key=lambda side: median(speeds(side)))
    peer = f"TRL, micro-batch {best.partition(' ')[2]}"
    ours, theirs = speeds("ours"), speeds(best)
    memory = {side: median(process["peak"] for process in found[side]) / 2**20 for side in found}
    norms = {side: found[side][0]["grad_norm"] for side in ("ours", best)}
    spread = [round(value, 1) for value in (min(ours), max(ours), min(theirs), max(theirs))]
    n = len(ours)
    shown = [
        row(
            "trained tokens a second",
            median(ours),
            peer=round(median(theirs), 4),
            peer_name=peer,
            unit="/s",
            goal=">=2",
            n=n,
            spread=spread,
        ),
        row(
            "peak memory above the imports",
            memory["ours"],
            peer=round(memory[best], 4),
            peer_name=peer,
            unit="MiB",
            goal="<=1",
            n=n,
        ),
        row("gradient norm of the first step", norms["ours"], peer=norms[best], peer_name=peer, n=1),
    ]
    for side in sorted(found):
        if side not in ("ours", best):
            micro = f"TRL, micro-batch {side.partition(' ')[2]}"
            shown.append(row(f"trained tokens a second, {micro}", median(speeds(side)), unit="/s", n=n))
            shown.append(row(f"peak memory above the imports, {micro}", memory[side], unit="MiB", n=n))
    return shown
