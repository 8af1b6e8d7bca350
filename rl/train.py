"""`python rl/train.py RECIPE [--section.key=value …]`: train a policy, and resume it.

The whole run on one page: read the recipe, take the run directory, start the parts, loop, summarise.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script: import from the repository root, not from rl/
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    sys.path.append(str(Path.cwd()))  # --env.id=mymodule:MyEnv, from the folder that holds it

from envs.errors import InfraError, user_errors
from rl import metrics
from rl.config import Config, dump, load

if TYPE_CHECKING:
    from rl.loop import Loop
    from rl.parts import Parts
    from rl.record import Record

EXAMPLE = """
examples:
  python rl/train.py rl/recipes/tiny.toml
  python rl/train.py rl/recipes/tiny.toml --name=mine --steps=2 --learn.algorithm=grpo
  python rl/train.py rl/recipes/tiny.toml --resume              after Ctrl-C, or a crash
  python rl/train.py rl/recipes/tiny.toml --deterministic=true --rollout.episodes=1 --learn.max_staleness=0   the same weights again
  python rl/train.py MY_RECIPE.toml --policy.model=DIR --policy.style=think   a causal LM's own directory and chat template
  python rl/train.py examples/curriculum.toml --envs.repairs.weight=2   two environments, a window of solve rates, a stage
  python rl/train.py rl/recipes/tiny.toml --spawn threads --workers 1   one episode at a time, breakpoint() works
Every field of a recipe can be set as --section.key=value; `rl/config.py` documents each. Exit status: 0 trained,
1 stopped by a failure (resume it), 2 can't be run as asked, 130 Ctrl-C.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        "python rl/train.py",
        description=(__doc__ or "").split("\n\n")[0],
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("recipe", help="a TOML file, e.g. rl/recipes/tiny.toml")
    p.add_argument("--resume", action="store_true", help="go on from the run directory's newest checkpoint")
    p.add_argument(
        "--spawn", choices=["ray", "threads"], help="Ray actors (the recipe's default), or threads of this process"
    )
    p.add_argument(
        "--workers", type=int, help="rollout workers; under --spawn threads each plays one episode at a time"
    )
    p.add_argument(
        "--dry-run", action="store_true", help="print the resolved recipe and its plan (`python -m rl plan`), and stop"
    )
    return p


def configure(argv: list[str]) -> tuple[Config, argparse.Namespace]:
    """The run's config from the command line. `ValueError` for whatever is wrong with it, before anything starts."""
    args, rest = parser().parse_known_args(argv)
    overrides = changes(rest)
    overrides += [f"rollout.spawn={args.spawn}"] if args.spawn else []
    overrides += [f"rollout.workers={args.workers}"] if args.workers is not None else []
    config = load(args.recipe, overrides)
    kept = config.directory / "recipe.toml"
    return (again(kept, overrides) if args.resume and kept.is_file() else config), args


def changes(rest: Sequence[str]) -> list[str]:
    """`--section.key=value` arguments as overrides of a recipe."""
    for item in rest:
        if not item.startswith("--") or "=" not in item:
            raise ValueError(
                f"argument {item!r} is not understood; fields of the recipe are set as --section.key=value"
            )
    return [item[2:] for item in rest]


def again(recipe: Path, overrides: list[str]) -> Config:
    """The config of a run that goes on: that which it was started with, and what this command line changes."""
    before, config = dump(load(recipe)).splitlines(), load(recipe, overrides)
    changed = [line for line in dump(config).splitlines() if line not in before]
    print(f"recipe: {recipe}" + "".join(f"\nchanged by this command line: {line}" for line in changed), flush=True)
    return config


def check(config: Config) -> None:
    """Fail in one line, before any process starts, for what can be known here: envs, splits, tasks, backend, model,
    settings, trackers."""
    from envs.registration import make
    from rl.curriculum import curriculum
    from rl.parts import check_engine, check_model

    check_model(config)
    check_engine(config)
    _check_learner(config)
    _check_gpus(config)
    metrics.check(config.track)
    curriculum(config)
    backends: set[str] = set()
    for source in config.environments:
        env = make(source.id, **source.kwargs)
        held_out = config.eval.splits if source.eval_splits is None else source.eval_splits
        try:
            backends |= {backend.name for backend in [getattr(env, "backend", None)] if backend is not None}
            for split in dict.fromkeys((source.split, *(held_out if config.eval.every else ()))):
                env.reset(seed=source.first_task, options={"split": split})
        finally:
            env.close()
    if backends:
        print(f"sandboxes: {', '.join(sorted(backends))}", flush=True)


