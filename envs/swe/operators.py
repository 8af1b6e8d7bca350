"""Mutation operators: how a right function is made wrong by changing a few bytes of it.

An operator is a function `(node, place) → changes`; it is asked about every node of the functions that may be mutated, and
each change is a tuple of edits of the source's bytes, so that whatever is not edited keeps its format.

Source of the family: CWM (arXiv 2510.02387), mutate-fix agents (a function's body or a part of it removed, arguments
removed or reordered, variables swapped, import or return removed, operator replaced); the rest are the usual operators
of mutation testing. A change that can't matter (operands of `+` swapped, a message of an exception) or that mostly
hangs (the condition of a `while` negated) is left out; only a test run says whether the others matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import libcst as cst

from envs.swe.place import Change, Edit, Place, find, is_docstring

Operator = Callable[[cst.CSTNode, Place], Iterator[Change]]


def body_removed(node: cst.CSTNode, place: Place) -> Iterator[Change]:
    """A function's body, its docstring kept, becomes `raise NotImplementedError`, or returns nothing."""
    if not isinstance(node, cst.FunctionDef) or not isinstance(node.body, cst.IndentedBlock):
        return
    body = [s for i, s in enumerate(node.body.body) if i or not is_docstring(s)]
    if not body:
        return
    start, stop = place.span(body[0])[0], place.span(body[-1])[1]
    returns = any(isinstance(r, cst.Return) and r.value for r in find(node, cst.Return))
    nothing = (
        b"yield from ()" if find(node, cst.Yield) and not node.asynchronous else b"return None" if returns else b"pass"
    )
    for code in (b"raise NotImplementedError", nothing):
        yield (Edit(start, stop, code),)


def part_removed(node: cst.CSTNode, place: Place) -> Iterator[Change]:
    """One statement of a body goes: a branch, a loop, a call, a store into an attribute or an item."""
    if isinstance(node, cst.SimpleStatementLine) and len(node.body) == 1:
        small = node.body[0]
        call = isinstance(small, cst.Expr) and isinstance(small.value, cst.Call | cst.Await)
        store = isinstance(small, cst.Assign) and all(
            isinstance(t.target, cst.Attribute | cst.Subscript) for t in small.targets
        )
        wanted = call or store or isinstance(small, cst.AugAssign)
        if wanted and not any(isinstance(up, cst.While) for up in place.above(node)):
            yield place.drop(node)
    elif (
        isinstance(node, cst.For | cst.If) and not find(node, cst.Yield) and not isinstance(place.parent(node), cst.If)
    ):
        yield place.drop(node)  # but no `elif`, which is in an `If` without a block between


def _plain(node: cst.Call) -> bool:
    return not any(a.star for a in node.args)


_SYMMETRIC = frozenset(b"max min isinstance issubclass hasattr getattr setattr super print gcd".split())


def arguments_removed(node: cst.CSTNode, place: Place) -> Iterator[Change]:
    """A call loses a keyword argument, or the last of several positional ones."""
    if not isinstance(node, cst.Call) or not _plain(node):
        return
    last = max((i for i, a in enumerate(node.args) if a.keyword is None), default=-1)
    for index, arg in enumerate(node.args):
        if arg.keyword is None and (index != last or last == 0):
            continue
        if index + 1 < len(node.args):
            yield (Edit(place.span(arg)[0], place.span(node.args[index + 1])[0], b""),)
        elif index:
            yield (Edit(place.span(node.args[index - 1])[1], place.span(arg)[1], b""),)
        else:
            yield (place.edit(arg, b""),)


def arguments_reordered(node: cst.CSTNode, place: Place) -> Iterator[Change]:
    """Two neighbouring positional arguments of a call change places."""
    if isinstance(node, cst.Call) and _plain(node) and place.text(node.func).split(b".")[-1] not in _SYMMETRIC:
        for left, right in pairwise([a for a in node.args if a.keyword is None]):
            yield place.swap(left, right)


def _asks_type(up: cst.CSTNode | None, place: Place) -> bool:
    return isinstance(up, cst.Call) and place.text(up.func) in _SYMMETRIC


def _loads(node: cst.CSTNode, place: Place) -> list[cst.Name]:
    """Names whose values an expression uses, in order: no attributes, keywords, starred arguments, called functions,
    classes or comprehensions' own names."""
    found: list[cst.Name] = []
    bound = {n.value for c in find(node, cst.CompFor) for n in find(c.target, cst.Name)}  # type: ignore[attr-defined]
    for name in find(node, cst.Name):
        assert isinstance(name, cst.Name)
        up = place.parent(name)
        own = (
            (isinstance(up, cst.Attribute) and up.attr is name)
            or (
                isinstance(up, cst.Arg) and (up.keyword is name or up.star != "" or _asks_type(place.parent(up), place))
            )
            or (isinstance(up, cst.Call) and up.func is name)
            or isinstance(up, cst.Lambda | cst.Param | cst.NamedExpr)
        )
        if not own and name.value not in bound and name.value not in ("self", "cls") and not name.value[0].isupper():
            found.append(name)
    return found


