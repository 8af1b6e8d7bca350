"""Attention heads widened with zeros to a size that a kernel has: the same function of the tokens, in another shape.

Zero columns leave q k^T as it is, but the scores are divided by the root of the head size, d before and w after: q is
multiplied by sqrt(w / d). Rotary positions turn the first d numbers of a head as before, by `partial_rotary_factor`
= d / w. The last w - d columns of v are zero, and so is what the output projection makes of them. For models of the Llama
family, without a norm of q and k (which would divide by w, too).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from policy.weights import Weights, as_tensor

INPUTS = tuple(f".self_attn.{name}_proj.{kind}" for name in "qkv" for kind in ("weight", "bias"))


def head_size(config: Mapping[str, Any]) -> int:
    """Numbers of a head, from the values of a `config.json`."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def kv_numbers(config: Mapping[str, Any], width: int) -> int:
    """Numbers that attention keeps of a token, in heads of `width`."""
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    return int(2 * config["num_hidden_layers"] * heads * width)


def widened_config(config: Mapping[str, Any], width: int) -> dict[str, Any]:
    """`config.json` of the model whose weights `widened` gives. ValueError where rotary positions are kept in another form."""
    size, rope = head_size(config), config.get("rope_parameters")
    if not isinstance(rope, Mapping) or rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(
            f"heads of {size} numbers can't be widened to {width}: config.json has no plain rope_parameters; save the model "
            "with transformers 5"
        )
    assert int(width * (size / width)) == size, "the factor does not give the size back"
    return {**config, "head_dim": width, "rope_parameters": {**rope, "partial_rotary_factor": size / width}}


def widened(weights: Weights, size: int, width: int) -> dict[str, Tensor]:
    """Weights for heads of `width` numbers, from those for `size`. What belongs to no head is not copied.

    q, k, v [heads * size, D] (and their biases) and o [D, heads * size] become [heads * width, D] and [D, heads * width].
    """
    found = {}
    for name, value in weights.items():
        tensor = as_tensor(value)
        if "_norm." in name and ".self_attn." in name:
            raise ValueError(f"heads of {size} numbers can't be widened to {width}: {name} divides by their size")
        if name.endswith(INPUTS):
            heads = tensor.unflatten(0, (-1, size))  # [heads, size, ...]
            tensor = pad(heads, (0, 0) * (heads.dim() - 2) + (0, width - size)).flatten(0, 1)
            if ".q_proj." in name:
                tensor = tensor * math.sqrt(width / size)
        elif name.endswith(".self_attn.o_proj.weight"):
            tensor = pad(tensor.unflatten(1, (-1, size)), (0, width - size)).flatten(1)
        found[name] = tensor
    return found
