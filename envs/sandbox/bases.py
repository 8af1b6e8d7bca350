"""What a sandbox stands on: the host's own system, or an image, unpacked once into a cache of layers.

A layer of an image is named by (the first digits of) the SHA-256 of its uncompressed archive, which is checked when it is
unpacked, so images share what they have in common and none can pass off its content as another's. Nothing of a layer is
ever written again.
"""

from __future__ import annotations

import contextlib
import fcntl
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
from envs.sandbox.unpack import remove_tree, unpack
from envs.sandbox.walk import is_opaque

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NAME = 24
"""Hexadecimal digits of a digest in a layer's name: the kernel takes the names of all layers on one page."""
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


def layers_dir() -> Path:
    """Where layers are kept."""
    path = cache_dir() / "layers"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def find_base(name: str) -> Base:
    """The base called `name`, unpacked where it was not yet.

    name: "host"; the path of an archive (a root file system as tar, `docker save`, an OCI layout as directory or tar); the
    digest of an image's configuration (`sha256:…`) in a layout that was offered; or the name, or that digest, of a local
    Docker image. Raises `Unsupported`, one line, leaving nothing behind.
    """
    if name == "host":
        return _host()
    if layout := offered(name):
        return _offered(layout, name)
    return _archive(Path(name)) if is_archive(name) else _docker_image(name)


_layouts: dict[Path, None] = {}


def offer(directory: str | Path) -> None:
    """From now on, find images by digest in the OCI layout `directory`, too, the latest offered first. Threads may."""
    path = Path(directory).absolute()
    _layouts.pop(path, None)
    _layouts[path] = None


def offered(name: str) -> Path | None:
    """The offered layout that has the image `sha256:…`."""
    kind, _, digest = name.partition(":")
    if kind != "sha256" or not _DIGEST.match(digest):
        return None
    return next((path for path in reversed(list(_layouts)) if (path / "blobs/sha256" / digest).is_file()), None)


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


@functools.cache
def _host() -> Base:
    return Base((_own(skeleton(0)),))


@functools.cache
def _top() -> str:
    """The layer above every image: real directories where the kernel's file systems are mounted, and host names."""
    return _own(skeleton(0, image=True))


def _own(tar: bytes) -> str:
    return _unpack(lambda: io.BytesIO(tar), "base", hashlib.sha256(tar).hexdigest())


