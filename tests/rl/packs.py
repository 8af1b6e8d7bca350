"""What the tests of packing and of ranks share: a model whose layers differ, rows, and processes."""

import multiprocessing
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from policy import models
from rl.batch import Row
from rl.ranks import Place

V = 48


def mixed_model(seed: int = 0) -> torch.nn.Module:
    """CWM's layout, small: three layers with a window of 6 to one without, two queries to a key, in fp64; norms do not round
    to fp32 on the way."""
    size = {"vocab_size": V, "hidden_size": 32, "layers": 4, "intermediate_size": 48, "max_context": 64}
    config = models.describe(models.ModelConfig(**size, heads=8, kv_heads=4))
    config.sliding_window = 6
    config.layer_types = ["sliding_attention"] * 3 + ["full_attention"]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = models.CwmForCausalLM(config)
        for p in model.parameters():
            p.data += 0.2 * torch.randn_like(p)  # attention that is not flat
    for owner in model.modules():
        for name, norm in list(owner.named_children()):
            if type(norm).__name__ == "CwmRMSNorm":
                exact = torch.nn.RMSNorm(len(norm.weight), eps=norm.variance_epsilon)
                exact.weight.data.copy_(norm.weight.data)
                setattr(owner, name, exact)
    return model.double()


def some_rows(n: int, seed: int = 0, longest: int = 40) -> list[Row]:
    rng, rows = random.Random(seed), []
    for i in range(n):
        length = rng.randint(5, longest)
        mask = [0, 0] + [rng.randint(0, 1) for _ in range(length - 3)] + [1]
        rows.append(
            Row(
                token_ids=[rng.randrange(V) for _ in range(length)],
                loss_mask=mask,
                logprobs=[-3.5 * m for m in mask],
                versions=[m - 1 for m in mask],
                advantage=rng.choice([-1.0, 0.5, 1.0]),
                trajectory=f"t{i // 2}",
            )
        )
    return rows


def on_ranks(
    count: int, function: Callable[..., Any], directory: Path, *arguments: Any, seconds: float = 240, **place: Any
) -> list[Any]:
    """What `function(place, *arguments)` gives on each of `count` ranks, processes that find one another in `directory`."""
    directory.mkdir()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.rl.packs", "rl.learner"])
    one = Place(ranks=count, rendezvous=str(directory / "rendezvous"), deadline=seconds, **place)
    places = [replace(one, rank=rank) for rank in range(count)]
    processes = [context.Process(target=_run, args=(function, each, directory, arguments)) for each in places]
    for process in processes:
        process.start()
    limit = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, limit - time.monotonic()))
    for process in processes:
        process.kill()
        process.join()
    assert [process.exitcode for process in processes] == [0] * count
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _run(function: Callable[..., Any], place: Place, directory: Path, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.save(function(place, *arguments), directory / f"{place.rank}.pt")
