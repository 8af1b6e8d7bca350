"""Calls of a server over HTTP that survive what networks and paid servers do: one deadline, retries, a pace, a bill.

    call ──► money left? ──► a place (concurrency) ──► pace ──► POST ──► 200: count, read, return
                                                        ▲         └────► 408 409 425 429 5xx, cut, stalled: pause, again
                                                        └──────────────────────────────┘

What is left when the deadline comes is an `InfraError`; what the user can mend (key, model, bounds) a `ValueError` at once.
The key is read from an environment variable and stands in no message, file or argument.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import requests
from requests.adapters import HTTPAdapter

from envs.errors import InfraError
from policy.meter import Meter, Pace, Prices, Usage

T = TypeVar("T")
Json = Mapping[str, Any]
AGAIN = (408, 409, 425, 429)
"""Statuses below 500 that may be otherwise the next time."""
BACKOFF, MOST_BACKOFF = 0.5, 30.0
"""Seconds of the first pause, which doubles, and of the longest."""
MOST_BYTES = 256 << 20
"""Largest answer that is read."""
LISTING = 20.0
"""Seconds in which a server must have said which models it has."""
_CONTEXT = ("context length", "context_length", "context window", "too many tokens", "prompt is too long")
_QUOTA = ("insufficient_quota", "billing")


class ContextLimit(ValueError):
    """The conversation is longer than the server's context."""


class Again(Exception):
    """A call failed in a way that the next try may not."""

    def __init__(self, why: str, wait: float = 0.0) -> None:
        """wait: seconds that the server asks for."""
        super().__init__(why)
        self.wait = wait


@dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """Which server is called, and how hard."""

    url: str
    """Base URL of an OpenAI-compatible API, which mostly ends in /v1; that is added where the URL has no path."""
    model: str = ""
    """Name of the model there; empty: the only one that the server lists."""
    key_env: str = ""
    """Environment variable that holds the API key; empty: no key is sent."""
    deadline_s: float = 600.0
    """Longest that one call takes, its waits and retries included, seconds; then InfraError."""
    retries: int = 8
    """Further tries of a call, within its deadline."""
    concurrency: int = 256
    """Calls under way at once; more wait."""
    requests_per_minute: float = 0.0
    """Pace of requests, retries included; 0: none."""
    tokens_per_minute: float = 0.0
    """Pace of tokens, prompt and completion; 0: none."""
    prices: Prices = field(default_factory=Prices)
    """What the server charges."""
    max_cost: float = 0.0
    """Money after which no call is made, in the currency of `prices`; 0: no bound."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of each request's body; null leaves a field out. For servers with words of their own, such as
    {"max_tokens": null, "max_completion_tokens": 4096}."""
    version: int = 0
    """Version of tokens of which the server does not say it."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"endpoint {self.url!r} is no base URL; give one such as http://127.0.0.1:8000/v1")
        if parts.username or parts.password:
            raise ValueError("the endpoint's URL holds a password, which would be logged; use key_env (--key-env)")
        path = parts.path.rstrip("/") or "/v1"
        object.__setattr__(self, "url", f"{parts.scheme}://{parts.netloc}{path}")
        for name in ("deadline_s", "concurrency"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        for name in ("retries", "requests_per_minute", "tokens_per_minute", "max_cost"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is negative; 0 is none")
        if self.max_cost and not (self.prices.prompt or self.prices.completion):
            raise ValueError(f"max_cost={self.max_cost:g} without prices bounds nothing; give the prices, too")

    def key(self) -> str:
        """The API key; "" where none is asked for. `ValueError` where the variable is not set."""
        key = os.environ.get(self.key_env, "").strip() if self.key_env else ""
        if self.key_env and not (key and key.isascii() and key.isprintable()):
            raise ValueError(
                f"environment variable {self.key_env} holds no API key; set it (it is never written anywhere)"
            )
        return key


class Endpoint:
    """One model of one server. Thread-safe. `ValueError` for what can be told to be wrong before anything is sent."""

    def __init__(
        self,
        config: EndpointConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.config, self._clock, self._sleep, self._jitter = config, clock, sleep, jitter
        self.meter = Meter(config.prices, config.max_cost)
        self._key = config.key()
        self._places = threading.BoundedSemaphore(config.concurrency)
        self._requests, self._tokens = Pace(config.requests_per_minute), Pace(config.tokens_per_minute)
        self._session = requests.Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=config.concurrency))
        self._model: tuple[str, int] | None = None

    def model(self) -> tuple[str, int]:
        """The model's name, and its context in tokens (0 where the server does not tell). Asks the server once.

        `InfraError` where it isn't there, `ValueError` where it has not just one model and the config names none.
        """
        if self._model is None:
            try:
                listed = self._tried("GET", "models", {}, "", (), _rows, min(LISTING, self.config.deadline_s), 3)[0]
            except _Unlisted:
                listed = []
            names = [str(row.get("id")) for row in listed]
            name = self.config.model or (names[0] if len(names) == 1 else "")
            if not name:
                some = ", ".join(names[:8]) or "none"
                raise ValueError(f"{self.config.url} lists {len(names)} models ({some}); name one (--model)")
            most = next((row.get("max_model_len") for row in listed if row.get("id") == name), None)
            self._model = name, most if isinstance(most, int) else 0
        return self._model

    def post(self, path: str, body: Json, tokens: int, session: str, read: Callable[[Any], T]) -> tuple[T, float]:
        """POST `body`: what `read` makes of the answer, and the seconds that the call waited for its place and pace.

        tokens: of the prompt, as far as known, and of the completion at most. session: names the episode to the server.
        read: raises `Again` for an answer of another form. Raises `InfraError` at the deadline, `ContextLimit`,
        `meter.OverBudget`, and `ValueError` for what the server refuses.
        """
        body = {"model": self.model()[0], **body, **self.config.extra}
        body = {name: value for name, value in body.items() if value is not None}
        paces = ((self._requests, 1.0), (self._tokens, float(tokens)))
        return self._tried("POST", path, body, session, paces, read, self.config.deadline_s, self.config.retries)

    def _tried(
        self,
        method: str,
        path: str,
        body: Json,
        session: str,
        paces: tuple[tuple[Pace, float], ...],
        read: Callable[[Any], T],
        seconds: float,
        retries: int,
    ) -> tuple[T, float]:
        began = self._clock()
        ends = began + seconds
        if not self._places.acquire(timeout=seconds):
            raise InfraError(
                f"{self.config.url}: no place among {self.config.concurrency} calls within {seconds:g} seconds"
            )
        try:
            waited, tries = self._clock() - began, 0
            while True:
                if method == "POST":
                    self.meter.check()
                waited += self._paced(paces, ends)
                tries += 1
                try:
                    answer = self._once(method, path, body, session, ends - self._clock())
                    self._count(answer, paces)
                    return read(answer), waited
                except Again as again:
                    pause = again.wait + min(MOST_BACKOFF, BACKOFF * 2 ** (tries - 1)) * (1 + self._jitter()) / 2
                    if tries > retries or self._clock() + pause >= ends:
                        asked = f", and asks for {again.wait:g} seconds" if again.wait else ""
                        spent = self._clock() - began
                        raise InfraError(
                            f"{self.config.url}/{path}: {again}{asked}; given up after {tries} tries in {spent:.1f} seconds"
                        ) from None
                self.meter.retry()
                self._sleep(pause)
        finally:
            self._places.release()

    def _paced(self, paces: tuple[tuple[Pace, float], ...], ends: float) -> float:
        now = self._clock()
        wait = max((pace.take(units, now) for pace, units in paces), default=0.0)
        if now + wait >= ends:
            for pace, units in paces:
                pace.correct(-units)
            raise InfraError(
                f"{self.config.url}: the pace leaves no room within the deadline; raise requests_per_minute, "
                "tokens_per_minute or deadline_s, or play fewer episodes at once"
            )
        if wait:
            self._sleep(wait)
        return wait

    def _count(self, answer: Any, paces: tuple[tuple[Pace, float], ...]) -> None:
        usage = usage_of(answer)
        if paces:
            self.meter.add(usage)
        if paces and usage.prompt:
            self._tokens.correct(usage.prompt + usage.completion - paces[1][1])

    def _once(self, method: str, path: str, body: Json, session: str, seconds: float) -> Any:
        """One exchange: the answer's JSON. It is over after `seconds` whatever the server does; raises `Again`."""
        headers = {"Content-Type": "application/json"} | ({"X-Session-ID": quote(session)} if session else {})
        data = json.dumps(body).encode() if method == "POST" else None
        done: Future[tuple[int, Mapping[str, str], bytes]] = Future()

        def exchange() -> None:
            with contextlib.suppress(InvalidStateError):  # nobody waits any more
                try:
                    done.set_result(self._exchange(method, path, data, headers, seconds, done))
                except BaseException as error:
                    done.set_exception(error)

        threading.Thread(target=exchange, name=f"{method} {path}", daemon=True).start()
        try:
            status, head, content = done.result(seconds)
        except TimeoutError:
            done.cancel()
            raise Again(f"no whole answer within {seconds:.1f} seconds") from None
        except requests.exceptions.SSLError as error:
            raise ValueError(
                f"{self.config.url}: its certificate is not trusted ({_short(error)}); mend it, or set REQUESTS_CA_BUNDLE"
            ) from None
        except requests.RequestException as error:
            raise Again(f"{type(error).__name__} ({_short(error)})") from None
        if status == 200:
            try:
                return json.loads(content)
            except (ValueError, RecursionError):
                raise Again(f"answers {len(content)} bytes that are no JSON") from None
        raise self._refused(status, head, content, path)

    def _exchange(
        self, method: str, path: str, data: bytes | None, headers: dict[str, str], seconds: float, done: Future[Any]
    ) -> tuple[int, Mapping[str, str], bytes]:
        parts: list[bytes] = []
        with self._session.request(
            method,
            f"{self.config.url}/{path}",
            data=data,
            headers=headers,
            auth=self._sign,
            timeout=seconds + 1,  # of each read; whoever waits has left before
            stream=True,
            allow_redirects=False,
        ) as response:
            for part in response.iter_content(4096):
                parts.append(part)
                if done.cancelled() or len(parts) * 4096 > MOST_BYTES:
                    raise requests.ConnectionError("an answer without an end")
            return response.status_code, response.headers, b"".join(parts)

    def _sign(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """As an `auth` of its own, so that no `.netrc` comes in between."""
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _refused(self, status: int, head: Mapping[str, str], content: bytes, path: str) -> Exception:
        said = self._said(content)
        lower, where = said.lower(), f"{self.config.url}/{path}"
        if status == 429 and any(word in lower for word in _QUOTA):
            return ValueError(f"{where}: the account has no quota left ({said}); mend that with the provider")
        if status in AGAIN or status >= 500:
            return Again(f"status {status} ({said})", retry_after(head.get("Retry-After", ""), datetime.now(UTC)))
        if path == "models" and status in (404, 405):
            return _Unlisted()
        if status in (401, 403):
            what = f"the key in {self.config.key_env}" if self.config.key_env else "a call without a key"
            return ValueError(
                f"{where} refuses {what} ({status}: {said}); set the right one, named by key_env (--key-env)"
            )
        if status in (400, 413, 422) and any(word in lower for word in _CONTEXT):
            return ContextLimit(f"{where}: {said}; lower max_context (--max-context) to what the server has")
        if 300 <= status < 400:
            return ValueError(f"{where} has moved to {head.get('Location', 'another place')}; give the new base URL")
        if status == 404:
            return ValueError(
                f"{where}: not found ({said}); is the base URL right, and the model {self.config.model!r}?"
            )
        return ValueError(
            f"{where} refuses the request ({status}: {said}); change what it names, by `extra` (--extra) if need be"
        )

    def _said(self, content: bytes) -> str:
        """What an error says, in one short line without the key."""
        text = content.decode("utf-8", "replace")
        try:
            error = json.loads(text)["error"]
            text = error if isinstance(error, str) else f"{error['message']} {error.get('code') or ''}"
        except (ValueError, LookupError, TypeError, RecursionError):
            pass
        text = " ".join(text.split())
        return (text.replace(self._key, "***") if self._key else text)[:300] or "without a word"


class _Unlisted(Exception):
    """The server has no list of models."""


def _rows(answer: Any) -> list[Json]:
    rows = answer.get("data") if isinstance(answer, Mapping) else None
    return [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []


def usage_of(answer: Any) -> Usage:
    """The `usage` of an answer; zeros where it has none."""
    usage = answer.get("usage") if isinstance(answer, Mapping) else None
    if not isinstance(usage, Mapping):
        return Usage()
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, Mapping) else 0
    counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"), cached)
    prompt, completion, kept = (n if isinstance(n, int) and n > 0 else 0 for n in counts)
    return Usage(prompt=prompt, completion=completion, cached=min(kept, prompt))


def retry_after(value: str, now: datetime) -> float:
    """Seconds of a `Retry-After` header, which holds seconds or a date (RFC 9110, 10.2.3); 0 where it says nothing."""
    try:
        return max(0.0, float(value)) if float(value) < float("inf") else 0.0
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - now).total_seconds())
    except (ValueError, TypeError):
        return 0.0


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
