"""What the launcher is told: the system calls that make a sandbox, in order (`helper/launch.c` carries them out).

Three lists: before there is a sandbox, in the launcher, whose mount namespace all stores share; inside, as PID 1 of the new
namespaces, from the host's root file system to the last privilege; and after its end. A store has `u` (the overlay's upper
directory), `w` (its work directory) and `b` (where the directory of the base layers is attached).
"""

from __future__ import annotations

import errno
import functools
import os
import resource
import signal
import struct
from collections.abc import Sequence
from pathlib import Path

from envs.errors import InfraError, Unsupported
from envs.sandbox import cgroups
from envs.sandbox.base import Limits
from envs.sandbox.helper import unprivileged
from envs.sandbox.hostbase import DEVICES, bind_paths, etc_files
from envs.sandbox.layers import layers_dir
from envs.sandbox.stacked import World, host_uid, store_options
from envs.sandbox.syscalls import ANY, call

AGENT_ID, ROOT_ID = 1000, 0
"""Who the sandbox is inside a user namespace: on the host's system, in an image."""

Calls = list[bytes]

_STAGE = "/sys"
"""The new root is mounted over it: a place that is never the source of a bind."""
_USERNS, _FREE = 4, 5
"""Descriptors: the sandbox's user namespace, the first that a call opens (what is left open, the owner gets)."""

_AT, _NOFOLLOW, _EMPTY_PATH, _RECURSIVE, _REMOVEDIR = -100, 0x100, 0x1000, 0x8000, 0x200
_RDONLY, _NOSUID, _NODEV, _NOEXEC = 1, 2, 4, 8
"""Of a mount, in `mount` and in `mount_setattr`."""
_BIND, _REC, _PRIVATE, _SLAVE, _IDMAP, _DETACH = 0x1000, 0x4000, 1 << 18, 1 << 19, 0x100000, 2
_NEWNS, _NEWUSER, _NEWCGROUP = 0x20000, 0x1000_0000, 0x0200_0000
_SAFE = _RDONLY | _NOSUID | _NODEV
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def request(
    before: Calls, inside: Calls | None = None, after: Calls | None = None, *, uid: int = 0, inner: int = -1
) -> bytes:
    """A message to the helper. inner: which id `uid` has in a user namespace of its own, where it gets what is made; -1:
    there is none."""
    lists = [b"".join(calls) for calls in (before, inside or [], after or [])]
    return struct.pack("<iiII", uid, inner, len(lists[0]), len(lists[1])) + b"".join(lists)


def nursery(stores: str) -> bytes:
    """The launcher's own first request: a mount namespace in which stores are mounted, so that they end with it."""
    spaces = _NEWNS
    maps: Calls = []
    if unprivileged():
        spaces |= _NEWUSER
        maps = [
            _put(f"/proc/self/{file}", text, step=file)
            for file, text in (
                ("setgroups", "deny"),
                ("uid_map", f"0 {os.geteuid()} 1"),
                ("gid_map", f"0 {os.getegid()} 1"),
            )
        ]
    return request(
        [
            call("umask", 0o022, step="umask"),  # the owner's may hide what is made from the sandbox's user
            call("unshare", spaces, step="unshare"),
            *maps,
            call("mount", 0, "/", 0, _REC | _SLAVE, 0, step="slave mounts"),
            _mount("codeworld", stores, "tmpfs", _NOSUID | _NODEV, "size=4m,mode=700", step="tmpfs for stores"),
            _chdir(stores),
        ]
    )


