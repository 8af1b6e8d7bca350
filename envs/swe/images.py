"""Task images: a repository at a commit, installed on a base image, without a registry and without network inside.

    base ─► interpreter (a virtual environment) ─► environment (dependencies) ─► repository (/testbed) ─► a task's own

What each sandbox writes becomes a layer. Wheels are fetched outside and installed inside (`wheels`), so no code of a
repository or a package runs on the host. The repository is installed editable: its source lies in `/testbed` alone, and
`audit` refuses an environment that holds a copy. Tasks of one repository share everything but the last layer, its commits
share the environment.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from envs.sandbox.base import Backend, FileChange, Limits, Result
from envs.sandbox.bases import offer
from envs.sandbox.imagestore import ImageStore
from envs.sandbox.layers import Entry, Tree, read_layer, tree_layer
from envs.sandbox.stacked import StackedSandbox
from envs.swe import requirements
from envs.swe.onecommit import one_commit
from envs.swe.sources import Source
from envs.swe.wheels import MISSING, Interpreter, Unavailable, WheelCache, check_requirement, name_of

TESTBED, VENV = "/testbed", "/opt/venv"
LIMITS = Limits(memory_mb=4096, disk_mb=2048, pids=256, output_kb=1024)
"""Of a sandbox that builds."""
SECONDS = 900.0
"""Wall clock of one step of a build."""
ROUNDS = 12
"""How often an installation is tried again with what was missing."""
RECIPE = 1
"""Part of an environment's key: another recipe builds anew."""
_NOT_KEPT = ("testbed", "tmp", "dev", "proc", "sys", "run", "var/tmp", "var/cache", "root/.cache", "root/.config")
_CACHES = frozenset(("__pycache__", ".pytest_cache", ".eggs", ".mypy_cache", ".ruff_cache", ".hypothesis", ".git"))
_ENV = {"VIRTUAL_ENV": VENV, "PYTHONDONTWRITEBYTECODE": "1"}
_PIP = "PIP_NO_INDEX=1 PIP_FIND_LINKS=/tmp/wheels PIP_NO_CACHE_DIR=1 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1"


class Refused(ValueError):
    """A repository that no image can be made of; one line. `step` says where it ended: base, build, install, audit, tests."""

    def __init__(self, step: str, why: str) -> None:
        super().__init__(f"{step}: {why}")
        self.step = step


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
    """Wall clock of the build."""
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
    limits: Limits = LIMITS,
) -> Environment:
    """The image of a repository, built in a sandbox of `backend` (native), or as `store` already has it.

    base: digest of an image of `store` with bash and `python` (with its `venv` module). cache: where wheels are kept.
    extras: those of the package, and groups, that are installed where they exist. Raises `Refused`, one line, for a
    repository that can't be installed; `ValueError` where wheels can't be fetched.
    """
    offer(store.directory)
    tree, begun = source.tree(), time.monotonic()
    below = interpreter(store, base, backend, python)
    key = _key(RECIPE, below, source.name, source.version, source.commit, _tree_digest(tree), list(extras))
    if known := store.find({"codeworld.key": key}):
        return _remembered(store, known, tree)
    with backend.create(base=below, workdir=TESTBED, files=_files(tree), limits=limits) as box:
        build = _Build(box, WheelCache(cache / "wheels"), _interpreter(store, below))
        build.links(tree)
        report = build.install(tree, source, extras)
        env_layer, captured = _captured(box)
    installed = store.extend(below, [env_layer], created_by=f"codeworld: environment of {source.name}")
    made = {path: entry for path, entry in captured.items() if tree.get(path) != entry and _is_kept(path, tree)}
    layer = tree_layer({**tree, **made}, TESTBED)
    report |= {"installed": installed, "seconds": round(time.monotonic() - begun, 2)}
    report |= {"size": len(env_layer) + len(layer)}
    labels = {"codeworld.key": key, "codeworld.environment": json.dumps(report, sort_keys=True)}
    digest = store.extend(
        installed, [layer], workdir=TESTBED, labels=labels, created_by=f"codeworld: {source.origin} {source.commit}"
    )
    return _remembered(store, digest, tree)


