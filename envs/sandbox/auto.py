"""The best backend that works here, for each base of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

from envs.errors import CodeworldError, Unsupported
from envs.sandbox.base import Backend, Limits, Sandbox


class Auto:
    """Native sandboxes, and docker ones where native can't be: on this host, or on an image that it refuses."""

    def __init__(self, make: Callable[[str], Backend]) -> None:
        """make: gives the backend of a name, or raises what is wrong with it."""
        self._make = make
        self._lock = threading.Lock()
        self._made: dict[str, Backend] = {}
        self._of_base: dict[str, Backend] = {}
        self._first = self._first_that_works(("native", "docker"))
        self.name = self._first.name

    def create(
        self,
        *,
        base: str = "host",
        workdir: str = "/repo",
        files: Mapping[str, bytes] | None = None,
        limits: Limits | None = None,
    ) -> Sandbox:
        """Start a sandbox with the backend that `base` was possible with."""
        backend = self._of_base.get(base, self._first)
        try:
            return backend.create(base=base, workdir=workdir, files=files, limits=limits)
        except Unsupported as refusal:
            if base == "host" or backend.name != "native":
                raise
            try:
                other = self._first_that_works(("docker",))
                sandbox = other.create(base=base, workdir=workdir, files=files, limits=limits)
            except CodeworldError as error:
                raise Unsupported(f"native: {refusal}; docker: {error}") from None
            self._of_base[base] = other
            return sandbox

    def close(self) -> None:
        """Close every sandbox of both."""
        for backend in self._made.values():
            backend.close()

    def _first_that_works(self, names: Sequence[str]) -> Backend:
        causes = []
        with self._lock:
            for name in names:
                try:
                    if name not in self._made:
                        self._made[name] = self._make(name)
                    return self._made[name]
                except CodeworldError as error:
                    causes.append(f"{name}: {error}")
        raise Unsupported("no sandbox backend works here; " + "; ".join(causes))
