"""The owner's end of a sandbox's control stream: framed requests to the broker, one at a time.

`helper/broker.c` describes the protocol. Nothing here knows how the sandbox is isolated.
"""

from __future__ import annotations

import array
import errno
import os
import secrets
import socket
import struct
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from envs.errors import SandboxDead
from envs.sandbox.base import Clock
from envs.sandbox.clocks import Clocks

CHUNK = 1 << 20
KEEP_MODE = 0xFFFFFFFF
PATH_MAX = 4096
SCRIPT_MAX = 1 << 20
STDIN_MAX = 4 << 20
OUTPUT_MAX = 4 << 20
GRACE = 30.0
"""Seconds without an answer after which the broker counts as dead. While a command runs it says now and then that it is
alive, so a starved broker is told from a dead one whatever the timeout is."""

How = Literal["exit", "signal", "timeout"]
_HOW: tuple[How, ...] = ("exit", "signal", "timeout")
_ALIVE = struct.Struct("<IcQ")
_ALIVE_HEAD = struct.pack("<Ic", 9, b"H")


class SetupError(Exception):
    """The sandbox could not be made: `errno` and the step that failed."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.errno = number


@dataclass(frozen=True)
class Reply:
    """What the broker says of one command."""

    how: How
    clock: Clock | None
    status: int
    restarted: bool
    total: int
    cwd: str
    head: bytes
    tail: bytes
    wall: float


class Channel:
    """One connected control stream. Any failure to answer in time or in form is `SandboxDead`, for good."""

    def __init__(self, stream: socket.socket, system_calls: bytes = b"") -> None:
        """system_calls: the filter (see `seccomp`) that the broker is to put on."""
        self.stream = stream
        self.proc = -1
        """A descriptor of the sandbox's /proc, once it is ready."""
        self._more = b""
        if system_calls:
            stream.sendall(struct.pack("<I", len(system_calls)) + system_calls)
        limit = struct.pack("ll", int(GRACE), int(GRACE % 1 * 1e6))  # the kernel's: Python's polls before each call
        for clock in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            stream.setsockopt(socket.SOL_SOCKET, clock, limit)

    def ready(self, timeout: float) -> list[int]:
        """Wait for what was asked for to be made; returns the descriptors that it hands out. Raises `SetupError`."""
        fds = array.array("i")
        try:
            self.stream.settimeout(timeout)
            text, ancillary, flags, _ = self.stream.recvmsg(4096, socket.CMSG_SPACE(16), socket.MSG_CMSG_CLOEXEC)
            for _, kind, data in ancillary:
                if kind == socket.SCM_RIGHTS:
                    fds.frombytes(data[: len(data) // 4 * 4])
            if not text:
                raise ConnectionResetError("end of stream")
            if flags & socket.MSG_CTRUNC:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            self.stream.settimeout(None)
        except OSError as error:
            raise SandboxDead(f"sandbox start: no answer ({error})") from error
        if text[4:5] == b"K":
            return list(fds)
        number, _, reason = text[5:].decode("utf-8", "replace").partition(" ")
        raise SetupError(int(number), reason)

    def start(self, workdir: str, cwd: str, env: Mapping[str, str]) -> None:
        """Start the shell in `cwd` with exactly the environment `env`."""
        words = (workdir, cwd, *(f"{key}={value}" for key, value in env.items()))
        self.ask(b"S", b"".join(os.fsencode(word) + b"\0" for word in words))

    def run(self, script: bytes, stdin: bytes, timeout: float, cap: int, silence: float | None = None) -> Reply:
        """Run a script in the shell. Raises `OSError` when the broker couldn't hand it over."""
        clocks, file = Clocks(self.proc, timeout, silence), b""
        if stdin:
            file = b"/tmp/.stdin-%s" % secrets.token_hex(16).encode()
            self.write([(file.decode(), stdin, 0o600)])
        head = struct.pack("<III", int(clocks.every * 1000), cap, len(file))
        begin = time.perf_counter()
        body, clock = self._ask(b"R", head + file + script, clocks)
        wall = time.perf_counter() - begin
        code, status, again, total, ncwd, nhead = struct.unpack_from("<BiBQII", body)
        at = struct.calcsize("<BiBQII") + ncwd
        cwd, how = os.fsdecode(body[at - ncwd : at]), _HOW[code]
        return Reply(how, clock, status, bool(again), total, cwd, body[at : at + nhead], body[at + nhead :], wall)

    def read(self, path: str, limit: int) -> bytes:
        """A regular file's bytes; `OSError` as the sandbox's user would get it, EFBIG past `limit`."""
        data, raw = bytearray(), _raw(path)
        while True:
            body = self._file(path, b"G", struct.pack("<QI", len(data), CHUNK) + raw)
            if (size := struct.unpack_from("<Q", body)[0]) > limit:
                raise OSError(errno.EFBIG, f"{size} bytes, more than the limit of {limit}", path)
            data += body[8:]
            if len(body) == 8 or len(data) >= size:
                return bytes(data[:limit])

    def write(self, files: Iterable[tuple[str, bytes, int | None]]) -> None:
        """Create or replace files (path, data, mode; None keeps the mode of a file that is there)."""
        batch, names, size = [], [], 0
        for path, data, mode in files:
            raw, bits = _raw(path), KEEP_MODE if mode is None else mode
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

    def ask(self, kind: bytes, body: bytes) -> bytes:
        """One request and its reply's body. Raises `OSError` for a refused request, `SandboxDead` for no answer."""
        return self._ask(kind, body, None)[0]

    def _ask(self, kind: bytes, body: bytes, clocks: Clocks | None) -> tuple[bytes, Clock | None]:
        """Also the clock that ran out, at which everything was killed."""
        try:
            self._send(kind, body)
            answer, reply, clock = self._reply(clocks)
            if clock and _HOW[reply[0]] != "timeout":  # it had ended already; what was to end it is answered by itself
                clock = None
                self._reply(None)
        except BaseException as error:
            self.stream.close()  # also after Ctrl-C: a reply that nobody waits for would answer the next request
            if not isinstance(error, OSError):
                raise
            cause = "timed out" if isinstance(error, BlockingIOError) else error
            raise SandboxDead(f"the sandbox stopped answering ({cause}); its episode can't be judged") from error
        if answer == b"N":
            number, index = struct.unpack("<iI", reply)
            raise OSError(number, os.strerror(number), index)
        return reply, clock

    def _send(self, kind: bytes, body: bytes) -> None:
        self.stream.sendall(struct.pack("<I", len(body) + 1) + kind + body)

    def _file(self, path: str | list[str], kind: bytes, body: bytes) -> bytes:
        try:
            return self.ask(kind, body)
        except OSError as error:
            number = error.errno or errno.EIO
            text = "not a regular file" if number == errno.EINVAL else os.strerror(number)
            raise OSError(number, text, path if isinstance(path, str) else path[error.filename]) from None

    def _reply(self, clocks: Clocks | None) -> tuple[bytes, bytes, Clock | None]:
        """The next answer's kind and body, most of which come in one piece; `clocks` are looked at while it is waited for."""
        data, clock = self._more or self.stream.recv(1 << 17), None
        while True:
            while data.startswith(_ALIVE_HEAD) and len(data) >= _ALIVE.size:
                if clocks and not clock and (clock := clocks.over(_ALIVE.unpack_from(data)[2])):
                    self._send(b"X", b"")
                data = data[_ALIVE.size :]
            end = 4 + int.from_bytes(data[:4], "little")
            if len(data) >= max(5, end) and not data.startswith(_ALIVE_HEAD):
                self._more = data[end:]
                return data[4:5], data[5:end], clock
            part = self.stream.recv(1 << 20)
            if not part:
                raise ConnectionResetError("end of stream")
            data += part


def _raw(path: str) -> bytes:
    try:
        raw = os.fsencode(path)
    except UnicodeEncodeError:
        raise OSError(errno.EILSEQ, os.strerror(errno.EILSEQ), ascii(path)) from None
    if not raw or b"\0" in raw:
        raise OSError(errno.EINVAL, "not a path", path)
    if len(raw) >= PATH_MAX:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), f"{path[:64]}...")
    return raw
