"""`ast.parse` for programs with threads."""

from __future__ import annotations

import ast
import threading

_ONE = threading.Lock()


def parse(source: str | bytes) -> ast.Module:
    """The tree of a module, as `ast.parse`, one thread at a time: CPython before 3.11.8 and 3.12.2 keeps the depth of the
    conversion in one place for all threads and fails with `SystemError` where two meet (gh-106905)."""
    with _ONE:
        return ast.parse(source)
