"""What `base="host"` means, for every backend: the host's `/usr` and the running interpreter, read-only, under a small
made-up `/etc`. Nothing else of the host is there."""

from __future__ import annotations

import functools
import hashlib
import io
import sys
import tarfile
from pathlib import Path

_SYSTEM = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_ETC = ("/etc/ld.so.cache", "/etc/alternatives")
_RESERVED = ("/usr", *(f"/{name}" for name in _SYSTEM), "/etc", "/proc", "/sys", "/dev", "/run")


def environment() -> dict[str, str]:
    """The whole environment of a new sandbox's shell; nothing of the host's."""
    prefixes = [f"{path}/bin" for path in (sys.prefix, sys.base_prefix)]
    bins = [*prefixes, "/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin"]
    return {
        "PATH": ":".join(dict.fromkeys(bins)),
        "HOME": "/tmp",
        "USER": "agent",
        "LOGNAME": "agent",
        "LANG": "C.UTF-8",
        "TERM": "dumb",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",
    }


def bind_paths() -> list[str]:
    """The host's paths that are there, read-only, at the same place."""
    system = [f"/{name}" for name in _SYSTEM if Path("/", name).is_dir() and not Path("/", name).is_symlink()]
    return ["/usr", *system, *_interpreter(), *(path for path in _ETC if Path(path).exists())]


def links() -> dict[str, str]:
    """Symbolic links of the root: path → target."""
    return {f"/{name}": str(Path("/", name).readlink()) for name in _SYSTEM if Path("/", name).is_symlink()}


def etc_files(uid: int) -> dict[str, str]:
    """The files of `/etc`, with the sandbox's user in them."""
    return {
        "/etc/passwd": f"root:x:0:0:root:/:/bin/false\nagent:x:{uid}:{uid}:agent:/tmp:/bin/bash\n",
        "/etc/group": f"root:x:0:\nagent:x:{uid}:\n",
        "/etc/hosts": "127.0.0.1 localhost sandbox\n::1 localhost\n",
        "/etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
    }


def check_workdir(workdir: str) -> None:
    """Raises `ValueError` for a work directory that the system's own paths occupy."""
    for path in (*_RESERVED, *_interpreter()):
        if f"{workdir}/".startswith(f"{path}/") or f"{path}/".startswith(f"{workdir.rstrip('/')}/"):
            raise ValueError(f"workdir={workdir!r}: {path} is the system's there; use another, e.g. '/repo'")
    if workdir == "/tmp":
        raise ValueError("workdir='/tmp': it is the sandbox's temporary directory; use another, e.g. '/tmp/repo'")


@functools.cache
def skeleton_name() -> str:
    """The name of the image on which `base="host"` is built where a backend needs one; it says what is in it."""
    digest = hashlib.sha256(repr((links(), etc_files(0), bind_paths())).encode()).hexdigest()[:12]
    return f"codeworld-host:{digest}"


def skeleton(uid: int) -> bytes:
    """That image as a tar archive: links, `/etc` and the places to mount over. No file of the host."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for path in ("/etc", "/tmp", "/var", "/run", "/proc", "/dev", "/sys", *bind_paths()):
            entry = tarfile.TarInfo(path.lstrip("/"))
            entry.type, entry.mode = (tarfile.DIRTYPE, 0o755) if Path(path).is_dir() else (tarfile.REGTYPE, 0o644)
            tar.addfile(entry)
        for path, target in {**links(), "/var/tmp": "/tmp"}.items():
            entry = tarfile.TarInfo(path.lstrip("/"))
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            tar.addfile(entry)
        for path, text in etc_files(uid).items():
            entry = tarfile.TarInfo(path.lstrip("/"))
            entry.size, entry.mode = len(text), 0o644
            tar.addfile(entry, io.BytesIO(text.encode()))
    return out.getvalue()


@functools.cache
def _interpreter() -> tuple[str, ...]:
    """The directories of the running interpreter that `/usr` doesn't hold, outermost first."""
    found: list[str] = []
    base, own = Path(sys.base_prefix), Path(sys.prefix)
    for path in sorted({str(base.resolve()), str(base.absolute()), str(own.absolute())}):
        if not any(f"{path}/".startswith(f"{other}/") for other in ("/usr", *found)):
            found.append(path)
    return tuple(found)
