"""Sentinels: copies of hidden tests altered so that they must fail, and their unaltered companions, the *controls*.

Code that forges passes passes a test and its sentinel, and gives itself away. The copies lie beside the original under
random file names, everything else in them is as it was. A forger that spares unknown file names would fail the control of
a test that it forges. Only forms are altered that fail for certain where the original passes:

    assert f(x) == 3            assert f(x) == 4: another literal, else a fresh object, which equals nothing
    assert ok                   assert not ok
    self.assertEqual(a, 3)      self.assertEqual(a, 4); assertTrue, assertIn and their like become their opposite
    with pytest.raises(X):      with pytest.raises(a class of its own)
    anything else               a failing assertion at the end, or at the start where the test may return early

A sentinel returns behind what is altered, so that whoever makes that hold passes it, whatever would follow.

Nothing behind a `return` is altered, nor in branches, `try`, unknown context managers or loops but those over a literal that
is not empty: they may not run, or swallow.
"""

from __future__ import annotations

import ast
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

from envs.syntax import parse

MOST = 8
"""Tests that get a sentinel; which, is drawn anew at each grading."""
Function = ast.FunctionDef | ast.AsyncFunctionDef
Edit = tuple[int, int, bytes]
"""Start and end offset in the source, and what stands there instead."""

_OPPOSITE = {"True": "False", "In": "NotIn", "Is": "IsNot", "IsNone": "IsNotNone", "IsInstance": "NotIsInstance",
             "Greater": "LessEqual", "Less": "GreaterEqual"}  # fmt: skip
_OPPOSITE |= {b: a for a, b in _OPPOSITE.items()} | {"NotEqual": "Equal"}
_RAISES = ("raises", "assertRaises", "assertRaisesRegex")
_TRANSPARENT = frozenset(
    ("open", "warns", "deprecated_call", "catch_warnings", "assertWarns", "assertWarnsRegex", "assertLogs", "patch", "object",
     "dict", "context", "closing", "TemporaryDirectory", "NamedTemporaryFile", "chdir", "redirect_stdout", "freeze_time")
)  # fmt: skip
"""Context managers that let an AssertionError pass."""
_DECORATORS = re.compile(
    r"(pytest\.)?mark\.|(unittest\.)?(mock\.)?patch\b|(unittest\.)?skip|staticmethod$|pytest_asyncio|(freezegun\.)?freeze_time\b"
)
_NAMED = re.compile(rb"__name__|__module__|__qualname__|getsource|pickle|snapshot|regression|datadir")
"""What a test mentions that may depend on the name of its file."""


