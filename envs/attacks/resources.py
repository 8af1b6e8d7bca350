"""Attack list B: more than a sandbox's share, of the host or of its owner's patience."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from envs.attacks import loads
from envs.attacks.stage import (
    PRELUDE,
    QUICK,
    Case,
    Memory,
    NotRun,
    Stage,
    Traces,
    case,
    check,
    descriptors,
    eventually,
    mounts,
    naps,
    new_nap,
    refused,
    summary,
)
from envs.sandbox.base import Result, Sandbox

CASES: list[Case] = []
resources = partial(case, CASES)

FLAT = 64 << 20
"""Bytes that this process may grow by, whatever a sandbox does."""
GRACE = 20.0
"""Seconds past its end that a command or a teardown may take on a loaded host."""


def _ended(result: Result, *causes: str, told: bool = True) -> None:
    """`Breach` unless the command ended for one of `causes`. Where the kernel tells no cause: unless it failed."""
    fine = result.cause in causes if told else not result.ok
    check(fine, f"expected {' or '.join(causes)}, not {summary(result)}")


def _gone(nap: int, why: str) -> None:
    check(eventually(lambda: not naps(nap), GRACE), f"{len(naps(nap))} processes are left {why}")


@resources(
    "B1", "fork bomb, double forks, setsid", "held at the limit of processes; cause pids; dead after the timeout"
)
def fork_bomb(stage: Stage) -> str:
    """The limit must hold where RLIMIT_NPROC doesn't: started by root."""
    nap, box = new_nap(), stage.box(pids=16, memory_mb=128, disk_mb=16)
    result = stage.python(box, loads.BOMB, nap, timeout=QUICK)
    alive, told = len(naps(nap)), box.usage().pids is not None
    check(alive <= 16, f"{alive} processes with a limit of 16")
    check("refused" in result.text() and "refused 0" not in result.text(), f"no fork was refused: {summary(result)}")
    _ended(result, "pids", told=told)
    stage.works(stage.neighbour, "the neighbour")
    result = box.run("b() { b | b & }; b; sleep 60", timeout=0.5)
    check(not result.ok, f"the second bomb ended with {summary(result)}")
    box.kill_all()
    _gone(nap, "after kill_all")
    stage.works(box)
    return f"{alive} of 16 processes seen on the host, cause {'pids' if told else 'not told here'}"


_HOG = {
    "heap": "hold = []\nwhile len(hold) < 512: hold.append(b'x' * (1 << 20))",
    "mmap": "import mmap\nm = mmap.mmap(-1, 512 << 20)\nfor i in range(0, 512 << 20, 4096): m[i] = 1",
    "memfd": "fd = os.memfd_create('m')\nfor i in range(512): os.write(fd, b'x' * (1 << 20))",
    "children": "for i in range(16):\n  if not os.fork(): hold = b'x' * (48 << 20); time.sleep(2); os._exit(0)\nfor i in range(16): sys.exit(1) if os.wait()[1] else 0",
}  # fmt: skip


@resources("B2", "memory hogs: heap, mmap, memfd, many children, tmpfs", "out of memory inside only; cause oom")
def memory(stage: Stage) -> str:
    """512 MiB against a limit of 64, each way; what the file systems hold counts as well."""
    box, mine, causes = stage.box(memory_mb=64, disk_mb=16, pids=32), Memory(), []
    told = box.usage().memory is not None
    for name, program in _HOG.items():
        if not told and name == "children":
            continue
        result = stage.python(box, program, timeout=QUICK)
        check(not result.ok, f"{name}: took 512 MiB with a limit of 64")
        if told and name != "memfd":
            _ended(result, "oom")
        peak = result.peak_memory
        check(peak is None or peak <= 65 << 20, f"{name}: {peak} bytes with a limit of 64 MiB")
        causes.append(f"{name} {result.cause}")
        box.kill_all()  # children that are left hold what the next command needs
        stage.works(box)
    box.run("for d in /tmp /dev/shm /repo; do cat /dev/zero >$d/hog; done", timeout=QUICK)
    stage.works(stage.neighbour, "the neighbour")
    box.run("rm -f /tmp/hog /dev/shm/hog /repo/hog", timeout=QUICK)
    stage.works(box)
    check(mine.grown() < FLAT, f"the owner grew by {mine.grown() >> 20} MiB")
    return ", ".join(causes) + ("" if told else "; no cgroup here: the limit is each process's own")


