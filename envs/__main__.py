"""`python -m envs doctor|play|attack`: what this host can isolate, an environment played by hand, sandboxes under attack."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from envs.errors import check_output, user_errors
from envs.registration import make, registered

EXAMPLE = """
examples:
  python -m envs doctor                       what this host can enforce, a line each
  python -m envs doctor --reap                free what killed runs left, a line each
  python -m envs play                         repair task 0 of tiny-repairs with your own hands
  python -m envs play codeworld/SWE-v0 --task 7 --split validation
  python -m envs attack --backend native      every attack on this host's native sandboxes
  python -m envs attack --backend docker --group isolation resources --json attack.json
  python -m envs attack --case A4 B14
In `play` an action ends with an empty line; `bash COMMAND` and `submit` are short for the tool calls.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        "python -m envs", description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = p.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser(
        "doctor",
        help="what this host can enforce",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    doctor.add_argument("--json", metavar="F", help="write the table to a file as well")
    doctor.add_argument(
        "--reap", action="store_true", help="instead, free what dead runs left; living ones are not touched"
    )
    play = commands.add_parser(
        "play", help="play an environment by hand", epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    play.add_argument(
        "env", nargs="?", default="codeworld/SWE-v0", help="registered id or module:Class (default: %(default)s)"
    )
    play.add_argument("--task", type=int, default=0, help="task index (default: %(default)s)")
    play.add_argument("--split", default="train", help="split (default: %(default)s)")
    play.add_argument(
        "--kwargs",
        default="{}",
        metavar="JSON",
        help='constructor arguments, e.g. \'{"backend": "docker"}\'',
    )
    attack = commands.add_parser(
        "attack",
        help="put a sandbox backend through the attack suite",
        description="Run the attack suite. Exit status 0: nothing breached; 1: something was; 2: bad use.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    attack.add_argument("--backend", default="auto", help="native, docker or auto (default: %(default)s)")
    attack.add_argument(
        "--group",
        nargs="+",
        metavar="G",
        help="isolation, resources, grading, leakage or tools, several allowed (default: all)",
    )
    attack.add_argument("--case", nargs="+", metavar="ID", help="only these cases, e.g. A3 B14 (default: all)")
    attack.add_argument("--json", metavar="F", help="write the outcomes to a file as well")
    return p


def arguments(text: str) -> dict[str, Any]:
    """Constructor arguments as a JSON object; `ValueError` for anything else."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f'--kwargs {text!r} is no JSON object; give one such as {{"backend": "docker"}}')
    return found


def read_action() -> str | None:
    """One action from the terminal: lines up to an empty one, with the short forms; None at end of file."""
    lines: list[str] = []
    while True:
        try:
            line = input("> " if not lines else ". ")
        except EOFError:
            return None
        if not lines and line.startswith("bash "):
            return f"<tool: bash>\n{line[5:]}\n</tool>"
        if not lines and line.strip() == "submit":
            return "<tool: submit>\n</tool>"
        if not line:
            return "\n".join(lines)
        lines.append(line)
        if line == "</tool>":
            return "\n".join(lines)


def play(args: Any) -> int:
    """One episode by hand."""
    env = make(args.env, **arguments(args.kwargs))
    try:
        statement, info = env.reset(seed=args.task, options={"split": args.split})
        print(f"[{info.get('task_id', args.env)}]\n{statement}")
        total = 0.0
        while True:
            action = read_action()
            if action is None:
                return 0
            observation, reward, terminated, truncated, info = env.step(action)
            total += float(reward)
            print(visible(observation), end="" if observation.endswith("\n") else "\n")
            if terminated or truncated:
                print(
                    f"end: {info.get('stop', 'submitted')}, outcome {info.get('outcome', '-')}, return {total:g}. {info.get('why', '')}"
                )
                return 0
    finally:
        env.close()


def visible(text: str) -> str:
    """The text with control characters written out: what a sandbox prints may not steer this terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def doctor(args: Any) -> int:
    """The table of what this host can enforce; status 1 where no sandbox is possible."""
    if args.reap:
        return reap(args)
    from envs.sandbox import probe

    rows = probe()
    width = max(len(what) for what, _, _ in rows)
    for what, value, remedy in rows:
        print(f"{what:<{width}}  {value}" + (f"   ({remedy})" if remedy else ""))
    print(f"{'environments':<{width}}  {', '.join(registered())}")
    if args.json:
        from pathlib import Path

        Path(args.json).write_text(
            json.dumps([{"what": w, "value": v, "remedy": r} for w, v, r in rows], indent=1) + "\n"
        )
    return int(not any(what.startswith("sandbox") and value == "works" for what, value, _ in rows))


def reap(args: Any) -> int:
    """Free what dead runs left, a line each; status 1 where something could not be freed."""
    from envs.sandbox import reaper

    rows = reaper.reap()
    for kind, name, why in rows:
        print(f"{kind} {name}: {f'NOT freed: {why}' if why else 'freed'}" if name else f"{kind}: not looked for: {why}")
    stuck, freed = sum(bool(row.name and row.why) for row in rows), sum(not row.why for row in rows)
    print(f"{freed} freed, {stuck} not" if freed or stuck else "nothing to reap")
    if args.json:
        from pathlib import Path

        Path(args.json).write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n")
    return int(stuck > 0)


def attack(args: Any) -> int:
    """The attack suite's table, a line as each case ends; status 1 where something was breached."""
    from envs.attacks import run_suite, select
    from envs.sandbox import make_backend

    cases = select(args.group, args.case)
    backend = make_backend(args.backend)
    width = max(len(case.title) for case in cases)
    print(f"{'':4} {backend.name + ' sandboxes under attack':<{width}}  {'outcome':<9} {'s':>6}  detail")

    def report(outcome: Any) -> None:
        row = f"{outcome.case.id:<4} {outcome.case.title:<{width}}  {outcome.verdict:<9} {outcome.seconds:6.2f}  {outcome.why}"
        print(row, flush=True)

    try:
        outcomes = run_suite(backend, args.group, ids=args.case, report=report)
    finally:
        backend.close()
    counts = {verdict: sum(o.verdict == verdict for o in outcomes) for verdict in ("contained", "breached", "not run")}
    seconds = sum(outcome.seconds for outcome in outcomes)
    print(
        f"{len(outcomes)} cases on {backend.name} in {seconds:.1f} s: "
        + ", ".join(f"{n} {v}" for v, n in counts.items())
    )
    if args.json:
        from pathlib import Path

        found = {"ok": not counts["breached"], "backend": backend.name, "cases": [o.to_json() for o in outcomes]}
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    return int(counts["breached"] > 0)


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    args = parser().parse_args(argv)
    check_output("--json", getattr(args, "json", None))
    return {"doctor": doctor, "play": play, "attack": attack}[args.command](args)


if __name__ == "__main__":
    sys.exit(user_errors(main))
