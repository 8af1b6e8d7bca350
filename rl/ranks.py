"""Learner ranks: processes that hold a share of one model each and train on a share of each batch.

What it is: `Place` says where a rank stands, `Ranks` is what it does together with the others: shard a model by FSDP2
(`fully_shard`: a group per layer, and one for the rest), and add numbers up. `Alone` is the same for a single process, in
which nothing is sharded and no process group exists.

What it does not do: start processes (`rl/parts.py`), or deal rows (`rl/packing.py`): every rank is given the whole batch,
so that it knows all counts, and takes its share.

The gradient is that of the sum over ranks, as every loss is divided by the counts of the whole update; FSDP2's mean over
ranks is switched off. A rank that waits for the others longer than the deadline fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from rl.attention import Split
from rl.packing import Packed, Padded, Sharing


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a learner stands among its ranks."""

    rank: int = 0
    ranks: int = 1
    sequence: int = 1
    """So many ranks hold the tokens of one pack together; a divisor of `ranks`. Ranks 0 … sequence - 1 are the first such
    group."""
    rendezvous: str = ""
    """Where the ranks find one another: the path of a file that all of them reach and that no group has used before."""
    deadline: float = 900.0
    """Most seconds that a rank waits for the others."""

    def sharing(self, **how: Any) -> Sharing:
        """Which share of a batch this place takes."""
        return Sharing(ranks=self.ranks // self.sequence, rank=self.rank // self.sequence, **how)

    def join(self) -> Alone:
        """Meet the other ranks; returns when all are there."""
        return Ranks(self) if self.ranks > 1 else Alone(self)


class Alone:
    """A single process."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def shard(self, model: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Take a share of `model`, in place; returns `forward` with the model as its first argument."""
        return partial(forward, model)

    def layout(self, inside: Tensor, packed: bool) -> Padded:
        """How the model reads rows whose padding is where `inside` [B, T] is false."""
        return Packed(inside) if packed else Padded()

    def total(self, values: Sequence[float]) -> list[float]:
        """The sum of each value over the shares of a batch, in fp64."""
        return list(values)

    def close(self) -> None:
        """Leave the others."""


class Ranks(Alone):
    """One of several processes: gloo on the CPU."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{place.rendezvous}",
            rank=place.rank,
            world_size=place.ranks,
            timeout=timedelta(seconds=place.deadline),
        )
        self.mesh = init_device_mesh("cpu", (place.ranks,), mesh_dim_names=("ranks",))
        shape = (place.ranks // place.sequence, place.sequence)
        self.grid = init_device_mesh("cpu", shape, mesh_dim_names=("data", "sequence"))

    def shard(self, model: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
        """See `Alone.shard`; weights are gathered while `forward` runs, layer by layer."""
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=self.mesh)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo can't divide in passing
        model.learner_forward = MethodType(forward, model)
        register_fsdp_forward_method(model, "learner_forward")
        return model.learner_forward  # type: ignore[no-any-return]

    def layout(self, inside: Tensor, packed: bool) -> Padded:
        """See `Alone.layout`."""
        if self.place.sequence == 1:
            return super().layout(inside, packed)
        return Split(inside, self.grid.get_group("sequence"))

    def total(self, values: Sequence[float]) -> list[float]:
        """See `Alone.total`. Ranks that hold a pack together have the same values: one of them counts."""
        sums = torch.tensor(list(values), dtype=torch.float64)
        if self.place.rank % self.place.sequence:
            sums.zero_()
        dist.all_reduce(sums)
        return sums.tolist()

    def close(self) -> None:
        """See `Alone.close`."""
        dist.destroy_process_group()


def whole(value: Tensor) -> Tensor:
    """A sharded tensor gathered (a collective), any other as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value
