"""Images as bases: every form of archive, changes and forks over layers, and archives that must be refused."""

from __future__ import annotations

import gzip
import hashlib
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from envs.errors import Unsupported
from envs.sandbox import Backend, FileChange, Sandbox, make_backend
from envs.sandbox.bases import layers_dir
from envs.sandbox.unpack import unpack
from tests.envs.images import Entries, docker_archive, entry, system, tar

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


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    made = make_backend("native")
    yield made
    made.close()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Layers of its own for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    from envs.sandbox import bases

    for cached in (bases._host, bases._top, bases._archive_at, bases._docker_image):
        cached.cache_clear()
    return layers_dir()


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


LAYERS = [tar(SYSTEM | LOWER), tar(UPPER)]
FORMS: list[Callable[[Path], Path]] = [
    plain,
    compressed,
    lambda path: docker_archive(path / "saved.tar", LAYERS),
    lambda path: oci_layout(path / "oci", LAYERS),
]


@pytest.mark.native
@pytest.mark.parametrize("form", FORMS, ids=["plain", "gzip", "docker save", "oci layout"])
def test_every_form_of_image(backend: Backend, tmp_path: Path, form: Callable[[Path], Path]) -> None:
    with backend.create(base=str(form(tmp_path)), files={"new.txt": b"new\n"}) as box:
        found = sh(
            box, "shopt -s globstar nullglob; for f in **/*; do [[ -f $f && ! -L $f ]] && echo $f; done; :"
        ).split()
        assert set(found) == IN_IMAGE | {"new.txt"} and dict(box.changes()) == {}
        assert sh(box, "id -u; pwd; cat link; : </dev/null && echo ok; ls /proc/self/stat") == (
            "0\n/repo\nkeep\nok\n/proc/self/stat\n"
        )
        assert sh(box, "echo $COLOUR $HOME") == ("/root\n" if form in (plain, compressed) else "red /home\n")


@pytest.mark.parametrize(("written", "kept"), [(1_000_000_007, 1_000_000_007), (-5, 0), (1 << 50, (1 << 31) - 1)])
def test_files_keep_their_times(tmp_path: Path, written: int, kept: int) -> None:
    file = entry(tarfile.REGTYPE)
    file.mtime = written
    (tmp_path / "root.tar").write_bytes(tar({"a.py": file}))
    with (tmp_path / "root.tar").open("rb") as stream:
        unpack(stream, tmp_path / "to", "x")
    assert (tmp_path / "to/a.py").stat().st_mtime == kept, "compiled Python is used only beside its source's time"


@pytest.fixture
def image(tmp_path: Path) -> str:
    return str(docker_archive(tmp_path / "saved.tar", LAYERS))


@pytest.mark.native
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
                "rm -rf pkg moved; mkdir pkg; echo 2 >pkg/z; echo 'a = 1' >pkg/a.py; cat /tmp/x /etc/x; rm keep.txt; mkdir keep.txt",
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


@pytest.mark.native
def test_a_world_broken_from_inside_gives_no_way_out(backend: Backend, image: str, tmp_path: Path) -> None:
    """What starts from it is set up by the launcher, which must not follow what the policy left there."""
    for script in (
        f"mv /tmp /t; ln -s {tmp_path} /tmp",
        "rm -r /repo; ln -s /etc /repo",
        "mkdir /e; mv /etc/hosts /e",
    ):
        with backend.create(base=image) as box:
            sh(box, f"cd /; {script}")
            try:
                (child,) = box.fork(1)
            except Exception as error:
                assert "\n" not in str(error) and "directory" in str(error), error
            else:
                with child:
                    child.run("echo x >/tmp/escaped", timeout=5)
    assert not (tmp_path / "escaped").exists()


@pytest.mark.native
def test_images_share_their_layers(backend: Backend, tmp_path: Path, cache: Path) -> None:
    one = docker_archive(tmp_path / "one.tar", LAYERS)
    two = docker_archive(tmp_path / "two.tar", [*LAYERS, tar({"repo/two.txt": b"2\n"})])
    with backend.create(base=str(one)):
        before = {path.name for path in cache.iterdir()}
    with backend.create(base=str(two)) as box:
        assert sh(box, "cat two.txt keep.txt") == "2\nkeep\n"
    assert len({path.name for path in cache.iterdir()} - before) == 1
    with backend.create(base=str(one)) as box:
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
    left = {path.name for path in cache.iterdir()} - {".lock"}
    assert not {name for name in left if name.startswith(".")}, left
    return str(caught.value)


@pytest.mark.native
@pytest.mark.parametrize("name", BAD)
def test_hostile_archives_are_refused(backend: Backend, tmp_path: Path, cache: Path, name: str) -> None:
    (tmp_path / "bad.tar").write_bytes(tar({**SYSTEM, **BAD[name]}))
    refused(backend, tmp_path / "bad.tar", cache)
    refused(backend, docker_archive(tmp_path / "image.tar", [tar(BAD[name])]), cache)
    assert not list(cache.glob("[0-9a-f]*"))


@pytest.mark.native
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
    assert "no bash" in refused(backend, tmp_path / "shellless.tar", cache)
    lie = docker_archive(tmp_path / "lie.tar", [tar(LOWER)], [hashlib.sha256(LAYERS[0]).hexdigest()])
    assert "digest" in refused(backend, lie, cache)
    assert not (cache / hashlib.sha256(LAYERS[0]).hexdigest()[:24]).exists()


@pytest.mark.native
@pytest.mark.docker
def test_a_local_docker_image(backend: Backend, cache: Path) -> None:
    with backend.create(base="codeworld-base") as box:
        assert sh(box, "python3 -c 'print(6 * 7)'; id -un") == "42\nroot\n"
        sh(box, "echo x >/usr/lib/x && rm -r /usr/lib/python3*")
    with backend.create(base="codeworld-base") as box:
        assert sh(box, "python3 -c 'print(6 * 7)'; ls /usr/lib/x || :").startswith("42\n")
    assert "docker pull" in refused(backend, "no-such-image:here", cache)
