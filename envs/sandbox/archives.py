"""Image archives: an OCI layout (a directory or a tar), what `docker save` writes, a root file system as tar. Read only."""

from __future__ import annotations

import contextlib
import functools
import json
import lzma
import os
import platform
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Protocol

from envs.errors import Unsupported

DIGEST = re.compile(r"^[0-9a-f]{64}$")
JSON_MAX = 8 << 20


class Store(Protocol):
    """Named blobs of an image archive."""

    REMEDY: str
    """What to do where one is missing or wrong."""

    def open(self, name: str) -> IO[bytes]:
        """The blob, seekable; raises `KeyError` where there is none."""


class Directory:
    """An OCI layout that is not packed."""

    REMEDY = "make it again with `docker save`"

    def __init__(self, path: Path) -> None:
        self._path = path

    def open(self, name: str) -> IO[bytes]:
        """The blob."""
        path = self._path / name
        if ".." in name.split("/") or not path.is_file():
            raise KeyError(name)
        return path.open("rb")


class Archive:
    """A tar archive."""

    REMEDY = Directory.REMEDY

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        self.members = {os.path.normpath(entry.name): entry for entry in tar}

    def open(self, name: str) -> IO[bytes]:
        """The blob."""
        for _ in range(4):  # older engines store a repeated layer as a link
            entry = self.members[name]
            if not entry.issym():
                break
            name = os.path.normpath(f"{name}/../{entry.linkname}")
        file = self._tar.extractfile(entry)
        if file is None:
            raise KeyError(name)
        return file


def manifest(store: Store, what: str) -> tuple[Any, list[str], list[str]]:
    """An image's configuration, its layers' digests and the names of their blobs, the lowest first."""
    try:
        config, blobs = _docker(store) if _has(store, "manifest.json") else _oci(store)
        digests = [str(item).partition(":")[2] for item in config["rootfs"]["diff_ids"]]
        if len(digests) != len(blobs) or not all(map(DIGEST.match, digests)):
            raise ValueError(f"{len(blobs)} layers but {len(digests)} digests")
        env_of(config.get("config"))
    except Unsupported:
        raise
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise Unsupported(f"{what}: an image without a readable manifest ({error!r}); {store.REMEDY}") from None
    check_architecture(config.get("architecture"), what)
    return config, digests, blobs


def env_of(config: Any) -> dict[str, str]:
    """The environment that an image's configuration gives its commands."""
    pairs = (str(item).partition("=") for item in (config or {}).get("Env") or ())
    return {key: value for key, _, value in pairs}


def _has(store: Store, name: str) -> bool:
    try:
        store.open(name).close()
    except KeyError:
        return False
    return True


def _json(store: Store, name: str) -> Any:
    with store.open(name) as file:
        return json.loads(file.read(JSON_MAX))


def _docker(store: Store) -> tuple[Any, list[str]]:
    first = _json(store, "manifest.json")[0]
    return _json(store, first["Config"]), [str(name) for name in first["Layers"]]


def _oci(store: Store) -> tuple[Any, list[str]]:
    found = _json(store, "index.json")
    for _ in range(8):  # an index may hold indexes
        if "manifests" in found:
            found = _json(store, blob(_for_this_machine(found["manifests"])))
    return _json(store, blob(found["config"])), [blob(layer) for layer in found["layers"]]


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
    """Refuse an image for another machine."""
    if theirs and theirs != OURS:
        raise Unsupported(f"{what}: an image for {theirs}, this machine is {OURS}; get the one for {OURS}")


def blob(descriptor: Any) -> str:
    """The name of the blob that a descriptor names; raises `ValueError` for a bad digest."""
    kind, _, digest = str(descriptor["digest"]).partition(":")
    if kind != "sha256" or not DIGEST.match(digest):
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
        config, _, blobs = manifest(directory := Directory(path), what)
        yield config, [functools.partial(directory.open, blob) for blob in blobs]
        return
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:*") as tar:
            store = Archive(tar)
            if {"manifest.json", "oci-layout"} & store.members.keys():
                config, _, blobs = manifest(store, what)
                yield config, [functools.partial(store.open, blob) for blob in blobs]
                return
    except (OSError, EOFError, lzma.LZMAError, tarfile.TarError) as error:
        raise Unsupported(f"{what}: not a readable archive ({error}); make it again, e.g. with `docker save`") from None
    yield None, [lambda: path.open("rb")]
