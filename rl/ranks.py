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
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
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
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the model is: rank r of a GPU host takes its GPU r, modulo their number."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """What matrix products are computed in; weights, gradients that are added up, and moments stay fp32."""

    def sharing(self, **how: Any) -> Sharing:
        """Which share of a batch this place takes."""
        return Sharing(ranks=self.ranks // self.sequence, rank=self.rank // self.sequence, **how)

    @property
    def varlen(self) -> bool:
        """Whether variable-length attention exists here."""
        return self.device == "cuda" and self.dtype == "bf16"

    def join(self) -> Alone:
        """Meet the other ranks; returns when all are there."""
        return Ranks(self) if self.ranks > 1 or self.dtype == "bf16" else Alone(self)


class Alone:
    """A single process."""

    alone = True

    def __init__(self, place: Place) -> None:
        self.place, self.device = place, torch.device(place.device)

    def shard(self, model: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Take a share of `model` to the device, in place; returns `forward` with the model as its first argument. What is on
        the meta device stays there, for `policy.models.fill`."""
        return partial(forward, model if _empty(model) else model.to(self.device))

    def layout(self, inside: Tensor, packed: bool) -> Padded:
        """How the model reads rows whose padding is where `inside` [B, T] is false."""
        return Packed(inside) if packed else Padded()

    def total(self, values: Sequence[float]) -> list[float]:
        """The sum of each value over the shares of a batch, in fp64."""
        return list(values)

    def close(self) -> None:
        """Leave the others."""


class Ranks(Alone):
    """One of several processes: gloo between CPUs, nccl between GPUs. A single one may be here too: FSDP2 casts to bf16."""

    alone = False

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        if place.device == "cuda":
            self.device = torch.device("cuda", place.rank % torch.cuda.device_count())
            torch.cuda.set_device(self.device)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if place.device == "cuda" else "gloo",
            init_method=f"file://{place.rendezvous}",
            rank=place.rank,
            world_size=place.ranks,
            timeout=timedelta(seconds=place.deadline),
        )
        self.mesh = init_device_mesh(place.device, (place.ranks,), mesh_dim_names=("ranks",))
        shape = (place.ranks // place.sequence, place.sequence)
        self.grid = init_device_mesh(place.device, shape, mesh_dim_names=("data", "sequence"))

    def shard(self, model: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
        """See `Alone.shard`; weights are gathered while `forward` runs, layer by layer."""
        cast = torch.bfloat16 if self.place.dtype == "bf16" else None
        policy = MixedPrecisionPolicy(param_dtype=cast, reduce_dtype=torch.float32 if cast else None)
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=self.mesh, mp_policy=policy)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo can't divide in passing
        model.learner_forward = MethodType(partial(_owned, forward), model)
        register_fsdp_forward_method(model, "learner_forward")
        return partial(_called, model)

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


def _empty(model: torch.nn.Module) -> bool:
    return any(p.is_meta for p in model.parameters())


def _owned(forward: Callable[..., tuple[Tensor, ...]], model: Any, *arguments: Any) -> tuple[Tensor, ...]:
    """`forward` with results that are no views: FSDP2's hooks would be lost on those."""
    return tuple(result.clone() for result in forward(model, *arguments))


def _called(model: Any, *arguments: Any) -> Any:
    """The forward method; what it gathered is let go by the backward pass, or here where there will be none."""
    result = model.learner_forward(*arguments)
    if not torch.is_grad_enabled():
        model.reshard()
    return result


def whole(value: Tensor) -> Tensor:
    """A sharded tensor gathered (a collective), any other as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value
