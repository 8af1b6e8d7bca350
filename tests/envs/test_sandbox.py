"""One conformance suite for all sandbox backends: what `envs/sandbox/base.py` promises, and what must not be possible."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from envs.errors import SandboxDead, Unsupported
from envs.sandbox import Backend, FileChange, Limits, Result, Sandbox, cgroups, helper, make_backend, probe
from envs.sandbox import channel as channels
from envs.sandbox.clocks import GUARD
from envs.sandbox.owner import PREFIX, Owner, current
from tests.envs.images import docker_archive, system, tar

BACKENDS = [pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("native", "docker")]
PYTHON = f"{sys.executable} -I"
NAP = 100_000_000 + os.getpid()
"""Seconds that a process of this run sleeps, by which the host sees it."""


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    made = make_backend(request.param)
    yield made
    made.close()


@pytest.fixture
def create(backend: Backend) -> Iterator[Callable[..., Sandbox]]:
    made: list[Sandbox] = []

    def new(**options: object) -> Sandbox:
        made.append(backend.create(**options))
        return made[-1]

    yield new
    for sandbox in made:
        sandbox.close()


@pytest.fixture
def box(create: Callable[..., Sandbox]) -> Sandbox:
    return create(files={"a.txt": b"one\n", "sub/b.txt": b"two\n", "sub/c.sh": FileChange(b"echo c\n", 0o755)})


def sh(box: Sandbox, script: str, timeout: float = 20.0) -> str:
    result = box.run(script, timeout=timeout)
    assert result.ok, result
    return result.text()


# ---- commands ----


@pytest.mark.parametrize(
    ("script", "exit_status", "text", "restarted"),
    [
        ("echo out; echo err >&2", 0, "out\nerr\n", False),
        ("false", 1, "", False),
        ("exit 3", 3, "", True),
        ("exec true", 0, "", True),
        ("exec sh -c 'echo x; exit 5'", 5, "x\n", True),
        ("set -e; false; echo no", 1, "", True),
        ("sh -c 'kill -SEGV $$' 2>/dev/null", 139, None, False),
        ("cat <<E\n$((1+1)) 'q' \"\nE", 0, "2 'q' \"\n", False),
        ("echo 'unterminated", 2, None, False),
        ("if", 2, None, False),
        ("", 0, "", False),
        ("# only a comment", 0, "", False),
        ("printf 'no newline'", 0, "no newline", False),
        ("echo a # 'b\necho c \\\n d", 0, "a\nc d\n", False),
        ("exec 1>&- 2>&-; echo lost", 1, "", False),
        ("exec >/tmp/log; echo kept", 0, "", False),
        ("echo é ; printf '\\xff'", 0, "é\n�", False),
        ('read x; echo "<$x>"; cat', 0, "<>\n", False),
        ("ls /proc/self/fd | wc -l", 0, "4\n", False),
        ("no-such-command", 127, "bash: line 1: no-such-command: command not found\n", False),
    ],
)
def test_command(box: Sandbox, script: str, exit_status: int, text: str | None, restarted: bool) -> None:
    result = box.run(script, timeout=20)
    assert (result.cause, result.exit, result.restarted) == ("exit", exit_status, restarted), result
    assert text is None or result.text() == text
    assert sh(box, "echo next") == "next\n"


def test_shell_state_is_kept_and_restored(box: Sandbox) -> None:
    sh(box, "cd sub; export A=$'x \"y\\n\\'$z'; plain=1; f() { echo f; }; shopt -s extglob; alias q=r")
    assert sh(box, 'f; pwd; echo "$A $plain"') == "f\n/repo/sub\nx \"y\n'$z 1\n"
    for script, cause in [
        ("exit 0", "exit"),
        ("kill -9 $$", "signal"),
        ("sleep 60", "timeout"),
        ("exec false", "exit"),
    ]:
        result = box.run(script, timeout=0.3)
        assert (result.cause, result.restarted) == (cause, True), result
        assert sh(box, 'pwd; echo "$A"; type f 2>/dev/null || echo gone') == "/repo/sub\nx \"y\n'$z\ngone\n"
    sh(box, "unset A; export LATE=1")
    box.run("exit", timeout=5)
    assert sh(box, "echo ${A-unset} $LATE") == "unset 1\n"


def test_exports_that_are_too_much_to_keep_end_the_shell(box: Sandbox) -> None:
    sh(box, "cd sub; export E=1")
    result = box.run("export BIG=$(printf %01100000d 0) SMALL=2; echo done", timeout=20)
    assert (result.cause, result.restarted, result.text()) == ("signal", True, "done\n"), result.cause
    assert sh(box, "pwd; echo $E ${BIG-gone} ${SMALL-gone}") == "/repo/sub\n1 gone gone\n"
    sh(box, "export BIG=$(printf %0900000d 0)")  # a shell that starts reads them before its first command
    box.run("exit", timeout=20)
    assert sh(box, ": ${#BIG}; echo ${#BIG}" + " " * 900_000) == "900000\n"


def test_a_command_that_takes_the_shells_place_is_waited_for_at_rest(box: Sandbox) -> None:
    result = box.run("exec sleep 1", timeout=20)
    assert (result.cause, result.exit, result.restarted) == ("exit", 0, True)
    assert result.cpu is None or result.cpu < 0.3, result


def test_only_the_declared_environment(box: Sandbox) -> None:
    os.environ["CODEWORLD_TEST_SECRET"] = "x"
    names = {line.partition("=")[0] for line in sh(box, "env").splitlines()}
    assert {"PATH", "HOME", "LANG", "PYTHONHASHSEED"} <= names
    assert not names - {"PATH", "HOME", "USER", "LOGNAME", "LANG", "TERM", "PYTHONDONTWRITEBYTECODE", "PYTHONHASHSEED",
                        "PWD", "OLDPWD", "SHLVL", "_"}  # fmt: skip
    assert sh(box, "command -v python3").strip() == f"{sys.prefix}/bin/python3"


@pytest.mark.parametrize(
    "script",
    [
        "printf() { :; }; read() { false; }; eval() { :; }; export() { :; }; echo() { :; }; cd() { :; }; exit() { :; }",
        "trap 'printf x' DEBUG; trap 'printf y' ERR RETURN; set -x",
        "IFS=0123456789/; set -u -f -o pipefail",
        "PROMPT_COMMAND='exit 9'; PS1='$ '; BASH_ENV=/dev/zero; readonly PATH; readonly IFS",
        "exec 3>&1 7>/tmp/x; set -o noclobber; set -o posix",
        "trap '' TERM INT HUP CHLD; ulimit -n 20; umask 0",
        'for i in $(seq 3 250); do eval "exec $i>&-"; done',
        "builtin() { :; }",
        "enable -n read printf; set -r",
    ],
)
def test_tampering_with_the_shell_does_not_stop_it(box: Sandbox, script: str) -> None:
    box.run(script, timeout=5)
    first = box.run("command true; /bin/echo one", timeout=5)
    second = box.run("/bin/sh -c '/bin/echo two; exit 7'", timeout=5)
    if not (first.restarted or second.restarted):
        assert first.exit == 0 and second.exit == 7
    box.kill_all()
    box.run("exit", timeout=5)
    assert sh(box, "/bin/echo three").endswith("three\n")


def test_timeout_kills_the_tree_and_keeps_partial_output(box: Sandbox) -> None:
    sh(box, "export E=1; cd sub")
    began = time.monotonic()
    result = box.run(
        "echo begun; setsid sleep 301 & (trap '' TERM INT; nohup sleep 302 >/dev/null 2>&1 &); sleep 303", timeout=0.5
    )
    assert time.monotonic() - began < 10
    assert (result.cause, result.exit, result.restarted, result.head) == ("timeout", None, True, b"begun\n"), result
    assert sh(box, "pwd; echo $E; ps axo args | grep -c '[s]leep 30' || true") == "/repo/sub\n1\n0\n"
    for hang in ("while :; do :; done", "kill -STOP $$", "trap '' TERM; read < <(sleep 60)", "yes"):
        assert box.run(hang, timeout=0.3).cause == "timeout"
        assert sh(box, "echo fine") == "fine\n"


SPIN = "while :; do :; done"


def test_silence_is_a_clock_of_its_own(box: Sandbox) -> None:
    sh(box, "export E=1; cd sub")
    result = box.run("echo begun; setsid sleep 301 & sleep 302", timeout=60, silence=0.4)
    assert (result.cause, result.clock, result.restarted, result.head) == ("timeout", "silence", True, b"begun\n"), (
        result
    )
    assert result.wall < 10
    assert sh(box, "pwd; echo $E; ps axo args | grep -c '[s]leep 30' || true") == "/repo/sub\n1\n0\n"
    result = box.run("for i in 1 2 3 4 5; do echo $i; sleep 0.4; done", timeout=60, silence=1.5)
    assert (result.cause, result.clock, result.wall > 1.5) == ("exit", None, True), result
    assert box.run("sleep 60", timeout=0.3, silence=9.0).clock == "total"
    with pytest.raises(ValueError, match="silence=0"):
        box.run("true", timeout=5, silence=0)


def test_a_sleeping_command_gets_no_longer_than_its_timeout(box: Sandbox) -> None:
    result = box.run("sleep 60", timeout=1.0)
    assert result.clock == "total" and 1.0 <= result.wall < 4.0, result


@pytest.mark.parametrize("hidden", [False, True])
def test_a_busy_command_gets_its_timeout_in_cpu_seconds(box: Sandbox, hidden: bool) -> None:
    orphans = "while :; do (sh -c 'i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done' &); sleep 0.02; done"
    result = box.run(orphans if hidden else SPIN, timeout=0.5)
    assert result.clock == "total" and result.wall <= 0.5 * GUARD + 2, result
    if result.cpu is not None and result.wall < 0.5 * GUARD:
        assert 0.3 < result.cpu < 2.0, result


@pytest.mark.root
def test_a_starved_command_goes_on_up_to_the_guard(create: Callable[..., Sandbox]) -> None:
    """A CPU quota starves a command without loading the host."""
    box = create(limits=Limits(cpus=0.2))
    if box.run("true", timeout=20).cpu is None:
        pytest.skip("no cgroups here")
    work = f"{PYTHON} -c 'import time\nwhile time.process_time() < 0.4: pass'"
    for clocks in ({"timeout": 0.7}, {"timeout": 60, "silence": 0.7}):
        result = box.run(work, **clocks)
        assert result.ok and result.wall > 1.4, result
    box = create(limits=Limits(cpus=0.05))
    result = box.run(SPIN, timeout=0.2)
    assert result.clock == "total" and 0.2 * GUARD <= result.wall < 0.2 * GUARD + 2, result


def test_a_broker_that_says_it_lives_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "GRACE", 1.0)
    alive, answer = struct.pack("<IcQ", 9, b"H", 0), struct.pack("<IcBiBQII", 26, b"K", 0, 0, 0, 2, 1, 2) + b"/ok"
    mine, broker = socket.socketpair()
    channel = channels.Channel(mine)

    def starved() -> None:
        for part in (alive, alive[:2], alive[2:] + alive, alive + answer[:7]):
            broker.sendall(part)
            time.sleep(0.5)
        broker.sendall(answer[7:])

    with ThreadPoolExecutor(1) as pool, broker, mine:
        pool.submit(starved)
        channel.proc = os.open("/proc", os.O_RDONLY)
        reply = channel.run(b"", b"", 60.0, 2)
        assert (reply.how, reply.cwd, reply.head) == ("exit", "/", b"ok") and reply.wall > 1.5
        with pytest.raises(SandboxDead, match="stopped answering"):
            channel.run(b"", b"", 60.0, 2)
        os.close(channel.proc)


def test_a_command_that_ends_just_when_its_time_does_has_ended() -> None:
    """What was to end it is answered by itself, and that answer is no other request's."""
    run = struct.pack("<IcBiBQII", 26, b"K", 0, 3, 0, 2, 1, 2) + b"/ok"
    mine, broker = socket.socketpair()
    channel = channels.Channel(mine)
    channel.proc = os.open("/proc", os.O_RDONLY)
    with broker, mine:
        broker.sendall(struct.pack("<IcQ", 9, b"H", 0) + run + struct.pack("<Ic", 1, b"K"))
        reply = channel.run(b"", b"", 0.0, 2)
        assert (reply.how, reply.status, reply.clock, reply.head) == ("exit", 3, None, b"ok")
        assert broker.recv(1 << 16).endswith(struct.pack("<Ic", 1, b"X"))
        broker.sendall(struct.pack("<Ic", 2, b"K") + b"!")
        assert channel.ask(b"G", b"") == b"!"
    os.close(channel.proc)


