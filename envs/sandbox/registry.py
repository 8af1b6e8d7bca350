"""Pulls images from a registry into the cache of layers, without an engine: the OCI distribution protocol, version 1.1.

https://github.com/opencontainers/distribution-spec/blob/main/spec.md, and for tokens the Docker registry's
https://distribution.github.io/distribution/spec/auth/token/. Whatever a digest names is checked against it. HTTP only for
this machine itself, else HTTPS, as Docker does. A busy or stalled registry is asked again, going on where it stopped,
as long as `PATIENCE` allows; then it is an `InfraError`. What the user can remedy is `Unsupported`, each one line.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, Any

from envs.errors import InfraError, Unsupported
from envs.sandbox.bases import is_archive
from envs.sandbox.helper import cache_dir

CONNECT = 10.0
STALL = 30.0
"""Seconds without a byte after which a transfer is broken off and goes on with a new request."""
PATIENCE = 90.0
"""Seconds without progress after which a registry counts as failed."""
CONTACT = 10.0
"""The same for one that has never answered: its name may be wrong."""

_REFERENCE = re.compile(
    r"(?P<host>localhost(?::\d+)?|[\w.-]+:\d+|[\w-]+(?:\.[\w-]+)+|\[[0-9a-fA-F:]+\](?::\d+)?)"
    r"/(?P<name>[a-z0-9]+(?:[._/-]+[a-z0-9]+)*)(?::(?P<tag>\w[\w.-]{0,127}))?(?:@sha256:(?P<digest>[0-9a-f]{64}))?",
    re.ASCII,
)
_MANIFESTS = ", ".join(
    f"application/vnd.{kind}+json"
    for kind in (
        "oci.image.index.v1",
        "oci.image.manifest.v1",
        "docker.distribution.manifest.list.v2",
        "docker.distribution.manifest.v2",
    )
)
_JSON_MAX = 8 << 20
_CHUNK = 1 << 16
_KEPT = 4096
"""Manifests and configurations that are kept: a few kilobytes each."""


def is_remote(name: str) -> bool:
    """Whether an image's name begins with a registry's host: with a dot or a port in it, or localhost."""
    host, slash, _ = name.partition("/")
    return bool(slash and host) and host[0] != "." and ("." in host or ":" in host or host == "localhost")


class Registry:
    """One image of a registry, as a store of blobs: "index.json" is its manifest, "blobs/sha256/…" what that names."""

    REMEDY = "push it again, or pull and `docker save` it"

    def __init__(self, reference: str, what: str) -> None:
        import requests

        found = _REFERENCE.fullmatch(reference)
        if not found:
            raise Unsupported(f"{what}: not a registry's image; write HOST[:PORT]/NAME[:TAG][@sha256:DIGEST]")
        self._host, self._name, tag, self._digest = found.groups()
        self._tag, self._what = tag or "latest", what
        host = "registry-1.docker.io" if self._host in ("docker.io", "index.docker.io") else self._host
        if host != self._host and "/" not in self._name:
            self._name = f"library/{self._name}"
        local = re.fullmatch(r"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?", host) is not None
        self._scheme = "http" if local else "https"
        self._url = f"{self._scheme}://{host}/v2/{self._name}"
        self._session = requests.Session()
        self._session.trust_env = not local  # a proxy is for what is elsewhere
        self._answered, self._header = False, ""
        self._small: set[str] = set()
        self._manifests: set[str] = set()
        self._sizes: dict[str, int] = {}

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    def open(self, name: str) -> IO[bytes]:
        """The blob, whole and checked; raises `KeyError` for a name that no registry has."""
        kind, _, digest = name.rpartition("/")
        if name == "index.json":
            return io.BytesIO(self._manifest(self._digest))
        if kind != "blobs/sha256":
            raise KeyError(name)
        if digest in self._manifests:
            return io.BytesIO(self._manifest(digest))
        if digest in self._small:
            return io.BytesIO(self._kept(digest, lambda: self._blob(digest).read(_JSON_MAX)))
        return self._blob(digest)

    def _manifest(self, digest: str | None) -> bytes:
        data = self._kept(digest, lambda: self._fetched(f"sha256:{digest}" if digest else self._tag))
        found = json.loads(data)
        for entry in found.get("manifests", ()):
            self._manifests.add(str(entry["digest"]).removeprefix("sha256:"))
        for entry in (*found.get("layers", ()), *([found["config"]] if "config" in found else ())):
            self._sizes[str(entry["digest"]).removeprefix("sha256:")] = int(entry["size"])
            if str(entry.get("mediaType")).endswith("zstd"):
                raise Unsupported(
                    f"{self._what}: its layers are compressed by zstd, which is not read; push it with gzip"
                )
        if "config" in found:
            self._small.add(str(found["config"]["digest"]).removeprefix("sha256:"))
        return data

    def _fetched(self, reference: str) -> bytes:
        file = io.BytesIO()
        self._transfer(f"{self._url}/manifests/{reference}", {"Accept": _MANIFESTS}, file, None)
        return file.getvalue()

    def _kept(self, digest: str | None, fetch: Callable[[], bytes]) -> bytes:
        """What is small, from the cache if it is there, so that what is named by digest needs no network again."""
        home = cache_dir() / "manifests"
        if digest:
            with contextlib.suppress(OSError):
                data = (home / digest).read_bytes()
                if hashlib.sha256(data).hexdigest() == digest:  # else one was killed while it wrote it
                    return data
        data = fetch()
        found = hashlib.sha256(data).hexdigest()
        if digest and found != digest:
            raise self._mismatch(digest)
        home.mkdir(mode=0o700, exist_ok=True)
        (home / found).write_bytes(data)
        for old in sorted(home.iterdir(), key=_written)[:-_KEPT]:
            old.unlink(missing_ok=True)
        return data

    def _blob(self, digest: str) -> IO[bytes]:
        """A blob in an unnamed file, which is gone when it is closed, or its process ends."""
        with contextlib.ExitStack() as unless_whole:
            file = unless_whole.enter_context(tempfile.TemporaryFile(dir=cache_dir()))
            found = self._transfer(f"{self._url}/blobs/sha256:{digest}", {}, file, self._sizes.get(digest))
            if found != digest:
                raise self._mismatch(digest)
            file.seek(0)
            unless_whole.pop_all()
        return file

    def _transfer(self, url: str, headers: Mapping[str, str], file: IO[bytes], size: int | None) -> str:
        """Write what is at `url` to `file`; returns its SHA-256. size: in bytes, where it is known."""
        import requests

        patience, at, most = _Patience(f"{self._what}: {self._host}"), 0, 0
        while True:
            span = {"Range": f"bytes={at}-"} if at else {}
            with self._ask(url, {**headers, **span}, patience) as response:
                if not at or response.status_code != 206:
                    hashed, at = hashlib.sha256(), file.seek(0)
                    file.truncate()
                try:
                    for chunk in response.iter_content(_CHUNK):
                        hashed.update(chunk)
                        at += file.write(chunk)
                        if at > (_JSON_MAX if size is None else size):
                            raise Unsupported(f"{self._what}: {self._host} sent more than it announced; {self.REMEDY}")
                        if at > most:
                            most = at
                            patience.restart()
                    if size is None or at == size:
                        return hashed.hexdigest()
                    cause = f"it was cut off after {at} of {size} bytes"
                except requests.RequestException as error:
                    cause = f"it stalled or broke off after {at} bytes ({_cause(error)})"
            patience.wait(cause)

    def _ask(self, url: str, headers: Mapping[str, str], patience: _Patience, **options: Any) -> Any:
        """The answer of a registry that is not busy, with status 200 or 206."""
        import requests

        signed = bool(options)
        while True:
            after = 0.0
            try:
                answer = self._session.get(
                    url,
                    headers={"Accept-Encoding": "identity", **headers},
                    stream=True,
                    timeout=(CONNECT, STALL),
                    **({"auth": self._sign} | options),
                )
            except requests.exceptions.SSLError as error:
                cause = _cause(error)
                raise Unsupported(
                    f"{self._what}: {self._host} speaks no HTTPS that is trusted here ({cause}); HTTP is for localhost only"
                ) from None
            except requests.RequestException as error:
                cause = f"no answer ({_cause(error)})"
                if not self._answered:
                    patience.shorten()
            else:
                self._answered = True
                status = answer.status_code
                if status in (200, 206):
                    return answer
                answer.close()
                if status == 401 and not signed:
                    signed = True
                    self._sign_in(answer.headers.get("WWW-Authenticate", ""), patience)
                    continue
                if status != 429 and status < 500:
                    raise self._refusal(status)
                cause, after = f"it answers {status} {answer.reason}", _seconds(answer.headers.get("Retry-After", ""))
            patience.wait(cause, after)

    def _sign(self, request: Any) -> Any:
        """Authorization; it goes to no other host, whither an answer may lead on."""
        if self._header:
            request.headers["Authorization"] = self._header
        return request

    def _sign_in(self, challenge: str, patience: _Patience) -> None:
        """Get what the registry asks for, with the credentials in Docker's configuration where there are some."""
        import requests

        import docker

        kind, _, rest = challenge.partition(" ")
        given = dict(re.findall(r'(\w+)="([^"]*)"', rest))
        try:
            known = docker.auth.load_config().resolve_authconfig(self._host) or {}
        except docker.errors.DockerException as error:
            raise Unsupported(f"{self._what}: {_cause(error)}; docker login {self._host}") from None
        user = (known.get("username") or known.get("Username"), known.get("password") or known.get("Password"))
        if kind.lower() == "basic" and all(user):
            self._header = requests.auth._basic_auth_str(*user)
            return
        realm = given.pop("realm", "")
        if kind.lower() != "bearer" or not realm.startswith(("https:", f"{self._scheme}:")):
            raise self._refusal(401)
        given = {"scope": f"repository:{self._name}:pull", **given}
        options = {"params": given, "auth": user if all(user) else lambda request: request}
        with self._ask(realm, {}, patience, **options) as answer:
            try:
                token = answer.json()
                self._header = f"Bearer {token.get('token') or token['access_token']}"
            except (ValueError, KeyError, AttributeError):
                raise InfraError(f"{self._what}: {self._host} gave no token to sign in with") from None

    def _refusal(self, status: int) -> Unsupported:
        if status in (401, 403):
            return Unsupported(
                f"{self._what}: {self._host} refuses access, or has no such image ({status}); docker login {self._host}"
            )
        if status == 404:
            return Unsupported(f"{self._what}: {self._host} has no such image; check its name, tag and digest")
        return Unsupported(f"{self._what}: {self._host} answers {status}; is it a registry?")

    def _mismatch(self, digest: str) -> Unsupported:
        return Unsupported(
            f"{self._what}: {self._host} sent other content than digest {digest[:12]} says; {self.REMEDY}"
        )