def _archive(path: Path) -> Base:
    try:
        info = path.stat()
    except OSError as error:
        raise Unsupported(
            f"base={str(path)!r}: {error.strerror}; give a tar archive, an OCI layout or the name of a Docker image"
        ) from None
    if not stat.S_ISREG(info.st_mode) and not stat.S_ISDIR(info.st_mode):
        raise Unsupported(f"base={str(path)!r}: neither a file nor a directory; give a tar archive or an OCI layout")
    return _archive_at(path.absolute(), info.st_size, info.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _archive_at(path: Path, size: int, mtime_ns: int) -> Base:
    what = f"base={str(path)!r}"
    if path.is_dir():
        if not (path / "oci-layout").is_file():
            raise Unsupported(f"{what}: a directory, but no OCI layout; make an archive: tar -C {path} -cf root.tar .")
        return _image(_Directory(path), what)
    try:
        with path.open("rb") as file:
            with contextlib.suppress(tarfile.TarError), tarfile.open(fileobj=file, mode="r:*") as tar:
                store = _Archive(tar)
                if {"manifest.json", "oci-layout"} & store.members.keys():
                    return _image(store, what)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        with _undone() as made:
            return _checked((_unpack(lambda: path.open("rb"), what, digest, made, image=False),), {}, what)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise Unsupported(f"{what}: not a readable archive ({error}); make it again, e.g. with `docker save`") from None


@functools.lru_cache(maxsize=4096)
def _offered(layout: Path, name: str) -> Base:
    """An image of a layout whose layers are uncompressed, so that their digests name their blobs."""
    with _Directory(layout).open(_blob({"digest": name})) as file:
        data = file.read(_JSON_MAX)
    if f"sha256:{hashlib.sha256(data).hexdigest()}" != name:
        raise Unsupported(f"base={name!r}: its blob in {layout} has other content than its digest says; copy it again")
    try:
        config = json.loads(data)
        blobs = [_blob({"digest": digest}) for digest in config["rootfs"]["diff_ids"]]
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise Unsupported(f"base={name!r}: its blob in {layout} is no image's configuration ({error!r})") from None
    _check_architecture(config.get("architecture"), f"base={name!r}")
    digests = [blob.rpartition("/")[2] for blob in blobs]
    with _undone() as made:
        return _unpack_image(_Directory(layout), digests, blobs, _env(config.get("config")), f"base={name!r}", made)


@functools.lru_cache(maxsize=4096)
def _docker_image(name: str) -> Base:
    """A local image, as the engine has it when it is first asked for; layers are fetched only where one is missing."""
    import docker

    what = f"base={name!r}"
    try:
        client = docker.from_env()
    except docker.errors.DockerException as error:
        cause = " ".join(str(error).split())[:200]
        raise Unsupported(
            f"{what}: no Docker engine answers ({cause}); start dockerd, or give an archive made by `docker save`"
        ) from None
    try:
        try:
            found = client.images.get(name)
        except docker.errors.ImageNotFound:
            raise Unsupported(
                f"{what}: no such image here and no such file; docker pull {name}, or see docker/README.md"
            ) from None
        except docker.errors.APIError as error:
            cause = " ".join(str(error.explanation or error).split())[:200]
            raise Unsupported(f'{what}: {cause}; give "host", an archive or the name of a local image') from None
        _check_architecture(found.attrs.get("Architecture"), what)
        names = layer_names(found)
        if not all((layers_dir() / name).is_dir() for name in names):
            with tempfile.TemporaryFile(dir=cache_dir()) as file:
                for chunk in found.save():
                    file.write(chunk)
                file.seek(0)
                with tarfile.open(fileobj=file) as tar:
                    return _image(_Archive(tar), what)
        return _checked(names, _env(found.attrs["Config"]), what)
    finally:
        client.close()


def layer_names(image: Any) -> tuple[str, ...]:
    """The names that the layers of an engine's image have here, the topmost first."""
    digests = image.attrs["RootFS"].get("Layers") or ()
    return tuple(digest.partition(":")[2][:_NAME] for digest in reversed(digests))


def _checked(layers: tuple[str, ...], env: Mapping[str, str], what: str) -> Base:
    shells = (f"{layer}/{place}/bash" for layer in layers for place in ("bin", "usr/bin"))
    if not any(os.path.lexists(layers_dir() / shell) for shell in shells):
        raise Unsupported(f"{what}: it has no bash, which the sandbox's shell is; install it in the image")
    own = environment() | {"PATH": PATH, "HOME": "/root", "USER": "root", "LOGNAME": "root"}
    return Base((_top(), *layers), {**own, **env}, image=True)


def _env(config: Any) -> dict[str, str]:
    pairs = (str(item).partition("=") for item in (config or {}).get("Env") or ())
    return {key: value for key, _, value in pairs}


# ---- image archives ----


class _Store(Protocol):
    """Named blobs of an image archive."""

    def open(self, name: str) -> IO[bytes]:
        """The blob, seekable; raises `KeyError` where there is none."""


class _Directory:
    def __init__(self, path: Path) -> None:
        self._path = path

    def open(self, name: str) -> IO[bytes]:
        path = self._path / name
        if ".." in name.split("/") or not path.is_file():
            raise KeyError(name)
        return path.open("rb")


class _Archive:
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


def _image(store: _Store, what: str) -> Base:
    """Unpack the image in an archive's manifest."""
    config, digests, blobs = _manifest(store, what)
    with _undone() as made:
        return _unpack_image(store, digests, blobs, _env(config.get("config")), what, made)


def _manifest(store: _Store, what: str) -> tuple[Any, list[str], list[str]]:
    """An image's configuration, its layers' digests and the names of their blobs, the lowest first."""
    try:
        config, blobs = _docker_manifest(store) if _has(store, "manifest.json") else _oci_manifest(store)
        digests = [str(item).partition(":")[2] for item in config["rootfs"]["diff_ids"]]
        if len(digests) != len(blobs) or not all(map(_DIGEST.match, digests)):
            raise ValueError(f"{len(blobs)} layers but {len(digests)} digests")
        _env(config.get("config"))
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise Unsupported(
            f"{what}: an image archive without a readable manifest ({error!r}); make it again with `docker save`"
        ) from None
    _check_architecture(config.get("architecture"), what)
    return config, digests, blobs


def _unpack_image(
    store: _Store, digests: list[str], blobs: list[str], env: Mapping[str, str], what: str, made: list[str]
) -> Base:
    layers: list[str] = []
    for digest, blob in zip(digests, blobs, strict=True):
        try:
            layers.insert(0, _unpack(functools.partial(store.open, blob), what, digest, made))
        except KeyError:
            raise Unsupported(f"{what}: layer {blob!r} is missing; make it again with `docker save`") from None
    return _checked(tuple(layers), env, what)


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
    fits = [m for m in manifests if m.get("platform", {}).get("architecture", OURS) == OURS]
    if not fits:
        raise ValueError(f"no manifest for {OURS}")
    return fits[0]


def _check_architecture(theirs: Any, what: str) -> None:
    if theirs and theirs != OURS:
        raise Unsupported(f"{what}: an image for {theirs}, this machine is {OURS}; get the one for {OURS}")


def _blob(descriptor: Any) -> str:
    kind, _, digest = str(descriptor["digest"]).partition(":")
    if kind != "sha256" or not _DIGEST.match(digest):
        raise ValueError(f"digest {descriptor['digest']!r}")
    return f"blobs/sha256/{digest}"


@contextlib.contextmanager
def image_file(path: Path) -> Iterator[tuple[dict[str, Any] | None, list[Callable[[], IO[bytes]]]]]:
    """What an archive at `path` holds: an image's configuration and what opens its layers, the lowest first, whose
    archives may be compressed and whose digests nobody has checked; or None, and the archive itself, a root file system.

    Raises `Unsupported` for what is neither.
    """
    what = f"base={str(path)!r}"
    if path.is_dir():
        config, _, blobs = _manifest(directory := _Directory(path), what)
        yield config, [functools.partial(directory.open, blob) for blob in blobs]
        return
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:*") as tar:
            store = _Archive(tar)
            if {"manifest.json", "oci-layout"} & store.members.keys():
                config, _, blobs = _manifest(store, what)
                yield config, [functools.partial(store.open, blob) for blob in blobs]
                return
    except (OSError, EOFError, lzma.LZMAError, tarfile.TarError) as error:
        raise Unsupported(f"{what}: not a readable archive ({error}); make it again, e.g. with `docker save`") from None
    yield None, [functools.partial(path.open, "rb")]


# ---- the cache ----


@contextlib.contextmanager
def _undone() -> Iterator[list[str]]:
    """Layers that are made for an image which is refused in the end are removed again."""
    made: list[str] = []
    try:
        yield made
    except BaseException:
        for name in made:
            remove_tree(layers_dir() / name)
        raise


def _unpack(
    open_: Callable[[], IO[bytes]], what: str, digest: str, made: list[str] | None = None, *, image: bool = True
) -> str:
    """Put one archive into the cache, if it is not there; returns its name, the first digits of `digest`.

    made: is told the name of a layer that was not there.
    image: `digest` is what somebody says of the uncompressed archive, so it is checked; else it is ours, of the file.
    """
    kept = layers_dir() / digest[:_NAME]
    if not kept.is_dir():
        with _locked():
            draft = layers_dir() / ".draft"
            remove_tree(draft)  # of an unpacking that was killed: the lock is ours
            if not kept.is_dir():
                with open_() as stream:
                    found = unpack(stream, draft, what)
                if image and found != digest:
                    remove_tree(draft)
                    raise Unsupported(
                        f"{what}: layer {digest[:12]} has other content than its digest says; fetch it again"
                    )
                draft.rename(kept)
                if made is not None:
                    made.append(kept.name)
    return kept.name


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """One unpacking at a time, of all processes of this user."""
    with (layers_dir() / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
