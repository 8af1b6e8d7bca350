"""Mutate-fix candidates: working functions of a repository made wrong, evenly over operators, files and functions.

    files ─► sources ─► sites (operator × function × change) ─► drawn round-robin over operators ─► checked ─► Candidate

A candidate changes one function (or one import) of one file, parses, has another AST than the original and is made once.
Whether a test notices is for the caller to find out.
"""

from __future__ import annotations

import ast
import random
import warnings
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import libcst as cst

from envs.swe.candidate import Candidate, is_generated, is_source, is_test
from envs.swe.operators import OPERATORS, import_removed
from envs.swe.place import BLANK, Change, Place, is_docstring
from envs.syntax import parse
from envs.task import sha256

MAX_FILE = 400_000
"""Bytes of one source; larger ones are tables or generated."""
MAX_SOURCES = 4_000_000
"""Bytes of all sources that are looked at; a larger repository is sampled by file."""
MAX_SITES = 3000
"""Sites kept for each operator."""
COMBINATION = "combination"
_QUIET = frozenset(("logging", "logger", "log", "_log", "_logger", "warnings"))
_SKIPPED = frozenset(("__repr__", "__del__", "__dir__", "__sizeof__"))


@dataclass(frozen=True)
class Site:
    """One change that could be made: by which operators, in which function of which file, at which line (from 1)."""

    operators: tuple[str, ...]
    path: str
    function: str
    line: int
    change: Change


class _Sites(cst.CSTVisitor):
    """Collects the sites of one file."""

    def __init__(self, path: str, place: Place) -> None:
        super().__init__()
        self.path, self.place = path, place
        self.names: list[str] = []
        self.depth = 0
        self.found: list[Site] = []
        self._lines = [0, *(i + 1 for i, byte in enumerate(place.source) if byte == 10)]

    def on_visit(self, node: cst.CSTNode) -> bool:
        if type(node) in BLANK:
            return False
        if isinstance(node, cst.ClassDef | cst.FunctionDef):
            if isinstance(node, cst.FunctionDef) and _left_out(node):
                return False
            self.names.append(node.name.value)
            self.depth += isinstance(node, cst.FunctionDef)
        if self._dull(node):
            return False
        if self.depth:
            for operator in OPERATORS:
                self._add(operator, node)
        elif isinstance(node, cst.Import | cst.ImportFrom):
            self._add(import_removed.__name__, node)
        return not isinstance(node, cst.Param)

    def on_leave(self, original_node: cst.CSTNode) -> None:
        if isinstance(original_node, cst.ClassDef | cst.FunctionDef) and self.names:
            if isinstance(original_node, cst.FunctionDef):
                if _left_out(original_node):
                    return
                self.depth -= 1
            self.names.pop()

    def _dull(self, node: cst.CSTNode) -> bool:
        """What is not looked into: types, messages, and what runs only as a script or for type checkers."""
        if isinstance(node, cst.Annotation | cst.Decorator | cst.Raise | cst.Assert):
            return True
        if isinstance(node, cst.If):
            test = self.place.text(node.test)
            return b"__name__" in test or b"TYPE_CHECKING" in test
        if isinstance(node, cst.Call):
            return self.place.text(node.func).split(b".")[0].decode() in _QUIET
        return isinstance(node, cst.SimpleStatementLine) and is_docstring(node)

    def _add(self, operator: str, node: cst.CSTNode) -> None:
        for change in OPERATORS[operator](node, self.place):
            line = bisect_right(self._lines, min(e.start for e in change))
            name = ".".join(self.names) if self.depth else ""
            self.found.append(Site((operator,), self.path, name, line, change))


def _left_out(node: cst.FunctionDef) -> bool:
    """Functions without behaviour of their own: overloads, abstract ones, stubs, and what is only shown."""
    marks = {d.decorator.attr.value for d in node.decorators if isinstance(d.decorator, cst.Attribute)}
    marks |= {d.decorator.value for d in node.decorators if isinstance(d.decorator, cst.Name)}
    if node.name.value in _SKIPPED or marks & {"overload", "abstractmethod"}:
        return True
    rest = [s for s in node.body.body if not is_docstring(s)]
    smalls = [x for s in rest if isinstance(s, cst.SimpleStatementLine) for x in s.body]
    return len(smalls) == len(rest) and all(isinstance(s, cst.Pass | cst.Raise) for s in smalls)


def sites(path: str, source: bytes) -> list[Site]:
    """Every change that an operator could make to a file, in the order of the file. Raises `ValueError` for no Python."""
    place = Place(source)
    if place.module.code.encode() != source:  # spans are of UTF-8 without a mark
        raise ValueError(f"{path} is not plain UTF-8; leave the file out")
    visitor = _Sites(path, place)
    place.module.visit(visitor)
    return visitor.found


def apply(source: bytes, change: Change) -> bytes:
    """A source with a change made."""
    for edit in sorted(change, reverse=True):
        source = source[: edit.start] + edit.code + source[edit.stop :]
    return source


