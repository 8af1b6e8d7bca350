"""Mutations: each operator by hand, what is left out, and what holds for every candidate."""

import ast
import difflib
from collections import Counter
from textwrap import dedent

import pytest

from envs.swe.candidate import is_generated, is_source, is_test
from envs.swe.mutate import apply, mutations, sites
from envs.swe.operators import OPERATORS


def made(operator: str, source: str) -> list[str]:
    """What an operator makes of a source: the changed lines, joined by ` / `."""
    old = dedent(source).lstrip("\n")
    results = []
    for site in sites("pkg/m.py", old.encode()):
        if site.operators == (operator,):
            new = apply(old.encode(), site.change).decode()
            diff = list(difflib.unified_diff(old.splitlines(), new.splitlines(), n=0, lineterm=""))[2:]
            results.append(" / ".join(line[1:].strip() for line in diff if line[0] == "+"))
    return results


BY_HAND = {
    "body_removed": [
        ('def f(x):\n    """Doc."""\n    y = x\n    return y\n', ["raise NotImplementedError", "return None"]),
        ("def f(x):\n    x.go()\n", ["raise NotImplementedError", "pass"]),
        ("def f(x):\n    @wraps(x)\n    def g():\n        return x.y\n    return g\n", ["raise NotImplementedError", "return None", "raise NotImplementedError", "return None"]),
        ("def f(x):\n    for y in x:\n        yield y\n", ["raise NotImplementedError", "yield from ()"]),
    ],
    "part_removed": [
        ("def f(x):\n    if not x:\n        raise KeyError\n    return x\n", [""]),
        ("def f(x):\n    x.y = 1  # why\n", ["pass  # why"]),
        ("def f(x):\n    if x:\n        g(x)\n    elif y:\n        h()\n", ["pass", "pass", "pass"]),
        ("def f(x):\n    while x:\n        x.pop()\n", []),
    ],
    "arguments_removed": [
        ("def f(x):\n    return g(x, 2, key=len)\n", ["return g(x, key=len)", "return g(x, 2)"]),
        ("def f(x):\n    return g(x)\n", []),
        ("def f(x):\n    return g(*x, y=1)\n", []),
        ("def f(x):\n    return g(y=x)\n", ["return g()"]),
    ],
    "arguments_reordered": [
        ("def f(x, y):\n    return g(x, (y), z=1)\n", ["return g((y), x, z=1)"]),
        ("def f(x):\n    return max(x, 1) + isinstance(x, int)\n", []),
    ],
    "variables_swapped": [
        ("def f(a, b):\n    return a - b\n", ["return b - a"]),
        ("def f(a, b):\n    return a + b == b * a\n", []),
        ("def f(a, b):\n    if a.x < b.x:\n        return a[b]\n", ["if b.x < a.x:", "return b[a]"]),
        ("def f(self, a):\n    return isinstance(a, Thing) or self[a]\n", []),
        ("def f(xs):\n    return [x for x in xs if x]\n", []),
    ],
    "import_removed": [
        ("import os\nimport re\nX = re.compile('x')\ndef f():\n    return os.sep\n", [""]),
        ("from a import (\n    b,\n    c as d,\n)\ndef f():\n    return b(d)\n", ["", ""]),
        ("from __future__ import annotations\nfrom x import *\ntry:\n    import y\nexcept ImportError:\n    y = 0\ndef f():\n    return y\n", []),
    ],
    "return_removed": [
        ("def f(x):\n    if x:\n        return 1\n    return g(x)\n", ["return", "pass", "return", "g(x)"]),
        ("def f(x):\n    return None\n", []),
    ],
    "operator_replaced": [
        ("def f(a, b):\n    a += 1\n    return a * (b - 1) // -b\n", ["a -= 1", "return a * (b - 1) / -b", "return a + (b - 1) // -b", "return a * (b + 1) // -b", "return a * (b - 1) // b"]),
        ("def f(a):\n    return 'x' + a + [1]\n", []),
        ("def f(a):\n    while a:\n        a -= 1\n", []),
    ],
    "off_by_one": [
        ("def f(a, n):\n    return a[0], a[:n], 0x10\n", ["return a[1], a[:n], 0x10", "return a[0], a[:n - 1], 0x10", "return a[0], a[:n + 1], 0x10"]),
        ("def f(n):\n    return range(n)\n", ["return range(n - 1)", "return range(n + 1)"]),
        ("def f(n):\n    return n + 2\n", ["return n + 3", "return n + 1"]),
    ],
    "comparison_flipped": [
        ("def f(a):\n    return a < 1\n", ["return a <= 1", "return a >= 1", "return a > 1"]),
        ("def f(a):\n    return a is not None\n", ["return a is None"]),
        ("def f(a, b):\n    return a not in b\n", ["return a in b"]),
        ("def f(a):\n    while a > 1 and a != 5:\n        a.pop()\n", ["while a >= 1 and a != 5:"]),
    ],
    "boolean_replaced": [
        ("def f(a, b):\n    return a and (\n        b)\n", ["return a or ("]),
        ("def f(a, b):\n    while a and b:\n        pass\n", []),
    ],
    "condition_negated": [
        ("def f(a):\n    if a:\n        return 1 if not a else 2\n", ["if not a:", "return 1 if a else 2"]),
        ("def f(a, b):\n    if a and b:\n        return [x for x in a if x.y]\n", ["if not (a and b):", "return [x for x in a if not x.y]"]),
        ("def f(a):\n    if a == 1:\n        return 2\n    while a:\n        pass\n", []),
    ],
    "default_changed": [
        ("def f(a=True, *, b=0, c='x', d=None):\n    return a\n", ["def f(a=False, *, b=0, c='x', d=None):", "def f(a=True, *, b=1, c='x', d=None):", "def f(a=True, *, b=0, c='', d=None):"]),
    ],
    "constant_flipped": [
        ("def f(a):\n    x = True\n    return g(x, y=False)\n", ["x = False", "return g(x, y=True)"]),
        ("def f(a):\n    return a is True\n", []),
    ],
}  # fmt: skip


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_operator_by_hand(operator):
    for source, expected in BY_HAND[operator]:
        assert made(operator, source) == expected, source


