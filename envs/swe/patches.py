"""Unified diffs as git writes them: which files one touches, one made from changes, and changes made from one.

Everything that interprets a patch of unknown origin does so in a pristine sandbox of the task; what it did there is data.
"""

from __future__ import annotations

import glob
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from envs.errors import InfraError, SandboxDead
from envs.sandbox.base import Backend, Changes, FileChange, Result, Sandbox
from envs.task import Task

MAX_PATCH = 2 << 20
"""Bytes; a longer patch is not applied."""
_MAX_FILE = 16 << 20
GIT = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}
"""Environment in which git takes a repository of another user: images belong to root, sandboxes don't run as root."""
_EXPORTS = " ".join(f"{key}='{value}'" for key, value in GIT.items())
APPLY = (
    "git apply --verbose",
    "git apply --verbose --3way",
    "git apply --verbose --reject",
    "patch --batch --forward --fuzz=5 -p1 -i",
)
"""What is tried in turn, each on a pristine tree. Source: SWE-bench 5.0.2, `harness/run_evaluation.py`."""


@dataclass
class Section:
    """One file of a patch."""

    old: str | None = None
    """Path before; None: the file is new."""
    new: str | None = None
    """Path after; None: the file is deleted."""
    binary: bool = False
    lines: list[str] = field(default_factory=list)
    """Lines of its hunks, with their marks."""

    @property
    def path(self) -> str:
        """The path after, or before where it is deleted."""
        return self.new or self.old or ""


@dataclass(frozen=True, kw_only=True)
class Patched:
    """What a patch does to a task's repository."""

    changes: Changes = field(default_factory=dict)
    why: str = ""
    """Why it could not be applied; empty: it was."""


_ESCAPES = {"n": b"\n", "t": b"\t", "r": b"\r", "a": b"\a", "b": b"\b", "f": b"\f", "v": b"\v"}


def _unquote(name: str) -> str:
    """git's C-like quoting of unusual names, undone."""
    if len(name) < 2 or name[0] != '"' or name[-1] != '"':
        return name

    def one(match: re.Match[bytes]) -> bytes:
        code = match[1].decode()
        return bytes([int(code, 8) & 255]) if code.isdigit() else _ESCAPES.get(code, match[1])

    raw = re.sub(rb"\\([0-7]{3}|.)", one, name[1:-1].encode())
    return raw.decode("utf-8", "replace")


def _name(text: str) -> str | None:
    """The path on a `---` or `+++` line, without its prefix and what follows a tab."""
    quoted = re.match(r'"(?:[^"\\]|\\.)*"', text)
    text = _unquote(quoted[0]) if quoted else text.partition("\t")[0].rstrip("\r")
    return None if text == "/dev/null" else text.partition("/")[2] or text


def _header(rest: str) -> str | None:
    """The path that both halves of a `diff --git` line name; None where they differ."""
    quoted = re.match(r'("(?:[^"\\]|\\.)*") ("(?:[^"\\]|\\.)*")$', rest)
    if quoted:
        a, b = _name(quoted[1]), _name(quoted[2])
    else:
        half = len(rest) // 2
        a, b = _name(rest[:half]), _name(rest[half + 1 :])
    return a if a == b else None


def sections(patch: str) -> list[Section]:
    """The files of a unified diff, in order; hunk contents are never taken for headers. Pure; never raises."""
    found: list[Section] = []
    minus = plus = 0
    for line in patch.split("\n"):
        if minus > 0 or plus > 0:
            minus -= line[:1] in ("", " ", "-", "\r")
            plus -= line[:1] in ("", " ", "+", "\r")
            found[-1].lines.append(line)
        elif line.startswith("diff --git "):
            name = _header(line[11:].rstrip("\r"))
            found.append(Section(name, name))
        elif line.startswith("--- "):
            name, last = _name(line[4:]), found[-1] if found else None
            if last is None or last.lines or (last.path and name not in (None, last.old, last.new)):
                found.append(Section())
            found[-1].old = name
        elif found and not _meta(found[-1], line) and (hunk := _HUNK.match(line)):
            minus, plus = (int(hunk[i] or 1) for i in (1, 2))
    return [section for section in found if section.path]


_HUNK = re.compile(r"@@ -\d+(?:,(\d{1,9}))? \+\d+(?:,(\d{1,9}))? @@")


def _meta(section: Section, line: str) -> bool:
    """Take one header line of a file; False where it is none."""
    if line.startswith("+++ "):
        section.new = _name(line[4:])
    elif line.startswith("rename from "):
        section.old = _unquote(line[12:])
    elif line.startswith(("rename to ", "copy to ")):
        section.new = _unquote(line.partition(" to ")[2])
    elif line.startswith("new file mode"):
        section.old = None
    elif line.startswith("deleted file mode"):
        section.new = None
    elif line.startswith(("GIT binary patch", "Binary files ")):
        section.binary = True
    else:
        return False
    return True


def paths(patch: str) -> list[str]:
    """Every path that a patch names, before or after."""
    return list(dict.fromkeys(p for s in sections(patch) for p in (s.old, s.new) if p))


def globs(patch: str) -> list[str]:
    """Globs that match exactly the paths of a patch."""
    return [glob.escape(path) for path in paths(patch)]


# ---- changes → patch ----


