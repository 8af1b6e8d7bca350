"""CWM's text protocol for tools: parse one call out of an action, run it in a sandbox, say what happened in one text.

    <tool: edit>
    shop.py
    <<<<<<< SEARCH
        return a + b
    =======
        return a * b
    >>>>>>> REPLACE
    </tool>

Exactly one call a turn. The format is facebookresearch/cwm's (`PROMPTING_GUIDE.md`, `cwm/rl/swerl/default_tools.py`); the
tools here run on the host side of the sandbox protocol instead of as scripts inside the agent's shell.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from envs.errors import SandboxDead
from envs.sandbox.base import Result, Sandbox

_CALL = re.compile(r"<tool: (\w+)>\n(?:(.*?)\n)?</tool>", re.DOTALL)
_BLOCK = re.compile(r"<<<<<<< SEARCH\n(.*?)\n?=======\n(.*?)\n?>>>>>>> REPLACE\Z", re.DOTALL)
MAX_FILE = 1 << 20


@dataclass(frozen=True)
class ToolCall:
    """One well-formed call."""

    name: str
    body: str


@dataclass(frozen=True)
class FormatError:
    """An action that is no call; `text` tells the model what to do instead."""

    text: str


def parse(action: str, tools: Sequence[str], bodiless: Sequence[str] = ("submit",)) -> ToolCall | FormatError:
    """The one tool call of an action. Text around it is allowed; a second call, a stray tag or an empty body is not.

    bodiless: tools whose body may be empty.
    """
    opened, closed = len(re.findall(r"<tool: ", action)), action.count("</tool>")
    if opened != 1 or closed != 1:
        return FormatError(f"Error: expected one tool call, found {opened} opening and {closed} closing tags.")
    match = _CALL.search(action)
    if match is None:
        return FormatError("Error: write a tool call as <tool: NAME>, a new line, the body, a new line, </tool>.")
    name, body = match.group(1), match.group(2) or ""
    if name not in tools:
        return FormatError(f"Error: unknown tool {name!r}. Tools: {', '.join(tools)}.")
    if name not in bodiless and not body.strip():
        return FormatError(f"Error: the body of {name} is empty.")
    return ToolCall(name, body)


def bash(sandbox: Sandbox, body: str, *, timeout: float, limit: int, silence: float | None = None) -> str:
    """Run commands in the persistent shell; the merged output, and a sentence for whatever ended it early.

    A non-zero exit status is not reported, as in CWM. timeout, silence: seconds, in all and without output (see
    `Sandbox.run`). Raises `SandboxDead`.
    """
    result = sandbox.run(body, timeout=timeout, silence=silence)
    if result.cause == "dead":
        raise SandboxDead(f"sandbox {sandbox.id} died during a command")
    quiet = result.clock == "silence"
    return _cut(result.text(), limit) + _note(
        result, f"{silence:g} seconds without output" if quiet else f"{timeout:g} seconds"
    )


def _note(result: Result, time: str) -> str:
    said = {
        "timeout": f"The command was killed after {time}.",
        "oom": "The command was killed: out of memory.",
        "pids": "The command hit the limit of processes.",
        "disk": "The disk of the sandbox is full.",
        "output": "The command wrote too much.",
    }.get(result.cause, "")
    if result.restarted:
        said = f"{said} The shell was started again in the same directory.".strip()
    return f"\nError: {said}" if said else ""


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[:limit] + "\n[...]"


def edit(sandbox: Sandbox, body: str, *, context: int = 8) -> str:
    """Replace one run of whole lines that must occur verbatim and once. `context` numbered lines are shown each side.

    Bytes outside the match stay as they are; a file with CRLF line ends keeps them.
    """
    path, _, rest = body.partition("\n")
    path = path.strip()
    match = _BLOCK.match(rest.rstrip("\n"))
    if not path or match is None or rest.count("<<<<<<< SEARCH") != 1:
        return "Error: the body of edit is a path and one <<<<<<< SEARCH / ======= / >>>>>>> REPLACE block."
    try:
        old = sandbox.read(path, limit=MAX_FILE)
        text = old.decode("utf-8")
    except UnicodeDecodeError:
        return f"Error: {path} is not UTF-8 text."
    except OSError as error:
        return f"Error: {_reason(error, path)}"
    newline = "\r\n" if "\r\n" in text else "\n"
    lines = text.split(newline)
    search, new = match.group(1).split("\n"), match.group(2).split("\n") if match.group(2) else []
    found = [i for i in range(len(lines) - len(search) + 1) if lines[i : i + len(search)] == search]
    if not any(search):
        return "Error: SEARCH is empty; use create for a new file."
    if not found:
        return f"Error: SEARCH does not occur in {path}."
    if len(found) > 1:
        return f"Error: SEARCH occurs {len(found)} times in {path}, at lines {', '.join(str(i + 1) for i in found)}; add lines."
    at = found[0]
    lines[at : at + len(search)] = new
    try:
        sandbox.write(path, newline.join(lines).encode())
    except OSError as error:
        return f"Error: {_reason(error, path)}"
    shown = "".join(
        f"\n{i + 1:6}\t{lines[i]}" for i in range(max(0, at - context), min(len(lines), at + len(new) + context))
    )
    return f"Edited {path} at line {at + 1}." + (shown if context else "")


def create(sandbox: Sandbox, body: str) -> str:
    """Create a file: the path on the first line, its content on the others. The file must not exist; its
    directory is made if need be."""
    path, _, content = body.partition("\n")
    path = path.strip()
    try:
        sandbox.read(path, limit=MAX_FILE)
        return f"Error: {path} exists; use edit."
    except FileNotFoundError:
        pass
    except OSError as error:
        return f"Error: {_reason(error, path)}"
    try:
        sandbox.write(path, (content + "\n").encode("utf-8", "replace") if content else b"")
    except OSError as error:
        return f"Error: {_reason(error, path)}"
    return f"Created {path}."


def _reason(error: OSError, path: str) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{path} does not exist."
    if isinstance(error, IsADirectoryError):
        return f"{path} is a directory."
    if isinstance(error, PermissionError):
        return f"{path} can't be accessed."
    return f"{path}: {error.strerror or error}."


Tool = Callable[..., str]
TOOLS: dict[str, Tool] = {"bash": bash, "edit": edit, "create": create}
"""Tools that act on the sandbox; `submit` is the env's own."""
