"""LoRA (arXiv 2106.09685): two thin matrices beside each linear layer are trained, and only they travel to an engine.

What it is: `attach` puts adapters on a learner's model (by way of `peft`) and `begin` gives them their first values,
`adapters_of` takes them out as named arrays, `merge` adds them to base weights, `resolve` does so for an engine. A layer
y = x W^T becomes y = x W^T + (alpha / rank) x A^T B^T, i.e. W + (alpha / rank) B A, with A [rank, in], B [out, rank], and
B = 0 at first.

What it does not do: no dropout, no adapters on embeddings or the head.

In a dict of weights `NAME.lora_A` and `NAME.lora_B` belong to the matrix `NAME`; alpha / rank is multiplied into B, so that
W + B A is all an engine has to know. It keeps the base and merges anew from it at every publish: rounding can't add up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policy.weights import Weights, as_tensor, part_of, state_of

A, B = ".lora_A", ".lora_B"
BASE = ".base_layer"
"""What peft adds to the name of a matrix that has an adapter."""


def attach(model: torch.nn.Module, rank: int, alpha: float) -> None:
    """Put adapters on all linear layers of a `transformers` model but its head, and freeze everything else. The global random
    state stays as it was. `ImportError` without peft."""
    from peft import LoraConfig, inject_adapter_in_model

    settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", lora_dropout=0.0)
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(settings, model)


@torch.no_grad()
def begin(model: torch.nn.Module, seed: int) -> None:
    """Give the adapters of `model`, if it has any, their first values: B = 0, A uniform within ±1 / sqrt(in), which is peft's.
    Equal for equal `seed`, whichever parts of them are here."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            bound = parameter.shape[1] ** -0.5 if A in name else 0.0
            here, part = part_of(parameter)
            here.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=draw)[part])


def adapters_of(model: torch.nn.Module, *, keep: bool = True) -> dict[str, np.ndarray[Any, Any]]:
    """Copies of the adapters that `attach` made, as fp32 arrays on the CPU; see the top for names and scale. `keep`: see
    `policy.weights.state_of`."""
    found = {}
    for name, value in state_of(model, lambda name: ".lora_" in name, keep=keep).items():
        layer, matrix = name.removesuffix(".default.weight").rsplit(".", 1)
        scale = model.get_submodule(layer).scaling["default"] if matrix == B[1:] else 1.0  # type: ignore[index,union-attr]
        found[f"{layer}.weight.{matrix}"] = value * np.float32(scale)
    return found


def merged_of(model: torch.nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """The weights of the model that `attach` was given, with its adapters, if any, added. `keep`: see `policy.weights.state_of`."""
    base = state_of(model, lambda name: ".lora_" not in name, keep=keep)
    return merge({name.replace(BASE, ""): value for name, value in base.items()}, adapters_of(model, keep=keep))


def merge(base: Weights, adapters: Weights) -> dict[str, Tensor]:
    """W + B A for every matrix with an adapter, the others as they are. `ValueError` where an adapter doesn't fit."""
    merged = {name: as_tensor(value) for name, value in base.items()}
    for name in {key.removesuffix(A).removesuffix(B) for key in adapters}:
        try:
            a, b = (as_tensor(adapters[name + half]).to(merged[name].device) for half in (A, B))
            merged[name] = torch.addmm(merged[name], b, a)
        except (KeyError, RuntimeError) as error:
            raise ValueError(
                f"adapter of {name!r} doesn't fit the base ({' '.join(str(error).split())[:200]}); "
                "take adapters from a learner on the same model"
            ) from None
    return merged


def resolve(
    weights: Weights, base: Mapping[str, Tensor] | None, held: Mapping[str, Tensor]
) -> tuple[Weights, Mapping[str, Tensor] | None]:
    """What an engine is to load when `weights` are published, and what it has to keep as base.

    Args:
        weights: whole weights, or adapters.
        base: what the last call returned; None at first.
        held: the engine's present weights; they are the base where none is kept yet, and copied.
    """
    if not any(name.endswith(A) for name in weights):
        return weights, None
    base = {name: value.clone() for name, value in held.items()} if base is None else base
    return merge(base, weights), base
