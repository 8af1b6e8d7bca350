"""Who is measured: our backends in this process, other projects' environments in theirs, and the floor.

A lane answers `ask(call, **args)` with the times that `workload.Bench` took. Peers are installed into a venv of their own
under the user's cache and never touch this project's packages.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.systems import workload
from benchmarks.systems.workload import Bench
from envs.errors import CodeworldError, Unsupported
from envs.sandbox import Backend, Sandbox, cgroups
from envs.sandbox.helper import cache_dir

PINS = ("mini-swe-agent==2.4.6", "swe-rex==1.4.0")
IMAGE = "codeworld-base:latest"
LABEL = "codeworld.bench"
DEADLINE = 300.0
"""Seconds that a peer may take for one call."""


class Failed(Exception):
    """A lane could not do what it was asked; the text says why."""


class Ours:
    """A lane of one of our backends on one base. `name` is what tables show."""

    def __init__(self, name: str, backend: Backend, base: str = "host") -> None:
        self.name, self.backend, self.base = name, backend, base
        self.bench = Bench(self)

    def start(self, files: dict[str, str]) -> Box:
        """A sandbox with default limits."""
        return Box(self.backend.create(base=self.base, files={path: text.encode() for path, text in files.items()}))

    def ask(self, call: str, args: dict[str, Any]) -> dict[str, float]:
        """Take the measurement in this process."""
        try:
            found: dict[str, float] = getattr(self.bench, call)(**args)
            return found
        except (CodeworldError, RuntimeError, OSError) as error:
            raise Failed(" ".join(f"{error}".split())[:300]) from error

    def close(self) -> None:
        """Close the sandboxes that are kept."""
        self.bench.drain()


class Box:
    """A sandbox as the workload sees it."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox

    def run(self, script: str) -> str:
        """The output of a command that must succeed."""
        result = self.sandbox.run(script, timeout=60)
        if not result.ok:
            raise RuntimeError(f"{self.sandbox.id}: {script[:60]!r} ended with {result}")
        return result.text()

    def fork(self, n: int) -> list[Box]:
        """Copies that go on from here."""
        return [Box(child) for child in self.sandbox.fork(n)]

    def changed(self) -> int:
        """Paths that changed, their contents read as well."""
        return len(self.sandbox.changes())

    def close(self) -> None:
        """End it."""
        self.sandbox.close()


class Floor:
    """The least that a start costs: floor.c, compiled into a temporary directory."""

    def __init__(self, name: str, mode: str, directory: Path) -> None:
        self.name = name
        found = cgroups.hierarchy() if mode == "box" else None
        self.groups = sorted({str(path) for path in found.parents.values()}) if found else []
        self.command = [str(_compiled(directory)), mode]

    def ask(self, call: str, args: dict[str, Any], rounds: int = 5) -> dict[str, float]:
        """The median start of a few."""
        done = subprocess.run([*self.command, str(rounds), *self.groups], capture_output=True, text=True)
        if done.returncode:
            raise Failed(f"floor: {done.stderr.strip()[-200:]}")
        return {"start": sorted(map(float, done.stdout.split()))[rounds // 2]}

    def close(self) -> None:
        """Nothing is kept."""


def _compiled(directory: Path) -> Path:
    program = directory / "floor"
    if not program.exists():
        compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
        if compiler is None:
            raise Unsupported("floor: no C compiler on PATH; install one, e.g. apt-get install gcc libc6-dev")
        source = Path(__file__).with_name("floor.c")
        subprocess.run([compiler, "-O2", "-o", str(program), str(source)], check=True, capture_output=True)
    return program


class Peers:
    """The process in which peers are measured. Everything that it makes in the engine carries one label."""

    def __init__(self, python: Path) -> None:
        self.label = f"{LABEL}={secrets.token_hex(6)}"
        self.home = tempfile.mkdtemp(prefix="codeworld-peers-")
        options = {"image": IMAGE, "label": self.label, "bridge": _bridged(), "python": _python_of(IMAGE)}
        quiet = {"MSWEA_SILENT_STARTUP": "1", "SWE_REX_LOG_STREAM_LEVEL": "CRITICAL", "TMPDIR": self.home}
        self.process = subprocess.Popen(
            [str(python), str(Path(__file__).with_name("peer_driver.py")), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=self.home,
            env=os.environ | quiet | {"MSWEA_GLOBAL_CONFIG_DIR": self.home},
            start_new_session=True,  # a Ctrl-C is ours to handle
        )

    def ask(self, world: str, call: str, args: dict[str, Any]) -> dict[str, float]:
        """One request; raises `Failed`."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin and stdout
        try:
            stdin.write(json.dumps({"world": world, "call": call, "args": args}) + "\n")
            stdin.flush()
        except OSError:
            raise Failed("the peers' process is gone") from None
        line = stdout.readline() if select.select([stdout], [], [], DEADLINE)[0] else ""
        if not line:
            self.kill()
            raise Failed(f"the peers' process gave no answer to {call} in {DEADLINE:.0f} s")
        reply = json.loads(line)
        if "error" in reply:
            raise Failed(reply["error"])
        found: dict[str, float] = reply["ok"]
        return found

    def kill(self) -> None:
        """End the process and what it started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()

    def close(self) -> None:
        """End the process; remove containers, images and directories of its making."""
        self.kill()
        while workload.sweep(self.label):  # the engine may still be making the last one
            time.sleep(1)
        shutil.rmtree(self.home, ignore_errors=True)


class Peer:
    """A lane of one peer's environment."""

    def __init__(self, name: str, world: str, peers: Peers) -> None:
        self.name, self.world, self.peers = name, world, peers

    def ask(self, call: str, args: dict[str, Any]) -> dict[str, float]:
        """Take the measurement in the peers' process."""
        return self.peers.ask(self.world, call, args)

    def close(self) -> None:
        """`Peers.close` ends all."""


def install() -> Path:
    """The Python of the peers' venv, made at first use (a minute or two)."""
    home = cache_dir() / ("peers-" + "-".join(pin.partition("==")[2] for pin in PINS))
    python, done = home / "bin/python", home / "installed"
    if not done.exists():
        print(f"sandbox: installing {', '.join(PINS)} into {home}", flush=True)
        steps = (
            [sys.executable, "-m", "venv", "--clear", str(home)],
            [str(python), "-m", "pip", "install", "-q", *PINS],
        )
        for step in steps:
            made = subprocess.run(step, capture_output=True, text=True)
            if made.returncode:
                raise Failed(f"peers: {' '.join(step[-4:])} failed: {' '.join(made.stderr.split())[-200:]}")
        done.touch()
    return python


def _bridged() -> bool:
    return bool(workload.docker("network", "ls", "-q", "--filter", "driver=bridge").split())


def _python_of(image: str) -> str:
    script = "import sys; print('%d.%d' % sys.version_info[:2])"
    return workload.docker("run", "--rm", "--network", "none", image, "python3", "-c", script).strip()
