"""A run's configuration: it nests the parts' own configs, reads a recipe, applies `--a.b=c`, and derives the rest.

Each field is documented where it is declared. Invariants are derived, not asked for: the batch is
`groups_per_step` × `group_size` trajectories, the learner's context is the environment's, the engine's slots are the
episodes in flight.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from envs.fields import build
from rl.admission import Limits
from rl.advantages import Algorithm, algorithm

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    """What is trained on."""

    id: str = "codeworld/SWE-v0"
    """Registered id, or `module:Class`."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Constructor arguments of the environment. A command line that names another `id` starts without the recipe's."""
    split: str = "train"
    first_task: int = 1_000_000
    """Index of the first training task; the warm start's experts used 0 and up."""


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """What answers."""

    model: str = "policy/cwm_tiny"
    """Model directory (config.json, model.safetensors, tokenizer.json); relative ones are in the repository."""
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 128
    """Most tokens of one turn; the task's bound may be lower."""
    style: Literal["plain", "cwm"] = "plain"
    """How an agent words observations (`agents/prompts.py`)."""
    max_context: int = 512
    """Tokens of the longest episode that the engine holds."""
    recompute: bool = False
    """Recompute the KV of running episodes at a publish instead of keeping it."""
    threads: int = 1
    """Torch threads of the engine."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Who plays."""

    spawn: Literal["ray", "threads"] = "ray"
    """Ray actors, or threads of this process (debuggers work in them)."""
    workers: int = 1
    """Rollout workers: processes under ray, threads under threads."""
    episodes: int = 48
    """Episodes in flight per worker. Under `threads` a worker plays one at a time, whatever this says."""
    group_size: int = 8
    """G: trajectories of one task."""
    retries: int = 2
    """Fresh tries of an episode whose infrastructure failed, before it is left out of its group."""
    deadline: float = 900.0
    """Seconds after which an episode or an actor's answer counts as lost. Off under `threads`."""

    @property
    def in_flight(self) -> int:
        """Episodes in flight, all workers together."""
        return self.workers * (1 if self.spawn == "threads" else self.episodes)


