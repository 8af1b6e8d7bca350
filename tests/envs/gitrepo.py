"""Small git repositories for tests."""

from __future__ import annotations

import subprocess
from pathlib import Path


def git(path: Path, *args: str) -> str:
    options = [
        "-c",
        "user.name=t",
        "-c",
        "user.email=t@t",
        "-c",
        "init.defaultBranch=main",
        "-c",
        "commit.gpgSign=false",
    ]
    done = subprocess.run(["git", *options, "-C", str(path), *args], check=True, capture_output=True)
    return done.stdout.decode(errors="surrogateescape").strip()


def commit(path: Path, files: dict[str, bytes | None], *, tag: str = "") -> str:
    """Put files into a repository (None: remove), made where there is none, and commit; returns the commit."""
    if not (path / ".git").exists():
        path.mkdir(parents=True, exist_ok=True)
        git(path, "init", "-q")
    for name, data in files.items():
        if data is None:
            (path / name).unlink()
        else:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    git(path, "add", "-A")
    git(path, "commit", "-q", "-m", "a commit")
    if tag:
        git(path, "tag", tag)
    return git(path, "rev-parse", "HEAD")
