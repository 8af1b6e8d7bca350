"""Tool calls as text and as JSON, and conversations as tokens."""

import json

import pytest

from envs.tools import ToolCall, parse
from policy.calls import OBJECT, about, arguments_of, content_of, schema, to_json, to_text
from policy.conversation import Conversations
from policy.renderer import CwmRenderer, train_tokenizer

BASH = {"type": "function", "function": {"name": "bash", "description": "Run it", "parameters": {
    "type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}}}  # fmt: skip
FIND = {"type": "function", "function": {"name": "find", "parameters": {
    "type": "object", "properties": {"path": {"type": "string"}, "depth": {"type": "integer"}}}}}  # fmt: skip
DONE = {"type": "function", "function": {"name": "done", "description": "End it"}}
TOOLS = [BASH, FIND, DONE]


def test_what_a_body_is():
    assert arguments_of(TOOLS) == {"bash": "command", "find": OBJECT, "done": ""}
    ours = [schema(name, name) for name in ("bash", "edit", "submit")]
    assert arguments_of(ours) == {"bash": "command", "edit": "body", "submit": ""}
    optional = {"function": {"name": "look", "parameters": {
        "properties": {"path": {"type": "string"}, "depth": {"type": "integer"}}, "required": ["path"]}}}  # fmt: skip
    assert arguments_of([optional]) == {"look": "path"}
    for bad in ({}, {"function": {"name": "no name"}}, {"function": "bash"}, "bash"):
        with pytest.raises(ValueError, match="is no function with a name"):
            arguments_of([bad])


@pytest.mark.parametrize(
    ("action", "name", "arguments"),
    [
        ("<tool: bash>\nls -l\necho '\"x\"'\n</tool>", "bash", {"command": "ls -l\necho '\"x\"'"}),
        ('<tool: find>\n{"path": "a", "depth": 2}\n</tool>', "find", {"path": "a", "depth": 2}),
        ("<tool: done>\n</tool>", "done", {}),
    ],
)
def test_calls_go_there_and_back(action, name, arguments):
    known = arguments_of(TOOLS)
    content, (call,) = to_json(f"I look.\n{action}\n", known)
    assert content == "I look." and call["type"] == "function" and call["id"]
    assert call["function"]["name"] == name and json.loads(call["function"]["arguments"]) == arguments
    back = to_text({"content": content, "tool_calls": [call]}, known)
    assert back == f"I look.\n{action}" and parse(back, list(known), ["done"]).name == name


@pytest.mark.parametrize(
    "action",
    [
        "no call",
        "<tool: bash>\nls\n</tool><tool: bash>\nls\n</tool>",
        "<tool: rm>\n-r\n</tool>",
        "<tool: find>\nnot JSON\n</tool>",
        "<tool: bash>\n</tool>",
        "<tool: bash>\nls",
    ],
)
def test_what_is_no_single_call_stays_text(action):
    assert to_json(action, arguments_of(TOOLS)) == (action, [])


def test_thoughts_are_no_calls():
    thought = "<think>\n<tool: bash>\nrm\n</tool>?</think>"
    content, (call,) = to_json(f"{thought}\n<tool: bash>\nls\n</tool>", arguments_of(TOOLS))
    assert content == thought and json.loads(call["function"]["arguments"]) == {"command": "ls"}
    assert to_json(thought, arguments_of(TOOLS)) == (thought, [])
    assert to_json("<think>\n<tool: bash>\nls\n</tool>", arguments_of(TOOLS))[1] == []


def test_a_model_may_call_wrongly():
    known = arguments_of(TOOLS)
    wrong = [
        {"function": {"name": "bash", "arguments": '{"cmd": "ls"}'}},
        {"function": {"name": "rm", "arguments": "-r"}},
    ]
    assert to_text({"content": None, "tool_calls": wrong}, known) == (
        '<tool: bash>\n{"cmd": "ls"}\n</tool>\n<tool: rm>\n-r\n</tool>'
    )
    assert parse("<tool: submit>\n</tool>", ["submit"]) == ToolCall("submit", "")


def test_content_may_be_parts():
    assert content_of({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}) == "ab"
    assert content_of({}) == ""
    with pytest.raises(ValueError, match="neither text nor a list of text parts"):
        content_of({"content": [{"type": "image_url"}]})


@pytest.fixture(scope="module")
def renderer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["list the files", "<tool: bash>\nls\n</tool>", "a.py b.py"] * 10, 400).save(
        str(path / "tokenizer.json")
    )
    return CwmRenderer(path)


SYSTEM, USER = {"role": "system", "content": "Help."}, {"role": "user", "content": "list the files"}
CALL = {"id": "c1", "type": "function", "function": {"name": "bash", "arguments": '{"command": "ls"}'}}
ANSWER = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "a.py"}


def test_a_conversation_is_laid_out_as_an_episode(renderer):
    asked = Conversations(renderer).prompt([SYSTEM, USER, ANSWER, RESULT], [BASH])
    system = "Help.\n\nEach turn is exactly one tool call:\n<tool: NAME>\nBODY\n</tool>\n\nTools:\n- bash: Run it; the body is its command"
    assert system.endswith(about([BASH]))
    said = [*renderer.encode("<tool: bash>\nls\n</tool>"), renderer.end_id]
    expected = [*renderer.start("list the files", system), *said, *renderer.extend(said[-1], "tool: bash", "a.py")]
    assert asked.token_ids == expected and asked.episode == ""
    plain = Conversations(renderer).prompt([USER, {"role": "assistant", "content": "x"}, USER, USER])
    said = [*renderer.encode("x"), renderer.end_id]
    heard = renderer.extend(said[-1], "tool: bash", "list the files\n\nlist the files")
    assert plain.token_ids == [*renderer.start("list the files"), *said, *heard]


def test_answers_come_back_as_the_tokens_that_were_sampled(renderer):
    conversations = Conversations(renderer)
    asked = conversations.prompt([USER], [BASH])
    sampled = [i for c in "<tool: bash>\nls\n</tool>" for i in renderer.encode(c)]  # one by one: not how it is encoded
    assert sampled != renderer.encode("<tool: bash>\nls\n</tool>")
    conversations.remember(asked, ANSWER, sampled, "e1")
    # A client may have dropped ids, spaced arguments anew and added nulls.
    told = {"id": "other", "function": {"name": "bash", "arguments": '{"command":"ls"}'}, "index": 0}
    again = [USER, {"role": "assistant", "content": None, "tool_calls": [told], "refusal": None}, RESULT]
    asked = conversations.prompt(again, [BASH])
    first = [*renderer.start("list the files", about([BASH])), *sampled]
    assert asked.token_ids == first + renderer.extend(sampled[-1], "tool: bash", "a.py")
    assert asked.episode == "e1"
    for other in (
        conversations.prompt(again, [BASH], session="s"),  # another session
        conversations.prompt(again, [BASH, DONE]),  # other tools
        conversations.prompt([SYSTEM, *again], [BASH]),  # another beginning
        conversations.prompt([USER, ANSWER | {"content": "x"}, RESULT], [BASH]),  # another answer
    ):
        assert other.episode == "" and sampled[:8] not in [
            other.token_ids[i : i + 8] for i in range(len(other.token_ids))
        ]


def test_what_was_used_longest_ago_is_forgotten(renderer):
    conversations = Conversations(renderer, most_tokens=10)
    asked = [conversations.prompt([{"role": "user", "content": f"{n}"}]) for n in range(3)]
    answer = {"role": "assistant", "content": "x"}
    for n in range(3):
        conversations.remember(asked[n], answer, [1, 2, 3, 4], f"e{n}")
        conversations.prompt([{"role": "user", "content": "0"}, answer, USER])  # the first is used again and again
    known = [conversations.prompt([{"role": "user", "content": f"{n}"}, answer, USER]).episode for n in range(3)]
    assert known == ["e0", "", "e2"]


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([], "must begin with a user's"),
        ([SYSTEM], "must begin with a user's"),
        ([USER, ANSWER], "not end with an assistant's"),
        ([ANSWER, USER], "must begin with a user's"),
        ([USER, ANSWER, ANSWER, USER], r"messages\[2\] is an assistant's behind another one"),
        ([USER, {"role": "robot"}], r"messages\[1\] has role 'robot'; one of"),
    ],
)
def test_what_is_no_conversation_is_refused(renderer, messages, why):
    with pytest.raises(ValueError, match=why):
        Conversations(renderer).prompt(messages)
