"""Tasks: one problem each, frozen, JSON, content-hashed; and task sets, a directory of them.

A task names its files by SHA-256; the bytes are *blobs*, kept beside it (in memory for generated tasks, in `blobs/` on
disk). What is hidden (hidden tests, the gold patch) is only named in `grader` and enters no sandbox before grading.
Nothing of a task is executed while it is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import uuid4

from envs.fields import build
from envs.sandbox.archives import offer
from envs.sandbox.base import Limits


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256: the name of a blob."""
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What one episode may spend; the env enforces turns, bytes and seconds, the agent tokens."""

    turns: int = 128
    """Actions; the last one is still graded. Source: CWM's SWE environment (`reference` limits), there 127 useful ones."""
    tokens: int = 131_072
    """Context of the whole episode."""
    turn_tokens: int = 65_536
    """Tokens of one action."""
    seconds: float = 2400.0
    """Wall clock of the episode, grading left out."""
    command_seconds: float = 120.0
    """Wall clock of one command; a command that is starved of CPU gets longer (see `Sandbox.run`)."""
    silence_seconds: float | None = None
    """Wall clock that one command may be without output, for example 30 where commands tend to wait for input; None: no
    such limit, as in CWM."""
    observation_chars: int = 32_768
    """Characters of one observation; cut on the right with a mark."""
    format_errors: int = 3
    """Actions that were no valid tool call, in a row, before the episode ends as format_error."""


@dataclass(frozen=True, kw_only=True)
class Grader:
    """How an attempt is judged. Hidden content is named by hash."""

    kind: str = "tests"
    """"tests": by verdicts and sentinels; "swe_bench": by `script`'s log, as SWE-bench defines it."""
    command: str = "python3 runner.py"
    """Test command, run in the work directory with the test files as arguments."""
    expected: Mapping[str, str] = field(default_factory=dict)
    """Test id (`tests/test_x.py::test_y`) → "pass" or "fail" with a right solution."""
    fail_to_pass: tuple[str, ...] = ()
    """Those of `expected` that a right solution changes; () where it is not known."""
    hidden: Mapping[str, str | None] = field(default_factory=dict)
    """Relative path → SHA-256 of a file put on top of the attempt at grading; None: there is no such file."""
    gold: Mapping[str, str | None] = field(default_factory=dict)
    """Relative path → SHA-256 of the file as a right solution has it; None: it has no such file."""
    gold_patch: str = ""
    """SHA-256 of a right solution as a unified diff, where `gold` is not given."""
    script: str = ""
    """SHA-256 of the evaluation script of a "swe_bench" grader, whose output `parser` reads."""
    parser: str = ""
    """Name of a log parser (`envs/swe/log_parsers.py`)."""
    protected: tuple[str, ...] = ()
    """Globs of paths whose changes are dropped before grading."""
    seconds: float = 300.0
    """Wall clock of the grading run."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One problem. Equality and `digest` are over the JSON form; `blobs` travels beside it."""

    id: str
    kind: str = "swe"
    prompt: str
    """The statement, shown to the agent as it is."""
    base: str = "host"
    """Image id (`sha256:…`, of an image in the task set's `images/` or in a Docker engine), root file system, or "host"."""
    workdir: str = "/repo"
    setup: Mapping[str, str] = field(default_factory=dict)
    """Relative path → SHA-256 of a file of the repository as the agent finds it."""
    limits: Limits = field(default_factory=Limits)
    network: bool = False
    budget: Budget = field(default_factory=Budget)
    tools: tuple[str, ...] = ("bash", "edit", "create", "submit")
    grader: Grader = field(default_factory=Grader)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Where the task comes from: family, template, seed, source, licence."""
    quality: Mapping[str, Any] = field(default_factory=dict)
    """What validation found."""
    blobs: Mapping[str, bytes] = field(default_factory=dict, repr=False, compare=False, metadata={"plain": False})

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; blobs are left out."""
        raw = asdict(replace(self, blobs={}))
        del raw["blobs"]
        return raw

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON: equal tasks have equal digests."""
        return sha256(json.dumps(self.to_json(), sort_keys=True, separators=(",", ":")).encode())

    def blob(self, name: str, what: str) -> bytes:
        """One blob, its digest checked; `what` names it in the error."""
        data = self.blobs.get(name)
        if data is None or sha256(data) != name:
            raise ValueError(
                f"task {self.id}: blob {name[:12]}… of {what!r} is missing or changed; export the task set again"
            )
        return data

    def files(self, names: Mapping[str, str | None]) -> dict[str, bytes]:
        """The bytes of a path → hash mapping, digests checked; paths that name no file are left out."""
        return {path: self.blob(name, path) for path, name in names.items() if name is not None}

    @property
    def named(self) -> dict[str, str]:
        """Every blob that this task needs: what it is (a path, or a field of the grader) → SHA-256."""
        found = {"gold_patch": self.grader.gold_patch, "script": self.grader.script}
        for names in (self.setup, self.grader.hidden, self.grader.gold):
            found |= {f"{path}@{name[:8]}": name for path, name in names.items() if name}
        return {what: name for what, name in found.items() if name}


def _check_path(path: str, where: str) -> None:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts or "\0" in path or str(pure) != path:
        raise ValueError(f"{where}: unsafe path {path!r}; paths are relative, normal and stay inside the repository")


def task_from_json(raw: Any, where: str = "task") -> Task:
    """The inverse of `Task.to_json`; refuses unknown fields, unsafe paths and bad digests, naming `where`."""
    task = build(Task, raw, where)
    for names in (task.setup, task.grader.hidden, task.grader.gold):
        for path in names:
            _check_path(path, where)
    for name in (*task.setup.values(), *task.named.values()):
        if not isinstance(name, str) or len(name) != 64 or not set(name) <= set("0123456789abcdef"):
            raise ValueError(f"{where}: bad digest {name!r}; expected 64 hexadecimal digits")
    return task


class BlobStore(Mapping[str, bytes]):
    """`DIR/blobs/<sha256>` as a read-only mapping."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __getitem__(self, name: str) -> bytes:
        path = self.directory / name
        if path.is_symlink() or not path.is_file():
            raise KeyError(name)
        return path.read_bytes()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(os.listdir(self.directory)))

    def __len__(self) -> int:
        return len(os.listdir(self.directory))


