"""Endpoints against a real server that misbehaves: whatever it does, there is a right answer, an InfraError or one line."""

import json
import socket
import threading
import time
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from envs.errors import InfraError
from policy.completion import Sampling, digest
from policy.endpoint import ChatPolicy, ContextLimit, Endpoint, EndpointConfig, EndpointPolicy, completion
from policy.meter import OverBudget, Prices
from policy.remote import retry_after, usage_of

PROMPT = [5, 6, 7]
SAMPLING = Sampling(max_tokens=4, stop_ids=(2,), seed=1)


def said(**more):
    """What vLLM answers to PROMPT: two tokens, the first by version 3, the second by version 4."""
    versions = [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 2}]
    logprobs = {"token_logprobs": [-0.5, -0.25], "tokens": ["a", "b"], "top_logprobs": None, "text_offset": [0, 1]}
    choice = {"index": 0, "text": "ab", "finish_reason": "stop", "logprobs": logprobs, "weight_versions": versions}
    choice |= {"prompt_token_ids": PROMPT, "token_ids": [9, 2]} | more
    return {"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}}


class Stage:
    """A server that plays its acts one after the other, the last one for ever, and keeps what it was sent."""

    def __init__(self):
        stage, self.acts, self.heard, self.over = self, [], [], threading.Event()
        self.inside, self.most, self.lock = 0, 0, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                answer(200, {"data": [{"id": "tiny", "max_model_len": 64}]})(self)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with stage.lock:
                    stage.heard.append((self.path, dict(self.headers), body))
                    act = stage.acts.pop(0) if len(stage.acts) > 1 else stage.acts[0]
                    stage.inside += 1
                    stage.most = max(stage.most, stage.inside)
                try:
                    act(self)
                finally:
                    with stage.lock:
                        stage.inside -= 1

            def log_message(self, *args):
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *args):
                pass

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.over.set()
        self.http.shutdown()
        self.http.server_close()


def answer(status, body, **headers):
    def act(handler):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(data)

    return act


def wrong(status, message="no", code=None, **headers):
    return answer(status, {"error": {"message": message, "code": code}}, **headers)


