"""RepoAgent: a policy explores a repository until a significant number of its tests run, where the plain build does not get there.

    plain build ─► episode (bash, edit, create, fetch, submit) ─► image ─► discovery in new sandboxes ─► Environment

What comes out is what the plain build gives, `envs.swe.images.Environment`, so all that uses one takes the other: the image
has the agent's installations, the files it made and the variables it exported. What it changed in the repository's own
files is not kept, nor are tests and test configuration that it made; and a test that must fail has to fail there. What
stays open: an environment that knows this test from the repository's.

Source: CWM (`CWM: An Open-Weights LLM for Research on Code Generation with World Models`, executable repository images):
an agent sets a repository up, helped by its documents, and must make a significant number of tests run and pass.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from agents.episode import run_episode
from agents.trajectory import Trajectory
from envs.env import Env
from envs.errors import Unsupported
from envs.sandbox.base import Backend
from envs.sandbox.capture import Tree, tree_layer
from envs.sandbox.imagestore import ImageStore
from envs.sandbox.native import NativeSandbox
from envs.swe import images
from envs.swe.discovery import Discovery, discover, run_suite
from envs.swe.env import SWEEnv
from envs.swe.grading import DROPPED_NAMES, DROPPED_STEMS, Verdict
from envs.swe.images import Environment
from envs.swe.install import SECONDS, SITE, TESTBED, VENV, Build, Refused, compile_command
from envs.swe.sources import Source
from envs.swe.wheels import WheelCache, name_of
from envs.task import Budget, Task
from policy.completion import Policy, Sampling
from policy.renderer import Renderer

TESTS, SHARE = 10, 0.5
"""Significant: so many tests pass, or this share of those that were collected."""
BUDGET = Budget(turns=64, seconds=3600.0, command_seconds=600.0)
_TESTS = ("test_*.py", "*_test.py")
_DOCUMENTS = ("README*", "CONTRIBUTING*", "INSTALL*", "Makefile", "tox.ini", "noxfile.py", ".github/workflows/*.y*ml")
_TELLING = re.compile(r"pytest|\btox\b|\bnox\b|pip install|requirements|\bexport\b|run[^\n]* tests|env:", re.IGNORECASE)
_HINTS, _HINT = 30, 160
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SHELL = ("PWD", "OLDPWD", "SHLVL", "_")
_PIP = """#!/bin/sh
export PIP_NO_INDEX=1 PIP_FIND_LINKS=/tmp/wheels PIP_NO_CACHE_DIR=1 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1
export PYTHONDONTWRITEBYTECODE= PYTHONPYCACHEPREFIX=/tmp/compiled
exec python /opt/pip/pip "$@"
"""
_ASKED = """The Python package {name} lies in {testbed}, in a Linux sandbox without a network. Make its tests run: \
`python -m pytest` in {testbed}, started in a new shell, should pass as many of them as it can.

Packages go into the virtual environment {venv}. `fetch` brings wheels of what you name, and of what that requires, into \
the sandbox, one requirement a line; then `/tmp/pip.sh install` installs them. The repository itself must be installed \
editable (-e {testbed}), never as a copy. What you install, files that you make (generated code, data, directories with a \
file in them) and variables that you export are kept; changes of the repository's own files, tests and test configuration \
are not. Submit when the tests run.

The usual build ended so: {why}
{hints}"""


@dataclass(frozen=True, kw_only=True)
class _Start:
    """Where an episode begins."""

    source: Source
    digest: str
    """The image that the agent finds, with pip and the repository in it."""
    below: str
    """The image that what it does is put on."""
    tree: Tree
    """The repository's own files."""
    why: str
    """How the plain build ended."""
    plain: Environment | None = None
    """What it gave, where the repository could be installed."""
    found: Discovery | None = None
    """What its tests do, where they run."""