def load_tasks(directory: str | Path) -> list[Task]:
    """Read a task set, and offer its images to the sandboxes. A broken row is a `ValueError` with its number; nothing is
    executed."""
    directory = Path(directory)
    path = directory / "tasks.jsonl"
    if not path.is_file():
        raise ValueError(
            f"no task set at {directory}: {path.name} is missing; write one with envs.task.save_tasks or `python -m envs build`"
        )
    blobs, tasks, seen = BlobStore(directory / "blobs"), [], set()
    for number, line in enumerate(path.read_text().splitlines(), 1):
        where = f"{path} row {number}"
        try:
            raw = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON ({error}); remove or repair the row") from None
        task = replace(task_from_json(raw, where), blobs=blobs)
        if task.id in seen:
            raise ValueError(f"{where}: task id {task.id!r} occurs twice; ids are unique in a set")
        seen.add(task.id)
        tasks.append(task)
    if (directory / "images" / "oci-layout").is_file():
        offer(directory / "images")
    return tasks


def save_blobs(task: Task, directory: str | Path) -> None:
    """Write what `task` needs into the blobs of a task set, each by one rename."""
    blobs = Path(directory) / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    for what, name in task.named.items():
        path = blobs / name
        if not path.exists():
            draft = path.with_name(f"{name}.{uuid4().hex}.partial")
            draft.write_bytes(task.blob(name, what))
            draft.rename(path)


def save_tasks(tasks: Sequence[Task], directory: str | Path) -> None:
    """Write a task set: `tasks.jsonl` (one atomic rename) and its blobs."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        save_blobs(task, directory)
    partial = directory / ".tasks.jsonl"
    partial.write_text("".join(json.dumps(t.to_json(), separators=(",", ":")) + "\n" for t in tasks))
    partial.rename(directory / "tasks.jsonl")
