"""One installation inside a sandbox without network: the package, editable, what it and its tests need, and pytest.

pip is run inside, and is told to use nothing but the files that it is given. It builds in an environment of its own that
is gone afterwards, so no build requirement stays (setuptools, for one, holds copies of other packages). What it says that
it misses is fetched outside, and it is tried again: so the interpreter inside decides what is required.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from collections.abc import Sequence
from typing import Any

from envs.sandbox.base import Result
from envs.sandbox.capture import Tree
from envs.sandbox.stacked import StackedSandbox
from envs.swe import requirements
from envs.swe.sources import Source
from envs.swe.wheels import MISSING, Interpreter, Unavailable, WheelCache, check_requirement, name_of

TESTBED, VENV, PIP = "/testbed", "/opt/venv", "/opt/pip"
STDLIB, SITE = "s.get_path('stdlib')", "s.get_path('purelib')"
SECONDS = 900.0
"""Wall clock of one step."""
COLLECT_SECONDS = 180.0
"""Wall clock of one dry run of the tests."""
ROUNDS = 12
"""How often an installation is tried again with what was missing."""
_COLLECT_ROUNDS = 5
_PIP = "PIP_NO_INDEX=1 PIP_FIND_LINKS=/tmp/wheels PIP_NO_CACHE_DIR=1 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1"


class Refused(ValueError):
    """A repository that no image can be made of; one line. `step` says where it ended: base, build, install, audit, tests."""

    def __init__(self, step: str, why: str) -> None:
        super().__init__(f"{step}: {why}")
        self.step = step


_METADATA = """
import importlib.metadata, json, sys
sys.path.insert(0, "/opt/pip")
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


