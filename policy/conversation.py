"""Conversations that clients send again and again as messages, as the tokens that were really read and sampled.

A chat client holds text. Encoded anew, an answer may become other tokens than those that were sampled, and kept KV is lost.
So the sampled tokens of each answer are remembered, under a hash of the messages up to it. A request is played again from
its beginning, with the remembered tokens as answers; those that aren't remembered (another client's, an edited history)
are encoded.
"""

from __future__ import annotations

import hashlib
import json
import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from policy.calls import Json, about, arguments_of, content_of, to_text
from policy.renderer import Dialogue, Renderer

ROLES = ("system", "developer", "user", "assistant", "tool")
MOST_TOKENS = 16_000_000
"""Tokens remembered in all, 4 bytes each; answers used longest ago are forgotten first."""


@dataclass
class Asked:
    """What a request asks to continue."""

    key: str
    """Names its messages; the answer is remembered under it."""
    dialogue: Dialogue
    token_ids: list[int]
    episode: str = ""
    """Whose KV holds most of the tokens; "" where that isn't known."""


class Conversations:
    """Remembers answers. Thread-safe."""

    def __init__(self, renderer: Renderer, most_tokens: int = MOST_TOKENS) -> None:
        self._renderer, self._most = renderer, most_tokens
        self._held: OrderedDict[str, tuple[array[int], str]] = OrderedDict()
        self._tokens = 0
        self._lock = threading.Lock()

    def prompt(self, messages: Sequence[Json], tools: Sequence[Json] = (), session: str = "") -> Asked:
        """Tokens of a conversation that ends with what the policy is to answer; `ValueError` where it is none.

        The messages before the first answer, but system ones, are the question; those between two answers one observation,
        of the tool that was called first (`bash` where none was).
        session: answers are shared by the requests of one session only.
        """
        names, arguments = _checked(messages), arguments_of(tools)
        at = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), len(messages))
        system = [content_of(m) for m in messages[:at] if m["role"] in ROLES[:2]]
        question = [content_of(m) for m in messages[:at] if m["role"] not in ROLES[:2]]
        start = json.dumps([session, tools], sort_keys=True, default=str)
        opened = self._renderer.open("\n\n".join(question), "\n\n".join(filter(None, [*system, about(tools)])))
        asked = Asked(_hash(start, messages[:at]), opened, opened.prompt().token_ids)
        while at < len(messages):
            answer, after = messages[at], at + 1
            while after < len(messages) and messages[after]["role"] != "assistant":
                after += 1
            sampled, episode = self._recall(_hash(asked.key, [answer]))
            sampled = sampled or [*self._renderer.encode(to_text(answer, arguments)), self._renderer.end_id]
            heard = messages[at + 1 : after]
            tool = names.get(str(heard[0].get("tool_call_id")), str(heard[0].get("name") or "bash"))
            opened.say(sampled)
            opened.hear(tool, "\n\n".join(map(content_of, heard)))
            prompt = opened.prompt()
            asked.token_ids = prompt.token_ids if prompt.branch else [*asked.token_ids, *sampled, *prompt.token_ids]
            asked.key, asked.episode = _hash(asked.key, messages[at:after]), episode or asked.episode
            at = after
        return asked

    def remember(self, asked: Asked, answer: Json, token_ids: Sequence[int], episode: str) -> None:
        """An answer as the client gets it, and the tokens that were sampled for it, in `episode`."""
        key, ids = _hash(asked.key, [answer]), array("i", token_ids)
        with self._lock:
            self._tokens += len(ids) - len(self._held.pop(key, (array("i"), ""))[0])
            self._held[key] = ids, episode
            while self._tokens > self._most and len(self._held) > 1:
                _, (old, _) = self._held.popitem(last=False)
                self._tokens -= len(old)

    def _recall(self, key: str) -> tuple[list[int], str]:
        with self._lock:
            if key not in self._held:
                return [], ""
            self._held.move_to_end(key)
            ids, episode = self._held[key]
            return list(ids), episode


def _checked(messages: Sequence[Json]) -> dict[str, str]:
    """Id of each tool call → name of the tool. `ValueError` for what is no conversation that a policy can answer."""
    names: dict[str, str] = {}
    for at, message in enumerate(messages):
        if message.get("role") not in ROLES:
            raise ValueError(f"messages[{at}] has role {message.get('role')!r}; one of {', '.join(ROLES)}")
        if at and message["role"] == messages[at - 1]["role"] == "assistant":
            raise ValueError(f"messages[{at}] is an assistant's behind another one; join them")
        for call in message.get("tool_calls") or []:
            names[str(call.get("id"))] = str((call.get("function") or {}).get("name"))
    opening = next((m["role"] for m in messages if m["role"] not in ROLES[:2]), None)
    if opening != "user" or messages[-1]["role"] == "assistant":
        raise ValueError(
            "messages must begin with a user's (behind system) and not end with an assistant's; send them so"
        )
    return names


def _hash(key: str, messages: Sequence[Json]) -> str:
    """The key behind further messages; what clients may add to them, such as ids and nulls, does not count."""
    for message in messages:
        calls = [_call(call.get("function") or {}) for call in message.get("tool_calls") or []]
        said: list[Any] = [key, message["role"], content_of(message), calls]
        key = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    return key


def _call(function: Json) -> list[Any]:
    given = function.get("arguments") or ""
    try:
        given = json.loads(given)
    except (TypeError, ValueError):
        pass
    return [function.get("name"), given]