def test_kill_minus_one(box: Sandbox) -> None:
    sh(box, "sleep 300 &")
    result = box.run(f"{PYTHON} -c 'import os; os.kill(-1, 9)'; echo not reached", timeout=10)
    assert (result.cause, result.restarted) == ("signal", True), result
    assert sh(box, "kill -9 1; kill -STOP 1; kill -TERM 1; echo alive") == "alive\n"


def test_background_job_does_not_hold_the_command(box: Sandbox) -> None:
    result = box.run("sleep 300 & echo at once", timeout=20)
    assert result.text() == "at once\n" and result.wall < 10
    sh(box, "(sleep 0.2; head -c 200000 /dev/zero; touch done) & :")
    deadline = time.monotonic() + 10
    while box.run("test -e done", timeout=5).exit and time.monotonic() < deadline:
        time.sleep(0.05)  # the job ends although nobody runs a command that would read its output
    assert sh(box, "test -e done && echo yes").endswith("yes\n")


def test_output_is_exact_or_capped_with_its_true_size(create: Callable[..., Sandbox]) -> None:
    box = create(limits=Limits(output_kb=8))
    script = f"{PYTHON} -c 'import os; os.write(1, bytes(range(256)) * 16)'"
    assert box.run(script, timeout=20).head == bytes(range(256)) * 16
    for size in (8191, 8192, 8193, 12289, 50_000_003):
        program = f"import sys; sys.stdout.buffer.write(bytes(i * i % 251 for i in range(1000)) * {size // 1000 + 1})"
        result = box.run(f"{PYTHON} -c '{program}' | head -c {size}", timeout=60)
        expected = (bytes(i * i % 251 for i in range(1000)) * (size // 1000 + 1))[:size]
        assert result.total == size
        if size <= 8192:
            assert (result.head, result.tail) == (expected, b"")
        else:
            assert (result.head, result.tail) == (expected[:4096], expected[-4096:])
            assert f"{size - 8192} bytes cut" in result.text()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    box.run("head -c 200000000 /dev/zero", timeout=60)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - grown < 20_000


def test_stdin(box: Sandbox) -> None:
    data = os.urandom(300_000)
    result = box.run("sha256sum; ls -A /tmp", timeout=20, stdin=data)
    assert result.text().split()[0] == hashlib.sha256(data).hexdigest()
    assert sh(box, "cat; ls -A /tmp | wc -l") == "0\n"
    with pytest.raises(ValueError, match="stdin"):
        box.run("cat", timeout=5, stdin=bytes(5 << 20))


def test_odd_scripts(box: Sandbox) -> None:
    assert box.run("echo a\0b", timeout=5).exit == 126
    assert box.run("x" * (2 << 20), timeout=5).exit == 126
    assert sh(box, f"x='{'y' * 100_000}'; echo ${{#x}}") == "100000\n"
    assert sh(box, "printf %s '\udcff\ud800' | wc -c").strip().isdigit()
    assert box.run("sleep 5", timeout=0).cause == "timeout"


def test_two_hundred_commands_are_quick(box: Sandbox) -> None:
    began = time.monotonic()
    for index in range(200):
        assert box.run(f"echo {index}", timeout=5).head == b"%d\n" % index
    assert time.monotonic() - began < 5


# ---- limits ----


def test_memory(create: Callable[..., Sandbox]) -> None:
    box = create(limits=Limits(memory_mb=64, disk_mb=16))
    result = box.run(f"{PYTHON} -c 'x = bytearray(300 << 20)'", timeout=30)
    assert result.cause == "oom" or result.exit in (1, 137), result
    assert sh(box, "echo alive") == "alive\n"
    result = box.run(f"{PYTHON} -c 'l = []\nwhile 1: l.append(bytes(1 << 20))' & wait $!", timeout=30)
    assert result.cause == "oom" or result.exit in (1, 137), result
    assert sh(box, "echo alive") == "alive\n"


def test_pids(create: Callable[..., Sandbox]) -> None:
    box, other = create(limits=Limits(pids=16)), create()
    program = "import os, time\nfor i in range(15): os.fork() or time.sleep(60)"
    sh(box, f"{PYTHON} -c '{program}' >/dev/null 2>&1 &")
    program = "import os\nwhile 1:\n  if not os.fork(): import time; time.sleep(60)"
    result = box.run(f"{PYTHON} -c '{program}'", timeout=30)
    assert result.cause in ("pids", "exit", "signal", "timeout") and not result.ok, result
    if (pids := box.usage().pids) is not None:
        assert pids <= 16 and result.cause == "pids", result
    box.run("b() { b | b & }; b", timeout=2)
    assert sh(other, "echo fine") == "fine\n"
    box.kill_all()
    assert sh(box, "ps axo args | grep -c '[p]ython' || true") == "0\n"


def test_disk(create: Callable[..., Sandbox]) -> None:
    box = create(limits=Limits(disk_mb=8), files={"keep": b"old"})
    result = box.run("head -c 100000000 /dev/zero >big", timeout=30)
    assert (result.cause, result.exit) == ("disk", None), result
    box.run("cat /dev/zero >/tmp/big; cat /dev/zero >/dev/shm/big", timeout=30)
    assert 4 << 20 <= int(sh(box, "cat big /tmp/big /dev/shm/big | wc -c")) <= 8 << 20
    with pytest.raises(OSError, match="space"):
        box.write("keep", bytes(1 << 20))
    assert box.read("keep") == b"old"
    sh(box, "rm big /tmp/big /dev/shm/big")
    box.run(f"{PYTHON} -c 'for i in range(10**6): open(str(i), \"x\")'", timeout=60)
    sh(box, "rm -f [0-9]*; for i in 1 2 3 4; do head -c 1000000 /dev/zero >s$i || exit; done; rm s*")
    with pytest.raises(Unsupported, match="disk_mb"):
        create(limits=Limits(disk_mb=1), files={"f": bytes(2 << 20)})


@pytest.mark.root
def test_cpu_quota_and_usage(create: Callable[..., Sandbox]) -> None:
    box = create(limits=Limits(cpus=0.2))
    result = box.run(f"{PYTHON} -c 'import time; e = time.time() + 1.5\nwhile time.time() < e: pass'", timeout=30)
    if result.cpu is None:
        pytest.skip("no cgroups here")
    assert 0.05 < result.cpu < 0.9 and (result.peak_memory or 0) > 1 << 20


def test_impossible_requests_are_one_line(backend: Backend) -> None:
    for options in (
        {"base": "no-such-image:x"},
        {"workdir": "repo"},
        {"workdir": "/usr/x"},
        {"workdir": "/"},
        {"workdir": "/tmp"},
        {"files": {"../x": b""}},
        {"files": {"/x": b""}},
        {"limits": Limits(output_kb=1 << 20)},
        {"limits": Limits(pids=10**9)},
        {"limits": Limits(memory_mb=10**9)},
        {"limits": Limits(disk_mb=10**20)},
        {"limits": Limits(cpus=1e9)},
        {"files": {"x": "text"}},
        {"files": {"x": None}},
        {"files": {"x": b"", "x/y": b""}},
        {"base": ""},
        {"base": "NO SUCH IMAGE!!"},
        {"base": "x" * 5000},
        {"base": "x\0y"},
        {"base": "/dev/zero"},
    ):
        with pytest.raises(ValueError, match=r"^[^\n]{20,}$"):
            backend.create(**options)  # type: ignore[arg-type]
    for bad in (
        {"memory_mb": 1},
        {"memory_mb": 64.5},
        {"pids": "5"},
        {"cpus": float("nan")},
        {"cpus": 0},
        {"pids": True},
    ):
        with pytest.raises(ValueError, match=r"^limits\.[^\n]{20,}$"):
            Limits(**bad)  # type: ignore[arg-type]


# ---- isolation ----


def test_nothing_of_the_host_is_visible(box: Sandbox, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    for path in (secret, Path(__file__), "/etc/shadow", "/etc/ssh", "/var/run/docker.sock"):
        assert box.run(f"test -e {path}", timeout=5).exit == 1, path
    assert sh(box, "ls -A /home /root /boot /mnt /srv 2>/dev/null | grep -v '^/' | grep -v '^.pyenv' | wc -l") == "0\n"
    assert box.run(": </dev/tty", timeout=5).exit == 1
    assert sh(box, "hostname") == "sandbox\n"
    assert os.uname().nodename not in sh(box, "cat /proc/sys/kernel/hostname /etc/hosts")
    uid = int(sh(box, "id -u"))
    assert uid != 0 and sh(box, "id -G") == f"{uid}\n"
    if os.geteuid() == 0:
        assert uid > 1_000_000_000  # the host's uid too, as root makes no user namespace
    assert len(sh(box, "ls -d /proc/[0-9]*").split()) <= 5


def test_capabilities_and_filter(box: Sandbox) -> None:
    status = dict(line.split(":", 1) for line in sh(box, "cat /proc/self/status").splitlines())
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[name], 16) == 0, name
    assert (status["NoNewPrivs"].strip(), status["Seccomp"].strip()) == ("1", "2")


@pytest.mark.parametrize(
    "script",
    [
        "mount -t tmpfs x /tmp",
        "mount -o remount,rw /usr",
        "umount /usr",
        "unshare -U true",
        "unshare -m true",
        "unshare -n true",
        "nsenter -t 1 -m true",
        "mknod /tmp/sda b 8 0",
        "echo 1 >/proc/sys/kernel/core_pattern",
        "echo h >/proc/sysrq-trigger",
        "echo x >/proc/1/comm",
        "touch /x",
        "touch /usr/x",
        "touch /etc/x",
        "rm -rf /etc/passwd",
        "cat /proc/1/mem",
        "cat /proc/1/environ",
        "ls /proc/1/fd",
        "cat /proc/1/fd/3",
        "ls /proc/1/root/",
        "cat /proc/kcore",
        "dmesg",
        "sethostname x || hostname x",
        "chroot / true",
        "date -s 2001-01-01",
        "ulimit -n 100000",
        "renice -n -5 $$",
        "chrt -f 1 true",
    ],
)
def test_refused(box: Sandbox, script: str) -> None:
    result = box.run(f"{script} 2>&1 >/dev/null", timeout=10)
    assert result.exit not in (0, None), result


SYSCALLS = """
import ctypes, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def call(nr, *args):
    ctypes.set_errno(0)
    return ctypes.get_errno() if libc.syscall(nr, *args) < 0 else 0
nrs = {"ptrace": (101, 0), "bpf": (321, 0), "perf": (298, 0), "uffd": (323, 0), "io_uring": (425, 1), "kexec": (246, 0),
  "keyctl": (250, 0), "open_by_handle": (304, 0), "vm_read": (310, 1), "pidfd_getfd": (438, 0), "setns": (308, 0),
  "fsopen": (430, b"tmpfs"), "open_tree": (428, -100, b"/", 1), "module": (313, 0), "clone3": (435, 0), "unshare": (272, 0x10000000),
  "clone": (56, 0x10000000 | 17, 0, 0, 0, 0), "clone_pid": (56, 0x20000000 | 17, 0, 0, 0, 0), "x32": (0x40000000 + 39,)}
for name, args in nrs.items():
    print(name, call(*args))
for family in (40, 38, 17, 31):
    try: socket.socket(family, 1); print("socket", family, 0)
    except OSError as error: print("socket", family, error.errno)
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers are those of x86_64")
def test_system_calls_are_refused(box: Sandbox) -> None:
    box.write("/tmp/calls.py", SYSCALLS.encode())
    for line in sh(box, f"{PYTHON} /tmp/calls.py").splitlines():
        assert int(line.rsplit(" ", 1)[1]) in (1, 38, 97), line  # EPERM, ENOSYS, EAFNOSUPPORT


def test_network_is_loopback_only(box: Sandbox) -> None:
    program = "import socket\ns = socket.create_server(('127.0.0.1', 0)); socket.create_connection(s.getsockname()); print('lo')"
    assert sh(box, f'{PYTHON} -c "{program}"') == "lo\n"
    program = "import socket\nsocket.create_connection(('192.0.2.1', 80), 3)"
    assert "nreachable" in box.run(f'{PYTHON} -c "{program}"', timeout=20).text()
    assert sh(box, "grep -c @ /proc/net/unix || true").strip() == "0"  # no abstract sockets of the host
    assert sh(box, "tail -n +3 /proc/net/dev | wc -l") == "1\n"


def test_magic_paths_are_not_the_brokers(box: Sandbox) -> None:
    sh(box, "ln -s /proc/self/fd/3 fd; ln -s /proc/self/mem mem; ln -s /proc/self/environ e")
    for path in ("fd", "mem", "e", "/proc/self/mem", "/proc/self/oom_score_adj", "/proc/1/environ"):
        with pytest.raises(OSError):
            box.read(path)
        with pytest.raises(OSError):
            box.write(path, b"x")
    assert sh(box, "echo alive") == "alive\n"


# ---- files ----


def test_read_and_write(box: Sandbox) -> None:
    assert box.read("a.txt") == box.read("/repo/a.txt") == b"one\n"
    sh(box, "cd sub")
    assert box.read("b.txt") == b"two\n"
    data = os.urandom(3_000_001)
    box.write("new/dir/big", data, mode=0o600)
    assert box.read("new/dir/big", limit=1 << 22) == data
    assert sh(box, "stat -c '%a %U' new/dir/big c.sh") == "600 agent\n755 agent\n"
    box.write("c.sh", b"echo longer than before\n")
    box.write("c.sh", b"echo d\n")
    assert sh(box, "./c.sh; stat -c %a c.sh") == "d\n755\n"
    for name in ("-dash", "new\nline", "quo'te\"$(x)`", "x" * 255, "é\udcff"):
        box.write(name, b"odd")
        assert box.read(name) == b"odd"


def test_read_and_write_errors(box: Sandbox) -> None:
    sh(box, "mkfifo pipe; ln -s missing dangling; ln -s loop loop; mkdir -m 0 locked; chmod 0 a.txt")
    cases: list[tuple[str, type[OSError]]] = [
        ("missing", FileNotFoundError),
        ("sub", IsADirectoryError),
        ("a.txt", PermissionError),
        ("locked/x", PermissionError),
        ("a.txt/x", NotADirectoryError),
        ("dangling", FileNotFoundError),
        ("pipe", OSError),
        ("loop", OSError),
        ("/dev/zero", OSError),
        ("", OSError),
        ("a\0b", OSError),
        ("y" * 300, OSError),
        ("y/" * 3000, OSError),
    ]
    for path, kind in cases:
        with pytest.raises(kind) as caught:
            box.read(path)
        assert "\n" not in str(caught.value)
    for path in ("sub", "/etc/passwd", "/usr/x", "/x", "pipe", "/dev/null", "locked/x"):
        with pytest.raises(OSError):
            box.write(path, b"x")
    with pytest.raises(OSError, match="limit"):
        box.read("/etc/passwd", limit=3)


def test_changes_are_exact(box: Sandbox) -> None:
    assert dict(box.changes()) == {}
    outside = "/etc/passwd"
    sh(
        box,
        f"""echo more >>a.txt; rm sub/b.txt; chmod 644 sub/c.sh; mkdir -p n/m; printf '\\0\\xff' >n/m/x; : >empty
        ln -s {outside} abs; ln -s a.txt rel; ln -s nowhere dangling; ln -s / dir; mkfifo pipe; ln empty hard
        truncate -s 5M sparse; mkdir deep; printf x >$'latin\\xe9'; chmod 4755 n/m/x; mkdir only/ ; mv deep only/""",
    )
    assert dict(box.changes()) == {
        "a.txt": FileChange(b"one\nmore\n", 0o644),
        "empty": FileChange(b"", 0o644),
        "hard": FileChange(b"", 0o644),
        "n/m/x": FileChange(b"\0\xff", 0o755),
        "sparse": FileChange(bytes(5 << 20), 0o644),
        "sub/b.txt": FileChange(None),
        "sub/c.sh": FileChange(b"echo c\n", 0o644),
    }
    assert list(box.changes()) == sorted(box.changes())
    sh(box, "rm -rf * && mkdir a.txt && ln -s /repo/x sub")
    assert dict(box.changes()) == {name: FileChange(None) for name in ("a.txt", "sub/b.txt", "sub/c.sh")}


def test_host_walk_follows_nothing(box: Sandbox) -> None:
    sh(
        box,
        "rm -r sub; ln -s /usr/lib sub; ln -s ../../../../etc up; ln -s /proc/self/root r; mkdir d; ln -s ../d d/loop",
    )
    assert dict(box.changes()) == {"sub/b.txt": FileChange(None), "sub/c.sh": FileChange(None)}
    sh(box, "(while :; do mkdir -p race; echo x >race/f; rm -r race; ln -s /etc race; rm race; done) >/dev/null 2>&1 &")
    for _ in range(50):
        assert set(box.changes()) <= {"sub/b.txt", "sub/c.sh", "race/f"}
    box.kill_all()
    sh(
        box,
        f'{PYTHON} -c \'import os\nfor i in range(600): os.mkdir("d"); os.chdir("d")\nopen("x", "w")\' ; rm -rf race',
    )
    assert not any(path.endswith("d/x") for path in box.changes())
    sh(box, "rm -rf d; for i in $(seq 40); do ln big l$i 2>/dev/null || head -c 5000000 /dev/zero >big; done")
    changes = box.changes()
    assert len(changes["l40"].data or b"") == 5_000_000 and changes["l2"].data is changes["l40"].data


def test_fork_and_snapshot(box: Sandbox) -> None:
    sh(box, "cd sub; export A='1 2'; echo new >n.txt; chmod 700 n.txt")
    first, second = box.fork(2)
    with first, second:
        assert sh(first, "pwd; echo $A; ./c.sh") == "/repo/sub\n1 2\nc\n"
        sh(first, "rm n.txt; echo f >>b.txt")
        assert dict(first.changes()) == {"sub/b.txt": FileChange(b"two\nf\n")}
        assert dict(second.changes()) == dict(box.changes()) == {"sub/n.txt": FileChange(b"new\n", 0o700)}
        first.close()
        assert sh(second, "echo $A") == sh(box, "echo $A") == "1 2\n"
    with box.snapshot() as snapshot:
        assert (snapshot.cwd, snapshot.exports["A"]) == ("/repo/sub", "1 2")
        sh(box, "echo later >>n.txt; rm b.txt")
        box.close()
        with snapshot.start() as child, snapshot.start() as other:
            sh(child, "rm -r ../sub; mkdir ../sub; echo x >../sub/n.txt")
            assert sh(other, "cat n.txt") == "new\n"
            gone = {f"sub/{name}": FileChange(None) for name in ("b.txt", "c.sh")}
            assert dict(child.changes()) == gone | {"sub/n.txt": FileChange(b"x\n", 0o644)}
    with pytest.raises(SandboxDead):
        snapshot.start()


def test_every_generation_of_forks_may_fill_its_disk(create: Callable[..., Sandbox]) -> None:
    box = create(limits=Limits(disk_mb=8))
    for name in "abc":
        sh(box, f"head -c 6000000 /dev/urandom >{name}")
        (child,) = box.fork(1)
        box.close()
        box = child
    with box:
        assert {path: len(change.data or b"") for path, change in box.changes().items()} == dict.fromkeys(
            "abc", 6000000
        )
        with pytest.raises(ValueError, match="at least 1"):
            box.fork(0)


def test_a_chain_of_forks(box: Sandbox) -> None:
    for depth in range(4):
        sh(box, f"echo {depth} >>a.txt; mkdir d{depth}; touch d{depth}/x; rm -rf d{depth - 1}")
        (child,) = box.fork(1)
        box.close()
        box = child
    with box:
        assert sh(box, "cat a.txt; ls -d d*") == "one\n0\n1\n2\n3\nd3\n"
        assert dict(box.changes()) == {"a.txt": FileChange(b"one\n0\n1\n2\n3\n"), "d3/x": FileChange(b"")}


# ---- lifetimes ----


def marks() -> list[str]:
    """Processes of the host that belong to sandboxes of this run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if (text := path.read_bytes()).startswith(f"sleep\0{NAP}".encode()):
                found.append(text.decode())
        except OSError:
            continue
    return found


def groups(pid: int = os.getpid()) -> list[str]:
    """Cgroups of an owner; those of others come and go meanwhile, which `os.walk` bears."""
    below = os.walk("/sys/fs/cgroup")
    return [f"{path}/{name}" for path, names, _ in below for name in names if name.startswith(f"codeworld-{pid}-")]


def mounts() -> list[str]:
    """Mounts of the host but those of containers and of other owners, who may be starting some."""
    lines = Path("/proc/mounts").read_text().splitlines()
    own = f"/{PREFIX}{os.getpid()}-"
    return [line for line in lines if "/docker/" not in line and (f"/{PREFIX}" not in line or own in line)]


def eventually(check: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not check() and time.monotonic() < deadline:
        time.sleep(0.02)
    return check()


def test_close_leaves_nothing(backend: Backend) -> None:
    mounted, before = mounts(), len(list(Path("/proc/self/fd").iterdir()))
    box = backend.create()
    sh(box, f"setsid sleep {NAP} & sleep {NAP} & cd /tmp; exec 9>deleted; rm deleted")
    assert eventually(lambda: len(marks()) == 2)
    box.close()
    box.close()
    assert not marks() and not groups()
    idle = 3 if backend.name == "docker" else 0  # the SDK keeps a connection for each address it called, 25 at most
    assert mounts() == mounted and len(list(Path("/proc/self/fd").iterdir())) <= before + idle
    for call in (
        lambda: box.run("true", timeout=1),
        box.changes,
        box.usage,
        lambda: box.read("x"),
        lambda: box.fork(1),
    ):
        with pytest.raises(SandboxDead):
            call()


def test_kill_all(box: Sandbox) -> None:
    sh(box, f"cd sub; export A=1; setsid sleep {NAP} & :")
    box.kill_all()
    assert not marks()
    assert sh(box, "pwd; echo $A") == "/repo/sub\n1\n"


def test_close_from_another_thread_ends_a_command(backend: Backend) -> None:
    box = backend.create()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(box.run, f"sleep {NAP}", timeout=60)
        assert eventually(lambda: bool(marks()))
        box.close()
        with pytest.raises(SandboxDead):
            running.result(timeout=20)
    assert eventually(lambda: not marks())


def test_many_at_once(backend: Backend) -> None:
    count = 32 if backend.name == "native" else 6

    def episode(index: int) -> list[Result]:
        with backend.create(files={"n": str(index).encode()}) as box:
            results = [box.run(f"cat n; export N=$((N + {index})); echo -$N", timeout=60) for _ in range(5)]
            box.write("out", b"%d" % index)
            assert box.changes()["out"].data == b"%d" % index
            return results

    with ThreadPoolExecutor(count) as pool:
        for index, results in enumerate(pool.map(episode, range(count))):
            assert [r.text() for r in results] == [f"{index}-{index * (k + 1)}\n" for k in range(5)]
    assert not groups()


OWNER = """
import sys, time
from envs.sandbox import make_backend
box = make_backend(sys.argv[1]).create()
box.run("setsid sleep {0} & sleep {0} &".format(sys.argv[2]), timeout=20)
print("ready", flush=True)
time.sleep(60)
"""


def test_killed_owner_leaves_nothing(backend: Backend) -> None:
    command = [sys.executable, "-c", OWNER, backend.name, str(NAP)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2], text=True) as owner:
        assert owner.stdout and owner.stdout.readline() == "ready\n"
        seen = eventually(lambda: len(marks()) == 2)
        owner.send_signal(signal.SIGKILL)
    assert seen
    assert eventually(lambda: not marks())
    assert eventually(lambda: not groups(owner.pid))


@pytest.mark.native
def test_a_forked_process_gets_its_own_helper() -> None:
    backend = make_backend("native")
    box = backend.create()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            with backend.create() as mine:
                status = 0 if mine.run("true", timeout=20).ok else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert sh(box, "echo mine") == "mine\n"
    backend.close()


@pytest.mark.docker
def test_an_image_made_without_a_registry() -> None:
    script = Path(__file__).parents[2] / "docker" / "offline-base.sh"
    subprocess.run(["sh", script], check=True, timeout=120, capture_output=True)
    backend = make_backend("docker")
    with backend.create(base="codeworld-base", workdir="/testbed", files={"a.py": b"print(2)"}) as box:
        assert sh(box, "whoami; pwd; python a.py; ls /work 2>&1 | grep -c 'No such'") == "agent\n/testbed\n2\n1\n"
        box.write("b", b"x")
        assert dict(box.changes()) == {"b": FileChange(b"x")}
    backend.close()


# ---- hosts that lack something ----


@pytest.mark.native
@pytest.mark.root
def test_root_without_cgroups_uses_resource_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "hierarchy", lambda: None)
    backend = make_backend("native")
    with backend.create(limits=Limits(memory_mb=128, pids=8)) as box:
        assert "MemoryError" in box.run(f"{PYTHON} -c 'bytearray(1 << 30)'", timeout=20).text()
        program = "import os\nwhile 1:\n  if not os.fork(): import time; time.sleep(60)"
        assert "BlockingIOError" in box.run(f"{PYTHON} -c '{program}'", timeout=20).text()
        box.kill_all()
        assert (sh(box, "echo alive"), box.usage().memory) == ("alive\n", None)
        assert box.run(f"{PYTHON} -c 'import os; os.memfd_create(\"x\")'", timeout=20).exit == 1
    backend.close()


def test_cgroups_are_found_where_they_can_be_made(tmp_path: Path) -> None:
    member = tmp_path / "member"
    root = tmp_path / "v2"
    scope = root / "user.slice" / "run.scope"
    scope.mkdir(parents=True)
    for path in (root, scope.parent, scope):
        (path / "cgroup.controllers").write_text("cpu memory pids")
        (path / "cgroup.procs").touch()
        (path / "cgroup.subtree_control").write_text("cpu memory pids" if path != scope else "")
    (scope / "cgroup.subtree_control").unlink()  # a group with processes can't have children that are limited
    member.write_text("0::/user.slice/run.scope\n")
    found = cgroups.discover(root, member)
    assert found and (found.version, set(found.parents.values())) == (2, {scope.parent})
    dirs, writes = found.plan("g", Limits(memory_mb=8, pids=4, cpus=1.5))
    assert dirs == [(scope.parent / "g", "cgroup.procs")]
    assert dict(writes) == {
        scope.parent / "g" / "memory.max": str(8 << 20),
        scope.parent / "g" / "pids.max": "6",
        scope.parent / "g" / "cpu.max": "150000 100000",
    }
    (scope.parent / "g").mkdir()
    for name, text in {"cpu.stat": "nr 1\nusage_usec 1500000\n", "memory.events": "oom 2\noom_kill 1\n", "memory.peak": "7",
                       "memory.current": "5", "pids.current": "3", "pids.events": "max 9\n"}.items():  # fmt: skip
        (scope.parent / "g" / name).write_text(text)
    expected = cgroups.Counters(memory=5, peak=7, pids=3, cpu=1.5, ooms=1, pid_refusals=9)
    assert found.group("g").read(limits_hit=True) == expected
    member.write_text("4:memory:/a\n3:pids:/a\n2:cpu,cpuacct:/\n0::/\n")
    assert cgroups.discover(tmp_path / "none", member) is None
    root = tmp_path / "v1"
    for name in ("memory/a", "memory", "pids", "cpu", "cpuacct"):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / "tasks").touch()
        (root / name / "cgroup.procs").touch()
    found = cgroups.discover(root, member)
    assert found and found.version == 1
    assert found.parents == {"memory": root / "memory/a", **{name: root / name for name in ("pids", "cpu", "cpuacct")}}


