"""What a repository says that it needs: read from its files here, as data; evaluated inside the sandbox.

Build requirements are the installer's business. Runtime requirements are in the installed package's metadata. What tests
need is said in many ways, all of which are read: extras, dependency groups (PEP 735), the tables of poetry, pdm and uv,
tox's `deps`, requirements files.
"""

from __future__ import annotations

import configparser
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from envs.sandbox.capture import Tree
from envs.swe.wheels import name_of

EXTRAS = ("test", "tests", "testing", "test-suite", "pytest", "dev", "develop", "development")
"""Names of extras, groups and tables that hold what tests need, in normal form."""
FILES = tuple(
    [f"requirements{mark}{word}.txt" for mark in "-_/" for word in ("test", "tests", "testing", "dev")]
    + [f"{word}{mark}requirements.txt" for mark in "-_/" for word in ("test", "tests", "dev")]
)
"""Requirements files by their usual names."""
TOOLS = frozenset(
    [
        "auditwheel",
        "autopep8",
        "bandit",
        "black",
        "build",
        "bump2version",
        "bumpversion",
        "check-manifest",
        "codecov",
        "commitizen",
        "coveralls",
        "cruft",
        "docformatter",
        "flake8",
        "furo",
        "gitpython",
        "hatch",
        "interrogate",
        "ipdb",
        "ipython",
        "isort",
        "jupyter",
        "mkdocs",
        "mkdocs-material",
        "mypy",
        "myst-parser",
        "nox",
        "pdbpp",
        "pip",
        "pip-tools",
        "pre-commit",
        "pycodestyle",
        "pydocstyle",
        "pyflakes",
        "pylint",
        "pyright",
        "pyroma",
        "pytest-black",
        "pytest-checkdocs",
        "pytest-enabler",
        "pytest-flake8",
        "pytest-isort",
        "pytest-mypy",
        "pytest-pylint",
        "pytest-ruff",
        "pyupgrade",
        "python-semantic-release",
        "radon",
        "readme-renderer",
        "release",
        "rst2pdf",
        "ruff",
        "safety",
        "setuptools-scm",
        "sphinx",
        "sphinx-autobuild",
        "sphinx-rtd-theme",
        "towncrier",
        "tox",
        "tox-uv",
        "twine",
        "types-pyyaml",
        "uv",
        "validate-pyproject",
        "vulture",
        "wheel",
        "zest-releaser",
    ]
)
"""What development lists name beside the tests' own needs. Where a test does import one, collection tells."""
_DEPTH = 8


def build_system(tree: Tree) -> bool:
    """Whether there is something to install: a `setup.py`, or a `pyproject.toml` that describes a package."""
    return "setup.py" in tree or not {"project", "build-system"}.isdisjoint(pyproject(tree))


def pyproject(tree: Tree) -> dict[str, Any]:
    """`pyproject.toml`; empty where there is none that can be read."""
    return _toml(tree, "pyproject.toml")


def build_requirements(tree: Tree) -> list[str]:
    """What building the package will surely ask for, as far as it is said without markers. The installer knows the rest."""
    table = _dict(pyproject(tree).get("build-system"))
    found = (
        _strings(table["requires"]) if "requires" in table else ["setuptools", "wheel"] if build_system(tree) else []
    )
    if any(name_of(requirement) == "hatchling" for requirement in found):
        found.append("editables")  # asked for by its hook for editable installations
    return [requirement for requirement in found if ";" not in requirement]


def test_requirements(tree: Tree) -> list[str]:
    """Requirements (PEP 508, with markers) that the repository's files name for its tests, tools left out.

    What is broken is passed over, as these are hints.
    """
    raw = pyproject(tree)
    tool = _dict(raw.get("tool"))
    found = [*_groups(_dict(raw.get("dependency-groups")))]
    for table in (_dict(tool.get("pdm")).get("dev-dependencies"), _dict(tool.get("hatch")).get("envs")):
        for name, value in _dict(table).items():
            if _is_test(name):
                found += _strings(value if isinstance(value, list) else _dict(value).get("dependencies"))
    found += _strings(_dict(tool.get("uv")).get("dev-dependencies"))
    found += _poetry(_dict(tool.get("poetry")))
    found += _tox(tree)
    for path in FILES:
        found += _file(tree, path, 0)
    kept = [requirement for requirement in found if name_of(requirement) and name_of(requirement) not in TOOLS]
    return list(dict.fromkeys(kept))


def _toml(tree: Tree, path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(tree[path].data.decode())
    except (KeyError, ValueError, RecursionError):
        return {}


def _dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _strings(value: Any) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _is_test(name: str) -> bool:
    return re.sub(r"[-_.]+", "-", name).lower().removeprefix("hatch-") in EXTRAS


def _groups(groups: Mapping[str, Any]) -> Iterator[str]:
    def items(name: str, depth: int) -> Iterator[str]:
        for item in groups.get(name) or () if isinstance(groups.get(name), list) and depth < _DEPTH else ():
            if isinstance(item, str):
                yield item
            elif isinstance(item, dict):
                yield from items(str(item.get("include-group")), depth + 1)

    for name in groups:
        if _is_test(name):
            yield from items(name, 0)


def _poetry(table: Mapping[str, Any]) -> Iterator[str]:
    """Names only: poetry's version ranges are its own."""
    groups = [_dict(value).get("dependencies") for name, value in _dict(table.get("group")).items() if _is_test(name)]
    for group in (table.get("dev-dependencies"), *groups):
        yield from _dict(group)


def _tox(tree: Tree) -> list[str]:
    parser = configparser.RawConfigParser(strict=False)
    try:
        parser.read_string(tree["tox.ini"].data.decode())
        lines = parser.get("testenv", "deps", fallback="").splitlines()
    except (KeyError, ValueError, configparser.Error):
        return []
    found = []
    for line in lines:
        if line.startswith("-r"):
            found += _file(tree, line.removeprefix("-r").strip().removeprefix("{toxinidir}/"), 0)
        elif not line.startswith("-"):  # `py311: name` is for one factor; all are taken
            found.append(line.rpartition(": ")[2])
    return found


def _file(tree: Tree, path: str, depth: int) -> list[str]:
    entry = tree.get(path)
    if entry is None or entry.link is not None or depth > _DEPTH:
        return []
    found = []
    for line in entry.data.decode("utf-8", "replace").splitlines():
        line = line.partition(" #")[0].strip()
        include = re.match(r"(?:-r|--requirement)[ =]?\s*(\S+)", line)
        if include:
            found += _file(tree, str(PurePosixPath(path).parent / include[1]), depth + 1)
        elif line and line[0] not in "#-./":
            found.append(line.partition(" --hash")[0].rstrip(" \\"))
    return found
