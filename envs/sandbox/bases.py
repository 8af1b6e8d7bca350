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
import lzma
import os
import re
import stat
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from envs.errors import Unsupported
from envs.sandbox.archives import Archive, Directory, Layout, Store, check_architecture, image_env, manifest, offered
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
    digest (`sha256:…`) of an image in a layout that was offered; the name or digest of a local Docker image; or that of an image in a registry, `HOST[:PORT]/NAME[:TAG][@sha256:DIGEST]`. Raises
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
            layout = offered(name)
            if layout is not None:
                yield _offered(lease, layout, name)
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
        return _image(Directory(path), what, lease)
    try:
        with path.open("rb") as file:
            with contextlib.suppress(tarfile.TarError), tarfile.open(fileobj=file, mode="r:*") as tar:
                store = Archive(tar)
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
def _offered(lease: Lease, layout: Path, name: str) -> Base:
    return _image(Layout(layout, name), f"base={name!r}", lease)


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
        check_architecture(found.attrs.get("Architecture"), what)
        names = layer_names(found)
        if not lease.take(names):
            with full_disk(what), tempfile.TemporaryFile(dir=cache_dir()) as file:
                for chunk in found.save():
                    file.write(chunk)
                file.seek(0)
                with tarfile.open(fileobj=file) as tar:
                    return _image(Archive(tar), what, lease)
        return _checked(names, image_env(found.attrs["Config"]), what, lease)
    finally:
        client.close()


def _pulled(name: str, what: str, lease: Lease) -> Base:
    from envs.sandbox.registry import Registry

    with full_disk(what), Registry(name, what) as store:
        return _image(store, what, lease)


def layer_names(image: Any) -> tuple[str, ...]:
    """The names that the layers of an engine's image have here, the topmost first."""
    digests = image.attrs["RootFS"].get("Layers") or ()
    return _once(digest.partition(":")[2][:NAME] for digest in reversed(digests))


def _once(layers: Iterable[str]) -> tuple[str, ...]:
    """Without what lies below its equal, the topmost first: it shows nowhere, and the kernel refuses it."""
    return tuple(dict.fromkeys(layers))


def _checked(layers: tuple[str, ...], env: Mapping[str, str], what: str, lease: Lease) -> Base:
    shells = (f"{layer}/{place}/bash" for layer in layers for place in ("bin", "usr/bin"))
    if not any(os.path.lexists(layers_dir() / shell) for shell in shells):
        raise Unsupported(f"{what}: it has no bash, which the sandbox's shell is; install it in the image")
    own = environment() | {"PATH": PATH, "HOME": "/root", "USER": "root", "LOGNAME": "root"}
    top = _own(
        skeleton(0, image=True), lease
    )  # real directories where the kernel's file systems are mounted, host names
    return Base((top, *layers), {**own, **env}, image=True)


def _image(store: Store, what: str, lease: Lease) -> Base:
    """Unpack the image in an archive's manifest."""
    image = manifest(store, what)
    layers: list[str] = []
    with lease.whole():
        for digest, blob in zip(image.digests, image.blobs, strict=True):
            try:
                layers.insert(0, lease.put(digest, functools.partial(store.open, blob), what))
            except KeyError:
                raise Unsupported(f"{what}: layer {blob!r} is missing; {store.REMEDY}") from None
        return _checked(_once(layers), image.env, what, lease)