def to_patch(before: Mapping[str, FileChange], after: Mapping[str, FileChange]) -> str:
    """The unified diff between two trees, as `git apply` takes it: new and deleted files, modes, missing last newlines.

    A file that is not UTF-8 before or after is a git binary patch. Paths are relative; data None is an absent file.
    """
    odd = {p for tree in (before, after) for p, change in tree.items() if not _is_text(change.data)}
    parts = []
    for binary in (False, True):
        some = [{p: c for p, c in tree.items() if (p in odd) == binary} for tree in (before, after)]
        if some[0] != some[1]:
            parts.append(_git_diff(some[0], some[1], binary))
    return "".join(parts)


def _is_text(data: bytes | None) -> bool:
    try:
        return b"\0" not in (data or b"") and (data or b"").decode("utf-8") is not None
    except UnicodeDecodeError:
        return False


def _git_diff(before: Mapping[str, FileChange], after: Mapping[str, FileChange], binary: bool) -> str:
    with tempfile.TemporaryDirectory(prefix="codeworld-diff-") as place:
        root = Path(place)
        for side, tree in (("a", before), ("b", after)):
            (root / side).mkdir()
            for path, change in tree.items():
                if change.data is not None:
                    file = root / side / path
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(change.data)
                    file.chmod(0o755 if change.mode & 0o111 else 0o644)
        (root / "attributes").write_text("* -diff\n" if binary else "* diff\n")
        options = f"--no-index --no-prefix --binary --full-index --no-renames --no-ext-diff --no-textconv{' --text' * (not binary)} a b"
        done = subprocess.run(
            ["git", "-c", f"core.attributesFile={root / 'attributes'}", "diff", *options.split()],
            cwd=root,
            capture_output=True,
            env={
                "PATH": "/usr/local/bin:/usr/bin:/bin",
                "HOME": place,
                "GIT_CONFIG_NOSYSTEM": "1",
                "GIT_CEILING_DIRECTORIES": place,
            },
            timeout=300,
        )
    if done.returncode not in (0, 1):
        raise InfraError(f"git diff failed: {done.stderr.decode('utf-8', 'replace')[:300]}")
    return done.stdout.decode("utf-8")


def originals(sandbox: Sandbox, wanted: list[str]) -> dict[str, FileChange]:
    """The files at these paths of the work directory as a sandbox has them; absent ones are left out."""
    found = {}
    for path in wanted:
        try:
            data = sandbox.read("./" + path, limit=_MAX_FILE)
        except OSError:
            continue
        found[path] = FileChange(data)
    names = " ".join(map(_shell, found))
    if names:
        run = sandbox.run(f'for f in {names}; do [ -x "$f" ] && printf x || printf -- -; done', timeout=60)
        marks = run.text() if run.ok else ""
        if len(marks) == len(found):
            found = {
                p: FileChange(c.data, 0o755 if m == "x" else 0o644)
                for (p, c), m in zip(found.items(), marks, strict=True)
            }
    return found


def _shell(path: str) -> str:
    return "'./" + path.replace("'", "'\\''") + "'"


def patch_of(task: Task, changes: Changes, backend: Backend) -> str:
    """Changes of a task's repository as a unified diff. Raises `InfraError`."""
    if not changes:
        return ""
    with pristine(task, backend) as sandbox:
        before = originals(sandbox, list(changes))
    return to_patch(before, changes)


# ---- patch → changes ----


def pristine(task: Task, backend: Backend) -> Sandbox:
    """A sandbox of the task as the agent finds it."""
    return backend.create(base=task.base, workdir=task.workdir, files=task.files(task.setup), limits=task.limits)


def patch_changes(task: Task, patch: str, backend: Backend) -> Patched:
    """What a patch does to a task's repository, found by applying it in pristine sandboxes, one for each way to apply it.

    A patch that is too long or that no way applies is data (`why`). Raises `InfraError` when a sandbox failed.
    """
    try:
        data = patch.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        return Patched(why=f"the patch is no text: {error.reason}")
    if not data.strip():
        return Patched(why="the patch is empty")
    if len(data) > MAX_PATCH:
        return Patched(why=f"the patch has {len(data)} bytes; at most {MAX_PATCH} are applied")
    named = set(paths(patch))
    if not named:
        return Patched(why="the patch names no file")
    if bad := next((p for p in named if unsafe(p)), None):
        return Patched(why=f"the patch touches {bad!r}, outside the repository or in .git")
    why = ""
    for command in APPLY:
        with pristine(task, backend) as sandbox:
            sandbox.write("/tmp/.patch", data)
            result = sandbox.run(f"{_EXPORTS} {command} /tmp/.patch", timeout=120)
            if result.cause == "dead":
                raise SandboxDead(f"a sandbox of {task.id} died while a patch was applied")
            if result.ok:
                changes = sandbox.changes()
                return Patched(changes={p: c for p, c in changes.items() if p in named})
            why = why or _complaint(result)
    return Patched(why="the patch does not apply: " + why)


def unsafe(path: str) -> bool:
    """Whether a path of a patch leads out of the repository, or into git's own files."""
    pure = PurePosixPath(path)
    return pure.is_absolute() or ".." in pure.parts or ".git" in pure.parts or "\0" in path


def _complaint(result: Result) -> str:
    lines = [line.strip() for line in result.text().splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("error:", "fatal:"))]
    return (errors or lines or [f"ended by {result.cause}"])[0][:200]
