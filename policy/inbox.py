"""One thread that owns something, and the callers who leave it commands: what the embedded engine waits with.

No polling: the thread sleeps on a condition while it has nothing to do, callers sleep on futures, with a deadline. When
the thread ends, for whatever reason, everyone who waits gets an InfraError, and so does everyone who comes later.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from envs.errors import InfraError

LATER = object()
"""What a command returns whose future is answered later, by someone else."""


class Inbox:
    """Commands on their way to one thread, which calls `obey` in its loop and `end` when it leaves it."""

    def __init__(self, deadline_s: float) -> None:
        self.deadline_s = deadline_s
        self._bell = threading.Condition()
        self._commands: deque[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = deque()
        self._closing = False
        self._over: str | None = None

    def post(self, future: Future[Any], command: Callable[..., Any], *arguments: Any) -> None:
        """Leave a command whose answer goes to `future`; InfraError if the thread has ended."""
        with self._bell:
            if self._over is not None:
                raise InfraError(self._over)
            self._commands.append((future, command, arguments))
            self._bell.notify()

    def ask(self, what: str, command: Callable[..., Any], *arguments: Any) -> Any:
        """Leave a command and wait for what it returns; InfraError after the deadline."""
        future: Future[Any] = Future()
        self.post(future, command, *arguments)
        return self.wait(what, future)

    def wait(self, what: str, future: Future[Any]) -> Any:
        """The answer, or InfraError after the deadline."""
        try:
            return future.result(self.deadline_s)
        except TimeoutError:
            raise InfraError(
                f"no {what} within engine.deadline_s={self.deadline_s:g}: the engine is overloaded or hangs; "
                "raise the deadline or lower the load"
            ) from None

    def close(self) -> None:
        """Ask the thread to end."""
        with self._bell:
            self._closing = True
            self._bell.notify()

    def obey(self, busy: bool, sleep: Callable[[], None]) -> bool:
        """Carry out what lies here; False once closed. Unless `busy`, waits for something, after calling `sleep`."""
        with self._bell:
            while not (self._commands or busy or self._closing):
                sleep()
                self._bell.wait()
            commands = list(self._commands)
            if self._closing:
                return False
        for future, command, arguments in commands:
            answer = command(*arguments)
            if answer is not LATER:
                future.set_result(answer)
            self._commands.popleft()  # only now, so that `end` still finds a command that failed
        return True

    def end(self, reason: str, waiting: Sequence[Future[Any]]) -> None:
        """Fail everyone who waits: `waiting`, and those whose commands lie here. Later posts raise the same."""
        with self._bell:
            self._over = reason
            futures = [*waiting, *(future for future, _, _ in self._commands)]
            self._commands.clear()
        for future in futures:
            if not future.done():
                future.set_exception(InfraError(reason))


class Clock:
    """Attributes every second since its start to exactly one label."""

    def __init__(self, labels: Sequence[str], label: str) -> None:
        self._seconds = dict.fromkeys(labels, 0.0)
        self._label = label
        self._since = self._start = time.perf_counter()
        self._lock = threading.Lock()

    def enter(self, label: str) -> None:
        """From now on, time belongs to `label`."""
        with self._lock:
            now = time.perf_counter()
            self._seconds[self._label] += now - self._since
            self._label, self._since = label, now

    def read(self) -> dict[str, float]:
        """Seconds by label, and `wall`, their sum."""
        with self._lock:
            now = time.perf_counter()
            seconds = dict(self._seconds)
            seconds[self._label] += now - self._since
            return {**seconds, "wall": now - self._start}
