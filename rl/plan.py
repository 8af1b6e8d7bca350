"""`python -m rl plan RECIPE`: what a run will need and how fast it will be, before anything is started or rented.

Memory is arithmetic (`rl/memory.py`); time is simulated: `rl/virtual.py` drives the very loop and admission of a run on a
virtual clock, with latencies of a run's record (`--from`) or assumed from model and device. Equal inputs give equal forecasts.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from rl.clock import Inbox
from rl.config import Config
from rl.latencies import DEVICES, Book, Hardware, Latencies, Workload, assumed, facts, from_run, longest, mean_context
from rl.ledger import bottleneck, busy_share
from rl.loop import Loop
from rl.memory import HEAP, LIBRARIES, USED, EngineMemory, Layout, LearnerMemory, Shape, engine, fit, gb
from rl.published import LARGE, PUBLISHED
from rl.spawn import PartGone
from rl.virtual import Parts, Tally

STEPS = 24
"""Most batches that a forecast simulates."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a simulated run was like."""

    steps: int
    step_seconds: float
    """Mean seconds between two batches; the first, which fills the pipeline, is left out."""
    staleness_mean: float
    staleness_max: int
    in_flight: float
    """Episodes in flight when a batch was published, mean."""
    kept: float
    """Share of the trajectories in the gradient."""
    busy: dict[str, float]
    """Share of the time that engine, learner and episode slots (environments) were not idle."""
    bottleneck: str


def simulate(
    config: Config,
    latencies: Latencies,
    book: Book,
    *,
    replicas: int = 1,
    kv_tokens: float = math.inf,
    page: int = 1,
    steps: int = STEPS,
) -> Forecast:
    """Play a run of at most `steps` batches on a virtual clock.

    Args:
        replicas: engines, each with a KV budget of `kv_tokens`, handed out in pieces of `page` tokens.
    """
    config = replace(config, steps=min(config.steps, steps))
    parts = Parts(config, latencies, book, replicas, kv_tokens, page)
    tally = Tally(parts)
    try:
        Loop(config, cast(Any, parts), cast(Any, tally), clock=parts.clock, inbox=Inbox(parts.clock)).run()
    except PartGone as error:  # in the forecast: a deadline is too short for what it is to wait for
        raise ValueError(str(error)) from None
    ledgers = parts.ledgers(config.rollout.in_flight)
    ages = [report.staleness_mean for report in tally.reports]
    return Forecast(
        steps=config.steps,
        step_seconds=step_seconds(tally.walls),
        staleness_mean=sum(ages) / len(ages),
        staleness_max=max(report.staleness_max for report in tally.reports),
        in_flight=sum(tally.in_flight) / len(tally.in_flight),
        kept=sum(r.kept for r in tally.reports) / sum(r.trajectories for r in tally.reports),
        busy={name: busy_share(seconds) for name, seconds in ledgers.items()},
        bottleneck=bottleneck(ledgers),
    )


