"""What failed in a pytest run, read from its JUnit report: which test, at which of its statements, how.

A run that can be read: `python -m pytest -vv --tb=auto --junitxml=FILE -o junit_family=xunit1 …` (`-vv` so that values
are whole; `xunit1` because only it says where a test is defined). The report is data from a sandbox: it is parsed, bounded
in size, and nothing of it is executed.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from xml.etree import ElementTree

from envs.syntax import parse

MAX_REPORT = 64 << 20
"""Bytes of a report that is read."""
_WHERE = re.compile(r"^(\S+\.py):(\d+):", re.M)
_TYPED = re.compile(r"^(?:failed on (?:setup|teardown) with [\"'])?((?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*)(?:: |$)")
_ARGUMENT = re.compile(r"(?:^|, )(\w+) = ")
_HIDDEN_ARGUMENT = re.compile(r"<.*>|Path\(|tmp|^\.\.\.$")


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One failed test."""

    test: str
    """Node id: `tests/test_x.py::TestX::test_y[param]`."""
    source: str = ""
    """The test function, dedented; "" where it is not known."""
    code: str = ""
    """The statement of it that failed with what it needs of the statements before it; "" where it is not known."""
    arguments: str = ""
    """Values of the test's parameters that `code` uses, as `name = value, …`."""
    error: str = "AssertionError"
    """The exception's type as the report names it."""
    message: str = ""
    """What the exception says, without the type."""


def failures(report: bytes, sources: Mapping[str, bytes]) -> list[Failure]:
    """The failed tests of a JUnit report in its order, each once.

    Args:
        report: the XML file.
        sources: path → bytes of the repository's test files.
    Raises `ValueError` for a report that is too large or none.
    """
    if len(report) > MAX_REPORT or b"<!DOCTYPE" in report or b"<!ENTITY" in report:
        raise ValueError("the test report is larger than 64 MiB or defines entities; run fewer tests at once")
    try:
        root = ElementTree.fromstring(report)
    except ElementTree.ParseError as error:
        raise ValueError(f"the test report is not XML ({error}); was the run cut off?") from None
    found: dict[str, Failure] = {}
    trees: dict[str, ast.Module | None] = {}
    for case in root.iter("testcase"):
        bad = case.find("failure")
        bad = case.find("error") if bad is None else bad
        if bad is not None:
            test = node_id(case.get("classname", ""), case.get("name", ""), sources)
            if test not in found:
                found[test] = _failure(test, case.get("file", ""), int(case.get("line", "0") or 0), bad, sources, trees)
    return list(found.values())


def node_id(classname: str, name: str, sources: Mapping[str, bytes]) -> str:
    """The id that pytest gives a test, from the dotted names of a report; `sources` tells files from classes."""
    parts = classname.split(".") if classname else name.split(".")
    for cut in range(len(parts), 0, -1):
        path = "/".join(parts[:cut]) + ".py"
        if path in sources:
            return "::".join([path, *parts[cut:], *([name] if classname else [])])
    return "::".join([*parts, name] if classname else parts)


def _failure(
    test: str,
    path: str,
    line: int,
    bad: ElementTree.Element,
    sources: Mapping[str, bytes],
    trees: dict[str, ast.Module | None],
) -> Failure:
    said, text = bad.get("message", ""), bad.text or ""
    if said == "collection failure":  # of a whole file; what it raised is in the text only
        said = next((line[1:].strip() for line in reversed(text.splitlines()) if line.startswith("E ")), said)
    error, message = _split(said)
    if path not in trees:
        trees[path] = _tree(sources.get(path, b""))
    lines = sources.get(path, b"").decode("utf-8", "replace").splitlines()
    function = _function(trees[path], line + 1, test)
    if function is None:
        return Failure(test=test, error=error, message=message)
    where = [
        int(n) for p, n in _WHERE.findall(text) if p == path and function.lineno <= int(n) <= (function.end_lineno or 0)
    ]
    code = snippet(function, where[0], lines) if where else ""
    first = min([function.lineno, *(d.lineno for d in function.decorator_list)])
    source = textwrap.dedent("\n".join(lines[first - 1 : function.end_lineno]))
    return Failure(test=test, source=source, code=code, arguments=_arguments(text, code), error=error, message=message)


