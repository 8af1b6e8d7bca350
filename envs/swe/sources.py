"""Where repositories come from: a source distribution of the package index, a git repository here or elsewhere.

    pypi:NAME, pypi:NAME==VERSION      https://…, ssh://…, file:///… [@COMMIT]      PATH[@COMMIT]

What comes out is data. No code of a repository runs here: source distributions are fetched and read, never built, and
from git only objects are read, without hooks, filters, attributes or the repository's own helpers.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from envs.sandbox.capture import Entry
from envs.swe.index import BYTES_MAX, sdist, version_of

ENTRIES_MAX = 100_000
GIT_SECONDS = 900.0
_NAME = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)(?:==([A-Za-z0-9.!+_-]+))?$")


@dataclass(frozen=True)
class Source:
    """One repository, fetched."""

    name: str
    """Of the package or the repository, as a word that fits in a task's id."""
    version: str
    """Of the source distribution; of a git repository, by the nearest tag before `commit`, or "" where there is none."""
    commit: str
    """The commit that was asked for, 40 hexadecimal digits; "" for a source distribution."""
    origin: str
    """What it was asked for by, as given."""
    repository: Path | None
    """The git repository on this host."""
    read: Callable[[str], dict[str, Entry]]

    def tree(self, commit: str = "") -> dict[str, Entry]:
        """The files and links at a commit ("": the one that was asked for). Submodules are left out.

        Raises `ValueError` for an unknown commit, an unsafe path, or more than `BYTES_MAX` bytes.
        """
        return self.read(commit or self.commit)


def fetch(source: str, cache: Path, *, python: str = "") -> Source:
    """The repository that `source` names; what is fetched is kept below `cache`, and not fetched again.

    python: version ("3.11") of the interpreter that it will run on, by which the newest release is chosen; "": this one's.
    Raises `ValueError`, one line: an unknown package, version or commit, no source distribution, no network, no repository.
    """
    if source.startswith("pypi:"):
        return _package(source, cache, python or f"{sys.version_info.major}.{sys.version_info.minor}")
    where, commit = _split(source)
    if "://" in where:
        return _git(source, _clone(source, where.removeprefix("git+"), commit, cache), commit)
    path = Path(where).expanduser()
    if not path.is_dir():
        raise ValueError(f"{source!r}: no such directory; give pypi:NAME, a git URL or the path of a git repository")
    return _git(source, path, commit)


def _split(source: str) -> tuple[str, str]:
    """Where, and the commit after the last `@` of the last part of the path."""
    head, slash, last = source.rpartition("/")
    name, at, commit = last.rpartition("@")
    if not at or ("://" not in source and Path(source).exists()):
        return source, ""
    return head + slash + name, commit


# ---- the package index ----


def _package(source: str, cache: Path, python: str) -> Source:
    match = _NAME.match(source.removeprefix("pypi:"))
    if match is None:
        raise ValueError(f"{source!r}: no name of a package; give pypi:NAME or pypi:NAME==VERSION")
    name, version = re.sub(r"[-_.]+", "-", match[1]).lower(), match[2]
    path = sdist(name, version or "", cache, python)
    version = version_of(path.name, name) or ""
    return Source(name, version, "", source, None, lambda commit: _unpacked(path, commit))


# ---- archives ----


def _unpacked(path: Path, commit: str) -> dict[str, Entry]:
    """The files of a source distribution, below its one top directory."""
    if commit:
        raise ValueError(f"{path.name}: a source distribution has no commits, so not {commit!r}; give a git repository")
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                found = dict(_zipped(archive, path.name))
        else:
            with tarfile.open(path) as tar:
                found = dict(_tarred(tar, path.name))
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise ValueError(f"{path.name}: not a readable archive ({error}); fetch it again") from None
    return _checked({name.partition("/")[2]: entry for name, entry in found.items() if "/" in name}, path.name)