@dataclass(frozen=True, kw_only=True)
class LearnConfig:
    """How the policy is updated."""

    algorithm: str = "cwm"
    """A preset of `rl/advantages.py`: grpo, cwm, dapo, dr_grpo, gspo, cispo, rloo or reinforce++."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the preset to replace (`rl.advantages.Algorithm`), e.g. `--learn.overrides.clip_high=0.28`."""
    groups_per_step: int = 16
    """Groups of one batch."""
    lr: float = 5e-4
    schedule: Literal["constant", "linear"] = "constant"
    """Of the learning rate behind the warm-up; "linear" falls to 0 at the last of `steps`."""
    warmup_steps: int = 0
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    minibatches: int = 2
    """Optimiser updates per batch."""
    max_tokens: int = 8192
    """Padded positions of one micro-batch."""
    threads: int = 1
    max_staleness: int | None = None
    """No token is trained on that was sampled more than this many versions before; left out: the preset's bound."""
    stale: Literal["wait", "drop"] = "wait"
    """Keep the bound by issuing fewer groups, or by dropping late ones."""
    control: Literal["none", "shuffle"] = "none"
    """"shuffle" permutes the advantages of each batch: the negative control."""

    def __post_init__(self) -> None:
        self.row()

    def row(self) -> Algorithm:
        """The preset with what this recipe replaces."""
        bound = {} if self.max_staleness is None else {"max_staleness": self.max_staleness}
        return algorithm(self.algorithm, **{**self.overrides, **bound})


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Held-out tasks, played while training goes on."""

    every: int = 10
    """Steps between evaluations; 0 switches them off."""
    tasks: int = 64
    splits: tuple[str, ...] = ("validation",)
    temperature: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run."""

    name: str
    """The run directory is `runs/<name>`."""
    steps: int
    """Batches to train on."""
    seed: int = 0
    runs: str = "runs"
    """Where run directories are made; relative to the current directory."""
    checkpoint_every: int = 10
    """Steps between checkpoints; one is written at the end and on Ctrl-C as well."""
    keep_checkpoints: int = 2
    keep_trajectories: bool = True
    """Write every trained trajectory to `trajectories/` (token ids, masks, log-probs, versions)."""
    env: EnvConfig = field(default_factory=EnvConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    learn: LearnConfig = field(default_factory=LearnConfig)
    admission: Limits = field(default_factory=Limits)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        for name, value, least in (
            ("steps", self.steps, 1),
            ("checkpoint_every", self.checkpoint_every, 1),
            ("rollout.workers", self.rollout.workers, 1),
            ("rollout.episodes", self.rollout.episodes, 1),
            ("rollout.group_size", self.rollout.group_size, 2),
            ("learn.groups_per_step", self.learn.groups_per_step, 1),
            ("eval.tasks", self.eval.tasks, 1),
            ("eval.every", self.eval.every, 0),
        ):
            if value < least:
                raise ValueError(f"{name}={value} is too small; give at least {least}")
        if 0 < self.admission.kv_tokens < self.policy.max_context:
            raise ValueError(
                f"admission.kv_tokens={self.admission.kv_tokens} holds no episode of policy.max_context={self.policy.max_context} "
                "tokens; raise it, or give 0"
            )
        if "/" in self.name or self.name in ("", ".", ".."):
            raise ValueError(f"name={self.name!r} is no directory name; use letters, digits, - and _")

    @property
    def directory(self) -> Path:
        """The run directory."""
        return Path(self.runs).absolute() / self.name

    @property
    def model(self) -> Path:
        """The model directory, resolved."""
        path = Path(self.policy.model)
        return path if path.is_absolute() or path.is_dir() else ROOT / path


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe and apply `a.b=c` overrides (values in TOML; a bare word is a string)."""
    path = Path(path)
    if not path.is_file():
        known = sorted(p.name for p in (ROOT / "rl" / "recipes").glob("*.toml"))
        raise ValueError(f"no recipe at {path}; committed ones are rl/recipes/{{{','.join(known)}}}")
    try:
        raw = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"recipe {path} is not TOML: {error}; repair that line") from None
    own = raw.get("env", {})
    if any(o.startswith("env.id=") and o != f"env.id={own.get('id')}" for o in overrides):
        own.pop("kwargs", None)  # they are another environment's
    for override in overrides:
        _apply(raw, override)
    return build(Config, {"name": path.stem, **raw}, str(path))


def overrides(arguments: Sequence[str]) -> list[str]:
    """What a command line says of a recipe's fields, as `load` takes it; `ValueError` for anything else on it."""
    for item in arguments:
        if not item.startswith("--") or "=" not in item:
            raise ValueError(
                f"argument {item!r} is not understood; fields of the recipe are set as --section.key=value"
            )
    return [item[2:] for item in arguments]


def _apply(raw: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise ValueError(f"override {override!r} is not of the form --section.key=value")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, last = key.split(".")
    for section in sections:
        raw = raw.setdefault(section, {})
        if not isinstance(raw, dict):
            raise ValueError(f"override {override!r}: {section!r} is a value, not a section")
    raw[last] = value


def dump(config: Config) -> str:
    """The resolved recipe as TOML; `load` of it gives the same run."""
    lines: list[str] = []
    raw = asdict(config)
    for table in ({"": raw}, {k: v for k, v in raw.items() if isinstance(v, dict)}):
        for name, values in table.items():
            lines += [f"\n[{name}]"] if name else []
            lines += [
                f"{k} = {_toml(v)}"
                for k, v in values.items()
                if not (name == "" and isinstance(v, dict)) and v is not None
            ]
    return "\n".join(lines).strip() + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)
