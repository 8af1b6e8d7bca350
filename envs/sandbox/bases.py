"""What a sandbox stands on: the host's own system, or an image, unpacked once into a cache of layers (`layers.py`).

A layer of an image is named by (the first digits of) the SHA-256 of its uncompressed archive, which is checked when it is
unpacked, so images share what they have in common and none can pass off its content as another's. Nothing of a layer is
ever written again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import lzma
import os
import platform
import re
import stat
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from envs.errors import Unsupported
from envs.sandbox.helper import cache_dir
from envs.sandbox.hostbase import environment, skeleton
from envs.sandbox.layers import NAME, Lease, full_disk, layers_dir
from envs.sandbox.walk import is_opaque

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_DIGEST = re.compile(r"^[0-9a-f]{64}$")
_JSON_MAX = 8 << 20


@dataclass(frozen=True)
class Base:
    """Read-only layers and what a shell finds in its environment."""

    layers: tuple[str, ...]
    """Names below `layers_dir()`, the topmost first."""
    env: Mapping[str, str] = field(default_factory=environment)
    image: bool = False
    """An image, whose files are the sandbox's own; else the host's system."""


def find_base(name: str) -> Base:
    """The base called `name`, unpacked where it was not yet.

    name: "host"; the path of an archive (a root file system as tar, `docker save`, an OCI layout as directory or tar); the
    name of a local Docker image; or that of an image in a registry, `HOST[:PORT]/NAME[:TAG][@sha256:DIGEST]`. Raises
    `Unsupported`, one line, leaving nothing behind, and `InfraError` where a registry or the disk fails.
    """
    with standing_on(name) as base:
        return base


@contextlib.contextmanager
def standing_on(name: str) -> Iterator[Base]:
    """`find_base`, with the layers sure to stay in the cache until the end of the block (see `layers.hold`)."""
    lease = Lease()
    try:
        if name == "host":
            yield _host(lease)
        else:
            yield _archive(Path(name), lease) if is_archive(name) else _docker_image(lease, name)
    finally:
        lease.close()


def is_archive(name: str) -> bool:
    """Whether `name` is a path rather than the name of a Docker image. Raises `Unsupported` for what is neither."""
    try:
        path = Path(name)
        return name.startswith((".", "/")) or path.is_file() or (path / "oci-layout").is_file()
    except (OSError, ValueError) as error:
        raise Unsupported(
            f'base={name[:80]!r}: {error}; give "host", an archive or the name of a Docker image'
        ) from None


def layers_at(base: Base, path: str) -> list[str]:
    """The layers that show at the directory `path`, the topmost first.

    Raises `Unsupported` where the base has no directory there but a file or a link, or one on the way.
    """
    found: list[str] = []
    known = 0  # how many parts of the path are directories already
    for layer in base.layers:
        at, last = layers_dir() / layer, False
        for depth, part in enumerate(Path(path).parts[1:], 1):
            at /= part
            try:
                info = at.lstat()
            except FileNotFoundError:
                break
            if not stat.S_ISDIR(info.st_mode):
                if depth <= known or (stat.S_ISCHR(info.st_mode) and info.st_rdev == 0):
                    return found  # hidden by a directory above, or a whiteout
                raise Unsupported(
                    f"{path!r}: {at.name!r} is a link or a file in the image; the work directory, /tmp and volumes must be"
                    " directories"
                )
            known = max(known, depth)
            last = last or is_opaque(at)
        else:
            found.append(layer)
        if last:
            break
    return found


class _Remembered:
    """A way to find a base, gone once for each key, and again where a layer has left the cache meanwhile."""

    def __init__(self, find: Callable[..., Base]) -> None:
        self._find = find
        self._cell = functools.lru_cache(maxsize=4096)(lambda *_: [])
        self.cache_clear = self._cell.cache_clear

    def __call__(self, lease: Lease, *key: Any) -> Base:
        cell: list[Base] = self._cell(*key)
        if not cell or not lease.take(cell[0].layers):
            cell[:] = [self._find(lease, *key)]
        return cell[0]


@_Remembered
def _host(lease: Lease) -> Base:
    return Base((_own(skeleton(0), lease),))


def _own(tar: bytes, lease: Lease) -> str:
    return lease.put(hashlib.sha256(tar).hexdigest(), lambda: io.BytesIO(tar), "base")


def _archive(path: Path, lease: Lease) -> Base:
    try:
        info = path.stat()
    except OSError as error:
        raise Unsupported(
            f"base={str(path)!r}: {error.strerror}; give a tar archive, an OCI layout or the name of a Docker image"
        ) from None
    if not stat.S_ISREG(info.st_mode) and not stat.S_ISDIR(info.st_mode):
        raise Unsupported(f"base={str(path)!r}: neither a file nor a directory; give a tar archive or an OCI layout")
    return _archive_at(lease, path.absolute(), info.st_size, info.st_mtime_ns)


@_Remembered
def _archive_at(lease: Lease, path: Path, size: int, mtime_ns: int) -> Base:
    what = f"base={str(path)!r}"
    if path.is_dir():
        if not (path / "oci-layout").is_file():
            raise Unsupported(f"{what}: a directory, but no OCI layout; make an archive: tar -C {path} -cf root.tar .")
        return _image(_Directory(path), what, lease)
    try:
        with path.open("rb") as file:
            with contextlib.suppress(tarfile.TarError), tarfile.open(fileobj=file, mode="r:*") as tar:
                store = _Archive(tar)
                if {"manifest.json", "oci-layout"} & store.members.keys():
                    return _image(store, what, lease)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        with lease.whole():
            layer = lease.put(digest, lambda: path.open("rb"), what, image=False)
            return _checked((layer,), {}, what, lease)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise Unsupported(f"{what}: not a readable archive ({error}); make it again, e.g. with `docker save`") from None


@_Remembered
def _docker_image(lease: Lease, name: str) -> Base:
    """A local image, as the engine has it when it is first asked for, else one of a registry; layers are fetched only
    where one is missing."""
    import docker
    from envs.sandbox.registry import is_remote

    what = f"base={name!r}"
    try:
        client = docker.from_env()
    except docker.errors.DockerException as error:
        if is_remote(name):
            return _pulled(name, what, lease)
        cause = " ".join(str(error).split())[:200]
        raise Unsupported(
            f"{what}: no Docker engine answers ({cause}); start dockerd, or give an archive made by `docker save`"
        ) from None
    try:
        try:
            found = client.images.get(name)
        except docker.errors.ImageNotFound:
            if is_remote(name):
                return _pulled(name, what, lease)
            full = f"docker.io/{name}" if "/" in name else f"docker.io/library/{name}"
            raise Unsupported(
                f"{what}: no such image here and no such file; docker pull {name}, name it with its registry ({full}), or"
                " see docker/README.md"
            ) from None
        except docker.errors.APIError as error:
            cause = " ".join(str(error.explanation or error).split())[:200]
            raise Unsupported(f'{what}: {cause}; give "host", an archive or the name of a local image') from None
        _check_architecture(found.attrs.get("Architecture"), what)
        names = layer_names(found)
        if not lease.take(names):
            with full_disk(what), tempfile.TemporaryFile(dir=cache_dir()) as file:
                for chunk in found.save():
                    file.write(chunk)
                file.seek(0)
                with tarfile.open(fileobj=file) as tar:
                    return _image(_Archive(tar), what, lease)
        return _checked(names, _env(found.attrs["Config"]), what, lease)
    finally:
        client.close()


def _pulled(name: str, what: str, lease: Lease) -> Base:
    from envs.sandbox.registry import Registry

    with full_disk(what), Registry(name, what) as store:
        return _image(store, what, lease)


def layer_names(image: Any) -> tuple[str, ...]:
    """The names that the layers of an engine's image have here, the topmost first."""
    digests = image.attrs["RootFS"].get("Layers") or ()
    return tuple(digest.partition(":")[2][:NAME] for digest in reversed(digests))