class RepoEnv(SWEEnv):
    """One repository to set up an episode; `found` is what the last one made, where that is significant."""

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        store: ImageStore,
        base: str,
        backend: Backend,
        cache: Path,
        tests: int = TESTS,
        share: float = SHARE,
        budget: Budget = BUDGET,
        reward: str = "binary",
        **kwargs: Any,
    ) -> None:
        """
        Args:
            sources: repositories, indexed round and round.
            store: where images are kept. base: digest of an image there with bash and Python.
            backend: a native one.
            cache: where wheels are kept.
            tests: so many of the repository's tests must pass, or
            share: this share of those that were collected.
            budget: of an episode.
            reward: "binary" (1 / 0), or "cwm" (+1 / -1).
            kwargs: those of `SWEEnv`.
        """
        super().__init__(backend=backend, reward=reward, **kwargs)
        self.found: tuple[Environment, Discovery] | None = None
        self._sources, self._store, self._base, self._cache = list(sources), store, base, cache
        self._tests, self._share, self._budget = tests, share, budget
        self._source = lambda split, index: self._task(self._sources[index % len(self._sources)])
        self._starts: dict[str, _Start] = {}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Start on repository `seed`, where its plain build ended. Errors as `envs.swe.images.environment`."""
        self.found = None
        statement, info = super().reset(seed=seed, options=options)
        assert self.task is not None and isinstance(self._sandbox, NativeSandbox)
        self._start = self._starts[self.task.id]
        self._interpreter = images.interpreter_of(self._store, self._start.below)
        self._sandbox.write("/tmp/pip.sh", _PIP.encode(), mode=0o755)
        self._exports, self._begun = self._variables(), time.monotonic()
        return statement, info

    def significant(self, found: Discovery, tree: Tree) -> bool:
        """Whether enough of the repository's own tests pass."""
        own = [outcome for test, outcome in found.tests.items() if test.partition("::")[0] in tree]
        return own.count("pass") >= max(1, min(self._tests, self._share * len(own)))

    def plain(self, source: Source) -> tuple[Environment, Discovery] | None:
        """What the plain build gives, where that is significant: then there is nothing to explore."""
        start = self._started(source)
        if start.plain and start.found and self.significant(start.found, start.tree):
            return start.plain, start.found
        return None

    def _task(self, source: Source) -> Task:
        start = self._started(source)
        hints = "\n".join(hints_of(start.tree))
        told = {"name": source.name, "testbed": TESTBED, "venv": VENV, "why": start.why}
        return Task(
            id=_name(source),
            prompt=_ASKED.format(**told, hints=f"\nIts documents say (they may be wrong):\n{hints}\n" if hints else ""),
            base=start.digest,
            workdir=TESTBED,
            limits=images.LIMITS,
            budget=self._budget,
            tools=("bash", "edit", "create", "fetch", "submit"),
            provenance={"family": "repo", "source": source.origin},
        )

    def _started(self, source: Source) -> _Start:
        """Where the plain build ended, remembered."""
        if _name(source) not in self._starts:
            self._starts[_name(source)] = self._built(source, source.tree())
        return self._starts[_name(source)]

    def _built(self, source: Source, tree: Tree) -> _Start:
        plain = found = None
        below, tools = images.interpreter(self._store, self._base, self.backend, cache=self._cache)
        try:
            plain = images.environment(self._store, self._base, source, self.backend, cache=self._cache)
            below, why = plain.installed, "it is installed"
            found = discover(self.backend, plain.digest)
            broken = f", {len(found.broken)} files can't be collected" if found.broken else ""
            why = f"{why}; {len(found.passing)} of {len(found.tests)} tests pass{broken}"
        except Refused as error:
            why = f"{why}, but {error}" if plain else str(error)
        pip = self._store.blob(self._store.layers(tools)[-1])
        own = tree_layer({**tree, **(plain.made if plain else {})}, TESTBED)
        digest = self._store.extend(below, [pip, own], workdir=TESTBED)
        return _Start(source=source, digest=digest, below=below, tree=tree, why=why, plain=plain, found=found)

    def _act(self, name: str, body: str) -> str:
        return self._fetch(body.split("\n")) if name == "fetch" else super()._act(name, body)

    def _fetch(self, wanted: Sequence[str]) -> str:
        requirements = [line.strip() for line in wanted if line.strip()]
        if any(name_of(requirement) == name_of(self._start.source.name) for requirement in requirements):
            return f"Error: {self._start.source.name} is the repository itself; install it from {TESTBED}."
        try:
            self._give(requirements)
        except ValueError as error:
            return f"Error: {error}."
        except OSError as error:
            return f"Error: /tmp/wheels: {error.strerror or error}."
        return f"Fetched {', '.join(requirements)} and what they require into /tmp/wheels."

    def _give(self, requirements: Sequence[str]) -> None:
        assert self._sandbox is not None
        for path in WheelCache(self._cache / "wheels").get(requirements, self._interpreter):
            self._sandbox.write(f"/tmp/wheels/{path.name}", path.read_bytes())

    def finish(self) -> Verdict:
        """End the episode, make the image and run the tests in it, in new sandboxes."""
        assert self._sandbox is not None
        self._done = True
        try:
            self._sandbox.kill_all()
            made = self._sealed()
        except (Refused, Unsupported) as error:  # such as a file larger than any disk
            return Verdict(outcome="unresolved", why=str(error))
        finally:
            self.close()
        return self._verified(made)

    def fork(self, n: int) -> list[Env]:
        """Refused: an image is made of what one sandbox wrote, not of a snapshot's layers."""
        raise NotImplementedError("RepoEnv cannot be forked; play its episodes from the start")

    def _sealed(self) -> Environment:
        assert isinstance(self._sandbox, NativeSandbox)
        start, box = self._start, self._sandbox
        env = {k: v for k, v in self._variables().items() if self._exports.get(k) != v}
        build = Build(box, WheelCache(self._cache / "wheels"), self._interpreter)
        build.audit(start.tree)
        report = build.report(bool(start.plain and start.plain.plain))
        box.run(compile_command(SITE), timeout=SECONDS)
        tree = {**start.tree, **(start.plain.made if start.plain else {})}
        made = images.sealed(
            self._store, start.below, box, start.source, tree, report, {}, lambda path: _is_kept(path, tree), env
        )
        seconds = round(time.monotonic() - self._begun, 2)
        return replace(images.remembered(self._store, made.digest, start.tree), seconds=seconds)

    def _variables(self) -> dict[str, str]:
        """What the shell exports to a command."""
        assert self._sandbox is not None
        answer = self._sandbox.run("env -0", timeout=60)
        pairs = (item.partition("=") for item in answer.head.decode("utf-8", "replace").split("\0"))
        return {
            key: value
            for key, _, value in pairs
            if answer.ok and not answer.tail and _VARIABLE.fullmatch(key) and key not in _SHELL and "\n" not in value
        }

    def _verified(self, made: Environment) -> Verdict:
        try:
            found = discover(self.backend, made.digest)
        except Refused as error:
            return Verdict(outcome="unresolved", why=str(error))
        if not self._truthful(made, found):
            return Verdict(outcome="invalid", why="a test that must fail does not fail in this environment")
        if not self.significant(found, self._start.tree):
            return Verdict(outcome="unresolved", why=f"{len(found.passing)} of {len(found.tests)} tests pass")
        self.found = made, found
        return Verdict(outcome="resolved", passed=found.passing, similarity=1.0)

    def _truthful(self, made: Environment, found: Discovery) -> bool:
        """Whether a test that must fail is said to fail."""
        name = f"test_{secrets.token_hex(6)}"
        files = {f"{name}.py": f"def {name}():\n    assert False\n".encode()}
        with self.backend.create(base=made.digest, workdir=TESTBED, files=files, limits=images.LIMITS) as box:
            try:
                run = run_suite(box, found.command, SECONDS, tests=[f"{name}.py"])
            except Refused:
                return False
        return run.outcomes.get(f"{name}.py::{name}") == "fail"