def test_what_is_not_mutated():
    source = """
    from typing import TYPE_CHECKING, overload
    if TYPE_CHECKING:
        def a(x): return x + 1
    if __name__ == "__main__":
        print(1 + 1)
    class C:
        def __repr__(self): return "C" * 2
        @overload
        def g(self, x: int = 1) -> int: ...
        @property
        @abc.abstractmethod
        def h(self): return 1 + 1
        def stub(self):
            "Docstring with 1 + 1."
            raise NotImplementedError(1 + 1)
    LIMIT = 1 + 1
    def f(x: "int | 1"):
        "1 + 1"
        logger.info("a", 1 + 1)
        raise ValueError(1 + 1)
    """
    found = sites("m.py", dedent(source).encode())
    assert {s.operators[0] for s in found} <= {"body_removed", "part_removed"} and {s.function for s in found} == {"f"}


REPOSITORY = {
    "src/pkg/__init__.py": b"from pkg.a import f\n",
    "src/pkg/a.py": dedent('''
        import os
        import re

        # a comment that stays   with its spaces
        def f(x,y = 1):
            """Doc."""
            if x  <  y and not x:   # odd   format
                return g( x,  y )
            return x - y


        class A:
            def m(self, a, b=False):
                for i in range( 3 ):
                    a += i
                return [a,b,
                    i]

            async def n(self, a):
                return os.path.join(self.m(a, b=True), re.escape(a))
    ''').lstrip().encode(),
    "src/pkg/b.py": b"def g(x, y):\r\n    z = x * y  # \xc3\xa9\r\n    return z if z else (x or\r\n        y)\r\n",
    "src/pkg/_vendor/v.py": b"def v(x):\n    return x + 1\n",
    "src/pkg/table.py": b"# Automatically generated, do not edit.\ndef t(x):\n    return x + 1\n",
    "src/pkg/broken.py": b"def (:\n",
    "src/pkg/latin.py": b"# -*- coding: latin-1 -*-\nX = '\xe9'\ndef l(x):\n    return x + 1\n",
    "tests/test_a.py": b"from pkg import f\ndef test_f():\n    assert f(1, 2) == -1\n",
    "docs/conf.py": b"def d(x):\n    return x + 1\n",
    "setup.py": b"def s(x):\n    return x + 1\n",
}  # fmt: skip


def test_every_candidate_parses_differs_and_keeps_the_format():
    found = list(mutations(REPOSITORY, 1, 500))
    assert len(found) > 50
    assert {p for c in found for p in c.broken} == {"src/pkg/a.py", "src/pkg/b.py"}
    for candidate in found:
        (path, broken), (_, fixed) = *candidate.broken.items(), *candidate.fixed.items()
        assert fixed == REPOSITORY[path] and ast.dump(ast.parse(broken)) != ast.dump(ast.parse(fixed))
        old, new = fixed.splitlines(keepends=True), broken.splitlines(keepends=True)
        kept = sum(b.size for b in difflib.SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks())
        if candidate.provenance["operator"] == "combination":
            assert 2 <= len(candidate.provenance["operators"]) <= 3
        elif candidate.provenance["operator"] not in ("body_removed", "part_removed"):
            assert kept >= len(old) - 2, candidate  # nothing but the lines of one expression
    assert len({c.id for c in found}) == len({tuple(c.broken.items()) for c in found}) == len(found)


def test_equal_arguments_give_equal_candidates_and_seeds_differ():
    first, again, other = (list(mutations(REPOSITORY, seed, 20)) for seed in (3, 3, 4))
    assert first == again and [c.id for c in first] != [c.id for c in other]
    assert len(first) == 20 and first[0].provenance["seed"] == 3
    assert set(first[0].provenance) == {"family", "operator", "operators", "path", "function", "line", "seed"}


def test_operators_files_and_functions_take_turns():
    files = {
        f"pkg/m{i}.py": b"".join(
            b"def f%d(a, b=1):\n    if a < b and b:\n        return a - b\n    return g(a, b)\n" % j for j in range(4)
        )
        for i in range(5)
    }
    found = list(mutations(files, 0, 20))
    operators = Counter(c.provenance["operator"] for c in found)
    assert max(operators.values()) - min(operators.values()) <= 1 and len(operators) >= 10
    assert max(Counter(c.provenance["path"] for c in found).values()) == 4
    assert max(Counter((c.provenance["path"], c.provenance["function"]) for c in found).values()) == 1


def test_paths():
    assert [p for p in REPOSITORY if is_source(p)] == [
        p for p in REPOSITORY if p.startswith("src/") and "_vendor" not in p
    ]
    assert is_test("tests/data/x.bin") and is_test("pkg/tests/__init__.py") and is_test("conftest.py")
    assert (
        is_test("a/test_b.py") and is_test("b_test.py") and not is_test("pkg/testify.py") and not is_test("latest.py")
    )
    assert not is_source("build/lib/x.py") and not is_source(".github/x.py") and not is_source("x.pyi")
    assert is_generated(REPOSITORY["src/pkg/table.py"]) and not is_generated(b"# Generates tables.\n")