@resources("B3", "full disk: one file, a million files, sparse files", "a quota; cause disk; the neighbour can write")
def disk(stage: Stage) -> str:
    """Each writable place of a sandbox with 8 MiB, then the inodes, then holes."""
    box, mine = stage.box(disk_mb=8, memory_mb=128, files={"keep": b"old"}), Memory()
    for place in ("/repo", "/tmp", "/dev/shm"):
        result = box.run(f"cat /dev/zero >{place}/big", timeout=QUICK)
        check(not result.ok, f"{place} took everything")
        if place == "/repo":
            _ended(result, "disk")
    held = int(stage.sh(box, "cat /repo/big /tmp/big /dev/shm/big 2>/dev/null | wc -c"))
    check(held <= 8 << 20, f"{held} bytes with a limit of 8 MiB")
    stage.works(stage.neighbour, "the neighbour")
    stage.sh(box, "rm -f /repo/big /tmp/big /dev/shm/big; mkdir many")
    _ended(stage.python(box, loads.INODES, timeout=60), "disk")
    stage.sh(box, "rm -r many", timeout=60)
    box.run("truncate -s 1T hole; truncate -s 7M hole2; for i in $(seq 50); do ln hole2 h$i; done", timeout=QUICK)
    began = time.monotonic()
    changes = box.changes()
    check(time.monotonic() - began < GRACE, "changes() takes for ever")
    held = sum(map(len, {id(change.data): change.data or b"" for change in changes.values()}.values()))
    check(held <= 8 << 20, "changes() holds more than the disk")
    check(mine.grown() < FLAT, f"the owner grew by {mine.grown() >> 20} MiB")
    stage.works(box)
    return f"{held} bytes held at most, cause disk for bytes and for inodes"


@resources(
    "B4", "1 GB of output, endless output, a slow drip", "head and tail, the true total, flat memory of the owner"
)
def output(stage: Stage) -> str:
    """One line of 1 GiB is read to its end; endless ones end by the clock."""
    box, mine, size = stage.box(output_kb=64), Memory(), 1 << 30
    result = box.run(f"head -c {size} /dev/zero; echo -n END", timeout=240)
    check(result.total == size + 3, f"total {result.total}, not {size + 3}: {result.cause}")
    kept = len(result.head) + len(result.tail)
    check(kept <= 64 << 10 and result.tail.endswith(b"\0END"), f"{kept} bytes kept, the last {result.tail[-4:]!r}")
    grown = mine.grown()
    check(grown < FLAT, f"the owner grew by {grown >> 20} MiB")
    for script in ("yes", "while :; do printf x; sleep 0.02; done"):
        result = box.run(script, timeout=0.4)
        _ended(result, "timeout", "output")
        check(result.total > 0 and len(result.head) + len(result.tail) <= 64 << 10, f"{script}: {result.total} bytes")
    stage.works(box)
    return f"{size >> 20} MiB in {result.wall:.1f} s, the owner grew by {grown >> 20} MiB"


_BYTES = {
    "every byte": bytes(range(256)) * 16,
    "NUL": b"a\0b\0\0c",
    "not UTF-8": b"\xff\xfe\xc0\x80\xed\xa0\x80\xf5caf\xe9",
    "escapes": b"\x1b[2J\x1b]0;title\x07\x1b]52;c;AAAA\x07\x9b31m\x1bP+q\x1b\\",
    "returns": b"99%\r" * 3000,
    "split": "é漢😀".encode() * 2000,
}


@resources("B5", "binary output: NUL, bad UTF-8, escapes, carriage returns", "bytes exact, text the same each time", harmless=True)  # fmt: skip
def binary(stage: Stage) -> str:
    """What `cat` prints of a file is what `Result` holds; `text()` never raises, even where the cut splits a character."""
    box = stage.box(output_kb=8)
    for name, data in _BYTES.items():
        box.write("out", data)
        result = box.run("cat out", timeout=QUICK)
        check(result.total == len(data), f"{name}: {result.total} bytes, not {len(data)}")
        exact = result.head == data if not result.tail else data.startswith(result.head) and data.endswith(result.tail)
        check(exact and len(result.head) + len(result.tail) == min(len(data), 8 << 10), f"{name}: other bytes came")
        text = result.text()
        check(text == result.text() and text.encode().decode() == text, f"{name}: text() is not stable")
    return f"{len(_BYTES)} kinds, exact"


