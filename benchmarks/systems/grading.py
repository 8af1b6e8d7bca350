"""How fast are attempts graded? A toy SWE-bench instance, graded by ours and by `swebench eval` on the same image.

swebench is no dependency: the first run installs it into a virtual environment in the user's cache (`--no-peers` leaves it
out). Its time for one instance is the slope between a run of three copies and a run of one, so that the start of its process
does not count; ours is one call of `grade`. Throughput is of the toy instance, one to four gradings at once. With `--rows`
each of these instances is built and graded by both on its image, gold and no-op, and the seconds saved are told.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.systems.base import row
from envs.errors import InfraError, Unsupported
from envs.sandbox import BACKENDS, make_backend
from envs.sandbox.base import Backend
from envs.sandbox.helper import cache_dir
from envs.swe.grading import grade
from envs.swe.rows import validate_rows
from envs.swe.swe_bench import task_of
from envs.swe.validate import gold_changes
from envs.task import Task

PEER = "swebench==5.0.2"
BASE, IMAGE = "codeworld-base:latest", "codeworld-toy:latest"
_PYTEST = ("pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments", "py.py")
_SITE = "usr/lib/python3/dist-packages"
_BROKEN = "def double(x):\n    return x + x\n\n\ndef halve(x):\n    return x * 2\n"
_FIXED = _BROKEN.replace("x * 2", "x / 2")
_OLD_TEST = "from toy import double\n\n\ndef test_double():\n    assert double(2) == 4\n"
_NEW_TEST = _OLD_TEST.replace("double\n", "double, halve\n", 1) + "\n\ndef test_halve():\n    assert halve(4) == 2\n"


def options(p: argparse.ArgumentParser) -> None:
    """This measurement's own options."""
    p.add_argument("--backend", nargs="+", choices=BACKENDS, default=list(BACKENDS), help="default: %(default)s")
    p.add_argument("--repeats", type=int, default=9, help="gradings of ours a median is of (default: %(default)s)")
    p.add_argument("--peer-repeats", type=int, default=3, help="pairs of runs of swebench's (default: %(default)s)")
    p.add_argument("--no-peers", action="store_true", help="ours only; nothing is installed")
    p.add_argument("--rows", help="real instances, too: SWE-bench rows (a file or hub id), on the native backend")
    p.add_argument("--repos", help="of --rows: a directory of clones")
    p.add_argument("--ids", nargs="+", help="of --rows: only these (default: all)")
    p.add_argument("--out", help="of --rows: where images, logs and records are kept (default: nowhere)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The measurement."""
    if args.rows and (args.no_peers or not args.repos):
        raise ValueError(f"--rows {args.rows}: needs --repos DIR, and swebench (no --no-peers)")
    make_image()
    toy = instance()
    costs = [] if args.no_peers else [cost(toy) for _ in range(args.peer_repeats)]
    peer = [seconds for seconds, _ in costs] or None
    rows: list[dict[str, Any]] = []
    for name in args.backend:
        backend = make_backend(name)
        try:
            rows += [
                *single(backend, task_of(toy, "toy"), args.repeats, peer),
                *throughput(backend, task_of(toy, "toy")),
            ]
        finally:
            backend.close()
    if args.rows:
        rows += real(args, statistics.median(start for _, start in costs))
    return {"rows": rows, "peer": PEER}


def single(backend: Backend, task: Task, repeats: int, peer: list[float] | None) -> Iterator[dict[str, Any]]:
    """Seconds of one grading, gold and no-op, beside the peer's."""
    gold = gold_changes(task, backend)
    for what, changes, wanted in (("gold", gold, "resolved"), ("no-op", {}, "unresolved")):
        seconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            verdict = grade(task, changes, backend)
            seconds.append(time.perf_counter() - began)
            if verdict.outcome != wanted:
                raise InfraError(f"the toy instance's {what} is {verdict.outcome} on {backend.name}: {verdict.why}")
        yield row(
            f"{backend.name}: one grading, {what}",
            statistics.median(seconds),
            peer=statistics.median(peer) if peer and what == "gold" else None,
            peer_name="swebench eval" if peer and what == "gold" else "",
            unit="s",
            goal=">=3" if peer and what == "gold" else "",
            n=repeats,
            spread=[round(min(seconds), 3), round(max(seconds), 3)],
            backend=backend.name,
            times_better=True,
        )


def real(args: argparse.Namespace, start: float) -> Iterator[dict[str, Any]]:
    """Seconds saved on each real instance that both grade as expected. start: seconds of swebench's process, which don't count."""
    backend = make_backend("native")
    python = str(installed().with_name("python"))
    try:
        with tempfile.TemporaryDirectory() as name:
            options = {"ids": args.ids, "python": python, "official": True}
            found = validate_rows(args.rows, args.repos, args.out or name, backend, **options)
    finally:
        backend.close()
    for record in found:
        for what in ("gold", "no-op") if record["met"] else ():
            ours, whole = record["seconds"][what], record["seconds"][f"swebench eval, {what}"]
            spread = f"ours {ours:.1f} s, swebench {whole - start:.1f} s after {start:.1f} s to start"
            yield row(
                f"{record['id']}, {what}: seconds saved",
                whole - start - ours,
                unit="s",
                goal=">=12",
                n=1,
                spread=spread,
                backend="native",
            )


def throughput(backend: Backend, task: Task, each: int = 8) -> Iterator[dict[str, Any]]:
    """Gradings a minute, 1, 2 and 4 at once."""
    gold = gold_changes(task, backend)
    for at_once in (1, 2, 4):
        with ThreadPoolExecutor(at_once) as pool:
            began = time.perf_counter()
            verdicts = list(pool.map(lambda _: grade(task, gold, backend), range(each * at_once)))
            seconds = time.perf_counter() - began
        solved = sum(verdict.outcome == "resolved" for verdict in verdicts)
        what = f"{backend.name}: gradings a minute, {at_once} at once"
        spread = "" if solved == len(verdicts) else f"only {solved} of {len(verdicts)} resolved"
        yield row(what, 60 * len(verdicts) / seconds, unit="/min", n=len(verdicts), spread=spread, backend=backend.name)


# ---- the toy instance ----


def instance(number: int = 1) -> dict[str, Any]:
    """A SWE-bench row (5.x columns) of the repository in `IMAGE`."""
    test_patch = _diff("test_toy.py", _OLD_TEST, _NEW_TEST)
    script = [
        "#!/bin/bash",
        "set -uxo pipefail",
        "cd /testbed",
        f"git apply -v - <<'EOF_PATCH'\n{test_patch}EOF_PATCH",
        ": '>>>>> Start Test Output'",
        "python3 -m pytest -rA -p no:cacheprovider test_toy.py",
        ": '>>>>> End Test Output'",
        "git checkout HEAD test_toy.py",
    ]
    return {
        "instance_id": f"toy__toy-{number}",
        "repo": "toy/toy",
        "version": "1.0",
        "base_commit": "HEAD",
        "problem_statement": "halve(4) gives 8.",
        "image": IMAGE,
        "eval_script": "\n".join(script) + "\n",
        "log_parser": "parse_log_pytest_v2",
        "eval_type": "pass_and_fail",
        "FAIL_TO_PASS": ["test_toy.py::test_halve"],
        "PASS_TO_PASS": ["test_toy.py::test_double"],
        "patch": _diff("toy.py", _BROKEN, _FIXED),
        "test_patch": test_patch,
    }


def _diff(path: str, old: str, new: str) -> str:
    import difflib

    lines = difflib.unified_diff(old.splitlines(True), new.splitlines(True), f"a/{path}", f"b/{path}")
    return f"diff --git a/{path} b/{path}\n" + "".join(lines)


def make_image() -> None:
    """The image of the toy repository, in the local engine: the base, this interpreter's pytest, a git repository."""
    import docker

    try:
        client = docker.from_env()
        client.images.get(BASE)
    except docker.errors.ImageNotFound:
        raise Unsupported(f"no image {BASE} here; make it: sh docker/offline-base.sh") from None
    except docker.errors.DockerException as error:
        raise Unsupported(f"no Docker engine answers ({error}); start dockerd") from None
    try:
        container = client.containers.create(BASE, ["/bin/true"], network_mode="none")
        try:
            container.put_archive("/", _tree())
            container.commit(*IMAGE.split(":"))
        finally:
            container.remove(force=True)
    finally:
        client.close()


def _tree() -> bytes:
    site, buffer = Path(sysconfig.get_path("purelib")), io.BytesIO()
    with tempfile.TemporaryDirectory() as name, tarfile.open(fileobj=buffer, mode="w") as tar:
        repo = Path(name)
        (repo / "toy.py").write_text(_BROKEN)
        (repo / "test_toy.py").write_text(_OLD_TEST)
        author = ["-c", "user.name=toy", "-c", "user.email=toy@example.invalid"]
        for command in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "toy"]):
            subprocess.run(["git", *command], cwd=repo, check=True)
        tar.add(repo, "testbed", filter=_as_root)
        for package in _PYTEST:
            tar.add(site / package, f"{_SITE}/{package}", filter=_as_root)
        for info in (found for package in _PYTEST for found in site.glob(f"{package}-*.dist-info")):
            tar.add(info, f"{_SITE}/{info.name}", filter=_as_root)
    return buffer.getvalue()


