"""One GPU: serving, publishing, learning, and a run with engine and learner on the same card. No network, Ray or sandbox is needed.

Models have random weights, tasks are `codeworld/TokenBandit-v0`. Each part runs in a process of its own, so that it begins with
an empty card, and is built from `rl/recipes/gpu1.toml` as a run builds it. A part that fails is a row that says why; the others
go on. `--device cpu --presets cwm-tiny --engine torch` tries all of it on a laptop.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from math import sqrt
from pathlib import Path
from statistics import mean, median, variance
from typing import Any

from benchmarks.stats import Z
from benchmarks.systems.base import row
from rl.config import ROOT
from rl.latencies import DEVICES

PARTS = ("serve", "publish", "learn", "loop")
Found = dict[str, Any]


def options(p: argparse.ArgumentParser) -> None:
    """This measurement's own options."""
    p.add_argument("--presets", nargs="+", default=["cwm-1b", "cwm-8b"], help="models (default: %(default)s)")
    p.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    p.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="default: %(default)s")
    p.add_argument("--engine", choices=["vllm", "torch"], default="vllm", help="default: %(default)s")
    p.add_argument("--card", choices=[d for d in DEVICES if d != "cpu"], default="h200", help="default: %(default)s")
    p.add_argument("--episodes", type=int, nargs="+", default=[32, 256], help="served at once (default: %(default)s)")
    p.add_argument("--prompt", type=int, default=512, help="tokens of a first prompt (default: %(default)s)")
    p.add_argument("--tokens", type=int, default=256, help="sampled in a turn (default: %(default)s)")
    p.add_argument("--turns", type=int, default=3, help="of an episode (default: %(default)s)")
    p.add_argument(
        "--contexts",
        type=int,
        nargs="+",
        default=[8192, 32768, 65536, 131072],
        help="rows of the learner, the shortest first, until one does not fit (default: %(default)s)",
    )
    p.add_argument("--steps", type=int, default=24, help="of the run (default: %(default)s)")
    p.add_argument("--repeats", type=int, default=3, help="publishes, learner steps (default: %(default)s)")
    p.add_argument(
        "--deadline", type=float, default=480.0, help="seconds that one part may take (default: %(default)s)"
    )
    p.add_argument(
        "--model-size", default="{}", help="JSON: fields of a preset to change, e.g. '{\"vocab_size\": 512}'"
    )


class Card:
    """Runs the parts of one preset."""

    def __init__(self, args: argparse.Namespace, preset: str, home: Path) -> None:
        self.args, self.preset, self.home = args, preset, home
        self.lora = 16 if preset == "cwm-8b" else 0

    def overrides(self, *more: str) -> list[str]:
        """The recipe on this device, with this model."""
        dtype = "bf16" if self.args.device == "cuda" else "fp32"
        return [
            f"policy.model={self.home / self.preset}",
            f"policy.engine={self.args.engine}",
            f"learn.device={self.args.device}",
            f"policy.device={self.args.device}",
            f"policy.share_gpu={str(self.args.device == 'cuda').lower()}",
            f"learn.dtype={dtype}",
            f"learn.lora_rank={self.lora}",
            *(["policy.vllm={}", "policy.parity=1e-4"] if self.args.device == "cpu" else []),
            "rollout.spawn=threads",
            f"rollout.workers={self.args.episodes[0]}",
            f"runs={self.home / 'runs'}",
            f"name={self.preset}",
            f"steps={self.args.steps}",
            *more,
        ]

    def part(self, name: str, *more: str, **numbers: Any) -> Found:
        """What a part found, or {"why": …}."""
        given = {"recipe": str(ROOT / "rl/recipes/gpu1.toml"), "overrides": self.overrides(*more), **numbers}
        command = [sys.executable, "-m", "benchmarks.systems.gpu_side", name, json.dumps(given)]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=self.args.deadline)
        except subprocess.TimeoutExpired:
            return {"why": f"no end within {self.args.deadline:g} seconds"}
        if done.returncode:
            return {"why": (done.stderr or done.stdout).strip().splitlines()[-1][:300]}
        found: Found = json.loads(done.stdout.strip().splitlines()[-1])
        return found


def run(args: argparse.Namespace) -> Found:
    """The measurement."""
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ValueError("--device cuda, and torch sees no GPU here; take cpu, or a host that has one")
    try:
        size = json.loads(args.model_size)
    except ValueError as error:
        raise ValueError(f"--model-size {args.model_size!r} is no JSON ({error}); give an object of sizes") from None
    shown: list[Found] = []
    with tempfile.TemporaryDirectory(prefix="codeworld-gpu-") as where:
        for preset in args.presets:
            card = Card(args, preset, Path(where))
            made = card.part("make", "learn.lora_rank=0", preset=preset, size=size)
            if "why" in made:
                shown.append(row(f"{preset}: a model with random weights", None, why=made["why"]))
                continue
            for name in args.parts:
                shown += MEASURED[name](card)
                print(f"{preset}: {name} done", flush=True)
    return {"rows": shown}