def _check_learner(config: Config) -> None:
    """The part of `check` that is about the learner's ranks."""
    if config.learn.sequence_parallel > 1:
        from rl.attention import check_heads

        sizes = json.loads((config.model / "config.json").read_text())
        check_heads(sizes["num_key_value_heads"], config.learn.sequence_parallel)
    if config.learn.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ValueError("learn.device='cuda', and torch sees no GPU here; take cpu, or a host that has one")


def _check_gpus(config: Config) -> None:
    """Enough of them on this host, where it is the only one."""
    needed = config.gpus["engine"] * config.policy.replicas + config.gpus["learner"] * config.learn.ranks
    if not needed or config.rollout.address or config.rollout.spawn == "threads":
        return
    import torch

    if torch.cuda.device_count() < needed:
        raise ValueError(
            f"the recipe needs {needed:g} GPUs (engines {config.gpus['engine']:g} x {config.policy.replicas}, learner {config.gpus['learner']:g} "
            f"x {config.learn.ranks}), and torch sees {torch.cuda.device_count()} here; lower them, or name a cluster by rollout.address"
        )


def train(config: Config, *, resume: bool = False) -> str:
    """One run, start to end; returns its summary. What it had finished survives any failure (`--resume`).

    Raises `InfraError` for what the world did, a full disk included; `PartGone` where engine or learner died.
    """
    from rl.record import full_disk

    try:
        return _train(config, resume)
    except (ValueError, InfraError):
        raise
    except Exception as error:
        if (full := full_disk(error, config.directory)) is None:
            raise
        raise full from error


def _train(config: Config, resume: bool) -> str:
    from rl import spawn
    from rl.curriculum import Exhausted
    from rl.loop import Loop
    from rl.parts import Parts
    from rl.record import Record

    record = Record(config, resume=resume)
    parts = None
    try:
        spawn.start(config.rollout.spawn, config.rollout.address)
        parts = Parts(config)
        loop = Loop(config, parts, record)
        record.open(parts)
        if resume:
            restore(loop, parts, record)
        try:
            loop.run()
        except (KeyboardInterrupt, Exhausted):
            record.interrupt(loop, whole=loop.settle())
            print(f"stopped at step {loop.step}; go on with --resume", flush=True)
            raise
        return record.finish(loop)
    finally:
        if parts is not None:
            parts.stop()
        spawn.stop(config.rollout.spawn)
        record.close()


def restore(loop: Loop, parts: Parts, record: Record) -> None:
    """Bring learner, engine and journal to the surviving checkpoint; the two must agree there as after every publish."""
    from rl.loop import parity_of

    if record.surviving is not None:
        parts.learner.ask("load", str(record.surviving), timeout=300)
        version, weights = parts.learner.ask("weights", timeout=300)
        parts.engine.ask("publish", version, weights, timeout=300)
        probe = [[(7 * i) % record.vocabulary for i in range(64)]]
        mine, theirs = (part.ask("score", probe, timeout=300) for part in (parts.engine, parts.learner))
        parity_of(mine, theirs, version, loop.config.policy.parity)
    loop.resume(record.surviving_step)
    print(f"resumed at step {record.surviving_step}: {record.journal.counts()}", flush=True)


def persist(config: Config, *, resume: bool) -> str:
    """`train`, which goes on from the last checkpoint where engine or learner died, up to `config.restarts` times."""
    from rl.spawn import PartGone

    for left in reversed(range(config.restarts + 1)):
        try:
            return train(config, resume=resume)
        except PartGone as error:
            if not left:
                raise
            print(f"{error}: on from the last checkpoint; this may happen {left - 1} times more", flush=True)
            resume = (config.directory / "journal.sqlite").exists()
    raise AssertionError("restarts is at least 0")


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    config, args = configure(sys.argv[1:] if argv is None else argv)
    if args.dry_run:
        from rl import plan

        print(dump(config))
        return plan.dry_run(args.recipe, config)
    check(config)
    print(f"run directory: {config.directory}", flush=True)
    try:
        print(persist(config, resume=args.resume), flush=True)
    except InfraError as error:
        print(f"error: the run stopped: {error}; go on with --resume", file=sys.stderr)
        return 1
    print(f"report: {config.directory / 'report.html'}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(user_errors(main))
