"""Statements: a bug report in a user's manner, from what failing tests did, that does not name the fix.

What a statement may hold: a test's name in words, the statement of it that failed with what leads up to it, values and
exceptions. `leaks` finds what it must not hold: the changed file, the changed function unless a failing test names it,
and lines of the repair.
"""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Sequence
from itertools import pairwise

from envs.swe.candidate import Candidate
from envs.swe.failures import Failure
from envs.syntax import parse

MAX_SHOWN = 3
"""Failures that a statement describes; the others are counted."""
MAX_CODE = 1200
"""Characters of one failure's code."""
MAX_MESSAGE = 500
"""Characters of one failure's message."""
_UNSTABLE = [
    (re.compile(r"0x[0-9a-fA-F]{6,}"), "0x…"),
    (re.compile(r"(?<![\w.])/(?:tmp|var/tmp|testbed|repo|root|home|opt|usr)(?:/[^\s'\",:)\]>]*)?"), "…"),
    (re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?(?:[+-]\d\d:?\d\d|Z)?"), "…"),
    (re.compile(r"\b\d+\.\d{3,} ?(?:s|ms|seconds)\b"), "…"),
]
_LEAST = 10
"""Characters of a changed line that a statement must not quote; shorter ones are in any program."""


def statement(name: str, failed: Sequence[Failure], candidate: Candidate | None = None) -> str:
    """A bug report on the package `name`, equal for equal failures, at most about 6,000 characters.

    Args:
        name: the package as its users call it.
        failed: at least one failed test.
        candidate: the bug; messages that would give its repair away are then left out.
    """
    if not failed:
        raise ValueError("a statement needs a failed test; drop the candidate")
    chosen = _choose(failed)
    parts = [_report(f, candidate, failed) for f in chosen]
    what = "the following does" if len(parts) == 1 else "these do"
    text = [f"Since a recent change to {name}, {what} not work as before.", *parts]
    rest = len(failed) - len(chosen)
    if rest:
        text.append(f"{rest} more {'case like this fails' if rest == 1 else 'cases like these fail'}, too.")
    text.append("Please repair the package's behaviour; what worked until now has to go on working.")
    return "\n\n".join(text) + "\n"


def _choose(failed: Sequence[Failure]) -> list[Failure]:
    """The failures to show: of different tests and code, those with code and short ones first, then by id."""
    chosen: list[Failure] = []
    seen: set[str] = set()
    for failure in sorted(failed, key=lambda f: (not f.code, len(f.code) + len(f.message), f.test)):
        marks = {failure.test.split("[")[0], failure.code or failure.test}
        if seen.isdisjoint(marks):
            chosen.append(failure)
        seen |= marks
    return chosen[:MAX_SHOWN]


def words(test: str) -> str:
    """A test's name as words: `tests/a.py::TestB::test_c_d[1]` is "c d"; a whole file could not be imported."""
    if "::" not in test:
        return "import"
    name = test.split("::")[-1].split("[")[0]
    plain = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", re.sub(r"^test_?", "", name)).replace("_", " ").strip()
    return plain or name


def _report(failure: Failure, candidate: Candidate | None, failed: Sequence[Failure]) -> str:
    title = words(failure.test)
    title = title[:1].upper() + title[1:]
    group = failure.test.split("::")[1:-1]
    if group and re.search(r"\bself\.", failure.code):  # what `self` holds is told by its class alone
        title += f" ({group[-1]})"
    lines = [f"**{title}**"]
    if failure.code:
        lines += ["", _fence(_cut(stable(failure.code), MAX_CODE), "python")]
    if failure.arguments:
        lines += ["", f"with `{stable(failure.arguments)}`"]
    lines += ["", _happened(failure, candidate, failed)]
    return "\n".join(lines)


def _happened(failure: Failure, candidate: Candidate | None, failed: Sequence[Failure]) -> str:
    error = failure.error.split(".")[-1]
    message = _cut(stable(failure.message), MAX_MESSAGE)
    if candidate is not None and leaks(f"{failure.error} {message}", candidate, failed):
        message = ""
    if error == "Failed" and (missing := re.match(r"DID NOT RAISE (.*)", failure.message)):
        kind = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", missing[1])
        return f"`{kind}` is expected here, but nothing is raised."
    if error not in ("AssertionError", "Failed"):
        return f"It raises `{error}`" + (f":\n\n{_fence(message)}" if message else ".")
    sides = _sides(failure) if message else None
    if sides and len("".join(sides)) < MAX_MESSAGE:
        return f"Expected: `{stable(sides[0])}`\nActual: `{stable(sides[1])}`"
    return f"It fails with\n\n{_fence(message)}" if message else "The check does not hold."


def _fence(text: str, kind: str = "") -> str:
    return f"```{kind}\n{text.replace('```', '` ` `')}\n```"


def _cut(text: str, most: int) -> str:
    """At most so many characters, whole lines where there are several."""
    text = text.strip("\n")
    if len(text) <= most:
        return text
    kept = text[:most]
    return (kept[: kept.rfind("\n")] if "\n" in kept else kept) + "\n…"


def stable(text: str) -> str:
    """Without addresses, paths of a machine, dates with a time, and durations."""
    for pattern, other in _UNSTABLE:
        text = pattern.sub(other, text)
    return text


def _sides(failure: Failure) -> tuple[str, str] | None:
    """Expected and actual value of a failed equality, where code and message show both."""
    if not failure.code:
        return None
    try:
        last = parse(failure.code).body[-1]
        for line in failure.message.splitlines():
            if line.startswith("assert ") or " != " in line:
                shown = ast.parse(line.removeprefix("assert ").strip(), mode="eval").body
                break
        else:
            return None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    while getattr(last, "body", None):
        last = last.body[-1]  # type: ignore[attr-defined]
    pair = _compared(last)
    if pair is None or not isinstance(shown, ast.Compare) or len(shown.ops) != 1:
        return None
    if not isinstance(shown.ops[0], ast.Eq if isinstance(last, ast.Assert) else ast.NotEq):
        return None
    left, right = ast.unparse(shown.left), ast.unparse(shown.comparators[0])
    return (left, right) if _given(pair[0]) > _given(pair[1]) else (right, left)


def _compared(statement: ast.stmt) -> tuple[ast.expr, ast.expr] | None:
    if isinstance(statement, ast.Assert) and isinstance(statement.test, ast.Compare) and len(statement.test.ops) == 1:
        return statement.test.left, statement.test.comparators[0]
    call = statement.value if isinstance(statement, ast.Expr) else None
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and len(call.args) >= 2:
        return (call.args[0], call.args[1]) if call.func.attr.endswith("Equal") else None
    return None


def _given(expression: ast.expr) -> int:
    """How much an expression looks like an expected value: 2 a literal, 1 a name that says so, 0 neither."""
    if not any(isinstance(n, ast.Name | ast.Call) for n in ast.walk(expression)):
        return 2
    return int(
        isinstance(expression, ast.Name) and re.match(r"exp|want|correct|should|answer", expression.id) is not None
    )


def leaks(text: str, candidate: Candidate, failed: Sequence[Failure] = ()) -> list[str]:
    """What a statement gives away of the repair, each in one line; empty where it gives nothing away.

    Names and lines that stand in the failing tests' own source are no leak: their call is what the report is about.
    """
    own = "\n".join(f.source for f in failed)
    found = []
    for path in sorted(candidate.broken):
        for name in sorted(_file_names(path)):
            if _says(name, text) and not _says(name, own):
                found.append(f"names the changed file: {name}")
        found += [
            f"quotes a changed line: {line}"
            for line in _changed(candidate, path)
            if line in _flat(text) and line not in _flat(own)
        ]
    function = str(candidate.provenance.get("function", "")).rsplit(".", 1)[-1]
    if function and _calls(function, text) and not _says(function, own):
        found.append(f"names the changed function: {function}")
    return found


def _says(name: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) is not None


def _calls(name: str, text: str) -> bool:
    """Whether a text names a function rather than using a plain word of the same letters."""
    word = re.escape(name)
    pattern = rf"(?<!\w){word}(?!\w)" if "_" in name else rf"(?<!\w){word}(?=\()|[.`'\"]{word}(?!\w)"
    return re.search(pattern, text) is not None


def _file_names(path: str) -> set[str]:
    """How a text could name a source file: by path, by file name, by dotted module (of at least two parts)."""
    parts = path.removesuffix(".py").split("/")
    names = {path} if len(parts) > 1 else set()
    if parts[-1] != "__init__":
        names |= {f"{parts[-1]}.py", ".".join(parts[-2:])} if len(parts) > 1 else {f"{parts[-1]}.py"}
    return names


def _flat(text: str) -> str:
    return " ".join(text.split())


def _changed(candidate: Candidate, path: str) -> list[str]:
    """Lines of a file that the repair takes away or adds, white space made one, those that say something."""
    old, new = (
        (d or b"").decode("utf-8", "replace").splitlines() for d in (candidate.broken[path], candidate.fixed[path])
    )
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    blocks = matcher.get_matching_blocks()
    spans = [(0, 0, 0), *((b.a, b.b, b.size) for b in blocks)]
    lines = {
        _flat(line) for (a, b, size), (c, d, _) in pairwise(spans) for line in (*old[a + size : c], *new[b + size : d])
    }
    return sorted(line for line in lines if len(line) >= _LEAST and re.search(r"\w\W+\w", line))