def interpreter(store: ImageStore, base: str, backend: Backend, python: str = "python3") -> str:
    """The image `base` with a virtual environment at `VENV` and the standard library compiled; every environment's base."""
    offer(store.directory)
    key = _key(RECIPE, base, python)
    if known := store.find({"codeworld.interpreter": key}):
        return known
    with backend.create(base=base, workdir=TESTBED, limits=LIMITS) as box:
        probed = box.run(f"{python} -c {shlex.quote(_PROBE)}", timeout=SECONDS)
        if not probed.ok:
            raise Refused("base", f"{base}: {python} does not run there ({_last(probed)}); use an image with Python")
        made = box.run(f"{python} -m venv --without-pip {VENV} && {_compile('stdlib')}", timeout=SECONDS)
        if not made.ok:
            raise Refused("base", f"{base}: no virtual environment can be made there ({_last(made)}); install venv")
        layer, _ = _captured(box)
    paths = {"PATH": f"{VENV}/bin:{_path(store, base)}", **_ENV}
    labels = {"codeworld.interpreter": key, "codeworld.python": probed.text().strip()}
    return store.extend(base, [layer], env=paths, labels=labels, created_by="codeworld: interpreter")


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


# ---- the build, inside ----

_PROBE = """
import json, platform, sys
import venv
libc, version = platform.libc_ver()
print(json.dumps({"version": "%d.%d" % sys.version_info[:2], "machine": platform.machine(),
    "implementation": {"cpython": "cp", "pypy": "pp"}[sys.implementation.name],
    "glibc": version if libc == "glibc" else ""}))
"""

_METADATA = """
import importlib.metadata, json, sys
sys.path.insert(0, "/tmp/pip")
from pip._vendor.packaging.requirements import InvalidRequirement, Requirement
given = json.load(sys.stdin)
normal = lambda name: name.lower().replace("_", "-").replace(".", "-")
own = None
for dist in importlib.metadata.distributions():
    if '"file:///testbed"' in (dist.read_text("direct_url.json") or ""):
        own = dist
def parsed(texts):
    for text in texts:
        try:
            yield Requirement(text)
        except InvalidRequirement:
            pass
def wanted(requirements, extra, seen):
    for r in requirements:
        if r.url or (r.marker and not r.marker.evaluate({"extra": extra})):
            continue
        if own and normal(r.name) == normal(own.metadata["Name"]):
            for inner in r.extras - seen:
                yield from wanted(list(parsed(own.requires or [])), inner, seen | {inner})
            continue
        r.marker = None
        yield str(r)
needs = list(parsed((own.requires or []) if own else []))
offered = (own.metadata.get_all("Provides-Extra") or []) if own else []
required = list(wanted([r for r in needs if not r.marker or "extra" not in str(r.marker)], "", set()))
optional = list(wanted(parsed(given["requirements"]), "", set()))
for extra in offered:
    if normal(extra) in given["extras"]:
        optional += [r for r in wanted(needs, extra, {extra}) if r not in required]
print(json.dumps({"name": own.metadata["Name"] if own else None, "required": required, "optional": optional}))
"""