def cut(handler):
    """Promises 100 bytes, sends ten and hangs up."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100")
    handler.end_headers()
    handler.wfile.write(b'{"choices"')
    handler.close_connection = True


def hang_up(handler):
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def silent(stage):
    return lambda handler: stage.over.wait(20)


def half(stage):
    def act(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "100")
        handler.end_headers()
        handler.wfile.write(b'{"choices"')
        handler.wfile.flush()
        stage.over.wait(20)

    return act


def drip(stage):
    """A byte now and then, which no timeout of a socket notices."""

    def act(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        while not stage.over.wait(0.05):
            handler.wfile.write(b"X")
            handler.wfile.flush()

    return act


@pytest.fixture
def stage():
    stage = Stage()
    yield stage
    stage.close()


def endpoint(stage, **fields):
    """With its pauses written down instead of slept, and without chance."""
    slept = []
    found = Endpoint(EndpointConfig(url=stage.url, **fields), sleep=slept.append, jitter=lambda: 1.0)
    return found, slept


def generate(found):
    return EndpointPolicy(found).generate(PROMPT, SAMPLING, "e/1")


def test_ids_logprobs_and_versions_come_through(stage):
    stage.acts = [answer(200, said())]
    found, _ = endpoint(stage)
    done = generate(found)
    assert (done.token_ids, done.logprobs, done.versions, done.finish) == ([9, 2], [-0.5, -0.25], [3, 4], "stop")
    assert done.prompt_digest == digest(PROMPT)
    path, headers, body = stage.heard[0]
    assert path == "/v1/completions" and headers["X-Session-ID"] == "e/1" and "Authorization" not in headers
    assert body == {
        "model": "tiny",
        "prompt": [5, 6, 7],
        "max_tokens": 4,
        "temperature": 1.0,
        "top_p": 1.0,
        "seed": 1,
        "stop_token_ids": [2],
        "ignore_eos": True,
        "logprobs": 1,
        "return_token_ids": True,
        "return_weight_versions": True,
        "session_id": "e/1",
    }
    assert found.model() == ("tiny", 64)
    assert found.meter.read()["prompt_tokens"] == 3 and found.meter.read()["completion_tokens"] == 2


def test_extra_fields_replace_and_remove(stage):
    stage.acts = [answer(200, said())]
    found, _ = endpoint(stage, extra={"max_tokens": None, "max_completion_tokens": 3})
    generate(found)
    assert stage.heard[0][2]["max_completion_tokens"] == 3 and "max_tokens" not in stage.heard[0][2]


def test_failures_that_pass_are_tried_again_with_growing_pauses(stage):
    stage.acts = [wrong(500), wrong(429, Retry_After="7"), hang_up, cut, answer(200, b"<html>"), answer(200, said())]
    found, slept = endpoint(stage)
    assert generate(found).token_ids == [9, 2]
    assert slept == [0.5, 7 + 1.0, 2.0, 4.0, 8.0]  # 0.5 doubled each time, and what the server asks for
    assert found.meter.read()["retries"] == 5 and found.meter.read()["calls"] == 1


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504, 529])
def test_statuses_that_may_pass(stage, status):
    stage.acts = [wrong(status), answer(200, said())]
    found, slept = endpoint(stage)
    assert generate(found).token_ids == [9, 2] and slept == [0.5]


@pytest.mark.parametrize("body", [{}, [], {"choices": []}, {"choices": [{}]}, {"choices": None}, said(logprobs=None)])
def test_answers_of_another_form_are_tried_again(stage, body):
    stage.acts = [answer(200, body), answer(200, said())]
    found, slept = endpoint(stage)
    if body == {"choices": [{}]}:
        with pytest.raises(ValueError, match="answers without token ids"):
            generate(found)
    else:
        assert generate(found).token_ids == [9, 2] and slept == [0.5]


def test_retries_end(stage):
    stage.acts = [wrong(503, "overloaded")]
    found, slept = endpoint(stage, retries=2)
    with pytest.raises(InfraError, match=r"completions: status 503 \(overloaded\); given up after 3 tries"):
        generate(found)
    assert slept == [0.5, 1.0]


def test_a_wait_beyond_the_deadline_is_not_begun(stage):
    stage.acts = [wrong(429, Retry_After="3600")]
    found, slept = endpoint(stage, deadline_s=60)
    with pytest.raises(InfraError, match="asks for 3600 seconds; given up after 1 tries"):
        generate(found)
    assert slept == []


@pytest.mark.parametrize("act", [silent, half, drip])
def test_the_deadline_holds_whatever_the_server_does(stage, act):
    stage.acts = [act(stage)]
    found, _ = endpoint(stage, deadline_s=0.4)
    found.model()
    began = time.monotonic()
    with pytest.raises(InfraError, match="no whole answer within 0.4 seconds"):
        generate(found)
    assert time.monotonic() - began < 10  # a stalled server would hold it for 20


def test_nobody_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        slept = []
        found = Endpoint(EndpointConfig(url=url), sleep=slept.append, jitter=lambda: 1.0)
        with pytest.raises(InfraError, match="/v1/models: ConnectionError .* given up after 4 tries"):
            generate(found)
        assert slept == [0.5, 1.0, 2.0]


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"prompt_token_ids": [5, 6, 8]}, "read 3 prompt tokens and was sent 3; they differ from position 2 on"),
        ({"prompt_token_ids": [1, 5, 6, 7]}, "read 4 prompt tokens and was sent 3; they differ from position 0 on"),
        ({"prompt_token_ids": [5, 6]}, "read 2 prompt tokens and was sent 3; they differ from position 2 on"),
        ({"token_ids": [9]}, "answers 1 tokens with 2 log-probs"),
        ({"token_ids": [], "logprobs": {"token_logprobs": []}}, "answers 0 tokens with 0 log-probs"),
        (
            {"token_ids": [1] * 5, "logprobs": {"token_logprobs": [0.0] * 5}},
            "answers 5 tokens .* 1 to 4 were asked for",
        ),
        ({"logprobs": {"token_logprobs": [-0.5, None]}}, "no finite numbers"),
        ({"logprobs": {"token_logprobs": [-0.5, float("nan")]}}, "no finite numbers"),
        ({"finish_reason": "abort"}, "ended the completion with 'abort'"),
    ],
)
def test_nothing_wrong_becomes_a_trajectory(stage, more, why):
    stage.acts = [answer(200, said(**more))]
    found, slept = endpoint(stage)
    with pytest.raises(InfraError, match=why):
        generate(found)
    assert slept == [] and len(stage.heard) == 1


def test_versions_that_are_not_told_or_are_no_numbers():
    assert completion(said(weight_versions=None), PROMPT, 4, version=8).versions == [8, 8]
    label = [{"version": "default", "start": 0, "end": 2}]
    assert completion(said(weight_versions=label), PROMPT, 4, version=8).versions == [8, 8]
    late = [{"version": "5", "start": 1, "end": 9}]
    assert completion(said(weight_versions=late), PROMPT, 4, version=8).versions == [8, 5]


@pytest.mark.parametrize(
    ("act", "why"),
    [
        (wrong(401, "bad key sk-secret"), r"refuses the key in TEST_KEY \(401: bad key \*\*\*\); set the right one"),
        (wrong(403, "no"), r"refuses the key in TEST_KEY \(403: no\)"),
        (
            wrong(404, "no model tiny", "model_not_found"),
            r"not found \(no model tiny model_not_found\); is the base URL",
        ),
        (wrong(400, "temperature is too hot"), r"refuses the request \(400: temperature is too hot\)"),
        (wrong(422, "what?"), r"refuses the request \(422: what\?\)"),
        (answer(400, b"<html> oh </html>"), r"refuses the request \(400: <html> oh </html>\)"),
        (answer(307, b"", Location="http://elsewhere/v1"), "has moved to http://elsewhere/v1; give the new base URL"),
        (wrong(429, "You exceeded your current quota", "insufficient_quota"), "the account has no quota left"),
    ],
)
def test_a_users_mistake_is_one_line_at_once(stage, act, why, monkeypatch):
    monkeypatch.setenv("TEST_KEY", "sk-secret")
    stage.acts = [act]
    found, slept = endpoint(stage, key_env="TEST_KEY")
    with pytest.raises(ValueError, match=why) as raised:
        generate(found)
    assert slept == [] and "\n" not in str(raised.value) and "sk-secret" not in str(raised.value)


@pytest.mark.parametrize(
    "act",
    [
        wrong(400, "This model's maximum context length is 64 tokens. However, you requested 70 tokens"),
        wrong(400, "too long", "context_length_exceeded"),
        wrong(413, "prompt is too long: 70 tokens > 64 maximum"),
    ],
)
def test_a_full_context_has_a_name_of_its_own(stage, act):
    stage.acts = [act]
    with pytest.raises(ContextLimit, match="lower max_context"):
        generate(endpoint(stage)[0])


def test_the_key_is_sent_and_no_netrc_instead(stage, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login someone password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("TEST_KEY", " sk-secret\n")
    stage.acts = [answer(200, said())]
    generate(endpoint(stage, key_env="TEST_KEY")[0])
    generate(endpoint(stage)[0])
    assert [headers.get("Authorization") for _, headers, _ in stage.heard] == ["Bearer sk-secret", None]


def test_no_call_is_made_once_the_money_is_spent(stage):
    stage.acts = [answer(200, said())]
    found, _ = endpoint(stage, prices=Prices(prompt=1e6, completion=2e6), max_cost=7)
    generate(found)  # 3 tokens for 3, 2 for 4
    with pytest.raises(OverBudget, match=r"7\.0000 of max_cost=7 is spent after 1 calls"):
        generate(found)
    assert len(stage.heard) == 1 and found.meter.cost == 7


class Time:
    """A clock that sleeping moves."""

    def __init__(self):
        self.now, self.slept = 0.0, []

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


def test_the_pace_is_kept_and_retries_count(stage):
    stage.acts = [answer(200, said()), wrong(500), answer(200, said())]
    time_ = Time()
    config = EndpointConfig(url=stage.url, requests_per_minute=60)
    found = Endpoint(config, clock=lambda: time_.now, sleep=time_.sleep, jitter=lambda: 1.0)
    first, second = generate(found), generate(found)
    assert time_.slept == [1.0, 0.5, 0.5]  # the second's turn, the pause behind its 500, its second try's turn
    assert (first.queued, second.queued) == (0.0, 1.5)


def test_tokens_are_paced_by_what_was_used(stage):
    stage.acts = [answer(200, said())]
    time_ = Time()
    config = EndpointConfig(url=stage.url, tokens_per_minute=60)
    found = Endpoint(config, clock=lambda: time_.now, sleep=time_.sleep)
    generate(found)
    generate(found)
    assert time_.slept == [5.0]  # 3 + 4 tokens were taken, 3 + 2 used


def test_a_pace_that_leaves_no_room_is_said(stage):
    stage.acts = [answer(200, said())]
    found, slept = endpoint(stage, requests_per_minute=1, deadline_s=10)
    generate(found)
    with pytest.raises(InfraError, match="the pace leaves no room within the deadline"):
        generate(found)
    assert slept == [] and len(stage.heard) == 1


def test_no_more_calls_at_once_than_allowed(stage):
    stage.acts = [lambda handler: (time.sleep(0.03), answer(200, said())(handler))]
    found, _ = endpoint(stage, concurrency=2)
    found.model()
    threads = [threading.Thread(target=generate, args=(found,)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(stage.heard) == 6 and stage.most == 2


def test_chat_keeps_the_message_and_makes_an_action_of_it(stage):
    call = {"id": "c1", "type": "function", "function": {"name": "bash", "arguments": '{"command": "ls"}'}}
    message = {"role": "assistant", "content": "I look.", "tool_calls": [call], "reasoning": "hm"}
    usage = {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 5}}
    stage.acts = [
        answer(200, {"choices": [{"message": message, "finish_reason": "tool_calls"}], "usage": usage}),
        answer(200, {"choices": [{"message": {"content": None}, "finish_reason": "stop"}]}),
    ]
    found, _ = endpoint(stage, model="other")
    question = [{"role": "user", "content": "list"}]
    reply = ChatPolicy(found).reply(question, SAMPLING, "e", [])
    assert reply.text == 'I look.\n<tool: bash>\n{"command": "ls"}\n</tool>'  # a tool that wasn't offered
    assert reply.message == {"role": "assistant", "content": "I look.", "tool_calls": [call]}
    assert (reply.usage.prompt, reply.usage.completion, reply.usage.cached) == (9, 4, 5)
    body = stage.heard[0][2]
    assert body["messages"] == question and body["model"] == "other" and "tools" not in body
    assert ChatPolicy(found).reply(question, SAMPLING, "e").message == {"role": "assistant", "content": ""}


def test_which_model_is_asked_for(stage):
    assert endpoint(stage)[0].model() == ("tiny", 64)
    assert endpoint(stage, model="huge")[0].model() == ("huge", 0)

    stage.http.RequestHandlerClass.do_GET = answer(200, {"data": [{"id": "a"}, {"id": "b"}]})
    with pytest.raises(ValueError, match=r"lists 2 models \(a, b\); name one"):
        endpoint(stage)[0].model()
    stage.http.RequestHandlerClass.do_GET = wrong(404)
    assert endpoint(stage, model="a")[0].model() == ("a", 0)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"url": "localhost:8000"}, "is no base URL"),
        ({"url": "ftp://host/v1"}, "is no base URL"),
        ({"url": "http://me:secret@host/v1"}, "holds a password"),
        ({"deadline_s": 0}, "deadline_s=0 must be positive"),
        ({"retries": -1}, "retries=-1 is negative"),
        ({"max_cost": 5}, "max_cost=5 without prices bounds nothing"),
        ({"key_env": "NOT_SET_ANYWHERE"}, "environment variable NOT_SET_ANYWHERE holds no API key"),
    ],
)
def test_a_bad_config_is_refused_before_anything_is_sent(fields, why):
    with pytest.raises(ValueError, match=why):
        Endpoint(EndpointConfig(**{"url": "http://host/v1", **fields}))


def test_base_urls():
    urls = ("http://host:8000", "http://host:8000/", "http://host/v1/", "https://host/api/v3")
    assert [EndpointConfig(url=url).url for url in urls] == [
        *("http://host:8000/v1", "http://host:8000/v1", "http://host/v1", "https://host/api/v3")
    ]


def test_how_long_a_server_asks_to_wait():
    now = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert retry_after("1.5", now) == 1.5
    assert retry_after("Fri, 02 Jan 2026 03:04:35 GMT", now) == 30
    assert retry_after("Fri, 02 Jan 2026 03:04:00 GMT", now) == 0
    assert [retry_after(value, now) for value in ("", "soon", "-3", "nan", "inf")] == [0] * 5


def test_usage_of_whatever_a_server_says():
    assert (
        usage_of([]).prompt
        == usage_of({"usage": None}).prompt
        == usage_of({"usage": {"prompt_tokens": "3"}}).prompt
        == 0
    )
