"""A policy behind HTTP, as OpenAI's API has it: for peers' agents, for other languages, for `policy/endpoint.py`.

    GET  /health, /v1/models
    POST /v1/completions          token ids (or text) in; ids, log-probs and weight versions out
    POST /v1/chat/completions     messages in, a message out; `tools` become the text protocol and back (`policy/calls.py`)

A thread per connection, which sleeps while the engine answers; requests in flight at once become rows of one batch. What a
request asks for and can't have (streaming, several choices, penalties) is refused; fields that are unknown are passed over.
Beyond OpenAI's fields it takes vLLM's `return_token_ids`, `return_weight_versions`, `stop_token_ids`, `ignore_eos` and
`session_id` (also as header `X-Session-ID`): requests of one session are one episode, whose KV is kept. Without it a
conversation is recognised by its messages.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

from envs.errors import InfraError
from policy.calls import arguments_of, to_json
from policy.completion import Completion, Policy, Sampling
from policy.conversation import Conversations
from policy.listener import Listener, Refusal, Request
from policy.renderer import Renderer

Json = Mapping[str, Any]
WATCH = 0.5
"""Seconds between looks at whether a waiting client is still there."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "stop": ([], ""),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "top_k": (0, -1),
    "min_p": (0,),
    "top_logprobs": (0,),
    "tool_choice": ("auto", "none"),
    "response_format": ({"type": "text"},),
}
"""Fields that can't be honoured, and the values (null always) that ask for nothing."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Where and what is served."""

    model: str
    """The name that clients ask for."""
    max_context: int
    """Most tokens of an episode, prompt and completion: the engine's."""
    host: str = "127.0.0.1"
    """Address to listen on; one that others reach needs a `key`."""
    port: int = 8000
    """0 takes a free one."""
    key: str = ""
    """What clients send as `Authorization: Bearer KEY`; empty: whoever is on this machine may ask."""
    deadline_s: float = 600.0
    """Longest that a request is worked on, seconds; then status 504."""
    max_bytes: int = 64 << 20
    """Largest request."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 1 << 16:
            raise ValueError(f"port {self.port} is none; give 0 (a free one) to 65535")


class Server:
    """Serves one policy until it is closed. The policy stays its owner's. `ValueError` where it can't listen.

    Example::

        with Server(engine, renderer.load(directory), ServeConfig(model="cwm", max_context=1024, port=0)) as server:
            EndpointPolicy(Endpoint(EndpointConfig(url=server.url)))
    """

    def __init__(
        self, policy: Policy, renderer: Renderer, config: ServeConfig, check: Callable[[], object] = lambda: None
    ) -> None:
        """check: raises `InfraError` where the policy can't answer any more (`/health`)."""
        self.policy, self.renderer, self.config, self.check = policy, renderer, config, check
        self._conversations = Conversations(renderer)
        self._busy: set[str] = set()
        self._lock = threading.Lock()
        routes = {
            "GET /health": self.health,
            "GET /v1/models": self.models,
            "POST /v1/completions": self.complete,
            "POST /v1/chat/completions": self.chat,
        }
        self._listener = Listener(
            routes, host=config.host, port=config.port, key=config.key, max_bytes=config.max_bytes
        )
        self.url = f"http://{self._listener.address}/v1"
        """Base URL for clients."""

    def close(self) -> None:
        """Stop listening. Requests under way are answered, or fail with their engine."""
        self._listener.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def health(self, body: Json, request: Request) -> dict[str, Any]:
        """`GET /health`."""
        self.check()
        return {"status": "ok"}

    def models(self, body: Json, request: Request) -> dict[str, Any]:
        """`GET /v1/models`."""
        model = {"id": self.config.model, "object": "model", "created": 0, "owned_by": "codeworld"}
        return {"object": "list", "data": [model | {"max_model_len": self.config.max_context}]}

    def complete(self, body: Json, request: Request) -> dict[str, Any]:
        """`POST /v1/completions`. Ids and log-probs of the answer cover the stop token, its `text` doesn't."""
        with self._reading(body):
            ids = self._prompt_ids(body.get("prompt"))
            sampling = self._sampling(body, 16)
        with self._episode(body, request, "") as episode:
            done = self._generate(ids, sampling, episode, request.gone)
        choice: dict[str, Any] = {
            "text": self.renderer.decode(done.token_ids),
            "finish_reason": done.finish,
            "logprobs": None,
        }
        if body.get("logprobs") is not None:
            texts = [self.renderer.decode([i]) for i in done.token_ids]
            choice["logprobs"] = {"tokens": texts, "token_logprobs": done.logprobs, "top_logprobs": None}
        if body.get("return_token_ids"):
            choice["prompt_token_ids"] = ids
        return self._answer("text_completion", body, ids, done, choice)

    def chat(self, body: Json, request: Request) -> dict[str, Any]:
        """`POST /v1/chat/completions`."""
        with self._reading(body):
            tools = (body.get("tools") or []) if body.get("tool_choice") != "none" else []
            arguments = arguments_of(tools)
            prompt = self._conversations.prompt(body.get("messages") or [], tools, _session(body, request))
            sampling = self._sampling(body, self.config.max_context)
        with self._episode(body, request, prompt.episode) as episode:
            done = self._generate(prompt.token_ids, sampling, episode, request.gone)
        content, calls = to_json(prompt.dialogue.say(done.token_ids), arguments)
        message: dict[str, Any] = {"role": "assistant", "content": content} | ({"tool_calls": calls} if calls else {})
        self._conversations.remember(prompt, message, done.token_ids, episode)
        choice: dict[str, Any] = {
            "message": message,
            "finish_reason": "tool_calls" if calls else done.finish,
            "logprobs": None,
        }
        if body.get("logprobs"):
            each = zip(done.token_ids, done.logprobs, strict=True)
            known = [{"token": self.renderer.decode([i]), "logprob": p, "top_logprobs": []} for i, p in each]
            choice["logprobs"] = {"content": known}
        answer = self._answer("chat.completion", body, prompt.token_ids, done, choice)
        return answer | ({"prompt_token_ids": prompt.token_ids} if body.get("return_token_ids") else {})

    def _answer(
        self, kind: str, body: Json, ids: list[int], done: Completion, choice: dict[str, Any]
    ) -> dict[str, Any]:
        choice["index"] = 0
        if body.get("return_token_ids"):
            choice["token_ids"] = done.token_ids
        if body.get("return_weight_versions"):
            choice["weight_versions"] = spans(done.versions)
        sampled = len(done.token_ids)
        return {
            "id": f"{kind}-{uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.config.model,
            "choices": [choice],
            "usage": {"prompt_tokens": len(ids), "completion_tokens": sampled, "total_tokens": len(ids) + sampled},
        }

    @contextlib.contextmanager
    def _reading(self, body: Json) -> Iterator[None]:
        """Refuse what can't be honoured; whatever else is wrong with a request is the client's mistake, too."""
        if body.get("model", self.config.model) != self.config.model:
            why = f"the model {body['model']!r} does not exist; this server has {self.config.model!r}"
            raise Refusal(404, "model_not_found", why)
        for name, neutral in NEUTRAL.items():
            if body.get(name) is not None and body[name] not in neutral:
                raise Refusal(400, "unsupported_parameter", f"{name}={body[name]!r} is not offered here; leave it out")
        try:
            yield
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            raise Refusal(400, "invalid_request", f"the request can't be read: {error}") from None

    def _prompt_ids(self, prompt: Any) -> list[int]:
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], list | str):
            prompt = prompt[0]
        if isinstance(prompt, str):
            return self.renderer.encode(prompt)
        if not isinstance(prompt, list) or any(type(i) is not int for i in prompt):
            raise ValueError("prompt must be one list of token ids, or one text")
        return prompt

    def _sampling(self, body: Json, most: int) -> Sampling:
        asked = next((body[k] for k in ("max_completion_tokens", "max_tokens") if body.get(k) is not None), most)
        stop = [int(i) for i in body.get("stop_token_ids") or []]
        given = {name: float(body[name]) for name in ("temperature", "top_p") if body.get(name) is not None}
        seed = None if body.get("seed") is None else int(body["seed"])
        stop_ids = tuple(stop if body.get("ignore_eos") else [*stop, *self.renderer.stop_ids])
        return Sampling(max_tokens=int(asked), stop_ids=stop_ids, seed=seed, **given)

    @contextlib.contextmanager
    def _episode(self, body: Json, request: Request, known: str) -> Iterator[str]:
        """The request's episode, for it alone: its session, else the one that holds its KV and is idle, else a new one."""
        session = _session(body, request)
        with self._lock:
            if session in self._busy:
                raise Refusal(409, "session_busy", f"session {session!r} has a request under way; wait for its answer")
            idle = known and known not in self._busy
            episode = session or (known if idle else f"episode-{uuid4().hex}")
            self._busy.add(episode)
        try:
            yield episode
        finally:
            with self._lock:
                self._busy.discard(episode)

    def _generate(self, ids: list[int], sampling: Sampling, episode: str, gone: Callable[[], bool]) -> Completion:
        """The policy's answer. Nobody waits for it any more, or for too long: the episode is released."""
        most = self.config.max_context
        if not ids:
            raise Refusal(400, "invalid_request", "the prompt is empty; send at least one token")
        if len(ids) >= most:
            why = f"This model's maximum context length is {most} tokens, but the prompt has {len(ids)}; send a shorter one"
            raise Refusal(400, "context_length_exceeded", why)
        sampling = replace(sampling, max_tokens=min(sampling.max_tokens, most - len(ids)))
        answer: Future[Completion] = Future()

        def ask() -> None:
            try:
                answer.set_result(self.policy.generate(ids, sampling, episode))
            except BaseException as error:
                answer.set_exception(error)

        ends = time.monotonic() + self.config.deadline_s
        threading.Thread(target=ask, name=episode, daemon=True).start()
        while not _wait(answer, min(WATCH, self.config.deadline_s)):
            late = time.monotonic() > ends
            if late or gone():
                self.policy.release(episode)
                _wait(answer, WATCH)  # so that the session's next request finds it idle
                why = f"no answer within {self.config.deadline_s:g} seconds" if late else "the client is gone"
                raise Refusal(504 if late else 499, "deadline" if late else "client_closed", why)
        if answer.result().finish == "cancelled":
            raise InfraError("the engine cancelled the request; send it again")
        return answer.result()


def spans(versions: list[int]) -> list[dict[str, Any]]:
    """Versions of the tokens as vLLM writes them: [{"version": "4", "start": 0, "end": 2}, …], end exclusive."""
    found: list[dict[str, Any]] = []
    for at, version in enumerate(versions):
        if found and found[-1]["version"] == str(version):
            found[-1]["end"] = at + 1
        else:
            found.append({"version": str(version), "start": at, "end": at + 1})
    return found


def _session(body: Json, request: Request) -> str:
    return str(body.get("session_id") or request.header("X-Session-ID"))


def _wait(answer: Future[Completion], seconds: float) -> bool:
    """Whether it is there, or failed."""
    try:
        answer.exception(seconds)
    except TimeoutError:
        return False
    return True
