"""What an attack has at hand: sandboxes of the backend under test, programs to run inside them, and eyes on the host.

A case attacks from inside and judges from outside where it can. It returns one line that says what was seen; it raises
`Breach` when the expectation does not hold and `NotRun` when this host can't tell.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from envs.errors import CodeworldError
from envs.sandbox.base import Backend, FileChange, Limits, Result, Sandbox
from envs.swe.grading import Grade, grade

Verdict = Literal["contained", "breached", "not run"]
QUICK = 30.0
"""Seconds that a command of an attack gets where its length is not the point (a loaded host is slow, not broken)."""


class Breach(Exception):
    """The expectation of a case does not hold; the message says what was possible."""


class NotRun(Exception):
    """The case could not be tried here; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One attack: data and a function of the stage."""

    id: str
    """Letter and number as in the attack list, e.g. "A3"."""
    title: str
    expectation: str
    attack: Callable[[Stage], str]
    harmless: bool = False
    """Does nothing to the host even where the backend isolates nothing. Other cases are not run on such a backend."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one case ended on one backend."""

    case: Case
    verdict: Verdict
    why: str
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The row of the report: `met` is None where the case was not run."""
        skipped = self.verdict == "not run"
        return {
            "id": self.case.id,
            "title": self.case.title,
            "expected": self.case.expectation,
            "outcome": f"skipped: {self.why}" if skipped else self.verdict,
            "met": None if skipped else self.verdict == "contained",
            "why": self.why,
            "seconds": round(self.seconds, 3),
        }


def case(
    cases: list[Case], name: str, title: str, expectation: str, *, harmless: bool = False
) -> Callable[[Callable[[Stage], str]], Callable[[Stage], str]]:
    """Add the decorated function to `cases` as case `name`."""

    def add(attack: Callable[[Stage], str]) -> Callable[[Stage], str]:
        cases.append(Case(id=name, title=title, expectation=expectation, attack=attack, harmless=harmless))
        return attack

    return add


# ---- programs that run inside ----

_NUMBERS = {  # name: number on x86_64, on aarch64
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "setns": (308, 268),
    "unshare": (272, 97), "clone": (56, 220), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "kcmp": (312, 272), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264), "quotactl": (179, 60),
    "acct": (163, 89), "swapon": (167, 224), "reboot": (169, 142), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "clock_adjtime": (305, 266), "syslog": (103, 116), "fanotify_init": (300, 262),
    "sethostname": (170, 161), "setdomainname": (171, 162), "mq_open": (240, 180), "io_uring_setup": (425, 425),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fspick": (433, 433),
    "pidfd_open": (434, 434), "clone3": (435, 435), "pidfd_getfd": (438, 438), "mount_setattr": (442, 442),
    "quotactl_fd": (443, 443),
}  # fmt: skip

PRELUDE = f"""
import ctypes, errno, os, signal, socket, stat, sys, time
libc = ctypes.CDLL(None, use_errno=True)
NR = {{name: pair[os.uname().machine == "aarch64"] for name, pair in {_NUMBERS!r}.items()}}
def say(name, what):
    print(str(name).replace("\\t", " ").replace("\\n", " "), what, sep="\\t", flush=True)
def call(name, *args):
    "A system call: 'ok', or the name of its error."
    ctypes.set_errno(0)
    done = libc.syscall(ctypes.c_long(NR[name]), *[ctypes.c_long(a) if isinstance(a, int) else a for a in args])
    return "ok" if done >= 0 else errno.errorcode.get(ctypes.get_errno(), "E?")
def attempt(name, act, *args):
    "Say whether act(*args) worked, and return what it gave."
    try: value = act(*args)
    except OSError as error: say(name, errno.errorcode.get(error.errno, type(error).__name__))
    except Exception as error: say(name, type(error).__name__)
    else: say(name, "ok"); return value
"""

_LOOK = """
def look(pid):
    try: return open(f"/proc/{pid}/cmdline", "rb").read() == b"sleep\\0" + sys.argv[2].encode() + b"\\0"
    except OSError: return False