def sandbox(number: int, group: str, workdir: str, limits: Limits, world: World) -> bytes:
    """A sandbox with store and number `number`. Left open: its origin's root (of an image), its store's upper directory."""
    root, image = not unprivileged(), bool(world.base.image)
    uid = host_uid(world.owner) if root else 0
    inner = (ROOT_ID if image else AGENT_ID) if image or not root else -1
    join, leave = _groups(group, limits)
    inside = [
        *join,
        call("unshare", _NEWCGROUP, step="unshare", forgiven=ANY),  # hides where it sits on the host
        _put("/proc/self/oom_score_adj", "-1000", step="oom_score_adj", forgiven=ANY),  # else the shell's is higher
        call("mount", 0, "/", 0, _REC | _PRIVATE, 0, step="private mounts"),
        *_loopback(),
        *_limits(limits, capped=bool(join)),
        *_root(number, world, uid if inner >= 0 else -1, mapped=inner >= 0 and root),
        *_devices(),
        *([] if image else [*_host(), *_names(uid if root else inner)]),
    ]
    for path in ("tmp", "dev/shm", workdir[1:]):
        inside += _own_directory(path, uid if inner < 0 else -1, read_only=not image)
    inside += [*_proc(), *_enter(read_only=not image), *_drop(uid, inner)]
    return request(_store(str(number), store_options(limits)), inside, leave, uid=uid, inner=inner)


def host_store(name: str, uid: int, limits: Limits, base: str, origin: str, lists: Sequence[str]) -> bytes:
    """A store that a container engine sees too. In it, for each list of layers (named relative to the store): an upper
    directory `u/I` and the overlay `m/I`. Left open: the first list's origin, if it has one, `u/0` and `m/0`.

    base: the directory of the base layers, or "".
    """
    calls = [
        call("umask", 0o022, step="umask"),
        *_store(name, store_options(limits)),
        _chdir(name),
        call("fchmodat", _AT, ".", 0o700, step="chmod"),
        *(_mkdir(path, mode) for path, mode in (("m", 0o755), ("empty", 0o755), ("socket", 0o711))),
    ]
    if base:
        calls += _attach(base, "b", mapped=True)
    if origin:
        calls += _show_origin(origin, "m")
    for index, layers in enumerate(lists):
        upper = f"u/{index}"
        calls += [*(_mkdir(f"{part}/{index}") for part in "mwu"), _chown(upper, uid)]
        if not index:
            calls.append(_show(upper))
        calls.append(_overlay(layers, f"m/{index}", upper, f"w/{index}"))
    calls.append(_show("m/0"))
    if base:
        calls.append(_umount("b"))  # the overlays hold what they need of it
    return request(calls, uid=uid, inner=0 if base else -1)


def free(*places: str) -> bytes:
    """Unmount each, with all that is mounted below it, and remove its directory."""
    calls = []
    for path in places:
        calls += [_umount(path, forgiven=ANY), _rmdir(path)]
    return request(calls)


def _store(name: str, options: str) -> Calls:
    tmpfs = _mount("sandbox", name, "tmpfs", _NOSUID | _NODEV, options, step=f"tmpfs {options}")
    return [_mkdir(name), tmpfs, *(_mkdir(f"{name}/{part}") for part in "uwb")]


def _groups(name: str, limits: Limits) -> tuple[Calls, Calls]:
    """Make and join the cgroups; remove them."""
    found = cgroups.hierarchy()
    if found is None:
        if limits.cpus != Limits.cpus:
            raise Unsupported(
                f"limits.cpus={limits.cpus}: without cgroups nothing enforces it; leave it out, start as root, or in a"
                " delegated cgroup (systemd-run --user -p Delegate=yes)"
            )
        return [], []
    dirs, writes = found.plan(name, limits)
    join = [_mkdir(str(path), forgiven=errno.EEXIST) for path, _ in dirs]
    join += [_put(str(file), value, step=f"write {file}") for file, value in writes]
    join += [_put(f"{path}/{file}", "0", step=f"join {path}") for path, file in dirs]
    return join, [_rmdir(str(path)) for path, _ in dirs]


def _limits(limits: Limits, *, capped: bool) -> Calls:
    size = max(limits.disk_mb + 1, 4) << 20  # above the disk, which is to answer first, and the broker's command buffer
    values = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 4096,
        resource.RLIMIT_FSIZE: size,
        resource.RLIMIT_MEMLOCK: 1 << 16,
        resource.RLIMIT_RTPRIO: 0,
        resource.RLIMIT_NICE: 0,
    }
    if not capped:  # where a cgroup caps them, it answers alone: it counts its refusals, which a resource limit doesn't
        values[resource.RLIMIT_AS] = limits.memory_mb << 20
        values[resource.RLIMIT_NPROC] = limits.pids + cgroups.OWN_PIDS
    calls = []
    for kind, value in values.items():
        most = resource.getrlimit(kind)[1]
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        calls.append(call("prlimit64", 0, kind, struct.pack("<QQ", value, value), 0, step=f"rlimit {kind}"))
    return calls