_COMMUTE = (cst.Add, cst.Multiply, cst.BitAnd, cst.BitOr, cst.BitXor)


def _commutes(up: cst.CSTNode | None) -> bool:
    if isinstance(up, cst.Comparison):
        return all(isinstance(c.operator, cst.Equal | cst.NotEqual | cst.Is | cst.IsNot) for c in up.comparisons)
    return isinstance(up, cst.BooleanOperation) or (
        isinstance(up, cst.BinaryOperation) and isinstance(up.operator, _COMMUTE)
    )


def variables_swapped(node: cst.CSTNode, place: Place) -> Iterator[Change]:
    """Two variables of one value, return or condition change places, where their order matters."""
    if isinstance(node, cst.Assign | cst.Return | cst.AugAssign | cst.Expr):
        unit = node.value
    elif isinstance(node, cst.If):
        unit = node.test
    else:
        return
    for left, right in pairwise(_loads(unit, place) if unit is not None else ()):
        ups = [place.parent(n) for n in (left, right)]
        ups = [place.parent(u) if isinstance(u, cst.ComparisonTarget) else u for u in ups]
        alike = isinstance(ups[0], cst.Attribute) == isinstance(ups[1], cst.Attribute)
        if left.value != right.value and alike and not (ups[0] is ups[1] and _commutes(ups[0])):
            yield place.swap(left, right)


def import_removed(node: cst.CSTNode, place: Place) -> Iterator[Change]:
    """A module's import goes, whole or one name of several, where only functions use its name."""
    line = place.parent(node)
    if not isinstance(node, cst.Import | cst.ImportFrom) or isinstance(node.names, cst.ImportStar):
        return
    if not isinstance(place.parent(line) if line else None, cst.Module) or place.text(node).startswith(
        b"from __future__"
    ):
        return
    for index, alias in enumerate(node.names):
        name = alias.evaluated_alias or alias.evaluated_name.split(".")[0]
        if name not in place.late_names:
            continue
        if len(node.names) == 1:
            assert line is not None
            yield place.drop(line)
        elif index + 1 < len(node.names):
            yield (Edit(place.span(alias)[0], place.span(node.names[index + 1])[0], b""),)
        else:
            yield (Edit(place.span(node.names[index - 1])[1], place.span(alias)[1], b""),)


def return_removed(node: cst.CSTNode, place: Place) -> Iterator[Change]:
    """A return loses its value, or a call loses the `return` before it, or an early return goes."""
    if not isinstance(node, cst.Return) or node.value is None or place.text(node.value) == b"None":
        return
    yield (place.edit(node, b"return"),)
    if isinstance(node.value, cst.Call):
        yield (place.edit(node, place.text(node.value)),)
    if any(isinstance(up, cst.If | cst.For | cst.Try) for up in place.above(node)):
        yield (place.edit(node, b"pass"),)


_OPERATORS: dict[type[cst.CSTNode], str] = {
    cst.Add: "-",
    cst.Subtract: "+",
    cst.Multiply: "+",
    cst.Divide: "*",
    cst.FloorDivide: "/",
    cst.Modulo: "//",
    cst.Power: "*",
    cst.LeftShift: ">>",
    cst.RightShift: "<<",
    cst.BitAnd: "|",
    cst.BitOr: "&",
    cst.BitXor: "&",
    cst.AddAssign: "-=",
    cst.SubtractAssign: "+=",
    cst.MultiplyAssign: "+=",
    cst.DivideAssign: "*=",
    cst.FloorDivideAssign: "/=",
    cst.BitAndAssign: "|=",
    cst.BitOrAssign: "&=",
}
_LITERALS = (
    cst.SimpleString,
    cst.FormattedString,
    cst.ConcatenatedString,
    cst.List,
    cst.Tuple,
    cst.Dict,
    cst.ListComp,
    cst.SetComp,
)


def operator_replaced(node: cst.CSTNode, place: Place) -> Iterator[Change]:
    """An arithmetic or bit operator becomes another one, or a sign goes; no arithmetic on strings and lists."""
    if isinstance(node, cst.BinaryOperation | cst.AugAssign) and type(node.operator) in _OPERATORS:
        values = [node.left, node.right] if isinstance(node, cst.BinaryOperation) else [node.value]
        hangs = isinstance(node, cst.AugAssign) and any(isinstance(up, cst.While) for up in place.above(node))
        if not hangs and not any(isinstance(v, _LITERALS) for v in values):
            yield (place.edit(node.operator, _OPERATORS[type(node.operator)]),)
    elif isinstance(node, cst.UnaryOperation) and isinstance(node.operator, cst.Minus):
        yield (place.edit(node.operator, b""),)


