"""`python -m agents play`: evaluate a model behind an HTTP endpoint in an environment. Needs no torch."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from agents.play import Plan, run, save, summary
from envs.errors import check_output, user_errors
from policy.endpoint import Endpoint, EndpointConfig
from policy.meter import Prices

EXAMPLE = """
examples:
  python -m policy serve policy/cwm_tiny --port 8000 &
  python -m agents play --endpoint http://127.0.0.1:8000 --tokenizer policy/cwm_tiny --style plain --tasks 20
  python -m agents play --endpoint http://gpu1:8000 --model Qwen/Qwen3-32B --env-kwargs '{"tasks": "tasks"}' --tools json
  python -m agents play --endpoint https://api.example.com/v1 --model big --key-env EXAMPLE_API_KEY --tasks 100 \\
      --requests-per-minute 500 --price 3 15 --max-cost 20 --out runs/big --json big.json
With --tokenizer the server is asked in token ids (vLLM, `python -m policy serve`) and trajectories are exact; without, in
messages, as any OpenAI-compatible server understands them. Exit status: 0 played, 1 ended early or all lost to
infrastructure, 2 can't be run as asked.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        "python -m agents", description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = p.add_subparsers(dest="command", required=True)
    play = commands.add_parser(
        "play",
        help="play tasks with a model behind an endpoint, and count",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    play.add_argument(
        "env", nargs="?", default="codeworld/SWE-v0", help="registered id or module:Class (default: %(default)s)"
    )
    _tasks(play)
    _agent(play)
    _server(play)
    play.add_argument("--out", type=Path, metavar="DIR", help="write trajectories.jsonl there")
    play.add_argument("--json", type=Path, metavar="F", help="write the summary to a file")
    return p


def _tasks(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--env-kwargs", default="{}", metavar="JSON", help='constructor arguments, e.g. \'{"tasks": "tasks"}\''
    )
    p.add_argument("--split", default=Plan.split, help="split (default: %(default)s)")
    p.add_argument("--first", type=int, default=Plan.first, metavar="N", help="first task (default: %(default)s)")
    p.add_argument("--tasks", type=int, default=Plan.tasks, metavar="N", help="tasks (default: %(default)s)")
    p.add_argument("--samples", type=int, default=Plan.samples, metavar="N", help="of each task (default: %(default)s)")
    p.add_argument("--episodes", type=int, default=Plan.episodes, metavar="N", help="at once (default: %(default)s)")
    p.add_argument(
        "--retries", type=int, default=Plan.retries, metavar="N", help="of lost episodes (default: %(default)s)"
    )
    p.add_argument("--seed", type=int, default=Plan.seed, help="of sampling (default: %(default)s)")


def _agent(p: argparse.ArgumentParser) -> None:
    p.add_argument("--style", default=Plan.style, help="how things are worded (default: %(default)s)")
    p.add_argument(
        "--tools",
        choices=("text", "json"),
        default=Plan.calling,
        help="messages: how tools are called (default: %(default)s)",
    )
    p.add_argument("--temperature", type=float, default=Plan.temperature, help="(default: %(default)s)")
    p.add_argument("--top-p", type=float, default=Plan.top_p, help="(default: %(default)s)")
    p.add_argument(
        "--max-tokens", type=int, default=Plan.max_tokens, metavar="N", help="of a turn, at most (default: %(default)s)"
    )
    p.add_argument(
        "--max-context", type=int, default=0, metavar="N", help="of an episode (default: task's and server's)"
    )
    p.add_argument("--max-turns", type=int, default=0, metavar="N", help="of an episode (default: the task's)")


def _server(p: argparse.ArgumentParser) -> None:
    config = EndpointConfig
    p.add_argument("--endpoint", required=True, metavar="URL", help="base URL, mostly ending in /v1")
    p.add_argument("--model", default="", metavar="NAME", help="model there (default: the only one that it lists)")
    p.add_argument(
        "--tokenizer", default="", metavar="DIR", help="model directory: ask in token ids (default: messages)"
    )
    p.add_argument(
        "--key-env", default="", metavar="VAR", help="environment variable with the API key (default: no key)"
    )
    p.add_argument(
        "--deadline", type=float, default=config.deadline_s, metavar="S", help="of a call (default: %(default)s)"
    )
    p.add_argument(
        "--call-retries", type=int, default=config.retries, metavar="N", help="of a call (default: %(default)s)"
    )
    p.add_argument("--requests-per-minute", type=float, default=0.0, metavar="N", help="pace (default: none)")
    p.add_argument("--tokens-per-minute", type=float, default=0.0, metavar="N", help="pace (default: none)")
    p.add_argument(
        "--price",
        type=float,
        nargs=2,
        default=(0.0, 0.0),
        metavar=("IN", "OUT"),
        help="of a million tokens (default: free)",
    )
    p.add_argument("--price-cached", type=float, metavar="P", help="of a million kept prompt tokens (default: IN)")
    p.add_argument(
        "--max-cost", type=float, default=0.0, metavar="M", help="make no call beyond it (default: no bound)"
    )
    p.add_argument("--extra", default="{}", metavar="JSON", help="more fields of each request; null leaves one out")


def _object(option: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f'{option} {text!r} is no JSON object; give one such as {{"name": "value"}}')
    return found


def plan_of(args: argparse.Namespace) -> Plan:
    """What the command line asks to play."""
    return Plan(
        env=args.env,
        kwargs=_object("--env-kwargs", args.env_kwargs),
        split=args.split,
        first=args.first,
        tasks=args.tasks,
        samples=args.samples,
        episodes=args.episodes,
        retries=args.retries,
        tokenizer=args.tokenizer,
        style=args.style,
        calling=args.tools,
        temperature=args.temperature,
        top_p=args.top_p,
        max_tokens=args.max_tokens,
        max_context=args.max_context,
        max_turns=args.max_turns,
        seed=args.seed,
    )


def endpoint_of(args: argparse.Namespace) -> Endpoint:
    """The server that the command line names."""
    config = EndpointConfig(
        url=args.endpoint,
        model=args.model,
        key_env=args.key_env,
        deadline_s=args.deadline,
        retries=args.call_retries,
        requests_per_minute=args.requests_per_minute,
        tokens_per_minute=args.tokens_per_minute,
        prices=Prices(prompt=args.price[0], completion=args.price[1], cached=args.price_cached),
        max_cost=args.max_cost,
        extra=_object("--extra", args.extra),
    )
    return Endpoint(config)


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    args = parser().parse_args(argv)
    check_output("--json", args.json)
    found = run(plan_of(args), endpoint_of(args), args.out)
    if args.json:
        save(found, args.json)
    print(summary(found))
    if found["error"]:
        print("error: " + " ".join(found["error"].split()), file=sys.stderr)
    return int(not found["ok"])


if __name__ == "__main__":
    sys.exit(user_errors(main))