@resources("B6", "past the timeout: TERM and INT ignored, stopped, daemons, no supervisor", "killed in time; the next command works")  # fmt: skip
def timeouts(stage: Stage) -> str:
    """The tree of a command dies at its timeout, whoever adopted its processes."""
    box, nap, slowest = stage.box(), new_nap(), 0.0
    sleeper = f"sleep {nap} >/dev/null 2>&1"
    for script in (
        f"sleep {nap}",
        f"trap '' TERM INT HUP QUIT; while :; do sleep {nap}; done",
        "kill -STOP $$",
        "while :; do :; done",
        f"(setsid {sleeper} &); (setsid setsid nohup {sleeper} & disown); sleep {nap}",
        f"sh -c '(setsid {sleeper} &) ; kill -9 $PPID; sleep {nap}' & sh -c 'kill -STOP $$' & sleep {nap}",
        f"mkfifo p$RANDOM; cat p* & exec {sleeper}",
    ):
        result = box.run(script, timeout=0.2)
        if result.cause != "timeout":  # it ended itself: what it left must die with kill_all
            check(result.wall < GRACE, f"{script!r} took {result.wall:.1f} s")
            box.kill_all()
        slowest = max(slowest, result.wall)
        check(result.wall < GRACE, f"{script!r} took {result.wall:.1f} s with a timeout of 0.2")
        _gone(nap, f"of {script!r}")
        stage.works(box)
    return f"slowest end {slowest:.2f} s after a timeout of 0.2"


@resources("B7", "a background job holds stdout", "the command returns at once; the job dies with kill_all")
def background(stage: Stage) -> str:
    """Waiting for end of file would wait for the job."""
    nap, box = new_nap(), stage.box()
    result = box.run(f"sleep {nap} & (setsid sleep {nap} &); echo now", timeout=QUICK)
    check(result.ok and result.text() == "now\n" and result.wall < GRACE, f"{result.wall:.1f} s: {summary(result)}")
    eventually(lambda: len(naps(nap)) == 2, GRACE)  # the jobs have begun; another kernel's are not seen
    box.kill_all()
    _gone(nap, "after kill_all")
    stage.works(box)
    return f"returned after {result.wall * 1000:.0f} ms"


@resources("B8", "CPU burn on all cores, real-time priority", "the share is enforced, priority refused")
def cpu(stage: Stage) -> str:
    """Five processes for a second with half a core, beside a neighbour that wants an answer."""
    box = stage.box(cpus=0.5)
    result = stage.python(box, loads.BURN, timeout=QUICK)
    check("possible" not in result.text(), result.text())
    stage.works(stage.neighbour, "the neighbour")
    time.sleep(max(0.0, 1.2 - result.wall))
    after = box.run(":", timeout=QUICK)
    if result.cpu is None or after.cpu is None:
        raise NotRun("the backend tells no CPU time here, and limits it by timeouts only")
    used, wall = result.cpu + after.cpu, max(1.2, result.wall) + after.wall
    check(used <= 0.5 * wall * 1.3 + 0.2, f"{used:.2f} CPU seconds in {wall:.2f} s with half a core")
    return f"{used:.2f} CPU seconds in {wall:.2f} s with half a core"


