"""Frees what dead runs left on this host: helper processes, mounts, directories, cgroups, containers with their volumes.

Everything that outlives a function call carries the name of its owner (`envs/sandbox/owner.py`); what an ended owner's
name is on is freed, what a living one's or nobody's is on is left alone. Little is left normally: a helper ends with its
owner and takes its sandboxes with it, a container ends with its stream. Images that every process may use have no owner:
they are free when nobody has used them for a week. One more kind of thing is one more finder.
Any number of reapers may run at once: a thing that vanished meanwhile is no error.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from envs.errors import CodeworldError, InfraError
from envs.sandbox import cgroups
from envs.sandbox.helper import KEPT_SECONDS
from envs.sandbox.hostbase import HOST_IMAGE
from envs.sandbox.hoststore import ROOT
from envs.sandbox.owner import PREFIX, Owner

OWNER_LABEL = "codeworld.owner"
"""Container label: the owner's tag."""
LEASE_LABEL = "codeworld.lease"
"""Container label: the Unix time after which it is free where its owner can't be looked up (another host, boot or pid
namespace that uses the same engine)."""
LEASE_SECONDS = 24 * 3600

_CGROUPS = Path("/sys/fs/cgroup")
_PATIENCE = 5.0
"""Seconds that killed processes get to leave their cgroup."""


class Leftover(NamedTuple):
    """A thing of a dead run, not yet freed."""

    kind: str
    name: str
    free: Callable[[], None]
    """Raises `FileNotFoundError` or `ProcessLookupError` when it is gone already, else an `OSError` that says why not."""


class Reaped(NamedTuple):
    """What became of a leftover."""

    kind: str
    name: str
    why: str = ""
    """Why it could not be freed, or with an empty `name` why such things could not be looked for; "" when freed."""


Finder = Callable[[], Iterator[Leftover]]


def reap(dry_run: bool = False, *, finders: Iterable[Finder] | None = None) -> list[Reaped]:
    """Free what dead runs left, of all kinds that this host may have; never raises for a thing. dry_run only looks."""
    done: list[Reaped] = []
    for find in finders or everything():
        try:
            for left in find():
                if (outcome := _settle(left, dry_run)) is not None:
                    done.append(outcome)
        except (CodeworldError, OSError) as error:
            done.append(Reaped(find.__name__, "", _line(error)))
    return done


def everything() -> list[Finder]:
    """Finders of all kinds, in the order in which things let go of one another."""
    return [helpers, groups_anywhere, mounts, directories, containers, images]


_started: set[str] = set()


def on_start(backend: str, client: Any = None) -> None:
    """Reap quietly what `backend` may have left, once per process: names are listed, nothing is searched. With docker's
    `client` it costs two calls."""
    if backend in _started:
        return
    _started.add(backend)

    def its_containers() -> Iterator[Leftover]:
        return containers(client)

    def its_images() -> Iterator[Leftover]:
        return images(client)

    reap(finders=[*([its_containers, its_images] if backend == "docker" else [groups]), mounts, directories])


def helpers() -> Iterator[Leftover]:
    """Launchers whose owner has ended and that didn't end with it (stopped, say); their sandboxes die with them."""
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and _is_orphan(pid := int(entry.name)):
            yield Leftover("process", f"helper {pid}", functools.partial(_kill, pid, lambda pid: _is_orphan(pid)))


def groups() -> Iterator[Leftover]:
    """Cgroups, with the processes in them, where this process makes its own."""
    found = cgroups.hierarchy()
    return _groups_in(set(found.parents.values()) if found else ())


def groups_anywhere() -> Iterator[Leftover]:
    """Cgroups wherever a run may have made them: it may have started in another session or unit."""
    return _groups_in(_all_groups())


def mounts() -> Iterator[Leftover]:
    """Mounts in this mount namespace on paths that name a dead owner, the innermost first."""
    for path in reversed(_mount_points()):
        owners = (Owner.parse(part) for part in Path(path).parts)
        if any(owner and owner.ended for owner in owners):
            yield Leftover("mount", path, functools.partial(_unmount, path))


def directories() -> Iterator[Leftover]:
    """Directories of control sockets, and of containers' stores."""
    for path in (Path(tempfile.gettempdir()), ROOT):
        for name in _of_ended(path, PREFIX):
            yield Leftover("directory", str(path / name), functools.partial(_remove_tree, path / name))


def containers(client: Any = None) -> Iterator[Leftover]:
    """Containers, with their anonymous volumes. Raises `InfraError` where no engine answers."""
    with _engine(client) as engine:
        for found in engine.api.containers(all=True, filters={"label": OWNER_LABEL}):
            if _lease_is_over(found["Labels"]):
                remove = functools.partial(_remove_container, engine, found["Id"])
                yield Leftover("container", found["Id"][:12], remove)


def images(client: Any = None) -> Iterator[Leftover]:
    """Images that `base="host"` once stood on, unused for a week: whose name no process has given them again (`docker`), and
    that no container has. Raises `InfraError` where no engine answers."""
    with _engine(client) as engine:
        for found in engine.images.list(HOST_IMAGE):
            named = datetime.fromisoformat(found.attrs["Metadata"]["LastTagTime"])
            for name in found.tags if time.time() - named.timestamp() > KEPT_SECONDS else ():
                yield Leftover("image", name, functools.partial(_remove_image, engine, name))