class _Build:
    """One installation, in one sandbox."""

    def __init__(self, box: Any, wheels: WheelCache, interpreter: Interpreter) -> None:
        if not isinstance(box, StackedSandbox) or not box.id.startswith("native"):
            box.close()
            raise ValueError(f"images are built in native sandboxes, not in {box.id!r}; use the native backend")
        self.box, self.wheels, self.interpreter = box, wheels, interpreter
        self.dropped: list[str] = []
        self._given: set[str] = set()

    def links(self, tree: Tree) -> None:
        """Make the tree's links."""
        lines = []
        for path, entry in tree.items():
            if entry.link is not None:
                parent, _, _ = path.rpartition("/")
                lines.append(f"mkdir -p ./{shlex.quote(parent)}; ln -s -- {shlex.quote(entry.link)} ./{shlex.quote(path)}")
        if lines:
            self._do("\n".join(lines), "build")

    def install(self, tree: Tree, source: Source, extras: Sequence[str]) -> dict[str, Any]:
        """The package, editable, what it and its tests need, and pytest; returns a report of plain values."""
        self._give(["pip"])
        self._do("python -m zipfile -e /tmp/wheels/pip-*.whl /tmp/pip", "build")
        plain = not requirements.build_system(tree)
        if plain:
            place = f"{TESTBED}/src" if any(path.startswith("src/") for path in tree) else TESTBED
            self._do(f"echo {place} > {VENV}/lib/python{self.interpreter.version}/site-packages/testbed.pth", "install")
        else:
            self._editable(source)
        asked = {"requirements": requirements.test_requirements(tree), "extras": list(extras)}
        answer = self.box.run(f"python -c {shlex.quote(_METADATA)}", stdin=json.dumps(asked).encode(), timeout=SECONDS)
        if not answer.ok:
            raise Refused("install", f"its metadata can't be read ({_last(answer)})")
        needs = json.loads(answer.text().splitlines()[-1])
        self._requirements(needs["required"], [r for r in needs["optional"] if name_of(r) not in requirements.TOOLS])
        self._collected(tree)
        self._audit(tree)
        self._do(_compile("purelib"), "install")
        return {
            "python": self.interpreter.version,
            "packages": json.loads(self._do(f"python -c {shlex.quote(_PACKAGES)}", "install").text()),
            "dropped": self.dropped,
            "plain": plain,
        }

    def _editable(self, source: Source) -> None:
        version = source.version or "0.0.1"
        names = ("SETUPTOOLS_SCM_PRETEND_VERSION", "PBR_VERSION", "PDM_BUILD_SCM_VERSION", "POETRY_DYNAMIC_VERSIONING_BYPASS")
        env = " ".join(f"{name}={shlex.quote(version)}" for name in names)
        self._pip(f"--no-deps -e {TESTBED}", "install", env)

    def _requirements(self, required: Sequence[str], optional: Sequence[str]) -> None:
        """All together where that works; else what is required, and each of the others that can be had."""
        needed = [*required, "pytest"]
        try:
            self._give([*needed, *optional])
            self._pip(" ".join(map(shlex.quote, [*needed, *optional])), "install")
            return
        except (Refused, Unavailable) as error:
            if not optional:
                raise error if isinstance(error, Refused) else Refused("install", str(error)) from None
        self._requirements(required, ())
        for requirement in optional:
            self._try(requirement)

    def _try(self, requirement: str) -> bool:
        """Install one more, where it can be had beside what is there."""
        try:
            check_requirement(requirement)
            self._give([requirement])
            self._pip(shlex.quote(requirement), "install")
            return True
        except (Refused, Unavailable) as error:
            self.dropped.append(f"{requirement}: {error}")
            return False

    def _collected(self, tree: Tree) -> None:
        """Modules, plugins and fixtures that a dry run of the tests misses are tried by the names of their packages."""
        own = {part.removesuffix(".py") for path in tree for part in path.split("/")}
        tried: set[str] = set()
        for _ in range(_COLLECT_ROUNDS):
            result = self.box.run(f"cd {TESTBED}; python -m pytest -q --setup-plan -p no:cacheprovider", timeout=SECONDS)
            names = {_PACKAGES_OF.get(name, name) for name in missing_modules(result.text()) if name not in own}
            if not any([self._try(name) for name in sorted(names - tried)]):
                return
            tried |= names

    def _audit(self, tree: Tree) -> None:
        """Refuse an environment with another copy of what the repository's packages hold, from which tasks could be solved.

        A copy is a module of the same path and the same name as one of the repository, of another distribution.
        """
        answer = self._do(f"python -c {shlex.quote(_COPIES)}", "audit", stdin=json.dumps(_modules(tree)).encode())
        copies = json.loads(answer.text().splitlines()[-1])
        if copies:
            raise Refused("audit", f"{len(copies)} copies of its modules lie in the environment, first {copies[0]}")

    def _pip(self, args: str, step: str, env: str = "") -> None:
        """`pip install` inside; files that it misses are fetched, and it is tried again."""
        asked: set[str] = set()
        for _ in range(ROUNDS):
            command = f"cd /tmp && env {_PIP} {env} python /tmp/pip/pip install --quiet --no-compile {args}"
            result = self.box.run(command, timeout=SECONDS)
            if result.ok:
                return
            found = MISSING.search(result.text())
            missing = (found[1] or found[2]).strip() if found else ""
            if not missing or missing in asked:
                raise Refused(step, f"pip install ended with {result.cause} {result.exit}: {_last(result)}")
            asked.add(missing)
            try:
                self._give([missing.partition(" (from")[0].partition(";")[0].strip()])
            except Unavailable as error:
                raise Refused(step, str(error)) from None
        raise Refused(step, f"pip install still misses a requirement after {ROUNDS} rounds, last {missing}")

    def _give(self, wanted: Sequence[str]) -> None:
        """Put the files of requirements, and of what those require, into the sandbox."""
        for path in self.wheels.get(wanted, self.interpreter):
            if path.name not in self._given:
                self.box.write(f"/tmp/wheels/{path.name}", path.read_bytes())
                self._given.add(path.name)

    def _do(self, script: str, step: str, stdin: bytes = b"") -> Result:
        result: Result = self.box.run(script, timeout=SECONDS, stdin=stdin)
        if not result.ok:
            raise Refused(step, f"a step ended with {result.cause} {result.exit}: {_last(result)}")
        return result


