"""Archives of images, read: OCI image layouts (directories, or tar archives of them) and what `docker save` writes."""

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
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from envs.errors import Unsupported

_DIGEST = re.compile(r"^[0-9a-f]{64}$")
_JSON_MAX = 8 << 20
_layouts: dict[Path, None] = {}


def offer(directory: str | Path) -> None:
    """From now on, `find_base` looks for images by digest in the OCI layout `directory`, too, the latest offered first.

    Layers in it are uncompressed tar archives, as those of `imagestore.ImageStore` are. Thread-safe.
    """
    path = Path(directory).absolute()
    _layouts.pop(path, None)
    _layouts[path] = None


def offered(name: str) -> Path | None:
    """The offered layout that has the image `sha256:…`."""
    kind, _, digest = name.partition(":")
    if kind != "sha256" or not _DIGEST.match(digest):
        return None
    return next((path for path in reversed(list(_layouts)) if (path / "blobs/sha256" / digest).is_file()), None)


class Manifest(NamedTuple):
    """What an image is made of."""

    config: dict[str, Any]
    digests: list[str]
    """Of the layers' uncompressed archives, without `sha256:`, the lowest first."""
    blobs: list[str]
    """The names of the layers in the archive."""

    @property
    def env(self) -> dict[str, str]:
        """The environment that the image asks for."""
        return image_env(self.config.get("config"))


def manifest(store: Store, what: str) -> Manifest:
    """The manifest of an archive's image. Raises `Unsupported` for one that can't be read or is for another machine."""
    try:
        config, blobs = _docker_manifest(store) if _has(store, "manifest.json") else _oci_manifest(store)
        digests = [str(item).partition(":")[2] for item in config["rootfs"]["diff_ids"]]
        if len(digests) != len(blobs) or not all(map(_DIGEST.match, digests)):
            raise ValueError(f"{len(blobs)} layers but {len(digests)} digests")
        found = Manifest(config, digests, blobs)
        _ = found.env
    except Unsupported:
        raise
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise Unsupported(f"{what}: an image without a readable manifest ({error!r}); {store.REMEDY}") from None
    check_architecture(config.get("architecture"), what)
    return found


@contextlib.contextmanager
def image_file(path: Path) -> Iterator[tuple[dict[str, Any] | None, list[Callable[[], IO[bytes]]]]]:
    """What an archive at `path` holds: an image's configuration and what opens its layers, the lowest first, whose
    archives may be compressed and whose digests nobody has checked; or None, and the archive itself, a root file system.

    Raises `Unsupported` for what is neither.
    """
    what = f"base={str(path)!r}"
    if path.is_dir():
        image = manifest(directory := Directory(path), what)
        yield image.config, [functools.partial(directory.open, blob) for blob in image.blobs]
        return
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:*") as tar:
            store = Archive(tar)
            if {"manifest.json", "oci-layout"} & store.members.keys():
                image = manifest(store, what)
                yield image.config, [functools.partial(store.open, blob) for blob in image.blobs]
                return
    except (OSError, EOFError, lzma.LZMAError, tarfile.TarError) as error:
        cause = " ".join(str(error).split())
        raise Unsupported(f"{what}: not a readable archive ({cause}); make it again, e.g. with `docker save`") from None
    yield None, [lambda: path.open("rb")]


def image_env(config: Any) -> dict[str, str]:
    """The environment in an image's inner configuration."""
    pairs = (str(item).partition("=") for item in (config or {}).get("Env") or ())
    return {key: value for key, _, value in pairs}


class Store(Protocol):
    """Named blobs of an image archive."""

    REMEDY: str
    """What to do where one is missing or wrong."""

    def open(self, name: str) -> IO[bytes]:
        """The blob, seekable; raises `KeyError` where there is none."""


class Directory:
    """An OCI image layout, a directory."""

    REMEDY = "make it again with `docker save`"

    def __init__(self, path: Path) -> None:
        self._path = path

    def open(self, name: str) -> IO[bytes]:
        """A file below the directory."""
        path = self._path / name
        if ".." in name.split("/") or not path.is_file():
            raise KeyError(name)
        return path.open("rb")


class Archive:
    """A tar archive of an OCI image layout or by `docker save`."""

    REMEDY = Directory.REMEDY

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        self.members = {os.path.normpath(entry.name): entry for entry in tar}

    def open(self, name: str) -> IO[bytes]:
        """A member of the archive."""
        for _ in range(4):  # older engines store a repeated layer as a link
            entry = self.members[name]
            if not entry.issym():
                break
            name = os.path.normpath(f"{name}/../{entry.linkname}")
        file = self._tar.extractfile(entry)
        if file is None:
            raise KeyError(name)
        return file


class Layout(Directory):
    """One image of an OCI layout, by the digest of its configuration; its layers are uncompressed, so that their digests
    name their blobs."""

    REMEDY = "copy the images again"

    def __init__(self, path: Path, digest: str) -> None:
        super().__init__(path)
        name = blob_path({"digest": digest})
        with super().open(name) as file:
            data = file.read(_JSON_MAX)
        if f"sha256:{hashlib.sha256(data).hexdigest()}" != digest:
            raise Unsupported(
                f"base={digest!r}: its blob in {path} has other content than its digest says; {self.REMEDY}"
            )
        self._name, self._data = name, data

    def open(self, name: str) -> IO[bytes]:
        """A file of the layout, or the manifest that `docker save` would write."""
        if name != "manifest.json":
            return super().open(name)
        layers = [blob_path({"digest": digest}) for digest in json.loads(self._data)["rootfs"]["diff_ids"]]
        return io.BytesIO(json.dumps([{"Config": self._name, "Layers": layers}]).encode())


def _has(store: Store, name: str) -> bool:
    try:
        store.open(name).close()
    except KeyError:
        return False
    return True


def _json(store: Store, name: str) -> Any:
    with store.open(name) as file:
        return json.loads(file.read(_JSON_MAX))


def _docker_manifest(store: Store) -> tuple[Any, list[str]]:
    first = _json(store, "manifest.json")[0]
    return _json(store, first["Config"]), [str(name) for name in first["Layers"]]


def _oci_manifest(store: Store) -> tuple[Any, list[str]]:
    found = _json(store, "index.json")
    for _ in range(8):  # an index may hold indexes
        if "manifests" in found:
            found = _json(store, blob_path(_for_this_machine(found["manifests"])))
    return _json(store, blob_path(found["config"])), [blob_path(layer) for layer in found["layers"]]


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


def check_architecture(theirs: Any, what: str) -> None:
    """Raises `Unsupported` for an image of another machine."""
    if theirs and theirs != OURS:
        raise Unsupported(f"{what}: an image for {theirs}, this machine is {OURS}; get the one for {OURS}")


def blob_path(descriptor: Any) -> str:
    """Where a layout keeps the blob that a descriptor is for. Raises `ValueError` for no SHA-256 digest."""
    kind, _, digest = str(descriptor["digest"]).partition(":")
    if kind != "sha256" or not _DIGEST.match(digest):
        raise ValueError(f"digest {descriptor['digest']!r}")
    return f"blobs/sha256/{digest}"
