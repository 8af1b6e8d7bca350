"""Pulls from a real registry (Debian's docker-registry), with a proxy before it that plays the faults."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests

from envs.errors import InfraError, Unsupported
from envs.sandbox import bases, layers, registry
from envs.sandbox.archives import OURS
from envs.sandbox.bases import find_base, layers_at
from envs.sandbox.docker import DockerBackend
from envs.sandbox.native import NativeBackend
from tests.envs.images import system, tar

COMMAND = shutil.which("docker-registry")
pytestmark = pytest.mark.registry

LAYERS = [
    tar(system()),
    tar({"repo/keep.txt": b"keep\n", "repo/big": os.urandom(1 << 20)}),
    tar({"repo/new.txt": b"new\n"}),
]
GZIPPED = [gzip.compress(layer, 1, mtime=0) for layer in LAYERS]
USER, HASH = "tester:secret", "tester:$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n"


def sha(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


BLOBS = [sha(data) for data in GZIPPED]


@contextmanager
def running(home: Path, auth: str = "") -> Iterator[str]:
    """A registry; yields HOST:PORT."""
    assert COMMAND
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = f"version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\nhttp: {{addr: 127.0.0.1:{port}}}\n"
    (home / "config.yml").write_text(f"{config}storage: {{filesystem: {{rootdirectory: {home}/data}}}}\n{auth}")
    null = subprocess.DEVNULL
    with subprocess.Popen([COMMAND, "serve", str(home / "config.yml")], stdout=null, stderr=null) as process:
        try:
            for _ in range(100):
                with socket.socket() as probe:
                    if not probe.connect_ex(("127.0.0.1", port)):
                        break
                time.sleep(0.05)
            yield f"127.0.0.1:{port}"
        finally:
            process.kill()


def push(host: str, name: str, picked: list[int], *, arch: str = OURS, kind: str = "gzip", **options: Any) -> str:
    """Push an image of those of `LAYERS`; returns its manifest's digest."""
    url = f"http://{host}/v2/{name}"

    def blob(data: bytes) -> dict[str, Any]:
        where = requests.post(f"{url}/blobs/uploads/", **options).headers["Location"]
        requests.put(f"{where}&digest={sha(data)}", data=data, **options).raise_for_status()
        return {"digest": sha(data), "size": len(data)}

    rootfs = {"type": "layers", "diff_ids": [sha(LAYERS[at]) for at in picked]}
    made = {"architecture": arch, "os": "linux", "rootfs": rootfs, "config": {"Env": ["COLOUR=red"]}}
    config = {"mediaType": "application/vnd.oci.image.config.v1+json", **blob(json.dumps(made).encode())}
    media = f"application/vnd.oci.image.layer.v1.tar+{kind}"
    stack = [{"mediaType": media, **blob(GZIPPED[at])} for at in picked]
    return put(url, "latest", {"config": config, "layers": stack}, "manifest", **options)


def put(url: str, tag: str, content: dict[str, Any], kind: str, **options: Any) -> str:
    media = f"application/vnd.oci.image.{kind}.v1+json"
    data = json.dumps({"schemaVersion": 2, "mediaType": media, **content}).encode()
    answer = requests.put(f"{url}/manifests/{tag}", data=data, headers={"Content-Type": media}, **options)
    assert answer.status_code == 201, answer.text
    return sha(data)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running(tmp_path_factory.mktemp("registry")) as host:
        push(host, "team/one", [0, 1])
        push(host, "team/two", [0, 1, 2])
        yield host


class Proxy(BaseHTTPRequestHandler):
    """Passes on what the fault lets pass."""

    protocol_version = "HTTP/1.1"
    server: Front

    def do_GET(self) -> None:
        self.server.asked.append((self.path, dict(self.headers)))
        if not self.server.fault(self):
            self.forward()

    def forward(self, change: Callable[[bytes], bytes] = bytes, cut: int | None = None, ranges: bool = True) -> int:
        """cut: so many bytes of the body are sent; returns how many were."""
        headers = {k: v for k, v in self.headers.items() if k in ("Accept", "Range") and (ranges or k != "Range")}
        answer = requests.get(f"http://{self.server.real}{self.path}", headers=headers)
        body = change(answer.content)
        self.send_response(answer.status_code)
        for key in ("Content-Type", "Docker-Content-Digest", "Content-Range"):
            if key in answer.headers:
                self.send_header(key, answer.headers[key])
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:cut])
        self.wfile.flush()
        return len(body[:cut])

    def answer(self, status: int, body: bytes = b"{}", **headers: str) -> bool:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        return True

    def log_message(self, *_: object) -> None:
        pass


