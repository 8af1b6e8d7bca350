"""Images in a directory: what is in it, what is refused, and what a kill leaves."""

import gzip
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time

import pytest

from envs.errors import Unsupported
from envs.sandbox import make_backend
from envs.sandbox.archives import offer, offered
from envs.sandbox.bases import find_base
from envs.sandbox.imagestore import ImageStore
from tests.envs.images import docker_archive, system, tar

LOW, HIGH = tar({"low": b"1"}), tar({"high": b"2"})


@pytest.fixture
def store(tmp_path):
    return ImageStore(tmp_path / "images")


def save(path, store, digest):
    path.write_bytes(b"".join(store.archive(digest)))
    return path


def test_an_image_comes_in_and_is_extended(store, tmp_path):
    base = store.add_base(str(docker_archive(tmp_path / "base.tar", [LOW])))
    digest = store.extend(base, [HIGH], env={"PATH": "/x", "A": "1"}, workdir="/w", labels={"a": "b"})
    assert digest == store.extend(base, [HIGH], env={"PATH": "/x", "A": "1"}, workdir="/w", labels={"a": "b"})
    config = store.config(digest)
    assert set(config["config"]["Env"]) == {"COLOUR=red", "HOME=/home", "PATH=/x", "A=1"}
    assert config["config"]["WorkingDir"] == "/w" and len(config["history"]) == 2
    assert store.layers(digest) == [f"sha256:{hashlib.sha256(layer).hexdigest()}" for layer in (LOW, HIGH)]
    assert store.images().keys() == {base, digest} and store.labels(base) == {} and store.labels(digest) == {"a": "b"}
    assert store.find({"a": "b"}) == digest and store.find({"a": "c"}) is None
    assert store.size(digest) == len(LOW + HIGH) and store.size(digest, beyond=base) == len(HIGH)
    (tmp_path / "high.tar").write_bytes(HIGH)
    assert store.extend(base, [tmp_path / "high.tar"]) != digest
    with pytest.raises(KeyError):
        store.config("sha256:" + "0" * 64)


def test_images_come_in_by_every_way(store, tmp_path):
    """Of `docker save`, an OCI layout, with compressed layers, a plain root file system."""
    first = store.add_base(str(docker_archive(tmp_path / "base.tar", [LOW, HIGH])))
    assert store.add_base(str(save(tmp_path / "again.tar", store, first))) == first
    assert ImageStore(tmp_path / "other").add_base(str(store.directory)) == first
    squeezed = docker_archive(tmp_path / "gz.tar", [gzip.compress(LOW)], [hashlib.sha256(LOW).hexdigest()])
    plain = tmp_path / "root.tar.gz"
    plain.write_bytes(gzip.compress(LOW))
    for path in (squeezed, plain):
        assert store.layers(store.add_base(str(path))) == [f"sha256:{hashlib.sha256(LOW).hexdigest()}"]


def test_what_is_no_image_is_refused_in_a_line(store, tmp_path):
    def refused(path, why):
        with pytest.raises(Unsupported, match=why) as told:
            store.add_base(str(path))
        assert "\n" not in str(told.value)

    (tmp_path / "text.tar").write_bytes(b"no archive")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "absent.tar", "no such file")
    refused(tmp_path / "text.tar", "not a readable archive")
    refused(docker_archive(tmp_path / "lie.tar", [LOW], ["0" * 64]), "other content than its digest")
    refused(tmp_path / "empty", "without a readable manifest")
    refused("no-such-image-here:latest", "no such local Docker image|no such file")
    assert store.images() == {}


def test_what_is_not_needed_is_removed(store, tmp_path):
    base = store.add_base(str(docker_archive(tmp_path / "base.tar", [LOW])))
    one, two = store.extend(base, [HIGH]), store.extend(base, [tar({"two": b"2" * 5000})])
    assert store.retain([one]) >= 5000
    assert store.images().keys() == {one} and not store.blob(two).exists()
    assert set(store.layers(one)) == {
        f"sha256:{path.name}" for path in (store.directory / "blobs/sha256").iterdir() if path.stat().st_size >= 10240
    }
    with pytest.raises(KeyError):
        store.retain([two])
    assert store.config(one)


def test_a_directory_that_can_not_be_written_is_said(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match="name a directory that can be written"):
        ImageStore(tmp_path / "file" / "images")


