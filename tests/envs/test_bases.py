"""Images as bases: every form of archive, changes and forks over layers, and archives that must be refused."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from envs.errors import InfraError, Unsupported
from envs.sandbox import Backend, FileChange, Limits, Sandbox, cgroups, hoststore, make_backend, reaper, walk
from envs.sandbox import docker as docker_backend
from envs.sandbox.bases import find_base, layers_at
from envs.sandbox.docker import DockerBackend
from envs.sandbox.layers import CAP, layers_dir, make_room
from envs.sandbox.native import NativeBackend
from envs.sandbox.stacked import FIRST_UID
from envs.sandbox.unpack import unpack
from tests.envs.images import Entries, docker_archive, entry, system, tar

BACKENDS = [pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("native", "docker")]
SYSTEM = system()
LOWER: Entries = {
    "repo": None,
    "repo/keep.txt": b"keep\n",
    "repo/old.txt": b"old\n",
    "repo/pkg/a.py": b"a = 1\n",
    "repo/pkg/deep/b.py": b"b = 1\n",
    "repo/gone/c.py": b"c = 1\n",
    "repo/link": entry(tarfile.SYMTYPE, "keep.txt"),
    "repo/hard": entry(tarfile.LNKTYPE, "repo/keep.txt"),
}
UPPER: Entries = {"repo/.wh.old.txt": b"", "repo/gone/.wh..wh..opq": b"", "repo/gone/d.py": b"d = 1\n"}
IN_IMAGE = {"keep.txt", "pkg/a.py", "pkg/deep/b.py", "gone/d.py", "hard"}


def oci_layout(path: Path, layers: list[bytes]) -> Path:
    blobs = path / "blobs/sha256"
    blobs.mkdir(parents=True)

    def blob(data: bytes) -> dict[str, str]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"digest": f"sha256:{digest}"}

    diff_ids = [f"sha256:{hashlib.sha256(layer).hexdigest()}" for layer in layers]
    config = blob(
        json.dumps({"rootfs": {"diff_ids": diff_ids}, "config": {"Env": ["COLOUR=red", "HOME=/home"]}}).encode()
    )
    manifest = blob(json.dumps({"config": config, "layers": [blob(gzip.compress(x)) for x in layers]}).encode())
    other = {"digest": f"sha256:{'0' * 64}", "platform": {"architecture": "s390x"}}
    (path / "index.json").write_text(json.dumps({"manifests": [other, manifest]}))
    (path / "oci-layout").write_text("{}")
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Layers of its own for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    from envs.sandbox import bases

    for cached in (bases._host, bases._archive_at, bases._docker_image, bases._offered):
        cached.cache_clear()
    return layers_dir()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, cache: Path) -> Iterator[Backend]:
    made = NativeBackend() if request.param == "native" else DockerBackend()
    yield made
    made.close()


@pytest.fixture
def given(backend: Backend, tmp_path: Path) -> Iterator[Callable[[Path], str]]:
    """Makes a base of an archive: for docker, the engine is given the same image first."""
    if backend.name == "native":
        yield str
        return
    import docker

    client, made, name = docker.from_env(), [], f"codeworld-test:{os.getpid()}"

    def load(path: Path) -> str:
        if path.name == "root.tar":
            client.api.import_image_from_data(path.read_bytes(), *name.split(":"))
            made.append(name)
        else:
            archive = docker_archive(tmp_path / "same.tar", LAYERS) if path.is_dir() else path
            made.extend(image.id for image in client.images.load(archive.read_bytes()))
        return str(path)

    yield load
    for image in dict.fromkeys(made):
        client.images.remove(image, force=True)
    client.close()


def sh(box: Sandbox, script: str) -> str:
    result = box.run(script, timeout=20)
    assert result.ok, result
    return result.text()


def plain(path: Path) -> Path:
    made = path / "root.tar"
    whole = {**SYSTEM, **{name: value for name, value in LOWER.items() if "old" not in name and "gone" not in name}}
    made.write_bytes(tar(whole | {"repo/gone/d.py": b"d = 1\n"}))
    return made


def compressed(path: Path) -> Path:
    made = path / "root.tar.gz"
    made.write_bytes(gzip.compress(plain(path).read_bytes(), 1))
    return made


NATIVE = pytest.mark.parametrize("backend", BACKENDS[:1], indirect=True)
DOCKER = pytest.mark.parametrize("backend", BACKENDS[1:], indirect=True)
LAYERS = [tar(SYSTEM | LOWER), tar(UPPER)]
FORMS: list[Callable[[Path], Path]] = [
    plain,
    compressed,
    lambda path: docker_archive(path / "saved.tar", LAYERS),
    lambda path: oci_layout(path / "oci", LAYERS),
]


@pytest.mark.parametrize("form", FORMS, ids=["plain", "gzip", "docker save", "oci layout"])
def test_every_form_of_image(
    backend: Backend, given: Callable[[Path], str], tmp_path: Path, form: Callable[[Path], Path]
) -> None:
    if backend.name == "docker" and form is compressed:
        pytest.skip("its digest is of the compressed archive, which no engine knows: see test_what_an_engine_lacks")
    with backend.create(base=given(form(tmp_path)), files={"new.txt": b"new\n"}) as box:
        found = sh(
            box, "shopt -s globstar nullglob; for f in **/*; do [[ -f $f && ! -L $f ]] && echo $f; done; :"
        ).split()
        assert set(found) == IN_IMAGE | {"new.txt"} and dict(box.changes()) == {}
        assert (
            sh(box, "pwd; cat link; : </dev/null && echo ok; ls /proc/self/stat")
            == "/repo\nkeep\nok\n/proc/self/stat\n"
        )
        user, colour = int(sh(box, "id -u")), "" if form in (plain, compressed) else "red"
        if backend.name == "native":
            assert user == 0 and sh(box, "echo $COLOUR $HOME").split() == (["red", "/home"] if colour else ["/root"])
        else:
            assert user > FIRST_UID and sh(box, "echo $COLOUR $HOME").split() == [*([colour] if colour else []), "/tmp"]


@pytest.mark.parametrize(("written", "kept"), [(1_000_000_007, 1_000_000_007), (-5, 0), (1 << 50, (1 << 31) - 1)])
def test_files_keep_their_times(tmp_path: Path, written: int, kept: int) -> None:
    file = entry(tarfile.REGTYPE)
    file.mtime = written
    (tmp_path / "root.tar").write_bytes(tar({"a.py": file}))
    with (tmp_path / "root.tar").open("rb") as stream:
        unpack(stream, tmp_path / "to", "x")
    assert (tmp_path / "to/a.py").stat().st_mtime == kept, "compiled Python is used only beside its source's time"


@pytest.fixture
def image(given: Callable[[Path], str], tmp_path: Path) -> str:
    return given(docker_archive(tmp_path / "saved.tar", LAYERS))


def test_changes_over_an_image(backend: Backend, image: str) -> None:
    with backend.create(base=image, files={"new.txt": b"new\n", "keep.txt": b"kept\n"}) as box:
        sh(
            box,
            """echo more >>pkg/a.py; rm gone/d.py new.txt; mkdir n; echo x >n/x; mv pkg/deep moved; echo same >same
            cat hard >copy; rm same; ln -s /etc/hosts l; echo outside >/tmp/x; echo outside >/etc/x; rm link; echo file >link""",
        )
        expected = {
            "pkg/a.py": FileChange(b"a = 1\nmore\n"),
            "gone/d.py": FileChange(None),
            "new.txt": FileChange(None),
            "n/x": FileChange(b"x\n"),
            "pkg/deep/b.py": FileChange(None),
            "moved/b.py": FileChange(b"b = 1\n"),
            "copy": FileChange(b"keep\n"),
            "link": FileChange(b"file\n"),
        }
        assert dict(box.changes()) == expected
        (child,) = box.fork(1)
        with child:
            assert dict(child.changes()) == dict(box.changes()) == expected
            sh(
                child,
                "rm -rf pkg moved; mkdir pkg; echo 2 >pkg/z; echo 'a = 1' >pkg/a.py; [[ $(cat /tmp/x) = outside ]] && rm keep.txt && mkdir keep.txt",
            )
            assert dict(box.changes()) == expected
            assert dict(child.changes()) == {
                k: v for k, v in expected.items() if k not in ("pkg/a.py", "moved/b.py")
            } | {
                "pkg/z": FileChange(b"2\n"),
                "keep.txt": FileChange(None),
            }
        sh(box, "rm -rf /repo/* /repo/.[a-z]*; cd /; ls -A repo")
        assert all(change.data is None for change in box.changes().values())
        assert set(box.changes()) == IN_IMAGE | {"new.txt"}
        sh(box, "rm -r /repo; mkdir /repo; echo again >/repo/hard; ln -s /etc /repo/pkg")
        assert box.changes()["hard"] == FileChange(b"again\n") and box.changes()["pkg/a.py"].data is None
        sh(box, "rm -r /repo; ln -s /etc /repo")
        assert all(change.data is None for change in box.changes().values())


@NATIVE
def test_a_world_broken_from_inside_gives_no_way_out(backend: Backend, image: str, tmp_path: Path) -> None:
    """What starts from it is set up by the launcher as root, which must not follow what was left there."""
    host = tmp_path / "host"
    host.mkdir()
    for script in (
        f"mv /tmp /t; ln -s {host} /tmp",
        f"rm -r /repo; ln -s {host} /repo",
        f"rm -r /repo/new; ln -s {host} /repo/new",
    ):
        with backend.create(base=image, workdir="/repo/new/deep") as box:
            sh(box, f"cd /; {script}")
            with pytest.raises(InfraError, match=r"^[^\n]*make [^\n]*Not a directory[^\n]*$"):
                box.fork(1)
        assert host.stat().st_uid == os.geteuid() and not list(host.iterdir()), script


@NATIVE
def test_changes_reads_no_more_than_it_says(backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Holes are content; of what was deleted or has another size, the image's content is not read."""
    big: Entries = {"repo/big": bytes(9 << 20), "repo/data/more": bytes(9 << 20)}
    with backend.create(base=str(docker_archive(tmp_path / "big.tar", [tar(SYSTEM | LOWER | big)]))) as box:
        sh(box, "rm -r data; : >big; printf 'old\\n' >old.txt; echo x >pkg/a.py")
        box.write("hole", b"x" + bytes(100_000) + b"y")
        read: list[int] = []
        content = walk._content
        monkeypatch.setattr(walk, "_content", lambda fd, size: read.append(size) or content(fd, size))
        found = box.changes()
        assert {path: change.data and len(change.data) for path, change in found.items()} == {
            "big": b"",
            "data/more": None,
            "hole": 100_002,
            "pkg/a.py": 2,
        }
        assert sum(read) < 200_000


