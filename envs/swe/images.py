"""Task images: a repository at a commit, installed on a base image, without a registry and without network inside.

    base ─► interpreter (a virtual environment) ─► environment (dependencies) ─► repository (/testbed) ─► a task's own

What each sandbox writes becomes a layer. Wheels are fetched outside and installed inside (`wheels`), so no code of a
repository or a package runs on the host. The repository is installed editable: its source lies in `/testbed` alone, and
`audit` refuses an environment that holds a copy. Tasks of one repository share everything but the last layer, its commits
share the environment.
"""

from __future__ import annotations

import hashlib
import io
import json
import shlex
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from envs.sandbox.archives import image_env, offer
from envs.sandbox.base import Backend, FileChange, Limits
from envs.sandbox.bases import PATH
from envs.sandbox.capture import Entry, Tree, read_layer, tree_layer
from envs.sandbox.imagestore import ImageStore
from envs.sandbox.native import NativeSandbox
from envs.swe import requirements
from envs.swe.install import PIP, SECONDS, STDLIB, TESTBED, VENV, Build, Refused, compile_command, last_words
from envs.swe.onecommit import one_commit
from envs.swe.sources import Source
from envs.swe.wheels import Interpreter, WheelCache

LIMITS = Limits(memory_mb=4096, disk_mb=2048, pids=256, output_kb=1024)
"""Of a sandbox that builds."""
PYTHON = "interpreter.python"
"""Label, inherited by what is built on it: for whom an image's wheels are."""
RECIPE = 1
"""Part of an environment's key: another recipe builds anew."""
_NOT_KEPT = (
    "testbed",
    "opt/pip",
    "tmp",
    "dev",
    "proc",
    "sys",
    "run",
    "var/tmp",
    "var/cache",
    "root/.cache",
    "root/.config",
)
_CACHES = frozenset(("__pycache__", ".pytest_cache", ".eggs", ".mypy_cache", ".ruff_cache", ".hypothesis", ".git"))
_ENV = {"VIRTUAL_ENV": VENV, "PYTHONDONTWRITEBYTECODE": "1"}


@dataclass(frozen=True, kw_only=True)
class Environment:
    """A repository's image, and how it came about."""

    digest: str
    """The image with the repository at the source's commit."""
    installed: str
    """The image below the repository's layer: what all commits and tasks share."""
    python: str
    """Version of the interpreter, "3.11"."""
    packages: Mapping[str, str]
    """Distributions in the environment, name → version."""
    dropped: tuple[str, ...] = ()
    """Requirements of the tests that could not be had, with why."""
    plain: bool = False
    """There was nothing to install: the repository is put on the path instead."""
    seconds: float = 0.0
    """Wall clock of the build; 0 where the store had it already."""
    size: int = 0
    """Bytes of the layers above the interpreter's."""
    made: Mapping[str, Entry] = field(default_factory=dict, repr=False, metadata={"plain": False})
    """Files that the installation made or changed in the work directory, such as metadata."""


def environment(
    store: ImageStore,
    base: str,
    source: Source,
    backend: Backend,
    *,
    cache: Path,
    python: str = "python3",
    extras: Sequence[str] = requirements.EXTRAS,
    needs: Sequence[str] | None = None,
    limits: Limits = LIMITS,
) -> Environment:
    """The image of a repository, built in a sandbox of `backend` (native), or as `store` already has it.

    base: digest of an image of `store` with bash and `python` (with its `venv` module). cache: where wheels are kept.
    extras: those of the package, and groups, that are installed where they exist. needs: the requirements of the tests, where
    they are known: these are installed and nothing is guessed. Raises `Refused`, one line, for a
    repository that can't be installed; `ValueError` where wheels can't be fetched.
    """
    offer(store.directory)
    tree, begun = source.tree(), time.monotonic()
    below, tools = interpreter(store, base, backend, cache=cache, python=python)
    asked = list(extras) if needs is None else {"needs": list(needs)}
    key = _key(RECIPE, below, source.name, source.version, source.commit, _tree_digest(tree), asked)
    if known := store.find({"codeworld.key": key}):
        return remembered(store, known, tree)
    with _sandbox(backend, tools, limits, tree) as box:
        build = Build(box, WheelCache(cache / "wheels"), interpreter_of(store, below))
        build.links(tree)
        report = build.install(tree, source, extras) if needs is None else build.pinned(tree, source, needs)
        made = sealed(store, below, box, source, tree, report, {"codeworld.key": key}, lambda p: _is_kept(p, tree))
    return replace(made, seconds=round(time.monotonic() - begun, 2))


