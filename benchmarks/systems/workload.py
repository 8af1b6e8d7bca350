"""What every sandbox is put through, ours and others' alike: one file of plain Python, for each is timed in its own process.

A `world` makes boxes: `start(files)` gives one that holds the files (path → text, in its work directory). A box has
`run(script)` (its output; raises where the status is not 0) and `close()`, and may have `fork(n)` and `changed()` (how many
paths changed since its files were put). Times are wall seconds.
"""

from __future__ import annotations

import itertools
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from shlex import quote
from typing import Any

CAT = "cat 8k"
FILES = {
    "pkg/add.py": "def add(a, b):\n    return a - b\n",
    "pkg/__init__.py": "",
    "README": "\n".join(f"line {i}" for i in range(40)) + "\n",
}
LIGHT = (
    "pwd",
    "ls",
    "cat pkg/add.py",
    "grep -n return pkg/add.py",
    "export LEVEL=2",
    "head -n 3 README",
    "sed -i 's/a - b/a + b/' pkg/add.py",
    "cat pkg/add.py",
    "test -f README && echo there",
    "wc -l README",
)
"""Ten commands of an episode: most start a process, as an agent's do."""
PYTHON = 'python3 -c "from pkg.add import add; print(add(1, 2))"'
SCORE = "grep -c 'a + b' pkg/add.py"


class Bench:
    """One world under measurement."""

    def __init__(self, world: Any) -> None:
        self.world = world
        self.boxes: list[Any] = []

    def single(self) -> dict[str, float]:
        """Seconds of each step in the life of one box: `start` is from the call to the first command's answer."""
        began = time.perf_counter()
        box = self.world.start({})
        try:
            made = time.perf_counter()
            box.run("true")
            answered = time.perf_counter()
            box.run("head -c 8192 /dev/zero | tr '\\0' x >8k")
            times = {
                "start": answered - began,
                "first": answered - made,
                "builtin": repeated(lambda: box.run("true")),
                "cat": repeated(lambda: box.run(CAT)),
            }
            began = time.perf_counter()
        finally:
            box.close()
        return times | {"teardown": time.perf_counter() - began}

    def fork(self, n: int, files: int = 200) -> dict[str, float]:
        """Seconds from the call until all `n` copies of a box with that many changed files have answered."""
        with opened(self.world, {}) as box:
            box.run(f"mkdir -p d; for i in {{1..{files}}}; do echo $i >d/$i; done")
            began = time.perf_counter()
            children = box.fork(n)
            try:
                answers = [child.run("cat d/7") for child in children]
                spent = time.perf_counter() - began
            finally:
                for child in children:
                    child.close()
        if [answer.strip() for answer in answers] != ["7"] * n:
            raise RuntimeError(f"{self.world.name}: a fork lost the file: {answers}")
        return {"fork": spent}

    def changes(self, files: int, edits: int) -> dict[str, float]:
        """Seconds to learn what differs after some edits in a tree of many files."""
        tree = {f"d{i % 50}/f{i}.py": f"x = {i}\n" * 20 for i in range(files)}
        with opened(self.world, tree, base=True) as box:
            box.run("; ".join(f"echo '# edited' >>d{i % 50}/f{i}.py" for i in range(edits)))
            began = time.perf_counter()
            found = box.changed()
            spent = time.perf_counter() - began
        if found < edits:
            raise RuntimeError(f"{self.world.name}: {found} changes found after {edits} edits")
        return {"changes": spent}

    def episodes(self, workers: int, seconds: float, python: int = 0) -> dict[str, float]:
        """Episodes a minute: each worker plays one after another, at least one, and starts none after `seconds`."""
        began = time.perf_counter()

        def play(_: int) -> int:
            for done in itertools.count(1):
                episode(self.world, python)
                if time.perf_counter() - began > seconds:
                    return done
            return 0

        done = sum(spread(play, range(workers)))
        return {"episodes": 60 * done / (time.perf_counter() - began)}

    def fill(self, n: int, threads: int = 4) -> dict[str, float]:
        """Start `n` boxes to be kept, each with one answer; seconds."""
        began = time.perf_counter()

        def one(_: int) -> None:
            box = self.world.start({})
            self.boxes.append(box)
            box.run("true")

        spread(one, range(n), threads)
        return {"fill": time.perf_counter() - began}

    def commands(self, seconds: float) -> dict[str, float]:
        """`true` in all kept boxes at once, a thread each: commands a second, and the 99th percentile of their seconds."""
        began = time.perf_counter()

        def drive(box: Any) -> list[float]:
            times: list[float] = []
            while not times or time.perf_counter() - began < seconds:
                at = time.perf_counter()
                box.run("true")
                times.append(time.perf_counter() - at)
            return times

        times = sorted(itertools.chain(*spread(drive, self.boxes)))
        rate = len(times) / (time.perf_counter() - began)
        return {"commands": rate, "p99": times[int(0.99 * (len(times) - 1))]}

    def drain(self) -> dict[str, float]:
        """Close the kept boxes; seconds."""
        began = time.perf_counter()
        boxes, self.boxes = self.boxes, []
        spread(lambda box: box.close(), boxes, 8)
        return {"drain": time.perf_counter() - began}