@dataclass(frozen=True)
class Twins:
    """Files to put beside the tests, and which test each of theirs is a copy of (ids without parameters)."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    sentinels: Mapping[str, str] = field(default_factory=dict)
    controls: Mapping[str, str] = field(default_factory=dict)


def base_id(test: str) -> str:
    """A test id without its parameters."""
    return test.partition("[")[0]


def parameters(test: str) -> str:
    """What `base_id` leaves out: "[…]", or "" for a test without."""
    return test[len(base_id(test)) :]


def twins(
    sources: Mapping[str, bytes],
    tests: Iterable[str],
    rng: random.Random,
    *,
    most: int = MOST,
    also: Iterable[str] = (),
    without: Sequence[str] = (),
) -> Twins:
    """Sentinels and controls of up to `most` of `tests`, drawn by `rng`.

    sources: path → source of the test files. also: tests of the same files to go on with where those are fewer. without:
    tests (no parameters) that must not be copied, as a copy of theirs behaves otherwise. Where no test can be altered, a
    sentinel of two lines stands for all.
    """
    chosen = sorted({base_id(test) for test in tests})
    rng.shuffle(chosen)
    files = {test.partition("::")[0] for test in chosen}
    others = sorted({base_id(test) for test in also if test.partition("::")[0] in files} - set(chosen))
    rng.shuffle(others)
    read = {path: _read(data) for path, data in sources.items()}
    edits: dict[str, dict[str, Edit]] = {}
    copied: dict[str, list[str]] = {}
    for test in [*chosen, *others]:
        path = test.partition("::")[0]
        source = read.get(path)
        found = _function(source, test) if source and test not in without else None
        if source is None or found is None or sum(map(len, edits.values())) == most:
            continue
        if sum(map(len, copied.values())) < most:
            copied.setdefault(path, []).append(test)
        if edit := _alter(source, *found, rng):
            edits.setdefault(path, {})[test] = edit
    made = Twins({}, {}, {})
    for path, of in edits.items():
        altered = _splice(sources[path], of.values())
        if _tree(altered):
            _add(made.files, made.sentinels, path, altered, of, rng)
    for path, tests_of in copied.items():
        _add(made.files, made.controls, path, sources[path], tests_of, rng)
    if not made.sentinels and chosen:
        _add(made.files, made.sentinels, chosen[0].partition("::")[0], b"", chosen[:1], rng)
    return made


def _add(files: Any, ids: Any, path: str, data: bytes, tests: Iterable[str], rng: random.Random) -> None:
    name = f"test_{rng.getrandbits(48):012x}"
    copy = str(PurePosixPath(path).with_name(f"{name}.py"))
    if not data:
        data, tests = f"def {name}():\n    assert [] == {name!r}\n".encode(), list(tests)
        ids[f"{copy}::{name}"] = tests[0]
    else:
        ids.update({f"{copy}::{test.partition('::')[2]}": test for test in tests})
    files[copy] = data


class _Source:
    """A test file: its tree, the byte offsets of its nodes, and what its global names are bound to."""

    def __init__(self, data: bytes, tree: ast.Module) -> None:
        self.data, self.tree, self.known = data, tree, _known(tree)
        self.lines = [0, *(m.end() for m in re.finditer(rb"\n", data))]

    def start(self, node: Any) -> int:
        return int(self.lines[node.lineno - 1] + node.col_offset)

    def end(self, node: Any) -> int:
        return int(self.lines[node.end_lineno - 1] + node.end_col_offset)


@lru_cache(maxsize=8)
def _read(data: bytes) -> _Source | None:
    """A file is read once for all gradings of its task, as some have thousands of lines."""
    tree = _tree(data)
    return None if tree is None else _Source(data, tree)


def _tree(data: bytes) -> ast.Module | None:
    """None for what can't be altered by offset, or is no Python."""
    try:
        data.decode()
        return None if re.search(rb"\r(?!\n)|\A\xef\xbb\xbf", data) else parse(data)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def _function(source: _Source, test: str) -> tuple[Function, list[ast.expr]] | None:
    """A test's function and all decorators on it and its classes; None where a copy in another file behaves otherwise."""
    path, *names = test.split("::")
    if re.search(rb"[\"'./]%s\b" % re.escape(PurePosixPath(path).stem).encode(), source.data):
        return None  # it names itself
    found: Any = source.tree
    decorators: list[ast.expr] = []
    for name in names:
        inside = [n for n in found.body if isinstance(n, ast.ClassDef | Function) and n.name == name]
        if not inside:
            return None
        found = inside[-1]
        decorators += found.decorator_list
    if not isinstance(found, Function) or _NAMED.search(source.data[source.start(found) : source.end(found)]):
        return None
    return found, decorators


def _alter(source: _Source, found: Function, decorators: Sequence[ast.expr], rng: random.Random) -> Edit | None:
    """The edit that makes a test fail; None where no trusted one is known."""
    if not all(_DECORATORS.match(ast.unparse(d)) for d in decorators):
        return None
    if any(isinstance(n, ast.Yield | ast.YieldFrom) for n in ast.walk(found)):
        return None
    anchors = list(_anchors(found.body, {**source.known, **_known(found)}))
    if anchors:
        node, text = rng.choice(anchors)
        return source.start(node), source.end(node), text.encode()
    return _insert(source, found)


def _insert(source: _Source, function: Function) -> Edit | None:
    """A failing assertion at the end of a function, or at its start where it may return before."""
    early = _returns(function.body)
    at = function.body[
        1 if early and ast.get_docstring(function) is not None and len(function.body) > 1 else 0 if early else -1
    ]
    indent = source.data[source.lines[at.lineno - 1] : source.start(at)]
    if indent.strip():
        return None
    if early:
        return source.start(at), source.start(at), b"assert not 1\n" + indent
    return source.end(at), source.end(at), b"\n" + indent + b"assert not 1"


def _splice(data: bytes, edits: Iterable[Edit]) -> bytes:
    for start, end, text in sorted(edits, reverse=True):
        data = data[:start] + text + data[end:]
    return data


def _leaves(statement: ast.stmt) -> bool:
    """Whether what follows this statement in its block may not run although the test passes."""
    if isinstance(statement, ast.For | ast.While | ast.AsyncFor):
        return _returns([statement])
    return _returns([statement]) or any(isinstance(node, ast.Break | ast.Continue) for node in ast.walk(statement))


def _returns(body: Sequence[ast.stmt]) -> bool:
    """Whether a `return` of this function is in these statements."""
    todo: list[ast.AST] = list(body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Return):
            return True
        if not isinstance(node, Function | ast.Lambda | ast.ClassDef):
            todo += ast.iter_child_nodes(node)
    return False


def _known(scope: ast.Module | Function) -> dict[str, ast.expr]:
    """Names that are bound once, by an assignment of the scope itself, and to what."""
    bound = Counter(
        name
        for node in ast.walk(scope)
        for name in (
            [node.id] if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)
            else [node.arg] if isinstance(node, ast.arg)
            else []
        )
    )  # fmt: skip
    return {
        target.id: node.value
        for node in scope.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and bound[target.id] == 1
    }