class Build:
    """One installation, in one sandbox."""

    def __init__(self, box: StackedSandbox, wheels: WheelCache, interpreter: Interpreter) -> None:
        self.box, self.wheels, self.interpreter = box, wheels, interpreter
        self.dropped: list[str] = []
        self._given: set[str] = set()

    def links(self, tree: Tree) -> None:
        """Make the tree's links."""
        lines = []
        for path, entry in tree.items():
            if entry.link is not None:
                parent, _, _ = path.rpartition("/")
                lines.append(
                    f"mkdir -p ./{shlex.quote(parent)}; ln -s -- {shlex.quote(entry.link)} ./{shlex.quote(path)}"
                )
        if lines:
            self._do("\n".join(lines), "build")

    def install(self, tree: Tree, source: Source, extras: Sequence[str]) -> dict[str, Any]:
        """The package, editable, what it and its tests need, and pytest; returns a report of plain values."""
        with contextlib.suppress(ValueError):  # what is missing is asked for one by one
            self._give(requirements.build_requirements(tree))
        plain = not requirements.build_system(tree)
        if plain:
            self._on_path(tree)
        else:
            self._editable(source)
        needs = self._needs(requirements.test_requirements(tree), extras)
        self._requirements(needs["required"], [r for r in needs["optional"] if name_of(r) not in requirements.TOOLS])
        self._compile()
        if self._collected(tree):
            self._compile()
        if not plain and self._copies(tree):  # a dependency asked for another release of the package itself
            self._editable(source)
        self.audit(tree)
        return self.report(plain)

    def audit(self, tree: Tree) -> None:
        """Raises `Refused` where the environment holds a copy of the repository, from which tasks could be solved."""
        if copies := self._copies(tree):
            raise Refused("audit", f"{len(copies)} copies of its modules lie in the environment, first {copies[0]}")

    def pinned(self, tree: Tree, source: Source, needs: Sequence[str]) -> dict[str, Any]:
        """Exactly `needs`, and the package, editable, with what it requires beside them; nothing is tried out.

        A package whose own installation fails is put on the path instead. Returns a report as `install`.
        """
        if needs:
            self._give(needs)
            self._pip(" ".join(map(shlex.quote, needs)), "install")
        plain = not requirements.build_system(tree)
        if not plain:
            with contextlib.suppress(ValueError):  # what is missing is asked for one by one
                self._give(requirements.build_requirements(tree))
            try:
                self._editable(source)
                self._requirements(self._needs((), ())["required"], ())
            except Refused as error:
                self.dropped.append(f"{source.name}: {error}")
                plain = True
        if plain:
            self._on_path(tree)
        self._compile()
        return self.report(plain)

    def report(self, plain: bool) -> dict[str, Any]:
        """What is in the environment, as plain values."""
        packages = json.loads(self._do(f"python -c {shlex.quote(_PACKAGES)}", "install").text())
        return {"python": self.interpreter.version, "packages": packages, "dropped": self.dropped, "plain": plain}

    def _needs(self, tests: Sequence[str], extras: Sequence[str]) -> dict[str, Any]:
        """What the installed package requires, and what its tests do, as its interpreter decides."""
        asked = {"requirements": list(tests), "extras": list(extras)}
        answer = self.box.run(f"python -c {shlex.quote(_METADATA)}", stdin=json.dumps(asked).encode(), timeout=SECONDS)
        if not answer.ok:
            raise Refused("install", f"its metadata can't be read ({last_words(answer)})")
        found: dict[str, Any] = json.loads(answer.text().splitlines()[-1])
        return found

    def _on_path(self, tree: Tree) -> None:
        """Have the repository's modules found where they lie."""
        place = f"{TESTBED}/src" if any(path.startswith("src/") for path in tree) else TESTBED
        self._do(f"echo {place} > {VENV}/lib/python{self.interpreter.version}/site-packages/testbed.pth", "install")

    def _editable(self, source: Source) -> None:
        version = source.version or "0.0.1"
        names = (
            "SETUPTOOLS_SCM_PRETEND_VERSION",
            "PBR_VERSION",
            "PDM_BUILD_SCM_VERSION",
            "POETRY_DYNAMIC_VERSIONING_BYPASS",
        )
        env = " ".join(f"{name}={shlex.quote(version)}" for name in names)
        self._pip(f"--no-deps -e {TESTBED}", "install", env)

    def _requirements(self, required: Sequence[str], optional: Sequence[str]) -> None:
        """All together where that works; else what is required, and each of the others that can be had beside it."""
        needed = [*required, "pytest"]
        try:
            self._give([*needed, *optional])
            self._pip(" ".join(map(shlex.quote, [*needed, *optional])), "install")
            return
        except (Refused, Unavailable) as error:
            if not optional:
                raise error if isinstance(error, Refused) else Refused("install", str(error)) from None
            name = name_of(error.requirement) if isinstance(error, Unavailable) else ""
            rest = [requirement for requirement in optional if name_of(requirement) != name]
            if len(rest) < len(optional):
                self.dropped.append(f"{name}: {error}")
                self._requirements(required, rest)
                return
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

    def _compile(self) -> None:
        self._do(compile_command(SITE), "install")

    def _collected(self, tree: Tree) -> bool:
        """Try what a dry run of the tests misses, modules, plugins and fixtures, by the names of their packages; returns
        whether anything could be had."""
        own = {part.removesuffix(".py") for path in tree for part in path.split("/")}
        found, tried = False, set[str]()
        for _ in range(_COLLECT_ROUNDS):
            command = f"cd {TESTBED}; python -m pytest -q --setup-plan -p no:cacheprovider"
            result = self.box.run(command, timeout=COLLECT_SECONDS)
            names = {_PACKAGES_OF.get(name, name) for name in missing_modules(result.text()) if name not in own}
            had = [self._try(name) for name in sorted(names - tried)]
            if not any(had):
                break
            found, tried = True, tried | names
        return found

    def _copies(self, tree: Tree) -> list[str]:
        """Modules of the environment that are, by their place, copies of the repository's own: installed beside it, or
        held by another distribution. From them a task could be solved."""
        answer = self._do(f"python -c {shlex.quote(_COPIES)}", "audit", stdin=json.dumps(modules(tree)).encode())
        found: list[str] = json.loads(answer.text().splitlines()[-1])
        return found

    def _pip(self, args: str, step: str, env: str = "") -> None:
        """`pip install` inside; files that it misses are fetched, and it is tried again."""
        asked: set[str] = set()
        for _ in range(ROUNDS):
            command = f"cd /tmp && env {_PIP} {env} python {PIP}/pip install --quiet --no-compile {args}"
            result = self.box.run(command, timeout=SECONDS)
            if result.ok:
                return
            found = MISSING.search(result.text())
            missing = (found[1] or found[2]).strip() if found else ""
            if not missing or missing in asked:
                raise Refused(step, f"pip install ended with {result.cause} {result.exit}: {last_words(result)}")
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
            raise Refused(step, f"a step ended with {result.cause} {result.exit}: {last_words(result)}")
        return result


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
modules, vendors = set(json.load(sys.stdin)), {"_vendor", "vendor", "_vendored", "vendored", "extern"}
found = []
for top in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
    for where, _, names in os.walk(top):
        for name in names:
            parts = os.path.relpath(os.path.join(where, name), top).split("/")
            starts = [0] + [i + 1 for i, part in enumerate(parts) if part in vendors]
            if any("/".join(parts[i:]) in modules for i in starts):
                found.append("/".join(parts))
print(json.dumps(sorted(found)))
"""


def modules(tree: Tree) -> list[str]:
    """The repository's modules that an installed copy would have, by the end of their path: `package/module.py`."""
    elsewhere = ("test", "tests", "docs", "examples", "setup.py")
    found = set()
    for path in tree:
        parts = path.removeprefix("src/").removeprefix("lib/").split("/")
        packaged = len(parts) == 1 or "/".join([*path.split("/")[:-1], "__init__.py"]) in tree
        if path.endswith(".py") and packaged and parts[0] not in elsewhere and not parts[-1].startswith("test_"):
            found.add("/".join(parts))
    return sorted(found - {"conftest.py", "noxfile.py", "tasks.py"})


def compile_command(place: str) -> str:
    """A command that compiles Python's files below `place` (an expression, in which `s` is `sysconfig`) so that their
    contents, not their times, say whether they are current."""
    mode = "compileall.py_compile.PycInvalidationMode.CHECKED_HASH"
    code = f"import compileall, sysconfig as s; compileall.compile_dir({place}, quiet=2, invalidation_mode={mode})"
    return f"python -c {shlex.quote(code)}"


def last_words(result: Result) -> str:
    """What an output says of an error, else its last lines, as one line."""
    lines = [line.strip(" \t│╰─>E") for line in result.text().splitlines()]
    told = [line for line in lines if re.match(r"(ERROR|FAILED|[A-Za-z_.]*(Error|Exception))\b", line)]
    return " / ".join((told or list(filter(None, lines)))[-3:])[-400:]
