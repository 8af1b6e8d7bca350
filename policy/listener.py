"""JSON over HTTP/1.1 on the standard library: routes, a key, errors in OpenAI's form. It knows nothing of policies.

A thread per connection. A route gets the request's object and a `Request`; it returns an object, or raises `Refusal`.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from envs.errors import InfraError

IDLE = 75.0
"""Seconds that a connection may be silent."""


class Refusal(Exception):
    """A request that isn't answered as asked: status, OpenAI's code, and why."""

    def __init__(self, status: int, code: str, why: str) -> None:
        super().__init__(why)
        self.status, self.code = status, code


class Request:
    """What a route may want to know beside the body."""

    def __init__(self, handler: BaseHTTPRequestHandler) -> None:
        self._handler = handler

    def header(self, name: str) -> str:
        """A header of the request; "" where it has none."""
        return self._handler.headers.get(name) or ""

    def gone(self) -> bool:
        """Whether the client has closed the connection."""
        poll = select.poll()
        poll.register(self._handler.connection, select.POLLIN)
        if not poll.poll(0):
            return False
        try:
            return self._handler.connection.recv(1, socket.MSG_PEEK) == b""
        except OSError:
            return True


Route = Callable[[Mapping[str, Any], Request], dict[str, Any]]


class Listener:
    """Answers `routes` ("POST /v1/x" → what answers) until it is closed. `ValueError` where it can't listen."""

    def __init__(self, routes: Mapping[str, Route], *, host: str, port: int, key: str, max_bytes: int) -> None:
        """key: what clients send as `Authorization: Bearer KEY`, but for /health; max_bytes: largest body."""
        if not key and not _is_loopback(host):
            raise ValueError(f"host {host!r} is reached by others, who may use the model; set a key (--key-env)")
        handler = type("Handler", (_Handler,), {"routes": routes, "key": key, "max_bytes": max_bytes})
        try:
            self._http = _HTTP((host, port), handler)
        except (OSError, OverflowError) as error:
            raise ValueError(f"can't listen on {host}:{port}: {error}; choose another host or port") from None
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.1,), name="listener", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """`host:port` as it came out."""
        host, port = self._http.server_address[:2]
        return f"{host!s}:{port}"

    def close(self) -> None:
        """Stop listening. Requests under way end by themselves."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


class _HTTP(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that breaks is its client's affair, anything else a bug of ours."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = IDLE
    wbufsize = -1  # head and body leave together
    disable_nagle_algorithm = True
    routes: Mapping[str, Route]
    key: str
    max_bytes: int

    def do_GET(self) -> None:
        """Answer a request without a body."""
        self._reply()

    def do_POST(self) -> None:
        """Answer a request with a JSON object."""
        self._reply()

    def _answer(self) -> dict[str, Any]:
        data = self._data() if self.command == "POST" else b"{}"  # read first: who is refused must be able to read why
        path = self.path.partition("?")[0].rstrip("/")
        if self.key and path != "/health":
            given = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), self.key.encode()):
                raise Refusal(401, "invalid_api_key", "the key is missing or wrong; send Authorization: Bearer KEY")
        route = self.routes.get(f"{self.command} {path}")
        if route is None:
            why = f"there is no {self.command} {path}; there are {', '.join(self.routes)}"
            raise Refusal(404, "unknown_route", why)
        try:
            body = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise Refusal(400, "invalid_json", f"the body is no JSON: {error}") from None
        if not isinstance(body, dict):
            raise Refusal(400, "invalid_json", "the body is no JSON object")
        return route(body, Request(self))

    def _data(self) -> bytes:
        try:
            size = int(self.headers["Content-Length"])
        except (TypeError, ValueError):
            raise Refusal(411, "length_required", "send the size of the body as Content-Length") from None
        if not 0 <= size <= self.max_bytes:
            raise Refusal(413, "too_large", f"a body of {size} bytes; at most {self.max_bytes} are read")
        try:
            return self.rfile.read(size)
        except TimeoutError:
            raise Refusal(408, "timeout", f"the body did not come within {IDLE:g} seconds") from None

    def _reply(self) -> None:
        try:
            status, body = 200, self._answer()
        except Refusal as refusal:
            status, body = refusal.status, _error(refusal.status, refusal.code, refusal)
        except InfraError as error:
            status, body = 503, _error(503, "engine", error)
        except ValueError as error:
            status, body = 400, _error(400, "invalid_request", error)
        except Exception as error:
            print(f"{self.command} {self.path}: {type(error).__name__}: {error}", file=sys.stderr)
            status, body = 500, _error(500, "internal", "a bug of the server; what it printed says more")
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if unread := status in (408, 411, 413):
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        self.wfile.write(data)
        if unread:
            self._drain()

    def _drain(self) -> None:
        """Take what the client still sends, for a moment: closing before would lose it the answer."""
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(1.0)
        ends = time.monotonic() + 5
        while time.monotonic() < ends and self.connection.recv(1 << 16):
            pass

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the base class's own name)
        """Requests are not logged."""


def _error(status: int, code: str, why: object) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": " ".join(str(why).split()), "type": kind, "param": None, "code": code}}


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
