"""Sandboxes: what an episode or a grading runs in. `make_backend()` gives the best backend that works on this host.

>>> backend = make_backend()                                       # doctest: +SKIP
>>> with backend.create(files={"a.py": b"print(1)"}) as sandbox:   # doctest: +SKIP
...     sandbox.run("python a.py", timeout=10).text()
'1\\n'
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points

from envs.errors import CodeworldError, InfraError, SandboxDead, Unsupported, nearest
from envs.sandbox.base import Backend, Cause, Changes, FileChange, Limits, Result, Sandbox, Snapshot, Usage
from envs.sandbox.doctor import probe

BACKENDS = ("native", "docker")


def make_backend(name: str = "auto") -> Backend:
    """The backend called `name`: one of `BACKENDS`, one that a package offers under the entry point group
    `codeworld.sandboxes` (a callable without arguments), or "auto": native where a trivial sandbox works and the base can be
    unpacked, else docker; a sandbox's id begins with its backend's name.

    Raises `Unsupported` with one line that names the cause and the remedy (for "auto", of both).
    """
    if name == "auto":
        return Auto()
    backend = _new(name)
    _try(backend)
    return backend


class Auto:
    """Native sandboxes, and docker ones where native can't be: on this host, or on an image that it refuses."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: dict[str, Backend] = {}
        self._of_base: dict[str, Backend] = {}
        self._first = self._first_that_works(BACKENDS)
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
                        self._made[name] = make_backend(name)
                    return self._made[name]
                except CodeworldError as error:
                    causes.append(f"{name}: {error}")
        raise Unsupported("no sandbox backend works here; " + "; ".join(causes))


def _new(name: str) -> Backend:
    if name == "native":
        from envs.sandbox.native import NativeBackend

        return NativeBackend()
    if name == "docker":
        from envs.sandbox.docker import DockerBackend

        return DockerBackend()
    offered = {point.name: point for point in entry_points(group="codeworld.sandboxes")}
    if name not in offered:
        known = (*BACKENDS, *offered)
        raise ValueError(f"sandbox backend {name!r}: known are auto, {', '.join(known)}.{nearest(name, known)}")
    made: Backend = offered[name].load()()
    return made


def _try(backend: Backend) -> None:
    """One trivial sandbox: namespaces and limits are not believed before they were used."""
    try:
        sandbox = backend.create()
        try:
            result = sandbox.run(":", timeout=20)
        finally:
            sandbox.close()
        if not result.ok:
            raise InfraError(f"{backend.name} sandbox: a trivial command ended with {result}")
    except CodeworldError:
        backend.close()
        raise


__all__ = [
    "BACKENDS",
    "Backend",
    "Cause",
    "Changes",
    "FileChange",
    "InfraError",
    "Limits",
    "Result",
    "Sandbox",
    "SandboxDead",
    "Snapshot",
    "Unsupported",
    "Usage",
    "make_backend",
    "probe",
]