say("files", os.path.exists(sys.argv[1]))
say("processes", any(look(pid) for pid in os.listdir("/proc") if pid.isdigit()))
"""


class Stage:
    """One backend, and a grader, under attack. What a case made is closed after it, but for the two shared sandboxes."""

    def __init__(self, backend: Backend, grade: Grade = grade) -> None:
        self.backend, self.grade = backend, grade
        self.honest = False  # the grader was not yet seen to resolve a right solution
        self._shared: dict[str, Sandbox] = {}
        self._undo: list[Callable[[], object]] = []

    # -- sandboxes --

    def box(self, files: Mapping[str, bytes | FileChange] | None = None, **limits: Any) -> Sandbox:
        """A fresh sandbox, closed at the end of the case. `limits` are fields of `Limits`."""
        made = self.backend.create(files=files, limits=Limits(**limits))  # type: ignore[arg-type]
        self._undo.append(made.close)
        return made

    @property
    def shared(self) -> Sandbox:
        """A sandbox that cases share whose attack leaves nothing behind that another case could mistake."""
        return self._kept("shared")

    @property
    def neighbour(self) -> Sandbox:
        """Another sandbox: the bystander that must not notice."""
        return self._kept("neighbour")

    def _kept(self, name: str) -> Sandbox:
        found = self._shared.get(name)
        try:
            if found is not None and found.run("cd /repo", timeout=QUICK).ok:
                return found
        except CodeworldError:
            pass
        if found is not None:
            found.close()
        self._shared[name] = self.backend.create()
        return self._shared[name]

    def works(self, box: Sandbox, what: str = "the sandbox") -> None:
        """`Breach` unless `box` runs a command and can write."""
        token = secrets.token_hex(4)
        file = f"/tmp/works-{token}"
        result = box.run(f"command echo {token} >{file} && command cat {file} && command rm {file}", timeout=QUICK)
        if not result.ok or token not in result.text():
            raise Breach(f"{what} no longer works: {summary(result)}")

    def after(self, undo: Callable[[], object]) -> None:
        """Call `undo` at the end of the case."""
        self._undo.append(undo)

    def end_case(self) -> None:
        """Free what the case made, the last first."""
        while self._undo:
            self._undo.pop()()

    def close(self) -> None:
        """Free everything but the backend."""
        self.end_case()
        while self._shared:
            self._shared.popitem()[1].close()

    # -- the inside --

    def sh(self, box: Sandbox, script: str, timeout: float = QUICK) -> str:
        """Output of a script that prepares an attack; `NotRun` if it fails."""
        result = box.run(script, timeout=timeout)
        if not result.ok:
            raise NotRun(f"{script[:60]!r} failed inside: {summary(result)}")
        return result.text()

    def python(self, box: Sandbox, program: str, *args: object, timeout: float = QUICK) -> Result:
        """Run a Python program inside, with `PRELUDE` in front of it and `args` as `sys.argv[1:]`."""
        path = f"/tmp/attack-{secrets.token_hex(8)}.py"
        self.after(partial(Path(path).unlink, missing_ok=True))  # where nothing is isolated, it is the host's
        box.write(path, (PRELUDE + program).encode())
        words = " ".join(f"'{arg}'" for arg in args)
        return box.run(f"command python3 -I {path} {words}", timeout=timeout)

    def tries(self, box: Sandbox, program: str, *args: object, timeout: float = QUICK) -> dict[str, str]:
        """What a program said of each of its attempts; `NotRun` when it did not reach its end."""
        result = self.python(box, program + "\nsay('end', '')\n", *args, timeout=timeout)
        rows = dict(line.split("\t", 1) for line in result.text().splitlines() if "\t" in line)
        if rows.pop("end", None) is None:
            raise NotRun(f"the attack's program ended early: {summary(result)}")
        return rows

    def sleeper(self, box: Sandbox, nap: int) -> list[int]:
        """Leave `sleep NAP` behind in `box`; the host's pids of it, empty where another kernel runs it."""
        self.sh(box, f"sleep {nap} >/dev/null 2>&1 &")
        eventually(lambda: bool(naps(nap)), 2.0)
        return naps(nap)

    # -- the host --

    @cached_property
    def exposed(self) -> str:
        """What of the host this backend leaves open, so that an attack would hit the host; "" if nothing was found."""
        with tempfile.TemporaryDirectory() as path, subprocess.Popen(["sleep", str(nap := new_nap())]) as process:
            Path(path).chmod(0o755)
            try:
                seen = self.tries(self.shared, _LOOK, path, nap)
            finally:
                process.kill()
        return " and ".join(name for name, there in seen.items() if there == "True")

    def isolated(self) -> None:
        """`NotRun` where what follows would hit the host itself."""
        if self.exposed:
            raise NotRun(f"the sandbox sees the host's {self.exposed}: the attack would hit this host")

    def secret(self) -> tuple[Path, str]:
        """A file of the host that everybody may read and write, and the token in it; removed after the case."""
        directory = Path(tempfile.mkdtemp(prefix="attack-"))
        directory.chmod(0o777)
        self.after(lambda: shutil.rmtree(directory, ignore_errors=True))
        token = secrets.token_hex(16)
        (directory / "secret").write_text(token)
        (directory / "secret").chmod(0o666)
        return directory / "secret", token

    def bystander(self) -> subprocess.Popen[bytes]:
        """A process of the host under this user, ended after the case."""
        process = subprocess.Popen(["sleep", str(new_nap())])
        self.after(process.wait)
        self.after(process.kill)
        return process