def _root(number: int, world: World, owner: int, *, mapped: bool) -> Calls:
    """The root: the store on top, what is frozen, the base's layers; the new root is the current directory then."""
    base = [f"{number}/b/{name}" for name in world.base.layers]
    layers = ":".join([*(f"{store.number}/u" for store in world.frozen), *base])
    upper, work = f"{number}/u", f"{number}/w"
    calls = _attach(str(layers_dir()), f"{number}/b", mapped=mapped)
    if world.base.image:
        calls += _show_origin(":".join(base), _STAGE)
    if unprivileged():
        step = "tmpfs without user xattrs (Linux 6.6)"
        calls.append(call("setxattr", upper, "user.codeworld", "", 0, 0, step=step))
    if owner >= 0:
        calls.append(_chown(upper, owner))
    return [*calls, _show(upper), _overlay(layers, _STAGE, upper, work), _chdir(_STAGE)]


def _attach(layers: str, to: str, *, mapped: bool) -> Calls:
    """The directory of the base layers. Whoever unpacked them, they are the sandbox's own inside."""
    step = "mount_setattr with owners mapped" if mapped else "mount_setattr"
    return [
        call("open_tree", _AT, layers, 1 | os.O_CLOEXEC, step=f"open_tree {layers}"),
        _set_mount(_SAFE | (_IDMAP if mapped else 0), at=_FREE, flags=_EMPTY_PATH, userns=_USERNS * mapped, step=step),
        call("move_mount", _FREE, "", _AT, to, 4, step=f"move_mount {to}"),
        call("close", _FREE, step="close"),
    ]


@functools.cache
def _devices() -> Calls:
    return [part for path in DEVICES for part in _bind(path, _NOSUID | _NOEXEC)]


@functools.cache
def _host() -> Calls:
    return [part for path in bind_paths() for part in _bind(path, _SAFE)]


def _names(uid: int) -> Calls:
    """Of the sandbox's user on the host's system."""
    etc = etc_files(uid)
    calls = []
    for path in ("/etc/passwd", "/etc/group"):
        calls += [_make(path[1:], directory=False), _put(path[1:], etc[path], step=f"put {path}")]
    return calls


def _bind(path: str, attributes: int) -> Calls:
    to = path[1:]
    return [
        _make(to, directory=Path(path).is_dir()),
        _mount(path, to, 0, _BIND | _REC, 0, step=f"bind {path}"),
        _set_mount(attributes, to, flags=_RECURSIVE),
    ]


def _own_directory(path: str, owner: int, *, read_only: bool) -> Calls:
    """A directory that the sandbox may write in. owner: who gets it, -1: it has the right one."""
    calls = [_make(path)]
    if owner >= 0:
        calls.append(_chown(path, owner))
    if read_only:
        calls += [_mount(path, path, 0, _BIND, 0, step=f"bind {path}"), _set_mount(_NOSUID | _NODEV, path)]
    return calls


@functools.cache
def _proc() -> Calls:
    return [
        _make("proc"),
        _mount("proc", "proc", "proc", _NOSUID | _NODEV | _NOEXEC, 0, step="proc"),
        _mount("proc/sys", "proc/sys", 0, _BIND, 0, step="bind proc/sys"),
        _set_mount(_SAFE | _NOEXEC, "proc/sys"),
    ]


@functools.cache
def _loopback() -> Calls:
    """Up: `struct ifreq` with IFF_UP | IFF_RUNNING, by SIOCSIFFLAGS."""
    up = struct.pack("<16sH22x", b"lo", 0x41)
    return [
        call("socket", 2, 2 | os.O_CLOEXEC, 0, step="loopback"),
        call("ioctl", _FREE, 0x8914, up, step="loopback"),
        call("close", _FREE, step="close"),
    ]