class _Patience:
    """How long to wait before the next try, and when to give up."""

    def __init__(self, who: str) -> None:
        self._who = who
        self.restart()

    def restart(self) -> None:
        """There was progress."""
        self._since, self._most, self._pause = time.monotonic(), PATIENCE, 0.25

    def shorten(self) -> None:
        """There was no contact at all."""
        self._most = min(self._most, CONTACT)

    def wait(self, cause: str, after: float = 0.0) -> None:
        """Wait, at least `after` seconds; raises `InfraError` where that is too long."""
        pause, self._pause = max(after, self._pause), min(2 * self._pause, 16.0)
        if time.monotonic() + pause > self._since + self._most:
            asked = f", and asks for {after:.0f} s" if after else ""
            raise InfraError(
                f"{self._who}: {cause}{asked}; given up after {time.monotonic() - self._since:.0f} s without progress"
            )
        time.sleep(pause)


def _seconds(retry_after: str) -> float:
    """What a Retry-After header says: seconds, or a date."""
    if re.fullmatch(r"\d{1,9}", retry_after):
        return float(retry_after)
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    return 0.0


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _cause(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def provide(client: Any, name: str) -> None:
    """Have an engine pull the image that is called `name` where that names a registry's and the engine lacks it."""
    import requests

    import docker

    found = _REFERENCE.fullmatch(name)
    if not found or is_archive(name):
        return
    with contextlib.suppress(docker.errors.ImageNotFound):
        client.images.get(name)
        return
    what, host = f"base={name!r}", found["host"]
    tag = f"sha256:{found['digest']}" if found["digest"] else found["tag"] or "latest"
    try:
        for line in client.api.pull(f"{host}/{found['name']}", tag=tag, stream=True, decode=True):
            if "error" in line:
                raise docker.errors.APIError(line["error"])
    except (docker.errors.DockerException, requests.RequestException) as error:
        cause = _cause(getattr(error, "explanation", None) or error)
        if re.search(r"unauthorized|denied|no basic auth|authentication required", cause, re.I):
            raise Unsupported(f"{what}: {host} refuses access ({cause}); docker login {host}") from None
        if re.search(r"manifest unknown|not found|no matching manifest", cause, re.I):
            raise Unsupported(f"{what}: {host} has no such image ({cause}); check its name, tag and digest") from None
        raise InfraError(f"{what}: the engine can't pull it: {cause}") from None