def summary(result: Result) -> str:
    """One line of a result for people."""
    text = " ".join(result.text().split())
    return f"{result.cause} {result.exit if result.exit is not None else ''} {text[-160:]}".strip()


def refused(found: Mapping[str, str], *fine: str) -> str:
    """`Breach` naming every attempt that worked; a detail line if none did. With `fine`, any other answer is a breach."""
    open_ = [f"{name}: {what}" for name, what in found.items() if what == "ok" or (fine and what not in fine)]
    if open_:
        raise Breach("possible: " + ", ".join(open_[:8]) + (f" and {len(open_) - 8} more" if len(open_) > 8 else ""))
    if not found:
        raise NotRun("nothing was tried")
    return f"{len(found)} attempts refused"


def check(holds: bool, why: str) -> None:
    """`Breach` with `why` unless it holds."""
    if not holds:
        raise Breach(why)


def new_nap() -> int:
    """Seconds that a process may be told to sleep, by which alone the host finds it."""
    return 100_000_000 + secrets.randbelow(900_000_000)


def naps(nap: int) -> list[int]:
    """The host's pids of `sleep NAP`, wherever it runs. Empty, too, where another kernel runs it."""
    found, wanted = [], f"sleep\0{nap}\0".encode()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                if Path("/proc", entry, "cmdline").read_bytes() == wanted:
                    found.append(int(entry))
            except OSError:
                continue
    return found


def eventually(holds: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Wait until it holds; whether it did in time."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def descriptors() -> int:
    """Open descriptors of this process, but for connections to a named peer: a daemon's client pools those."""
    return sum(not _has_named_peer(int(fd)) for fd in os.listdir("/proc/self/fd"))


def _has_named_peer(fd: int) -> bool:
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            return False
        with socket.socket(fileno=os.dup(fd)) as connection:
            return bool(connection.getpeername())
    except OSError:
        return False


class Memory:
    """How much this process grows: `grown()` is the peak since it was made, bytes."""

    def __init__(self) -> None:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        except OSError:
            pass
        self._before = self._peak()

    @staticmethod
    def _peak() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))

    def grown(self) -> int:
        """Bytes."""
        return self._peak() - self._before


@dataclass(frozen=True)
class Traces:
    """What the host's kernel holds for one sandbox, found through a process in it."""

    pids: tuple[int, ...]
    cgroups: frozenset[Path]
    mounts: frozenset[tuple[str, str]]

    @classmethod
    def of(cls, pids: Iterable[int], before: Set[str]) -> Traces:
        """Of processes that the host sees; the mounts are those in this process's view that were not there `before`."""
        pids = tuple(pids)
        cgroups: set[Path] = set()
        inside: set[str] = set()
        for pid in pids:
            cgroups |= set(_cgroups(str(pid)))
            inside |= mounts(str(pid))
        new = {(place, row) for place, row in _mounted("self") if row in inside and row not in before}
        return cls(pids, frozenset(cgroups - set(_cgroups("self"))), frozenset(new))

    def left(self) -> list[str]:
        """What is still there."""
        alive = [f"process {pid}" for pid in self.pids if Path(f"/proc/{pid}").exists()]
        groups = [f"cgroup {path}" for path in self.cgroups if path.exists()]
        return alive + groups + [f"mount {place} {row}" for place, row in self.mounts & _mounted("self")]


def _cgroups(pid: str) -> Iterable[Path]:
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, names, path = line.split(":", 2)
        for name in names.removeprefix("name=").split(","):
            for root in ("/sys/fs/cgroup", "/sys/fs/cgroup/unified"):
                place = Path(root, name, path.strip("/"))
                if path != "/" and place.is_dir():
                    yield place


def mounts(pid: str = "self") -> set[str]:
    """Device, type and options of each mount in the view of a process."""
    return {row for _, row in _mounted(pid)}


def _mounted(pid: str) -> set[tuple[str, str]]:
    """The same with where each is mounted: a device number may be another mount's soon."""
    try:
        lines = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
    except OSError:
        return set()
    return {(line.split()[4], f"{line.split()[2]} {line.partition(' - ')[2]}") for line in lines}