def test_images_share_their_layers(backend: Backend, given: Callable[[Path], str], tmp_path: Path, cache: Path) -> None:
    one = given(docker_archive(tmp_path / "one.tar", LAYERS))
    two = given(docker_archive(tmp_path / "two.tar", [*LAYERS, tar({"repo/two.txt": b"2\n"})]))
    with backend.create(base=one):
        before = {path.name for path in cache.iterdir()}
    with backend.create(base=two) as box:
        assert sh(box, "cat two.txt keep.txt") == "2\nkeep\n"
    assert len({path.name for path in cache.iterdir()} - before) == 1
    with backend.create(base=one) as box:
        assert box.run("cat two.txt", timeout=5).exit == 1


BAD: dict[str, Entries] = {
    "absolute": {"/etc/x": b""},
    "dots": {"a/../../x": b""},
    "device": {"dev/sda": entry(tarfile.BLKTYPE)},
    "character device": {"x": entry(tarfile.CHRTYPE)},
    "fifo": {"x": entry(tarfile.FIFOTYPE)},
    "through a link": {"x": entry(tarfile.SYMTYPE, "/tmp"), "x/y": b""},
    "link outside": {"x": entry(tarfile.LNKTYPE, "../../../etc/passwd")},
    "absolute link": {"x": entry(tarfile.LNKTYPE, "/etc/passwd")},
    "link to nothing": {"x": entry(tarfile.LNKTYPE, "y")},
    "link through a link": {"d": entry(tarfile.SYMTYPE, "/etc"), "x": entry(tarfile.LNKTYPE, "d/passwd")},
}


