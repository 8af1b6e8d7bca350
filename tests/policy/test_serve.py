"""A served policy over real HTTP: exact tokens, tools there and back, refusals, clients that leave."""

import http.client
import json
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
import torch

from envs.errors import InfraError
from policy import models, serve
from policy.completion import Completion, Sampling, digest
from policy.endpoint import ChatPolicy, Endpoint, EndpointConfig, EndpointPolicy, completion
from policy.models import ModelConfig
from policy.renderer import CwmRenderer, train_tokenizer
from policy.scripted import ScriptedPolicy, replies
from policy.serve import ServeConfig, Server, spans
from policy.torch_engine import EngineConfig, TorchEngine
from policy.weights import state_of

BASH = {"type": "function", "function": {"name": "bash", "parameters": {
    "type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}}}  # fmt: skip
USER = {"role": "user", "content": "list the files"}


@pytest.fixture(scope="module")
def renderer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["list the files", "<tool: bash>\nls\n</tool>"] * 10, 400).save(str(path / "tokenizer.json"))
    return CwmRenderer(path)


@pytest.fixture(scope="module")
def engine(renderer):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    size = {"hidden_size": 32, "layers": 2, "heads": 2, "kv_heads": 2, "intermediate_size": 64, "max_context": 256}
    model = models.build(ModelConfig(vocab_size=renderer.vocab_size, **size))
    with TorchEngine(model, EngineConfig(slots=8, max_context=256, deadline_s=60), version=3) as engine:
        engine.publish(4, state_of(model))
        yield engine
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def server(engine, renderer):
    with Server(engine, renderer, ServeConfig(model="tiny", max_context=256, port=0)) as server:
        yield server


def scripted(renderer, *actions, **config):
    policy = ScriptedPolicy(renderer, replies(*actions), version=7)
    return Server(policy, renderer, ServeConfig(**{"model": "tiny", "max_context": 256, "port": 0} | config))


def ask(server, body, path="/chat/completions", **headers):
    return requests.post(server.url + path, json=body, headers=headers, timeout=30)


# The token level.


def test_through_http_a_policy_answers_as_it_does_here(server, engine, renderer):
    policy = EndpointPolicy(Endpoint(EndpointConfig(url=server.url)))
    prompts = [renderer.start(f"list {n}") for n in range(6)]
    sampling = [Sampling(max_tokens=12 + n, stop_ids=(renderer.end_id,), seed=n, temperature=0.7) for n in range(6)]
    with ThreadPoolExecutor(6) as pool:  # at once: rows of one batch
        far = list(pool.map(policy.generate, prompts, sampling, [f"far/{n}" for n in range(6)]))
    for n in range(6):
        here = engine.generate(prompts[n], sampling[n], f"here/{n}")
        assert (far[n].token_ids, far[n].versions, far[n].finish) == (here.token_ids, here.versions, here.finish)
        assert far[n].logprobs == pytest.approx(here.logprobs, abs=1e-6)
        assert far[n].prompt_digest == digest(prompts[n]) and set(far[n].versions) == {4}


def test_an_episode_keeps_its_kv(server, engine, renderer):
    policy = EndpointPolicy(Endpoint(EndpointConfig(url=server.url)))
    ids = renderer.start("an episode of its own, long enough to be told from others")
    first = policy.generate(ids, Sampling(max_tokens=8, seed=0), "kept/1")
    before = engine.stats()["prefilled_tokens"]
    more = [*ids, *first.token_ids, *renderer.extend(first.token_ids[-1], "tool: bash", "x")]
    policy.generate(more, Sampling(max_tokens=8, seed=0), "kept/1")
    new = len(more) - len(ids) - len(first.token_ids)
    assert engine.stats()["prefilled_tokens"] - before <= new + 1  # the last sampled token had not been fed


def test_stop_ids_alone_end_a_completion(server, renderer):
    body = {"prompt": renderer.start("list"), "max_tokens": 40, "seed": 1, "return_token_ids": True, "temperature": 2}
    free = ask(server, body | {"ignore_eos": True}, "/completions").json()["choices"][0]
    assert free["finish_reason"] == "length" and len(free["token_ids"]) == 40
    stop = free["token_ids"][20]
    first = free["token_ids"].index(stop)
    cut = ask(server, body | {"ignore_eos": True, "stop_token_ids": [stop]}, "/completions").json()["choices"][0]
    assert cut["finish_reason"] == "stop" and cut["token_ids"] == free["token_ids"][: first + 1]


def test_versions_are_spans():
    versions = [4, 4, 5, 4]
    told = spans(versions)
    assert told == [
        {"version": "4", "start": 0, "end": 2},
        {"version": "5", "start": 2, "end": 3},
        {"version": "4", "start": 3, "end": 4},
    ]
    choice = {"prompt_token_ids": [1], "token_ids": [6, 7, 8, 9], "logprobs": {"token_logprobs": [-1.0] * 4}}
    answer = {"choices": [choice | {"finish_reason": "length", "weight_versions": told}]}
    assert completion(answer, [1], 4, 0).versions == versions


# Messages.


def test_a_chat_goes_on_from_the_very_tokens(server, engine, renderer):
    body = {"messages": [USER], "max_tokens": 16, "seed": 5, "return_token_ids": True, "return_weight_versions": True}
    first = ask(server, body).json()
    choice = first["choices"][0]
    assert first["prompt_token_ids"] == renderer.start("list the files")
    assert choice["weight_versions"] == [{"version": "4", "start": 0, "end": len(choice["token_ids"])}]
    assert first["usage"]["total_tokens"] == len(first["prompt_token_ids"]) + len(choice["token_ids"])
    again = renderer.encode(choice["message"]["content"])
    assert [*again, renderer.end_id] != choice["token_ids"]  # a random model's text is other tokens when it is encoded
    before = engine.stats()
    second = ask(server, body | {"messages": [USER, choice["message"], USER]}).json()
    read = [*first["prompt_token_ids"], *choice["token_ids"]]
    assert second["prompt_token_ids"] == read + renderer.extend(read[-1], "tool: bash", "list the files")
    assert engine.stats()["reused_tokens"] - before["reused_tokens"] >= len(read) - 1


def test_tools_become_text_and_back(renderer):
    heard = []

    def script(episode, observation):
        heard.append(observation)
        return "I look.\n<tool: bash>\nls -l\n</tool>" if len(heard) == 1 else "done"

    with Server(ScriptedPolicy(renderer, script), renderer, ServeConfig(model="m", max_context=256, port=0)) as server:
        first = ask(server, {"model": "m", "messages": [USER], "tools": [BASH]}).json()["choices"][0]
        (call,) = first["message"]["tool_calls"]
        assert first["finish_reason"] == "tool_calls" and first["message"]["content"] == "I look."
        assert call["function"] == {"name": "bash", "arguments": '{"command": "ls -l"}'}
        result = {"role": "tool", "tool_call_id": call["id"], "content": "a.py"}
        second = ask(server, {"messages": [USER, first["message"], result], "tools": [BASH]}).json()["choices"][0]
        assert second["message"] == {"role": "assistant", "content": "done"} and second["finish_reason"] == "stop"
        none = ask(server, {"messages": [USER], "tools": [BASH], "tool_choice": "none"}).json()["choices"][0]
        assert "tool_calls" not in none["message"]
    assert "- bash: bash; the body is its command" in heard[0] and "list the files" in heard[0]
    assert (
        heard[1]
        == "<|start_header_id|>tool: bash<|end_header_id|>\n\na.py<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_our_chat_client_understands_our_server(renderer):
    with scripted(renderer, "<tool: bash>\nls\n</tool>") as server:
        policy = ChatPolicy(Endpoint(EndpointConfig(url=server.url)))
        reply = policy.reply([USER], Sampling(max_tokens=40), "e", [BASH])
        assert reply.text == "<tool: bash>\nls\n</tool>" and reply.finish == "tool_calls" and reply.usage.prompt > 0
        cut = policy.reply([USER], Sampling(max_tokens=1), "f")
        assert cut.finish == "length"


def test_chat_logprobs(server):
    choice = ask(server, {"messages": [USER], "max_tokens": 3, "logprobs": True, "seed": 1}).json()["choices"][0]
    assert len(choice["logprobs"]["content"]) == 3 and all(row["logprob"] < 0 for row in choice["logprobs"]["content"])


# What is refused.


@pytest.mark.parametrize(
    ("body", "status", "why"),
    [
        ({"messages": [USER], "stream": True}, 400, "stream=True is not offered here; leave it out"),
        ({"messages": [USER], "n": 2}, 400, "n=2 is not offered"),
        ({"messages": [USER], "stop": ["x"]}, 400, r"stop=\['x'\] is not offered"),
        ({"messages": [USER], "tool_choice": "required"}, 400, "tool_choice='required' is not offered"),
        ({"messages": [USER], "model": "other"}, 404, "the model 'other' does not exist; this server has 'tiny'"),
        ({"messages": [USER], "temperature": -1}, 400, "temperature=-1.0 is negative"),
        ({"messages": [USER], "max_tokens": 0}, 400, "max_tokens=0 must be at least 1"),
        ({"messages": "hello"}, 400, "the request can't be read"),
        ({"messages": [USER], "tools": [{"type": "web"}]}, 400, "is no function with a name"),
        ({}, 400, "messages must begin with a user's"),
        ({"messages": [USER | {"content": "list " * 300}]}, 400, "maximum context length is 256 tokens"),
    ],
)
def test_a_bad_request_is_one_line(server, body, status, why):
    response = ask(server, body)
    error = response.json()["error"]
    assert response.status_code == status and error["type"] == "invalid_request_error"
    assert re.search(why, error["message"]) and "\n" not in error["message"]


@pytest.mark.parametrize("prompt", [None, [], [[1], [2]], ["a", "b"], [1.5], [10**6], [-1], {"a": 1}])
def test_a_bad_prompt_is_refused(server, prompt):
    response = ask(server, {"prompt": prompt}, "/completions")
    assert response.status_code == 400 and response.json()["error"]["message"]


def test_neutral_values_are_passed_over(renderer):
    with scripted(renderer, "ok") as server:
        body = {"messages": [USER], "stream": False, "n": 1, "stop": None, "temperature": 0, "user": "me", "seed": None}
        assert (
            ask(server, body | {"frequency_penalty": 0.0, "metadata": {}}).json()["choices"][0]["message"]["content"]
            == "ok"
        )
        assert (
            ask(server, {"prompt": "list the files", "max_tokens": 9}, "/completions").json()["choices"][0]["text"]
            == "ok"
        )


def test_what_is_no_request(renderer):
    with scripted(renderer, "ok", max_bytes=1000) as server:
        assert requests.get(server.url + "/nothing", timeout=30).status_code == 404
        assert requests.get(server.url + "/completions", timeout=30).status_code == 404
        assert (
            requests.post(server.url + "/chat/completions", data=b"{", timeout=30).json()["error"]["code"]
            == "invalid_json"
        )
        assert requests.post(server.url + "/chat/completions", data=b"[]", timeout=30).status_code == 400
        assert requests.post(server.url + "/completions", data=b"x" * 2000, timeout=30).status_code == 413
        assert requests.post(server.url + "/completions", data=iter([b"{}"]), timeout=30).status_code == 411
        assert requests.get(server.url.replace("/v1", "/health"), timeout=30).json() == {"status": "ok"}
        assert requests.get(server.url + "/models", timeout=30).json()["data"][0]["max_model_len"] == 256


def test_the_key(renderer):
    with scripted(renderer, "ok", key="sesame") as server:
        assert ask(server, {"messages": [USER]}).status_code == 401
        assert ask(server, {"messages": [USER]}, Authorization="Bearer sesam").status_code == 401
        assert ask(server, {"messages": [USER]}, Authorization="Bearer sesame").status_code == 200
        assert requests.get(server.url + "/models", timeout=30).status_code == 401
        assert requests.get(server.url.replace("/v1", "/health"), timeout=30).status_code == 200


def test_where_it_may_listen(renderer):
    with pytest.raises(ValueError, match=r"host '0\.0\.0\.0' is reached by others, who may use the model; set a key"):
        scripted(renderer, "ok", host="0.0.0.0")
    scripted(renderer, "ok", host="0.0.0.0", key="sesame").close()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ValueError, match="can't listen on 127.0.0.1:.*; choose another host or port"):
            scripted(renderer, "ok", port=taken.getsockname()[1])
    with pytest.raises(ValueError, match="port 70000 is none"):
        scripted(renderer, "ok", port=70000)


# Policies that fail or take long, clients that leave.


class Slow:
    """Answers when its episode is released, as "cancelled", or when it is told to."""

    def __init__(self):
        self.begun, self.go, self.released = threading.Event(), threading.Event(), []

    def generate(self, token_ids, sampling, episode):
        self.begun.set()
        self.go.wait(20)
        cancelled = episode in self.released
        n = 0 if cancelled else 1
        return Completion(
            token_ids=[1] * n, logprobs=[0.0] * n, versions=[0] * n,
            finish="cancelled" if cancelled else "length", prompt_digest=digest(token_ids),
        )  # fmt: skip

    def release(self, episode):
        self.released.append(episode)
        self.go.set()


@pytest.fixture
def slow(renderer, monkeypatch):
    monkeypatch.setattr(serve, "WATCH", 0.02)
    policy = Slow()

    def start(**config):
        return Server(policy, renderer, ServeConfig(**{"model": "tiny", "max_context": 256, "port": 0} | config))

    yield policy, start
    policy.go.set()


def test_a_client_that_goes_away_frees_its_episode(slow):
    policy, start = slow
    with start() as server:
        client = http.client.HTTPConnection(server.url.split("/")[2])
        body = json.dumps({"messages": [USER], "session_id": "mine"})
        client.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        assert policy.begun.wait(20) and not policy.released
        client.close()
        assert policy.go.wait(20) and policy.released == ["mine"]


def test_a_client_that_waits_keeps_its_episode(slow):
    policy, start = slow
    with start() as server, ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, server, {"messages": [USER], "session_id": "mine"})
        assert policy.begun.wait(20)
        busy = ask(server, {"messages": [USER]}, **{"X-Session-ID": "mine"})
        assert busy.status_code == 409 and "session 'mine' has a request under way" in busy.json()["error"]["message"]
        policy.go.set()
        assert first.result(20).status_code == 200 and policy.released == []
        assert ask(server, {"messages": [USER], "session_id": "mine"}).status_code == 200


def test_a_request_has_a_deadline(slow):
    policy, start = slow
    with start(deadline_s=0.1) as server:
        response = ask(server, {"messages": [USER], "session_id": "mine"})
        assert response.status_code == 504 and "no answer within 0.1 seconds" in response.json()["error"]["message"]
        assert policy.released == ["mine"]


@pytest.mark.parametrize(
    ("error", "status"), [(InfraError("dead"), 503), (ValueError("odd"), 400), (TimeoutError("t"), 500)]
)
def test_errors_of_the_policy(renderer, error, status, capsys):
    class Broken:
        def generate(self, *args):
            raise error

        def release(self, episode):
            pass

    def check():
        raise InfraError("the engine is closed")

    with Server(Broken(), renderer, ServeConfig(model="tiny", max_context=256, port=0), check) as server:
        assert ask(server, {"messages": [USER]}).status_code == status
        health = requests.get(server.url.replace("/v1", "/health"), timeout=30)
        assert health.status_code == 503 and health.json()["error"]["message"] == "the engine is closed"
        policy = EndpointPolicy(Endpoint(EndpointConfig(url=server.url, retries=0)))
        kind = ValueError if status == 400 else InfraError
        with pytest.raises(kind):
            policy.generate([1, 2], Sampling(), "e")
