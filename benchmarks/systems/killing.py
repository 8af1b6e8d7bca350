"""Runs that are killed: a fuse in a forked process, an environment, and stand-ins for engine and learner whose weights tell
what they were trained on.

The run is the command's own (`rl.train.train` with threads for actors, its journal, checkpoints, record and loop). It is
started in a fork of a process that has never computed with torch, and ends by SIGKILL to itself at the n-th event of a
kind: nothing is closed, flushed or rolled back.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import traceback
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from envs.env import Env
from envs.errors import InfraError
from policy import renderer
from policy.completion import Completion, Sampling, digest
from rl import journal, loop, parts, record
from rl.config import Config
from rl.learner import StepReport
from rl.ledger import Ledger
from rl.train import train

KINDS = ("statement", "file", "event", "turn")
"""Where a fuse may strike: before an SQL statement of the journal, before an operation on a file in the run directory, before
the loop looks at its inbox, before an environment's step."""

MOST = 32
"""Turns of the longest episode."""

_FILE_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}


class Fuse:
    """Kills its own process before the `at`-th event of a kind; 0: never."""

    def __init__(self, kind: str = "", at: int = 0) -> None:
        self.kind, self.left = kind, at

    def tick(self, kind: str) -> None:
        """An event of this kind comes now."""
        if kind == self.kind:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def lay(self, directory: Path) -> None:
        """Tick at the events of a run in `directory`; this process has no other purpose."""
        global FUSE
        FUSE, inside = self, f"{directory}/"

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            if event in _FILE_EVENTS:
                name = str(arguments[0])  # relative where a tree is removed
                if name.startswith(inside) or not name.startswith("/"):
                    self.tick("file")

        class Journal(journal.Journal):
            def __init__(self, path: Path) -> None:
                super().__init__(path)
                self._db.set_trace_callback(lambda statement: self_.tick("statement"))

        def feed(running: loop.Loop) -> None:
            self.tick("event")
            real(running)

        self_, real = self, loop.Loop.feed
        loop.Loop.feed = feed  # type: ignore[assignment,method-assign]
        record.Journal = Journal  # type: ignore[assignment,misc,attr-defined]
        sys.addaudithook(audit)


FUSE = Fuse()
LENGTHS = Path(os.devnull)
"""Where a `Mouth` notes each episode that it begins, with its length, and that it ends, with 0: a line each."""


class Walk(Env):
    """Go on until the action says "stop", or for `turns` turns. One task of 17 can't be played; `lost` of the steps fail."""

    turn_tokens = 12

    def __init__(self, turns: int = MOST, lost: float = 0.0) -> None:
        self.most, self.lost = turns, lost

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """A new walk."""
        super().reset(seed=seed)
        index, self.turn, self.whim = self.index(seed), 0, 0
        if index % 17 == 5:
            raise InfraError(f"there is no world for task {index}")
        return f"Walk {index}.", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """One turn; the reward at the end is a whim of the wording."""
        FUSE.tick("turn")
        if random.random() < self.lost:
            raise InfraError("the world broke")
        self.turn += 1
        self.whim = zlib.crc32(action.encode(), self.whim)
        over = "stop" in action
        reward = self.whim % 101 / 100 if over or self.turn == self.most else 0.0
        info = {"outcome": "resolved" if self.whim % 2 else "unresolved"}
        return "on", reward, over, self.turn == self.most, info


def length(task: str, seed: int) -> int:
    """Turns of an episode whose first turn is sampled with `seed`: some tasks are long (Pareto, exponent 1.1), and samples
    differ."""
    usual = random.Random(task).paretovariate(1.1)
    return min(MOST, max(1, round(usual * random.Random(seed).uniform(0.6, 1.4))))


def told(seen: list[list[str]], sequences: Sequence[Sequence[int]]) -> list[list[float]]:
    """Log-probs that only the same weights give."""
    value = -zlib.crc32(json.dumps(seen).encode()) / 2**32
    return [[value] * len(sequence) for sequence in sequences]