_COLLECT_ROUNDS = 5
_PACKAGES_OF = {
    "attr": "attrs", "bs4": "beautifulsoup4", "cv2": "opencv-python-headless", "Crypto": "pycryptodome",
    "dateutil": "python-dateutil", "docx": "python-docx", "git": "GitPython", "jwt": "PyJWT", "magic": "python-magic",
    "pkg_resources": "setuptools<81", "PIL": "Pillow", "serial": "pyserial", "skimage": "scikit-image",
    "sklearn": "scikit-learn", "yaml": "PyYAML", "zmq": "pyzmq", "OpenSSL": "pyOpenSSL", "dotenv": "python-dotenv",
    "--cov": "pytest-cov", "--no-cov": "pytest-cov", "-n": "pytest-xdist", "--dist": "pytest-xdist",
    "--timeout": "pytest-timeout", "--benchmark": "pytest-benchmark", "--asyncio-mode": "pytest-asyncio",
    "--mypy": "pytest-mypy", "--flake8": "pytest-flake8", "--randomly": "pytest-randomly", "--reruns": "pytest-rerunfailures",
    "--doctest-plus": "pytest-doctestplus", "--isort": "pytest-isort", "--black": "pytest-black", "--html": "pytest-html",
    "--sugar": "pytest-sugar", "--django": "pytest-django", "--ds": "pytest-django", "--forked": "pytest-forked",
    "fixture mocker": "pytest-mock", "fixture benchmark": "pytest-benchmark", "fixture freezer": "pytest-freezer",
    "fixture httpserver": "pytest-httpserver", "fixture subtests": "pytest-subtests", "fixture requests_mock": "requests-mock",
    "fixture datadir": "pytest-datadir", "fixture httpx_mock": "pytest-httpx", "fixture snapshot": "syrupy",
    "fixture faker": "Faker", "fixture aiohttp_client": "pytest-aiohttp", "fixture qtbot": "pytest-qt", "fixture fs": "pyfakefs",
}  # fmt: skip
"""Modules whose package is called otherwise; options and fixtures, by the plugin that they come from."""


def missing_modules(output: str) -> set[str]:
    """What pytest's output says is missing: top-level modules, plugins, options (`--cov`) and fixtures (`fixture mocker`)."""
    found = {name.partition(".")[0] for name in re.findall(r"No module named '([A-Za-z][\w.]*)'", output)}
    for line in re.findall(r"unrecognized arguments: ([^\n]+)", output):
        options = [re.match(r"--?[a-z0-9]+(?:-[a-z]+)?", word) for word in line.split()]
        for option in filter(None, options):
            found |= {name for name in _PACKAGES_OF if name.startswith("-") and option[0].startswith(name)}
    for line in re.findall(r"Missing required plugins: ([^\n]+)", output):
        found |= {word.strip() for word in line.split(",")}
    found |= {f"fixture {name}" for name in re.findall(r"fixture '(\w+)' not found", output)} & _PACKAGES_OF.keys()
    return found


