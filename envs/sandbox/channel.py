"""The owner's end of a sandbox's control stream: framed requests to the broker, one at a time.

The protocol is described at the top of `helper/broker.c`. Nothing here knows how the sandbox is isolated.
"""

from __future__ import annotations

import array
import errno
import os
import socket
import struct
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from envs.errors import SandboxDead

CHUNK = 1 << 20
KEEP_MODE = 0xFFFFFFFF
SCRIPT_MAX = 1 << 20
GRACE = 30.0
"""Seconds past a command's own timeout after which the broker counts as dead (a loaded host is slow, not dead)."""

_HOW = ("exit", "signal", "timeout")


class SetupError(Exception):
    """The sandbox could not be made: `errno` and the step that failed."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.errno = number


@dataclass(frozen=True)
class Reply:
    """What the broker says of one command."""

    how: str
    status: int
    restarted: bool
    total: int
    cwd: str
    head: bytes
    tail: bytes
    wall: float


class Channel:
    """One connected control stream. Any failure to answer in time or in form is `SandboxDead`, for good."""

    def __init__(self, stream: socket.socket) -> None:
        self.stream = stream

    def ready(self, timeout: float) -> int:
        """Wait for the sandbox to be made; returns a descriptor of its work directory. Raises `SetupError`."""
        fds = array.array("i")
        try:
            self.stream.settimeout(timeout)
            head, ancillary, _, _ = self.stream.recvmsg(5, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
            for _, kind, data in ancillary:
                if kind == socket.SCM_RIGHTS:
                    fds.frombytes(data[:4])
            head += self._exactly(5 - len(head))
            body = self._exactly(struct.unpack("<I", head[:4])[0] - 1)
        except OSError as error:
            raise SandboxDead(f"sandbox start: no answer ({error})") from error
        if head[4:] == b"K" and fds:
            return fds[0]
        number, _, text = body.decode("utf-8", "replace").partition(" ")
        raise SetupError(int(number), text)

    def start(self, env: Mapping[str, str], cwd: str | None = None) -> None:
        """Start the shell with exactly this environment, in `cwd` or the work directory."""
        body = b"".join(os.fsencode(f"{key}={value}") + b"\0" for key, value in env.items()) or b"\0"
        if cwd is None:
            self.ask(b"S", body)
        else:
            self.ask(b"s", os.fsencode(cwd) + b"\0" + body)

    def run(self, script: bytes, stdin: bytes, timeout: float, cap: int) -> Reply:
        """Run a script in the shell. Raises `OSError` when the broker couldn't hand it over."""
        head = struct.pack("<III", min(int(timeout * 1000), 0xFFFFFFFF), cap, len(stdin))
        begin = time.perf_counter()
        body = self.ask(b"R", head + stdin + script, timeout + GRACE)
        wall = time.perf_counter() - begin
        how, status, again, total, ncwd, nhead = struct.unpack_from("<BiBQII", body)
        at = struct.calcsize("<BiBQII") + ncwd
        cwd = os.fsdecode(body[at - ncwd : at])
        return Reply(_HOW[how], status, bool(again), total, cwd, body[at : at + nhead], body[at + nhead :], wall)

    def read(self, path: str, limit: int) -> bytes:
        """A regular file's bytes; `OSError` as the sandbox's user would get it, EFBIG past `limit`."""
        data, raw = b"", os.fsencode(path)
        while True:
            body = self._file(path, b"G", struct.pack("<QI", len(data), CHUNK) + raw)
            if (size := struct.unpack_from("<Q", body)[0]) > limit:
                raise OSError(errno.EFBIG, f"{size} bytes, more than the limit of {limit}", path)
            data += body[8:]
            if len(body) == 8 or len(data) >= size:
                return data[:limit]

    def write(self, files: Iterable[tuple[str, bytes, int | None]]) -> None:
        """Create or replace files (path, data, mode; None keeps the mode of a file that is there)."""
        batch, names, size = [], [], 0
        for path, data, mode in files:
            raw, bits = os.fsencode(path), KEEP_MODE if mode is None else mode
            for at in range(0, len(data) or 1, CHUNK):
                part = data[at : at + CHUNK]
                batch.append(struct.pack("<IQQII", bits, at, len(data), len(raw), len(part)) + raw + part)
                names.append(path)
                size += len(batch[-1])
                if size >= CHUNK:
                    self._file(names, b"W", b"".join(batch))
                    batch, names, size = [], [], 0
        if batch:
            self._file(names, b"W", b"".join(batch))

    def ask(self, kind: bytes, body: bytes, timeout: float = GRACE) -> bytes:
        """One request and its reply's body. Raises `OSError` for a refused request, `SandboxDead` for no answer."""
        try:
            self.stream.settimeout(timeout)
            self.stream.sendall(struct.pack("<I", len(body) + 1) + kind + body)
            head = self._exactly(5)
            reply = self._exactly(struct.unpack("<I", head[:4])[0] - 1)
        except OSError as error:
            self.stream.close()
            raise SandboxDead(f"the sandbox stopped answering ({error}); its episode can't be judged") from error
        if head[4:] == b"N":
            number, index = struct.unpack("<iI", reply)
            raise OSError(number, os.strerror(number), index)
        return reply

    def _file(self, path: str | list[str], kind: bytes, body: bytes) -> bytes:
        try:
            return self.ask(kind, body)
        except OSError as error:
            number = error.errno or errno.EIO
            text = "not a regular file" if number == errno.EINVAL else os.strerror(number)
            raise OSError(number, text, path if isinstance(path, str) else path[error.filename]) from None

    def _exactly(self, n: int) -> bytes:
        parts = []
        while n:
            part = self.stream.recv(min(n, 1 << 20))
            if not part:
                raise ConnectionResetError("end of stream")
            parts.append(part)
            n -= len(part)
        return b"".join(parts)