class Mouth:
    """In place of the engine: says "stop" after as many turns as task and seed want."""

    def __init__(self, config: Config) -> None:
        self.renderer, self.version, self.seen = renderer.load(config.model), 0, list[list[str]]()
        self.left: dict[str, int] = {}
        self.lock = threading.Lock()
        self.ledger = Ledger(["idle", "prefill", "decode", "swap", "score"])

    def generate(self, token_ids: Sequence[int], sampling: Sampling, episode: str) -> Completion:
        """The next turn of the walk."""
        assert sampling.seed is not None
        with self.lock:
            if episode not in self.left:
                self.left[episode] = length(episode.split("/")[-2], sampling.seed)
                self._note(episode)
            self.left[episode] -= 1
            if not self.left[episode]:
                self._note(episode)
        ids = [*self.renderer.encode("on" if self.left[episode] else "stop"), self.renderer.end_id]
        n = len(ids)
        return Completion(
            token_ids=ids,
            logprobs=[-0.5] * n,
            versions=[self.version] * n,
            finish="stop",
            prompt_digest=digest(token_ids),
        )

    def _note(self, episode: str) -> None:
        with LENGTHS.open("a") as file:
            file.write(f"{episode} {self.left[episode]}\n")

    def release(self, episode: str) -> None:
        """The walk is over."""
        self.left.pop(episode, None)

    cancel = release

    def check(self) -> None:
        """Always well."""

    def load(self) -> float:
        """Never too much."""
        return 0.0

    def publish(self, version: int, weights: dict[str, Any]) -> int:
        """Take the weights over."""
        self.version, self.seen = version, weights["seen"]
        return version

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """See `told`."""
        return told(self.seen, sequences)

    def stats(self) -> dict[str, Any]:
        """All time is idle."""
        return {"seconds": self.ledger.snapshot()}


class Chain:
    """In place of the learner: its weights are the groups of each batch that it was trained on."""

    def __init__(self, config: Config, rank: int = 0, rendezvous: str = "") -> None:
        self.seen: list[list[str]] = []
        self.ledger = Ledger(["idle", "train", "publish", "checkpoint"])

    def step(self, rows: Any) -> dict[str, Any]:
        """One batch more."""
        self.seen.append(sorted({row.trajectory.rpartition("/")[0] for row in rows}))
        return asdict(StepReport(version=len(self.seen)))

    def weights(self) -> tuple[int, dict[str, Any]]:
        """Version and a copy."""
        return len(self.seen), {"seen": list(self.seen)}

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """See `told`."""
        return told(self.seen, sequences)

    def save(self, directory: str) -> None:
        """A file for each batch."""
        for number, batch in enumerate(self.seen):
            (Path(directory) / f"{number:04d}.json").write_text(json.dumps(batch))

    def load(self, directory: str) -> int:
        """The inverse of `save`."""
        self.seen = seen_by(Path(directory))
        return len(self.seen)

    def export(self, directory: str) -> None:
        """Nothing that could be read as a model."""
        Path(directory).mkdir(exist_ok=True)

    def stats(self) -> dict[str, Any]:
        """All time is idle."""
        return {"seconds": self.ledger.snapshot()}


def seen_by(checkpoint: Path) -> list[list[str]]:
    """The groups of each batch that the weights in a `Chain`'s checkpoint were trained on."""
    return [json.loads(path.read_text()) for path in sorted(checkpoint.glob("[0-9]*.json"))]


def start(config: Config, fuse: Fuse, *, log: Path, stand_ins: bool, seconds: int = 300) -> bool:
    """Begin the run, or go on with it, in a process of its own. True where it came to its end, False where the fuse struck.

    log: takes what the run prints; beside it, with the ending .lengths, what a `Mouth` notes.
    """
    import torch.utils.tensorboard  # noqa: F401 - once, not in every fork

    pid = os.fork()
    if not pid:
        _child(config, fuse, log, stand_ins, seconds)
    _, status = os.waitpid(pid, 0)  # the child ends itself, see `signal.alarm`
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and fuse.kind:
        return False
    if status:
        raise InfraError(f"run {config.directory} ended with {status}: {log.read_text().strip().splitlines()[-1]}")
    return True


def _child(config: Config, fuse: Fuse, log: Path, stand_ins: bool, seconds: int) -> None:
    global LENGTHS
    code = 1
    try:
        signal.alarm(seconds)
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        LENGTHS = log.with_suffix(".lengths")
        if stand_ins:
            parts.EnginePart, parts.LearnerPart = Mouth, Chain  # type: ignore[misc,assignment]
        fuse.lay(config.directory)
        train(config, resume=(config.directory / "journal.sqlite").exists())
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
