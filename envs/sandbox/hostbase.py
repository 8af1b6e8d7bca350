"""What `base="host"` means, for every backend: the host's `/usr` and the running interpreter, read-only, under a small
made-up `/etc`. Nothing else of the host is there."""

from __future__ import annotations

import functools
import hashlib
import io
import sys
import tarfile
from pathlib import Path

HOST_IMAGE = "codeworld-host"
_SYSTEM = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_ETC = ("/etc/ld.so.cache", "/etc/alternatives")
DEVICES = tuple(f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom"))
"""The devices of a sandbox, bound from the host."""
DEVICE_LINKS = {
    "/dev/fd": "/proc/self/fd",
    "/dev/stdin": "/proc/self/fd/0",
    "/dev/stdout": "/proc/self/fd/1",
    "/dev/stderr": "/proc/self/fd/2",
}

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


def check_workdir(workdir: str, *, image: bool = False, reserved: tuple[str, ...] = ("/proc", "/dev")) -> None:
    """Raises `ValueError` for a work directory that the system's own paths occupy; in an image, that is `reserved`."""
    for path in reserved if image else (*_RESERVED, *_interpreter()):
        if f"{workdir}/".startswith(f"{path}/") or f"{path}/".startswith(f"{workdir.rstrip('/')}/"):
            raise ValueError(f"workdir={workdir!r}: {path} is the system's there; use another, e.g. '/repo'")
    if workdir == "/tmp":
        raise ValueError("workdir='/tmp': it is the sandbox's temporary directory; use another, e.g. '/tmp/repo'")


@functools.cache
def skeleton_name() -> str:
    """The name of the image on which `base="host"` is built where a backend needs one; it says what is in it."""
    return f"{HOST_IMAGE}:{hashlib.sha256(skeleton(0)).hexdigest()[:12]}"


def skeleton(uid: int, *, image: bool = False) -> bytes:
    """What a sandbox needs at the least, as a tar archive: `/dev`, names, places to mount over. No file of the host.

    image: the part of it that is put over an image; else the root of `base="host"`, with links and `/etc`.
    """
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:

        def add(path: str, kind: bytes, *, target: str = "", text: str = "") -> None:
            entry = tarfile.TarInfo(path.lstrip("/"))
            entry.type, entry.linkname, entry.size = kind, target, len(text)
            entry.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
            tar.addfile(entry, io.BytesIO(text.encode()))

        for path in ("/etc", "/proc", "/dev", "/sys", "/dev/shm"):
            add(path, tarfile.DIRTYPE)
        for path in DEVICES:
            add(path, tarfile.REGTYPE)
        for path, target in DEVICE_LINKS.items():
            add(path, tarfile.SYMTYPE, target=target)
        if image:
            add("/etc/hosts", tarfile.REGTYPE, text=etc_files(uid)["/etc/hosts"])
        else:
            for path in ("/tmp", "/var", "/run", *bind_paths()):
                add(path, tarfile.DIRTYPE if Path(path).is_dir() else tarfile.REGTYPE)
            for path, target in {**links(), "/var/tmp": "/tmp"}.items():
                add(path, tarfile.SYMTYPE, target=target)
            for path, text in etc_files(uid).items():
                add(path, tarfile.REGTYPE, text=text)
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
