"""Layers, made from files and from what a sandbox wrote, and found again in a sandbox on them."""

import io
import os
import stat
import tarfile

import pytest

from envs.errors import Unsupported
from envs.sandbox import Limits
from envs.sandbox.archives import offer
from envs.sandbox.capture import TIME, Entry, capture, read_layer, tree_layer
from envs.sandbox.imagestore import ImageStore
from tests.envs.images import docker_archive, system, tar

TREE = {
    "a.py": Entry(b"a = 1\n"),
    "deep/run.sh": Entry(b"#!/bin/sh\n", 0o755),
    "deep/link": Entry(link="../a.py"),
    "n\u00e4me \udcff": Entry(b"odd"),
    "x" * 200 + "/" + "y" * 200: Entry(b"long"),
}


@pytest.fixture
def store(tmp_path, native):
    made = ImageStore(tmp_path / "images")
    offer(made.directory)
    return made


@pytest.fixture
def base(store, tmp_path):
    low = {"work/kept": b"", "work/gone": b"", "work/d/inner": b"", "work/e/inner": b"", "work/f": b"a file"}
    return store.add_base(str(docker_archive(tmp_path / "base.tar", [tar(system()), tar(low)])))


def test_a_layer_of_files_is_read_back():
    layer = tree_layer({**TREE, "deep/gone": None}, "/testbed")
    assert read_layer(io.BytesIO(layer), "testbed") == TREE
    assert layer == tree_layer(dict(reversed({**TREE, "deep/gone": None}.items())), "testbed")
    with tarfile.open(fileobj=io.BytesIO(layer)) as archive:
        members = {info.name: info for info in archive}
    assert "testbed/deep/.wh.gone" in members and members["testbed/deep"].isdir()
    assert {(info.uid, info.gid, info.mtime) for info in members.values()} == {(0, 0, TIME)}


SCRIPT = """set -e
mkdir -p new/sub; echo 1 > new/a; ln new/a new/sub/b; ln -s /etc/passwd new/out; ln -s . new/loop
echo > 'new/.wh.kept'; echo > $'new/\\xff\\nodd'
rm gone; rm -r d; rm -r e; mkdir e; echo 2 > e/other; rm f; mkdir f; echo 3 > f/a
set +e
"""


def test_what_a_sandbox_wrote_is_a_layer(store, base, native):
    with native.create(base=base, workdir="/work", limits=Limits(disk_mb=16)) as box:
        assert box.run(SCRIPT, timeout=20).ok
        box.write("new/x", b"run", mode=0o755)
        box.run("mkdir -p /opt/tool /tmp/t; echo t > /opt/tool/x; sleep 100 &", timeout=20)
        layers = []
        for keep in (
            lambda path: path == "work" or path.startswith("work/"),
            lambda path: not path.startswith(("work", "tmp")),
        ):
            out = io.BytesIO()
            box.layer(out, keep)
            layers.append(out.getvalue())
            again = io.BytesIO()
            box.layer(again, keep)
            assert again.getvalue() == out.getvalue()
        assert box.run("cat new/a", timeout=20).text() == "1\n"  # it goes on
    with tarfile.open(fileobj=io.BytesIO(layers[0])) as archive:
        assert {(info.uid, info.gid, info.mtime) for info in archive} == {(0, 0, TIME)}
    assert "tool" not in str(read_layer(io.BytesIO(layers[0]))) and "opt/tool/x" in read_layer(io.BytesIO(layers[1]))
    digest = store.extend(base, layers)
    with native.create(base=digest, workdir="/work", limits=Limits(disk_mb=16)) as box:
        shown = box.run("ls . d e f; cat new/a new/sub/b f/a; ls /opt/tool /tmp", timeout=20).text()
        assert shown == (
            "ls: cannot access 'd': No such file or directory\n.:\ne\nf\nkept\nnew\n\ne:\nother\n\nf:\na\n"
            "1\n1\n3\n/opt/tool:\nx\n\n/tmp:\n"
        )
        assert box.run("cd new; for name in *; do printf '%q ' \"$name\"; done; cd ..", timeout=20).text() == (
            "a loop out sub x $'\\377\\nodd' "
        )
        assert not box.changes()
        for check in ("! -u new/x", "-x new/x", "new/a -ef new/sub/b", "-L new/out"):
            assert box.run(f"test {check}", timeout=20).ok, check


def test_hostile_names_and_kinds_lead_nowhere(tmp_path):
    """The walk by itself, on a directory that holds what an upper directory may."""
    top = tmp_path / "top"
    (top / "d").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(b"secret")
    (top / "d" / "link").symlink_to(tmp_path / "secret")
    (top / "up").symlink_to("..")
    os.mkfifo(top / "fifo")
    (top / "d/.wh.a").write_bytes(b"")
    (top / "d/.wh..wh..opq").write_bytes(b"")
    at = top / "deep"
    for _ in range(200):
        at /= "x"
    at.mkdir(parents=True)
    fd = os.open(top, os.O_RDONLY)
    try:
        out = io.BytesIO()
        capture(fd, out, lambda path: True, 1 << 20)
        found = read_layer(io.BytesIO(out.getvalue()))
        assert found == {"d/link": Entry(link=str(tmp_path / "secret")), "up": Entry(link="..")}
        assert b".wh." not in out.getvalue() and b"fifo" not in out.getvalue()
        with (top / "holes").open("wb") as file:
            file.truncate(1 << 40)
        with pytest.raises(Unsupported, match="'holes' is larger than"):
            capture(fd, io.BytesIO(), lambda path: True, 1 << 20)
        capture(fd, io.BytesIO(), lambda path: path != "holes", 1 << 20)
    finally:
        os.close(fd)


@pytest.mark.root
def test_what_a_sandbox_deleted_is_marked(tmp_path):
    (tmp_path / "d").mkdir()
    os.mknod(tmp_path / "gone", stat.S_IFCHR)
    os.mknod(tmp_path / "null", stat.S_IFCHR, os.makedev(1, 3))
    os.setxattr(tmp_path / "d", "trusted.overlay.opaque", b"y")
    fd, out = os.open(tmp_path, os.O_RDONLY), io.BytesIO()
    capture(fd, out, lambda path: True, 1 << 20)
    os.close(fd)
    with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as archive:
        assert archive.getnames() == ["d", "d/.wh..wh..opq", ".wh.gone"]


def test_a_sandbox_from_a_snapshot_has_no_layer(native):
    with native.create() as box:
        (child,) = box.fork(1)
        with child, pytest.raises(Unsupported, match="goes on from a snapshot"):
            child.layer(io.BytesIO(), lambda path: True)
