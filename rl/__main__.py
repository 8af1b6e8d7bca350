"""`python -m rl (plan|sft|bootstrap|rates)`: foretell a run, fine-tune on trajectories, repeat RL and SFT, measure solve rates."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from envs.errors import check_output, user_errors

EXAMPLE = """
examples:
  python -m rl sft --out policy/cwm_tiny                     rebuild the committed warm start (seed 0)
  python -m rl sft --from runs/tiny --out runs/tiny/sft      rejection sampling: the run's resolved trajectories
  python -m rl bootstrap rl/recipes/tiny_bootstrap.toml --rounds 2      RL, rejection sampling, SFT; RL from there, ...
  python -m rl rates MY_RECIPE.toml --samples 8 --out rates.jsonl       for env.rates and env.window of a recipe
  python -m rl plan rl/recipes/tiny.toml                                assumed latencies and episodes
  python -m rl plan rl/recipes/tiny.toml --from runs/tiny --learn.max_staleness=0    a run's own, without overlap
  python -m rl plan rl/recipes/tiny.toml --model cwm-32b --gpus 64 --policy.max_context=32768 --policy.max_tokens=4096 \\
      --learn.max_tokens=32768 --learn.dtype=bf16 --learn.ranks=4 --learn.sequence_parallel=4 --rollout.episodes=256
Fields of a recipe are set as --section.key=value. Exit status: 0 done, 1 stopped by a failure, 2 can't be run as asked.
"""


GIVEN = ("episodes", "drills", "comebacks", "inspections", "probe_weight", "epochs", "seed")
"""Fields of `rl.sft.WarmStart` that the command line may set."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        "python -m rl", description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = p.add_subparsers(dest="command", required=True)
    for name, what, options in (
        ("plan", "placement, memory, speed and bottleneck of a run", _plan),
        ("sft", "supervised fine-tuning", _sft),
        ("bootstrap", "rounds of RL, rejection sampling and SFT; run it again to go on", _bootstrap),
        ("rates", "measure the solve rates of training tasks", _rates),
    ):
        options(
            commands.add_parser(name, help=what, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter)
        )
    return p


def _sft(sft: argparse.ArgumentParser) -> None:
    """The options of `sft`; their defaults are those of the committed warm start."""
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


def _plan(p: argparse.ArgumentParser) -> None:
    from rl import plan

    plan.options(p)


def _bootstrap(p: argparse.ArgumentParser) -> None:
    p.add_argument("recipe", help="a TOML file; `steps` is the length of each round's RL, `eval.tasks` are held out")
    p.add_argument("--rounds", type=int, default=2, help="rounds in all (default: %(default)s)")
    p.add_argument("--epochs", type=float, default=2.0, help="passes of SFT (default: %(default)s)")


def _rates(p: argparse.ArgumentParser) -> None:
    p.add_argument("recipe", help="a TOML file: its policy plays the training tasks")
    p.add_argument("--env", default="env", help="the NAME of [envs.NAME] (default: [env])")
    p.add_argument("--tasks", type=int, default=0, help="so many from first_task on (default: all of a task set)")
    p.add_argument("--samples", type=int, default=8, help="episodes of each task (default: %(default)s)")
    p.add_argument("--out", type=Path, required=True, help="file of JSON lines to write")


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    args, rest = parser().parse_known_args(argv)
    if args.command == "sft":
        return _fine_tune(args, rest)
    from rl.config import load
    from rl.train import changes, check

    config = load(args.recipe, changes(rest))
    if args.command == "plan":
        from rl import plan

        check_output("--json", args.json)
        return plan.run(args, config)
    if args.command == "rates":
        from rl.evaluate import measure

        check_output("--out", args.out)
        print(measure(config, args.env, args.tasks, args.samples, args.out))
        return 0
    from rl.bootstrap import bootstrap, lines

    check(config)
    print(lines(bootstrap(config, args.rounds, args.epochs), config.eval.tasks))
    return 0


def _fine_tune(args: argparse.Namespace, rest: list[str]) -> int:
    from rl.sft import WarmStart, imitate, warm_start

    if rest:
        raise ValueError(f"argument {rest[0]!r} is not understood; `python -m rl sft --help` lists what is")
    config = WarmStart(**{name: getattr(args, name) for name in GIVEN})
    if args.run:
        facts = imitate(args.run, args.model, args.out, config, args.work)
    else:
        facts = warm_start(config, args.out, args.work, args.backend)
    print(json.dumps(facts))
    return 0


if __name__ == "__main__":
    sys.exit(user_errors(main))
