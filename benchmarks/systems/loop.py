"""What does asynchrony give? The same tasks and tokens, once in strict turns (sync), once overlapped (async), in one run.

Sync is `learn.max_staleness = 0`: a batch is played, trained and published before the next is begun. Async bounds staleness
above that. Both have the same episode slots, tasks, answers and batches, and alternate, pair by pair.

What takes time is waiting, so that two cores are enough: an answer takes as long as the arm says, then the tool call, and the
learner ends its (real) update so late that playing is 0.6 of a synchronous step. Everything else is real (`waits.py`).

    arm          an answer                                          a tool call    async's bound
    fixed        8 tokens at 5 ms                                   200 ms         1 version
    long tail    log-normal, sigma 0.8, drawn once per episode      none           4 versions

With sigma 0.8 the longest of 16 episodes is 3 times the mean: a synchronous step uses 0.3 of its slots' time while it plays, the
share that the published speed-ups of asynchronous training come from. The bound of a pair is the ledger's: the sync run's seconds
over those of its busiest part (the learner; an episode slot, occupied). A perfect pipeline would need no less than that.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from benchmarks.systems.base import row
from benchmarks.systems.waits import TURNS, Ran, train
from envs.errors import InfraError
from policy import renderer
from policy.scripted import ScriptedPolicy
from rl import parts
from rl.config import EnvConfig
from rl.ledger import is_idle

GROUPS, SIZE = 4, 4
SHARE = 0.6
"""Of a synchronous step, in which episodes are played."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """How long things take, seconds."""

    name: str
    answer: float
    """Median of an answer."""
    sigma: float
    """Of its logarithm; one draw per episode."""
    tool: float
    staleness: int
    """Of the async run."""

    def answers(self, task: int, sample: int) -> float:
        """Seconds of each answer of an episode, the same in every run."""
        return self.answer * random.Random(f"{task}/{sample}").lognormvariate(0.0, self.sigma)

    def episode(self, task: int, sample: int) -> float:
        """Seconds of a whole episode."""
        return TURNS * (self.answers(task, sample) + self.tool)

    def learner(self, first: int, steps: int) -> float:
        """Seconds of an update that make playing `SHARE` of a synchronous step, on average over the run's batches."""
        tasks = range(first, first + GROUPS)
        longest = [
            max(self.episode(task + GROUPS * step, sample) for task in tasks for sample in range(SIZE))
            for step in range(steps)
        ]
        return statistics.mean(longest) * (1 - SHARE) / SHARE


ARMS = {
    "fixed": Arm(name="fixed", answer=0.04, sigma=0.0, tool=0.2, staleness=1),
    "long tail": Arm(name="long tail", answer=0.055, sigma=0.8, tool=0.0, staleness=4),
}


def script(episode: str, _: str) -> str:
    """More digits, each a token, than an answer may have; they differ by episode."""
    return f"{zlib.crc32(episode.encode()):010d}" * 2


def engine_of(arm: Arm) -> type[parts.EnginePart]:
    """The engine with a scripted mouth that takes its time: weights, versions and scores are real."""

    class WaitingEngine(parts.EnginePart):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.mouth = ScriptedPolicy(renderer.load(config.model), script)

        def generate(self, token_ids: Any, sampling: Any, episode: str) -> Any:
            _, task, sample = episode.split("/")
            completion = self.mouth.generate(token_ids, sampling, episode)  # of the version that it began with
            time.sleep(arm.answers(int(task), int(sample.split(".")[0])))
            return completion

        def release(self, episode: str) -> None:
            self.mouth.release(episode)

        def publish(self, version: int, weights: Any) -> int:
            self.mouth.version = super().publish(version, weights)
            return version

    return WaitingEngine


def learner_of(seconds: float) -> type[parts.LearnerPart]:
    """The learner, whose updates take `seconds`."""

    class WaitingLearner(parts.LearnerPart):
        def step(self, rows: Any) -> dict[str, Any]:
            began = time.monotonic()
            report = super().step(rows)
            with self.ledger.spend("train"):
                time.sleep(max(0.0, began + seconds - time.monotonic()))
            return report

    return WaitingLearner


def play(arm: Arm, staleness: int, steps: int) -> Ran:
    """One run."""
    seconds = arm.learner(EnvConfig().first_task, steps)
    with patch.multiple(parts, EnginePart=engine_of(arm), LearnerPart=learner_of(seconds)):
        return train(groups=GROUPS, size=SIZE, slots=GROUPS * SIZE, steps=steps, staleness=staleness, tool=arm.tool)


