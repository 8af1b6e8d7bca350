"""Weights as files: mapped from a model directory, and written for software that loads them from one."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from envs.errors import InfraError, Unsupported
from policy.weights import Weights, as_tensor

MEMORY = Path("/dev/shm")
"""Where files are in memory, on Linux."""


def sizes_of(model: Path | str) -> dict[str, Any]:
    """The values of a model directory's config.json, the vocabulary, heads and positions among them; ValueError if not."""
    try:
        sizes: dict[str, Any] = json.loads((Path(model) / "config.json").read_text())
        for name in ("vocab_size", "num_attention_heads", "num_hidden_layers", "max_position_embeddings"):
            sizes[name] = int(sizes[name])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"model {model} can't be read ({error!r}); give a directory in Hugging Face format") from None
    return sizes


def stored(model: Path | str) -> dict[str, torch.Tensor]:
    """The weights in a model directory, in its dtype and mapped, not read; named as in `policy.weights`. ValueError if none."""
    path = Path(model)
    files = sorted(path.glob("model*.safetensors"))
    try:
        found = {name: value for file in files for name, value in load_file(file).items()}
        tied = json.loads((path / "config.json").read_text()).get("tie_word_embeddings")
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"model {path} can't be read ({' '.join(str(error).split())}); copy or save it again"
        ) from None
    if not files:
        raise ValueError(f"model {path}: no model*.safetensors there; save the model again, as safetensors")
    if tied:
        found.pop("lm_head.weight", None)
    return found


def check_gpus(model: Path | str, gpus: int, dtype: torch.dtype, share: float) -> None:
    """`Unsupported` where this host lacks so many GPUs, or a `share` of one doesn't hold its part of the model."""
    if (found := torch.cuda.device_count()) < gpus:
        raise Unsupported(
            f"engine.tensor_parallel={gpus} needs as many GPUs, and torch sees {found}; take fewer, or an engine for CPUs"
        )
    needed = sum(value.numel() for value in stored(model).values()) * dtype.itemsize / gpus
    memory = torch.cuda.get_device_properties(0).total_memory * share
    if needed >= memory:
        raise Unsupported(
            f"{model} takes {needed / 2**30:.1f} GiB on each of {gpus} GPUs, engine.gpu_memory_utilization={share} leaves it "
            f"{memory / 2**30:.1f}; raise engine.tensor_parallel, or take bf16"
        )


@contextmanager
def written(weights: Weights, dtype: torch.dtype) -> Iterator[Path]:
    """A directory with `model.safetensors`, gone when the block ends: in memory where that has room, else on disk (TMPDIR).
    InfraError where it can't be written."""
    tensors = {name: as_tensor(value).to("cpu", dtype).contiguous() for name, value in weights.items()}
    size = sum(value.nbytes for value in tensors.values())
    roomy = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 2 * size
    with tempfile.TemporaryDirectory(prefix="codeworld-weights-", dir=MEMORY if roomy else None) as where:
        try:
            save_file(tensors, Path(where) / "model.safetensors")
        except (OSError, SafetensorError) as error:
            raise InfraError(
                f"{size / 2**30:.1f} GiB of weights can't be written to {where} ({' '.join(str(error).split())}); make room, or "
                "set TMPDIR"
            ) from None
        del tensors
        yield Path(where)
