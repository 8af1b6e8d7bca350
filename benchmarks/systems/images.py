"""Images as bases: what an episode on one costs beside its tests, and what one more task of the same repository takes.

The image is made here: this interpreter and a few tools of this host, pytest, and a small repository with its tests. A
second one stands for another task: the same layers, and above them a small one with the files of another commit.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import resource
import secrets
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from benchmarks.systems.base import row
from benchmarks.systems.node import kept
from envs.errors import CodeworldError
from envs.sandbox import Sandbox
from envs.sandbox.bases import Base, find_base
from envs.sandbox.layers import discard, layers_dir
from envs.sandbox.native import NativeBackend

PYTHON = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
TOOLS = ("bash", "env", "cat", "ls", "rm", "mkdir", "sed", "grep")
PACKAGES = ("pytest", "pluggy", "iniconfig", "packaging", "pygments")
SITE = "opt/site"
UNUSED = frozenset(("test", "tests", "idlelib", "turtledemo", "ensurepip", "lib2to3", "tkinter", "site-packages"))
TEST = f"{PYTHON} -S -m pytest -q"
"""-S: what else is installed beside this interpreter is not in the image, and not to be loaded without it either."""
FILES = 40
MODULE = "def busy(n):\n    total = 0\n    for i in range(n):\n        total += i * i % 7\n    return total\n"
CASE = """\
import json

import pytest

from pkg.m{0} import busy


@pytest.mark.parametrize("n", [{1}])
def test_{0}(n, tmp_path):
    (tmp_path / "out.json").write_text(json.dumps([busy(i) for i in range(n, n + 4)]))
    assert len(json.loads((tmp_path / "out.json").read_text())) == 4
"""
EDITED = ("pkg/m0.py", "pkg/m1.py")
EDITS = 20


OVERHEAD = "overhead of an episode on an image (2 edits, 2 test runs, diff, grading): CPU"
LAYER = "one more task of a repository: layer cache"
DIFF = "changes: 20 edits in 5000 files that the image holds"
IDLE = "one more task of a repository: memory of an idle sandbox, charged to its cgroup"
LANE = "native, image"


def measure(rounds: int, work: int, idle: int) -> Iterator[list[dict[str, Any]]]:
    """Lists of rows. work: how much each of the repository's tests computes; idle: sandboxes whose memory is looked at."""
    with tempfile.TemporaryDirectory(prefix="codeworld-images-") as directory:
        layers: tuple[str, ...] = ()
        try:
            image, task, tree = make_images(Path(directory), work)
            further, first = find_base(str(task)), find_base(str(image))
            layers = (*further.layers[1:], find_base(str(tree)).layers[1])  # all but what every image has on top
            yield overhead(str(image), first, rounds)
            yield further_task(str(task), set(further.layers) - set(first.layers), idle)
            yield diff_of_a_tree(str(tree), 4 * rounds)
        except (CodeworldError, PackageNotFoundError, RuntimeError, OSError) as error:
            yield [row(OVERHEAD, None, unit="%", goal="<=5", backend=LANE, why=" ".join(f"{error}".split())[:300])]
        finally:
            discard(layers)


def overhead(image: str, base: Base, rounds: int) -> list[dict[str, Any]]:
    """CPU time of episodes above that of the same test runs without a sandbox: same files, same environment."""
    ours: list[float] = []
    bare: list[float] = []
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # as in a sandbox, what tests write is in memory
    with tempfile.TemporaryDirectory(prefix="codeworld-bare-", dir=memory) as scratch:
        both = [(partial(episode, image), ours), (partial(plainly, base, Path(scratch)), bare)]
        for at in range(rounds):
            for call, times in both if at % 2 else both[::-1]:
                times.append(cpu_of(call))
    percent = 100 * (statistics.median(ours) / statistics.median(bare) - 1)
    spread = {"episode s": sorted(ours), "bare s": sorted(bare)}
    return [row(OVERHEAD, percent, unit="%", goal="<=5", n=rounds, spread=spread, backend=LANE)]


