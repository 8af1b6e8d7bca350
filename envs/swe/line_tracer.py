"""A pytest plugin without dependencies, copied into a sandbox: which lines of the repository a test run executes.

    PYTHONPATH=DIR CODEWORLD_LINES=lines.json python -m pytest -p line_tracer

writes `{"pkg/m.py": [1, 2, 5], …}` for the files below the work directory. Lines that a module executes while it is
imported count, too. A function of which every line has run is not traced any more.
"""

import json
import os
import sys
import threading

ROOT = os.getcwd() + os.sep
LEFT: "dict[object, set[int] | None]" = {}  # code object → its lines that have not run yet; None for code of others
ALL: "dict[object, set[int]]" = {}  # code object → all its lines


def _enter(code):
    path = code.co_filename
    if path.startswith(ROOT) and "site-packages" not in path:
        ALL[code] = {line for _, _, line in code.co_lines() if line}
        LEFT[code] = set(ALL[code])
    else:
        LEFT[code] = None
    return LEFT[code]


def _line(frame, event, value):
    LEFT[frame.f_code].discard(frame.f_lineno)
    return _line


def _call(frame, event, value):
    code = frame.f_code
    left = LEFT[code] if code in LEFT else _enter(code)
    if not left:
        return None
    left.discard(frame.f_lineno)
    return _line


def covered():
    """Path below the work directory → its lines that have run, sorted."""
    files = {}
    for code, lines in list(ALL.items()):
        files.setdefault(code.co_filename[len(ROOT) :], set()).update(lines - LEFT[code])
    return {path: sorted(lines) for path, lines in sorted(files.items())}


def pytest_unconfigure(config):
    """Write what was found, at the end of the run."""
    sys.settrace(None)
    threading.settrace(None)
    target = os.environ.get("CODEWORLD_LINES")
    if target:
        with open(target, "w") as file:
            json.dump(covered(), file)


if os.environ.get("CODEWORLD_LINES"):
    threading.settrace(_call)
    sys.settrace(_call)
