"""Do sandboxes keep somebody else's contract? Runs Inspect AI's own sandbox checks on each backend.

Inspect AI's `self_check` is written for providers of sandboxes; ours is `examples/inspect_sandbox.py`. Inspect AI is no
dependency: the first run installs it into a virtual environment in the user's cache.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.systems.base import row
from envs.sandbox import BACKENDS
from envs.sandbox.helper import cache_dir
from rl.config import ROOT

PEER = "inspect_ai==0.3.285"
ONE_USER = "SandboxUserUnsupportedError"
CANNOT_APPLY = {"test_exec_as_user": f"a sandbox has one user, never root: it answers {ONE_USER}"}
"""Checks that ask for what no sandbox of ours has; they are run and shown, and fail in this way only."""


def options(p: argparse.ArgumentParser) -> None:
    """This measurement's own options."""
    p.add_argument("--backend", nargs="+", choices=BACKENDS, default=list(BACKENDS), help="default: %(default)s")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The measurement: one row per check and backend, and their sum."""
    python = interpreter()
    return {"rows": [r for backend in args.backend for r in rows(backend, ask(python, backend))], "peer": PEER}


def interpreter() -> Path:
    """The Python that has Inspect AI beside what this one has; made once. Raises `ValueError` where it can't be."""
    name = hashlib.sha256(f"{PEER} {sys.prefix}".encode()).hexdigest()[:12]
    home = cache_dir() / f"inspect-{name}"
    if not (home / "ready").exists():
        print(f"selfcheck: installing {PEER} into {home}", flush=True)
        remedy = "check the package index that pip uses"
        _call(f"installing {PEER}", remedy, sys.executable, "-m", "venv", "--clear", str(home))
        _call(f"installing {PEER}", remedy, str(home / "bin/python"), "-m", "pip", "install", "-q", PEER)
        (site,) = home.glob("lib/python*/site-packages")
        (site / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")  # after its own on the path
        (home / "ready").touch()
    return home / "bin/python"


def ask(python: Path, backend: str) -> list[dict[str, Any]]:
    """Run the checks in a process of that interpreter: name, seconds and error (empty: passed) of each."""
    program = f"from {__name__} import main; main({backend!r})"
    out = _call(f"self-check of {backend}", "or choose another --backend", str(python), "-c", program)
    found: list[dict[str, Any]] = json.loads(out.splitlines()[-1])
    return found


def rows(backend: str, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one backend."""
    result, expected = [], 0
    for check in found:
        name, error = check["name"], check["error"]
        reason = CANNOT_APPLY.get(name, "") if error.startswith(ONE_USER) else ""
        expected += not reason
        unit = "can't apply" if reason else "FAIL" if error else "pass"
        goal = "" if reason else ">=1"
        what = f"{backend}: {name}"
        result.append(row(what, not error, unit=unit, goal=goal, backend=backend, spread=reason or error))
    passed = sum(not check["error"] for check in found)
    what = f"{backend}: passed, of {len(found)} checks"
    return [*result, row(what, passed, unit="checks", goal=f">={expected}", backend=backend, n=len(found))]


def main(backend: str) -> None:
    """Inside the interpreter with Inspect AI: print the outcome of every check as one line of JSON."""
    print(json.dumps(asyncio.run(_checks(backend))))


async def _checks(backend: str) -> list[dict[str, Any]]:
    ours = import_module("examples.inspect_sandbox")
    checks = import_module("inspect_ai.util._sandbox.self_check")
    registry = import_module("inspect_ai.util._sandbox.registry")
    provider = registry.registry_find_sandboxenv("codeworld")
    boxes = await provider.sample_init("selfcheck", ours.Options(backend=backend), {})
    found = []
    try:
        for name in checks.__all__:
            began, error = time.monotonic(), ""
            try:
                await getattr(checks, name)(boxes["default"])
            except Exception as failure:
                error = f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
            found.append({"name": name, "seconds": round(time.monotonic() - began, 2), "error": error})
    finally:
        await provider.sample_cleanup("selfcheck", backend, boxes, False)
    return found


def _call(what: str, remedy: str, *command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    if done.returncode:
        cause = (done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}").splitlines()[-1]
        raise ValueError(f"{what}: {cause}; {remedy}")
    return done.stdout
