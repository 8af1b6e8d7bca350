"""Any OpenAI-compatible server as a policy: vLLM's, `python -m policy serve`, or a hosted one. Needs no torch.

Two levels over one `Endpoint` (`policy/remote.py`: retries, deadline, pace, bill):

- `EndpointPolicy` speaks token ids (`/completions` of vLLM and of `policy/serve.py`): a `policy.completion.Policy` whose
  trajectories are exact. A server that has read other ids than it was sent is an `InfraError`.
- `ChatPolicy` speaks messages (`/chat/completions`), which every server does. Text has no ids: for evaluation only
  (`agents/chat.py`).

Fields beyond OpenAI's are those of vLLM's server (`return_token_ids`, `return_weight_versions`, `stop_token_ids`,
`ignore_eos`, `session_id`). vLLM's log-probs are those of temperature 1 without top_p, unless it was started with
`--logprobs-mode processed_logprobs`, as training on other samplings needs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from envs.errors import InfraError
from policy.calls import arguments_of, content_of, to_text
from policy.completion import Completion, Sampling, digest
from policy.meter import Usage
from policy.remote import Again, ContextLimit, Endpoint, EndpointConfig, usage_of

Json = Mapping[str, Any]
CHARACTERS = 3
"""Characters of text that count as a token as long as no server has counted: few, so that bounds are kept."""


class EndpointPolicy:
    """A token-level server as a `policy.completion.Policy`."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint

    def generate(self, token_ids: Sequence[int], sampling: Sampling, episode: str) -> Completion:
        """See `policy.completion.Policy`. `ValueError` for what the server refuses, and where it speaks no token ids."""
        sent = [int(i) for i in token_ids]
        body = {
            "prompt": sent,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
            "stop_token_ids": list(sampling.stop_ids),
            "ignore_eos": True,  # nothing but `stop_ids` ends a completion
            "logprobs": 1,
            "return_token_ids": True,
            "return_weight_versions": True,
            "session_id": episode,
        }

        def read(answer: Any) -> Completion:
            try:
                return completion(answer, sent, sampling.max_tokens, self.endpoint.config.version)
            except (LookupError, TypeError, AttributeError) as error:
                raise Again(f"an answer of another form ({type(error).__name__}: {error})") from None

        tokens = len(sent) + sampling.max_tokens
        done, waited = self.endpoint.post("completions", body, tokens, episode, read)
        return replace(done, queued=waited)

    def release(self, episode: str) -> None:
        """Nothing: a server drops by itself what it has not used for long."""


def completion(answer: Any, sent: list[int], most: int, version: int) -> Completion:
    """The first choice of a `/completions` answer to the ids `sent`, of at most `most` tokens.

    version: of tokens whose version isn't told. `InfraError` where ids were read that were not sent, or lists don't agree;
    `ValueError` where there are no ids.
    """
    choice = answer["choices"][0]
    read = choice.get("prompt_token_ids", answer.get("prompt_token_ids"))
    ids = choice.get("token_ids")
    if read is None or ids is None:
        raise ValueError(
            "the server answers without token ids: it is none of vLLM's or `python -m policy serve`; "
            "play on the chat level (no --tokenizer)"
        )
    if read != sent:
        at = next((i for i, (a, b) in enumerate(zip(read, sent, strict=False)) if a != b), min(len(read), len(sent)))
        raise InfraError(
            f"the server read {len(read)} prompt tokens and was sent {len(sent)}; they differ from position {at} on"
        )
    logprobs = choice["logprobs"]["token_logprobs"]
    if not 1 <= len(ids) <= most or len(ids) != len(logprobs):
        raise InfraError(
            f"the server answers {len(ids)} tokens with {len(logprobs)} log-probs; 1 to {most} were asked for"
        )
    if not all(isinstance(p, int | float) and math.isfinite(p) for p in logprobs):
        raise InfraError("the server answers log-probs that are no finite numbers")
    if choice["finish_reason"] not in ("stop", "length"):
        raise InfraError(f"the server ended the completion with {choice['finish_reason']!r}")
    versions = [version] * len(ids)
    for span in choice.get("weight_versions") or []:
        if str(span["version"]).isdecimal():  # a label that is no number is nobody's version
            for at in range(max(0, span["start"]), min(span["end"], len(ids))):
                versions[at] = int(span["version"])
    return Completion(
        token_ids=[int(i) for i in ids],
        logprobs=[float(p) for p in logprobs],
        versions=versions,
        finish=choice["finish_reason"],
        prompt_digest=digest(read),
    )


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One message of a chat model."""

    text: str
    """The action: the message's text, and its tool calls in our text protocol."""
    message: dict[str, Any]
    """What the conversation goes on with: role, content, tool calls."""
    finish: str
    """"stop", "length", "tool_calls", or whatever the server calls it."""
    usage: Usage
    """Zeros where the server doesn't count."""


class ChatPolicy:
    """A chat-level server. Thread-safe; it holds no conversation."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint

    def reply(self, messages: Sequence[Json], sampling: Sampling, episode: str, tools: Sequence[Json] = ()) -> Reply:
        """The answer to `messages`. Errors as `Endpoint.post`. `sampling.stop_ids` don't count.

        tools: as in OpenAI's API (`policy.calls.schema`).
        """
        body = {
            "messages": list(messages),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
            "tools": list(tools) or None,
        }
        arguments = arguments_of(tools)

        def read(answer: Any) -> Reply:
            try:
                choice = answer["choices"][0]
                message = {"role": "assistant", "content": content_of(choice["message"])}
                if choice["message"].get("tool_calls"):
                    message["tool_calls"] = choice["message"]["tool_calls"]
                text = to_text(message, arguments)
                return Reply(text=text, message=message, finish=str(choice["finish_reason"]), usage=usage_of(answer))
            except (LookupError, TypeError, AttributeError, ValueError) as error:
                raise Again(f"an answer of another form ({type(error).__name__}: {error})") from None

        tokens = length(messages) + sampling.max_tokens
        return self.endpoint.post("chat/completions", body, tokens, episode, read)[0]


def length(messages: Sequence[Json]) -> int:
    """Tokens of messages, guessed from their characters."""
    return sum(len(content_of(m)) // CHARACTERS + 4 for m in messages)


__all__ = [
    "ChatPolicy",
    "ContextLimit",
    "Endpoint",
    "EndpointConfig",
    "EndpointPolicy",
    "Reply",
    "completion",
    "length",
]
