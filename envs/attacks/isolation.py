"""Attack list A: out of the sandbox, to the host or to a neighbour."""

from __future__ import annotations

import os
import socket
import threading
from functools import partial
from pathlib import Path

from envs.attacks import escapes
from envs.attacks.stage import Case, Stage, case, check, naps, new_nap, refused

CASES: list[Case] = []
isolation = partial(case, CASES)


@isolation("A1", "host paths through /proc/*/root, cwd and descriptors", "sees only its own tree", harmless=True)
def host_paths(stage: Stage) -> str:
    """A file of the host that everybody may write is neither read nor written."""
    secret, token = stage.secret()
    found = stage.tries(stage.shared, escapes.PATHS, secret, token)
    check(secret.read_text() == token, "the host's file was changed")
    foreign = stage.bystander().pid
    check(stage.shared.run(f"test -d /proc/{foreign}", timeout=20).exit == 1, f"sees the host's process {foreign}")
    return refused(found)


@isolation("A2", "chroot escape", "refused, or stays inside", harmless=True)
def chroot(stage: Stage) -> str:
    """mkdir, chroot, chdir up, chroot again."""
    return refused(stage.tries(stage.shared, escapes.CHROOT, *stage.secret()))


@isolation("A3", "mount, remount rw, umount, move, bind over /etc", "permission denied")
def mounts(stage: Stage) -> str:
    """Every mount point of the sandbox, by the old and the new mount calls."""
    mark = f"attack-{new_nap()}"
    before = stage.sh(stage.shared, "cat /proc/self/mountinfo")
    found = stage.tries(stage.shared, escapes.MOUNTS, mark)
    check(stage.sh(stage.shared, "cat /proc/self/mountinfo") == before, "the mounts of the sandbox changed")
    for path in ("/", "/usr", "/etc", "/usr/bin"):
        check(not Path(path, mark).exists(), f"the sandbox wrote {path} of the host")
    return refused(found)


_VALUES = ("core_pattern", "modprobe", "hostname", "poweroff_cmd", "domainname")


def _values() -> dict[Path, str]:
    paths = [Path("/proc/sys/kernel", name) for name in _VALUES]
    return {path: path.read_text() for path in paths if path.exists()}


@isolation("A4", "modules, /proc/sys, /sys, core_pattern, release_agent", "denied; the host's values unchanged")
def kernel_files(stage: Stage) -> str:
    """A sandbox that may write core_pattern runs any program as the host's root."""
    before = _values()
    found = stage.tries(stage.shared, escapes.KERNEL)
    changed = [path for path, value in _values().items() if before[path] != value]
    for path in changed:
        path.write_text(before[path])
    check(not changed, f"changed on the host (and put back): {', '.join(map(str, changed))}")
    return refused(found)


@isolation("A5", "device nodes, /dev/kmsg, /dev/mem, disks, fuse, kvm", "absent or denied")
def devices(stage: Stage) -> str:
    """What lies in /dev is opened, what does not is made."""
    return refused(stage.tries(stage.shared, escapes.DEVICES))


@isolation("A6", "trace, read and signal the supervisor, the host, a neighbour", "no such process", harmless=True)
def processes(stage: Stage) -> str:
    """A dumpable broker could be written to, and its descriptors taken."""
    bystander, nap = stage.bystander(), new_nap()
    theirs = stage.sleeper(stage.box(), nap)
    found = stage.tries(stage.shared, escapes.PROCESSES, bystander.pid, *theirs)
    check(bystander.poll() is None, "a process of the host was killed")
    check(naps(nap) == theirs, "a process of the neighbour was killed")
    stage.works(stage.shared)
    return refused(found)


@isolation("A7", "Docker's, abstract and the supervisor's sockets", "unreachable", harmless=True)
def sockets(stage: Stage) -> str:
    """Listeners of the host, and every socket that the sandbox can find (the control socket may be mounted in it)."""
    secret, token = stage.secret()
    path, heard = secret.parent / "socket", list[str]()
    for address in (f"\0{token}", str(path)):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(address)
        listener.listen()
        listener.settimeout(60)
        stage.after(listener.close)
        threading.Thread(target=_hear, args=(listener, heard), daemon=True).start()
    path.chmod(0o777)
    found = stage.tries(stage.shared, escapes.SOCKETS, token, path, secret.parent)
    found.pop("paths")
    check(not heard, "the sandbox reached a listener of the host")
    stage.works(stage.shared)
    return refused(found)


def _hear(listener: socket.socket, heard: list[str]) -> None:
    try:
        listener.accept()[0].close()
        heard.append("connected")
    except OSError:
        pass


@isolation("A8", "inherited descriptors", "0 to 2 and no other", harmless=True)
def descriptors(stage: Stage) -> str:
    """The owner holds an inheritable descriptor of a secret file while a sandbox starts."""
    secret, token = stage.secret()
    fd = os.open(secret, os.O_RDWR)
    stage.after(lambda: os.close(fd))
    os.set_inheritable(fd, True)
    return refused(stage.tries(stage.box(), escapes.DESCRIPTORS, token[::-1]))


@isolation("A9", "new namespaces, then mounts in them", "refused, or powerless")
def namespaces(stage: Stage) -> str:
    """By unshare, clone (each namespace alone, a pid namespace as well) and clone3, then the powers of a namespace's root."""
    found = stage.tries(stage.shared, escapes.SPACES)
    stage.works(stage.shared)
    return refused(found)


@isolation("A10", "setuid programs, file capabilities, sudo, su", "no gain")
def identity(stage: Stage) -> str:
    """Inside, and on the host: no process of a sandbox has the host's uid 0."""
    box = stage.box()
    found = stage.tries(box, escapes.IDENTITY)
    for pid in stage.sleeper(box, new_nap()):
        owner = Path(f"/proc/{pid}").stat().st_uid
        check(owner != 0, f"process {pid} of the sandbox is the host's root")
    return refused(found)


@isolation("A11", "keyrings, System V IPC, queues, shared memory", "private namespaces")
def ipc(stage: Stage) -> str:
    """One sandbox makes them; its neighbour and the host look."""
    key = new_nap()
    made = stage.box()
    stage.tries(made, escapes.IPC, "make", key, f"attack-{key}")
    found = stage.tries(stage.neighbour, escapes.IPC, "look", key, f"attack-{key}")
    host = Path("/proc/sysvipc/shm")
    check(not host.exists() or str(key) not in host.read_text(), "the sandbox's shared memory is the host's")
    check(not Path(f"/dev/shm/attack-{key}").exists(), "the sandbox's /dev/shm is the host's")
    return refused(found)


_ANSWERS = ("EPERM", "EACCES", "ENOSYS", "EAFNOSUPPORT", "EPROTONOSUPPORT", "ESOCKTNOSUPPORT")


@isolation("A12", "bpf, perf, userfaultfd, io_uring, kexec, odd sockets", "EPERM or ENOSYS")
def system_calls(stage: Stage) -> str:
    """With arguments that the kernel itself would answer otherwise, so that the answer is the filter's."""
    return refused(stage.tries(stage.shared, escapes.CALLS), *_ANSWERS)