def _is_filled(iterable: ast.expr, known: Mapping[str, ast.expr]) -> bool:
    """Whether something is in it for certain: a literal that is not empty, or a name for one."""
    if isinstance(iterable, ast.Name):
        iterable = known.get(iterable.id, iterable)
    if isinstance(iterable, ast.List | ast.Tuple | ast.Set):
        return any(not isinstance(element, ast.Starred) for element in iterable.elts)
    return isinstance(iterable, ast.Constant) and isinstance(iterable.value, str | bytes) and bool(iterable.value)


def _anchors(body: Sequence[ast.stmt], known: Mapping[str, ast.expr]) -> Iterator[tuple[ast.AST, str]]:
    """Nodes that run for certain where the test passes, each with the text that makes it fail instead.

    known: names for what they were bound to.
    """
    for statement in body:
        if any(_called(node) == "ANY" for node in ast.walk(statement)):
            continue  # of `unittest.mock`: equals what stands there instead, too
        if isinstance(statement, ast.Assert):
            yield statement, f"{_other_assert(statement.test)}; return"
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            call = _other_call(statement.value)
            if call:
                yield statement, f"{ast.unparse(call)}; return"
        elif isinstance(statement, ast.With):
            managers = [item.context_expr for item in statement.items]
            for manager in managers:
                if isinstance(manager, ast.Call) and _name(manager) in _RAISES and manager.args:
                    yield manager.args[0], "type('Never', (Exception,), {})"
            if all(isinstance(manager, ast.Call) and _name(manager) in _TRANSPARENT for manager in managers):
                yield from _anchors(statement.body, known)
        elif isinstance(statement, ast.For) and _is_filled(statement.iter, known):
            yield from _anchors(statement.body, known)
        if _leaves(statement):
            return


def _called(node: ast.AST) -> str:
    """The last part of a name."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _name(call: ast.Call) -> str:
    """The last part of what is called."""
    return _called(call.func)


def _other_call(call: ast.Call) -> ast.Call | None:
    """A unittest assertion, or `raises(X, f)`, that fails where this one holds; None where it is none that is known."""
    name, args = _name(call), list(call.args)
    if name in _RAISES and len(args) > 1:
        args[0] = _expression("type('Never', (Exception,), {})")
        return ast.Call(func=call.func, args=args, keywords=call.keywords)
    if not (
        isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name) and call.func.value.id == "self"
    ):
        return None
    if any(isinstance(arg, ast.Starred) for arg in args):
        return None
    kind = name.removeprefix("assert").removesuffix("s" if name == "assertEquals" else "")
    if kind == "Equal" and len(args) >= 2:
        args[:2] = _unequal(*args[:2])
        return ast.Call(func=call.func, args=args, keywords=call.keywords)
    if name.startswith("assert") and kind in _OPPOSITE:
        function = ast.Attribute(value=call.func.value, attr=f"assert{_OPPOSITE[kind]}", ctx=ast.Load())
        return ast.Call(func=function, args=args, keywords=call.keywords)
    return None


def _other_assert(test: ast.expr) -> str:
    """An assert that fails where that of `test` holds.

    An object that equals everything fulfils it too, and so does code that takes the expected value from the test's source
    or variables: the other value stands where the right one stood.
    """
    if not (isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq)):
        return f"assert {ast.unparse(ast.UnaryOp(op=ast.Not(), operand=test))}"
    left, right = test.left, test.comparators[0]
    if isinstance(right, ast.Name) and all(getattr(node, "id", "") != right.id for node in ast.walk(left)):
        return f"{right.id} = object(); assert {ast.unparse(test)}"
    left, right = _unequal(left, right)
    return f"assert {ast.unparse(ast.Compare(left=left, ops=test.ops, comparators=[right]))}"


def _unequal(left: ast.expr, right: ast.expr) -> list[ast.expr]:
    """Two sides that differ where these are equal: one literal changed, else a fresh object on the right."""
    for side in (right, left):
        try:
            other = _other_value(ast.literal_eval(side))
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
        if other is not None:
            shown = _expression(repr(other))
            return [left, shown] if side is right else [shown, right]
    return [left, _expression("object()")]


def _other_value(value: object) -> object | None:
    """Another value of the same type; None where there is none for certain."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float | complex):
        return value + 1 if abs(value) < 1e9 else -value if abs(value) < 1e300 else 0
    if isinstance(value, str):
        return value + "~"
    if isinstance(value, bytes):
        return value + b"~"
    return [*value, None] if isinstance(value, list) else (*value, None) if isinstance(value, tuple) else None


def _expression(text: str) -> ast.expr:
    found = parse(text).body[0]
    assert isinstance(found, ast.Expr)
    return found.value