def _checked(layers: tuple[str, ...], env: Mapping[str, str], what: str, lease: Lease) -> Base:
    shells = (f"{layer}/{place}/bash" for layer in layers for place in ("bin", "usr/bin"))
    if not any(os.path.lexists(layers_dir() / shell) for shell in shells):
        raise Unsupported(f"{what}: it has no bash, which the sandbox's shell is; install it in the image")
    own = environment() | {"PATH": PATH, "HOME": "/root", "USER": "root", "LOGNAME": "root"}
    top = _own(
        skeleton(0, image=True), lease
    )  # real directories where the kernel's file systems are mounted, host names
    return Base((top, *layers), {**own, **env}, image=True)


def _env(config: Any) -> dict[str, str]:
    pairs = (str(item).partition("=") for item in (config or {}).get("Env") or ())
    return {key: value for key, _, value in pairs}


# ---- image archives ----


class _Store(Protocol):
    """Named blobs of an image archive."""

    REMEDY: str
    """What to do where one is missing or wrong."""

    def open(self, name: str) -> IO[bytes]:
        """The blob, seekable; raises `KeyError` where there is none."""


class _Directory:
    REMEDY = "make it again with `docker save`"

    def __init__(self, path: Path) -> None:
        self._path = path

    def open(self, name: str) -> IO[bytes]:
        path = self._path / name
        if ".." in name.split("/") or not path.is_file():
            raise KeyError(name)
        return path.open("rb")