class Front(ThreadingHTTPServer):
    """A proxy before a registry."""

    daemon_threads = True

    def __init__(self, real: str) -> None:
        super().__init__(("127.0.0.1", 0), Proxy)
        self.real, self.asked = real, list[tuple[str, dict[str, str]]]()
        self.fault: Callable[[Proxy], object] = lambda _: None
        self.host = f"127.0.0.1:{self.server_port}"

    def blobs(self) -> list[str]:
        """The layers that were asked for since the last call."""
        found = [path.rpartition("/")[2] for path, _ in self.asked if "/blobs/" in path]
        self.asked.clear()
        return [digest for digest in found if digest in BLOBS]


@pytest.fixture
def front(real: str) -> Iterator[Front]:
    with Front(real) as server, ThreadPoolExecutor(1) as pool:
        pool.submit(server.serve_forever, 0.02)
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Layers of its own, no engine, no credentials, and little patience."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere")
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setattr(registry, "STALL", 0.3)
    monkeypatch.setattr(registry, "PATIENCE", 2.0)
    bases._docker_image.cache_clear()
    return layers.layers_dir()


def again(name: str) -> bases.Base:
    """As another process finds it."""
    bases._docker_image.cache_clear()
    return find_base(name)


def refused(kind: type[Exception], name: str, words: str) -> None:
    """One line, and nothing is left behind."""
    with pytest.raises(kind, match=rf"^base='[^\n]*({words})[^\n]*$"):
        again(name)
    cache = layers.layers_dir()
    assert {path.name for path in cache.iterdir()} <= {".lock", ".use"} and not list((cache / ".use").iterdir())


@pytest.mark.native
def test_a_pull_fetches_what_is_missing(front: Front, cache: Path) -> None:
    backend = NativeBackend()
    try:
        with backend.create(base=f"{front.host}/team/one") as box:
            assert box.run("cat keep.txt; echo $COLOUR", timeout=20).text() == "keep\nred\n"
            assert front.blobs() == BLOBS[:2]
            with backend.create(base=f"{front.host}/team/two:latest") as other:
                assert other.run("cat keep.txt new.txt", timeout=20).text() == "keep\nnew\n"
        assert front.blobs() == BLOBS[2:]
        with backend.create(base=f"{front.host}/team/one"):
            assert not front.asked  # remembered
    finally:
        backend.close()


def test_a_digest_needs_no_network_again(front: Front, real: str, cache: Path) -> None:
    digest = push(real, "team/one", [0, 1])
    name = f"{front.host}/team/one:whatever@{digest}"
    base = find_base(name)
    assert front.blobs() == BLOBS[:2]
    assert again(name) == base and not front.asked
    layers.discard([base.layers[1]])
    assert again(name) == base and front.blobs() == BLOBS[1:2]
    (kept,) = (cache.parent / "manifests").glob(digest[7:])
    kept.write_bytes(kept.read_bytes()[:50])  # one was killed while it wrote it
    assert again(name) == base and [path for path, _ in front.asked] == [f"/v2/team/one/manifests/{digest}"]
    refused_digest = f"{front.host}/team/one@sha256:{'0' * 64}"
    layers.discard(base.layers)
    refused(Unsupported, refused_digest, "no such image")


