"""Tool calls as text and as JSON: the protocol that our policies speak (`envs/tools.py`) ⇄ OpenAI's `tool_calls`.

    <tool: bash>
    ls                     ⇄     {"name": "bash", "arguments": "{\\"command\\": \\"ls\\"}"}
    </tool>

The body of a call is the tool's only argument. A tool without arguments has an empty body; of one with several the body is
the JSON object of its arguments.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

from envs.tools import FormatError, parse

Json = Mapping[str, Any]
OBJECT = "{}"
"""Stands for a body that is the JSON object of all arguments."""


def schema(name: str, about: str) -> dict[str, Any]:
    """A tool as OpenAI's `tools` has it: `submit` takes nothing, `bash` a `command`, any other a `body`."""
    argument = {"submit": "", "bash": "command"}.get(name, "body")
    properties = {argument: {"type": "string"}} if argument else {}
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": about, "parameters": parameters}}


def arguments_of(tools: Sequence[Json]) -> dict[str, str]:
    """Name of each tool → the argument that its body is; "" where it takes none, `OBJECT` where it takes several.

    `ValueError` for what is no list of function tools.
    """
    found: dict[str, str] = {}
    for tool in tools:
        function = _mapping(_mapping(tool).get("function"))
        name, parameters = function.get("name"), _mapping(function.get("parameters"))
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"tool {str(tool)[:80]!r} is no function with a name of letters, digits and _; give one")
        properties, required = _mapping(parameters.get("properties")), parameters.get("required") or []
        names = required if len(required) == 1 else list(properties)
        text = len(names) == 1 and _mapping(properties.get(names[0])).get("type", "string") == "string"
        found[name] = names[0] if text else OBJECT if names else ""
    return found


def _mapping(value: Any) -> Json:
    return value if isinstance(value, Mapping) else {}


def to_json(action: str, arguments: Mapping[str, str]) -> tuple[str, list[dict[str, Any]]]:
    """An action as the text around its call and a list of that call; all text and no call where it isn't just one.

    arguments: `arguments_of` the tools.
    """
    thought, action = _thought(action)
    call = parse(action, list(arguments), bodiless=[name for name, argument in arguments.items() if not argument])
    argument = "" if isinstance(call, FormatError) else arguments[call.name]
    if isinstance(call, FormatError) or (argument == OBJECT and not isinstance(_loads(call.body), dict)):
        return thought + action, []
    given = call.body if argument == OBJECT else json.dumps({argument: call.body} if argument else {})
    around = action[: action.index("<tool: ")] + action[action.index("</tool>") + len("</tool>") :]
    function = {"name": call.name, "arguments": given}
    return (thought + around).strip(), [{"id": f"call_{uuid4().hex[:16]}", "type": "function", "function": function}]


def _thought(message: str) -> tuple[str, str]:
    """What a message thinks first, whose calls don't count, and what it says."""
    if not message.lstrip().startswith("<think>"):
        return "", message
    thought, end, said = message.partition("</think>")
    return thought + end, said


def to_text(message: Json, arguments: Mapping[str, str]) -> str:
    """The action that an assistant's message (`content`, `tool_calls`) stands for."""
    parts = [content_of(message)] if message.get("content") else []
    for call in message.get("tool_calls") or []:
        function = call.get("function") or {}
        parts.append(_text(str(function.get("name", "")), function.get("arguments") or "", arguments))
    return "\n".join(parts)


def _text(name: str, given: str, arguments: Mapping[str, str]) -> str:
    argument, values = arguments.get(name, OBJECT), _loads(given)
    body = given
    if isinstance(values, dict) and argument != OBJECT and set(values) <= {argument}:
        body = str(values.get(argument, ""))
    return f"<tool: {name}>\n{body}\n</tool>" if body else f"<tool: {name}>\n</tool>"


def content_of(message: Json) -> str:
    """The text of a message, whose content is a string, nothing, or a list of text parts; `ValueError` for other parts."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list) or any(not isinstance(p, Mapping) or p.get("type") != "text" for p in content):
        raise ValueError(f"message content {str(content)[:80]!r} is neither text nor a list of text parts; send text")
    return "".join(str(part.get("text", "")) for part in content)


def about(tools: Sequence[Json]) -> str:
    """What tells a policy of the text protocol which tools there are; "" where there is none."""
    if not tools:
        return ""
    lines = []
    for name, argument in arguments_of(tools).items():
        function = next(tool["function"] for tool in tools if tool["function"]["name"] == name)
        body = f"the body is its {argument}" if argument else "it has no body"
        if argument == OBJECT:
            body = f"the body is a JSON object with {', '.join(function['parameters']['properties'])}"
        lines.append(f"- {name}: {function.get('description') or name}; {body}")
    return "Each turn is exactly one tool call:\n<tool: NAME>\nBODY\n</tool>\n\nTools:\n" + "\n".join(lines)


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
