"""`python -m rl sft`: fine-tune on trajectories: the committed warm start, or a run's own resolved episodes."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from envs.errors import user_errors

EXAMPLE = """
examples:
  python -m rl sft --out policy/cwm_tiny                     rebuild the committed warm start (seed 0)
  python -m rl sft --from runs/tiny --out runs/tiny/sft      rejection sampling: the run's resolved trajectories
"""


GIVEN = ("episodes", "drills", "comebacks", "inspections", "probe_weight", "epochs", "seed")
"""Fields of `rl.sft.WarmStart` that the command line may set."""


def parser() -> argparse.ArgumentParser:
    """The command line; its defaults are those of the committed warm start."""
    from rl.sft import WarmStart

    p = argparse.ArgumentParser(
        "python -m rl", description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = p.add_subparsers(dest="command", required=True)
    sft = commands.add_parser(
        "sft", help="supervised fine-tuning", epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    return p


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    args = parser().parse_args(argv)
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
