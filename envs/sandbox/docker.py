"""Sandboxes as Docker containers: the engine starts and ends them, the broker inside answers over one unix stream.

No command goes through the engine, so a command costs what it costs in a native sandbox; a start costs what the engine
takes (hundreds of milliseconds). The engine must run on this host. A container's root is read-only; its work directory,
`/tmp` and `/dev/shm` are overlays over what the image holds there, which write to one size-capped tmpfs of the host (see
`hoststore`), so `changes()` and `fork` are those of the native backend.

Only root can mount that. Started by an ordinary user (of the group docker), the three are the engine's own tmpfs mounts,
`disk_mb` split 3/4, 1/8, 1/8 between them; `changes()` reads the whole work directory, a fork copies it, and an image
that holds something in the work directory is refused.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from envs.errors import InfraError, Unsupported
from envs.sandbox import cgroups, reaper
from envs.sandbox.base import Changes, Limits, Sandbox, Snapshot
from envs.sandbox.bases import Base, layers_at, standing_on
from envs.sandbox.brokered import Files, Start, start_from
from envs.sandbox.channel import Channel, SetupError
from envs.sandbox.engine import engine_image, host_image
from envs.sandbox.helper import helper_path, unprivileged
from envs.sandbox.hostbase import bind_paths, check_workdir, environment, etc_files
from envs.sandbox.hoststore import mount_store
from envs.sandbox.layers import layers_dir
from envs.sandbox.owner import current
from envs.sandbox.registry import provide
from envs.sandbox.seccomp import seccomp_filter
from envs.sandbox.stacked import NUMBERS, Live, StackedBackend, StackedSandbox, Store, World, host_uid
from envs.sandbox.walk import diff, read_tree

UID = 1_499_999_999
"""The user of containers that an ordinary user starts; root gives each one of its own."""
LABEL = "codeworld.run"
START_TIMEOUT = 60.0

_AT_ONCE = 8
_INSIDE = "/run/codeworld"


class _Image(NamedTuple):
    id: str
    base: Base
    volumes: tuple[str, ...]
    """Where the engine would mount a volume, which nothing caps, if nothing else were mounted there."""


Contained = tuple[Channel, int, cgroups.Group | None, Callable[[], None]]
"""A container: its control stream, its work directory, opened, its cgroup, what ends it."""
_RESERVED = ("/proc", "/dev", "/sys", "/etc", "/run")
"""Where the engine and the broker have their own in an image's root."""


class DockerSandbox(StackedSandbox):
    """One container."""

    def _fork(self, n: int) -> list[Sandbox]:
        """All at once, as each is a wait for the engine."""
        frozen, go_on = self._freeze()
        with frozen, ThreadPoolExecutor(_AT_ONCE) as pool:
            resumed, starts = pool.submit(go_on), [pool.submit(frozen.start) for _ in range(n)]
            failures = [error for error in (resumed.exception(), *(start.exception() for start in starts)) if error]
            children = [start.result() for start in starts if not start.exception()]
        if failures:
            for child in children:
                child.close()
            raise failures[0]
        return children


class CopiedSandbox(DockerSandbox):
    """One container whose work directory is a tmpfs of the engine's: seen from here, but not its layers."""

    def changes(self) -> Changes:
        """What differs in the work directory from its origin."""
        self._check_open()
        return diff(self._start.origin, read_tree(self._live.root, self.limits.disk_mb << 20))

    def _freeze(self) -> tuple[Snapshot, Callable[[], None]]:
        """A copy of the work directory's files, and the shell's state; this sandbox goes on all the time."""
        self._check_open()
        files, exports = read_tree(self._live.root, self.limits.disk_mb << 20), self._exports()
        start, world = replace(self._start, files=files, cwd=self._cwd, exports=exports), self._live.world
        world.hold()
        launch = functools.partial(self._backend.launch, start, self.limits, world)
        return Snapshot(self._cwd, exports, launch, world.drop), lambda: None