class opened:
    """A box for the length of a block; base: its files belong to what it starts from, where that makes a difference."""

    def __init__(self, world: Any, files: dict[str, str], *, base: bool = False) -> None:
        self.box = world.start(files)
        self.settled = self.box.settle() if base and hasattr(self.box, "settle") else self.box

    def __enter__(self) -> Any:
        return self.settled

    def __exit__(self, *_: object) -> None:
        for box in {id(b): b for b in (self.settled, self.box)}.values():
            box.close()


def episode(world: Any, python: int = 0) -> None:
    """Reset, ten commands, `python` of them a Python process, and the score."""
    with opened(world, FILES) as box:
        for script in LIGHT[: len(LIGHT) - python]:
            box.run(script)
        for _ in range(python):
            box.run(PYTHON)
        if box.run(SCORE).strip() != "1":
            raise RuntimeError(f"{world.name}: the episode's edit is lost")


def repeated(call: Callable[[], Any], seconds: float = 0.3, least: int = 3, most: int = 50) -> float:
    """Median seconds of a call that is made again and again for a while."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or (len(times) < most and time.perf_counter() < end):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def spread(call: Callable[[Any], Any], items: Any, threads: int = 0) -> list[Any]:
    """The call for every item, in threads (0: one each); the first failure is raised when all have ended."""
    items = list(items)
    with ThreadPoolExecutor(threads or max(1, len(items))) as pool:
        return list(pool.map(call, items))


def writing(files: dict[str, str], size: int = 100_000) -> Iterator[str]:
    """Scripts that write the files, each short enough for one argument of a process."""
    script = ""
    for path, text in files.items():
        folder = path.rpartition("/")[0]
        line = (f"mkdir -p {quote(folder)}; " if folder else "") + f"printf %s {quote(text)} >{quote(path)}\n"
        if len(script) + len(line) > size:
            yield script
            script = ""
        script += line
    if script:
        yield script


def docker(*args: str) -> str:
    """Run the docker command; its output. Raises `RuntimeError` with what it said where it fails."""
    done = subprocess.run(["docker", *args], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"docker {args[0]}: {' '.join(done.stderr.split())[-200:]}")
    return done.stdout


def sweep(label: str) -> int:
    """Remove the containers and images with the label; how many there were."""
    containers = docker("ps", "-aq", "--filter", f"label={label}").split()
    images = docker("images", "-q", "--filter", f"label={label}").split()
    for command, found in (("rm", containers), ("rmi", images)):
        if found:
            subprocess.run(["docker", command, "-f", *found], capture_output=True)
    return len(containers) + len(images)
