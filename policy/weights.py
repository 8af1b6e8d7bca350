"""Weights on their way from the learner to an engine: named fp32 arrays, compared before they are copied.

Names are those of `named_parameters()`, so a tied matrix travels once. Nothing here moves bytes between processes:
Ray's object store (or a plain reference, for threads) carries what `state_of` returns to `TorchEngine.publish`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

Weights = Mapping[str, "np.ndarray[Any, Any] | torch.Tensor"]


def state_of(
    model: torch.nn.Module, wanted: Callable[[str], bool] = bool, *, keep: bool = True
) -> dict[str, np.ndarray[Any, Any]]:
    """Copies of all parameters, or of those whose name is `wanted`, as fp32 arrays on the CPU, tied ones once.

    Parameters sharded by FSDP2 are gathered: a collective, so every rank has to call it. Ranks that need no copy say
    `keep=False`.
    """
    state = {}
    for name, parameter in model.named_parameters():
        if not wanted(name):
            continue
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if keep:
            state[name] = whole.detach().to("cpu", torch.float32, copy=True).contiguous().numpy()
    return state


def part_of(parameter: torch.Tensor) -> tuple[torch.Tensor, tuple[slice, ...]]:
    """What this process holds of a parameter, and which part of the whole that is: everything, unless FSDP2 shards it."""
    if not isinstance(parameter, DTensor):
        return parameter, tuple(slice(n) for n in parameter.shape)
    mesh, placements = parameter.device_mesh, parameter.placements
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    return parameter.to_local(), tuple(slice(at, at + n) for at, n in zip(offset, shape, strict=True))


def checksum(weights: Weights) -> str:
    """SHA-256 over names, shapes and fp32 bytes, in the order of the names: equal for an engine and its learner."""
    total = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name]
        array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value
        array = np.ascontiguousarray(array, dtype="<f4")
        total.update(f"{name}{array.shape}".encode())
        total.update(array.data)
    return total.hexdigest()


def check_fit(weights: Weights, shapes: Mapping[str, torch.Size], whose: str) -> None:
    """Raise a ValueError of one line unless `weights` has exactly the names and shapes of `whose` model, all finite."""
    check_shapes({name: value.shape for name, value in weights.items()}, shapes, whose)
    for name, value in weights.items():
        check_finite(name, value, whose)


def check_shapes(found: Mapping[str, Sequence[int]], shapes: Mapping[str, torch.Size], whose: str) -> None:
    """The part of `check_fit` that needs no values."""
    missing, unknown = sorted(shapes.keys() - found.keys()), sorted(found.keys() - shapes.keys())
    if missing or unknown:
        both = (("names missing", missing), ("unknown names", unknown))
        lists = [f"{len(names)} {what} (first {names[0]!r})" for what, names in both if names]
        raise ValueError(f"{whose}: weights with {' and '.join(lists)}; take them from a model of the same config")
    for name, shape in shapes.items():
        if tuple(found[name]) != tuple(shape):
            raise ValueError(
                f"{whose}: {name!r} has shape {tuple(found[name])}, {tuple(shape)} is needed; "
                "take the weights from a model of the same config"
            )


def check_finite(name: str, value: np.ndarray[Any, Any] | torch.Tensor, whose: str) -> None:
    """The part of `check_fit` that is about one tensor."""
    finite = torch.isfinite(value) if isinstance(value, torch.Tensor) else np.isfinite(value)
    if not bool(finite.all()):
        raise ValueError(f"{whose}: {name!r} holds NaN or infinity; the learner diverged, go back to a checkpoint")


def as_tensor(value: np.ndarray[Any, Any] | torch.Tensor) -> torch.Tensor:
    """A tensor over `value`'s memory; a read-only array, as Ray hands out, is copied first: torch can't hold it."""
    if isinstance(value, torch.Tensor):
        return value.detach()
    return torch.from_numpy(value if value.flags.writeable else value.copy())
