"""The function shapes of `tiny-repairs`: each draws a documented function, its arguments and its token-level mutants.

A docstring fixes the meaning of every constant, operator and variable of its function in the order of the code, so that
a reader can always tell the right line from a mutant. `TRAIN` shapes are trained on; `HELD_OUT` shapes share their words
but occur in no training task.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

OPERATORS = {"+": "plus", "-": "minus", "*": "times"}
COMPARES = {"<": "below", "<=": "at most", ">": "above", ">=": "at least", "==": "equal to", "!=": "other than"}
SCALARS = ("a", "b", "m", "n", "w", "h")


@dataclass(frozen=True)
class Function:
    """One function: `def name(params):`, a docstring, body lines (indented), and argument kinds."""

    template: str
    name: str
    params: tuple[str, ...]
    doc: str
    body: tuple[str, ...]
    kinds: tuple[str, ...]
    """Per parameter: "int" or "list"."""

    def source(self, body: tuple[str, ...] | None = None) -> str:
        """Python source, with another body if given."""
        head = f'def {self.name}({", ".join(self.params)}):\n    """{self.doc}"""\n'
        return head + "".join(f"    {line}\n" for line in (body or self.body))

    def arguments(self, rng: random.Random) -> tuple[object, ...]:
        """A random call: integers 0–12, lists of 3–5 of them."""
        return tuple(
            rng.randint(0, 12) if k == "int" else [rng.randint(0, 10) for _ in range(rng.randint(3, 5))]
            for k in self.kinds
        )


class _Draw:
    """Random atoms of one function: distinct parameters, constants 2–9, operators and comparisons with their words."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.a, self.b = rng.sample(SCALARS, 2)
        self.k, self.c, self.d = rng.sample(range(2, 10), 3)
        self.low, self.high = sorted((self.k, self.c))
        self.op, self.op2, self.op3 = (rng.choice(list(OPERATORS)) for _ in range(3))
        self.cmp, self.cmp2 = (rng.choice(list(COMPARES)) for _ in range(2))

    def w(self, symbol: str) -> str:
        """The word of a symbol."""
        return OPERATORS.get(symbol) or COMPARES[symbol]


Parts = tuple[tuple[str, ...], str, tuple[str, ...], tuple[str, ...]]
"""Parameters, docstring, body, argument kinds."""


def _chain(x: _Draw) -> Parts:
    doc = f"{x.a} {x.w(x.op)} {x.k}, then {x.w(x.op2)} {x.b}."
    return (x.a, x.b), doc, (f"out = {x.a} {x.op} {x.k}", f"return out {x.op2} {x.b}"), ("int", "int")


def _branch(x: _Draw) -> Parts:
    doc = f"If {x.a} is {x.w(x.cmp)} {x.k}: {x.a} {x.w(x.op)} {x.b}. Else {x.b} {x.w(x.op2)} {x.c}."
    body = (f"if {x.a} {x.cmp} {x.k}:", f"    return {x.a} {x.op} {x.b}", f"return {x.b} {x.op2} {x.c}")
    return (x.a, x.b), doc, body, ("int", "int")


def _fold(x: _Draw) -> Parts:
    doc = f"Sum of x {x.w(x.op)} {x.c} for x in xs {x.w(x.cmp)} {x.k}."
    body = ("out = 0", "for x in xs:", f"    if x {x.cmp} {x.k}:", f"        out = out + x {x.op} {x.c}", "return out")
    return ("xs",), doc, body, ("list",)


def _count(x: _Draw) -> Parts:
    doc = f"Count of x in xs {x.w(x.cmp)} {x.k}, then {x.w(x.op)} {x.a}."
    body = ("out = 0", "for x in xs:", f"    if x {x.cmp} {x.k}:", "        out = out + 1", f"return out {x.op} {x.a}")
    return ("xs", x.a), doc, body, ("list", "int")


def _within(x: _Draw) -> Parts:
    low, high = x.rng.choice((">", ">=")), x.rng.choice(("<", "<="))
    doc = f"True if {x.a} is {x.w(low)} {x.low} and {x.b} is {x.w(high)} {x.high}."
    return (x.a, x.b), doc, (f"return {x.a} {low} {x.low} and {x.b} {high} {x.high}",), ("int", "int")


def _larger(x: _Draw) -> Parts:
    name, word = x.rng.choice((("max", "larger"), ("min", "smaller")))
    doc = f"The {word} of {x.a} and {x.k}, then {x.w(x.op)} {x.b}."
    return (x.a, x.b), doc, (f"out = {name}({x.a}, {x.k})", f"return out {x.op} {x.b}"), ("int", "int")


def _mod(x: _Draw) -> Parts:
    x.cmp = x.cmp if x.cmp in ("==", "!=") else "=="
    doc = f"{x.a} {x.w(x.op)} {x.b}. True if that mod {x.high} is {x.w(x.cmp)} {x.low}."
    return (x.a, x.b), doc, (f"out = {x.a} {x.op} {x.b}", f"return out % {x.high} {x.cmp} {x.low}"), ("int", "int")


def _first(x: _Draw) -> Parts:
    doc = f"First x in xs {x.w(x.cmp)} {x.k}, {x.w(x.op)} {x.c}. Else {x.d}."
    body = ("for x in xs:", f"    if x {x.cmp} {x.k}:", f"        return x {x.op} {x.c}", f"return {x.d}")
    return ("xs",), doc, body, ("list",)