class DockerBackend(StackedBackend):
    """Makes sandboxes as containers. Thread-safe. base: "host", a local image with bash, or an archive of one."""

    name = "docker"

    def __init__(self, run: str | None = None) -> None:
        super().__init__()
        self.run = run or secrets.token_hex(6)
        self.kind = CopiedSandbox if unprivileged() else DockerSandbox
        self._lock = threading.Lock()
        self._client: Any = None
        self._images: dict[tuple[str, tuple[str, ...]], _Image] = {}

    def create(
        self, *, base: str = "host", workdir: str = "/repo", files: Files | None = None, limits: Limits | None = None
    ) -> StackedSandbox:
        """Start a container. An image must be in the engine, whatever names it, or in a registry that the name says."""
        limits = limits or Limits()
        start = start_from(base, workdir, files, limits)
        check_workdir(workdir, image=base != "host", reserved=_RESERVED)
        provide(self._connected(), base)
        with standing_on(base) as stood:
            found = self._image(base, stood)
            self._check(found, base, workdir)
            return self.first(start, limits, World(found.base, next(NUMBERS)))

    def _check(self, found: _Image, base: str, workdir: str) -> None:
        if self.kind is CopiedSandbox and found.base.image and (layers_at(found.base, workdir) or found.volumes):
            raise Unsupported(
                f"workdir={workdir!r}: base={base!r} has files there, or volumes, which only root can mount as a sandbox"
                " needs them; start as root, use the native backend, or use another work directory"
            )
        if inner := [path for path in found.volumes if path.startswith(f"{workdir}/")]:
            raise Unsupported(
                f"base={base!r}: it declares a volume inside the work directory, {inner[0]}, which hides it from changes();"
                " make an image without, or use the native backend"
            )

    def close(self) -> None:
        """Close every sandbox and the connection to the engine."""
        super().close()
        with self._lock:
            client, self._client = self._client, None
        if client:
            client.close()

    def start(self, start: Start, limits: Limits, world: World) -> Live:
        """Start a container and the broker in it."""
        number, copied = next(NUMBERS), self.kind is CopiedSandbox
        uid = UID if copied else host_uid(world.owner)
        image = self._image(start.base, world.base)
        options = self._options(start, limits, uid, image.id)
        if copied:
            return self._start_copied(number, start, limits, world, options)
        places = dict.fromkeys((start.workdir, "/tmp", "/dev/shm", *image.volumes))
        under = mount_store(number, tuple(places), limits, world, uid)
        try:
            options["mounts"] = [_bind(str(path), place) for path, place in under.binds.items()]
            options["mounts"] += _names(under.path, uid, world.base)
            channel, seen, group, stop = self._contain(under.socket, start, options)
            os.close(seen)
        except BaseException:
            under.close()
            raise
        under.hide()
        return Live(channel, under.root, under.origin, under.store, world, "", group, stop)

    def _start_copied(self, number: int, start: Start, limits: Limits, world: World, options: dict[str, Any]) -> Live:
        disk, inodes = limits.disk_mb << 20, max(4096, limits.disk_mb * 256)
        owner = f"rw,exec,nosuid,nodev,uid={UID},gid={UID},mode=755,nr_inodes={inodes}"
        options["tmpfs"] = {start.workdir: f"{owner},size={disk // 4 * 3}", "/tmp": f"{owner},size={disk // 8}"}
        options["shm_size"] = max(disk // 8, 1 << 16)
        home = Path(tempfile.mkdtemp(prefix=f"{cgroups.owner_name()}-"))
        store = Store(number, functools.partial(shutil.rmtree, home, ignore_errors=True))
        try:
            home.chmod(0o711)
            channel, root, group, stop = self._contain(home, start, options)
        except BaseException:
            store.drop()
            raise
        return Live(channel, root, None, store, world, "", group, stop)

    def _contain(self, home: Path, start: Start, options: dict[str, Any]) -> Contained:
        """Start a container whose control stream is a socket in `home`."""
        client, container = self._connected(), None
        options["volumes"] = [*options["volumes"], f"{home}:{_INSIDE}/socket:ro"]
        control = home / "control"
        try:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(control))
                control.chmod(0o666)
                listener.listen(1)
                container = _run(client, options)
                channel = Channel(_accept(listener, container), seccomp_filter(strict=False))
            control.unlink()
            seen, channel.proc = channel.ready(START_TIMEOUT)
            return channel, seen, _group(channel.stream), functools.partial(_end, channel.stream, container)
        except BaseException as error:
            _discard(container)
            raise _explain(error) from error

    def _image(self, name: str, base: Base) -> _Image:
        """The engine's image of a base."""
        client, key = self._connected(), (name, base.layers)
        with self._lock:
            if key not in self._images:
                image = engine_image(client, name, base) if base.image else host_image(client, UID)
                base = replace(base, env={**base.env, **environment(), "PATH": base.env["PATH"]})
                volumes = tuple(map(os.path.normpath, (image.attrs["Config"] or {}).get("Volumes") or ()))
                self._images[key] = _Image(image.id, base, volumes)
            return self._images[key]

    def _connected(self) -> Any:
        with self._lock:
            if self._client is None:
                try:
                    import docker
                except ImportError as error:
                    raise Unsupported(f"docker: {error}; pip install docker, or use the native backend") from None
                try:
                    client = docker.from_env(timeout=int(START_TIMEOUT))
                    client.ping()
                except (docker.errors.DockerException, OSError) as error:
                    cause = " ".join(str(error).split())[:200]
                    raise Unsupported(
                        f"docker: no engine answers ({cause}); start dockerd, set DOCKER_HOST, or use the native backend"
                    ) from None
                if client.api.base_url != "http+docker://localhost":  # what every unix socket is called
                    client.close()
                    raise Unsupported(
                        "docker: DOCKER_HOST names an engine on another host, which can't reach this one's files; unset it"
                        " to use the engine here, or use the native backend"
                    )
                reaper.on_start("docker", client)
                self._client = client
            return self._client

    def _options(self, start: Start, limits: Limits, uid: int, image: str) -> dict[str, Any]:
        import docker

        binds = [f"{helper_path()}:{_INSIDE}/helper:ro"]
        if start.base == "host":
            binds += [f"{path}:{path}:ro" for path in bind_paths()]
        disk, memory = limits.disk_mb << 20, limits.memory_mb << 20
        limit = docker.types.Ulimit
        return {
            "image": image,
            "entrypoint": [f"{_INSIDE}/helper"],
            "command": ["broker", f"{_INSIDE}/socket/control", start.workdir],
            "user": f"{uid}:{uid}",
            "working_dir": "/",
            "hostname": "sandbox",
            "labels": {
                LABEL: self.run,
                reaper.OWNER_LABEL: current().tag,
                reaper.LEASE_LABEL: str(int(time.time()) + reaper.LEASE_SECONDS),
            },
            "network_mode": "none",
            "read_only": True,
            "auto_remove": True,  # the broker ends when its owner does, killed or not: the container goes with it
            "cap_drop": ["ALL"],
            "security_opt": ["no-new-privileges"],
            "log_config": docker.types.LogConfig(type="none"),
            "volumes": binds,
            "mem_limit": memory,
            "memswap_limit": memory,
            "pids_limit": limits.pids + cgroups.OWN_PIDS,
            "nano_cpus": int(min(limits.cpus, os.cpu_count() or 1) * 1e9),
            "ulimits": [
                limit(name="core", soft=0, hard=0),
                limit(name="nofile", soft=4096, hard=4096),
                limit(name="fsize", soft=max(disk, 4 << 20), hard=max(disk, 4 << 20)),
                limit(name="memlock", soft=1 << 16, hard=1 << 16),
            ],
        }