def _name(source: Source) -> str:
    return f"repo/{source.name}@{source.commit or source.version}"


def _is_kept(path: str, tree: Tree) -> bool:
    """Whether a file that the agent made or changed in the repository belongs to the image."""
    name = PurePosixPath(path).name
    decides = name in DROPPED_NAMES or name.partition(".")[0] in DROPPED_STEMS
    decides = decides or any(fnmatch(name, pattern) for pattern in _TESTS)
    return path not in tree and not decides and path.partition("/")[0] not in ("build", "dist")


def hints_of(tree: Tree) -> list[str]:
    """Lines of a repository's documents that may tell how to set it up: "file: line", 30 at most."""
    found = []
    for path, entry in sorted(tree.items()):
        if entry.link is None and any(fnmatch(path, pattern) for pattern in _DOCUMENTS):
            lines = entry.data.decode("utf-8", "replace").splitlines()
            found += [f"{path}: {line.strip()[:_HINT]}" for line in lines if _TELLING.search(line)]
    return found[:_HINTS]


@dataclass(frozen=True)
class RepoAgent:
    """A policy sets up what the plain build can't. Its `environment` is a `Setup` (`envs/swe/setup.py`): given by name to
    `python -m envs build --setup`."""

    policy: Policy
    renderer: Renderer
    sampling: Sampling
    attempts: int = 1
    """Episodes before a repository is refused."""
    budget: Budget = BUDGET
    style: str = "cwm"
    played: list[Trajectory] = field(default_factory=list)
    """All episodes so far; a repository whose plain build is enough has none."""

    def environment(
        self, store: ImageStore, base: str, source: Source, backend: Backend, *, cache: Path
    ) -> tuple[Environment, Discovery]:
        """The image of a repository and what its tests do there. Raises `Refused` where no episode got there, else as
        `envs.swe.images.environment`."""
        env = RepoEnv([source], store=store, base=base, backend=backend, cache=cache, budget=self.budget)
        if plain := env.plain(source):
            return plain
        for attempt in range(self.attempts):
            sampling = self.sampling
            if sampling.seed is not None:
                sampling = replace(sampling, seed=sampling.seed + attempt)
            episode = f"{_name(source)}/{attempt}"
            self.played.append(
                run_episode(env, self.policy, self.renderer, sampling, episode=episode, seed=0, style=self.style)
            )
            if env.found:
                return env.found
        last = self.played[-1]
        why = f"{self.attempts} episodes, the last ended {last.stop}: {last.info.get('why', last.outcome)}"
        raise Refused("agent", why)

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"attempts={self.attempts}: a repository is explored at least once; raise it")


__all__ = ["RepoAgent", "RepoEnv", "hints_of"]
