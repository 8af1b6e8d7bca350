"""Models from a config with random weights, or from a directory in Hugging Face format.

Where there is nothing to download a model is built here, of the class and the layout of CWM: `cwm-32b` is the published
model, `cwm-8b` and `cwm-1b` are smaller ones of its family, `cwm-tiny` is one that a CPU core trains. A directory may hold
any causal LM of `transformers`. Nothing here reaches the network.

Sizes of the family. Of CWM (arXiv 2510.02387; facebook/cwm `config.json`) come head size 128, 8 key heads, an inner size of
3.5 times the hidden one, an embedding apart from the head, local attention in three layers of four and rotary positions
stretched by 16. `cwm-8b` halves its 64 layers and `cwm-1b` halves them again; both are 128 wide for each layer (Llama-3's
8B has that ratio; CWM's own is 96). Of `cwm-1b`'s 1.4e9 parameters 0.5e9 are embedding and head.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch.utils import swap_tensors
from transformers import AutoConfig, AutoModelForCausalLM, CwmConfig, CwmForCausalLM, PreTrainedModel

from envs.errors import nearest
from policy.lora import BASE
from policy.weights import Weights, as_tensor, check_finite, check_shapes, part_of

FILES = "model*.safetensors"

STRETCH = 16.0
"""By how much the rotary positions of a model with local layers are stretched; CWM sees 16 times its window."""
SHARD = "5GB"
"""Largest file that `save` writes."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A preset's name, and what to change in it. None takes the preset's value.

    Example: `ModelConfig(name="cwm-tiny", vocab_size=512, hidden_size=96, layers=3, intermediate_size=256)`.
    """

    name: str = "cwm-tiny"
    """A row of `PRESETS`."""
    vocab_size: int | None = None
    """Rows of the embedding; take it from the tokenizer."""
    hidden_size: int | None = None
    layers: int | None = None
    heads: int | None = None
    """Query heads; must divide `hidden_size`."""
    kv_heads: int | None = None
    """Key and value heads; must divide `heads`."""
    intermediate_size: int | None = None
    """Width of the SwiGLU layer."""
    max_context: int | None = None
    """Most positions."""
    window: int | None = None
    """Positions that a local layer sees, of which there are three to a global one, as in CWM; rotary positions are then
    stretched by `STRETCH`. 0: all layers are global, positions are as they are."""
    tie_embeddings: bool | None = None
    """One matrix for embedding and head."""
    rope_theta: float | None = None
    bos_id: int | None = None
    """Recorded in config.json for other software; engines take ids from their caller."""
    eos_id: int | None = None
    """As `bos_id`: an engine stops at `Sampling.stop_ids`."""


def _family(layers: int, hidden: int) -> dict[str, Any]:
    """A member of CWM's family; the rule is in the module's docstring."""
    return {
        "vocab_size": 128_256,
        "hidden_size": hidden,
        "layers": layers,
        "heads": hidden // 128,
        "kv_heads": 8,
        "intermediate_size": hidden * 7 // 2,
        "max_context": 131_072,
        "window": 8192,
        "tie_embeddings": False,
        "rope_theta": 1_000_000.0,
        "bos_id": 128_000,
        "eos_id": [128_001, 128_008, 128_009],
    }


PRESETS: dict[str, dict[str, Any]] = {
    "cwm-tiny": {
        "vocab_size": 512,
        "hidden_size": 128,
        "layers": 4,
        "heads": 4,
        "kv_heads": 4,
        "intermediate_size": 384,
        "max_context": 1024,
        "window": 0,
        "tie_embeddings": True,
        "rope_theta": 10_000.0,
        "bos_id": 0,
        "eos_id": 0,
    },
    "cwm-1b": _family(layers=16, hidden=2048),
    "cwm-8b": _family(layers=32, hidden=4096),
    "cwm-32b": _family(layers=64, hidden=6144),
}
"""Sizes by name, in the fields of `ModelConfig`."""


def describe(config: ModelConfig) -> CwmConfig:
    """The `transformers` config of a preset with its changes; nothing is allocated."""
    if config.name not in PRESETS:
        raise ValueError(
            f"model.name={config.name!r} is no preset; one of {', '.join(PRESETS)}.{nearest(config.name, PRESETS)}"
        )
    size = PRESETS[config.name] | {k: v for k, v in asdict(config).items() if v is not None and k != "name"}
    for name, of in (("heads", "hidden_size"), ("kv_heads", "heads")):
        if size[of] % size[name]:
            raise ValueError(f"model.{name}={size[name]} does not divide model.{of}={size[of]}; choose a divisor")
    if (size["hidden_size"] // size["heads"]) % 2:
        raise ValueError(
            f"model.hidden_size={size['hidden_size']} over model.heads={size['heads']} gives an odd head size; "
            "rotary positions need an even one"
        )
    window, context = size["window"], size["max_context"]
    if not 0 <= window < context:
        raise ValueError(
            f"model.window={window} with model.max_context={context}: a local layer sees less than all positions; lower the window, "
            "or give 0 for global layers alone"
        )
    return CwmConfig(
        vocab_size=size["vocab_size"],
        hidden_size=size["hidden_size"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["kv_heads"],
        head_dim=size["hidden_size"] // size["heads"],
        intermediate_size=size["intermediate_size"],
        max_position_embeddings=context,
        tie_word_embeddings=size["tie_embeddings"],
        bos_token_id=size["bos_id"],
        eos_token_id=size["eos_id"],
        sliding_window=window or context,
        layer_types=["sliding_attention" if window and i % 4 else "full_attention" for i in range(size["layers"])],
        rope_parameters=_rope(size["rope_theta"], window),
    )


def _rope(theta: float, window: int) -> dict[str, Any]:
    if not window:
        return {"rope_type": "default", "rope_theta": theta}
    factors = {"factor": STRETCH, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {"rope_type": "llama3", "rope_theta": theta, "original_max_position_embeddings": window, **factors}


def parameters(config: ModelConfig) -> int:
    """How many parameters the model has, tied ones once; counted on the meta device, so any size is fine."""
    with torch.device("meta"):
        model = CwmForCausalLM(describe(config))
    return sum(p.numel() for p in model.parameters())


def build(
    config: ModelConfig, seed: int = 0, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> CwmForCausalLM:
    """A model with random weights, made where it stays; equal for equal arguments. Global random states stay as they were.

    Raises `ValueError` where the memory that is free does not hold it.
    """
    hf, kind = describe(config), device.partition(":")[0]
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device={device!r} is none that torch has here; give cpu, or cuda on a host with a GPU")
    place = torch.device(device)
    needed, free = parameters(config) * dtype.itemsize, _free(place)
    if needed > free:
        raise ValueError(
            f"model.name={config.name!r} takes {needed / 1e9:.1f} GB in {str(dtype).removeprefix('torch.')}, and {free / 1e9:.1f} GB "
            f"are free on {device}; free some, build it in bfloat16 or on a GPU, or take a smaller one of {', '.join(PRESETS)}"
        )
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []), place:
        torch.default_generator.manual_seed(seed)
        if place.type == "cuda":
            torch.cuda.manual_seed(seed)
        return AutoModelForCausalLM.from_config(hf, dtype=dtype).eval()


def _free(place: torch.device) -> int:
    """Bytes that new tensors can take: of the GPU, or of the host and of this process's cgroup."""
    if place.type == "cuda":
        return int(torch.cuda.mem_get_info(place)[0])
    lines = Path("/proc/meminfo").read_text().splitlines()
    host = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    most, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if most.is_file() and (limit := most.read_text().strip()) != "max":
        return min(host, int(limit) - int(used.read_text()))
    return host


