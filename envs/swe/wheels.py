"""Wheels for a sandbox that has no network: fetched here by pip, installed there.

Only wheels are asked of pip (`--only-binary=:all:`), so no package's code runs here. What has no wheel is fetched as a
source distribution, unread, to be built inside the sandbox. What was fetched for a list of requirements is remembered, so
the same list gives the same files again, without network.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from envs.swe.index import sdist

SECONDS = 600.0
"""Wall clock of one `pip download`."""
MISSING = re.compile(
    r"No matching distribution found for ([^\n]+)|Could not find a version that satisfies the requirement ([^\n(]+)"
)
"""How pip says that it has no file for a requirement."""
_REQUIREMENT = re.compile(r"^\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*(\[[A-Za-z0-9._, -]*\])?\s*(.*?)\s*$")


@dataclass(frozen=True)
class Interpreter:
    """Whom the wheels are for, as pip names it."""

    version: str
    """"3.11"."""
    implementation: str = "cp"
    machine: str = "x86_64"
    glibc: str = "2.17"
    """Version of the C library; "" for musl."""

    def options(self) -> list[str]:
        """The options of `pip download` that select its wheels."""
        plain = self.version.replace(".", "")
        abis = [f"{self.implementation}{plain}", "abi3", "none"]
        if self.glibc:
            minor = int(self.glibc.split(".")[1])
            platforms = [f"manylinux_2_{n}_{self.machine}" for n in range(minor, 4, -1)]
            platforms += [f"{old}_{self.machine}" for old in ("manylinux2014", "manylinux2010", "manylinux1", "linux")]
        else:
            platforms = [f"musllinux_1_{n}_{self.machine}" for n in (2, 1, 0)]
        found = ["--implementation", self.implementation, "--python-version", self.version]
        return [*found, *(f"--abi={abi}" for abi in abis), *(f"--platform={name}" for name in platforms)]


class Unavailable(ValueError):
    """No files satisfy what is required; `requirement` says which has none, "" where several exclude each other."""

    def __init__(self, requirement: str, why: str) -> None:
        super().__init__(f"requirement {requirement!r}: {why}" if requirement else f"requirements {why}")
        self.requirement = requirement


class WheelCache:
    """Wheels and source distributions, kept below one directory. Several processes may use it at once."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files, self._lists = directory / "files", directory / "lists"
        for path in (self._files, self._lists):
            path.mkdir(parents=True, exist_ok=True)

    def get(self, requirements: Iterable[str], interpreter: Interpreter) -> list[Path]:
        """Files that satisfy `requirements` (PEP 508, without markers) and all that those require in turn.

        Raises `Unavailable` for a requirement that has neither a wheel nor a source distribution, and for those that exclude
        each other; `ValueError` for what pip says else.
        """
        wanted = sorted(set(requirements))
        if not wanted:
            return []
        for requirement in wanted:
            check_requirement(requirement)
        key = hashlib.sha256(json.dumps([wanted, interpreter.options()]).encode()).hexdigest()
        memory = self._lists / f"{key}.json"
        if memory.is_file():
            paths = [self._files / name for name in json.loads(memory.read_bytes())]
            if all(path.is_file() for path in paths):
                return paths
        with tempfile.TemporaryDirectory(dir=self.directory, prefix=".draft-") as scratch:
            self._download(wanted, interpreter, Path(scratch))
            names = sorted(path.name for path in Path(scratch).iterdir())
            for name in names:
                Path(scratch, name).rename(self._files / name)
        draft = self._lists / f".{key}.{os.getpid()}"
        draft.write_text(json.dumps(names))
        draft.rename(memory)
        return [self._files / name for name in names]

    def _download(self, wanted: Sequence[str], interpreter: Interpreter, to: Path) -> None:
        """Wheels by pip; what has none as a source distribution, whose own requirements show when it is built."""
        left = list(wanted)
        while left:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
            command += ["--only-binary=:all:", "--dest", str(to), *interpreter.options(), "--", *left]
            done = _pip(command)
            if done.returncode == 0:
                return
            missing = name_of(_missing(done.stderr) or "")
            found = [requirement for requirement in left if name_of(requirement) == missing]
            if "ResolutionImpossible" in done.stderr:
                raise Unavailable("", f"{', '.join(left)[:200]} exclude each other")
            if not missing:
                cause = " ".join(done.stderr.split())[-300:]
                raise ValueError(f"requirements {', '.join(left)[:200]}: pip download failed ({cause})")
            self._source(_missing(done.stderr) or "", interpreter, to)
            if not found:  # required by one of them, and pip takes no source: leave that to the sandbox
                self._each(left, interpreter, to)
                return
            left = [requirement for requirement in left if requirement not in found]

    def _each(self, wanted: Sequence[str], interpreter: Interpreter, to: Path) -> None:
        """The requirements' own wheels, without what they require."""
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
        command += ["--only-binary=:all:", "--no-deps", "--dest", str(to), *interpreter.options(), "--", *wanted]
        done = _pip(command)
        if done.returncode:
            raise Unavailable(_missing(done.stderr) or ", ".join(wanted), "no wheel of it fits")

    def _source(self, requirement: str, interpreter: Interpreter, to: Path) -> None:
        """The source distribution of what has no wheel."""
        name = name_of(requirement)
        exact = re.search(r"==\s*([A-Za-z0-9.!+_-]+)\s*$", requirement)
        try:
            path = sdist(name, exact[1] if exact else "", self.directory, interpreter.version)
        except ValueError as error:
            raise Unavailable(requirement.strip(), f"no wheel of it fits, and {error}") from None
        shutil.copyfile(path, to / path.name)


def name_of(requirement: str) -> str:
    """The normal form of a requirement's name; "" where it has none."""
    match = _REQUIREMENT.match(requirement)
    return re.sub(r"[-_.]+", "-", match[1]).lower() if match else ""


def check_requirement(requirement: str) -> None:
    """Refuse what pip would read as an option, a path or an address. Raises `Unavailable`."""
    match = _REQUIREMENT.match(requirement)
    if match is None or "@" in requirement or "/" in requirement or "\n" in requirement or ";" in requirement:
        raise Unavailable(requirement[:100], "neither a name nor a name with versions; it is not fetched")


def _missing(output: str) -> str | None:
    found = MISSING.search(output)
    return (found[1] or found[2]).strip() if found else None


def _pip(command: list[str]) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS, env=kept, stdin=subprocess.DEVNULL, check=False
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"pip download took more than {SECONDS:.0f} s; check the network") from None
    if "No module named pip" in done.stderr:
        raise ValueError(f"{sys.executable} has no pip, which fetches wheels; python -m ensurepip")
    return done
