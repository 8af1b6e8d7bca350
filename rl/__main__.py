"""`python -m rl (sft|plan)`: fine-tune on trajectories; foretell what a run will need and how fast it will be."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from envs.errors import check_output, user_errors
from rl.config import load, overrides

SFT = """
examples:
  python -m rl sft --out policy/cwm_tiny                     rebuild the committed warm start (seed 0)
  python -m rl sft --from runs/tiny --out runs/tiny/sft      rejection sampling: the run's resolved trajectories
"""
PLAN = """
examples:
  python -m rl plan rl/recipes/tiny.toml                                           assumed latencies and episodes
  python -m rl plan rl/recipes/tiny.toml --from runs/tiny --learn.max_staleness=0  a run's own, without overlap
  python -m rl plan rl/recipes/tiny.toml --model cwm-32b --gpus 64 --checkpoint-activations --sequence-parallel 4 \\
      --policy.max_context=32768 --policy.max_tokens=4096 --learn.max_tokens=32768 --rollout.episodes=256 --turns 40
Every field of a recipe can be set as --section.key=value. Exit status: 0 planned; 2 it can't be done as asked: what is
too large, and what would help.
"""


GIVEN = ("episodes", "drills", "comebacks", "inspections", "probe_weight", "epochs", "seed")
"""Fields of `rl.sft.WarmStart` that the command line may set."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    from rl import plan

    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser("python -m rl", description=__doc__, epilog=SFT + PLAN, formatter_class=raw)
    commands = p.add_subparsers(dest="command", required=True)
    sft_options(commands.add_parser("sft", help="supervised fine-tuning", epilog=SFT, formatter_class=raw))
    about = "placement, memory, speed and bottleneck of a run"
    plan.options(commands.add_parser("plan", help=about, description=plan.__doc__, epilog=PLAN, formatter_class=raw))
    return p


def sft_options(sft: argparse.ArgumentParser) -> None:
    """Options of `sft`; their defaults are those of the committed warm start."""
    from rl.sft import WarmStart

    sft.add_argument("--out", type=Path, required=True, help="model directory to write")
    sft.add_argument("--from", dest="run", type=Path, help="a run directory whose resolved trajectories are imitated")
    sft.add_argument(
        "--model", type=Path, default=Path("policy/cwm_tiny"), help="where --from starts (default: %(default)s)"
    )
    for name, kind, what in (
        ("episodes", int, "noisy expert episodes of a warm start"),
        ("drills", int, "noiseless two-turn repairs among them"),
        ("comebacks", int, "repairs behind a wrong edit, among them"),
        ("inspections", int, "modules that are only read, for the probe"),
        ("probe-weight", float, "weight of the probe's loss; 0 is the ablation"),
        ("epochs", float, "passes over the data"),
    ):
        default = getattr(WarmStart, name.replace("-", "_"))
        sft.add_argument(f"--{name}", type=kind, default=default, help=f"{what} (default: %(default)s)")
    sft.add_argument("--seed", type=int, default=0, help="seed of experts, weights and order (default: %(default)s)")
    sft.add_argument("--backend", default="auto", help="sandbox backend of the experts (default: %(default)s)")
    sft.add_argument(
        "--work", type=Path, default=Path("runs/sft"), help="where expert episodes are collected (default: %(default)s)"
    )


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    args, rest = parser().parse_known_args(argv)
    if args.command == "plan":
        from rl import plan

        check_output("--json", args.json)
        return plan.run(args, load(args.recipe, overrides(rest)))
    if rest:
        parser().error(f"unrecognized arguments: {' '.join(rest)}")
    return sft(args)


def sft(args: argparse.Namespace) -> int:
    """Fine-tune; prints what came of it as JSON."""
    from rl.sft import WarmStart, imitate, warm_start

    config = WarmStart(**{name: getattr(args, name) for name in GIVEN})
    if args.run:
        facts = imitate(args.run, args.model, args.out, config, args.work)
    else:
        facts = warm_start(config, args.out, args.work, args.backend)
    print(json.dumps(facts))
    return 0


if __name__ == "__main__":
    sys.exit(user_errors(main))
