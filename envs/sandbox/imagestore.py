"""Images kept in a directory, without an engine and without a registry: an OCI image layout that shares its blobs.

    DIR/oci-layout, DIR/index.json, DIR/blobs/sha256/<digest>

An image is named by the digest of its configuration, which is also what a Docker engine calls it, and which `find_base`
finds once the directory was offered. Layers are uncompressed, so that a layer's digest names its blob. Every file gets
its name when it is whole, and one process writes at a time, so what is there can be read after a kill at any instant.
Source of the format: the OCI image specification, `image-layout.md`, `config.md`, `manifest.md`.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

from envs.errors import Unsupported
from envs.sandbox.archives import OURS, image_file
from envs.sandbox.bases import is_archive
from envs.sandbox.capture import TIME

OWN = "codeworld."
_CREATED = "2020-01-01T00:00:00Z"
_TYPE = "application/vnd.oci.image"
_CHUNK = 1 << 20


class ImageStore:
    """The images of one directory. Several processes may use it at once."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._blobs = self.directory / "blobs" / "sha256"
        try:
            self._blobs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"images {self.directory}: {error.strerror}; name a directory that can be written"
            ) from None
        with self._locked():
            if not (self.directory / "index.json").exists():
                self._replace("index.json", {"schemaVersion": 2, "manifests": []})
            self._replace("oci-layout", {"imageLayoutVersion": "1.0.0"})

    def images(self) -> dict[str, dict[str, Any]]:
        """Digest → configuration of every image."""
        return {digest: self.config(digest) for digest in self._index()}

    def config(self, digest: str) -> dict[str, Any]:
        """The configuration of an image. Raises `KeyError` where there is none."""
        path = self.blob(digest)
        if not path.is_file():
            raise KeyError(digest)
        return json.loads(path.read_bytes())

    def find(self, labels: Mapping[str, str]) -> str | None:
        """The digest of an image that has all of `labels`."""
        for digest, config in self.images().items():
            if labels.items() <= (config["config"].get("Labels") or {}).items():
                return digest
        return None

    def labels(self, digest: str) -> dict[str, str]:
        """The labels of an image."""
        return self.config(digest)["config"].get("Labels") or {}

    def layers(self, digest: str) -> list[str]:
        """The digests of an image's layers, the lowest first; each names its blob, an uncompressed tar archive."""
        return image_layers(self.directory, digest)

    def blob(self, digest: str) -> Path:
        """Where the blob with this digest lies, or would."""
        return self._blobs / digest.removeprefix("sha256:")

    def add_base(self, name: str) -> str:
        """Bring an image in; returns its digest.

        name: a local Docker image, or the path of an archive (`docker save`, an OCI layout, a root file system as tar).
        Raises `Unsupported`, one line, for what is none of them or is for another machine.
        """
        if is_archive(name):
            if not Path(name).exists():
                raise Unsupported(f"base={name!r}: no such file; give an archive or the name of a Docker image")
            with self._locked():
                return self._add_file(Path(name))
        saved = self.directory / ".save.tar"
        with self._locked():
            try:
                _save(name, saved)
                return self._add_file(saved)
            finally:
                saved.unlink(missing_ok=True)

    def extend(
        self,
        digest: str,
        layers: Sequence[bytes | Path],
        *,
        env: Mapping[str, str] | None = None,
        workdir: str | None = None,
        labels: Mapping[str, str] | None = None,
        created_by: str = "codeworld",
    ) -> str:
        """The image `digest` with more layers on top (uncompressed tar archives); returns the new image's digest.

        env: added to the image's environment. labels: added to its labels, but those that begin with `OWN` are an image's
        own and not inherited. Equal arguments give the equal digest.
        """
        config = self.config(digest)
        inner = config["config"]
        pairs = dict(item.partition("=")[::2] for item in inner.get("Env") or ()) | dict(env or {})
        inner["Env"] = [f"{key}={value}" for key, value in pairs.items()]
        kept = {name: text for name, text in (inner.get("Labels") or {}).items() if not name.startswith(OWN)}
        inner["Labels"] = {**kept, **(labels or {})}
        if workdir is not None:
            inner["WorkingDir"] = workdir
        with self._locked():
            for layer in layers:
                config["rootfs"]["diff_ids"].append(self._put(layer))
                config["history"].append({"created": _CREATED, "created_by": created_by})
            return self._add(config)

    def retain(self, digests: Iterable[str]) -> int:
        """Forget every image but `digests` and remove the blobs that none of those needs; returns the bytes freed."""
        with self._locked():
            index, freed = self._index(), 0
            kept = {digest: index[digest] for digest in digests}
            self._write_index(kept)
            needed = {digest.removeprefix("sha256:") for digest in kept}
            for digest, manifest in kept.items():
                needed |= {manifest["digest"].removeprefix("sha256:")}
                needed |= {layer.removeprefix("sha256:") for layer in self.layers(digest)}
            for path in self._blobs.iterdir():
                if path.name not in needed:
                    freed += path.stat().st_size
                    path.unlink()
            return freed

    def size(self, digest: str, *, beyond: str | None = None) -> int:
        """The bytes of an image's layers; those of the image `beyond` don't count."""
        shared = set(self.layers(beyond)) if beyond else set()
        return sum(self.blob(layer).stat().st_size for layer in self.layers(digest) if layer not in shared)

    def archive(self, digest: str) -> Iterator[bytes]:
        """The image as `docker save` would write it, in pieces."""
        return docker_archive(self.directory, digest)

    def _index(self) -> dict[str, dict[str, Any]]:
        """Digest of each image's configuration → the descriptor of its manifest."""
        found = json.loads((self.directory / "index.json").read_bytes())["manifests"]
        return {entry["annotations"]["org.opencontainers.image.ref.name"]: entry for entry in found}

    def _write_index(self, index: Mapping[str, dict[str, Any]]) -> None:
        self._replace("index.json", {"schemaVersion": 2, "manifests": list(index.values())})

    def _add_file(self, path: Path) -> str:
        with image_file(path) as (config, layers):
            digests = []
            for open_ in layers:
                with open_() as file:
                    digests.append(self._put(_plain(file)))
            if config is not None and digests != config["rootfs"]["diff_ids"]:
                raise Unsupported(f"base={str(path)!r}: a layer has other content than its digest says; save it again")
            return self._add(_base_config(config, digests))

    def _add(self, config: dict[str, Any]) -> str:
        """Name an image whose layers are there."""
        digest = self._put(_dump(config))
        layers = [self._descriptor(layer, "layer.v1.tar") for layer in config["rootfs"]["diff_ids"]]
        manifest = {
            "schemaVersion": 2,
            "mediaType": f"{_TYPE}.manifest.v1+json",
            "config": self._descriptor(digest, "config.v1+json"),
            "layers": layers,
        }
        described = self._descriptor(self._put(_dump(manifest)), "manifest.v1+json")
        platform = {"architecture": config["architecture"], "os": config["os"]}
        annotations = {"org.opencontainers.image.ref.name": digest}
        index = self._index()
        if digest not in index:
            self._write_index({**index, digest: {**described, "platform": platform, "annotations": annotations}})
        return digest

    def _descriptor(self, digest: str, kind: str) -> dict[str, Any]:
        return {"mediaType": f"{_TYPE}.{kind}", "digest": digest, "size": self.blob(digest).stat().st_size}

    def _put(self, data: bytes | Path | IO[bytes]) -> str:
        """Make a blob of `data`, if it isn't there; returns its digest. The lock is held."""
        if isinstance(data, Path):
            with data.open("rb") as file:
                return self._put(file)
        if isinstance(data, bytes) and self.blob(digest := hashlib.sha256(data).hexdigest()).exists():
            return f"sha256:{digest}"
        draft, digest_of = self.directory / ".draft", hashlib.sha256()
        with draft.open("wb") as out:
            for chunk in [data] if isinstance(data, bytes) else iter(lambda: data.read(_CHUNK), b""):
                digest_of.update(chunk)
                out.write(chunk)
        draft.rename(self.blob(digest_of.hexdigest()))
        return f"sha256:{digest_of.hexdigest()}"

    def _replace(self, name: str, value: Any) -> None:
        draft = self.directory / ".draft"
        draft.write_bytes(_dump(value))
        draft.rename(self.directory / name)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.directory / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def image_layers(layout: Path, digest: str) -> list[str]:
    """The digests of the layers of a layout's image, the lowest first."""
    return json.loads((layout / "blobs" / "sha256" / digest.removeprefix("sha256:")).read_bytes())["rootfs"]["diff_ids"]