def sealed(
    store: ImageStore,
    below: str,
    box: NativeSandbox,
    source: Source,
    tree: Tree,
    report: Mapping[str, Any],
    labels: Mapping[str, str],
    keep: Callable[[str], bool],
    env: Mapping[str, str] | None = None,
) -> Environment:
    """The image of what a sandbox wrote, put on the image `below`: one layer for the environment, one for the repository.

    report: of `Build.report`. labels: by which the store finds it again. keep: which of the
    files that were made or changed in the work directory belong to it. env: added to the image's environment.
    """
    env_layer = _layer(box, _outside)
    captured = read_layer(io.BytesIO(_layer(box, _inside)), TESTBED.lstrip("/"))
    installed = store.extend(below, [env_layer], env=env, created_by=f"codeworld: environment of {source.name}")
    made = {path: entry for path, entry in captured.items() if tree.get(path) != entry and keep(path)}
    layer = tree_layer({**tree, **made}, TESTBED)
    whole = {**report, "installed": installed, "size": len(env_layer) + len(layer)}
    labels = {**labels, "codeworld.environment": json.dumps(whole, sort_keys=True)}
    what = f"codeworld: {source.name} {source.commit or source.version}"
    digest = store.extend(installed, [layer], workdir=TESTBED, labels=labels, created_by=what)
    return remembered(store, digest, tree)


def interpreter(
    store: ImageStore, base: str, backend: Backend, *, cache: Path, python: str = "python3"
) -> tuple[str, str]:
    """The image `base` with a virtual environment at `VENV` and the standard library compiled, on which all environments
    stand; and that with pip on top, in which they are built."""
    offer(store.directory)
    key = _key(RECIPE, base, python)
    below, tools = store.find({"codeworld.interpreter": key}), store.find({"codeworld.tools": key})
    if below and tools:
        return below, tools
    with _sandbox(backend, base, LIMITS) as box:
        probed = box.run(f"{python} -c {shlex.quote(_PROBE)}", timeout=SECONDS)
        if not probed.ok:
            why = f"{python} does not run there ({last_words(probed)})"
            raise Refused("base", f"{base}: {why}; use an image with Python and its venv module")
        found = probed.text().strip()
        (pip,) = WheelCache(cache / "wheels").get(["pip"], Interpreter(**json.loads(found)))
        box.write(f"/tmp/{pip.name}", pip.read_bytes())
        unpack = f"python -m zipfile -e /tmp/{pip.name} {PIP} && {compile_command(repr(PIP))}"
        venv = f"{python} -m venv --without-pip {VENV} && PATH={VENV}/bin:$PATH && {compile_command(STDLIB)}"
        made = box.run(f"{venv} && {unpack}", timeout=SECONDS)
        if not made.ok:
            raise Refused("base", f"{base}: no virtual environment can be made there ({last_words(made)})")
        with_pip = _layer(box, lambda path: path in ("opt", "opt/pip") or path.startswith("opt/pip/"))
        layer = _layer(box, _outside)
    env = {"PATH": f"{VENV}/bin:{_path(store, base)}", **_ENV}
    labels = {"codeworld.interpreter": key, PYTHON: found}
    below = store.extend(base, [layer], env=env, labels=labels, created_by="codeworld: interpreter")
    labels = {"codeworld.tools": key}
    return below, store.extend(below, [with_pip], labels=labels, created_by="codeworld: pip, to build with")


def at_commit(store: ImageStore, env: Environment, tree: Tree) -> str:
    """The image of another commit of the same repository, on the same environment: only the repository's layer differs."""
    return store.extend(env.installed, [tree_layer({**tree, **env.made}, TESTBED)], workdir=TESTBED)


