"""`python -m benchmarks systems NAME`: measure a part of the system; prints rows, writes them with --json F."""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from envs.errors import check_output, user_errors

SYSTEMS = (
    *("admission", "attacker", "engine", "gpu", "grading", "honesty", "learner", "learning", "loop", "plan", "resume"),
    *("sandbox", "selfcheck", "soak", "staleness"),
)
EXAMPLE = """
examples:
  python -m benchmarks systems learning --seeds 3 --json learning.json
  python -m benchmarks systems learning --seeds 1 --tasks 100 --table
  python -m benchmarks systems attacker --seeds 3 --json attacker.json --markdown attacker.md
  python -m benchmarks systems admission --json admission.json
  python -m benchmarks systems engine --repeats 5 --json engine.json
  python -m benchmarks systems gpu --json gpu.json
  python -m benchmarks systems grading --json grading.json
  python -m benchmarks systems honesty --json honesty.json
  python -m benchmarks systems learner --json learner.json
  python -m benchmarks systems loop --json loop.json
  python -m benchmarks systems plan --json plan.json
  python -m benchmarks systems selfcheck --backend native --json selfcheck.json
  python -m benchmarks systems soak --live 500 --episodes 200 --json soak.json
  python -m benchmarks systems resume --json resume.json
  python -m benchmarks systems staleness --seeds 3 --json staleness.json --figure staleness.svg
  python -m benchmarks systems sandbox --quick --no-peers
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        "python -m benchmarks",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = p.add_subparsers(dest="command", required=True)
    shown: dict[str, Any] = {"epilog": EXAMPLE, "formatter_class": argparse.RawDescriptionHelpFormatter}
    part = commands.add_parser("systems", help="measure a part of the system", **shown)
    systems = part.add_subparsers(dest="name", required=True)
    for name in SYSTEMS:
        module = import_module(f"benchmarks.systems.{name}")
        about = module.__doc__ or ""
        one = systems.add_parser(name, help=about.split("\n")[0], description=about, **shown)
        one.add_argument("--json", type=Path, help="write the rows to a file")
        module.options(one)
    return p


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows, a line each."""
    for r in rows:
        shown = f"{r['ours']:g} {r['unit']}" + (
            f", {r['ratio']:g} x {r['peer_name']}" if r["ratio"] is not None else ""
        )
        verdict = "" if r["met"] is None else f"   goal {r['goal']}: {'met' if r['met'] else 'NOT MET'}"
        print(f"{r['what']:<60} {shown:>22}  n={r['n']} {r['spread'] or ''}{verdict}")


def main(argv: list[str] | None = None) -> int:
    """The command; status 0 when it ran, whatever was met."""
    from benchmarks.systems.base import commit, host

    args = parser().parse_args(argv)
    check_output("--json", args.json)
    result = {"name": args.name, "commit": commit(), "host": host()}
    module = import_module(f"benchmarks.systems.{args.name}")
    result |= module.run(args)
    goals = [r["met"] for r in result["rows"] if r["goal"]]
    result["ok"] = all(goals)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    getattr(module, "show", show)(result["rows"])
    return 0


if __name__ == "__main__":
    sys.exit(user_errors(main))