def off_by_one(node: cst.CSTNode, place: Place) -> Iterator[Change]:
    """A whole number, the end of a range or a bound of a slice is one more or one less."""
    if isinstance(node, cst.Integer):
        if node.value.isdecimal() and not isinstance(place.parent(node), cst.Param):
            yield (place.edit(node, str(int(node.value) + 1)),)
            if int(node.value) > 0:
                yield (place.edit(node, str(int(node.value) - 1)),)
        return
    bounds: list[cst.BaseExpression | None] = []
    if isinstance(node, cst.Slice):
        bounds = [node.lower, node.upper]
    elif isinstance(node, cst.Call) and place.text(node.func) == b"range" and _plain(node):
        bounds = [node.args[min(1, len(node.args) - 1)].value] if node.args else []
    for bound in bounds:
        if isinstance(bound, cst.Name | cst.Attribute | cst.Call):
            yield (place.edit(bound, place.text(bound) + b" - 1"),)
            yield (place.edit(bound, place.text(bound) + b" + 1"),)


_COMPARISONS: dict[type[cst.CSTNode], tuple[str, ...]] = {
    cst.LessThan: ("<=", ">=", ">"),
    cst.LessThanEqual: ("<", ">", ">="),
    cst.GreaterThan: (">=", "<=", "<"),
    cst.GreaterThanEqual: (">", "<", "<="),
    cst.Equal: ("!=",),
    cst.NotEqual: ("==",),
    cst.Is: ("is not",),
    cst.IsNot: ("is",),
    cst.In: ("not in",),
    cst.NotIn: ("in",),
}
"""First the one with another boundary, then the negation, then the other direction."""


def comparison_flipped(node: cst.CSTNode, place: Place) -> Iterator[Change]:
    """A comparison moves its boundary, is negated or changes its direction; only the first in a `while`'s condition."""
    if not isinstance(node, cst.Comparison):
        return
    for target in node.comparisons:
        others = _COMPARISONS.get(type(target.operator), ())
        if place.in_loop_test(node):
            others = others[:1] if len(others) > 1 else ()
        for other in others:
            yield (place.edit(target.operator, other),)


def boolean_replaced(node: cst.CSTNode, place: Place) -> Iterator[Change]:
    """`and` becomes `or`, and the other way round."""
    if isinstance(node, cst.BooleanOperation) and not place.in_loop_test(node):
        yield (place.edit(node.operator, "or" if isinstance(node.operator, cst.And) else "and"),)


def condition_negated(node: cst.CSTNode, place: Place) -> Iterator[Change]:
    """The condition of a branch, a conditional expression or a comprehension is negated (comparisons have their own)."""
    if not isinstance(node, cst.If | cst.IfExp | cst.CompIf):
        return
    test = node.test
    if isinstance(test, cst.UnaryOperation) and isinstance(test.operator, cst.Not):
        yield (place.edit(test.operator, b""),)
    elif isinstance(test, cst.BooleanOperation | cst.NamedExpr) and not test.lpar:
        yield (place.edit(test, b"not (" + place.text(test) + b")"),)
    elif not isinstance(test, cst.Comparison | cst.IfExp | cst.Lambda):
        yield (place.edit(test, b"not " + place.text(test)),)


def _other_constant(value: cst.BaseExpression) -> list[str]:
    if isinstance(value, cst.Name):
        return {"True": ["False"], "False": ["True"]}.get(value.value, [])
    if isinstance(value, cst.Integer) and value.value.isdecimal():
        return [str(int(value.value) + 1), *([str(int(value.value) - 1)] if int(value.value) else [])]
    if isinstance(value, cst.SimpleString) and value.quote in ("'", '"'):
        return [value.prefix + value.quote * 2 if value.raw_value else value.prefix + value.quote + " " + value.quote]
    return []


def default_changed(node: cst.CSTNode, place: Place) -> Iterator[Change]:
    """A parameter has another default: the other truth value, one more or less, an empty string."""
    if isinstance(node, cst.Param) and node.default is not None:
        for code in _other_constant(node.default):
            yield (place.edit(node.default, code),)


def constant_flipped(node: cst.CSTNode, place: Place) -> Iterator[Change]:
    """`True` becomes `False`, and the other way round, in an assignment, an argument or a return."""
    other = {"True": "False", "False": "True"}.get(node.value) if isinstance(node, cst.Name) else None
    if other and isinstance(place.parent(node), cst.Assign | cst.Arg | cst.Return | cst.AnnAssign):
        yield (place.edit(node, other),)


OPERATORS: dict[str, Operator] = {
    operator.__name__: operator
    for operator in (
        body_removed,
        part_removed,
        arguments_removed,
        arguments_reordered,
        variables_swapped,
        import_removed,
        return_removed,
        operator_replaced,
        off_by_one,
        comparison_flipped,
        boolean_replaced,
        condition_negated,
        default_changed,
        constant_flipped,
    )
}
"""Operators by name."""