def _split(said: str) -> tuple[str, str]:
    """Type and message; a plain assert's message begins with `assert` and has no type."""
    if said.startswith("assert "):
        return "AssertionError", said
    typed = _TYPED.match(said)
    if typed is None:
        return "AssertionError", said
    rest = said[typed.end() :]
    return typed[1], rest.removesuffix('"').removesuffix("'") if said.startswith("failed on") else rest


def _tree(source: bytes) -> ast.Module | None:
    try:
        return parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _function(tree: ast.Module | None, line: int, test: str) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """The function of a test's name, the one at `line` where there are several."""
    name = test.split("::")[-1].split("[")[0]
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    named = [n for n in (ast.walk(tree) if tree else ()) if isinstance(n, kinds) and n.name == name]
    return min(named, key=lambda n: abs(n.lineno - line), default=None)


def _arguments(text: str, code: str) -> str:
    """Parameters as pytest shows them before the source, those that `code` names; objects without a value left out."""
    head = ", ".join(text.split("\n\n")[0].splitlines()) if "\n\n" in text else ""
    marks = list(_ARGUMENT.finditer(head)) if re.match(r"\w+ = ", head) else []
    shown = []
    ends = [*(m.start() for m in marks[1:]), len(head)]
    for mark, end in zip(marks, ends, strict=False):
        value = head[mark.end() : end].strip()
        if re.search(rf"\b{mark[1]}\b", code) and not _HIDDEN_ARGUMENT.search(value) and len(value) < 200:
            shown.append(f"{mark[1]} = {value}")
    return ", ".join(shown)


def snippet(function: ast.FunctionDef | ast.AsyncFunctionDef, line: int, lines: list[str]) -> str:
    """The statement of a function at a line (from 1), dedented, below what it needs: headers of the blocks around it, and
    the statements before it that bind or call what it names; other checks are left out."""
    shown: set[int] = set()
    body: list[ast.stmt] = function.body
    path: list[tuple[list[ast.stmt], int]] = []
    while True:
        index = next((i for i, s in enumerate(body) if s.lineno <= line <= (s.end_lineno or 0)), -1)
        if index < 0:
            break
        path.append((body, index))
        blocks = [getattr(body[index], b, []) for b in ("body", "orelse", "finalbody")]
        body = next((b for b in blocks if b and b[0].lineno <= line <= (b[-1].end_lineno or 0)), [])
    if not path:
        return ""
    needed: set[str] = set()
    for depth, (siblings, index) in reversed(list(enumerate(path))):
        statement = siblings[index]
        inner = depth + 1 < len(path)
        last = path[depth + 1][0][0].lineno - 1 if inner else statement.end_lineno or line
        shown |= set(range(statement.lineno, last + 1))
        needed |= _names(statement, ast.Load) if not inner else _header_names(statement)
        for before in reversed(siblings[:index]):
            if _needed(before, needed):
                shown |= set(range(before.lineno, (before.end_lineno or before.lineno) + 1))
                needed |= _names(before, ast.Load)
    return textwrap.dedent("\n".join(lines[n - 1] for n in sorted(shown)))


def _names(node: ast.AST, kind: type[ast.expr_context]) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, kind)} - {
        "self",
        "cls",
        "pytest",
    }


def _header_names(statement: ast.stmt) -> set[str]:
    parts = [getattr(statement, name, None) for name in ("iter", "test")]
    parts += [item.context_expr for item in getattr(statement, "items", [])]
    return {name for part in parts if isinstance(part, ast.AST) for name in _names(part, ast.Load)}


def _needed(statement: ast.stmt, needed: set[str]) -> bool:
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return any((a.asname or a.name.split(".")[0]) in needed for a in statement.names)
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return statement.name in needed
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        root: ast.expr = statement.value.func
        while isinstance(root, ast.Attribute | ast.Subscript | ast.Call):
            root = root.func if isinstance(root, ast.Call) else root.value
        return isinstance(root, ast.Name) and root.id in needed
    if isinstance(statement, ast.Assert) or any(isinstance(n, ast.Assert) for n in ast.walk(statement)):
        return False
    stores = {
        r.id
        for n in ast.walk(statement)
        if isinstance(n, ast.Attribute | ast.Subscript)
        and isinstance(n.ctx, ast.Store)
        and isinstance(r := n.value, ast.Name)
    }
    return not (_names(statement, ast.Store) | _names(statement, ast.Del) | stores).isdisjoint(needed)
