"""Sandboxes as Docker containers: the engine starts and ends them, the broker inside answers over one unix stream.

No command goes through the engine, so a command costs what it costs in a native sandbox; a start costs what the engine
takes (hundreds of milliseconds). The engine must run on this host: the helper and the stream's socket are bind-mounted.
The work directory, `/tmp` and `/dev/shm` are tmpfs mounts of their own (a container's root gives no disk limit on most
storage drivers): `disk_mb` is split 3/4, 1/8, 1/8 between them, so together they hold what the limit says.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import shutil
import socket
import struct
import tempfile
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

from envs.errors import InfraError, Unsupported
from envs.sandbox import cgroups, reaper
from envs.sandbox.base import Changes, FileChange, Limits, Snapshot
from envs.sandbox.brokered import BrokeredSandbox, Files, Start, start_from
from envs.sandbox.channel import Channel, SetupError
from envs.sandbox.helper import helper_path
from envs.sandbox.hostbase import bind_paths, check_workdir, environment, skeleton, skeleton_name
from envs.sandbox.owner import current
from envs.sandbox.walk import diff, read_tree

UID = 1_499_999_999
"""Every container's user: below the native backend's range, no user of any host."""
LABEL = "codeworld.run"
START_TIMEOUT = 60.0

_INSIDE = "/run/codeworld"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class DockerBackend:
    """Makes sandboxes as containers. Thread-safe. base: "host", or the name of a local image with bash."""

    name = "docker"

    def __init__(self, run: str | None = None) -> None:
        self.run = run or secrets.token_hex(6)
        self._lock = threading.Lock()
        self._client: Any = None
        self._images: dict[str, dict[str, str]] = {}
        self._numbers = itertools.count()
        self._live: weakref.WeakValueDictionary[str, DockerSandbox] = weakref.WeakValueDictionary()

    def create(
        self, *, base: str = "host", workdir: str = "/repo", files: Files | None = None, limits: Limits | None = None
    ) -> DockerSandbox:
        """Start a container. What an image holds below `workdir` is hidden by the work directory."""
        limits = limits or Limits()
        start = start_from(base, workdir, files, limits)
        check_workdir(workdir)
        return self._launch(start, limits)

    def close(self) -> None:
        """Close every sandbox and the connection to the engine."""
        for sandbox in list(self._live.values()):
            sandbox.close()
        with self._lock:
            client, self._client = self._client, None
        if client:
            client.close()

    def _launch(self, start: Start, limits: Limits) -> DockerSandbox:
        client = self._connected()
        env = self._image_env(client, start.base)
        home = Path(tempfile.mkdtemp(prefix=f"{cgroups.owner_name()}-"))
        container = None
        try:
            home.chmod(0o711)
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(home / "control"))
                (home / "control").chmod(0o666)
                listener.listen(1)
                container = _run(client, self._options(start, limits, home))
                channel = Channel(_accept(listener, container))
            (home / "control").unlink()
            (workdir_fd,) = channel.ready(START_TIMEOUT)
        except BaseException as error:
            _discard(container, home)
            raise _explain(error) from error
        name = f"docker-{self.run}-{next(self._numbers)}"
        sandbox = DockerSandbox(name, channel, workdir_fd, start, limits, self, container, home)
        try:
            sandbox.boot(env)
        except BaseException:
            sandbox.close()
            raise
        self._live[name] = sandbox
        return sandbox

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
                reaper.on_start("docker", client)
                self._client = client
            return self._client

    def _image_env(self, client: Any, base: str) -> dict[str, str]:
        """The shell's environment on `base`, after a check that its image is there."""
        with self._lock:
            if base not in self._images:
                found = _host_image(client) if base == "host" else _image(client, base)
                pairs = (item.partition("=") for item in (found.attrs["Config"] or {}).get("Env") or ())
                own = {key: value for key, _, value in pairs}
                ours = environment() if base == "host" else environment() | {"PATH": own.get("PATH", _PATH)}
                self._images[base] = own | ours
            return self._images[base]

    def _options(self, start: Start, limits: Limits, home: Path) -> dict[str, Any]:
        import docker

        binds = [f"{helper_path()}:{_INSIDE}/helper:ro", f"{home}:{_INSIDE}/socket:ro"]
        if start.base == "host":
            binds += [f"{path}:{path}:ro" for path in bind_paths()]
        disk, memory = limits.disk_mb << 20, limits.memory_mb << 20
        owner = f"rw,exec,nosuid,nodev,uid={UID},gid={UID},mode=755"
        inodes = max(4096, limits.disk_mb * 256)
        limit = docker.types.Ulimit
        return {
            "image": skeleton_name() if start.base == "host" else start.base,
            "entrypoint": [f"{_INSIDE}/helper"],
            "command": ["broker", f"{_INSIDE}/socket/control", start.workdir],
            "user": f"{UID}:{UID}",
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
            "tmpfs": {
                start.workdir: f"{owner},size={disk // 4 * 3},nr_inodes={inodes}",
                "/tmp": f"{owner},size={disk // 8},nr_inodes={inodes}",
            },
            "shm_size": max(disk // 8, 1 << 16),
            "mem_limit": memory,
            "memswap_limit": memory,
            "pids_limit": limits.pids + cgroups.OWN_PIDS,
            "nano_cpus": int(limits.cpus * 1e9),
            "ulimits": [
                limit(name="core", soft=0, hard=0),
                limit(name="nofile", soft=4096, hard=4096),
                limit(name="fsize", soft=max(disk, 4 << 20), hard=max(disk, 4 << 20)),
                limit(name="memlock", soft=1 << 16, hard=1 << 16),
            ],
        }


class DockerSandbox(BrokeredSandbox):
    """One container."""

    def __init__(
        self,
        name: str,
        channel: Channel,
        fd: int,
        start: Start,
        limits: Limits,
        backend: DockerBackend,
        container: Any,
        home: Path,
    ) -> None:
        super().__init__(name, channel, fd, start, limits)
        self._backend = backend
        self._container = container
        self._home = home
        peer = channel.stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        self._group = cgroups.of_process(struct.unpack("3i", peer)[0])

    def _end(self) -> None:
        os.close(self._disk)
        stream = self._channel.stream
        with contextlib.suppress(OSError):
            stream.shutdown(socket.SHUT_RDWR)
        _discard(self._container, self._home)
        stream.close()  # last: a thread that waits for a command's end would go on to wait on whoever got the number next

    def changes(self) -> Changes:
        """What differs in the work directory from its origin."""
        return diff(self._start.origin, self._tree())

    def snapshot(self) -> Snapshot:
        """A copy of the work directory's files, and the shell's state."""
        files, exports = self._tree(), self._exports()
        start = replace(self._start, files=files, cwd=self._cwd, exports=exports)
        return Snapshot(self._cwd, exports, lambda: self._backend._launch(start, self.limits), lambda: None)

    def _tree(self) -> dict[str, FileChange]:
        self._check_open()
        return read_tree(self._disk, self.limits.disk_mb << 20)

    def _counters(self, *, limits_hit: bool) -> cgroups.Counters:
        return self._group.read(limits_hit=limits_hit) if self._group else cgroups.Counters()


def _image(client: Any, name: str) -> Any:
    import docker

    try:
        return client.images.get(name)
    except docker.errors.ImageNotFound:
        remedy = "run docker/offline-base.sh" if name.startswith("codeworld-base") else f"run `docker pull {name}`"
        raise Unsupported(f"base={name!r}: the engine has no such image; {remedy}") from None


def _host_image(client: Any) -> Any:
    """The skeleton that the host's own files are mounted over; imported at first use, a few kilobytes."""
    try:
        return _image(client, skeleton_name())
    except Unsupported:
        name, _, tag = skeleton_name().partition(":")
        client.api.import_image_from_data(skeleton(UID), repository=name, tag=tag)
        return _image(client, skeleton_name())


def _run(client: Any, options: dict[str, Any]) -> Any:
    container = client.containers.create(**options)
    try:
        container.start()
    except BaseException:
        _discard(container, None)
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


def _discard(container: Any, home: Path | None) -> None:
    """Remove a container, which may have removed itself, and its directory."""
    import docker

    if container is not None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
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
    if home is not None:
        shutil.rmtree(home, ignore_errors=True)


def _explain(error: BaseException) -> BaseException:
    import docker

    if isinstance(error, SetupError | docker.errors.DockerException | OSError):
        return InfraError(
            f"docker: the sandbox did not start: {' '.join(str(error).split())[:300]}; see `docker events`"
        )
    return error


def leftovers(run: str | None = None) -> list[str]:
    """Ids of the containers of this run (of all runs if None) that the engine still has."""
    import docker

    client = docker.from_env()
    label = LABEL if run is None else f"{LABEL}={run}"
    try:
        return [str(found.id) for found in client.containers.list(all=True, filters={"label": label})]
    finally:
        client.close()


__all__ = ["LABEL", "UID", "DockerBackend", "DockerSandbox", "leftovers"]
