"""`tiny-repairs`: generated, seeded repositories with one injected bug each; the default task family.

A repository has three modules of one documented function each, a test file per module and a test runner. One line of one
function has one token changed. The statement names the failing call; visible tests show it; hidden tests decide. Tasks
are a pure function of (split, index):

    train        training templates, four fifths of all normalised buggy sources
    validation   training templates, the other fifth: no buggy source occurs in `train` under any names
    templates    held-out templates, which occur in neither

`normalised` renames every identifier in order of appearance and drops the docstring: the split is by its hash, so that
renaming can't leak a task (a test proves disjointness).
"""

from __future__ import annotations

import ast
import random
import zlib
from collections.abc import Callable
from functools import lru_cache
from importlib import resources
from typing import Any

from envs.sandbox.base import Limits
from envs.syntax import parse
from envs.task import Budget, Grader, Task, sha256
from envs.tiny.templates import HELD_OUT, TRAIN, Function, draw, mutants

SPLITS = ("train", "validation", "templates")
MODULES = ("shop", "bank", "game", "farm", "trip", "mill")
NAMES = ("cost", "fee", "gain", "rate", "score", "bill", "load", "tax", "price", "total", "rank", "share")
VISIBLE, HIDDEN = 3, 12
BUDGET = Budget(
    turns=12, tokens=640, turn_tokens=72, seconds=120.0, command_seconds=10.0, observation_chars=900, format_errors=2
)
LIMITS = Limits(memory_mb=256, pids=16, disk_mb=8, output_kb=16)


class _Canonical(ast.NodeTransformer):
    def __init__(self) -> None:
        self.names: dict[str, str] = {}

    def _name(self, name: str) -> str:
        return self.names.setdefault(name, f"v{len(self.names)}")

    def visit_Name(self, node: ast.Name) -> ast.AST:
        node.id = self._name(node.id) if node.id not in ("min", "max") else node.id
        return node

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.arg = self._name(node.arg)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.name = "f"
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:]
        self.generic_visit(node)
        return node


def normalised(source: str) -> str:
    """Source of one function without its docstring, every identifier renamed in order of appearance."""
    return ast.unparse(_Canonical().visit(parse(source)))


def split_of(buggy: str) -> str:
    """The side of the train/validation split that a buggy function belongs to."""
    return "validation" if zlib.crc32(normalised(buggy).encode()) % 5 == 0 else "train"


def _call(function: Function, source: str) -> Callable[..., Any]:
    space: dict[str, Any] = {}
    exec(source, space)  # our own generated source: no input of others reaches it
    return space[function.name]  # type: ignore[no-any-return]


def _cases(function: Function, wrong: str, rng: random.Random) -> list[tuple[str, Any, Any]] | None:
    """VISIBLE + HIDDEN distinct calls as (call, right value, wrong value); None unless the bug shows in both parts."""
    right_call, wrong_call = _call(function, function.source()), _call(function, wrong)
    seen: dict[str, tuple[str, Any, Any]] = {}
    for _ in range(60):
        args = function.arguments(rng)
        text = f"{function.name}({', '.join(map(repr, args))})"
        try:
            seen.setdefault(text, (text, right_call(*args), wrong_call(*args)))
        except UnboundLocalError:
            return None  # the mutant reads a variable before it is set
    shown = [c for c in seen.values() if c[1] != c[2]]
    same = [c for c in seen.values() if c[1] == c[2]]
    if len(shown) < 3:
        return None
    rng.shuffle(shown)
    rng.shuffle(same)
    visible = [shown[0], *(same[:1] or shown[3:4]), shown[1]][:VISIBLE]
    rest = [c for c in [*shown[2:8], *same[1:], *shown[8:]] if c not in visible]
    return [*visible, *rest[:HIDDEN]] if len(rest) >= HIDDEN else None


def _bug(function: Function, rng: random.Random) -> tuple[str, int, tuple[str, ...]] | None:
    """A mutant of one line: (kind, line, buggy body). Kinds are drawn evenly among those the function has."""
    by_kind: dict[str, list[tuple[int, str]]] = {}
    for line in range(len(function.body)):
        for kind, text in mutants(function, line):
            by_kind.setdefault(kind, []).append((line, text))
    if not by_kind:
        return None
    kind = rng.choice(sorted(by_kind))
    line, text = rng.choice(by_kind[kind])
    return kind, line, (*function.body[:line], text, *function.body[line + 1 :])


