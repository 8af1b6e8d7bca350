"""The function shapes of `tiny-repairs`: a function is composed of an opening, perhaps a middle, and a closing.

Each piece is one to four lines and one phrase of the docstring, in the order of the code, and the phrases fix every constant,
operator and variable: a reader can always tell the right line from a mutant. A *template* is a sequence of pieces, such as
"sum+gate+cap". Every fifth template (by hash) is held out: its pieces occur in training, the composition never does.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass

OPERATORS = {"+": "plus", "-": "minus", "*": "times"}
COMPARES = {"<": "below", "<=": "at most", ">": "above", ">=": "at least"}
WORDS = {**OPERATORS, **COMPARES, "max": "larger", "min": "smaller"}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SCALARS = ("a", "b", "m", "n")


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
        """A random call: integers 0–12 (0–20 where there is only one), lists of 3–5 integers 0–10."""
        top = 20 if self.kinds == ("int",) else 12
        return tuple(
            rng.randint(0, top) if k == "int" else [rng.randint(0, 10) for _ in range(rng.randint(3, 5))]
            for k in self.kinds
        )


class _Atoms:
    """Random atoms of one piece, drawn when they are asked for."""

    def __init__(self, rng: random.Random, a: str, b: str) -> None:
        self.rng, self.a, self.b = rng, a, b
        self.constants = rng.sample(range(2, 10), 6)

    def k(self) -> int:
        """A constant that the function does not have yet."""
        return self.constants.pop()

    def op(self) -> str:
        """An operator."""
        return self.rng.choice(list(OPERATORS))

    def cmp(self) -> str:
        """A comparison."""
        return self.rng.choice(list(COMPARES))

    def value(self) -> str:
        """The second variable, or a constant."""
        return self.b if self.rng.random() < 0.5 else str(self.k())


Piece = tuple[str, list[str]]
"""Phrase and lines."""


def _lin(x: _Atoms) -> Piece:
    op, k = x.op(), x.k()
    return f"{x.a} {WORDS[op]} {k}", [f"out = {x.a} {op} {k}"]


def _pair(x: _Atoms) -> Piece:
    op = x.op()
    return f"{x.a} {WORDS[op]} {x.b}", [f"out = {x.a} {op} {x.b}"]


def _pick(x: _Atoms) -> Piece:
    name, k = x.rng.choice(("max", "min")), x.k()
    return f"{WORDS[name]} of {x.a} and {k}", [f"out = {name}({x.a}, {k})"]


def _sum(x: _Atoms) -> Piece:
    op, k = x.op(), x.k()
    return f"sum of x {WORDS[op]} {k}", ["out = 0", "for x in xs:", f"    out = out + x {op} {k}"]


def _from(x: _Atoms) -> Piece:
    op, k = x.rng.choice("+-"), x.k()
    return f"{k} {WORDS[op]} each x", [f"out = {k}", "for x in xs:", f"    out = out {op} x"]


def _pass(x: _Atoms) -> Piece:
    cmp, k = x.cmp(), x.k()
    return f"sum of x {WORDS[cmp]} {k}", ["out = 0", "for x in xs:", f"    if x {cmp} {k}:", "        out = out + x"]


def _tally(x: _Atoms) -> Piece:
    cmp, k = x.cmp(), x.k()
    return f"count of x {WORDS[cmp]} {k}", ["out = 0", "for x in xs:", f"    if x {cmp} {k}:", "        out = out + 1"]


def _step(x: _Atoms) -> Piece:
    op, v = x.op(), x.value()
    return f"{WORDS[op]} {v}", [f"out = out {op} {v}"]


def _gate(x: _Atoms) -> Piece:
    cmp, k, op, v = x.cmp(), x.k(), x.op(), x.value()
    return f"if {WORDS[cmp]} {k}, {WORDS[op]} {v}", [f"if out {cmp} {k}:", f"    out = out {op} {v}"]


def _when(x: _Atoms) -> Piece:
    cmp, k, op, v = x.cmp(), x.k(), x.op(), x.k()
    return f"if {x.b} {WORDS[cmp]} {k}, {WORDS[op]} {v}", [f"if {x.b} {cmp} {k}:", f"    out = out {op} {v}"]


def _end(x: _Atoms) -> Piece:
    op, v = x.op(), x.value()
    return f"{WORDS[op]} {v}", [f"return out {op} {v}"]


def _test(x: _Atoms) -> Piece:
    cmp, k = x.cmp(), x.k()
    return f"is it {WORDS[cmp]} {k}", [f"return out {cmp} {k}"]


def _cap(x: _Atoms) -> Piece:
    name, k = x.rng.choice(("max", "min")), x.k()
    return f"{WORDS[name]} of it and {k}", [f"return {name}(out, {k})"]


def _mod(x: _Atoms) -> Piece:
    low, high = sorted((x.k(), x.k()))
    return f"is it mod {high} equal to {low}", [f"return out % {high} == {low}"]


PIECES: dict[str, Callable[[_Atoms], Piece]] = {
    "lin": _lin,
    "pair": _pair,
    "pick": _pick,
    "sum": _sum,
    "from": _from,
    "pass": _pass,
    "tally": _tally,
    "step": _step,
    "gate": _gate,
    "when": _when,
    "end": _end,
    "test": _test,
    "cap": _cap,
    "mod": _mod,
}
NAMES = list(PIECES)
TEMPLATES = tuple(
    "+".join([opening, *middle, closing])
    for opening in NAMES[:7]
    for middle in ((), *((m,) for m in NAMES[7:10]))
    for closing in NAMES[10:]
)
HELD_OUT = tuple(t for t in TEMPLATES if zlib.crc32(t.encode()) % 5 == 0)
TRAIN = tuple(t for t in TEMPLATES if t not in HELD_OUT)


def draw(template: str, name: str, rng: random.Random) -> Function:
    """A random function of a template."""
    atoms = _Atoms(rng, *rng.sample(SCALARS, 2))
    pieces = [PIECES[p](atoms) for p in template.split("+")]
    body = tuple(line for _, lines in pieces for line in lines)
    used = set(re.findall(r"\w+", " ".join(body)))
    params = tuple(p for p in ("xs", atoms.a, atoms.b) if p in used)
    doc = re.sub(r"\d", lambda k: NUMBERS[int(k[0])], "; ".join(phrase for phrase, _ in pieces) + ".")
    return Function(template, name, params, doc, body, tuple("list" if p == "xs" else "int" for p in params))


TOKEN = re.compile(r"\d+|[A-Za-z_]+|<=|>=|==|!=|[-+*<>%=]|\s+|.")


def mutants(function: Function, line: int) -> list[tuple[str, str]]:
    """Every one-token change of one body line, as (kind, new line).

    Kinds: operator, compare, constant (off by two or three, one digit), variable, minmax.
    """
    tokens = TOKEN.findall(function.body[line])
    scope = [p for p, kind in zip(function.params, function.kinds, strict=True) if kind == "int"]
    scope += ["x"] if "xs" in function.params else []
    scope += ["out"]
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
        near = (int(token) + step for step in (-3, -2, 2, 3))  # off by one is what another comparison repairs
        return [("constant", str(k)) for k in near if 0 < k < 10]
    if token in ("min", "max"):
        return [("minmax", "max" if token == "min" else "min")]
    if token in scope:
        return [("variable", t) for t in scope if t != token]
    return []
