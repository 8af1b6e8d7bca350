"""What is trained of a model, its optimiser and some counters, as shards of `torch.distributed.checkpoint`.

Frozen parameters are neither written nor read. Atomicity is `rl/checkpoint.py`'s.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # saved and loaded without it, on purpose

TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)
"""`strict` is about what is frozen; a trained parameter that a checkpoint lacks ends its reading."""


def save(
    directory: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    counters: Mapping[str, Any],
    *,
    alone: bool = True,
) -> None:
    """Write into `directory`, which is made where it is missing. `OSError` where it can't be written.

    alone: no other ranks hold parts of the model; else this is a collective.
    """
    try:
        state_dict_saver.save(_state(model, optimizer, counters), checkpoint_id=directory, no_dist=alone)
    except CheckpointException as error:  # no Exception
        raise OSError(f"{directory} can't be written: {_cause(error)}") from error


def load(
    directory: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    counters: Mapping[str, Any],
    *,
    alone: bool = True,
) -> dict[str, Any]:
    """Read into model and optimiser, and return the counters (`counters` has their names). `ValueError` of one line where the
    directory holds the state of another model, or none; nothing has changed then."""
    state = _state(model, optimizer, counters)
    try:
        state_dict_loader.load(state, checkpoint_id=directory, no_dist=alone)
    except (CheckpointException, OSError) as error:
        raise ValueError(
            f"checkpoint {directory}: the learner's state does not fit this model, or can't be read ({_cause(error)});"
            " resume with the model it was made with, or from another checkpoint"
        ) from error
    weights, moments = state["model"], state["optimizer"]
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=TRAINED)
    found: dict[str, Any] = state["counters"]
    return found


def _state(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, counters: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    weights, moments = get_state_dict(model, optimizer, options=TRAINED)
    return {"model": weights, "optimizer": moments, "counters": dict(counters)}


def _cause(error: BaseException) -> str:
    """In one line, what the first rank failed for."""
    first = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
    return (" ".join(str(first).split()) or type(first).__name__)[:300]