@lru_cache(maxsize=1)
def runner_source() -> bytes:
    """The runner as it lies in each repository."""
    return resources.files("envs.tiny").joinpath("runner.py").read_bytes()


def _asserts(name: str, cases: list[tuple[str, Any, Any]]) -> str:
    return f"def test_{name}():\n" + "".join(f"    assert {call} == {right!r}\n" for call, right, _ in cases)


def _tests(module: str, function: Function, parts: list[tuple[str, list[tuple[str, Any, Any]]]]) -> bytes:
    """A test file in pytest's form."""
    return "\n\n".join(
        [f"from {module} import {function.name}\n", *(_asserts(name, cases) for name, cases in parts)]
    ).encode()


def _own_cases(function: Function, rng: random.Random, n: int) -> list[tuple[str, Any, Any]]:
    call, found = _call(function, function.source()), []
    for _ in range(n):
        args = function.arguments(rng)
        found.append((f"{function.name}({', '.join(map(repr, args))})", call(*args), None))
    return found


def _draw_target(
    split: str, name: str, rng: random.Random
) -> tuple[Function, str, int, tuple[str, ...], list[tuple[str, Any, Any]]]:
    templates = HELD_OUT if split == "templates" else TRAIN
    while True:
        function = draw(rng.choice(templates), name, rng)
        bug = _bug(function, rng)
        if bug is None:
            continue
        wrong = function.source(bug[2])
        if split != "templates" and split_of(wrong) != split:
            continue
        cases = _cases(function, wrong, rng)
        if cases is not None:
            return function, *bug, cases


def task(split: str, index: int, *, runner: str = "tiny") -> Task:
    """Task `index` of a split; the same arguments always give the same task.

    runner: "tiny" (a minimal runner, `python3 runner.py`) or "pytest" (the same test files, `python3 -m pytest`).
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r} of tiny-repairs; it has {', '.join(SPLITS)}")
    if runner not in ("tiny", "pytest"):
        raise ValueError(f"unknown runner {runner!r}; choose tiny or pytest")
    rng = random.Random(f"tiny-repairs/{split}/{index}")
    modules, names = rng.sample(MODULES, 3), rng.sample(NAMES, 3)
    target, kind, line, buggy, cases = _draw_target(split, names[0], rng)
    others = [draw(rng.choice(TRAIN), name, rng) for name in names[1:]]
    setup: dict[str, bytes] = {"runner.py": runner_source()} if runner == "tiny" else {}
    for module, function in zip(modules, (target, *others), strict=True):
        own = cases[:VISIBLE] if function is target else _own_cases(function, rng, 2)
        setup[f"{module}.py"] = function.source(buggy if function is target else None).encode()
        setup[f"tests/test_{module}.py"] = _tests(module, function, [(function.name, own)])
    gold = {f"{modules[0]}.py": target.source().encode()}
    third = HIDDEN // 3
    thirds = [(f"{target.name}_{i}", cases[VISIBLE + i * third :][:third]) for i in range(3)]
    kept = _own_cases(others[0], rng, 4)
    hidden = {
        f"tests/test_hidden_{modules[0]}.py": _tests(modules[0], target, thirds),
        f"tests/test_hidden_{modules[1]}.py": _tests(modules[1], others[0], [(others[0].name, kept)]),
    }
    expected = {f"tests/test_hidden_{modules[0]}.py::test_{name}": "pass" for name, _ in thirds}
    expected[f"tests/test_hidden_{modules[1]}.py::test_{others[0].name}"] = "pass"
    call, right, wrong = cases[0]
    blobs = {sha256(d): d for d in (*setup.values(), *gold.values(), *hidden.values())}
    command = "python3 runner.py" if runner == "tiny" else "python3 -m pytest -q"
    return Task(
        id=f"tiny-repairs/{split}/{index}",
        prompt=f"{call} in {modules[0]}.py gives {wrong!r}, not {right!r}. Tests: {command}",
        setup={p: sha256(d) for p, d in setup.items()},
        limits=LIMITS,
        budget=BUDGET,
        grader=Grader(
            command=command,
            expected=expected,
            hidden={p: sha256(d) for p, d in hidden.items()},
            gold={p: sha256(d) for p, d in gold.items()},
            protected=("runner.py", "tests/*"),
            seconds=20.0,
        ),
        provenance={
            "family": "tiny-repairs",
            "template": target.template,
            "bug": kind,
            "module": f"{modules[0]}.py",
            "line": buggy[line],
            "fix": target.body[line],
            "normalised": sha256(normalised(target.source(buggy)).encode()),
        },
        blobs=blobs,
    )