def step_seconds(walls: Sequence[float]) -> float:
    """Mean seconds between batches, from when each was published."""
    return (walls[-1] - walls[0]) / (len(walls) - 1) if len(walls) > 1 else walls[-1]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where engines and learner are, and what they hold."""

    replicas: int
    tensor_parallel: int
    """GPUs of a replica; 0: a process on CPUs."""
    layout: Layout
    learner: LearnerMemory
    engine: EngineMemory
    shared: bool = False
    """Engine and learner are on one card."""

    @property
    def gpus(self) -> int:
        """GPUs that are used."""
        if self.shared:
            return 1
        return self.replicas * self.tensor_parallel + (self.layout.ranks if self.tensor_parallel else 0)


def on_cpus(config: Config, shape: Shape, layout: Layout, memory: float) -> Placement:
    """The embedded engine and one learner, in fp32, on a host of `memory` bytes."""
    context, weights = config.policy.max_context, 4 * shape.parameters
    slots = min(config.rollout.in_flight, config.admission.kv_tokens // context or config.rollout.in_flight)
    whole = replace(shape, windowed=0).kv_bytes(context, 4)  # the embedded engine holds every layer in full
    held = EngineMemory(weights=weights, kv=slots * whole, episodes=slots, tokens=slots * context)
    learner = fit(shape, layout, ((memory - held.weights - held.kv) / layout.ranks - LIBRARIES) / HEAP)
    return Placement(replicas=1, tensor_parallel=0, layout=layout, learner=learner, engine=held)


def on_gpus(
    config: Config, shape: Shape, layout: Layout, device: Hardware, gpus: int, tensor_parallel: int = 0, ranks: int = 0
) -> list[Placement]:
    """Splits of `gpus` between learner and engines that fit. A replica has the fewest GPUs that hold a group of episodes of
    the longest context, the learner its ranks times a power of two. `ValueError` where nothing fits."""
    context, usable = config.policy.max_context, device.memory * 0.95  # the rest is CUDA's own, and fragments
    sizes = [tensor_parallel] if tensor_parallel else [n for n in (1, 2, 4, 8) if shape.heads % n == 0]
    held = [engine(shape, tensor_parallel=n, memory=device.memory, context=context) for n in sizes]
    fits = [(n, e) for n, e in zip(sizes, held, strict=True) if e.episodes]
    if not fits:
        raise ValueError(
            f"policy.max_context={context}: an engine on {sizes[-1]} GPUs has {gb(held[-1].kv)} for KV and an episode takes "
            f"{gb(shape.kv_bytes(context))}; lower it, or raise --gpu-memory-gb or --tensor-parallel"
        )
    size, memory = next(((n, e) for n, e in fits if e.episodes >= config.rollout.group_size), fits[-1])
    counts = [ranks] if ranks else [layout.ranks * 2**k for k in range(20)]
    counts = [n for n in counts if n + size <= gpus]
    if not counts:
        least = size + (ranks or layout.ranks)
        raise ValueError(
            f"gpus={gpus} is too few: an engine takes {size}, the learner {least - size}; give at least {least}"
        )
    found: list[Placement] = []
    for n in counts:
        one = replace(layout, ranks=n)
        try:
            learner = fit(shape, one, usable)
        except ValueError:
            if n == counts[-1] and not found:
                raise
            continue
        replicas = (gpus - n) // size
        found.append(Placement(replicas=replicas, tensor_parallel=size, layout=one, learner=learner, engine=memory))
    return found


def as_written(config: Config, shape: Shape, layout: Layout, device: Hardware) -> Placement:
    """The placement that the recipe itself names. `ValueError` where something doesn't fit."""
    size, context = int(config.policy.vllm.get("tensor_parallel", 1)), config.policy.max_context
    used = float(config.policy.vllm.get("gpu_memory_utilization", USED))
    held = engine(shape, tensor_parallel=size, memory=device.memory, context=context, used=used)
    if not held.episodes:
        raise ValueError(
            f"policy.max_context={context}: an engine on policy.vllm.tensor_parallel={size} GPUs has {gb(held.kv)} for KV and an "
            f"episode takes {gb(shape.kv_bytes(context))}; lower the first or raise the second"
        )
    shared = config.policy.share_gpu
    learner = fit(shape, layout, device.memory * (0.95 - used * shared))
    return Placement(
        replicas=config.policy.replicas,
        tensor_parallel=size,
        layout=layout,
        learner=learner,
        engine=held,
        shared=shared,
    )


# ---------------------------------------------------------------------- the command


def options(p: argparse.ArgumentParser) -> None:
    """The command line of `plan`; what describes episodes has the defaults of `Workload`."""
    p.add_argument("recipe", help="a TOML file; its fields are changed as --section.key=value")
    p.add_argument("--from", dest="run", type=Path, help="a finished run's directory: its latencies and its episodes")
    p.add_argument("--model", help="a model directory, or cwm-1b, cwm-8b or cwm-32b, in place of the recipe's")
    p.add_argument(
        "--gpus", type=int, default=0, help="GPUs in all; 0: the placement of the recipe itself (default: %(default)s)"
    )
    p.add_argument(
        "--device",
        choices=[d for d in DEVICES if d != "cpu"],
        default="h100",
        help="what they are (default: %(default)s)",
    )
    p.add_argument("--gpu-memory-gb", type=float, help="memory of one, where it is not the device's own")
    p.add_argument("--tensor-parallel", type=int, default=0, help="GPUs of an engine; 0: as few as hold an episode")
    p.add_argument(
        "--ranks", type=int, default=0, help="of the learner; 0: learn.ranks, doubled until the step is shortest"
    )
    for name, value in asdict(Workload()).items():
        p.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(value),
            default=value,
            help="of assumed episodes (default: %(default)s)",
        )
    p.add_argument("--json", type=Path, help="write the plan to a file")


def layout_of(config: Config) -> Layout:
    """The learner as the recipe has it."""
    learn = config.learn
    return Layout(
        tokens=learn.max_tokens,
        ranks=learn.ranks,
        sequence_parallel=learn.sequence_parallel,
        checkpoint=learn.checkpoint_activations,
        lora_rank=learn.lora_rank,
        critic=learn.row().baseline == "critic",
        compute=2 if learn.dtype == "bf16" else 4,
    )


