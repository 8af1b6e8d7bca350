"""`python -m envs doctor|play|build|validate|attack`: this host, an environment by hand, tasks from repositories, attacks."""

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
  python -m envs build --from pypi:humanize,pypi:toolz --tasks mutate:25 --out tasks
  python -m envs build --from ~/src/mylib --tasks history:50 --out tasks      fix commits of your own repository
  python -m envs validate tasks               prove each task: gold passes, doing nothing and cheats do not
  python -m envs validate --rows verified.parquet --repos clones --out checked --official
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
    _build_options(commands)
    _validate_options(commands)
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


def _build_options(commands: Any) -> None:
    p = commands.add_parser(
        "build",
        help="make validated tasks from repositories",
        description="Make a task set from repositories: images, candidates, validation. Run it again to go on where it was "
        "stopped. Exit status 0: at least one task; 1: none; 2: bad use.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--from",
        dest="sources",
        required=True,
        metavar="SOURCE[,SOURCE…]",
        help="pypi:NAME[==VERSION] (names after the first need no pypi:), a git URL or a local git repository [@COMMIT]",
    )
    p.add_argument(
        "--tasks", required=True, metavar="MAKER:N", help="mutate:N or history:N, N tasks of each source at most"
    )
    p.add_argument("--out", required=True, metavar="DIR", help="task set: tasks.jsonl, blobs, images, ledger.jsonl")
    p.add_argument("--base", default="codeworld-base", help="image that task images stand on (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of mutations (default: %(default)s)")
    p.add_argument("--k", type=int, default=3, help="repetitions in validation (default: %(default)s)")
    p.add_argument("--jobs", type=int, default=2, help="candidates tried at once (default: %(default)s)")
    p.add_argument(
        "--setup",
        default="",
        metavar="MODULE:CALLABLE",
        help="makes the images instead, such as a RepoAgent's environment (default: what a repository declares is installed)",
    )
    p.add_argument("--issues", metavar="F", help="history: issue texts as JSON lines {id, text}")
    p.add_argument("--json", metavar="F", help="write what became of each candidate to a file as well")


def _validate_options(commands: Any) -> None:
    p = commands.add_parser(
        "validate",
        help="prove the tasks of a set, or rows of SWE-bench",
        description="Prove each task; those that fail go to quarantine.jsonl. Exit status 0: all are sound; 1: some are not; "
        "2: bad use.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("tasks", nargs="?", metavar="DIR", help="a task set")
    p.add_argument("--rows", metavar="FILE", help="instead: SWE-bench rows (jsonl, json, parquet or hub id)")
    p.add_argument("--repos", metavar="DIR", help="rows: clones of their repositories, owner__name or name")
    p.add_argument("--out", metavar="DIR", help="rows: where images, logs and results go")
    p.add_argument("--ids", nargs="+", metavar="ID", help="rows: only these (default: all)")
    p.add_argument(
        "--python", default="", metavar="EXE", help="rows: a Python that has swebench 5, to grade the same logs"
    )
    p.add_argument("--official", action="store_true", help="rows: run swebench's own command, too")
    p.add_argument("--base", default="codeworld-base", help="rows: image to build on (default: %(default)s)")
    p.add_argument("--backend", default="auto", help="native, docker or auto (default: %(default)s)")
    p.add_argument("--k", type=int, help="task sets: repetitions (default: 3)")
    p.add_argument("--jobs", type=int, help="task sets: tasks at once (default: 2); rows are graded one by one")
    p.add_argument("--json", metavar="F", help="write the findings to a file as well")


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


def build(args: Any) -> int:
    """A task set from repositories; status 1 where no task came of them."""
    from pathlib import Path

    from envs.sandbox import make_backend
    from envs.sandbox.helper import cache_dir
    from envs.swe.build import Plan, build, parse_plan, parse_sources

    maker, count = parse_plan(args.tasks)
    names = parse_sources(args.sources)
    at_least_one(k=args.k, jobs=args.jobs)
    issues = Path(args.issues) if args.issues else None
    options = {"base": args.base, "seed": args.seed, "k": args.k, "jobs": args.jobs, "setup": args.setup}
    plan = Plan(maker=maker, count=count, issues=issues, **options)
    backend = make_backend("native")  # images are made of what a native sandbox writes
    try:
        done = build(names, plan, Path(args.out), backend, cache=cache_dir() / "sources")
    finally:
        backend.close()
    refused = ", ".join(f"{n} {reason}" for reason, n in done.refused.most_common())
    print(f"{len(done.tasks)} tasks of {len(names)} sources in {args.out}; refused: {refused or 'none'}")
    if args.json:
        rows = [fate.to_json() for fate in done.fates]
        found = {"ok": bool(done.tasks), "sources": done.sources, "tasks": rows}
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    return int(not done.tasks)


def at_least_one(**values: int) -> None:
    """Refuse what must be at least 1."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"--{name} {value}: must be at least 1")


def validate(args: Any) -> int:
    """Findings of each task, a line as each comes; status 1 where a task is not sound."""
    from pathlib import Path

    from envs.sandbox import make_backend

    if bool(args.tasks) == bool(args.rows):
        raise ValueError("validate: give a task set, or --rows FILE with --repos DIR and --out DIR")
    given = {name: value for name, value in (("k", args.k), ("jobs", args.jobs)) if value is not None}
    at_least_one(**given)
    if args.rows and given:
        raise ValueError(f"--{next(iter(given))}: rows are built and graded once, one by one; leave it out")
    if args.rows and not (args.repos and args.out):
        raise ValueError(f"--rows {args.rows}: needs --repos DIR and --out DIR, where clones are and where results go")
    backend = make_backend(args.backend)
    try:
        rows = validate_rows(args, backend) if args.rows else validate_tasks(args, backend)
    finally:
        backend.close()
    ok = all(row["met"] for row in rows)
    if args.json:
        Path(args.json).write_text(json.dumps({"ok": ok, "tasks": rows}, indent=1) + "\n")
    return int(not ok)


def validate_rows(args: Any, backend: Any) -> list[dict[str, Any]]:
    """Rows of SWE-bench: built, graded, compared."""
    from envs.swe.rows import validate_rows

    options = {"ids": args.ids, "base": args.base, "python": args.python, "official": args.official}
    return validate_rows(args.rows, args.repos, args.out, backend, **options)


def validate_tasks(args: Any, backend: Any) -> list[dict[str, Any]]:
    """The tasks of a set."""
    from pathlib import Path

    from envs.swe.validate import count, validate_set

    def report(finding: Any, done: int, of: int) -> None:
        said = f"{finding.fault}: {finding.why}" if finding.fault else "valid"
        print(f"[{done}/{of}] {finding.id}: {said} ({finding.seconds:.1f} s)", flush=True)

    findings = validate_set(Path(args.tasks), backend, k=args.k or 3, jobs=args.jobs or 2, report=report)
    print(f"{count(findings)} of {len(findings)} in {args.tasks}")
    return [finding.to_json() for finding in findings]


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
    return {"doctor": doctor, "play": play, "build": build, "validate": validate, "attack": attack}[args.command](args)


if __name__ == "__main__":
    sys.exit(user_errors(main))