def _as_root(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    return None if "__pycache__" in info.name else info


# ---- the peer ----


def cost(toy: dict[str, Any]) -> tuple[float, float]:
    """Seconds of swebench for one instance more, and of its process without any: of a run of three copies and a run of one."""
    command = installed()
    three, one = evaluate(command, toy, 3), evaluate(command, toy, 1)
    return (three - one) / 2, one - (three - one) / 2


def installed() -> Path:
    """The `swebench` command, installed at first use (some minutes). Raises `InfraError` where it can't be."""
    home = cache_dir() / f"peers-{PEER.replace('==', '-')}"
    if not (home / "ready").exists():
        print(f"grading: installing {PEER} into {home}", flush=True)
        _call([sys.executable, "-m", "venv", "--clear", str(home)], 600)
        _call([str(home / "bin/python"), "-m", "pip", "install", "-q", PEER], 1800)
        (home / "ready").touch()
    return home / "bin/swebench"


def evaluate(command: Path, toy: dict[str, Any], copies: int) -> float:
    """Seconds of one `swebench eval --gold` of some copies, in a directory of its own; all must be resolved."""
    with tempfile.TemporaryDirectory() as name:
        rows = [toy | {"instance_id": f"toy__toy-{number}"} for number in range(copies)]
        (Path(name) / "rows.json").write_text(json.dumps(rows))
        began = time.perf_counter()
        _call([str(command), "eval", "rows.json", "--gold", "--run-id", "toy", "-j", "1"], 600, cwd=name)
        seconds = time.perf_counter() - began
        (report,) = Path(name).glob("*.toy.json")
        resolved = json.loads(report.read_text())["resolved_instances"]
        if resolved != copies:
            raise InfraError(f"swebench resolved {resolved} of {copies} copies of the toy instance")
    return seconds


def _call(command: list[str], timeout: float, **options: Any) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, **options)
    if done.returncode:
        raise InfraError(f"{' '.join(command[:3])}: {' '.join((done.stderr or done.stdout).split())[-300:]}")
