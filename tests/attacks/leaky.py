"""A third party's backend that isolates nothing: bash by subprocess on the host, in a directory of its own.

It shows that the attack suite can fail. Only harmless cases may run on it.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from envs.errors import SandboxDead
from envs.sandbox.base import Changes, FileChange, Limits, Result, Snapshot, Usage


class LeakySandbox:
    def __init__(self, files: Mapping[str, bytes | FileChange]) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="leaky-"))
        self.id = self.root.name
        self._closed = False
        for path, data in files.items():
            self.write(path, data.data or b"" if isinstance(data, FileChange) else data)

    def run(self, script: str, *, timeout: float, stdin: bytes = b"") -> Result:
        if self._closed:
            raise SandboxDead("closed")
        began = time.perf_counter()
        try:
            script = script.replace("cd /repo", f"cd {self.root}")
            done = subprocess.run(
                ["bash", "-c", script],
                cwd=self.root,
                input=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            return Result(exit=None, cause="timeout", head=b"", wall=time.perf_counter() - began)
        out = done.stdout
        return Result(exit=done.returncode, cause="exit", head=out, total=len(out), wall=time.perf_counter() - began)

    def read(self, path: str, *, limit: int = 1 << 20) -> bytes:
        return (self.root / path).read_bytes()

    def write(self, path: str, data: bytes, *, mode: int | None = None) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_bytes(data)

    def changes(self) -> Changes:
        return {}

    def snapshot(self) -> Snapshot:
        return Snapshot({}, str(self.root))

    def fork(self, n: int) -> list[LeakySandbox]:
        return [LeakySandbox({}) for _ in range(n)]

    def kill_all(self) -> None:
        pass

    def usage(self) -> Usage:
        return Usage(None, None, None)

    def close(self) -> None:
        self._closed = True
        shutil.rmtree(self.root, ignore_errors=True)

    def __del__(self) -> None:
        self.close()

    def __enter__(self) -> LeakySandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LeakyBackend:
    name = "leaky"

    def create(
        self,
        *,
        base: str = "host",
        workdir: str = "/repo",
        files: Mapping[str, bytes | FileChange] | None = None,
        limits: Limits | None = None,
    ) -> LeakySandbox:
        return LeakySandbox(files or {})

    def close(self) -> None:
        pass