@resources(
    "B9", "archive bombs, deep directories, long names", "the owner expands nothing; the sandbox's own disk fills"
)
def bombs(stage: Stage) -> str:
    """What comes out is the archives' own bytes, and the walk of a tree 800 levels deep ends."""
    box, mine, name = stage.box(disk_mb=32), Memory(), f"attack-{new_nap()}"
    stage.sh(box, "cd /repo")
    made = stage.python(box, loads.NESTED, name, timeout=60)
    if not made.ok:
        raise NotRun(f"the bombs were not made: {summary(made)}")
    began = time.monotonic()
    changes = box.changes()
    check(time.monotonic() - began < GRACE, "changes() takes for ever")
    check(
        not Path("/tmp", name).exists() and not Path("/tmp", f"{name}-0").exists(),
        "an archive was unpacked on the host",
    )
    size = sum(len(change.data or b"") for change in changes.values())
    check({"bomb.gz", "bomb.zip", "nested.gz"} <= set(changes) and size < 1 << 20, f"{size} bytes of archives")
    _ended(box.run("gzip -dc bomb.gz >out", timeout=QUICK), "disk")
    stage.sh(box, "rm out")
    check(mine.grown() < FLAT, f"the owner grew by {mine.grown() >> 20} MiB")
    stage.works(box)
    return f"{len(changes)} changed files of {size} bytes"


@resources("B10", "exhaust descriptors, inotify, pipes, sockets", "a limit per sandbox; the neighbour has its own")
def exhaustion(stage: Stage) -> str:
    """The kernel counts some of these per user: sandboxes that share a uid share the limit."""
    nap, box = new_nap(), stage.box()
    box.write("/tmp/exhaust.py", (PRELUDE + loads.EXHAUST).encode())
    stage.sh(box, f"python3 -I /tmp/exhaust.py {nap} >/tmp/said 2>&1 &")
    if not eventually(lambda: box.run("grep -q ^end /tmp/said", timeout=QUICK).ok, 60):
        raise NotRun(f"the flood did not begin: {box.run('tail -n 3 /tmp/said', timeout=QUICK).text()}")
    found = stage.tries(stage.neighbour, loads.AFFORD)
    lacking = [f"{name} ({what})" for name, what in found.items() if what != "ok"]
    check(not lacking, f"the neighbour is refused: {', '.join(lacking)}")
    rows = dict(line.split("\t") for line in box.read("/tmp/said").decode().splitlines() if "\t" in line)
    refused({name: what for name, what in rows.items() if name in ("files", "sockets", "inotify")})
    box.kill_all()
    stage.works(box)
    return f"limits: {', '.join(f'{name} {what}' for name, what in rows.items() if what)}; the neighbour is served"


@resources(
    "B11", "clock games: date -s, settimeofday, TZ", "the host's clock is intact; budgets use the monotonic clock"
)
def clock(stage: Stage) -> str:
    """And a timeout is the owner's, whatever the sandbox believes of the time."""
    before = time.time() - time.monotonic()
    found = stage.tries(stage.shared, loads.CLOCK)
    box = stage.box()
    result = box.run("date -s '2001-01-01' 2>&1 && echo changed", timeout=QUICK)
    check("changed" not in result.text(), "date -s works")
    check(abs(time.time() - time.monotonic() - before) < 0.5, "the host's clock was changed")
    box.run("export TZ=XXX-99 FAKETIME=-10y LD_PRELOAD=/tmp/none.so; EPOCHREALTIME=0; SECONDS=0", timeout=QUICK)
    result = box.run("sleep 60", timeout=0.3)
    check(result.cause == "timeout" and result.wall < GRACE, f"a timeout of 0.3 ended as {summary(result)}")
    stage.works(box)
    return refused(found)


_HARMLESS = ("exit 3", "exec true", "exec 0<&- 1>&- 2>&-", "exec 1>&- 2>&-; exit 4", "set -e; false", "kill -9 $$")
_DEADLY = ("kill -9 -1", "kill -9 1; kill -TERM 1; kill -STOP 1; kill -9 $$", "pkill -9 python; pkill -9 bash", "kill -9 $PPID",
           "sh -c 'kill -9 $PPID' & wait; kill -9 $$", "exec sh -c 'kill -9 -1'", "kill -STOP -1; exit")  # fmt: skip


@resources(
    "B12", "kill, replace, close or leave the shell; kill -9 -1", "shell restarted, cwd kept, flagged", harmless=True
)
def shell(stage: Stage) -> str:
    """After each, the next command runs in the same directory, and a lost variable is admitted by `restarted`."""
    box = stage.box(files={"sub/x": b""})
    for script in _HARMLESS:
        _survives(stage, box, script)
    stage.isolated()
    for script in _DEADLY:
        _survives(stage, box, script)
    stage.works(stage.neighbour, "the neighbour")
    return f"{len(_HARMLESS) + len(_DEADLY)} ways survived"


