"""The cache of layers: its cap, what is in use, processes that die or race in the middle of it."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from envs.errors import Unsupported
from envs.sandbox import doctor, layers
from envs.sandbox.bases import find_base, standing_on
from envs.sandbox.layers import layers_dir
from envs.sandbox.native import NativeBackend
from envs.sandbox.unpack import remove_tree
from tests.envs.images import docker_archive, system, tar

ROOT = Path(__file__).parents[2]
SYSTEM = tar(system())
MB = 1_000_000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return layers_dir()


@pytest.fixture
def backend(cache: Path) -> Iterator[NativeBackend]:
    made = NativeBackend()
    yield made
    made.close()


def image(tmp_path: Path, name: str, mb: int = 2) -> str:
    """An archive of two layers: the system, which all share, and one of `mb` megabytes."""
    return str(docker_archive(tmp_path / f"{name}.tar", [SYSTEM, tar({f"repo/{name}": os.urandom(mb * MB)})]))


def own(name: str) -> str:
    """The layer of an image that no other has."""
    return find_base(name).layers[1]


def capped(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    monkeypatch.setenv(layers.CAP, repr(size / 1e9))


def rubbish(cache: Path) -> set[str]:
    names = {path.name for path in cache.iterdir()}
    whole = {name for name in names if not name.startswith(".")}
    return (names - whole - {".lock", ".use"}) | (whole ^ {path.name for path in (cache / ".use").iterdir()})


def script(code: str, *args: str, **env: str) -> subprocess.Popen[str]:
    """Another process."""
    command = [sys.executable, "-c", code, *args]
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **env}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_least_recently_used_out_first(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [image(tmp_path, name) for name in "abc"]
    a, b = map(own, images[:2])
    count, size = layers.usage()
    on_disk = int(subprocess.run(["du", "-s", "-B1", cache], capture_output=True, text=True).stdout.split()[0])
    assert count == 4 and abs(size - on_disk) < 100_000  # with the system and what is above every image
    find_base(images[0])
    capped(monkeypatch, size)  # as much as there is: one more, and one goes
    c = own(images[2])
    assert {name for name in (a, b, c) if (cache / name).is_dir()} == {a, c}
    assert layers.usage()[1] <= size and not rubbish(cache)
    assert find_base(images[1]).layers[1] == b and (cache / b).is_dir() and not (cache / a).exists()
    capped(monkeypatch, 0)
    layers.make_room()
    assert layers.usage() == (0, 0) and not rubbish(cache)


@pytest.mark.native
def test_what_is_in_use_stays(
    tmp_path: Path, backend: NativeBackend, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = image(tmp_path, "a")
    box = backend.create(base=name)
    used = set(find_base(name).layers)
    capped(monkeypatch, 0)

    def kept() -> bool:
        layers.make_room()
        return {path.name for path in cache.glob("[0-9a-f]*")} >= used

    assert kept()
    (child,) = box.fork(1)
    box.close()
    frozen = child.snapshot()
    child.close()
    assert kept()
    with frozen.start() as again:
        assert again.run("ls a", timeout=20).text() == "a\n"
        frozen.close()
        assert kept() and again.run("ls a", timeout=20).ok
    assert not kept() and layers.usage() == (0, 0)
    with backend.create(base=name) as box:  # remembered, but gone
        assert box.run("ls a", timeout=20).text() == "a\n" and kept()
    with pytest.raises(ValueError, match="workdir"):
        backend.create(base=name, workdir="/proc")
    with pytest.raises(Unsupported, match="link or a file|without links"):
        backend.create(base=name, workdir="/bin/bash/x")
    assert not kept()


LIVE = """
import sys
from envs.sandbox.native import NativeBackend
box = NativeBackend().create(base=sys.argv[1])
print("ready", flush=True)
for line in sys.stdin:
    print(box.run("ls a", timeout=20).text().strip(), flush=True)
"""


@pytest.mark.native
def test_the_sandboxes_of_another_process_stay(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = image(tmp_path, "a")
    used = set(find_base(name).layers)
    with script(LIVE, name) as other:
        assert other.stdin and other.stdout and other.stdout.readline() == "ready\n"
        capped(monkeypatch, 0)
        own(image(tmp_path, "b"))
        layers.make_room()
        assert {path.name for path in cache.glob("[0-9a-f]*")} == used
        other.stdin.write("\n")
        other.stdin.flush()
        assert other.stdout.readline() == "a\n"
        other.kill()
    layers.make_room()
    assert layers.usage() == (0, 0) and not rubbish(cache)


def test_a_base_evicted_by_another_process_is_unpacked_again(tmp_path: Path, cache: Path) -> None:
    name = image(tmp_path, "a")
    base = find_base(name)
    evict = script("from envs.sandbox import layers; layers.make_room()", **{layers.CAP: "0"})
    evict.communicate()
    assert evict.returncode == 0 and layers.usage() == (0, 0)
    with standing_on(name) as again:
        assert again == base and all((cache / layer).is_dir() for layer in base.layers)
        evict = script("from envs.sandbox import layers; layers.make_room()", **{layers.CAP: "0"})
        evict.communicate()
        assert all((cache / layer).is_dir() for layer in base.layers)


KILLED = """
import os, sys, shutil
from pathlib import Path
from envs.sandbox import layers, unpack
from envs.sandbox.bases import find_base

def die(*_, **__): os.kill(os.getpid(), 9)

def dying(real, when, after=False):
    def call(*args, **kwargs):
        hit = when in str(args[0])
        if hit and not after: die()
        result = real(*args, **kwargs)
        if hit: die()
        return result
    return call