def task_image(
    store: ImageStore, digest: str, tree: Tree, files: Mapping[str, bytes | None], *, git: bool = True
) -> str:
    """The image of one task: `files` put on (None: removed from) the repository of image `digest`, whose files are `tree`
    (with what its installation made), and a `.git` of one commit of exactly that.

    git: leave `.git` out where the base has no git.
    """
    return store.extend(digest, [task_layer(tree, files, git=git)], created_by="codeworld: task")


def task_layer(tree: Tree, files: Mapping[str, bytes | None], *, git: bool = True) -> bytes:
    """The layer of `task_image`. A changed file keeps its mode."""
    changed: dict[str, Entry | None] = {}
    for path, data in files.items():
        old = tree.get(path)
        changed[path] = None if data is None else Entry(data, old.mode if old and old.link is None else 0o644)
    changed = {path: entry for path, entry in changed.items() if entry is not None or path in tree}
    now = {path: entry for path, entry in {**tree, **changed}.items() if entry is not None}
    commit = one_commit(now) if git else {}
    return tree_layer({**changed, **{f".git/{path}": Entry(data) for path, data in commit.items()}}, TESTBED)


def repository(store: ImageStore, digest: str) -> dict[str, Entry]:
    """The files of the repository's layer, the topmost, of an environment's image."""
    with store.blob(store.layers(digest)[-1]).open("rb") as file:
        return read_layer(file, TESTBED.lstrip("/"))


_PROBE = """
import json, platform, sys
import venv
libc, version = platform.libc_ver()
print(json.dumps({"version": "%d.%d" % sys.version_info[:2], "machine": platform.machine(),
    "implementation": {"cpython": "cp", "pypy": "pp"}[sys.implementation.name],
    "glibc": version if libc == "glibc" else ""}))
"""


def _sandbox(backend: Backend, base: str, limits: Limits, tree: Tree | None = None) -> NativeSandbox:
    """A sandbox to build in: one whose whole root can be captured."""
    files = {path: FileChange(entry.data, entry.mode) for path, entry in (tree or {}).items() if entry.link is None}
    box = backend.create(base=base, workdir=TESTBED, files=files, limits=limits)  # type: ignore[arg-type]
    if isinstance(box, NativeSandbox):
        return box
    box.close()
    raise ValueError(f"images are built in native sandboxes, not in {backend.name} ones; use the native backend")


def _layer(box: NativeSandbox, keep: Callable[[str], bool]) -> bytes:
    """What a sandbox wrote, as a layer."""
    with tempfile.TemporaryFile() as out:
        box.layer(out, keep)
        out.seek(0)
        return out.read()


def _outside(path: str) -> bool:
    return not any(path == name or path.startswith(f"{name}/") for name in _NOT_KEPT)


def _inside(path: str) -> bool:
    parts = path.split("/")
    return parts[0] == "testbed" and _CACHES.isdisjoint(parts) and not path.endswith((".pyc", ".pyo"))


def _is_kept(path: str, tree: Tree) -> bool:
    """Whether a file that the installation made belongs to the image: what a build left over may hold copies."""
    return path in tree or path.split("/")[0] not in ("build", "dist")


def interpreter_of(store: ImageStore, digest: str) -> Interpreter:
    """For whom an image's wheels are."""
    return Interpreter(**json.loads(store.labels(digest)[PYTHON]))


def remembered(store: ImageStore, digest: str, tree: Tree) -> Environment:
    """The environment that `sealed` made an image of."""
    report = json.loads(store.labels(digest)["codeworld.environment"])
    made = {path: entry for path, entry in repository(store, digest).items() if tree.get(path) != entry}
    return Environment(digest=digest, made=made, **(report | {"dropped": tuple(report["dropped"])}))


def _path(store: ImageStore, digest: str) -> str:
    return image_env(store.config(digest)["config"]).get("PATH") or PATH


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _tree_digest(tree: Tree) -> str:
    digest = hashlib.sha256()
    for path, entry in sorted(tree.items()):
        digest.update(json.dumps([path, entry.mode, entry.link, hashlib.sha256(entry.data).hexdigest()]).encode())
    return digest.hexdigest()