@functools.cache
def _enter(*, read_only: bool) -> Calls:
    """The current directory becomes the root, and nothing else is left."""
    calls = [
        call("sethostname", "sandbox", 7, step="hostname"),
        call("pivot_root", ".", ".", step="pivot_root"),
        _umount("."),
        _chdir("/"),
    ]
    return [*calls, _set_mount(_SAFE, "/")] if read_only else calls


def _drop(uid: int, inner: int) -> Calls:
    """All privileges; the sandbox ends with the launcher."""
    calls = [] if unprivileged() else [call("setgroups", 0, 0, step="setgroups")]
    if inner >= 0:
        calls.append(call("setns", _USERNS, _NEWUSER, step="setns"))
        uid = inner
    return [
        *calls,
        *_no_capability_ever(),
        call("setresgid", uid, uid, uid, step="setgid"),
        call("setresuid", uid, uid, uid, step="setuid"),
        call("capset", struct.pack("<Ii", 0x2008_0522, 0), bytes(24), step="capset"),
        call("prctl", 1, signal.SIGKILL, 0, 0, 0, step="prctl"),  # when its parent dies
    ]


@functools.cache
def _no_capability_ever() -> Calls:
    """An empty bounding set."""
    drop = 24
    return [call("prctl", drop, number, 0, 0, 0, step="bounding set", forgiven=errno.EINVAL) for number in range(64)]


def _show_origin(layers: str, at: str) -> Calls:
    """What is there without what is written, for the owner to compare with; two layers at least."""
    return [_overlay(layers, at), _show(at), _umount(at)]


def _overlay(layers: str, at: str, upper: str = "", work: str = "") -> bytes:
    """Layers, top first, read-only but for `upper`."""
    options = f"lowerdir={layers}"
    if upper:
        options += f",upperdir={upper},workdir={work},redirect_dir=nofollow,metacopy=off"
    if unprivileged():
        options += ",userxattr"
    if len(os.fsencode(options)) >= 4096:
        raise InfraError(
            f"sandbox start: overlay with that many layers ({layers.count(':') + 1}): {len(options)} bytes of names"
        )
    flags = _NOSUID | _NODEV | (0 if upper else _RDONLY)
    return _mount("sandbox", at, "overlay", flags, options, step=f"overlay {layers}")


def _mount(source: str, target: str, kind: str | int, flags: int, options: str | int, *, step: str) -> bytes:
    return call("mount", source, target, kind, flags, options, step=step)


def _set_mount(
    attributes: int, path: str = "", *, at: int = _AT, flags: int = 0, userns: int = 0, step: str = "mount_setattr"
) -> bytes:
    attr = struct.pack("<QQQQ", attributes, 0, 0, userns)
    return call("mount_setattr", at, path, flags, attr, len(attr), step=f"{step} {path}")


def _show(path: str) -> bytes:
    return call("openat", _AT, path, _DIRECTORY, step=f"open {path}")


def _umount(path: str, forgiven: int = 0) -> bytes:
    return call("umount2", path, _DETACH, step=f"umount {path}", forgiven=forgiven)


def _chdir(path: str) -> bytes:
    return call("chdir", path, step=f"chdir {path}")


def _mkdir(path: str, mode: int = 0o755, forgiven: int = 0) -> bytes:
    return call("mkdirat", _AT, path, mode, step=f"mkdir {path}", forgiven=forgiven)


def _rmdir(path: str) -> bytes:
    return call("unlinkat", _AT, path, _REMOVEDIR, step=f"rmdir {path}", forgiven=ANY)


def _chown(path: str, uid: int) -> bytes:
    return call("fchownat", _AT, path, uid, uid, _NOFOLLOW, step=f"chown {path}")


def _make(path: str, *, directory: bool = True) -> bytes:
    return call("make", path, directory, step=f"make {path}")


def _put(path: str, text: str, *, step: str, forgiven: int = 0) -> bytes:
    return call("put", path, text, step=step, forgiven=forgiven)