exec(sys.argv[2])
os.environ["CODEWORLD_CACHE_GB"] = "0"
find_base(sys.argv[1])
"""
INSTANTS = {
    "unpacking": "shutil.copyfileobj = die",
    "unpacked": "layers._note = die",
    "before it is there": "Path.rename = dying(Path.rename, '.draft')",
    "when it is there": "Path.rename = dying(Path.rename, '.draft', True)",
    "before it is evicted": "real = Path.rename; Path.rename = lambda a, b: die() if '.gone' in str(b) else real(a, b)",
    "evicted": "Path.unlink = dying(Path.unlink, '.use')",
    "before it is removed": "layers.remove_tree = dying(layers.remove_tree, '.gone')",
    "removing": "shutil.rmtree = dying(shutil.rmtree, '.gone')",
}


@pytest.mark.parametrize("instant", INSTANTS)
def test_killed_at_any_instant(tmp_path: Path, cache: Path, instant: str) -> None:
    names = [image(tmp_path, "a", 1), image(tmp_path, "b", 1)]
    find_base(names[0])
    with script(KILLED, names[1], INSTANTS[instant]) as other:
        other.wait()
    assert other.returncode == -9
    for name in reversed(names):
        base = find_base(name)
        text = "a" if name == names[0] else "b"
        assert (cache / base.layers[1] / "repo" / text).stat().st_size == MB and (
            cache / base.layers[2] / "bin/bash"
        ).exists()
    layers.make_room()
    assert not rubbish(cache) and layers.usage()[0] == 4
    assert all(int(path.read_bytes()) > 0 for path in (cache / ".use").iterdir())


RACE = """
import random, sys, time
from envs.sandbox import layers
from envs.sandbox.bases import standing_on
unpack, unpacked = layers.unpack, []
layers.unpack = lambda *args: (unpacked.append(args), unpack(*args))[1]
end, done = time.monotonic() + float(sys.argv[1]), 0
while time.monotonic() < end or not done:
    with standing_on(random.choice(sys.argv[2:])) as base:
        assert all((layers.layers_dir() / layer).is_dir() for layer in base.layers)
        assert (layers.layers_dir() / base.layers[1] / "bin/bash").stat().st_size == 9
        time.sleep(random.random() / 500)
        assert all((layers.layers_dir() / layer).is_dir() for layer in base.layers)
        done += 1
    layers.make_room()
    time.sleep(random.random() / 100)
print(done, len(unpacked))
"""


def test_processes_that_race(tmp_path: Path, cache: Path) -> None:
    """Nothing is ever kept that nobody stands on, so each evicts what another is about to use, all the time."""
    names = []
    for number in range(3):
        shared, top = tar({"repo/shared": b"x" * 100}), tar({"bin/bash": b"bash %04d" % number})
        names.append(str(docker_archive(tmp_path / f"{number}.tar", [shared, top])))
    others = [script(RACE, "2", *names, **{layers.CAP: "0"}) for _ in range(3)]
    counts = [list(map(int, other.communicate()[0].split())) for other in others]
    assert all(other.returncode == 0 for other in others), counts
    assert all(done > 5 and unpacked > 5 for done, unpacked in counts), counts
    layers.make_room()
    layers.discard([path.name for path in cache.glob("[0-9a-f]*")])
    assert layers.usage() == (0, 0) and not rubbish(cache)


def test_one_unpacks_and_the_others_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, calls, real = image(tmp_path, "a"), [], layers.unpack

    def unpack(*args: object) -> str:
        calls.append(threading.get_ident())
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(layers, "unpack", unpack)
    threads = [threading.Thread(target=find_base, args=[name]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 3


def test_a_cache_of_before_is_taken_over(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = image(tmp_path, "a")
    before, size = find_base(name), layers.usage()
    remove_tree(cache / ".use")
    layers._layers_dir.cache_clear()
    monkeypatch.setattr(layers, "unpack", lambda *_: pytest.fail("unpacked again"))
    assert find_base(name) == before and layers.usage() == size and not rubbish(cache)


def test_a_cache_that_is_deleted_is_made_again(tmp_path: Path, cache: Path) -> None:
    name = image(tmp_path, "a")
    find_base(name)
    remove_tree(cache.parent)
    assert (cache / own(name) / "repo/a").is_file()


@pytest.mark.parametrize("value", ["lots", "-1", "nan", "4 GB"])
def test_a_cap_that_is_no_number(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(layers.CAP, value)
    with pytest.raises(ValueError, match=rf"^{layers.CAP}='{value}': [^\n]*gigabytes[^\n]*$"):
        NativeBackend()
    assert "gigabytes" in doctor._cache()[1]


def test_the_doctor_tells_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_base(image(tmp_path, "a", 30))
    monkeypatch.setenv(layers.CAP, "")
    size = f"{layers.usage()[1] / 1e9:.2f}"
    assert doctor._cache() == ("image layers", f"3, {size} of 40 GB", "")
    monkeypatch.setenv(layers.CAP, "0.01")
    assert doctor._cache()[1].endswith("of 0.01 GB") and layers.CAP in doctor._cache()[2]
    monkeypatch.setenv(layers.CAP, "inf")
    assert layers.cap() > 1 << 60


def test_a_damaged_stream_is_one_line(tmp_path: Path, cache: Path) -> None:
    data = bytearray(gzip.compress(SYSTEM, 1))
    data[len(data) // 2 : len(data) // 2 + 64] = b"\xff" * 64
    (tmp_path / "bad.tar.gz").write_bytes(data)
    with pytest.raises(Unsupported, match=r"^base=[^\n]*not a readable archive[^\n]*$"):
        find_base(str(tmp_path / "bad.tar.gz"))
    assert not rubbish(cache)