def docker_archive(layout: Path, digest: str, skip: int = 0) -> Iterator[bytes]:
    """The image `digest` of a layout as `docker save` would write it, in pieces; the lowest `skip` layers only named, for an
    engine that has them."""
    blobs = layout / "blobs" / "sha256"
    data = (blobs / digest.removeprefix("sha256:")).read_bytes()
    layers = [name.removeprefix("sha256:") for name in image_layers(layout, digest)]
    config = f"{digest.removeprefix('sha256:')}.json"
    manifest = [{"Config": config, "RepoTags": None, "Layers": [f"{layer}/layer.tar" for layer in layers]}]
    for name, content in (("manifest.json", _dump(manifest)), (config, data)):
        yield from (_header(name, len(content)), content, _padding(len(content)))
    for layer in dict.fromkeys(layers[skip:]):
        size = (blobs / layer).stat().st_size
        yield _header(f"{layer}/layer.tar", size)
        with (blobs / layer).open("rb") as file:
            yield from iter(lambda: file.read(_CHUNK), b"")
        yield _padding(size)
    yield bytes(2 * tarfile.BLOCKSIZE)


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mtime = size, TIME
    return info.tobuf(tarfile.GNU_FORMAT)


def _padding(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)


def _dump(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _plain(file: IO[bytes]) -> IO[bytes]:
    """The layer, decompressed where gzip compressed it."""
    head = file.read(2)
    file.seek(0)
    return cast("IO[bytes]", gzip.GzipFile(fileobj=file)) if head == b"\x1f\x8b" else file


def _base_config(config: dict[str, Any] | None, digests: list[str]) -> dict[str, Any]:
    """A whole configuration; of one that is given, what its image needs to run."""
    given = config or {}
    inner = given.get("config") or {}
    return {
        "architecture": given.get("architecture") or OURS,
        "os": given.get("os") or "linux",
        "created": given.get("created") or _CREATED,
        "config": {key: inner[key] for key in sorted(inner) if inner[key]},
        "rootfs": {"type": "layers", "diff_ids": digests},
        "history": [{"created": _CREATED, "created_by": "base"} for _ in digests],
    }


def _save(name: str, to: Path) -> None:
    """Write a local Docker image to an archive."""
    import docker

    try:
        client = docker.from_env()
        try:
            with to.open("wb") as file:
                for chunk in client.images.get(name).save():
                    file.write(chunk)
        finally:
            client.close()
    except (docker.errors.DockerException, OSError) as error:
        cause = " ".join(str(getattr(error, "explanation", None) or error).split())[:200]
        raise Unsupported(f"base={name!r}: no such file, and no such local Docker image ({cause})") from None


__all__ = ["ImageStore", "docker_archive", "image_layers"]