def _tarred(tar: tarfile.TarFile, what: str) -> Iterator[tuple[str, Entry]]:
    total, mode = 0, {True: 0o755, False: 0o644}
    for number, info in enumerate(tar):
        total += info.size
        if number > ENTRIES_MAX or total > BYTES_MAX:
            raise ValueError(f"{what}: more than {ENTRIES_MAX} entries or {BYTES_MAX >> 20} MiB; it is not unpacked")
        name = _inside(info.name, what)
        if info.issym():
            yield name, Entry(link=info.linkname)
        elif info.isreg() or info.islnk():
            try:
                file = tar.extractfile(info)
            except KeyError:
                file = None
            if file is None:
                raise ValueError(f"{what}: {name!r} is a link to {info.linkname!r}, which the archive does not hold")
            yield name, Entry(file.read(), mode[bool(info.mode & 0o100)])
        elif not info.isdir():
            raise ValueError(f"{what}: {name!r} is a device or FIFO; a source distribution has none")


def _zipped(archive: zipfile.ZipFile, what: str) -> Iterator[tuple[str, Entry]]:
    files = [info for info in archive.infolist() if not info.is_dir()]
    if len(files) > ENTRIES_MAX or sum(info.file_size for info in files) > BYTES_MAX:
        raise ValueError(f"{what}: more than {ENTRIES_MAX} entries or {BYTES_MAX >> 20} MiB; it is not unpacked")
    for info in files:
        mode, name = info.external_attr >> 16, _inside(info.filename, what)
        if stat.S_ISLNK(mode):
            yield name, Entry(link=archive.read(info).decode("utf-8", "surrogateescape"))
        else:
            yield name, Entry(archive.read(info), 0o755 if mode & 0o100 else 0o644)


def _inside(path: str, what: str) -> str:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\0" in path:
        raise ValueError(f"{what}: unsafe path {path!r}; paths stay inside the archive")
    return str(pure)


def _checked(tree: dict[str, Entry], what: str) -> dict[str, Entry]:
    """Refuse links that leave the tree, and files below what is no directory; leave out what is git's own."""
    tree = {path: entry for path, entry in tree.items() if ".git" not in path.lower().split("/")}
    for path, entry in tree.items():
        _inside(path, what)
        if not path or any(part in tree for part in map(str, PurePosixPath(path).parents)):
            raise ValueError(f"{what}: {path!r} lies below a file or link; it is not unpacked")
        if entry.link is not None:
            target = os.path.normpath(os.path.join(os.path.dirname(path), entry.link))  # noqa: PTH118, PTH120
            if entry.link.startswith("/") or target.startswith(".."):
                raise ValueError(f"{what}: {path!r} is a link that leaves the repository, to {entry.link[:100]!r}")
    return tree


# ---- git ----


def _git(source: str, path: Path, commit: str) -> Source:
    head = _resolve(source, path, commit or "HEAD")
    tag = _run_git(path, "describe", "--tags", "--abbrev=0", head, check=False).decode().strip()
    version = match[0] if (match := re.search(r"\d+(\.\d+)*", tag)) else ""
    last = (_split(source)[0] if "://" in source else str(path.resolve())).rstrip("/").rpartition("/")[2]
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", last.removesuffix(".git")) or "repository"

    def read(commit: str) -> dict[str, Entry]:
        return _checked(dict(_objects(source, path, _resolve(source, path, commit))), source)

    return Source(name, version, head, source, path, read)