def refused(backend: Backend, base: Path | str, cache: Path) -> str:
    with pytest.raises(Unsupported, match=r"^base='[^\n]{20,}$") as caught:
        backend.create(base=str(base))
    left = {path.name for path in cache.iterdir()} - {".lock", ".use"}
    assert not {name for name in left if name.startswith(".")}, left
    return str(caught.value)


@NATIVE
@pytest.mark.parametrize("name", BAD)
def test_hostile_archives_are_refused(backend: Backend, tmp_path: Path, cache: Path, name: str) -> None:
    (tmp_path / "bad.tar").write_bytes(tar({**SYSTEM, **BAD[name]}))
    refused(backend, tmp_path / "bad.tar", cache)
    refused(backend, docker_archive(tmp_path / "image.tar", [tar(BAD[name])]), cache)
    assert not list(cache.glob("[0-9a-f]*"))


@NATIVE
def test_unreadable_bases_are_one_line(backend: Backend, tmp_path: Path, cache: Path) -> None:
    good = compressed(tmp_path).read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(good[: len(good) // 2])
    (tmp_path / "text").write_text("no archive\n" * 100)
    (tmp_path / "empty").touch()
    (tmp_path / "zstd").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(600))
    (tmp_path / "shellless.tar").write_bytes(tar({"repo/x": b""}))
    (tmp_path / "odd.tar").write_bytes(tar({"manifest.json": b"[{}]"}))
    (tmp_path / "directory").mkdir()
    for name in ("cut.tar.gz", "text", "empty", "zstd", "odd.tar", "directory", "missing.tar"):
        refused(backend, tmp_path / name, cache)
    before = set(cache.iterdir())
    assert "no bash" in refused(backend, tmp_path / "shellless.tar", cache)
    assert set(cache.iterdir()) == before
    (tmp_path / "foreign.tar").write_bytes(tar({**SYSTEM, "bin/bash": b"\x7fELF of another machine"}))
    assert "does not run here" in refused(backend, tmp_path / "foreign.tar", cache)
    os.mkfifo(tmp_path / "pipe")
    refused(backend, tmp_path / "pipe", cache)
    loop = oci_layout(tmp_path / "loop", LAYERS)
    index = json.dumps({"manifests": [{"digest": f"sha256:{'1' * 64}"}]})
    (loop / "index.json").write_text(index)
    (loop / "blobs/sha256" / ("1" * 64)).write_text(index)
    refused(backend, loop, cache)
    lie = docker_archive(tmp_path / "lie.tar", [tar(LOWER)], [hashlib.sha256(LAYERS[0]).hexdigest()])
    assert "digest" in refused(backend, lie, cache)
    assert not (cache / hashlib.sha256(LAYERS[0]).hexdigest()[:24]).exists()
    with pytest.raises(Unsupported, match=r"^workdir=[^\n]*$"):
        backend.create(base=str(docker_archive(tmp_path / "good.tar", LAYERS)), workdir="/repo/link/x")
    with pytest.raises(Unsupported, match=r"^files\['pkg'\][^\n]*$"):
        backend.create(base=str(tmp_path / "good.tar"), files={"pkg": b""})


@pytest.mark.docker
def test_a_local_docker_image(backend: Backend, cache: Path) -> None:
    user = "root" if backend.name == "native" else "agent"
    with backend.create(base="codeworld-base", workdir="/usr/lib") as box:
        assert sh(box, "python3 -c 'print(6 * 7)'; id -un") == f"42\n{user}\n"
        sh(box, "echo x >x && rm -r python3*/json python3*/this.py")
        changes = box.changes()
        assert changes["x"].data == b"x\n" and {name.rpartition("/")[2] for name in changes} > {"this.py", "decoder.py"}
        assert all(change.data is None for name, change in changes.items() if name != "x")
    with backend.create(base="codeworld-base") as box:
        assert sh(box, "python3 -c 'import json; print(6 * 7)'; ls /usr/lib/x || :").startswith("42\n")
    assert "docker pull" in refused(backend, "no-such-image:here", cache)


@pytest.mark.native
def test_auto_takes_docker_for_what_native_refuses(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here by a stand-in for docker: which images the engine has is not the question."""
    import envs.sandbox

    class Engine(NativeBackend):
        name = "docker"

        def create(self, **options: Any) -> Any:
            return super().create(**{**options, "base": "host"})

    make = envs.sandbox._new
    monkeypatch.setattr(envs.sandbox, "_new", lambda name: Engine() if name == "docker" else make(name))
    (tmp_path / "bad.tar").write_bytes(tar({**SYSTEM, **BAD["device"]}))
    auto = make_backend()
    try:
        assert auto.name == "native"
        for _ in range(2):
            with auto.create(base=str(tmp_path / "bad.tar")) as box:
                assert sh(box, "id -u") != "0\n"
        with auto.create(base=str(plain(tmp_path))) as box:
            assert sh(box, "id -u") == "0\n"
        monkeypatch.setattr(Engine, "create", NativeBackend.create)
        (tmp_path / "worse.tar").write_bytes(tar({**SYSTEM, **BAD["fifo"]}))
        with pytest.raises(Unsupported, match=r"^native: [^\n]*; docker: [^\n]*$"):
            auto.create(base=str(tmp_path / "worse.tar"))
    finally:
        auto.close()


@pytest.mark.native
def test_a_backend_of_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        name = "mine"

        def load(self) -> Any:
            return NativeBackend

    monkeypatch.setattr("envs.sandbox.entry_points", lambda group: [Point()] if group == "codeworld.sandboxes" else [])
    made = make_backend("mine")
    assert isinstance(made, NativeBackend)
    made.close()
    with pytest.raises(ValueError, match=r"mine\. Did you mean .*mine"):
        make_backend("mime")


@DOCKER
def test_what_an_engine_lacks(backend: Backend, tmp_path: Path, cache: Path) -> None:
    layers = [tar(SYSTEM | {"only": str(tmp_path).encode()})]
    archive = docker_archive(tmp_path / "saved.tar", layers)
    assert f"docker load -i {archive}" in refused(backend, archive, cache)
    assert "docker import" in refused(backend, compressed(tmp_path), cache)
    assert not mounted()


def leftovers(run: str) -> list[str]:
    """Containers of this run that the engine still has."""
    import docker

    client = docker.from_env()
    try:
        found = client.containers.list(all=True, filters={"label": f"{docker_backend.LABEL}={run}"})
        return [str(container.id) for container in found]
    finally:
        client.close()


def mounted() -> list[str]:
    """What this process has mounted or made for containers."""
    places = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    here = f"{hoststore.ROOT}/{cgroups.owner_name()}"
    return [path for path in (*places, *map(str, hoststore.ROOT.glob("*"))) if path.startswith(here)]


BURIED: Entries = {
    "repo": entry(tarfile.SYMTYPE, "/etc"),
    "data/repo/x": b"x",
    "over/repo/y": b"y",
    "srv": entry(tarfile.SYMTYPE, "/over"),
    "cut/repo/z": b"z",
}
TOP: Entries = {"data/repo/new": b"n", "over/.wh.repo": b"", "srv/repo/s": b"s", "cut/.wh..wh..opq": b""}


@NATIVE
def test_layers_are_found_without_following_links(backend: Backend, tmp_path: Path) -> None:
    found = find_base(str(docker_archive(tmp_path / "saved.tar", [tar(SYSTEM | BURIED), tar(TOP)])))
    top, upper, lower = found.layers
    for path, layers in {
        "/data/repo": [upper, lower],
        "/data": [upper, lower],
        "/over/repo": [],  # deleted
        "/cut/repo": [],  # below an opaque directory
        "/cut": [upper],
        "/srv/repo": [upper],  # the link below it is hidden
        "/dev/shm": [top],
        "/none/here": [],
    }.items():
        assert layers_at(found, path) == layers, path
    for path in ("/repo", "/repo/x", "/data/repo/x", "/bin/bash/x"):
        with pytest.raises(Unsupported, match=rf"^'{path}': [^\n]*$"):
            layers_at(found, path)


@DOCKER
@pytest.mark.root
def test_volumes_of_an_image_are_capped_too(backend: Backend, given: Callable[[Path], str], tmp_path: Path) -> None:
    layers = [*LAYERS, tar({"data/x": b"old\n"})]
    base = given(docker_archive(tmp_path / "saved.tar", layers, volumes=("/data/", "/tmp", "/new")))
    with backend.create(base=base, limits=Limits(disk_mb=4)) as box:
        assert sh(box, "cat /data/x; echo new >/data/x; echo n >/new/n; cat /data/x /new/n") == "old\nnew\nn\n"
        result = box.run("cat /dev/zero >/data/big", timeout=30)
        assert (result.cause, dict(box.changes())) == ("disk", {})
        sh(box, "rm /data/big")
        (child,) = box.fork(1)
        with child:
            assert sh(child, "cat /data/x /new/n") == "new\nn\n"
    inside = given(docker_archive(tmp_path / "inside.tar", LAYERS, volumes=("/repo/pkg",)))
    with pytest.raises(Unsupported, match=r"^base='[^\n]*volume[^\n]*/repo/pkg[^\n]*$"):
        backend.create(base=inside)


class Elsewhere(BaseHTTPRequestHandler):
    """An engine on another host, as far as a client asks before it does anything."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b'{"ApiVersion": "1.41"}' if self.path.endswith("/version") else b"OK")

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.docker
def test_an_engine_elsewhere_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with HTTPServer(("127.0.0.1", 0), Elsewhere) as server, ThreadPoolExecutor(1) as pool:
        pool.submit(server.serve_forever, 0.05)
        monkeypatch.setenv("DOCKER_HOST", f"tcp://127.0.0.1:{server.server_port}")
        try:
            with pytest.raises(Unsupported, match=r"^docker: [^\n]*another host[^\n]*$"):
                DockerBackend().create()
        finally:
            server.shutdown()


@DOCKER
@pytest.mark.root
def test_a_containers_mounts_are_freed(
    backend: Backend, image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = backend.create(base=image)
    assert len(mounted()) == 2, mounted()  # its store: the overlays are seen by the container alone
    (child,) = box.fork(1)
    box.close()
    assert len(mounted()) == 4  # what the parent wrote is a layer of the child
    child.close()
    assert not mounted()
    for name in ("_run", "_accept", "_group"):
        with monkeypatch.context() as patch, pytest.raises(InfraError, match="boom"):
            patch.setattr(docker_backend, name, lambda *_: (_ for _ in ()).throw(OSError("boom")))
            backend.create(base=image)
        assert not mounted() and not leftovers(backend.run), name  # type: ignore[attr-defined]
    with monkeypatch.context() as patch, pytest.raises(InfraError, match=r"^[^\n]*overlay[^\n]*$"):
        patch.setattr(hoststore, "layers_at", lambda *_: ["no-such-layer"])
        backend.create(base=image)
    assert not mounted()
    box, start, calls = backend.create(base=image), backend.start, itertools.count()  # type: ignore[attr-defined]

    def second_fails(*args: object) -> object:
        if next(calls) == 1:
            raise InfraError("boom")
        return start(*args)

    monkeypatch.setattr(backend, "start", second_fails)
    with pytest.raises(InfraError, match="boom"):
        box.fork(3)
    box.close()
    assert not mounted() and not leftovers(backend.run)  # type: ignore[attr-defined]


@pytest.mark.docker
@pytest.mark.root
def test_stores_of_dead_owners_are_swept() -> None:
    code = "import os; from envs.sandbox import make_backend, cgroups\nbox = make_backend('docker').create()\n"
    code += "print(cgroups.owner_name(), flush=True); os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    owner = done.stdout.strip()
    assert owner and [path.name.startswith(owner) for path in hoststore.ROOT.glob(f"{owner}*")] == [True]
    assert [left for left in reaper.reap() if owner in left.name and not left.why]
    assert not list(hoststore.ROOT.glob(f"{owner}*")) and owner not in Path("/proc/self/mountinfo").read_text()


@pytest.mark.docker
@pytest.mark.root
def test_an_engine_that_does_not_see_the_mounts_is_one_line() -> None:
    code = "from envs.sandbox import make_backend\ntry: make_backend('docker')\nexcept ValueError as e: print(e)"
    command = ["unshare", "-m", "--propagation", "private", sys.executable, "-c", code]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.stdout.count("\n") == 1 and "mount namespace" in done.stdout, done


@DOCKER
def test_an_ordinary_users_container(backend: Backend, image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docker_backend, "unprivileged", lambda: True)
    monkeypatch.setattr(docker_backend, "mount_store", None)
    mine = DockerBackend()
    with mine.create(files={"a": b"1\n", "b": b"2\n"}) as box:
        sh(box, "rm a; echo 3 >>b; export A=4")
        (child,) = box.fork(1)
        with child:
            assert sh(child, "cat b; echo $A; echo 5 >c") == "2\n3\n4\n"
            assert dict(child.changes()) == dict(box.changes()) | {"c": FileChange(b"5\n")}
        assert dict(box.changes()) == {"a": FileChange(None), "b": FileChange(b"2\n3\n")}
    with mine.create(base=image, workdir="/work") as box:
        assert sh(box, "pwd; cat /repo/keep.txt") == "/work\nkeep\n"
        frozen = box.snapshot()
    monkeypatch.setenv(CAP, "0")
    make_room()
    with frozen, frozen.start() as again:  # what it stands on stayed
        assert sh(again, "pwd; cat /repo/keep.txt") == "/work\nkeep\n"
    with pytest.raises(Unsupported, match=r"^workdir='/repo': [^\n]*start as root[^\n]*$"):
        mine.create(base=image)
    mine.close()
