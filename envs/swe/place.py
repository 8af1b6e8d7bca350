"""A parsed source that is changed by editing bytes: where its nodes are, what encloses them, what they say."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import libcst as cst
from libcst.metadata import ByteSpanPositionProvider, MetadataWrapper, ParentNodeProvider


class Edit(NamedTuple):
    """The bytes `start` to `stop` of a source become `code`."""

    start: int
    stop: int
    code: bytes


Change = tuple[Edit, ...]


class _Uses(cst.CSTVisitor):
    """Names inside functions' bodies, and names outside of them, which a module needs when it is imported."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.outside, self.depth = set[str](), set[str](), 0

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.Import | cst.ImportFrom):
            return False
        if isinstance(node, cst.FunctionDef):
            for part in (*node.decorators, node.params, *([node.returns] if node.returns else [])):
                part.visit(self)
            self.depth += 1
            node.body.visit(self)
            self.depth -= 1
            return False
        if isinstance(node, cst.Name):
            (self.inside if self.depth else self.outside).add(node.value)
        return True


class Place:
    """One parsed source: where its nodes are and what encloses them. Raises `ValueError` for what is no Python."""

    def __init__(self, source: bytes) -> None:
        try:
            self.module = cst.parse_module(source)
        except Exception as error:  # libcst's own kinds, and some of its inner ones for odd encodings
            raise ValueError(f"source can't be parsed ({type(error).__name__}); leave the file out") from None
        wrapper = MetadataWrapper(self.module, unsafe_skip_copy=True)
        self.source = source
        self._spans = wrapper.resolve(ByteSpanPositionProvider)
        self._parents = wrapper.resolve(ParentNodeProvider)

    @cached_property
    def late_names(self) -> set[str]:
        """Names that functions' bodies use and nothing else does: the module can be imported without them."""
        uses = _Uses()
        self.module.visit(uses)
        return uses.inside - uses.outside

    def span(self, node: cst.CSTNode) -> tuple[int, int]:
        """Where a node starts and stops, its own parentheses included."""
        own = self._spans[node]
        start, stop = own.start, own.start + own.length
        if isinstance(node, cst.BaseExpression) and node.lpar:
            last = self._spans[node.rpar[-1]]
            start, stop = self._spans[node.lpar[0]].start, last.start + last.length
        return start, stop

    def text(self, node: cst.CSTNode) -> bytes:
        """A node's source."""
        start, stop = self.span(node)
        return self.source[start:stop]

    def edit(self, node: cst.CSTNode, code: bytes | str) -> Edit:
        """A node's source becomes `code`."""
        return Edit(*self.span(node), code.encode() if isinstance(code, str) else code)

    def swap(self, left: cst.CSTNode, right: cst.CSTNode) -> Change:
        """Two nodes change places."""
        return self.edit(left, self.text(right)), self.edit(right, self.text(left))

    def drop(self, statement: cst.CSTNode) -> Change:
        """A statement goes with its lines and the comment behind it; the only one of a block becomes `pass`."""
        start, stop = self.span(statement)
        line = self.source.rfind(b"\n", 0, start) + 1
        end = self.source.find(b"\n", stop) + 1 or len(self.source)
        rest = self.source[stop:end].strip()
        block = self.parent(statement)
        if len(getattr(block, "body", ())) < 2 or self.source[line:start].strip() or (rest and rest[:1] != b"#"):
            return (Edit(start, stop, b"pass"),)
        return (Edit(line, end, b""),)

    def parent(self, node: cst.CSTNode) -> cst.CSTNode | None:
        """What a node is directly in."""
        return self._parents.get(node)

    def above(self, node: cst.CSTNode) -> Iterator[cst.CSTNode]:
        """What a node is in, from the inside, up to its function."""
        up = self.parent(node)
        while up is not None and not isinstance(up, cst.FunctionDef | cst.Lambda | cst.ClassDef):
            yield up
            up = self.parent(up)

    def in_loop_test(self, node: cst.CSTNode) -> bool:
        """Whether a node belongs to the condition of a `while`, where most changes hang."""
        below = node
        for up in self.above(node):
            if isinstance(up, cst.While):
                return below is up.test
            below = up
        return False


BLANK = frozenset(
    [cst.SimpleWhitespace, cst.ParenthesizedWhitespace, cst.TrailingWhitespace, cst.EmptyLine, cst.Newline, cst.Comment]
)
"""Kinds of nodes without code in them: most of a tree."""


def is_docstring(statement: cst.CSTNode) -> bool:
    """Whether a statement is only a string."""
    if not isinstance(statement, cst.SimpleStatementLine) or len(statement.body) != 1:
        return False
    expression = statement.body[0]
    return isinstance(expression, cst.Expr) and isinstance(
        expression.value, cst.SimpleString | cst.ConcatenatedString | cst.Ellipsis
    )


class _Found(cst.CSTVisitor):
    """Nodes of some kinds below one, functions inside left out."""

    def __init__(self, *kinds: type[cst.CSTNode]) -> None:
        super().__init__()
        self.kinds, self.nodes = kinds, list[cst.CSTNode]()

    def on_visit(self, node: cst.CSTNode) -> bool:
        if type(node) in BLANK:
            return False
        if isinstance(node, self.kinds):
            self.nodes.append(node)
        return not isinstance(node, cst.FunctionDef | cst.Lambda)


def find(node: cst.CSTNode, *kinds: type[cst.CSTNode]) -> list[cst.CSTNode]:
    """The nodes of some kinds in one, in order, those of inner functions left out."""
    found = _Found(*kinds)
    for child in node.children if isinstance(node, cst.FunctionDef) else [node]:
        child.visit(found)
    return found.nodes