def test_an_index_gives_this_machines_image(front: Front, real: str) -> None:
    images = [("s390x", push(real, "team/many", [0, 1], arch="s390x")), (OURS, push(real, "team/many", [0, 1, 2]))]
    entries = [{"digest": "sha256:" + "1" * 64, "size": 9, "platform": {"os": "windows", "architecture": OURS}}]
    for arch, digest in images:
        size = len(requests.get(f"http://{real}/v2/team/many/manifests/{digest}").content)
        entries.append({"digest": digest, "size": size, "platform": {"os": "linux", "architecture": arch}})
    media = {"mediaType": "application/vnd.oci.image.manifest.v1+json"}
    url = f"http://{real}/v2/team/many"
    whole = put(url, "v1", {"manifests": [media | entry for entry in entries[1:]]}, "index")
    assert len(layers_at(find_base(f"{front.host}/team/many:v1"), "/repo")) == 2
    front.asked.clear()
    assert len(layers_at(again(f"{front.host}/team/many@{whole}"), "/repo")) == 2 and not front.asked
    layers.discard([path.name for path in layers.layers_dir().glob("[0-9a-f]*")])
    foreign = put(url, "v2", {"manifests": [media | entries[1]]}, "index")
    refused(Unsupported, f"{front.host}/team/many@{foreign}", f"no manifest for linux/{OURS}")
    refused(Unsupported, f"{front.host}/team/many@{images[0][1]}", "an image for s390x")


@pytest.mark.parametrize("what", ["manifests", "config", "first layer", "last layer", "longer", "zstd"])
def test_other_bytes_are_refused(front: Front, real: str, what: str) -> None:
    digest = push(real, "team/one", [0, 1], kind="zstd" if what == "zstd" else "gzip")
    paths = {"manifests": "/manifests/", "first layer": BLOBS[0], "last layer": BLOBS[1], "longer": BLOBS[1]}

    def fault(to: Proxy) -> bool:
        hit = paths.get(what, "/blobs/") in to.path and (what != "config" or to.path.rpartition("/")[2] not in BLOBS)
        if hit:
            to.forward(lambda data: data + b"x" if what == "longer" else data[:-9] + b"x" + data[-8:])
        return hit

    front.fault = fault
    words = {"longer": "more than it announced", "zstd": "zstd"}.get(what, "other content")
    refused(Unsupported, f"{front.host}/team/one@{digest}", words)
    if what != "zstd":
        front.fault = lambda _: None
        assert again(f"{front.host}/team/one@{digest}").image
    push(real, "team/one", [0, 1])


def signed(tmp_path: Path, host: str, user: str = USER) -> None:
    """As `docker login` does."""
    known = {"auths": {host: {"auth": base64.b64encode(user.encode()).decode()}}}
    (tmp_path / "config.json").write_text(json.dumps(known))


def test_a_token_is_fetched_where_one_is_asked_for(front: Front, tmp_path: Path) -> None:
    private, valid, made = False, set(), 0

    def fault(to: Proxy) -> bool:
        nonlocal made
        sign = to.headers.get("Authorization", "")
        if to.path.startswith("/token?"):
            assert "service=here" in to.path and "scope=repository%3Ateam%2Fone%3Apull" in to.path
            if private and sign != "Basic " + base64.b64encode(USER.encode()).decode():
                return to.answer(401)
            made += 1
            valid.add(f"Bearer t{made}")
            return to.answer(200, json.dumps({"token": f"t{made}"}).encode())
        if sign in valid:
            if BLOBS[1] in to.path and made < 2:  # it has expired
                valid.clear()
            else:
                return False
        scope = f'realm="http://{front.host}/token",service="here",scope="repository:team/one:pull"'
        return to.answer(401, WWW_Authenticate=f"Bearer {scope}")

    front.fault = fault
    name = f"{front.host}/team/one"
    base = find_base(name)
    assert base.image and made == 2
    layers.discard(base.layers)
    private = True
    refused(Unsupported, name, f"docker login {front.host}")
    signed(tmp_path, front.host, "tester:wrong")
    refused(Unsupported, name, f"docker login {front.host}")
    signed(tmp_path, front.host)
    assert again(name) == base