class _Archive:
    REMEDY = _Directory.REMEDY

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        self.members = {os.path.normpath(entry.name): entry for entry in tar}

    def open(self, name: str) -> IO[bytes]:
        for _ in range(4):  # older engines store a repeated layer as a link
            entry = self.members[name]
            if not entry.issym():
                break
            name = os.path.normpath(f"{name}/../{entry.linkname}")
        file = self._tar.extractfile(entry)
        if file is None:
            raise KeyError(name)
        return file


def _image(store: _Store, what: str, lease: Lease) -> Base:
    """Unpack the image in an archive's manifest."""
    try:
        config, blobs = _docker_manifest(store) if _has(store, "manifest.json") else _oci_manifest(store)
        digests = [str(item).partition(":")[2] for item in config["rootfs"]["diff_ids"]]
        if len(digests) != len(blobs) or not all(map(_DIGEST.match, digests)):
            raise ValueError(f"{len(blobs)} layers but {len(digests)} digests")
        env = _env(config.get("config"))
    except Unsupported:
        raise
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise Unsupported(f"{what}: an image without a readable manifest ({error!r}); {store.REMEDY}") from None
    _check_architecture(config.get("architecture"), what)
    layers: list[str] = []
    with lease.whole():
        for digest, blob in zip(digests, blobs, strict=True):
            try:
                layers.insert(0, lease.put(digest, functools.partial(store.open, blob), what))
            except KeyError:
                raise Unsupported(f"{what}: layer {blob!r} is missing; {store.REMEDY}") from None
        return _checked(tuple(layers), env, what, lease)


def _has(store: _Store, name: str) -> bool:
    try:
        store.open(name).close()
    except KeyError:
        return False
    return True


def _json(store: _Store, name: str) -> Any:
    with store.open(name) as file:
        return json.loads(file.read(_JSON_MAX))


def _docker_manifest(store: _Store) -> tuple[Any, list[str]]:
    first = _json(store, "manifest.json")[0]
    return _json(store, first["Config"]), [str(name) for name in first["Layers"]]


def _oci_manifest(store: _Store) -> tuple[Any, list[str]]:
    found = _json(store, "index.json")
    for _ in range(8):  # an index may hold indexes
        if "manifests" in found:
            found = _json(store, _blob(_for_this_machine(found["manifests"])))
    return _json(store, _blob(found["config"])), [_blob(layer) for layer in found["layers"]]


OURS = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
"""This machine's architecture, as images call it."""


def _for_this_machine(manifests: list[Any]) -> Any:
    fits = []
    for manifest in manifests:
        platform = manifest.get("platform") or {}
        if (platform.get("os", "linux"), platform.get("architecture", OURS)) == ("linux", OURS):
            fits.append(manifest)
    if not fits:
        raise ValueError(f"no manifest for linux/{OURS}")
    return fits[0]


def _check_architecture(theirs: Any, what: str) -> None:
    if theirs and theirs != OURS:
        raise Unsupported(f"{what}: an image for {theirs}, this machine is {OURS}; get the one for {OURS}")


def _blob(descriptor: Any) -> str:
    kind, _, digest = str(descriptor["digest"]).partition(":")
    if kind != "sha256" or not _DIGEST.match(digest):
        raise ValueError(f"digest {descriptor['digest']!r}")
    return f"blobs/sha256/{digest}"
