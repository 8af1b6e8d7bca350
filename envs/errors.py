"""The errors of codeworld, drawn once.

    CodeworldError
    ├── InfraError          the world broke, not the policy: never becomes a reward
    │   └── SandboxDead     a sandbox stopped answering; the episode is masked and refilled
    └── Unsupported         this host or backend cannot give what was asked for (a user can remedy it)

A user's mistake is a plain `ValueError` whose one line names the value, the cause and the remedy; command lines print it
without a traceback and exit with status 2 (`user_errors`). What the *policy* did wrong is data, never an exception.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path


class CodeworldError(Exception):
    """Root of all errors that codeworld raises on purpose."""


class InfraError(CodeworldError):
    """The infrastructure failed (sandbox, engine, daemon, disk); the episode must be masked and tried again."""


class SandboxDead(InfraError):
    """The sandbox no longer answers; nothing about the policy can be concluded from it."""


class Unsupported(CodeworldError, ValueError):
    """A limit or feature that this host or backend can't provide; the message names it, the cause and the remedy."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the closest known name, or an empty string: the tail of an unknown-name message."""
    match = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""


def check_output(option: str, path: str | Path | None) -> None:
    """Before the work: can the file that a command is to write at its end be written? Raises `ValueError`."""
    if path is None:
        return
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        cause = (
            "a directory" if path.is_dir() else "not writable" if path.parent.is_dir() else "its directory is missing"
        )
        raise ValueError(f"{option} {path}: {cause}; name a file that can be written")


def user_errors(main: Callable[[], int]) -> int:
    """Run a command line: a `ValueError` is the user's mistake, printed as one line; returns the exit status.

    Status 0 it ran, 1 it ran and failed, 2 it could not be run as asked. Ctrl-C is 130.
    """
    try:
        return main()
    except (ValueError, InfraError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
