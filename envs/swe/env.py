"""`codeworld/SWE-v0`: repair a repository in a sandbox with bash, edit, create and submit; hidden tests decide.

One episode: `reset` starts a sandbox with the task's files; each `step` is one tool call; the episode ends by `submit`, by
a limit of the task's budget, or by too many malformed actions. Whatever ended it, what is graded is the repository's
changes, in a fresh sandbox (`envs/swe/grading.py`). Reward only at the end. What the agent reads is the statement and what
its tools say; the last observation is empty, and why a verdict fell is in `info`, which is the trainer's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from envs.env import Env, StopReason
from envs.errors import nearest
from envs.sandbox import make_backend
from envs.sandbox.base import Backend, Changes, Sandbox
from envs.swe.grading import REWARDS, WORST, Verdict, grade
from envs.task import Task, load_tasks
from envs.tiny import repairs
from envs.tools import TOOLS, FormatError, parse

_LOCK = threading.Lock()
_BACKENDS: dict[str, Backend] = {}


def shared_backend(name: str) -> Backend:
    """One backend of each name per process: its helper and its limits are shared by all episodes, however many start at
    once."""
    with _LOCK:
        if name not in _BACKENDS:
            _BACKENDS[name] = make_backend(name)
        return _BACKENDS[name]


def task_source(tasks: str | Sequence[Task], runner: str = "tiny") -> Callable[[str, int], Task]:
    """(split, index) → task. "tiny-repairs" generates; a directory or a list is indexed round and round."""
    if tasks == "tiny-repairs":
        return lambda split, index: repairs.task(split, index, runner=runner)
    if isinstance(tasks, str) and not Path(tasks).is_dir():
        raise ValueError(
            f"unknown task set {tasks!r}: neither tiny-repairs nor a directory with tasks.jsonl.{nearest(tasks, ['tiny-repairs'])}"
        )
    rows = load_tasks(tasks) if isinstance(tasks, str) else list(tasks)
    if not rows:
        raise ValueError(f"the task set {tasks!r} is empty; add at least one task")
    return Rounds(rows)


class Rounds:
    """A finite list of tasks; it has no splits."""

    def __init__(self, rows: Sequence[Task]) -> None:
        self.rows = rows

    def __call__(self, split: str, index: int) -> Task:
        """The task of an index, round and round."""
        return self.rows[index % len(self.rows)]


class SWEEnv(Env):
    """A repository, four tools, hidden tests."""

    def __init__(
        self,
        *,
        tasks: str | Sequence[Task] = "tiny-repairs",
        backend: str | Backend = "auto",
        reward: str = "cwm",
        context_lines: int = 8,
        runner: str = "tiny",
        blind: bool = False,
    ) -> None:
        """
        Args:
            tasks: "tiny-repairs", a task-set directory, or a list of tasks.
            backend: "auto", "native", "docker", or a backend object.
            reward: "cwm" (+1 / 0 / -1 with patch similarity) or "binary" (1 / 0).
            context_lines: numbered lines that `edit` shows each side of a change.
            runner: test runner of generated tasks, "tiny" or "pytest".
            blind: replace every observation by nothing: the ablation that shows whether a task is multi-turn.
        """
        if reward not in REWARDS:
            raise ValueError(f"unknown reward {reward!r}; choose {' or '.join(REWARDS)}.{nearest(reward, REWARDS)}")
        self._source = task_source(tasks, runner)
        self._backend = backend
        self._reward, self._worst = REWARDS[reward], WORST[reward]
        self._context, self._blind = context_lines, blind
        self._sandbox: Sandbox | None = None
        self.task: Task | None = None
        self._done = True

    @property
    def backend(self) -> Backend:
        """The backend, made on first use."""
        return shared_backend(self._backend) if isinstance(self._backend, str) else self._backend

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Start a task: `options["task"]`, or task `seed` of `options["split"]` (default "train"). Raises `InfraError`."""
        super().reset(seed=seed)
        self.close()
        options = options or {}
        self.task = options.get("task") or self._source(options.get("split", "train"), self.index(seed))
        statement = self._begin(self.task)
        files = self.task.files(self.task.setup)
        self._sandbox = self.backend.create(
            base=self.task.base, workdir=self.task.workdir, files=files, limits=self.task.limits
        )
        self._turns, self._malformed, self._done = 0, 0, False
        self._deadline = time.monotonic() + self.task.budget.seconds
        return statement, {"task_id": self.task.id, "provenance": dict(self.task.provenance)}

    def size(self, split: str) -> int | None:
        """Tasks of a set; None where they are generated."""
        return len(self._source.rows) if isinstance(self._source, Rounds) else None

    def _begin(self, task: Task) -> str:
        """Take the task's tools and bounds; what the agent is asked. Raises `ValueError` for a task that can't be played."""
        if task.network:
            raise ValueError(f"task {task.id} asks for a network, which no backend gives; set network to false")
        self.tools, budget = task.tools, task.budget
        self.turn_tokens, self.context_tokens, self.turns = budget.turn_tokens, budget.tokens, budget.turns
        return task.prompt

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """One tool call. Raises `InfraError` when the sandbox failed, `RuntimeError` after the end."""
        if self._done or self.task is None or self._sandbox is None:
            raise RuntimeError("step() after the end of an episode; call reset() first")
        budget = self.task.budget
        self._turns += 1
        call = parse(action, self.task.tools)
        if isinstance(call, FormatError):
            self._malformed += 1
            text, tool = call.text, "error"
        else:
            self._malformed, tool = 0, call.name
            if call.name == "submit":
                return self._end("submitted")
            text = self._act(call.name, call.body)
        if self._malformed >= budget.format_errors:
            return self._end("format_error")
        if time.monotonic() > self._deadline:
            return self._end("timeout")
        if self._turns >= budget.turns:
            return self._end("turn_limit")
        return "" if self._blind else text[: budget.observation_chars], 0.0, False, False, {"tool": tool}

    def _act(self, name: str, body: str) -> str:
        assert self._sandbox is not None and self.task is not None
        if name == "bash":
            left = max(0.1, min(self.task.budget.command_seconds, self._deadline - time.monotonic()))
            budget = self.task.budget
            return TOOLS["bash"](
                self._sandbox, body, timeout=left, limit=budget.observation_chars, silence=budget.silence_seconds
            )
        if name == "edit":
            return TOOLS["edit"](self._sandbox, body, context=self._context)
        return TOOLS[name](self._sandbox, body)

    def _end(self, stop: StopReason) -> tuple[str, float, bool, bool, dict[str, Any]]:
        verdict = self.finish()
        info = {
            "stop": stop,
            "outcome": verdict.outcome,
            "why": verdict.why,
            "similarity": verdict.similarity,
            "dropped": list(verdict.dropped),
        }
        reward = self._reward(verdict) if stop != "format_error" else self._worst
        return "", reward, stop == "submitted", stop != "submitted", info

    def truncate(self, stop: StopReason) -> tuple[float, dict[str, Any]]:
        """End the episode for a limit that the agent enforces (its context); the reward and info of the end."""
        _, reward, _, _, info = self._end(stop)
        return reward, info

    def finish(self) -> Verdict:
        """End the episode and grade its changes: every process dies first, then the diff is taken from outside."""
        assert self._sandbox is not None and self.task is not None
        self._done = True
        try:
            self._sandbox.kill_all()
            changes = self._sandbox.changes()
        finally:
            self.close()
        return self._grade(self.task, changes)

    def _grade(self, task: Task, changes: Changes) -> Verdict:
        return grade(task, changes, self.backend)

    def fork(self, n: int) -> list[Env]:
        """`n` episodes that go on from here: files, cwd and exports are copied, turns and deadline shared."""
        if self._done or self._sandbox is None:
            raise RuntimeError("fork() outside an episode; call reset() first")
        children: list[Env] = []
        for sandbox in self._sandbox.fork(n):
            child = type(self).__new__(type(self))
            child.__dict__.update(self.__dict__)
            child._sandbox = sandbox
            children.append(child)
        return children

    def close(self) -> None:
        """Free the sandbox; may be called at any time."""
        sandbox, self._sandbox = self._sandbox, None
        if sandbox is not None:
            sandbox.close()
