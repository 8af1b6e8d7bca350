"""The journal of groups: a write-ahead log in SQLite that says what became of every group a run issued.

What it is: one row per group and the moves between its states::

    issue ──► pending ──start──► running ──finish──► done ──train(step)──► trained
                 ▲                  │                  ▲                      │
                 ├──────retry───────┤                  └──resume: step lost───┤
                 └─────resume───────┘                                         │ (payload forgotten: pending)
              pending, running, done ──drop(reason)──► dropped

The trajectories of a done group are in its row, so that they outlive the process. `RunLock` refuses a run directory in
use.

What it does not do: it neither chooses tasks nor batches, and doesn't judge staleness (`rl/admission.py`).

Exactly once. `train(ids, step)` must be committed *before* the checkpoint of `step` is written (`rl/checkpoint.py`).
Then, whenever a run is killed, the rows marked trained at or before the surviving checkpoint's step are those that its
weights have seen, and no others: `resume(step)` gives back later ones to `done` and reissues running ones. Relative to
the surviving weights every group is trained once, or dropped with a reason, or still on its way.

Every move is one transaction, flushed to disk (WAL, synchronous=FULL). A move from a wrong state is our mistake: an
AssertionError. After a resume version numbers are used again by other weights; the ages of groups that were sampled
before it count numbers only.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from agents.trajectory import Group, Trajectory

_SCHEMA = """
CREATE TABLE IF NOT EXISTS groups (
    id TEXT PRIMARY KEY,
    task_index INTEGER NOT NULL,
    task_id TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('pending', 'running', 'done', 'trained', 'dropped')),
    issued_version INTEGER,
    payload BLOB,
    trained_step INTEGER,
    reason TEXT,
    attempts INTEGER NOT NULL DEFAULT 0,
    source TEXT NOT NULL DEFAULT 'env',
    stage INTEGER NOT NULL DEFAULT 0,
    solved INTEGER NOT NULL DEFAULT 0,
    graded INTEGER NOT NULL DEFAULT 0,
    created REAL NOT NULL,
    updated REAL NOT NULL,
    CHECK ((state = 'trained') = (trained_step IS NOT NULL)),
    CHECK (state != 'dropped' OR reason IS NOT NULL),
    CHECK (state != 'done' OR payload IS NOT NULL)
);
CREATE INDEX IF NOT EXISTS by_state ON groups (state, trained_step);
"""

_ADDED = (
    "source TEXT NOT NULL DEFAULT 'env'",
    *(f"{c} INTEGER NOT NULL DEFAULT 0" for c in ("stage", "solved", "graded")),
)
"""Columns that a journal of version 0.1.0 may lack: one source, one stage, and no solve rates."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row of the journal, without its trajectories."""

    id: str
    task_index: int
    """Task index in its source."""
    task_id: str
    state: str
    source: str
    stage: int
    """Of the curriculum (`rl/curriculum.py`), when it was issued."""
    solved: int
    """Its trajectories with outcome resolved, since it finished."""
    graded: int
    """Its trajectories with a reward, likewise."""
    issued_version: int | None
    """Version of the weights when it was last started."""
    trained_step: int | None
    """Version of the weights that training it led to."""
    reason: str | None
    """Why it was dropped, or why it was last tried again."""
    attempts: int
    """How often it was started."""


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """What `Journal.resume` found."""

    returned: int
    """Groups trained after the surviving step, done again."""
    reissued: int
    """Groups that were running, or whose trajectories are gone: pending again."""
    states: dict[str, int]
    """State -> groups, afterwards."""