_PACKAGES = """
import importlib.metadata, json
print(json.dumps({d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}))
"""

_COPIES = """
import json, os, sys, sysconfig
modules = set(json.load(sys.stdin))
found = []
for top in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
    for where, _, names in os.walk(top):
        for name in names:
            path = os.path.join(where, name)
            if any(path.endswith("/" + module) for module in modules) :
                found.append(path)
print(json.dumps(sorted(found)))
"""


def _modules(tree: Tree) -> list[str]:
    """The repository's modules that an installed copy would have, by the end of their path: `package/module.py`."""
    tests = ("test", "tests", "docs", "examples")
    found = set()
    for path in tree:
        parts = path.removeprefix("src/").removeprefix("lib/").split("/")
        if path.endswith(".py") and parts[0] not in (*tests, "setup.py") and not parts[-1].startswith("test_"):
            if len(parts) == 1 or "/".join([*path.split("/")[:-1], "__init__.py"]) in tree:
                found.add("/".join(parts))
    return sorted(found - {"conftest.py", "noxfile.py", "tasks.py"})


def _captured(box: StackedSandbox) -> tuple[bytes, dict[str, Entry]]:
    """What a sandbox wrote: outside the work directory as a layer, inside as files."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as own:
        box.layer(out, _outside)
        box.layer(own, _inside)
        out.seek(0), own.seek(0)
        return out.read(), read_layer(own, TESTBED.lstrip("/"))


def _outside(path: str) -> bool:
    return not any(path == name or path.startswith(f"{name}/") for name in _NOT_KEPT)


def _inside(path: str) -> bool:
    parts = path.split("/")
    return parts[0] == "testbed" and _CACHES.isdisjoint(parts) and not path.endswith((".pyc", ".pyo"))


def _is_kept(path: str, tree: Tree) -> bool:
    """Whether a file that the installation made belongs to the image: what a build left over may hold copies."""
    return path in tree or path.split("/")[0] not in ("build", "dist")


def _files(tree: Tree) -> dict[str, Any]:
    return {path: FileChange(entry.data, entry.mode) for path, entry in tree.items() if entry.link is None}


def _interpreter(store: ImageStore, digest: str) -> Interpreter:
    return Interpreter(**json.loads(store.labels(digest)["codeworld.python"]))


def _remembered(store: ImageStore, digest: str, tree: Tree) -> Environment:
    report = json.loads(store.labels(digest)["codeworld.environment"])
    made = {path: entry for path, entry in repository(store, digest).items() if tree.get(path) != entry}
    return Environment(digest=digest, made=made, **(report | {"dropped": tuple(report["dropped"])}))


def _compile(place: str) -> str:
    """A command that compiles Python's files so that their contents, not their times, say whether they are current."""
    mode = "compileall.py_compile.PycInvalidationMode.CHECKED_HASH"
    code = f"import compileall, sysconfig as s; compileall.compile_dir(s.get_path({place!r}), quiet=2, invalidation_mode={mode})"
    return f"{VENV}/bin/python -c {shlex.quote(code)}"


def _path(store: ImageStore, digest: str) -> str:
    pairs = (item.partition("=") for item in store.config(digest)["config"].get("Env") or ())
    return {key: value for key, _, value in pairs}.get("PATH") or "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"


def _last(result: Result) -> str:
    """The last lines of an output, as one."""
    lines = [line.strip() for line in result.text().splitlines() if line.strip() and not line.startswith("note:")]
    return " / ".join(lines[-3:])[-300:]


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _tree_digest(tree: Tree) -> str:
    digest = hashlib.sha256()
    for path, entry in sorted(tree.items()):
        digest.update(json.dumps([path, entry.mode, entry.link, hashlib.sha256(entry.data).hexdigest()]).encode())
    return digest.hexdigest()