def save(model: PreTrainedModel, directory: Path | str, weights: Weights | None = None, shard: str = SHARD) -> None:
    """Write config.json and the weights, as `transformers` reads them; readable by whom the umask allows. Models of more than
    `shard` get several files, `model-00001-of-0000N.safetensors`.

    `weights`: what `state_of` gathered, of a model that is sharded.
    """
    state = None if weights is None else {name: as_tensor(value) for name, value in weights.items()}
    model.save_pretrained(directory, state_dict=state, max_shard_size=shard)
    for path in Path(directory).glob("model*.safetensors"):
        path.chmod((Path(directory) / "config.json").stat().st_mode)  # safetensors writes 0600


def load(directory: Path | str) -> PreTrainedModel:
    """Read a causal LM in Hugging Face format from a local directory, as fp32 on the CPU. All names must fit."""
    model = skeleton(directory)
    fill(model, directory)
    return model.eval()


def skeleton(directory: Path | str) -> PreTrainedModel:
    """A directory's model without its weights: parameters are on the meta device, names and shapes checked; buffers are there.
    It may be changed and sharded before `fill`."""
    path = Path(directory)
    if not (path / "config.json").is_file():
        raise ValueError(f"checkpoint {path}: no config.json there; give a directory that `policy.models.save` wrote")
    if not list(path.glob(FILES)):
        raise ValueError(f"checkpoint {path}: no {FILES} there; save the model again, as safetensors")
    with _readable(path):
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.tie_weights()
        found = {name: shape for name, (_, shape) in _stored(path).items()}
        if config.tie_word_embeddings:
            found.pop("lm_head.weight", None)
        check_shapes(found, {name: p.shape for name, p in model.named_parameters()}, type(model).__name__)
    return model


@torch.no_grad()
def fill(model: torch.nn.Module, directory: Path | str, device: torch.device | str = "cpu") -> None:
    """Bring what was made of a `skeleton` to `device`, with the directory's weights as fp32; what that doesn't have (adapters,
    another head) is 0. One parameter at a time, and of one that FSDP2 shards no more than this rank's part is read."""
    path = Path(directory)
    with _readable(path):
        stored = _stored(path)
        for name, parameter in model.named_parameters():
            empty = torch.zeros_like(parameter, device=device)
            swap_tensors(parameter, torch.nn.Parameter(empty, parameter.requires_grad))
            (here, part), name = part_of(parameter), name.replace(BASE, "")
            if name in stored and here.numel():
                with safe_open(stored[name][0], "pt") as file:  # closed each time: what was read of it leaves memory
                    here.copy_(file.get_slice(name)[part])
                check_finite(name, here, type(model).__name__)
    model.to(device)


def _stored(path: Path) -> dict[str, tuple[Path, list[int]]]:
    """The tensors of a directory: name → file and shape."""
    found: dict[str, tuple[Path, list[int]]] = {}
    for each in sorted(path.glob(FILES)):
        with safe_open(each, "pt") as file:
            found |= {name: (each, file.get_slice(name).get_shape()) for name in file.offset_keys()}
    return found


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What is wrong with a directory that is being read, as a `ValueError` of one line."""
    try:
        yield
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, json.JSONDecodeError) as error:
        cause = " ".join(str(error).split())
        raise ValueError(f"checkpoint {path} can't be read: {cause[:300]}; copy or save it again") from error