def further_task(image: str, layers: set[str], idle: int) -> list[dict[str, Any]]:
    """Disk and memory that one more image of a repository takes; `layers` are its own."""
    paths = [path for name in layers for path in (layers_dir() / name, *(layers_dir() / name).rglob("*"))]
    blocks = sum(path.lstat().st_blocks for path in paths)  # of 512 bytes
    with kept(idle, base=image) as boxes:
        charged = [used / 1024 for box in boxes if (used := box.usage().memory) is not None]
    memory, why = (statistics.median(charged), "") if charged else (None, "no cgroups here")
    return [
        row(LAYER, blocks / 2, unit="KiB", backend=LANE),
        row(IDLE, memory, unit="KiB", n=len(charged), backend=LANE, why=why),
    ]


def diff_of_a_tree(image: str, rounds: int) -> list[dict[str, Any]]:
    """Time of `changes()`, which looks at what was touched, whatever the size of the tree."""
    with kept(1, base=image) as (box,):
        box.run(f"for i in {{1..{EDITS}}}; do echo x >>d$i/f0.py; done", timeout=60)
        times = []
        for _ in range(rounds):
            began = time.perf_counter()
            found = len(box.changes())
            times.append(1e3 * (time.perf_counter() - began))
    if found != EDITS:
        raise RuntimeError(f"{EDITS} files were edited, {found} are among the changes")
    return [
        row(
            DIFF,
            statistics.median(times),
            unit="ms",
            n=rounds,
            spread={"least and most": [round(min(times), 3), round(max(times), 3)]},
            backend=LANE,
        )
    ]


def cpu_of(call: Callable[[], None]) -> float:
    """CPU seconds of a call: of this process, and of all that it started and that has ended and was waited for."""
    before = _cpu()
    call()
    return round(_cpu() - before, 4)


def _cpu() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def episode(image: str) -> None:
    """Edit, test, edit, test, and the grading in a sandbox of its own. The backend's helper is part of it."""
    backend = NativeBackend()
    try:
        with backend.create(base=image) as box:
            for path in EDITED:
                box.write(path, edited(box.read(path)))
                tested(box)
            changes = box.changes()
            box.kill_all()  # what still runs when a namespace ends is in nobody's children's time
        if not set(EDITED) <= changes.keys():
            raise RuntimeError(f"the edits of {EDITED} are not among the changes: {sorted(changes)}")
        with backend.create(base=image, files=changes) as grader:
            tested(grader)
            grader.kill_all()
    finally:
        backend.close()


def tested(box: Sandbox) -> None:
    """The repository's tests, which pass."""
    result = box.run(TEST, timeout=120)
    if not result.ok:
        raise RuntimeError(f"tests in {box.id} ended with {result.cause} {result.exit}: {result.text()[-300:]}")


def plainly(base: Base, scratch: Path) -> None:
    """The same test runs in an unpacked copy of the repository; what comes between them is not done."""
    top, layers = scratch / "bare", [layers_dir() / name for name in base.layers]
    repository, site = (next(x / name for x in layers if (x / name).is_dir()) for name in ("repo", SITE))
    shutil.rmtree(top, ignore_errors=True)
    shutil.copytree(repository, top)
    env = {**base.env, "PYTHONPATH": str(site), "HOME": str(scratch), "TMPDIR": str(scratch)}
    for run in range(3):
        if run < len(EDITED):
            (top / EDITED[run]).write_bytes(edited((top / EDITED[run]).read_bytes()))
        done = subprocess.run(["bash", "-c", TEST], cwd=top, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"tests without a sandbox ended with {done.returncode}: {done.stdout[-300:]}")


def edited(source: bytes) -> bytes:
    """The file after an edit that keeps what it does."""
    return source.replace(b"total = 0", b"total = int()")


