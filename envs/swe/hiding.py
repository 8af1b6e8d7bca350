"""The visible test files of a task: the repository's, without the tests that decide."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import libcst as cst


def without_tests(source: bytes, names: Collection[str]) -> bytes | None:
    """A test file without some of its tests; every other byte stays. None where no test would be left.

    A test goes with its decorators and the comments above it, a class that is left empty goes too. A method that a class
    inherits from another class of the file goes from there; one that comes from another file stays.

    Args:
        source: the file. Raises `ValueError` for what is no Python.
        names: `test_y`, `TestX::test_y`, or node ids with path and `[param]`; of a parametrised test all cases go.
    """
    try:
        module = cst.parse_module(source)
    except cst.ParserSyntaxError:
        raise ValueError("the test file can't be parsed; drop the candidate") from None
    classes = {c.name.value: c for c in _definitions(module, cst.ClassDef)}
    wanted = {_home(_short(name), classes) for name in names}
    left = module.visit(_Remover(wanted))
    return left.bytes if _has_tests(left) else None


def _short(name: str) -> tuple[str, ...]:
    """A node id as its names below the file: classes, then the function."""
    parts = name.split("[")[0].split("::")
    return tuple(parts[1:] if parts[0].endswith(".py") else parts)


def _definitions(module: cst.CSTNode, kind: type[cst.ClassDef]) -> list[cst.ClassDef]:
    return [s for s in getattr(module, "body", ()) if isinstance(s, kind)]


def _home(parts: tuple[str, ...], classes: dict[str, cst.ClassDef]) -> tuple[str, ...]:
    """Where a test is defined: its own class or, of the same file, the nearest base that has it."""
    if len(parts) != 2:
        return parts
    queue, seen = [parts[0]], set[str]()
    while queue:
        name = queue.pop(0)
        if name in seen or name not in classes:
            continue
        seen.add(name)
        body = classes[name].body.body
        if any(isinstance(s, cst.FunctionDef) and s.name.value == parts[1] for s in body):
            return name, parts[1]
        queue += [a.value.value for a in classes[name].bases if isinstance(a.value, cst.Name)]
    return parts


class _Remover(cst.CSTTransformer):
    def __init__(self, wanted: Collection[tuple[str, ...]]) -> None:
        super().__init__()
        self.wanted, self.names = wanted, list[str]()

    def visit_ClassDef(self, node: cst.ClassDef) -> bool:
        self.names.append(node.name.value)
        return True

    def leave_ClassDef(
        self, original_node: cst.ClassDef, updated_node: cst.ClassDef
    ) -> cst.ClassDef | cst.RemovalSentinel:
        self.names.pop()
        gone = updated_node is not original_node and not _contents(updated_node)
        return cst.RemoveFromParent() if gone and _contents(original_node) else updated_node

    def visit_FunctionDef(self, node: cst.FunctionDef) -> bool:
        return False

    def leave_FunctionDef(
        self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef
    ) -> cst.FunctionDef | cst.RemovalSentinel:
        gone = (*self.names, original_node.name.value) in self.wanted
        return cst.RemoveFromParent() if gone else original_node

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> cst.SimpleStatementLine | cst.RemovalSentinel:
        name = _assigned(original_node)
        gone = name is not None and (*self.names, name) in self.wanted
        return cst.RemoveFromParent() if gone else original_node


def _assigned(line: cst.CSTNode) -> str | None:
    """The name of `name = value`, alone on its line."""
    if isinstance(line, cst.SimpleStatementLine) and len(line.body) == 1:
        small = line.body[0]
        if isinstance(small, cst.Assign) and len(small.targets) == 1 and isinstance(small.targets[0].target, cst.Name):
            return small.targets[0].target.value
    return None


def _contents(node: cst.ClassDef) -> list[cst.CSTNode]:
    """A class's statements, strings and `pass` left out."""
    found: list[cst.CSTNode] = []
    for statement in node.body.body:
        smalls: Sequence[cst.CSTNode] = (
            statement.body if isinstance(statement, cst.SimpleStatementLine) else [statement]
        )
        found += [
            s
            for s in smalls
            if not isinstance(s, cst.Pass) and not (isinstance(s, cst.Expr) and isinstance(s.value, cst.SimpleString))
        ]
    return found


def _has_tests(node: cst.CSTNode) -> bool:
    """Whether a file still has something that pytest collects; a class with bases may inherit it."""
    for statement in node.children:
        if isinstance(statement, cst.FunctionDef):
            if statement.name.value.startswith("test"):
                return True
        elif isinstance(statement, cst.ClassDef):
            plain = all(_last(a.value) in ("object", "TestCase") for a in statement.bases)
            if not plain or _has_tests(statement.body):
                return True
        elif (_assigned(statement) or "").startswith("test") or (
            isinstance(statement, cst.If | cst.Try | cst.IndentedBlock | cst.Else | cst.With) and _has_tests(statement)
        ):
            return True
    return False


def _last(value: cst.BaseExpression) -> str:
    if isinstance(value, cst.Attribute):
        return value.attr.value
    return value.value if isinstance(value, cst.Name) else ""
