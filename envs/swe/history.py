"""Candidates from a repository's history: commits that changed its code and its tests.

    commits (newest first) ─► one parent, sizes, kinds of files ─► code changed ─► statement ─► Candidate | Rejected

The repository is foreign: its objects are read by GitPython's own reader (GitDB), so that no hook, filter, textconv,
external diff, fsmonitor or partial-clone helper of its configuration runs; nothing is checked out. Which tests fail
before and pass after is for a run to find out.
"""

from __future__ import annotations

import ast
import difflib
import heapq
import json
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from envs.swe.candidate import Candidate, Rejected, is_source, is_test
from envs.swe.statement import leaks
from envs.syntax import parse

if TYPE_CHECKING:
    from git import Commit, Repo, Tree

MAX_FILES = 6
"""Source files of a fix."""
MAX_LINES = 200
"""Lines of source that a fix adds or takes away."""
MAX_BYTES = 1 << 20
"""Bytes of one file."""
MIN_WORDS = 4
"""Words of a statement."""
_PROSE = frozenset((".md", ".rst", ".txt", ".yml", ".yaml", ".toml", ".cfg", ".ini", ".in", ".lock", ".json", ""))
_TRAILER = re.compile(
    r"^[A-Za-z][A-Za-z-]*-(by|to|id|from|on)\s*:|^(fixes|closes|resolves|refs?|see|bug|issue|pr)\s*:?\s*(#?\d+|\S+://\S+)\.?$",
    re.I,
)
_DIFF = re.compile(r"^(diff --git |index [0-9a-f]+\.\.|@@ |\+\+\+ |--- |[+-](\s{2,}|[^\s+-]))|^\(cherry picked from")
_REFERENCES = [
    (re.compile(r"https?://\S+"), ""),
    (
        re.compile(r"\s*\(?(?:\b(?:fixes|closes|resolves|fix|close|see|refs?|pr|issue)[ :]*)?(?:#|\bgh-)\d+\)?", re.I),
        "",
    ),
    (re.compile(r"\b(?=[0-9a-f]*\d)(?=[0-9a-f]*[a-f])[0-9a-f]{7,40}\b"), ""),
]
_CONVENTIONAL = re.compile(r"^(?:fix|bug|bugfix|feat|chore|refactor|perf)(?:\([^)]*\))?!?:\s*", re.I)


def mine(
    repository: Path,
    *,
    n: int,
    since: str | None = None,
    issues: Path | None = None,
    on_rejected: Callable[[Rejected], object] = lambda rejected: None,
) -> Iterator[Candidate]:
    """At most `n` candidates from the history of a repository's HEAD, newest first.

    Args:
        repository: a local repository, bare or not.
        n: candidates at most.
        since: an ISO date; older commits are not looked at.
        issues: a JSONL file of issue texts, rows `{"id": "123" or a commit's hash, "text": …}`.
        on_rejected: told of every commit that is left out, with the reason.
    Raises `ValueError` where there is no repository, date or issue file to read.
    """
    import git
    from git.db import GitDB
    from git.exc import ODBError

    try:
        repo = git.Repo(repository, odbt=GitDB)
        head = repo.head.commit
        until = datetime.fromisoformat(since) if since else None
    except (git.InvalidGitRepositoryError, git.NoSuchPathError):
        raise ValueError(f"{repository} is no git repository; give the directory that holds .git") from None
    except (ValueError, ODBError) as error:
        raise ValueError(
            f"{repository} (since {since}) has no history to read ({error}); commit first, give an ISO date"
        ) from None
    texts = read_issues(issues) if issues else {}
    oldest = until.replace(tzinfo=until.tzinfo or UTC).timestamp() if until else 0.0
    found = 0
    for commit in _walk(head, oldest):
        if found >= n:
            return
        try:
            outcome = examine(repo, commit, texts)
        except (ODBError, ValueError, RecursionError) as error:
            outcome = Rejected(commit.hexsha, f"unreadable: {type(error).__name__}")
        if isinstance(outcome, Rejected):
            on_rejected(outcome)
        else:
            found += 1
            yield outcome


def _walk(head: Commit, oldest: float) -> Iterator[Commit]:
    """Commits from a head on, newest first; what a shallow clone cut off is its end."""
    queue: list[tuple[float, str, Commit]] = [(-head.committed_date, head.hexsha, head)]
    seen = {head.hexsha}
    while queue:
        date, _, commit = heapq.heappop(queue)
        if -date < oldest:
            return
        yield commit
        for parent in commit.parents:
            if parent.hexsha in seen:
                continue
            seen.add(parent.hexsha)
            try:
                heapq.heappush(queue, (-parent.committed_date, parent.hexsha, parent))
            except ValueError:  # not in a shallow clone
                continue