def _bind(source: str, target: str, *, read_only: bool = False) -> Any:
    import docker

    # unlike `volumes`, it makes no missing source
    return docker.types.Mount(target, source, type="bind", read_only=read_only)


def _names(store: Path, uid: int, base: Base) -> list[Any]:
    """Mounts of the files that give a sandbox's user a name, those of an image with one more line."""
    mounts = []
    for place, text in etc_files(uid).items():
        if place not in ("/etc/passwd", "/etc/group"):
            continue
        known = next(filter(Path.is_file, (Path(layers_dir(), f"{layer}{place}") for layer in base.layers)), None)
        if base.image and known and not known.is_symlink():
            text = known.read_text(errors="replace").rstrip() + "\n" + text.splitlines()[-1] + "\n"
        (store / Path(place).name).write_text(text)
        mounts.append(_bind(str(store / Path(place).name), place, read_only=True))
    return mounts


def _group(stream: socket.socket) -> cgroups.Group | None:
    """The cgroup of a container by its control stream."""
    peer = stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return cgroups.of_process(struct.unpack("3i", peer)[0])


def _end(stream: socket.socket, container: Any) -> None:
    with contextlib.suppress(OSError):
        stream.shutdown(socket.SHUT_RDWR)
    _discard(container)
    stream.close()  # last: a thread that waits for a command's end would go on to wait on whoever got the number next


def _run(client: Any, options: dict[str, Any]) -> Any:
    container = client.containers.create(**options)
    try:
        container.start()
    except BaseException:
        _discard(container)
        raise
    return container


def _accept(listener: socket.socket, container: Any) -> socket.socket:
    listener.settimeout(1.0)
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        try:
            return listener.accept()[0]
        except TimeoutError:
            container.reload()  # raises NotFound when it ended at once and was removed
            if time.monotonic() > deadline:
                raise InfraError(f"docker: the sandbox did not connect in {START_TIMEOUT:.0f} s") from None


def _discard(container: Any) -> None:
    """Remove a container, which may have removed itself; never raises."""
    import docker

    deadline = time.monotonic() + 30
    while container is not None and time.monotonic() < deadline:
        try:
            container.remove(v=True, force=True)
        except docker.errors.NotFound:
            break
        except docker.errors.APIError as error:
            if error.status_code != 409:  # it is being removed already
                break
            time.sleep(0.02)
        except OSError:
            break


def _explain(error: BaseException) -> BaseException:
    import docker

    if "bind source path does not exist" in str(error):
        return Unsupported(
            "docker: the engine does not see what this process mounts (it runs in another mount namespace); start both in"
            " the same one, or use the native backend"
        )
    if isinstance(error, SetupError | docker.errors.DockerException | OSError):
        return InfraError(
            f"docker: the sandbox did not start: {' '.join(str(error).split())[:300]}; see `docker events`"
        )
    return error


__all__ = ["LABEL", "UID", "CopiedSandbox", "DockerBackend", "DockerSandbox"]
