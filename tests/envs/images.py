"""Makes small image archives from this host's own bash and tools."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

Entries = dict[str, bytes | tarfile.TarInfo | None]
"""Path → content, None for a directory, or a whole entry."""


def tar(entries: Entries) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, value in entries.items():
            entry = value if isinstance(value, tarfile.TarInfo) else tarfile.TarInfo(name)
            entry.name, entry.uid, entry.gid = name, 1234, 5678
            if value is None:
                entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            elif isinstance(value, bytes):
                entry.size, entry.mode = len(value), 0o755 if name.startswith(("bin/", "lib")) else 0o644
            archive.addfile(entry, io.BytesIO(value) if isinstance(value, bytes) else None)
    return out.getvalue()


def entry(kind: bytes, target: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo()
    made.type, made.linkname, made.mode = kind, target, 0o644
    return made


def system() -> Entries:
    """The least root file system that a sandbox runs on, from this host's own bash and tools."""
    found: Entries = {"tmp": None, "usr/bin": None, "usr/bin/env": entry(tarfile.SYMTYPE, "../../bin/env")}
    for tool in ("bash", "cat", "rm", "mkdir", "mv", "id", "ls", "ln", "env"):
        path = shutil.which(tool)
        assert path
        found[f"bin/{tool}"] = Path(path).read_bytes()
        libraries = subprocess.run(["ldd", path], capture_output=True, text=True).stdout.split()
        found |= {word.lstrip("/"): Path(word).read_bytes() for word in libraries if word.startswith("/")}
    return found


def docker_archive(
    path: Path, layers: list[bytes], claim: list[str] | None = None, volumes: tuple[str, ...] = ()
) -> Path:
    digests = claim or [hashlib.sha256(layer).hexdigest() for layer in layers]
    inner = {"Env": ["COLOUR=red", "HOME=/home"], "Volumes": {name: {} for name in volumes}}
    config = {"rootfs": {"diff_ids": [f"sha256:{d}" for d in digests]}, "config": inner}
    names = [f"{i}/layer.tar" for i in range(len(layers))]
    manifest = [{"Config": "config.json", "Layers": names}]
    files: Entries = {"manifest.json": json.dumps(manifest).encode(), "config.json": json.dumps(config).encode()}
    path.write_bytes(tar(files | dict(zip(names, layers, strict=True))))
    return path