def test_offered_images_are_found_by_digest(store, tmp_path, native):
    base = store.add_base(str(docker_archive(tmp_path / "base.tar", [tar(system())])))
    digest = store.extend(base, [tar({"work/hello": b"hi\n"})], env={"COLOUR": "blue"})
    with pytest.raises(Unsupported):
        find_base(digest)
    offer(store.directory)
    assert offered(digest) == store.directory and offered("sha256:../../etc") is None and offered("host") is None
    with native.create(base=digest, workdir="/work") as box:
        assert box.run("cat hello; echo $COLOUR", timeout=20).text() == "hi\nblue\n"
    with native.create(base=str(store.directory), workdir="/work") as box:
        assert box.run("echo $COLOUR", timeout=20).text() == "red\n"  # as a layout: its first image


def test_changed_blobs_are_refused(store, tmp_path, native):
    base = store.add_base(str(docker_archive(tmp_path / "base.tar", [tar(system())])))
    one, two = store.extend(base, [tar({"x": os.urandom(8)})]), store.extend(base, [tar({"y": os.urandom(8)})])
    offer(store.directory)
    layer = store.blob(store.layers(one)[-1])
    layer.write_bytes(tar({"x": b"evil"}))
    with pytest.raises(Unsupported, match="other content than its digest"):
        find_base(one)
    store.blob(two).write_bytes(store.blob(two).read_bytes().replace(b"red", b"bad"))
    with pytest.raises(Unsupported, match="other content than its digest"):
        find_base(two)
    odd = hashlib.sha256(b"[]").hexdigest()
    store.blob(odd).write_bytes(b"[]")
    with pytest.raises(Unsupported, match="without a readable manifest"):
        find_base(f"sha256:{odd}")


@pytest.mark.docker
def test_an_engine_is_given_what_it_lacks(store, tmp_path):
    import docker

    base = store.add_base(str(docker_archive(tmp_path / "base.tar", [tar(system())])))
    one, two = (store.extend(base, [tar({"work/n": os.urandom(8).hex().encode()})]) for _ in range(2))
    offer(store.directory)
    backend, client = make_backend("docker"), docker.from_env()
    try:
        for digest in (one, two):
            with backend.create(base=digest, workdir="/work") as box:
                assert len(box.run("cat n", timeout=20).text()) == 16
        assert client.images.get(one).id == one
    finally:
        backend.close()
        for digest in (one, two):
            client.images.remove(digest, force=True)
        client.close()


WRITER = """
import io, os, sys, tarfile
from envs.sandbox.imagestore import ImageStore
store = ImageStore(sys.argv[1])
base = store.add_base(sys.argv[2])
for number in range(1000):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo(f"{os.getpid()}-{number}"); info.size = 30000
        tar.addfile(info, io.BytesIO(os.urandom(30000)))
    print(store.extend(base, [out.getvalue()]), flush=True)
"""


def test_a_kill_at_any_instant_leaves_whole_images(store, tmp_path):
    archive = docker_archive(tmp_path / "base.tar", [LOW])
    rng, told = random.Random(4), set()
    for _ in range(4):
        command = [sys.executable, "-c", WRITER, str(store.directory), str(archive)]
        pair = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]  # two builders at once
        firsts = [writer.stdout.readline() for writer in pair]
        time.sleep(rng.uniform(0.0, 0.1))
        for writer in pair:
            writer.send_signal(signal.SIGKILL)
        lines = [*firsts, *(line for writer in pair for line in writer.communicate()[0].splitlines(keepends=True))]
        told |= {line.strip() for line in lines if line.endswith("\n")}
        images = ImageStore(store.directory).images()
        assert told <= images.keys()  # what was said to be there is there
        for digest in images:
            assert hashlib.sha256(store.blob(digest).read_bytes()).hexdigest() == digest.removeprefix("sha256:")
            for layer in store.layers(digest):
                assert f"sha256:{hashlib.sha256(store.blob(layer).read_bytes()).hexdigest()}" == layer
    assert len(told) >= 8


def test_the_layout_is_the_standards(store, tmp_path):
    base = store.add_base(str(docker_archive(tmp_path / "base.tar", [LOW])))
    assert json.loads((store.directory / "oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}
    (entry,) = json.loads((store.directory / "index.json").read_bytes())["manifests"]
    manifest = json.loads(store.blob(entry["digest"]).read_bytes())
    assert manifest["config"]["digest"] == base and manifest["layers"][0]["size"] == len(LOW)
    with tarfile.open(fileobj=io.BytesIO(b"".join(store.archive(base)))) as archive:
        listed = json.load(archive.extractfile("manifest.json"))
        assert archive.extractfile(listed[0]["Layers"][0]).read() == LOW