def _new_code(old: ast.Module, broken: bytes, line: int) -> bool:
    """Whether `broken` compiles and differs in AST from the original, changed at `line`; only that statement is compared."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            new = parse(broken)
            compile(new, "candidate", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        return False
    if len(old.body) != len(new.body):
        return True
    starts = [min([s.lineno, *(d.lineno for d in getattr(s, "decorator_list", ()))]) for s in old.body]
    index = max(bisect_right(starts, line) - 1, 0)
    return ast.dump(old.body[index]) != ast.dump(new.body[index])


def _combinations(found: list[Site], rng: random.Random) -> list[Site]:
    """One combination for each function that has sites of several operators: two or three that do not overlap."""
    by_function = defaultdict(list)
    for site in found:
        if site.function and site.operators[0] != "body_removed":
            by_function[site.path, site.function].append(site)
    made = []
    for (path, function), mine in by_function.items():
        chosen: list[Site] = []
        for site in rng.sample(mine, min(len(mine), 12)):
            apart = all(a.stop < b.start or b.stop < a.start for c in chosen for a in c.change for b in site.change)
            if apart and all(site.operators != c.operators for c in chosen):
                chosen.append(site)
        chosen = sorted(chosen[: rng.choice((2, 2, 3))], key=lambda s: s.line)
        if len(chosen) > 1:
            change = tuple(e for c in chosen for e in c.change)
            made.append(Site(tuple(c.operators[0] for c in chosen), path, function, chosen[0].line, change))
    return made


def _collect(files: Mapping[str, bytes], rng: random.Random) -> list[Site]:
    found: list[Site] = []
    size = 0
    paths = [p for p in sorted(files) if is_source(p) and len(files[p]) <= MAX_FILE and not is_generated(files[p])]
    rng.shuffle(paths)
    for path in paths:
        size += len(files[path])
        if size > MAX_SOURCES:
            break
        try:
            found += sites(path, files[path])
        except (ValueError, RecursionError):
            continue
    return found + _combinations(found, rng)


def mutations(files: Mapping[str, bytes], seed: int, n: int) -> Iterator[Candidate]:
    """At most `n` candidates over a repository's files, equal for equal arguments.

    Args:
        files: path → bytes of the repository, at least its sources; its tests, where they are given, say which functions
            they name, and these are drawn a little sooner.
        seed: of everything that is drawn.
        n: candidates at most; less where the repository has not so many.
    """
    rng = random.Random(seed)
    words = set(b" ".join(d for p, d in sorted(files.items()) if is_test(p) and p.endswith(".py")).split())
    named = {
        w for word in words for w in word.replace(b"(", b".").replace(b")", b".").decode("utf-8", "replace").split(".")
    }
    bags: dict[str, list[tuple[float, Site]]] = defaultdict(list)
    for site in _collect(files, rng):
        rank = rng.random() + 0.3 * named.isdisjoint(site.function.split("."))
        bags[site.operators[0] if len(site.operators) == 1 else COMBINATION].append((rank, site))
    for bag in bags.values():
        bag.sort(key=lambda entry: entry[0])
        del bag[MAX_SITES:]
    order = sorted(bags)
    rng.shuffle(order)
    yield from _draw(files, bags, order, seed, n)


def _draw(
    files: Mapping[str, bytes], bags: Mapping[str, list[tuple[float, Site]]], order: list[str], seed: int, n: int
) -> Iterator[Candidate]:
    """Take turns over the operators; of each, the best site in the function and file that were drawn from least."""
    functions: Counter[tuple[str, str]] = Counter()
    paths: Counter[str] = Counter()
    made: set[str] = set()
    trees: dict[str, ast.Module] = {}

    def cost(entry: tuple[float, Site]) -> tuple[int, int, float]:
        rank, site = entry
        return functions[site.path, site.function], paths[site.path], rank

    while any(bags.values()):
        for operator in order:
            while bags[operator]:
                best = min(bags[operator], key=cost)
                bags[operator].remove(best)
                path = best[1].path
                if path not in trees:
                    trees[path] = parse(files[path])
                candidate = _candidate(files[path], trees[path], best[1], seed)
                if candidate is not None and candidate.id not in made:
                    break
            else:
                continue
            if len(made) >= n:
                return
            made.add(candidate.id)
            functions[path, best[1].function] += 1
            paths[path] += 1
            yield candidate


def _candidate(source: bytes, tree: ast.Module, site: Site, seed: int) -> Candidate | None:
    broken = apply(source, site.change)
    if not _new_code(tree, broken, site.line):
        return None
    several = len(site.operators) > 1
    return Candidate(
        id=f"mutate-{sha256(site.path.encode() + bytes(1) + broken)[:16]}",
        broken={site.path: broken},
        fixed={site.path: source},
        provenance={
            "family": "mutate",
            "operator": COMBINATION if several else site.operators[0],
            "operators": list(site.operators),
            "path": site.path,
            "function": site.function,
            "line": site.line,
            "seed": seed,
        },
    )