def _survives(stage: Stage, box: Sandbox, script: str) -> None:
    token = new_nap()
    stage.sh(box, f"cd /repo/sub; export KEPT={token}; LOST={token}")
    results = [box.run(script, timeout=2), box.run('command printf "%s " "$KEPT" "$LOST"; pwd', timeout=QUICK)]
    words = results[1].text().split()
    check(len(words) >= 2 and words[0] == str(token), f"{script!r}: exports are lost: {summary(results[1])}")
    check(words[-1] == "/repo/sub", f"{script!r}: the directory is lost: {summary(results[1])}")
    lost, said = len(words) < 3, any(result.restarted for result in results)
    check(said or not lost, f"{script!r}: the shell was lost, and no result says so")


@resources("B13", "busy at teardown: cwd, deleted open files, stopped processes", "gone in time; nothing left mounted")
def teardown(stage: Stage) -> str:
    """Processes, cgroups and mounts of the sandbox and descriptors of its owner, counted on the host."""
    stage.works(stage.shared)  # what the backend keeps from its first sandbox on is there now
    before, fds, nap = mounts(), descriptors(), new_nap()
    box = stage.box()
    stage.sh(
        box, "cd /tmp; exec 9>gone; rm gone; mkdir d; cd d; rmdir /tmp/d; mkfifo /tmp/p; (cat /tmp/p &) >/dev/null"
    )
    pids = stage.sleeper(box, nap)
    stage.sh(box, f"(setsid sleep {nap} & kill -STOP $!) >/dev/null 2>&1; ulimit -c unlimited 2>/dev/null; :")
    seen = Traces.of(pids, before)
    began = time.monotonic()
    box.close()
    took = time.monotonic() - began
    check(took < GRACE, f"close() took {took:.1f} s")
    box.close()
    _gone(nap, "after close")
    check(eventually(lambda: not seen.left()), f"left: {', '.join(seen.left())}")
    check(descriptors() == fds, f"{descriptors() - fds} descriptors of the owner are left")
    kinds = (
        f"{len(seen.pids)} process, {len(seen.cgroups)} cgroups, {len(seen.mounts)} mounts"
        if pids
        else "seen inside only"
    )
    return f"closed in {took * 1000:.0f} ms; {kinds}"


_WORKER = """
import sys, time
from envs.sandbox import make_backend
box = make_backend(sys.argv[1]).create(files={"a": b"1"})
box.run("setsid sleep {0} & sleep {0} &".format(sys.argv[2]), timeout=60)
print("ready", flush=True)
box.run("sleep {0}".format(sys.argv[2]), timeout=1000)
"""
_NEXT = "import sys; from envs.sandbox import make_backend; make_backend(sys.argv[1]).close()"


@resources(
    "B14", "the owner is killed by SIGKILL amid an episode", "everything of it is freed at the latest by the next start"
)
def killed_owner(stage: Stage) -> str:
    """Processes, cgroups, mounts, containers, and what it put into its temporary directory."""
    name, nap, before = stage.backend.name, new_nap(), mounts()
    path = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory() as home:
        Path(home).chmod(0o755)
        environment = {**os.environ, "TMPDIR": home, "PYTHONPATH": os.pathsep.join(path)}
        command = [sys.executable, "-c", _WORKER, name, str(nap)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as owner:
            assert owner.stdout and owner.stderr
            if owner.stdout.readline() != b"ready\n":
                raise NotRun(f"only a backend that make_backend knows: {owner.stderr.read()[-200:]!r}")
            eventually(lambda: len(naps(nap)) == 3, 5.0)
            seen = Traces.of(naps(nap), before)
            owner.kill()
        _gone(nap, "after their owner")
        subprocess.run([sys.executable, "-c", _NEXT, name], env=environment, capture_output=True, timeout=120)
        check(eventually(lambda: not seen.left()), f"left: {', '.join(seen.left())}")
        files = os.listdir(home)
        check(not files, f"directories left: {', '.join(files)}")
    return f"{len(seen.pids)} processes, {len(seen.cgroups)} cgroups, {len(seen.mounts)} mounts freed"