def plan(args: argparse.Namespace, config: Config) -> dict[str, Any]:
    """Placement, memory and forecast, of the best split. `ValueError` where something doesn't fit."""
    shape = Shape.named(args.model or (config.model if config.model.is_dir() else config.policy.model))
    gpus = bool(args.gpus) or config.learn.device == "cuda"
    device = DEVICES[args.device if gpus else "cpu"]
    layout = layout_of(config)
    if gpus:
        device = replace(device, memory=args.gpu_memory_gb * 1e9) if args.gpu_memory_gb else device
        placements = (
            on_gpus(config, shape, layout, device, args.gpus, args.tensor_parallel, args.ranks)
            if args.gpus
            else [as_written(config, shape, layout, device)]
        )
    else:
        memory = (
            args.gpu_memory_gb * 1e9 if args.gpu_memory_gb else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        )
        placements = [on_cpus(config, shape, layout, memory)]
    measured = from_run(args.run) if args.run else None
    context, said, size = config.policy.max_context, config.policy.max_tokens, config.rollout.group_size
    workload = Workload(**{name: getattr(args, name) for name in asdict(Workload())}).within(context, said)
    book = measured[1] if measured else workload.book(context, size=size)
    tried = []
    for placement in placements:
        latencies = measured[0] if measured else assumed_for(shape, device, placement, book)
        page = 1 if gpus else config.policy.max_context
        kv = placement.engine.tokens if gpus else config.admission.kv_tokens or math.inf
        forecast = simulate(config, latencies, book, replicas=placement.replicas, kv_tokens=kv, page=page)
        tried.append((forecast.step_seconds, placement, forecast, latencies))
    _, placement, forecast, latencies = min(tried, key=lambda found: found[0])
    return {
        "recipe": config.name,
        "model": {"parameters": shape.parameters, "kv_bytes": shape.kv_bytes(config.policy.max_context)},
        "latencies": {**asdict(latencies), "from": str(args.run) if args.run else f"a roofline of {device.name}"},
        "episodes": {**facts(book), "longest": longest(book), "mean_context": mean_context(book)},
        "placement": asdict(placement) | {"gpus": placement.gpus},
        "forecast": asdict(forecast),
        "others": [{"ranks": p.layout.ranks, "replicas": p.replicas, "step_seconds": s} for s, p, _, _ in tried],
    }


def assumed_for(shape: Shape, device: Hardware, placement: Placement, book: Book) -> Latencies:
    """A roofline of a placement; on CPUs engine and learner have a core each, of as many as there are."""
    latencies = assumed(
        shape,
        device,
        tensor_parallel=max(1, placement.tensor_parallel),
        layout=placement.layout,
        context=mean_context(book),
    )
    return latencies if placement.tensor_parallel else replace(latencies, cores=os.cpu_count() or 1)


def table(found: dict[str, Any], config: Config) -> str:
    """The plan for people."""
    at, held, forecast, took = found["placement"], found["placement"]["engine"], found["forecast"], found["latencies"]
    learner, layout, episodes = at["learner"], at["layout"], found["episodes"]
    parts = ", ".join(f"{name} {gb(size)}" for name, size in learner.items() if size)
    gpus = at["tensor_parallel"]
    where = f"{at['gpus']} GPUs: engines of {gpus}" if gpus else "CPUs: engines"
    rows = [
        ("model", f"{found['model']['parameters'] / 1e6:,.1f} M parameters, {gb(found['model']['kv_bytes'])} of KV at {config.policy.max_context} tokens (bf16)"),
        ("placement", f"{where} x {at['replicas']}, learner ranks x {layout['ranks']}, rollout workers x {config.rollout.workers}"),
        ("learner rank", f"{gb(sum(learner.values()))}: {parts}"),
        ("engine", f"{gb(held['weights'])} of weights, {gb(held['kv'])} for KV: {held['episodes']} episodes of {config.policy.max_context} tokens a replica"),
        ("episodes", "{turns:.1f} turns of {seen:.0f} + {said:.0f} tokens, tools {tool_seconds:.2f} s, boot {boot_seconds:.2f} s".format(**episodes)),
        ("latencies", f"{took['from']}: decode {1e3 * took['decode']:.2f} + {1e3 * took['decode_row']:.3f} ms a row, learn {1e6 * took['learn']:.1f} us a token"),
        ("step", f"{forecast['step_seconds']:.2f} s, {forecast['in_flight']:.0f} episodes in flight"),
        ("staleness", f"{forecast['staleness_mean']:.2f} mean, {forecast['staleness_max']} most (bound {config.learn.row().max_staleness})"),
        ("", forecast["bottleneck"]),
    ]  # fmt: skip
    others = ", ".join(
        f"{o['ranks']} ranks and {o['replicas']} engines {o['step_seconds']:.1f} s" for o in found["others"]
    )
    rows += [("splits", others)] if len(found["others"]) > 1 else []
    if found["model"]["parameters"] > LARGE:
        rows += [
            ("published", f"{r.step_seconds:,.0f} s a step: {r.who}, {r.model} on {r.gpus} ({r.source})")
            for r in PUBLISHED
        ]
    return "\n".join(f"{name:<13} {text}" for name, text in rows)


def dry_run(recipe: str, config: Config) -> int:
    """`rl/train.py RECIPE --dry-run`: the plan of the recipe as it stands."""
    p = argparse.ArgumentParser()
    options(p)
    return run(p.parse_args([recipe]), config)


def run(args: argparse.Namespace, config: Config) -> int:
    """The command: print the plan; returns the exit status."""
    found = plan(args, config)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found, config))
    return 0