def serve(card: Card) -> list[Found]:
    """Tokens a second, by how many episodes are played at once."""
    args, shown = card.args, []
    context = args.prompt + args.turns * (args.tokens + 64) + 64
    for episodes in args.episodes:
        more = [f"policy.max_context={context}", f"learn.max_tokens={context}", f"rollout.workers={episodes}"]
        found = card.part("serve", *more, episodes=episodes, prompt=args.prompt, tokens=args.tokens, turns=args.turns)
        what = f"{card.preset}: tokens sampled a second, {episodes} episodes at once"
        if "why" in found:
            shown.append(row(what, None, unit="/s", why=found["why"]))
            continue
        counts = {k: v for k, v in found.items() if k.endswith("_tokens")}
        shown.append(row(what, found["sampled"] / found["seconds"], unit="/s", spread=counts))
    return shown


def publish(card: Card) -> list[Found]:
    """Seconds of a publish, what sampling stands still for it, and how far engine and learner are apart after it."""
    args, shown = card.args, []
    heads = [("", [])] if args.engine == "torch" else [(", fp32 head", []), ("", ["policy.vllm.fp32_head=false"])]
    for head, more in heads:
        found = card.part(
            "publish", *more, episodes=args.episodes[0], prompt=64, tokens=64, times=args.repeats, length=128
        )
        if "why" in found:
            shown.append(row(f"{card.preset}: a publish{head}", None, unit="s", why=found["why"]))
            continue
        for name, what in (
            ("gather", "weights gathered"),
            ("publish", "a publish"),
            ("stalled", "sampling stands still"),
        ):
            seconds = [p[name] for p in found["publishes"]]
            spread = [round(min(seconds), 4), round(max(seconds), 4)]
            shown.append(row(f"{card.preset}: {what}{head}", median(seconds), unit="s", n=len(seconds), spread=spread))
        what = f"{card.preset}: log-probs of engine and learner apart{head}"
        shown.append(row(what, found["gap_max"], unit="nats", spread={"mean": found["gap_mean"]}))
    return shown


def learn(card: Card) -> list[Found]:
    """MFU and memory of the learner, and the longest context that fits."""
    args, longest, shown = card.args, 0, []
    for context in args.contexts:
        more = [f"policy.max_context={context}", f"learn.max_tokens={context}"]
        found = card.part("learn", *more, tokens=max(context, args.contexts[0]), steps=args.repeats)
        if "why" in found:
            shown.append(row(f"{card.preset}: rows of {context} tokens", None, why=found["why"]))
            break
        longest, seconds = context, median(found["seconds"])
        operations = (
            (4 if card.lora else 6) * found["parameters"] * found["tokens"]
        )  # with adapters no gradients of weights
        what = f"{card.preset}: learner, rows of {context} tokens"
        shown.append(row(f"{what}: trained", found["tokens"] / seconds, unit="tokens/s", n=len(found["seconds"])))
        if args.device == "cuda":
            mfu = operations / seconds / DEVICES[args.card].flops
            shown.append(row(f"{what}: MFU without attention", 100 * mfu, unit="%", n=len(found["seconds"])))
            foretold = round(found["foretold"] / 1e9, 3)
            shown.append(
                row(f"{what}: peak memory", found["peak"] / 1e9, peer=foretold, peer_name="foretold", unit="GB")
            )
    shown.append(row(f"{card.preset}: longest context of the learner that fitted", float(longest), unit="tokens"))
    return shown


def loop(card: Card) -> list[Found]:
    """The reward of a run with both on one card, first steps against last."""
    found = card.part("loop")
    what = f"{card.preset}: reward of the run, last quarter − first"
    if "why" in found:
        return [row(what, None, why=found["why"])]
    gain, half = rise(found["rewards"])
    spread = [round(100 * (gain - half), 1), round(100 * (gain + half), 1)]
    steps = len(found["rewards"])
    shown = [row(what, 100 * gain, unit="points", goal=">=0.01", n=steps, spread=spread)]
    walls = [b - a for a, b in zip(found["walls"], found["walls"][1:], strict=False)]
    shown.append(
        row(f"{card.preset}: a step of the run", median(walls) if walls else found["walls"][0], unit="s", n=len(walls))
    )
    shown.append(row(f"{card.preset}: largest difference of engine and learner", found["parity"], unit="nats", n=steps))
    if found["peak"]:
        shown.append(row(f"{card.preset}: memory of the run in this process, peak", found["peak"] / 1e9, unit="GB"))
    return shown


def rise(rewards: list[list[float]]) -> tuple[float, float]:
    """Mean reward of the last quarter of the steps minus that of the first, and half of its 95 % interval (normal)."""
    quarter = max(1, len(rewards) // 4)
    first, last = ([r for step in part for r in step] for part in (rewards[:quarter], rewards[-quarter:]))
    error = sqrt(sum(variance(part) / len(part) for part in (first, last)))
    return mean(last) - mean(first), Z * error


MEASURED = {"serve": serve, "publish": publish, "learn": learn, "loop": loop}


def show(rows: list[Found]) -> None:
    """Print the rows, a line each; failures with their reason."""
    for r in rows:
        value = f"{r['ours']:g} {r['unit']}" if r["ours"] is not None else f"failed: {r['why']}"
        ratio = f", {r['ratio']:g} x {r['peer_name']}" if r["ratio"] is not None else ""
        print(f"{r['what']:<70} {value}{ratio}  {r['spread'] or ''}")