def test_no_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    helper._place.cache_clear()
    try:
        with pytest.raises(Unsupported, match=r"^[^\n]*no C compiler[^\n]*$"):
            helper.helper_path()
    finally:
        helper._place.cache_clear()


def test_no_engine_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent.sock")
    with pytest.raises(Unsupported, match=r"^[^\n]*no engine answers[^\n]*$"):
        make_backend("docker")
    with pytest.raises(ValueError, match="Did you mean 'native'"):
        make_backend("natve")


def test_the_package_is_light() -> None:
    code = "import sys, envs.sandbox; print([m for m in ('docker', 'requests', 'torch') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert out.stdout == "[]\n", out


def test_probe_rows_are_for_a_table() -> None:
    rows = probe()
    assert {"sandbox native", "sandbox docker", "native: memory"} <= {what for what, _, _ in rows}
    assert all("\n" not in cell for row in rows for cell in row)


@pytest.mark.native
def test_an_owners_umask_and_signals_stay_outside() -> None:
    code = (
        "import os, signal; os.umask(0o077); signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from envs.sandbox import make_backend\n"
        "with make_backend('native').create(files={'a': b'1'}) as box:\n"
        "    print(box.run('whoami; umask; stat -c %a a; sh -c \"kill -INT \\\\$\\\\$\"; echo $?', timeout=20).text())"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert out.stdout.split() == ["agent", "0022", "644", "130"], out


# ---- ordinary users ----

EPISODE = """
import json, sys
from envs.sandbox import Limits, make_backend
backend = make_backend("native")
box = backend.create(files={"a.py": b"print(5)"}, limits=Limits(pids=16, memory_mb=256, disk_mb=16))
def ask(script, timeout=30): r = box.run(script, timeout=timeout); return [r.cause, r.exit, r.text()]
out = {"id": ask("id -u"), "run": ask("python3 a.py"), "memory": ask("python3 -c 'bytearray(10**9)'"),
  "disk": ask("head -c 99999999 /dev/zero >big"), "free": ask("rm big"), "etc": ask("touch /etc/x"), "unshare": ask("unshare -U true"),
  "broker": ask("cat /proc/1/environ"), "memfd": ask("python3 -c 'import os; os.memfd_create(\\"x\\")'"),
  "bomb": ask("python3 -c 'import os\\nwhile 1: os.fork() or __import__(\\"time\\").sleep(60)'", 20)}
box.kill_all()
out["after"] = ask("echo ok")
box.write("a.py", b"print(6)")
out["fork"] = box.fork(1)[0].run("python3 a.py", timeout=20).text()
out["changes"] = sorted(box.changes())
with backend.create(base=sys.argv[1]) as image:
    image.run("rm -r pkg; mkdir pkg; echo 2 >pkg/b; echo x >/etc/x; rm /bin/ls; mkdir new; echo 3 >new/c", timeout=20)
    (child,) = image.fork(1)
    child.run("rm pkg/b", timeout=20)
    out["image"] = [child.run("id -u; cat new/c /etc/x", timeout=20).text(), sorted(image.changes()), sorted(child.changes())]
backend.close()
print(json.dumps(out))
"""
USER = 54_321


def as_user(tmp_path: Path, code: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run `code` as an ordinary user with a copy of the sandbox package, by an interpreter that this user may read."""
    python = sys.executable if os.geteuid() else "/usr/bin/python3"
    version = subprocess.run(
        [python, "-c", "import sys; print(sys.version_info >= (3, 11))"], capture_output=True, text=True
    )
    if version.stdout.strip() != "True":
        pytest.skip(f"{python}: no Python 3.11 that an ordinary user may read")
    root = tmp_path / "user"
    source = Path(__file__).parents[2] / "envs"
    shutil.copytree(source / "sandbox", root / "envs" / "sandbox")
    shutil.copy(source / "errors.py", root / "envs")
    (root / "envs" / "__init__.py").touch()
    (root / "cache").mkdir(mode=0o777)
    for path in (root, *root.parents[:-1]):
        path.chmod(path.stat().st_mode | 0o755) if path.is_relative_to(tmp_path.parents[1]) else None
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(root),
        "XDG_CACHE_HOME": str(root / "cache"),
        "HOME": str(root),
    }
    identity = {} if os.geteuid() else {"user": USER, "group": USER, "extra_groups": []}
    if not os.geteuid():
        os.chown(root / "cache", USER, USER)
    return subprocess.run(
        [python, "-c", code, *args], env=environment, cwd="/", capture_output=True, text=True, timeout=120, **identity
    )


@pytest.mark.native
def test_an_ordinary_user_needs_neither_root_nor_cgroups(tmp_path: Path) -> None:
    layer = tar(system() | {"repo/pkg/a": b"1\n", "repo/keep": b"k\n"})
    archive = docker_archive(tmp_path / "image.tar", [layer, tar({"repo/.wh.keep": b""})])
    done = as_user(tmp_path, EPISODE, str(archive))
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout)
    assert out["id"] == ["exit", 0, "1000\n"] and out["run"] == ["exit", 0, "5\n"]
    assert "MemoryError" in out["memory"][2] and out["disk"][0] == "disk"
    for name in ("etc", "unshare", "broker", "memfd", "bomb"):
        assert out[name][1] != 0, (name, out[name])
    assert out["after"] == ["exit", 0, "ok\n"] and out["fork"] == "6\n" and out["changes"] == ["a.py"]
    assert out["image"] == ["0\n3\nx\n", ["new/c", "pkg/a", "pkg/b"], ["new/c", "pkg/a"]]


REAP = """
import json, pathlib, tempfile
from envs.sandbox import reaper
from envs.sandbox.native import NativeBackend
tempfile.tempdir = {place!r}
pathlib.Path({place!r}, {mine!r}).mkdir()
print(json.dumps([list(row) for row in reaper.reap(finders=reaper.everything()[:-2]) if {tag!r} in row.name]))
with NativeBackend().create() as box:
    assert box.run("true", timeout=20).ok
"""


@pytest.mark.native
@pytest.mark.root
def test_an_ordinary_user_reaps_what_is_theirs(tmp_path: Path) -> None:
    dead = Owner(4_194_303, "1", current().host)
    place = tmp_path / "shared"
    place.mkdir()
    place.chmod(0o1777)
    theirs, mine = place / f"{PREFIX}{dead.tag}-root", place / f"{PREFIX}{dead.tag}-user"
    (theirs / "sub").mkdir(parents=True)
    done = as_user(tmp_path, REAP.format(place=str(place), mine=mine.name, tag=dead.tag))
    assert done.returncode == 0, done.stderr
    stuck, freed = json.loads(done.stdout)
    assert freed == ["directory", str(mine), ""] and stuck[:2] == ["directory", str(theirs)] and stuck[2]
    assert theirs.exists() and not mine.exists()


@pytest.mark.native
@pytest.mark.root
def test_without_user_namespaces_the_error_is_one_line(tmp_path: Path) -> None:
    """The limit is per user namespace: lowered in a child namespace, the host's stays as it is."""
    code = "from envs.sandbox import make_backend\ntry: make_backend('native')\nexcept ValueError as e: print(e)"
    lowered = (
        "import os, subprocess, sys\nos.unshare = __import__('ctypes').CDLL(None).unshare\nassert os.unshare(0x10000000) == 0\n"
        "open('/proc/self/setgroups', 'w').write('deny')\nopen('/proc/self/uid_map', 'w').write('1000 54321 1')\n"
        "open('/proc/self/gid_map', 'w').write('1000 54321 1')\nopen('/proc/sys/user/max_user_namespaces', 'w').write('0')\n"
    )
    done = as_user(tmp_path, lowered + code)
    assert done.returncode == 0, done.stderr
    line = done.stdout.strip()
    assert "\n" not in line and "unshare" in line and "max_user_namespaces" in line and "docker" in line, line