# ---- the images ----


def make_images(directory: Path, work: int) -> tuple[Path, Path, Path]:
    """Archives of an image, of another that adds one small layer, and of one with a large tree, as `docker save` writes
    them."""
    mark: dict[str, Path | bytes] = {".run": secrets.token_bytes(8)}  # no other run has, or removes, these layers
    repository = _tar({**_packages(), **_repository(work), **mark})
    system = _tar({**_system(), **mark})
    commit = _tar(mark | {f"repo/pkg/m{i}.py": MODULE.encode() + b"\n\nNEXT = 1\n" for i in range(3)})
    tree = _tar(mark | {f"repo/d{i}/f{j}.py": f"# {i} {j}\n".encode() * 40 for i in range(100) for j in range(50)})
    return (
        _archive(directory / "first.tar", [system, repository]),
        _archive(directory / "further.tar", [system, repository, commit]),
        _archive(directory / "tree.tar", [system, tree]),
    )


def _system() -> dict[str, Path | bytes]:
    """A root with this interpreter, its library, and tools."""
    library = Path(sysconfig.get_path("stdlib", vars={"base": str(Path(PYTHON).parent.parent)})).resolve()
    programs = [Path(found) for found in map(shutil.which, TOOLS) if found]
    found: dict[str, Path | bytes] = {f"bin/{path.name}": path for path in programs}
    found[PYTHON.lstrip("/")] = Path(PYTHON)
    for path in library.rglob("*"):
        inside = path.relative_to(library).parts
        if path.is_file() and not UNUSED & set(inside) and ".opt-" not in path.name and path.suffix != ".a":
            found[str(path).lstrip("/")] = path
    compiled = [str(path) for path in (library / "lib-dynload").glob("*.so")]
    listed = subprocess.run(["ldd", PYTHON, *map(str, programs), *compiled], capture_output=True, text=True).stdout
    for word in listed.split():
        if word.startswith("/") and not word.endswith(":"):
            found[word.lstrip("/")] = Path(word)
    return found


def _packages() -> dict[str, Path | bytes]:
    """pytest and what it needs, as they are installed here."""
    found: dict[str, Path | bytes] = {}
    for name in PACKAGES:
        for file in distribution(name).files or ():
            path = Path(str(file.locate()))
            if ".." not in file.parts and path.is_file():
                found[f"{SITE}/{file}"] = path
    return found


def _repository(work: int) -> dict[str, Path | bytes]:
    found = {f"repo/pkg/m{i}.py": MODULE for i in range(FILES)}
    found |= {f"repo/tests/test_{i}.py": CASE.format(i, work) for i in range(FILES)}
    found |= {"repo/pkg/__init__.py": "", "repo/conftest.py": ""}
    return {path: text.encode() for path, text in found.items()}


def _tar(files: dict[str, Path | bytes]) -> bytes:
    """An archive of path → file of the host or content; times are kept, for they say whether compiled Python is current."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, value in files.items():
            entry = tarfile.TarInfo(name)
            data = value if isinstance(value, bytes) else value.read_bytes()
            if isinstance(value, Path):
                status = value.stat()
                entry.mode, entry.mtime = status.st_mode & 0o777, int(status.st_mtime)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def _archive(path: Path, layers: Sequence[bytes]) -> Path:
    digests = [f"sha256:{hashlib.sha256(layer).hexdigest()}" for layer in layers]
    config = {"rootfs": {"diff_ids": digests}, "config": {"Env": [f"PYTHONPATH=/{SITE}"]}}
    names = [f"{at}.tar" for at in range(len(layers))]
    manifest = [{"Config": "config.json", "Layers": names}]
    whole: dict[str, Path | bytes] = dict(zip(names, layers, strict=True))
    path.write_bytes(
        _tar(whole | {"manifest.json": json.dumps(manifest).encode(), "config.json": json.dumps(config).encode()})
    )
    return path
