"""Is anything lost, trained twice or preferred when a run is killed? Kills runs at random moments, and resumes them.

With stand-ins for engine and learner (`killing.py`) the weights are the list of groups that they were trained on. After
every kill -9 the surviving checkpoint is held against the journal as a resumed run reads it; at a run's end every group that
was issued must be in the weights once, or dropped with a reason, and none missing from the feed. Episodes have a long tail,
so that most kills hit long ones: their lengths as trained are held against those as issued (Kolmogorov-Smirnov, two samples,
1 %), and beside it what leaving interrupted groups out would have done.

With the real engine and learner in deterministic mode the final weights are held, bit by bit, against those of a run that
nobody killed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agents.trajectory import Trajectory
from benchmarks.stats import ks, ks_critical
from benchmarks.systems.base import row
from benchmarks.systems.killing import KINDS, Fuse, seen_by, start
from envs.errors import InfraError
from rl import checkpoint
from rl.config import Config, EnvConfig, EvalConfig, PolicyConfig, RolloutConfig
from rl.journal import Journal
from rl.metrics import read
from rl.updates import LearnConfig

SPANS = {"statement": 120, "file": 60, "event": 40, "turn": 80}
"""A fuse strikes at one of so many events, all equally likely: within some two steps of a run."""

WALK = "benchmarks.systems.killing:Walk"
WINDOW = (0.2, 0.8)
RUNS = ((1, "wait", 2, None), (2, "drop", 2, WINDOW), (0, "wait", 1, None), (2, "wait", 3, None))
"""Staleness, what is done about late groups, steps between checkpoints, solve rates that are trained: of one run after the
other."""


def options(p: argparse.ArgumentParser) -> None:
    """This measurement's own options."""
    p.add_argument("--kills", type=int, default=200, help="of runs with stand-ins, at least (default: %(default)s)")
    p.add_argument("--episodes", type=int, default=2000, help="trained by them, at least (default: %(default)s)")
    p.add_argument("--real-kills", type=int, default=10, help="of the deterministic run (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The measurement."""
    fast = Path("/dev/shm")  # a kill loses nothing that was written, flushed or not
    with tempfile.TemporaryDirectory(dir=fast if os.access(fast, os.W_OK) else None) as name:
        rows = [
            *killed(Path(name), args.kills, args.episodes, args.seed),
            *exact(Path(name), args.real_kills, args.seed),
        ]
    return {"rows": rows}


@dataclass
class Tally:
    """What was seen over several runs."""

    kills: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    groups: Counter[str] = field(default_factory=Counter)
    issued: list[float] = field(default_factory=list)
    """Turns of each episode when it was first begun."""
    trained: list[float] = field(default_factory=list)
    uncut: list[float] = field(default_factory=list)
    """Of those trained, whose group had no episode that was interrupted."""


# ---- stand-ins: what is trained ----


def killed(root: Path, kills: int, episodes: int, seed: int) -> Iterator[dict[str, Any]]:
    """Runs with stand-ins until there were so many kills, and so many episodes trained; none of no kills."""
    tally, rng, number, began = Tally(), random.Random(seed), 0, time.monotonic()
    if not kills:
        return
    while tally.kills.total() < kills or len(tally.trained) < episodes:
        campaign(walk(root, number, *RUNS[number % len(RUNS)]), rng, tally)
        number += 1
    where, n = dict(tally.kills), tally.kills.total()
    yield row("killed runs: violations", len(tally.wrong), goal="<=0", n=n, spread=tally.wrong[:3] or where)
    yield row("killed runs: groups issued", tally.groups.total(), n=number, spread=dict(tally.groups))
    yield row("killed runs: seconds of a kill and what follows", (time.monotonic() - began) / n, unit="s", n=n)
    for what, sample in (("trained", tally.trained), ("trained, were interrupted groups left out", tally.uncut)):
        arms = (len(tally.issued), len(sample))
        limit = ks_critical(*arms)
        yield row(
            f"lengths issued and {what}: KS",
            ks(tally.issued, sample),
            goal=f"<={limit:.4f}" if what == "trained" else "",
            n=min(arms),
            spread=f"critical {limit:.4f}, means {sum(tally.issued) / arms[0]:.2f} and {sum(sample) / arms[1]:.2f}",
        )


def walk(root: Path, number: int, staleness: int, stale: Any, every: int, window: Any = None) -> Config:
    """A run of twelve steps that are walks."""
    return Config(
        name=f"walk-{number}",
        runs=str(root),
        steps=12,
        seed=number,
        checkpoint_every=every,
        env=EnvConfig(id=WALK, kwargs={"lost": 0.005}, window=window),
        policy=PolicyConfig(max_tokens=12),
        rollout=RolloutConfig(spawn="threads", workers=12, group_size=4),
        learn=LearnConfig(algorithm="grpo", groups_per_step=4, max_staleness=staleness, stale=stale),
        eval=EvalConfig(every=4, tasks=3),
    )


def campaign(config: Config, rng: random.Random, tally: Tally) -> None:
    """One run, killed until it comes to its end; what was wrong, and its lengths, go to the tally."""
    log = config.directory.with_suffix(".log")
    while True:
        kind = rng.choice(KINDS)
        fuse = Fuse(kind, rng.randint(1, SPANS[kind]))
        if start(config, fuse, log=log, stand_ins=True):
            break
        tally.kills[kind] += 1
        tally.wrong += [f"{config.name}, {kind}: {what}" for what in survivors(config.directory)]
    tally.wrong += [f"{config.name}, end: {what}" for what in outcome(config, tally)]
    if config.learn.stale == "wait":  # the others drop what is late or outside of the window, and say so
        lengths(config, log.with_suffix(".lengths"), tally)


def survivors(directory: Path) -> list[str]:
    """After a kill: where the journal, read as a resumed run reads it, differs from what the surviving weights have seen."""
    if not (directory / "journal.sqlite").exists():
        return []
    try:
        newest = checkpoint.latest(directory / "checkpoints")
    except ValueError as error:
        return [str(error)]
    with tempfile.TemporaryDirectory(dir=directory.parent) as name:
        for path in directory.glob("journal.sqlite*"):
            shutil.copy(path, name)
        journal = Journal(Path(name) / "journal.sqlite")
        journal.resume(checkpoint.step_of(newest) if newest else 0)
        found = trained_once(journal, seen_by(newest) if newest else [])
        journal.close()
    return found


def trained_once(journal: Journal, seen: list[list[str]]) -> list[str]:
    """Where the journal differs from the weights, which have `seen` these batches."""
    held = {(name, step) for step, batch in enumerate(seen, 1) for name in batch}
    noted = {(e.id, e.trained_step) for e in journal.entries("trained")}
    found = [f"trained and not in the weights: {sorted(noted - held)}"] if noted - held else []
    found += [f"in the weights, but not trained: {sorted(held - noted)}"] if held - noted else []
    twice = [name for name, n in Counter(name for batch in seen for name in batch).items() if n > 1]
    found += [f"trained twice: {twice}"] if twice else []
    mute = [e.id for e in journal.entries("dropped") if not e.reason]
    return found + ([f"dropped without a reason: {mute}"] if mute else [])


def outcome(config: Config, tally: Tally) -> list[str]:
    """At a run's end: whether each issued group is in the weights once or dropped, none is missing, each batch is whole."""
    newest = checkpoint.latest(config.directory / "checkpoints")
    assert newest is not None
    seen = seen_by(newest)
    journal = Journal(config.directory / "journal.sqlite")
    found = trained_once(journal, seen)
    entries = journal.entries()
    journal.close()
    tally.groups.update(f"{e.state}: {e.reason}" if e.state == "dropped" else e.state for e in entries)
    first = config.env.first_task
    if [e.task_index for e in entries] != list(range(first, first + len(entries))):
        found.append("task indices are missing")
    found += [f"{e.id} is {e.state} at the end" for e in entries if e.state not in ("trained", "dropped")]
    if [len(batch) for batch in seen] != [config.learn.groups_per_step] * config.steps:
        found.append(f"batches of {[len(batch) for batch in seen]} groups")
    return found


def lengths(config: Config, notes: Path, tally: Tally) -> None:
    """Turns of the run's episodes, as first begun and as trained."""
    begun: dict[str, int] = {}
    cuts: Counter[str] = Counter()
    for line in notes.read_text().splitlines():
        episode, turns = line.split()
        sample = episode.rpartition(".")[0]
        if not sample.startswith("eval/"):
            begun.setdefault(sample, int(turns))
            cuts[sample] += 1 if int(turns) else -1
    tally.issued += begun.values()
    cut = {sample.split("/")[1] for sample, times in cuts.items() if times}
    for path in (config.directory / "trajectories").iterdir():
        for line in path.read_text().splitlines():
            trajectory = Trajectory.from_json(line)
            if trajectory.trainable:
                index = trajectory.task_id.rpartition("/")[2]
                tally.trained.append(trajectory.turns)
                tally.uncut += [] if index in cut else [trajectory.turns]


# ---- real parts: what the weights are ----


def exact(root: Path, kills: int, seed: int) -> Iterator[dict[str, Any]]:
    """Deterministic runs with the real engine and learner, one in peace and the others killed."""
    if not kills:
        return
    rng, where, number, differ = random.Random(seed), Counter[str](), 0, 0
    began = time.monotonic()
    wanted = whole(real(root, "peace"), iter(()), where)
    while where.total() < kills:
        differ += whole(real(root, f"killed-{number}"), fuses(rng), where) != wanted
        number += 1
    yield row(
        "deterministic: killed runs whose weights or curves differ from an uninterrupted one's",
        differ,
        goal="<=0",
        n=number,
        spread=dict(where),
    )
    yield row("deterministic: seconds of all", time.monotonic() - began, unit="s", n=number + 1)


def fuses(rng: random.Random) -> Iterator[Fuse]:
    """At moments that leave a run time for a step or two."""
    while True:
        kind = rng.choice(KINDS)
        yield Fuse(kind, rng.randint(SPANS[kind] // 8, SPANS[kind] // 2))


def real(root: Path, name: str) -> Config:
    """Six steps of cwm-tiny, walking."""
    return Config(
        name=name,
        runs=str(root),
        steps=6,
        deterministic=True,
        checkpoint_every=2,
        env=EnvConfig(id=WALK, kwargs={"turns": 3}, window=WINDOW),
        policy=PolicyConfig(max_tokens=8, max_context=256, temperature=1.5),
        rollout=RolloutConfig(spawn="threads", workers=1, group_size=4),
        learn=LearnConfig(algorithm="grpo", groups_per_step=2, lr=1e-5, max_staleness=0, minibatches=2),
        eval=EvalConfig(every=3, tasks=2),
    )


def whole(config: Config, fuses: Iterator[Fuse], where: Counter[str]) -> tuple[str, list[Any]]:
    """The digest of the final weights, and the curves, of a run that is killed until it comes to its end."""
    log = config.directory.with_suffix(".log")
    while not start(config, fuse := next(fuses, Fuse()), log=log, stand_ins=False):
        where[fuse.kind] += 1
    rows = read(config.directory / "metrics.jsonl")
    steps = [(r["step"], r["loss"], r["grad_norm"], r["reward"]) for r in rows if r["kind"] == "step"]
    if not all(norm > 0 for _, _, norm, _ in steps):
        raise InfraError(f"run {config.directory} had a step without a gradient, its weights prove nothing: {steps}")
    evals = sorted((r["step"], r["split"], r["reward"]) for r in rows if r["kind"] == "eval")
    weights = (config.directory / "model" / "model.safetensors").read_bytes()
    return hashlib.sha256(weights).hexdigest(), json.loads(json.dumps([steps, evals]))