@contextlib.contextmanager
def _engine(client: Any) -> Iterator[Any]:
    """`client`, or one of its own."""
    try:
        import docker

        engine = client or docker.from_env(timeout=60)
    except Exception as error:  # the SDK is optional, and has errors of its own for a bad DOCKER_HOST
        raise InfraError(f"no docker engine answers ({_line(error)})") from error
    try:
        yield engine
    except docker.errors.DockerException as error:
        raise InfraError(f"docker: {_line(error)}") from error
    finally:
        if client is None:
            engine.close()


def _settle(left: Leftover, dry_run: bool) -> Reaped | None:
    try:
        if not dry_run:
            left.free()
    except (FileNotFoundError, ProcessLookupError):
        return None  # another reaper, or its own end, was first
    except OSError as error:
        return Reaped(left.kind, left.name, _line(error))
    return Reaped(left.kind, left.name)


def _line(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200]


def _of_ended(directory: Path, prefix: str) -> list[str]:
    """Names in a directory, beginning with `prefix`, that name an owner that has ended; none where it can't be read."""
    ended = functools.cache(lambda owner: owner.ended)
    try:
        names = os.listdir(directory)
    except OSError:
        return []
    owners = ((name, Owner.parse(name)) for name in sorted(names) if name.startswith(prefix))
    return [name for name, owner in owners if owner and ended(owner)]


def _is_orphan(pid: int) -> bool:
    try:
        argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    owner = Owner.parse(os.fsdecode(argv[0])) if argv[1:2] == [b"zygote"] else None
    return owner is not None and owner.ended


def _kill(pid: int, still: Callable[[int], bool]) -> None:
    """Kill a process that is `still` what it was when it was found: its pid may be another's by now."""
    handle = os.pidfd_open(pid)
    try:
        if not still(pid):
            raise ProcessLookupError(f"no process {pid}")
        signal.pidfd_send_signal(handle, signal.SIGKILL)
    finally:
        os.close(handle)


def _all_groups() -> Iterator[Path]:
    for path, below, _ in os.walk(_CGROUPS):
        below[:] = [name for name in below if not name.startswith(PREFIX)]
        yield Path(path)


def _groups_in(places: Iterable[Path]) -> Iterator[Leftover]:
    """One leftover for the directories that a sandbox has in the hierarchies of all controllers."""
    found: dict[str, list[Path]] = {}
    for place in places:
        for name in _of_ended(place, PREFIX):
            found.setdefault(name, []).append(place / name)
    for name, paths in found.items():
        yield Leftover("cgroup", name, functools.partial(_remove_groups, paths))


def _remove_groups(paths: list[Path]) -> None:
    left = [path for path in paths if path.exists()]
    if not left:
        raise FileNotFoundError(errno.ENOENT, "gone", str(paths[0]))
    deadline = time.monotonic() + _PATIENCE
    while left := [path for path in left if not _removed(path)]:
        for path in left:
            _kill_members(path)
        if time.monotonic() > deadline:
            raise OSError(errno.EBUSY, f"its processes don't end: {sorted(_members(left[0]))}", str(left[0]))
        time.sleep(0.002)


def _removed(path: Path) -> bool:
    try:
        path.rmdir()
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


def _members(path: Path) -> set[int]:
    try:
        return {int(line) for line in (path / "cgroup.procs").read_text().split()}
    except OSError:
        return set()


def _kill_members(path: Path) -> None:
    for pid in _members(path) - {0}:  # 0 stands for one of another pid namespace
        try:
            _kill(pid, lambda pid: pid in _members(path))
        except ProcessLookupError:
            pass


def _mount_points() -> list[str]:
    """Mount points in this mount namespace, in the order of mounting."""
    lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    unescape = functools.partial(re.compile(rb"\\([0-7]{3})").sub, lambda found: bytes((int(found[1], 8),)))
    return [os.fsdecode(unescape(line.split()[4])) for line in lines]


def _unmount(path: str) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    detach, nofollow = 2, 8
    if libc.umount2(os.fsencode(path), detach | nofollow):
        number = ctypes.get_errno()
        if number != errno.EINVAL:  # not a mount point any more
            raise OSError(number, os.strerror(number), path)


def _remove_tree(path: Path) -> None:
    """Remove a directory, unless something is still mounted below: that would be emptied with it."""
    if inside := [point for point in _mount_points() if Path(point).is_relative_to(path)]:
        raise OSError(errno.EBUSY, f"{inside[0]} is still mounted", str(path))
    path.lstat()
    shutil.rmtree(path, ignore_errors=True)  # others may be removing it too
    try:
        path.rmdir()
    except FileNotFoundError:
        pass


def _lease_is_over(labels: dict[str, str]) -> bool:
    owner, lease = Owner.parse(labels.get(OWNER_LABEL, "")), labels.get(LEASE_LABEL, "")
    if owner is None:
        return False
    return owner.ended if owner.is_here else lease.isdigit() and time.time() > int(lease)


def _remove_container(client: Any, name: str) -> None:
    import docker

    try:
        client.api.remove_container(name, v=True, force=True)
    except docker.errors.NotFound:
        raise FileNotFoundError(errno.ENOENT, "gone", name) from None
    except docker.errors.APIError as error:
        if error.status_code == 409:  # it is being removed already
            raise FileNotFoundError(errno.ENOENT, "going", name) from None
        raise OSError(errno.EIO, _line(error), name) from error


def _remove_image(client: Any, name: str) -> None:
    import docker

    try:
        client.api.remove_image(name)
    except docker.errors.ImageNotFound:
        raise FileNotFoundError(errno.ENOENT, "gone", name) from None
    except docker.errors.APIError as error:
        if error.status_code == 409:  # a container has it
            raise FileNotFoundError(errno.ENOENT, "in use", name) from None
        raise OSError(errno.EIO, _line(error), name) from error
