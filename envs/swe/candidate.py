"""A candidate: a bug and its repair, found in history or made by mutation, before any test has run on it.

What a path of a repository is (source, test, neither) is decided here, once for all makers of candidates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

_NOT_SOURCE = frozenset(
    [
        "doc",
        "docs",
        "example",
        "examples",
        "demo",
        "demos",
        "sample",
        "samples",
        "benchmark",
        "benchmarks",
        "bench",
        "script",
        "scripts",
        "tool",
        "tools",
        "ci",
        "vendor",
        "vendored",
        "_vendor",
        "_vendored",
        "third_party",
        "thirdparty",
        "extern",
        "externals",
        "site-packages",
        "node_modules",
        "build",
        "dist",
        "migrations",
    ]
)
_NOT_SOURCE_FILES = frozenset(
    [
        "setup.py",
        "conftest.py",
        "noxfile.py",
        "fabfile.py",
        "tasks.py",
        "version.py",
        "_version.py",
        "__version__.py",
        "__about__.py",
    ]
)
TEST_PARTS = frozenset(["test", "tests", "testing", "unittests"])
"""Directories of tests and of what they need."""
_GENERATED = re.compile(rb"@generated|\bdo not (edit|modify)\b|(auto|automatically |file was |code )generated", re.I)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A bug and its repair. All paths are relative to the repository."""

    id: str
    commit: str = ""
    """The tree that it applies to; "" is the image's own."""
    broken: Mapping[str, bytes | None]
    """Path → file as the agent finds it; None: there is no such file."""
    fixed: Mapping[str, bytes | None]
    """The same paths → file as a right solution has it."""
    tests: Mapping[str, bytes | None] = field(default_factory=dict)
    """Files of the hidden suite that differ from the tree's."""
    statement: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rejected:
    """What could have become a candidate, and why it did not."""

    id: str
    reason: str


def is_test(path: str) -> bool:
    """Whether a path belongs to a test suite: its files, their helpers and their data."""
    pure = PurePosixPath(path)
    name = pure.name
    return (
        not TEST_PARTS.isdisjoint(pure.parts[:-1])
        or name == "conftest.py"
        or (
            pure.suffix == ".py" and (name in ("test.py", "tests.py") or name[:5] == "test_" or name[-8:] == "_test.py")
        )
    )


def is_source(path: str) -> bool:
    """Whether a path is Python that the package's own people wrote: no tests, docs, examples, vendored or build files."""
    pure = PurePosixPath(path)
    return (
        pure.suffix == ".py"
        and not is_test(path)
        and pure.name not in _NOT_SOURCE_FILES
        and not pure.name.endswith(("_pb2.py", "_pb2_grpc.py"))
        and not any(p in _NOT_SOURCE or p.startswith(".") or p.endswith(".egg-info") for p in pure.parts[:-1])
    )


def is_generated(source: bytes) -> bool:
    """Whether the head of a file says that a program wrote it."""
    return _GENERATED.search(b"\n".join(source.splitlines()[:12])) is not None