def _resolve(source: str, path: Path, commit: str) -> str:
    """The full name of a commit. Raises `ValueError` where there is none, or no repository."""
    if not _run_git(path, "rev-parse", "--git-dir", check=False):
        raise ValueError(f"{source!r}: {path} is not a git repository; git init and commit there, or give another")
    found = _run_git(path, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{commit}^{{commit}}", check=False)
    if not found:
        raise ValueError(f"{source!r}: no commit {commit!r} in it; see git log, and fetch what is missing")
    return found.decode().strip()


def _objects(source: str, path: Path, commit: str) -> Iterator[tuple[str, Entry]]:
    """The files and links of a commit, as git stores them."""
    lines = _run_git(path, "ls-tree", "-r", "-z", "-l", "--full-tree", commit).split(b"\0")
    total, wanted = 0, []
    for line in filter(None, lines):
        info, _, name = line.partition(b"\t")
        mode, kind, digest, size = info.split()
        if kind == b"blob":
            total += int(size) if size.isdigit() else 0
            wanted.append((name.decode("utf-8", "surrogateescape"), mode, digest))
    if len(wanted) > ENTRIES_MAX or total > BYTES_MAX:
        raise ValueError(f"{source!r}: more than {ENTRIES_MAX} files or {BYTES_MAX >> 20} MiB; it is not read")
    answer = io.BytesIO(_run_git(path, "cat-file", "--batch", stdin=b"".join(d + b"\n" for *_, d in wanted)))
    for path_inside, mode, _ in wanted:
        data = _object(answer, source, path_inside)
        if mode == b"120000":
            yield path_inside, Entry(link=data.decode("utf-8", "surrogateescape"))
        else:
            yield path_inside, Entry(data, 0o755 if mode == b"100755" else 0o644)


def _object(answer: IO[bytes], source: str, name: str) -> bytes:
    *_, size = answer.readline().split()
    if not size.isdigit():
        raise ValueError(f"{source!r}: the repository lacks the content of {name!r}; fetch it whole (no partial clone)")
    data = answer.read(int(size))
    answer.read(1)
    return data


def _clone(source: str, url: str, commit: str, cache: Path) -> Path:
    """A bare clone of `url`; asked again unless it has the commit."""
    path = cache / "git" / hashlib.sha256(url.encode()).hexdigest()[:24]
    if path.is_dir():
        full = re.fullmatch(r"[0-9a-f]{40}", commit)
        if not (full and _run_git(path, "cat-file", "-t", commit, check=False) == b"commit\n"):
            _run_git(
                path,
                "fetch",
                "--quiet",
                "--force",
                "--tags",
                url,
                "+HEAD:HEAD",
                "+refs/heads/*:refs/heads/*",
                what=source,
            )
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    _run_git(path.parent, "clone", "--quiet", "--bare", "--template=", "--", url, str(draft), what=source)
    draft.rename(path)
    return path


_SAFE = {
    "core.hooksPath": "/dev/null",
    "core.fsmonitor": "false",
    "core.askPass": "true",
    "credential.helper": "",
    "safe.directory": "*",
    "protocol.ext.allow": "never",
    "submodule.recurse": "false",
}


def _run_git(path: Path, *args: str, stdin: bytes = b"", check: bool = True, what: str = "") -> bytes:
    """What a git command prints. No configuration of the host and no hook applies, and without `what`, the source in the
    user's words, nothing is fetched. Raises `ValueError` where it fails."""
    options = [part for key, value in _SAFE.items() for part in ("-c", f"{key}={value}")]
    kept: Mapping[str, str] = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    env = {
        **kept,
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_NO_LAZY_FETCH": "1",
        "GIT_NO_REPLACE_OBJECTS": "1",
        "GIT_ALLOW_PROTOCOL": "https:http:ssh:git:file" if what else "none",
        "LC_ALL": "C",
    }
    env |= {key: os.environ[key] for key in ("GIT_SSL_CAINFO", "GIT_SSH_COMMAND") if key in os.environ}
    command = ["git", *options, "-C", str(path), *args]
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, env=env, timeout=GIT_SECONDS, check=False)
    except FileNotFoundError:
        raise ValueError("no git command on PATH; install git, or give a source distribution: pypi:NAME") from None
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"{what or path}: git {args[0]} took more than {GIT_SECONDS:.0f} s; clone it by hand"
        ) from None
    if done.returncode and check:
        cause = " ".join(done.stderr.decode("utf-8", "replace").split())[-200:]
        raise ValueError(f"{what or path}: git {args[0]} failed ({cause}); check the address and the network")
    return b"" if done.returncode else done.stdout


__all__ = ["Source", "fetch"]