def read_issues(path: Path) -> dict[str, str]:
    """Issue number or commit hash → text. A broken row is a `ValueError` with its number."""
    texts = {}
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            texts[str(row["id"]).lstrip("#")] = str(row["text"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(
                f'{path} row {number}: expected {{"id": …, "text": …}}; repair or remove the row'
            ) from None
    return texts


def changed(old: Tree | None, new: Tree | None, under: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Paths at which two trees differ, with both entries (None: not there); equal subtrees are not opened."""
    left = {entry.name: entry for entry in old} if old is not None else {}
    right = {entry.name: entry for entry in new} if new is not None else {}
    for name in sorted(left.keys() | right.keys()):
        a, b = left.get(name), right.get(name)
        if a is not None and b is not None and (a.binsha, a.mode) == (b.binsha, b.mode):
            continue
        path = f"{under}{name}"
        trees = [e if e is not None and e.type == "tree" else None for e in (a, b)]
        if any(t is not None for t in trees):
            yield from changed(trees[0], trees[1], path + "/")
        a, b = (e if e is not None and e.type != "tree" else None for e in (a, b))
        if a is not None or b is not None:
            yield path, a, b


def examine(repo: Repo, commit: Commit, issues: Mapping[str, str]) -> Candidate | Rejected:
    """A commit as a candidate, or why it is none."""
    name = commit.hexsha
    if len(commit.parents) != 1:
        return Rejected(name, "merge" if commit.parents else "first commit")
    parent = commit.parents[0]
    entries = {path: (a, b) for path, a, b in changed(parent.tree, commit.tree)}
    kinds = {path: "test" if is_test(path) else "source" if is_source(path) else "other" for path in entries}
    if reason := _refuse(entries, kinds):
        return Rejected(name, reason)
    sides: list[dict[str, bytes | None]] = [
        {p: None if e[i] is None else e[i].data_stream.read() for p, e in entries.items() if kinds[p] != "other"}
        for i in (0, 1)
    ]
    if any(b"\0" in data for side in sides for data in side.values() if data):
        return Rejected(name, "binary file")
    broken, fixed = ({p: d for p, d in side.items() if kinds[p] == "source"} for side in sides)
    if reason := _judge(broken, fixed):
        return Rejected(name, reason)
    candidate = Candidate(
        id=f"history-{name[:12]}",
        commit=parent.hexsha,
        broken=broken,
        fixed=fixed,
        tests={p: d for p, d in sides[1].items() if kinds[p] == "test"},
        statement=_issue(commit, issues) or from_message(_text(commit)),
        provenance={"family": "history", "commit": name, "date": commit.committed_date},
    )
    if len(candidate.statement.split()) < MIN_WORDS:
        return Rejected(name, "message empty")
    if found := leaks(candidate.statement, candidate):
        return Rejected(name, f"message {found[0].split(':')[0]}")
    return candidate


def _refuse(entries: Mapping[str, tuple[Any, Any]], kinds: Mapping[str, str]) -> str:
    """Why the paths of a commit make no candidate; "" where they do."""
    sources = [p for p, kind in kinds.items() if kind == "source"]
    if not sources:
        return "no source"
    if not any(kind == "test" and p.endswith(".py") and entries[p][1] is not None for p, kind in kinds.items()):
        return "no tests"
    for path, pair in entries.items():
        pure = PurePosixPath(path)
        if pure.is_absolute() or not {"..", ".", ".git", ""}.isdisjoint(path.split("/")) or "\0" in path:
            return "unsafe path"
        if any(e is not None and (e.type != "blob" or e.mode & 0o170000 != 0o100000) for e in pair):
            return "link or submodule"
        prose = pure.suffix in _PROSE or not {"doc", "docs"}.isdisjoint(pure.parts) or pure.parts[0].startswith(".")
        if kinds[path] == "other" and pure.suffix != ".py" and not prose:
            return "not Python"
        if kinds[path] != "other" and any(e is not None and e.size > MAX_BYTES for e in pair):
            return "too big"
    return "too big" if len(sources) > MAX_FILES else ""


def _judge(broken: Mapping[str, bytes | None], fixed: Mapping[str, bytes | None]) -> str:
    """Why a change of source makes no candidate; "" where it does."""
    lines = 0
    for path, old in broken.items():
        sides = [(d or b"").decode("utf-8", "replace").splitlines() for d in (old, fixed[path])]
        lines += sum(
            x[0] in "+-" and x[:3] not in ("+++", "---") for x in difflib.unified_diff(sides[0], sides[1], n=0)
        )
    if lines > MAX_LINES:
        return "too big"
    try:
        alike = all((old is None) == (fixed[p] is None) and _bare(old) == _bare(fixed[p]) for p, old in broken.items())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "not Python"
    return "no code changed" if alike else ""


def _bare(source: bytes | None) -> str:
    """The AST of a source without positions and docstrings, as text."""
    tree = parse(source or b"")
    for node in ast.walk(tree):
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        if isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def _text(commit: Commit) -> str:
    message = commit.message
    return message if isinstance(message, str) else message.decode("utf-8", "replace")


def _issue(commit: Commit, issues: Mapping[str, str]) -> str:
    """The text of the issue that a commit closes: by its hash, else by the first number that it names."""
    numbers = re.findall(r"#(\d+)", _text(commit))
    by_hash = next((text for key, text in issues.items() if len(key) >= 7 and commit.hexsha.startswith(key)), "")
    return (by_hash or next((issues[n] for n in numbers if n in issues), "")).strip()


def from_message(message: str) -> str:
    """A commit message as a statement: no trailers, references, hashes, links or fragments of a diff."""
    kept: list[str] = []
    for line in message.replace("\r\n", "\n").splitlines():
        if _TRAILER.match(line.strip()) or _DIFF.match(line):
            continue
        for pattern, other in _REFERENCES:
            line = pattern.sub(other, line)
        kept.append(line.rstrip())
    text = _CONVENTIONAL.sub("", "\n".join(kept).strip(" :,-\n"))
    return re.sub(r"\n{3,}", "\n\n", text)[:8000].strip()
