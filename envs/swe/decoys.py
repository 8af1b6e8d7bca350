"""Trees of a repository that behave as known and read otherwise: they tell a script that runs the code from one that reads it.

Made from the two versions of a repair's files, the one with the bug and the repaired one:

    rewritten   behaves as it did; beside each line that the repair touches stand the other version's lines, as comments;
                modules and functions get a variable that nothing reads: text, syntax tree and bytecode all differ
    raising     the repaired files, but each repaired function raises as soon as it is called
"""

from __future__ import annotations

import ast
import difflib
import random
from collections.abc import Iterable, Iterator, Mapping

from envs.syntax import parse

Function = ast.FunctionDef | ast.AsyncFunctionDef
Files = Mapping[str, bytes | None]
"""Relative path → content; None where there is no such file."""


def rewritten(files: Files, others: Files, rng: random.Random) -> dict[str, bytes | None]:
    """The Python files of `files` that `others` has differently, rewritten. Files that one side lacks, or that this
    interpreter can't parse, are left out."""
    found: dict[str, bytes | None] = {}
    for path, data in files.items():
        other = others.get(path)
        if path.endswith(".py") and data is not None and other is not None and data != other:
            try:
                found[path] = _rewrite(data, other, f"_{rng.getrandbits(48):012x}")
            except (SyntaxError, ValueError):
                continue
    return found


def raising(repaired: Files, others: Files, rng: random.Random) -> dict[str, bytes | None]:
    """`repaired` with a raise at the start of each function that `others` has differently or lacks.

    {} where the two also differ elsewhere (in a signature, a constant, a file that is not Python): there a script may tell
    them apart without a call of such a function.
    """
    made: dict[str, bytes | None] = {}
    for path, data in repaired.items():
        other = others.get(path)
        if data == other:
            continue
        if data is None or other is None or not path.endswith(".py"):
            return {}
        try:
            text = _raise(data, other, f"if __name__: raise RuntimeError('{rng.getrandbits(48):012x}')")
        except (SyntaxError, ValueError):
            return {}
        if text is None:
            return {}
        made[path] = text
    return made


def _rewrite(data: bytes, other: bytes, name: str) -> bytes:
    """Raises `SyntaxError` or `ValueError` for what is no Python of this interpreter."""
    twin, tree = _functions(parse(other)), parse(data)
    text, comments = _beside(data.splitlines(keepends=True), other.splitlines(keepends=True), name)
    if not _same(text, tree):  # a comment fell into a string, or between joined lines
        text = _ended(data) + comments
    spare = f"{name} = None".encode()
    text = _begin(text, list(_places(_changed(_functions(parse(text)), twin))), spare)
    text = _ended(text) + spare + b"\n"
    parse(text)
    return text


def _raise(data: bytes, other: bytes, line: str) -> bytes | None:
    """None where the two differ outside of functions, or a function has no place for `line`."""
    tree, twin = parse(data), parse(other)
    mine, theirs = _functions(tree), _functions(twin)
    changed = _changed(mine, theirs)
    places = list(_places(changed))
    if not changed or len(places) < len(changed):
        return None
    for node in _changed(theirs, mine):
        node.body = []
    for key, node in mine.items():
        if key not in theirs:
            _remove(tree, node)
        elif node in changed:
            node.body = []
    if ast.dump(tree) != ast.dump(twin):
        return None
    text = _begin(data, places, line.encode())
    parse(text)
    return text


def _same(text: bytes, tree: ast.Module) -> bool:
    try:
        return ast.dump(parse(text)) == ast.dump(tree)
    except (SyntaxError, ValueError):
        return False


def _ended(text: bytes) -> bytes:
    return text if text.endswith(b"\n") or not text else text + b"\n"


def _beside(mine: list[bytes], others: list[bytes], name: str) -> tuple[bytes, bytes]:
    """`mine` with the differing lines of `others` before its own, as comments; and these comments alone."""
    text, comments = b"", b""
    for tag, i1, i2, j1, j2 in difflib.SequenceMatcher(None, mine, others, autojunk=False).get_opcodes():
        if tag != "equal":
            shown = b"".join(map(_comment, others[j1:j2])) or f"# {name}\n".encode()
            text, comments = _ended(text) + shown, comments + shown
        text += b"".join(mine[i1:i2])
    return text, comments


def _comment(line: bytes) -> bytes:
    text = line.strip()
    return line[: len(line) - len(line.lstrip())].rstrip(b"\r\n") + b"# " + text + b"\n"


def _functions(tree: ast.Module) -> dict[str, Function]:
    """Functions and methods by name, numbered where a name occurs again. What is inside a function is part of it."""
    found: dict[str, Function] = {}

    def walk(nodes: Iterable[ast.AST], prefix: str) -> None:
        for node in nodes:
            if isinstance(node, Function):
                number = sum(key.startswith(f"{prefix}{node.name}#") for key in found)
                found[f"{prefix}{node.name}#{number}"] = node
            else:
                walk(ast.iter_child_nodes(node), f"{prefix}{node.name}." if isinstance(node, ast.ClassDef) else prefix)

    walk(tree.body, "")
    return found


def _changed(mine: Mapping[str, Function], theirs: Mapping[str, Function]) -> list[Function]:
    """Those of `mine` whose bodies `theirs` has differently, or that it lacks."""
    bodies = {key: list(map(ast.dump, node.body)) for key, node in theirs.items()}
    return [node for key, node in mine.items() if bodies.get(key) != list(map(ast.dump, node.body))]


def _remove(tree: ast.Module, function: Function) -> None:
    for node in ast.walk(tree):
        for value in vars(node).values():
            if isinstance(value, list) and function in value:
                value.remove(function)


def _places(functions: list[Function]) -> Iterator[tuple[int, int]]:
    """Line and column of the first statement behind the docstring, where it has a line of its own."""
    for node in functions:
        above, first = node.lineno, node.body[0]
        if ast.get_docstring(node) is not None and len(node.body) > 1:
            above, first = first.end_lineno or above, node.body[1]
        line = min([first.lineno, *(d.lineno for d in getattr(first, "decorator_list", []))])
        if line > above:
            yield line, first.col_offset


def _begin(text: bytes, places: list[tuple[int, int]], statement: bytes) -> bytes:
    """The source with `statement` on a line of its own at these places."""
    lines = text.splitlines(keepends=True)
    for line, column in sorted(places, reverse=True):
        lines.insert(line - 1, lines[line - 1][:column] + statement + b"\n")
    return b"".join(lines)