class Journal:
    """A journal file. All methods may be called from any thread; one process at a time (`RunLock`)."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        """Open or make the file. Raises `ValueError` where it is something else than a journal, sqlite3's errors otherwise."""
        self.path = path
        self._clock = clock
        self._lock = threading.RLock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)
            found = {row[1] for row in self._db.execute("PRAGMA table_info(groups)")}
            for column in _ADDED:
                if column.split()[0] not in found:
                    self._db.execute(f"ALTER TABLE groups ADD COLUMN {column}")
        except sqlite3.DatabaseError as error:
            self._db.close()
            if error.sqlite_errorcode not in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
                raise
            raise ValueError(f"journal {path}: {error}; remove it or choose another run directory") from error

    def close(self) -> None:
        """Close the file; the journal can't be used afterwards."""
        with self._lock:
            self._db.close()

    # ------------------------------------------------------------------ moves

    def issue(self, group: str, task_index: int, task_id: str, source: str = "env", stage: int = 0) -> None:
        """A new group: pending."""
        now = self._clock()
        with self._transaction():
            assert self._state(group) is None, f"group {group} was issued before"
            self._db.execute(
                "INSERT INTO groups (id, task_index, task_id, source, stage, state, created, updated)"
                " VALUES (?, ?, ?, ?, ?, 'pending', ?, ?)",
                (group, task_index, task_id, source, stage, now, now),
            )

    def start(self, group: str, version: int) -> None:
        """pending -> running, sampled from `version` on."""
        self._move(group, ("pending",), "running", "issued_version = ?, attempts = attempts + 1", (version,))

    def retry(self, group: str, reason: str) -> None:
        """running -> pending, e.g. after the infrastructure failed."""
        self._move(group, ("running",), "pending", "reason = ?", (reason,))

    def finish(self, group: Group) -> None:
        """running -> done, with its trajectories."""
        values = _pack(group), group.solved, group.graded
        self._move(group.id, ("running",), "done", "payload = ?, solved = ?, graded = ?", values)

    def reject(self, group: Group, reason: str) -> None:
        """running -> dropped, of a group that has finished: its solve rate is kept."""
        with self._transaction():
            self.finish(group)
            self.drop(group.id, reason)

    def train(self, groups: Sequence[str], step: int) -> None:
        """done -> trained, all of a batch in one transaction; `step` is the version that training them led to.

        Commit this before the checkpoint of `step` is written.
        """
        with self._transaction():
            for group in groups:
                self._move(group, ("done",), "trained", "trained_step = ?", (step,))

    def drop(self, group: str, reason: str) -> None:
        """pending, running or done -> dropped; the trajectories are forgotten."""
        assert reason, f"group {group} is dropped without a reason"
        self._move(group, ("pending", "running", "done"), "dropped", "reason = ?, payload = NULL", (reason,))

    def resume(self, surviving_step: int) -> Resumed:
        """Undo what the surviving weights have not seen; 0 where no checkpoint survived.

        Groups trained after `surviving_step` return to done (to pending where their trajectories were forgotten),
        running ones to pending. Dropped ones stay dropped.
        """
        now = self._clock()
        with self._transaction():
            returned = self._db.execute(
                "UPDATE groups SET state = 'done', trained_step = NULL, updated = ?"
                " WHERE state = 'trained' AND trained_step > ? AND payload IS NOT NULL",
                (now, surviving_step),
            ).rowcount
            reissued = self._db.execute(
                "UPDATE groups SET state = 'pending', trained_step = NULL, reason = 'resumed', updated = ?"
                " WHERE state = 'running' OR (state = 'trained' AND trained_step > ?)",
                (now, surviving_step),
            ).rowcount
            return Resumed(returned=returned, reissued=reissued, states=self.counts())

    def forget(self, step: int) -> int:
        """Drop the trajectories of groups trained at or before `step`; returns how many.

        `step` must be that of the *oldest* checkpoint that is kept: a run may be resumed from any of them.
        """
        with self._transaction():
            return self._db.execute(
                "UPDATE groups SET payload = NULL"
                " WHERE state = 'trained' AND trained_step <= ? AND payload IS NOT NULL",
                (step,),
            ).rowcount

    # ------------------------------------------------------------------ questions

    def entries(self, state: str | None = None) -> list[Entry]:
        """All rows, or those in one state, in the order of their issue."""
        where, values = ("WHERE state = ?", (state,)) if state else ("", ())
        names = Entry.__dataclass_fields__
        with self._lock:
            rows = self._db.execute(
                f"SELECT {', '.join(names)} FROM groups {where} ORDER BY rowid",
                values,
            ).fetchall()
        return [Entry(**dict(zip(names, row, strict=True))) for row in rows]

    def load(self, group: str) -> Group:
        """The group with its trajectories; it must be done (or trained and not yet forgotten)."""
        with self._lock:
            row = self._db.execute("SELECT task_id, payload FROM groups WHERE id = ?", (group,)).fetchone()
        assert row is not None and row[1] is not None, f"group {group} has no trajectories in {self.path}"
        return Group(group, row[0], _unpack(row[1]))

    def counts(self) -> dict[str, int]:
        """State -> number of groups; states without a group are absent."""
        with self._lock:
            return dict(self._db.execute("SELECT state, COUNT(*) FROM groups GROUP BY state").fetchall())

    # ------------------------------------------------------------------ inside

    def _state(self, group: str) -> str | None:
        row = self._db.execute("SELECT state FROM groups WHERE id = ?", (group,)).fetchone()
        return None if row is None else str(row[0])

    def _move(self, group: str, sources: tuple[str, ...], target: str, change: str, values: tuple[object, ...]) -> None:
        """Change one row's state, asserting where it comes from."""
        with self._transaction():
            state = self._state(group)
            assert state in sources, f"group {group} can't become {target}: it is {state or 'unknown'}"
            self._db.execute(
                f"UPDATE groups SET state = ?, updated = ?, {change} WHERE id = ?",
                (target, self._clock(), *values, group),
            )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing; inner ones join the outer one."""
        with self._lock:
            if self._db.in_transaction:
                yield
                return
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")


def _pack(group: Group) -> bytes:
    """Trajectories as compressed JSON lines."""
    return zlib.compress("\n".join(t.to_json() for t in group.trajectories).encode(), level=1)


def _unpack(payload: bytes) -> list[Trajectory]:
    return [Trajectory.from_json(line) for line in zlib.decompress(payload).decode().splitlines()]


class RunLock:
    """Holds a run directory by `flock` on `<directory>/lock`; the kernel frees it however the process ends."""

    def __init__(self, directory: Path) -> None:
        """Take the lock. Raises `ValueError` (one line with the holder's pid) where another holds it."""
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / "lock"
        self._file: IO[str] = open(self.path, "a+")  # noqa: SIM115 - held open for as long as the lock is
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise ValueError(
                f"run directory {directory} is in use by process {holder}; stop it, or choose another directory"
            ) from None
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()

    def release(self) -> None:
        """Give the directory back, and remove it if nothing but the lock is in it; calling it again is fine."""
        if self._file.closed:
            return
        if [p.name for p in self.path.parent.iterdir()] == [self.path.name]:
            self.path.unlink()
            self.path.parent.rmdir()
        self._file.close()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
