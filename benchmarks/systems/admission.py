"""What admission by KV budget saves: episodes of many turns on an engine whose KV holds a quarter of them.

Three arms in turns: `uncapped` (KV for all), `off` (a quarter; whoever asks is served, so an episode's KV has been dropped when its
next turn comes, and its whole context is prefilled again) and `on` (a quarter, behind `rl.gate.Gate`: the oldest
episodes run, others wait with nothing lost). The torch engine, a model with random weights, fixed lengths, so that every arm
samples the same number of tokens after the same number of prompt tokens. The KV cap is the engine's number of slots.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.systems.base import row
from policy.completion import Policy, Sampling
from rl.admission import Budget
from rl.gate import Gate

VOCABULARY = 512
ARMS = ("uncapped", "off", "on")
SHARE = 4
"""The demand over the cap."""


def options(p: argparse.ArgumentParser) -> None:
    """This measurement's own options."""
    p.add_argument("--episodes", type=int, default=16, help="at once, a multiple of 4 (default: %(default)s)")
    p.add_argument("--turns", type=int, default=10, help="of an episode (default: %(default)s)")
    p.add_argument("--observation", type=int, default=144, help="new prompt tokens of a turn (default: %(default)s)")
    p.add_argument("--sampled", type=int, default=16, help="sampled tokens of a turn (default: %(default)s)")
    p.add_argument("--tool", type=float, default=0.02, help="seconds between two turns (default: %(default)s)")
    p.add_argument("--width", type=int, default=256, help="of the model, which has 6 layers (default: %(default)s)")
    p.add_argument("--repeats", type=int, default=5, help="of each arm, in turns (default: %(default)s)")


@dataclass(frozen=True)
class Played:
    """One arm, once."""

    wall: float
    """Seconds until the last episode ended."""
    prefilled: float
    """Prompt tokens computed."""
    ends: list[float]
    """Seconds from the start, when all were asked for, to each episode's end."""


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The measurement."""
    if args.episodes < SHARE or args.episodes % SHARE:
        raise ValueError(f"--episodes {args.episodes}: not a multiple of {SHARE}, the demand over the cap; e.g. 16")
    for name in ("turns", "observation", "sampled", "repeats"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: must be at least 1")
    model = _model(args)
    found: dict[str, list[Played]] = {arm: [] for arm in ARMS}
    for repeat in range(args.repeats):
        for arm in ARMS if repeat % 2 else reversed(ARMS):
            found[arm].append(play(arm, model, args))
            print(f"{arm}: {found[arm][-1].wall:.1f} s, {found[arm][-1].prefilled:.0f} tokens prefilled", flush=True)
    return {"rows": rows(found), "arms": {arm: [vars(p) for p in played] for arm, played in found.items()}}


def _model(args: argparse.Namespace) -> Any:
    from policy.models import ModelConfig, build

    size = {"hidden_size": args.width, "intermediate_size": 3 * args.width, "layers": 6}
    return build(ModelConfig(vocab_size=VOCABULARY, max_context=_context(args), **size))


def _context(args: argparse.Namespace) -> int:
    return int(args.turns * (args.observation + args.sampled))


def play(arm: str, model: Any, args: argparse.Namespace) -> Played:
    """All episodes at once, each on a thread of its own."""
    from policy.torch_engine import EngineConfig, TorchEngine

    context = _context(args)
    slots = args.episodes if arm == "uncapped" else args.episodes // SHARE
    with TorchEngine(model, EngineConfig(slots=slots, max_context=context)) as engine:
        policy: Any = Gate(engine, Budget(slots * context, page=context)) if arm == "on" else engine
        with ThreadPoolExecutor(args.episodes) as threads:
            began = time.monotonic()
            ends = [threads.submit(_episode, policy, args, n) for n in range(args.episodes)]
            walls = [end.result() - began for end in ends]
        return Played(max(walls), engine.stats()["prefilled_tokens"], walls)


def _episode(policy: Policy, args: argparse.Namespace, number: int) -> float:
    """One episode; when it ended."""
    draw, ids, name = random.Random(number), list[int](), f"episode-{number}"
    for turn in range(args.turns):
        ids += [draw.randrange(VOCABULARY) for _ in range(args.observation)]
        sampling = Sampling(max_tokens=args.sampled, seed=args.turns * number + turn)
        ids += policy.generate(ids, sampling, name).token_ids
        time.sleep(args.tool)
    policy.release(name)
    return time.monotonic()


def rows(found: dict[str, list[Played]]) -> list[dict[str, Any]]:
    """Medians over the repeats; ratios of medians."""

    def middle(arm: str, of: Callable[[Played], float]) -> float:
        return median(of(played) for played in found[arm])

    def pair(
        what: str, of: Callable[[Played], float], ours: str, peer: str, unit: str, goal: str, **more: Any
    ) -> dict[str, Any]:
        spread = [round(bound(of(p) for p in found[ours]), 2) for bound in (min, max)]
        other = round(middle(peer, of), 4)
        return row(
            what,
            middle(ours, of),
            peer=other,
            peer_name=peer,
            unit=unit,
            goal=goal,
            n=len(found[ours]),
            spread=spread,
            **more,
        )

    def prefilled(played: Played) -> float:
        return played.prefilled

    def slowest(played: Played) -> float:
        return max(played.ends) / median(played.ends)

    spread = [round(bound(map(slowest, found["on"])), 2) for bound in (min, max)]
    return [
        pair("prefilled tokens, admission off", prefilled, "off", "uncapped", "tokens", ">=3"),
        pair("prefilled tokens, admission on", prefilled, "on", "uncapped", "tokens", "<=1.1"),
        pair("wall clock, admission on", lambda p: p.wall, "on", "off", "s", ">=1.8", times_better=True),
        pair("wall clock, uncapped", lambda p: p.wall, "uncapped", "off", "s", "", times_better=True),
        row(
            "end of the last episode over the median, on",
            middle("on", slowest),
            goal="<=2",
            n=len(found["on"]),
            spread=spread,
        ),
    ]