def _bonus(x: _Draw) -> Parts:
    doc = f"If {x.a} is {x.w(x.cmp)} {x.k}: {x.a} {x.w(x.op)} {x.c} first. Then {x.w(x.op2)} {x.b}."
    body = (f"if {x.a} {x.cmp} {x.k}:", f"    {x.a} = {x.a} {x.op} {x.c}", f"return {x.a} {x.op2} {x.b}")
    return (x.a, x.b), doc, body, ("int", "int")


def _walk(x: _Draw) -> Parts:
    x.op = x.op if x.op != "*" else "+"
    doc = f"Start at {x.k}, {x.w(x.op)} x for x in xs. Then {x.w(x.op2)} {x.c}."
    return (
        ("xs",),
        doc,
        (f"out = {x.k}", "for x in xs:", f"    out = out {x.op} x", f"return out {x.op2} {x.c}"),
        ("list",),
    )


def _chain3(x: _Draw) -> Parts:
    doc = f"{x.a} {x.w(x.op)} {x.k}, then {x.w(x.op2)} {x.b}, then {x.w(x.op3)} {x.c}."
    body = (f"out = {x.a} {x.op} {x.k}", f"out = out {x.op2} {x.b}", f"return out {x.op3} {x.c}")
    return (x.a, x.b), doc, body, ("int", "int")


def _band(x: _Draw) -> Parts:
    low, high = x.rng.choice((">", ">=")), x.rng.choice(("<", "<="))
    doc = f"Sum of x in xs {x.w(low)} {x.low} and {x.w(high)} {x.high}, then {x.w(x.op)} {x.a}."
    body = (
        "out = 0",
        "for x in xs:",
        f"    if x {low} {x.low} and x {high} {x.high}:",
        "        out = out + x",
        f"return out {x.op} {x.a}",
    )
    return ("xs", x.a), doc, body, ("list", "int")


def _clamp(x: _Draw) -> Parts:
    doc = f"The larger of {x.a} and {x.low}, then {x.w(x.op)} {x.b}. Then the smaller of that and {x.high}."
    body = (f"out = max({x.a}, {x.low})", f"out = out {x.op} {x.b}", f"return min(out, {x.high})")
    return (x.a, x.b), doc, body, ("int", "int")


def _modcount(x: _Draw) -> Parts:
    doc = f"Count of x in xs with x mod {x.high} equal to {x.low}, then {x.w(x.op)} {x.c}."
    body = (
        "out = 0",
        "for x in xs:",
        f"    if x % {x.high} == {x.low}:",
        "        out = out + 1",
        f"return out {x.op} {x.c}",
    )
    return ("xs",), doc, body, ("list",)


TRAIN: dict[str, Callable[[_Draw], Parts]] = {
    "chain": _chain,
    "branch": _branch,
    "fold": _fold,
    "count": _count,
    "within": _within,
    "larger": _larger,
    "mod": _mod,
    "first": _first,
    "bonus": _bonus,
    "walk": _walk,
}
HELD_OUT: dict[str, Callable[[_Draw], Parts]] = {
    "chain3": _chain3,
    "band": _band,
    "clamp": _clamp,
    "modcount": _modcount,
}


def draw(template: str, name: str, rng: random.Random) -> Function:
    """A random function of a shape."""
    params, doc, body, kinds = {**TRAIN, **HELD_OUT}[template](_Draw(rng))
    return Function(template, name, params, doc[0].upper() + doc[1:] if doc[0] in "t" else doc, body, kinds)


TOKEN = re.compile(r"\d+|[A-Za-z_]+|<=|>=|==|!=|[-+*<>%=]|\s+|.")


def mutants(function: Function, line: int) -> list[tuple[str, str]]:
    """Every one-token change of one body line, as (kind, new line).

    Kinds: operator, compare, constant (off by one), variable, minmax, boolean.
    """
    tokens = TOKEN.findall(function.body[line])
    scope = [p for p, kind in zip(function.params, function.kinds, strict=True) if kind == "int"]
    scope += ["x"] if "xs" in function.params else []
    scope += ["out"] if any(row.startswith("out") for row in function.body) else []
    found = []
    for at, token in enumerate(tokens):
        assigned = "=" in tokens[at + 1 : at + 3] or "for" in tokens[:at]
        for kind, new in changes(token, scope if not assigned else []):
            found.append((kind, "".join([*tokens[:at], new, *tokens[at + 1 :]])))
    return found


def changes(token: str, scope: list[str]) -> list[tuple[str, str]]:
    """(kind, replacement) for every change of one token; `scope` holds the variables it may be taken for."""
    if token in OPERATORS:
        return [("operator", t) for t in OPERATORS if t != token]
    if token in COMPARES:
        return [("compare", t) for t in COMPARES if t != token]
    if token.isdigit():
        return [("constant", str(int(token) + step)) for step in (-1, 1)]
    if token in ("min", "max"):
        return [("minmax", "max" if token == "min" else "min")]
    if token in ("and", "or"):
        return [("boolean", "or" if token == "and" else "and")]
    if token in scope:
        return [("variable", t) for t in scope if t != token]
    return []
