"""A git repository of one commit, written without git: no history, no remotes, no logs, no hooks, one pack.

Equal trees give equal bytes, everywhere. Source of the formats: git's documentation, `gitformat-pack`, `gitformat-index`.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from envs.sandbox.capture import TIME, Entry

AUTHOR = f"codeworld <codeworld@localhost> {TIME} +0000"
BRANCH = "main"
_CONFIG = b"""[core]
\trepositoryformatversion = 0
\tfilemode = true
\tbare = false
\tlogallrefupdates = false
[gc]
\tauto = 0
"""
_KINDS = {"commit": 1, "tree": 2, "blob": 3}
_MODES = {False: 0o100644, True: 0o100755}


def one_commit(tree: Mapping[str, Entry], message: str = "The repository as it is found\n") -> dict[str, bytes]:
    """The files of `.git` (path below it → content) for a work tree that holds exactly `tree`.

    Its pack has one object for each different content, each directory, and the commit.
    """
    objects: dict[bytes, tuple[str, bytes]] = {}

    def put(kind: str, data: bytes) -> bytes:
        name = hashlib.sha1(f"{kind} {len(data)}\0".encode() + data, usedforsecurity=False).digest()
        objects[name] = kind, data
        return name

    files = {path.encode("utf-8", "surrogateescape"): entry for path, entry in tree.items()}
    blobs = {path: put("blob", _content(entry)) for path, entry in files.items()}
    modes = {path: _mode(entry) for path, entry in files.items()}
    root = _directory(_nested(blobs), modes, b"", put)
    commit = put("commit", f"tree {root.hex()}\nauthor {AUTHOR}\ncommitter {AUTHOR}\n\n{message}".encode())
    pack, index = _pack(objects)
    name = pack[-20:].hex()
    return {
        "HEAD": f"ref: refs/heads/{BRANCH}\n".encode(),
        f"refs/heads/{BRANCH}": f"{commit.hex()}\n".encode(),
        "config": _CONFIG,
        "index": _index(files, blobs, modes),
        f"objects/pack/pack-{name}.pack": pack,
        f"objects/pack/pack-{name}.idx": index,
        "info/exclude": b"",
    }


def _content(entry: Entry) -> bytes:
    return entry.data if entry.link is None else entry.link.encode("utf-8", "surrogateescape")


def _mode(entry: Entry) -> int:
    return 0o120000 if entry.link is not None else _MODES[bool(entry.mode & 0o100)]


def _nested(blobs: Mapping[bytes, bytes]) -> dict[bytes, Any]:
    """Directory → what is in it: digests of files, and directories in turn."""
    top: dict[bytes, Any] = {}
    for path, digest in blobs.items():
        *parents, name = path.split(b"/")
        at = top
        for part in parents:
            at = at.setdefault(part, {})
        at[name] = digest
    return top


def _directory(
    content: Mapping[bytes, Any], modes: Mapping[bytes, int], prefix: bytes, put: Callable[[str, bytes], bytes]
) -> bytes:
    """Put a directory's objects; returns its digest. Its entries are in git's order: a directory as if it ended in `/`."""
    lines = []
    for name, value in sorted(content.items(), key=lambda item: item[0] + (b"/" if isinstance(item[1], dict) else b"")):
        if isinstance(value, dict):
            lines.append(b"40000 %s\0%s" % (name, _directory(value, modes, prefix + name + b"/", put)))
        else:
            lines.append(b"%o %s\0%s" % (modes[prefix + name], name, value))
    return put("tree", b"".join(lines))


def _pack(objects: Mapping[bytes, tuple[str, bytes]]) -> tuple[bytes, bytes]:
    """A pack of whole objects, and its index (version 2)."""
    parts, offsets, checks = [struct.pack(">4sII", b"PACK", 2, len(objects))], {}, {}
    at = len(parts[0])
    for name in sorted(objects):
        kind, data = objects[name]
        entry = _size(_KINDS[kind], len(data)) + zlib.compress(data, 6)
        offsets[name], checks[name] = at, zlib.crc32(entry)
        parts.append(entry)
        at += len(entry)
    body = b"".join(parts)
    pack = body + _sha1(body)
    names = sorted(objects)
    counts = [0] * 256
    for name in names:
        counts[name[0]] += 1
    fan = [sum(counts[: first + 1]) for first in range(256)]
    index = b"\377tOc" + struct.pack(">I256I", 2, *fan) + b"".join(names)
    index += b"".join(struct.pack(">I", checks[name]) for name in names)
    index += b"".join(struct.pack(">I", offsets[name]) for name in names) + pack[-20:]
    return pack, index + _sha1(index)


def _size(kind: int, size: int) -> bytes:
    """An object's head in a pack: 3 bits of kind and the size, the lowest 4 bits first, then 7 at a time."""
    out, size, byte = [], size >> 4, kind << 4 | size & 15
    while size:
        out.append(byte | 0x80)
        byte, size = size & 127, size >> 7
    return bytes([*out, byte])


def _index(files: Mapping[bytes, Entry], blobs: Mapping[bytes, bytes], modes: Mapping[bytes, int]) -> bytes:
    """The index, version 2. Its times are those of a layer's files; inodes differ, so git compares contents once."""
    out = [struct.pack(">4sII", b"DIRC", 2, len(files))]
    for path in sorted(files):
        size = len(_content(files[path])) & 0xFFFFFFFF
        stat = struct.pack(">10I", TIME, 0, TIME, 0, 0, 0, modes[path], 0, 0, size)
        entry = stat + blobs[path] + struct.pack(">H", min(len(path), 0xFFF)) + path
        out.append(entry + bytes(8 - len(entry) % 8))
    body = b"".join(out)
    return body + _sha1(body)


def _sha1(data: bytes) -> bytes:
    return hashlib.sha1(data, usedforsecurity=False).digest()