def options(p: argparse.ArgumentParser) -> None:
    """This measurement's own options."""
    p.add_argument("--pairs", type=int, default=3, help="runs of each kind and arm (default: %(default)s)")
    p.add_argument("--steps", type=int, default=20, help="batches of a run (default: %(default)s)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The measurement."""
    pairs: dict[str, list[tuple[Ran, Ran]]] = {name: [] for name in ARMS}
    for number in range(args.pairs):
        for name, arm in ARMS.items():
            sync, overlapped = play(arm, 0, args.steps), play(arm, arm.staleness, args.steps)
            pairs[name].append((sync, overlapped))
            for kind, ran in (("sync", sync), ("async", overlapped)):
                print(f"{name}, pair {number + 1}, {kind}: {ran.seconds:.1f} s, {ran.bottleneck}", flush=True)
    return {"rows": [r for name, done in pairs.items() for r in rows(name, done)]}


def occupied(ran: Ran) -> float:
    """Seconds in which an episode slot was in use, on average over the slots."""
    spent = ran.ledgers["episodes"]
    return sum(spent.get(label, 0.0) for label in ("reset", "wait_policy", "wait_turn", "env")) / (GROUPS * SIZE)


def learning(ran: Ran) -> float:
    """Seconds in which the learner worked."""
    return ran.ledgers["learner"]["train"] + ran.ledgers["learner"]["publish"]


def bound(sync: Ran) -> float:
    """Most times that a run may be faster than this one, as none of its parts can be busier than always."""
    engine = sum(seconds for label, seconds in sync.ledgers["engine"].items() if not is_idle(label))
    return sync.seconds / max(learning(sync), occupied(sync), engine, sync.ledgers["loop"]["work"])


def rows(name: str, pairs: Sequence[tuple[Ran, Ran]]) -> list[dict[str, Any]]:
    """What the pairs of an arm say."""
    for sync, overlapped in pairs:
        tokens, more = (sum(step["action_tokens"] for step in ran.steps) for ran in (sync, overlapped))
        if tokens != more:
            raise InfraError(
                f"{name}: sync trained {tokens} tokens, async {more}; the machine lost episodes, measure again"
            )
    speed = [sync.seconds / overlapped.seconds for sync, overlapped in pairs]
    bounds = [bound(sync) for sync, _ in pairs]
    of_bound = [ours / most for ours, most in zip(speed, bounds, strict=True)]

    def told(what: str, values: Sequence[float], **more: Any) -> dict[str, Any]:
        spread = [round(min(values), 3), round(max(values), 3)]
        return row(f"{name}: {what}", statistics.median(values), n=len(values), spread=spread, **more)

    def of_all(which: int, measured: Any) -> list[float]:
        return [measured(pair[which]) for pair in pairs]

    return [
        told("async, times faster than sync", speed, unit="x", goal=">=2.1" if name == "long tail" else ""),
        told("the same, of the ledger's bound", of_bound, goal=">=0.9" if name == "fixed" else ""),
        told("the ledger's bound", bounds, unit="x"),
        told("sync: seconds", of_all(0, lambda ran: ran.seconds), unit="s"),
        told("async: seconds", of_all(1, lambda ran: ran.seconds), unit="s"),
        told("sync: share of the step in which episodes are played", of_all(0, playing)),
        told(
            "sync: use of the slots while they are played",
            of_all(0, lambda ran: occupied(ran) / ran.seconds / playing(ran)),
        ),
        told("sync: learner idle share", of_all(0, idle)),
        told("async: learner idle share", of_all(1, idle)),
        told("async: oldest token, versions", of_all(1, lambda ran: max(step["staleness_max"] for step in ran.steps))),
        told("tokens trained by each", of_all(1, lambda ran: sum(step["action_tokens"] for step in ran.steps))),
        told(
            "most of a wall clock without a label", [max(a.unexplained, b.unexplained) for a, b in pairs], goal="<=0.01"
        ),
    ]


def idle(ran: Ran) -> float:
    """Share of the run in which the learner did nothing."""
    return 1 - learning(ran) / ran.seconds


def playing(ran: Ran) -> float:
    """Share of the run in which the learner had no batch."""
    return 1 - (learning(ran) + ran.ledgers["learner"].get("wait_publish", 0.0)) / ran.seconds
