"""Checkpoints that exist whole or not at all: written aside, flushed, named by one rename.

What it is: `write` fills a temporary directory, records every file's size and CRC-32 in `manifest.json`, flushes
everything to disk and renames it to `step-000123`; `latest` finds the newest and refuses one that is not what was
written.

What it does not do: it knows nothing of what is inside (`Learner.save` fills the directory), and one process writes at
a time: the lock of the run directory (`rl/journal.py`) sees to that.

A kill at any moment leaves either the old checkpoints or these and the new one, and at most a `.tmp-*` directory which
the next `write` removes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

MANIFEST = "manifest.json"
PROBE = 1 << 20
"""Bytes that are written after a failure: torch's writers don't say that the disk is full, but this raises ENOSPC then."""
_NAME = re.compile(r"step-(\d{6,})")


def write(root: Path, step: int, fill: Callable[[Path], None], keep: int = 2) -> Path:
    """Make the checkpoint of `step` under `root`; returns its directory.

    Args:
        root: made if it is missing.
        step: the learner's version, at least 0. Where it has a checkpoint already, nothing is done: the state of a step
            never changes.
        fill: writes the content into the empty directory it is given. If it raises, nothing changed; OSError with ENOSPC
            where the disk is full, whatever it raised.
        keep: newest checkpoints that stay; older ones are removed after the rename.
    """
    assert step >= 0 and keep >= 1, f"step {step}, keep {keep}"
    root.mkdir(parents=True, exist_ok=True)
    for left in root.glob(".tmp-*"):
        shutil.rmtree(left)
    target, aside = root / f"step-{step:06d}", root / f".tmp-step-{step:06d}"
    if target.exists():
        return target
    aside.mkdir()
    try:
        try:
            fill(aside)
            _seal(aside, step)
        except BaseException:
            (aside / "probe").write_bytes(bytes(PROBE))
            raise
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    aside.rename(target)
    _flush(root)
    _forget(root, keep)
    return target


def steps(root: Path) -> list[int]:
    """Steps that have a checkpoint under `root`, oldest first; their content isn't looked at."""
    names = [_NAME.fullmatch(p.name) for p in root.iterdir()] if root.is_dir() else []
    return sorted(int(m[1]) for m in names if m)


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint directory."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"checkpoint {path}: the name isn't step-NNNNNN; give a directory that training wrote")
    return int(match[1])


def latest(root: Path) -> Path | None:
    """The newest checkpoint under `root`, checked; None where there is none.

    Raises `ValueError` (one line: path, cause, remedy) where the newest is damaged: going back further is the user's
    decision.
    """
    known = steps(root)
    return check(root / f"step-{known[-1]:06d}") if known else None


def check(path: Path) -> Path:
    """Return `path` if it is a whole checkpoint, else raise `ValueError` with path, cause and remedy."""
    cause = _damage(path)
    if cause is None:
        return path
    older = [s for s in steps(path.parent) if s < step_of(path)]
    remedy = f"remove it to go on from {path.parent / f'step-{older[-1]:06d}'}" if older else "remove it to start anew"
    raise ValueError(f"checkpoint {path} is damaged: {cause}; {remedy}")


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    step = step_of(path)
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        written, files = manifest["step"], dict(manifest["files"])
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} can't be read ({type(error).__name__})"
    if written != step:
        return f"it was written for step {written}"
    for name, (size, crc) in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if _crc(file) != crc:
            return f"{name} has another CRC-32 than when it was written"
    return None


def _seal(directory: Path, step: int) -> None:
    """Write the manifest and flush every file and directory to disk."""
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    listed = {str(p.relative_to(directory)): (p.stat().st_size, _crc(p)) for p in files}
    manifest = directory / MANIFEST
    assert manifest.name not in listed, f"{MANIFEST} is this module's own"
    manifest.write_text(json.dumps({"step": step, "files": listed}, indent=1) + "\n")
    for path in [*files, manifest, *(p for p in directory.rglob("*") if p.is_dir()), directory]:
        _flush(path)


def _forget(root: Path, keep: int) -> None:
    """Remove all but the newest `keep`; each is renamed first, so that a kill never leaves half a checkpoint under its
    name."""
    for step in steps(root)[:-keep]:
        (root / f"step-{step:06d}").rename(root / f".tmp-old-{step:06d}")
    for left in root.glob(".tmp-*"):
        shutil.rmtree(left)


def _crc(path: Path) -> int:
    """CRC-32 of a file, read in pieces."""
    value = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            value = zlib.crc32(piece, value)
    return value


def _flush(path: Path) -> None:
    """fsync a file or directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
