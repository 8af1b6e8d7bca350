"""Warm sandboxes: made ahead of time by a few threads, so that taking one costs no start (tenths of a second with docker)."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, cast

from envs.errors import CodeworldError, InfraError
from envs.sandbox.base import Backend, Sandbox

LIVENESS_SECONDS = 5.0
"""How long a warm sandbox may take to answer before it is thrown away."""


class Pool:
    """Keeps `size` equal sandboxes ready. Thread-safe; not for use across a fork of the process.

    A taken sandbox is its taker's: `close()` ends it, and another takes its place; none is used twice.

    >>> with Pool(make_backend("docker"), 4, limit=16, base="codeworld-base") as pool:   # doctest: +SKIP
    ...     with pool.take(timeout=30) as sandbox:
    ...         sandbox.run("echo hello", timeout=10)
    """

    def __init__(
        self, backend: Backend, size: int, *, limit: int | None = None, starters: int = 2, **create: Any
    ) -> None:
        """
        Args:
            backend: what makes the sandboxes; the pool doesn't close it.
            size: sandboxes kept ready.
            limit: sandboxes of this pool alive at once, taken ones (not their forks) included; None for no limit.
            starters: threads that start sandboxes.
            create: arguments of `backend.create`.
        """
        for name, value in (("size", size), ("starters", starters)):
            if value < 1:
                raise ValueError(f"pool: {name}={value} must be at least 1")
        if limit is not None and limit < size:
            raise ValueError(f"pool: limit={limit} is below size={size}: they could never all be ready; raise it")
        self._backend, self._create, self._size, self._limit = backend, create, size, limit
        self._changed = threading.Condition()
        self._ready: deque[Sandbox] = deque()
        self._starting = self._taken = self._waiting = 0
        self._failure: Exception | None = None
        self._closed = False
        self._threads = [
            threading.Thread(target=self._fill, name=f"pool-{number}", daemon=True) for number in range(starters)
        ]
        for thread in self._threads:
            thread.start()

    def take(self, timeout: float = 60.0) -> Sandbox:
        """A sandbox that has just answered, at the latest after `timeout` seconds.

        Raises what `backend.create` raised where a start failed and none is ready (the next call tries again), and
        `InfraError` when none came free in time.
        """
        deadline = time.monotonic() + timeout
        while True:
            taken = cast(Sandbox, _Taken(self._pop(deadline, timeout), self._give_back))
            if _answers(taken):
                return taken
            taken.close()

    def close(self) -> None:
        """End the sandboxes that are ready and make no more; those that are taken stay their takers'."""
        with self._changed:
            self._closed = True
            ready = list(self._ready)
            self._ready.clear()
            self._changed.notify_all()
        for sandbox in ready:
            sandbox.close()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _pop(self, deadline: float, timeout: float) -> Sandbox:
        """A ready sandbox, counted as taken from here on."""
        with self._changed:
            self._failure = None  # an old one: it is tried again
            self._waiting += 1
            self._changed.notify_all()
            try:
                while not self._ready:
                    self._check(deadline, timeout)
                    self._changed.wait(deadline - time.monotonic())
                self._taken += 1
                return self._ready.popleft()
            finally:
                self._waiting -= 1
                self._changed.notify_all()

    def _check(self, deadline: float, timeout: float) -> None:
        """Raise where waiting for a sandbox is in vain."""
        if self._closed:
            raise InfraError(f"pool of {self._backend.name} sandboxes: it is closed")
        if self._failure is not None:
            failure = self._failure
            if isinstance(failure, CodeworldError | ValueError):
                raise failure
            raise InfraError(f"pool of {self._backend.name} sandboxes: a start failed: {failure!r}") from failure
        if time.monotonic() >= deadline:
            limit = "" if self._limit is None else f" of at most {self._limit}"
            raise InfraError(
                f"pool of {self._backend.name} sandboxes: none in {timeout:g} s ({self._taken}{limit} in use,"
                f" {self._starting} starting); close those that are done, or raise limit, size or timeout"
            )

    def _give_back(self) -> None:
        with self._changed:
            self._taken -= 1
            self._changed.notify_all()

    def _wanted(self) -> bool:
        """One more is to be started. A failed start is repeated when somebody takes, not on and on."""
        coming = len(self._ready) + self._starting
        room = self._limit is None or coming + self._taken < self._limit
        return room and self._failure is None and coming < self._size + self._waiting

    def _fill(self) -> None:
        """A starter's life."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._wanted())
                if self._closed:
                    return
                self._starting += 1
            sandbox, failure = None, None
            try:
                sandbox = self._backend.create(**self._create)
            except Exception as error:  # whatever it is, a taker is to see it
                failure = error
            with self._changed:
                self._starting -= 1
                late = self._closed
                if sandbox is None:
                    self._failure = failure
                elif not late:
                    self._ready.append(sandbox)
                self._changed.notify_all()
            if late and sandbox is not None:
                sandbox.close()


class _Taken:
    """A taken sandbox: itself in everything, but its end is told to the pool."""

    def __init__(self, sandbox: Sandbox, closed: Callable[[], None]) -> None:
        self._sandbox = sandbox
        self._closed: Callable[[], None] | None = closed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sandbox, name)

    def close(self) -> None:
        """End the sandbox; then its place in the pool is free."""
        self._sandbox.close()
        closed, self._closed = self._closed, None
        if closed:
            closed()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_closed", None):
            self.close()


def _answers(sandbox: Sandbox) -> bool:
    try:
        return sandbox.run(":", timeout=LIVENESS_SECONDS).ok
    except InfraError:
        return False
