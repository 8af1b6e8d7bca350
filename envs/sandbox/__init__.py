"""Sandboxes: what an episode or a grading runs in. `make_backend()` gives the best backend that works on this host.

>>> backend = make_backend()                                       # doctest: +SKIP
>>> with backend.create(files={"a.py": b"print(1)"}) as sandbox:   # doctest: +SKIP
...     sandbox.run("python a.py", timeout=10).text()
'1\\n'
"""

from __future__ import annotations

from importlib.metadata import entry_points

from envs.errors import CodeworldError, InfraError, SandboxDead, Unsupported, nearest
from envs.sandbox.auto import Auto
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
        return Auto(make_backend)
    backend = _new(name)
    _try(backend)
    return backend


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