def test_basic_credentials(tmp_path: Path) -> None:
    (tmp_path / "users").write_text(HASH)
    with running(tmp_path, f"auth: {{htpasswd: {{realm: here, path: {tmp_path}/users}}}}\n") as host:
        push(host, "team/one", [0, 1], auth=tuple(USER.split(":")))
        refused(Unsupported, f"{host}/team/one", f"docker login {host}")
        signed(tmp_path, host)
        assert again(f"{host}/team/one").image


def test_credentials_go_nowhere_else(front: Front, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither to where a blob is redirected, nor from ~/.netrc to a registry."""
    signed(tmp_path, front.host)
    (tmp_path / ".netrc").write_text(
        "machine 127.0.0.1 login other password other\nmachine localhost login x password x\n"
    )
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))

    def fault(to: Proxy) -> bool:
        if "moved" in to.path:
            to.path = to.path.replace("/moved", "")
            return False
        if not to.headers.get("Authorization"):
            return to.answer(401, WWW_Authenticate='Basic realm="here"')
        return "/blobs/" in to.path and to.answer(307, Location=f"http://localhost:{front.server_port}/moved{to.path}")

    front.fault = fault
    assert find_base(f"{front.host}/team/one").image
    seen = [(path.startswith("/moved"), headers.get("Authorization", "")) for path, headers in front.asked]
    known = "Basic " + base64.b64encode(USER.encode()).decode()
    assert set(seen) == {(False, ""), (False, known), (True, "")}


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_registry_is_asked_again(front: Front, status: int) -> None:
    times: list[float] = []

    def fault(to: Proxy) -> bool:
        times.append(time.monotonic())
        return len(times) in (1, 4) and to.answer(status, **({"Retry_After": "1"} if status == 429 else {}))

    front.fault = fault
    assert find_base(f"{front.host}/team/one").image
    assert len(times) == 6 and times[1] - times[0] >= (1.0 if status == 429 else 0.25)
    layers.discard([path.name for path in layers.layers_dir().glob("[0-9a-f]*")])
    front.fault = lambda to: to.answer(status)
    start = time.monotonic()
    refused(InfraError, f"{front.host}/team/two", f"answers {status}")
    assert time.monotonic() - start < 4
    front.fault = lambda to: to.answer(status, Retry_After="3600")
    start = time.monotonic()
    refused(InfraError, f"{front.host}/team/two", "asks for 3600 s")
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("how", ["stall", "cut", "no ranges"])
def test_a_broken_transfer_goes_on(front: Front, how: str) -> None:
    sent: list[int] = []

    def fault(to: Proxy) -> bool:
        if BLOBS[1] not in to.path or len(sent) == 2:
            return BLOBS[1] in to.path and bool(to.forward(ranges=how != "no ranges") or True)
        cut = 400_000 * (1 + len(sent)) if how == "no ranges" else 400_000
        sent.append(to.forward(cut=cut, ranges=how != "no ranges"))
        time.sleep(0.8 if how != "cut" else 0)
        to.close_connection = True
        return True

    front.fault = fault
    base = find_base(f"{front.host}/team/one")
    spans = [headers.get("Range") for path, headers in front.asked if BLOBS[1] in path]
    assert spans[0] is None and len(spans) == 3
    first, second = (int(re.findall(r"\d+", span or "")[0]) for span in spans[1:])
    assert 300_000 < first <= 400_000 and second > 700_000
    assert (layers.layers_dir() / base.layers[1] / "repo/big").stat().st_size == 1 << 20


@pytest.mark.parametrize("ranges", [True, False])
def test_a_registry_that_stalls_for_good(front: Front, ranges: bool) -> None:
    def fault(to: Proxy) -> bool:
        if BLOBS[1] not in to.path:
            return False
        to.forward(cut=100_000 if "Range" not in to.headers or not ranges else 0, ranges=ranges)
        time.sleep(0.6)
        to.close_connection = True
        return True

    front.fault = fault
    start = time.monotonic()
    with pytest.raises(InfraError, match=r"^base='[^\n]*stalled[^\n]*given up after [0-9] s[^\n]*$"):
        find_base(f"{front.host}/team/one")
    assert time.monotonic() - start < 6
    front.blobs()
    front.fault = lambda _: None
    assert again(f"{front.host}/team/one").image and front.blobs() == BLOBS[1:2]  # the first was whole


def test_a_registry_that_is_not_there(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(registry, "PATIENCE", 600.0)
        monkeypatch.setattr(registry, "CONTACT", 1.0)
        refused(Unsupported, f"{'x' * 70}.example/team/one", "too long")
        refused(InfraError, f"127.0.0.1:{free.getsockname()[1]}/team/one", "no answer")
    refused(InfraError, "no-such-host.invalid/team/one", "no answer")
    refused(Unsupported, f"{front.host}/team/none", "no such image")
    refused(Unsupported, f"{front.host}/team/one:none", "no such image")
    refused(Unsupported, f"{front.host}/Team/one", "HOST")
    refused(Unsupported, f"{front.host}/team/one@sha256:12", "HOST")
    refused(Unsupported, "debian:12", "no Docker engine")
    assert registry.Registry("docker.io/debian:12", "")._url == "https://registry-1.docker.io/v2/library/debian"


def test_http_is_for_this_machine_alone(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: real("127.0.0.1", *rest, **more))
    refused(Unsupported, f"registry.example:{front.server_port}/team/one", "speaks no HTTPS")


@pytest.mark.root
def test_a_full_disk(front: Front, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", small], check=True)
    try:
        monkeypatch.setenv("XDG_CACHE_HOME", str(small))
        names = [f"{front.host}/team/{name}" for name in ("one", "two")]
        base = find_base(names[0])
        used = shutil.disk_usage(small).used
        layers.discard(base.layers)
        for left in (1 << 20, used // 3, used // 2, used - (1 << 20)):  # full while it is fetched, unpacked, ...
            with (small / "filler").open("wb") as file:
                file.write(bytes(max(0, shutil.disk_usage(small).free - left)))
            refused(InfraError, names[0], "No space left|that are free")
            (small / "filler").unlink()
        assert again(names[0]) == base and again(names[1]).image
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def test_processes_at_once_fetch_once(front: Front) -> None:
    code = "import sys; from envs.sandbox.bases import find_base; print(find_base(sys.argv[1]).layers)"
    command = [sys.executable, "-c", code, f"{front.host}/team/two"]
    others = [subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE) for _ in range(3)]
    assert len({other.communicate()[0] for other in others}) == 1 and not any(other.returncode for other in others)
    assert sorted(front.blobs()) == sorted(BLOBS)


def test_killed_while_it_pulls(front: Front, cache: Path) -> None:
    held: list[subprocess.Popen[bytes]] = []

    def fault(to: Proxy) -> bool:
        if BLOBS[1] not in to.path:
            return False
        to.forward(cut=500_000)
        held[0].kill()
        return True

    front.fault = fault
    code = "import sys; from envs.sandbox.bases import find_base; find_base(sys.argv[1])"
    command = [sys.executable, "-c", code, f"{front.host}/team/one"]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2]) as other:
        held.append(other)
    assert other.returncode == -9
    front.fault = lambda _: None
    front.blobs()
    assert find_base(f"{front.host}/team/one").image and front.blobs() == BLOBS[1:2]
    left = {path.name for path in (*cache.iterdir(), *cache.parent.iterdir())}
    assert {name for name in left if len(name) != 24} == {".lock", ".use", "layers", "manifests"}


@pytest.mark.docker
def test_the_engine_pulls_for_the_docker_backend(real: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DOCKER_HOST")
    digest = push(real, "team/two", [0, 1, 2])
    name, backend = f"{real}/team/two@{digest}", DockerBackend()
    try:
        with backend.create(base=name, workdir="/work") as box:
            assert box.run("cat /repo/new.txt", timeout=20).text() == "new\n"
        with pytest.raises(Unsupported, match=r"^base='[^\n]*no such image[^\n]*$"):
            backend.create(base=f"{real}/team/none")
        with pytest.raises(InfraError, match=r"^base='127.0.0.1:1/[^\n]*can't pull[^\n]*$"):
            backend.create(base="127.0.0.1:1/team/one")
    finally:
        backend.close()
        subprocess.run(["docker", "rmi", "-f", name], capture_output=True)
