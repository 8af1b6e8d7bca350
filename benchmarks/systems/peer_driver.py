"""Puts other projects' environments through `workload`, in a process of their own with their own packages.

Started by `lanes.py` with the Python of the peers' venv, one JSON argument (`image`, `label`, `bridge`, `python`) and a
working directory of its own. Reads a request a line, `{"world", "call", "args"}`, and answers each with a line,
`{"ok": times}` or `{"error": text}`. Every time is taken in here, so no pipe is in it. Needs only what the peers install.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from workload import Bench, docker, sweep, writing  # type: ignore[import-not-found,unused-ignore]

WORKDIR = "/repo"


def checked(world: str, script: str, status: Any, output: str) -> str:
    """The output, or an error that says which command failed."""
    if status != 0:
        raise RuntimeError(f"{world}: {script[:60]!r} ended with {status}: {output[-200:]}")
    return output


class MiniDocker:
    """mini-swe-agent's Docker environment with its defaults, without a network."""

    name = "mini-docker"

    def __init__(self, image: str, label: str, **_: Any) -> None:
        from minisweagent.environments.docker import DockerEnvironment

        self.make, self.image, self.label = DockerEnvironment, image, label

    def start(self, files: dict[str, str], image: str = "") -> MiniBox:
        """One container; its files are written by commands, the only way that the environment has."""
        flags = ["--rm", "--network", "none", "--label", self.label]
        box = MiniBox(self, self.make(image=image or self.image, cwd=WORKDIR, run_args=flags))
        for script in writing(files):
            box.run(script)
        return box


class MiniBox:
    """One of its containers. Removed by `docker rm -f`: its own `cleanup` leaves a `docker stop` of 10 s in the background."""

    def __init__(self, world: MiniDocker, env: Any) -> None:
        self.world, self.env = world, env

    def run(self, script: str) -> str:
        """One `docker exec`."""
        done = self.env.execute({"command": script})
        return checked(self.world.name, script, done["returncode"], done["output"])

    def fork(self, n: int) -> list[MiniBox]:
        """`docker commit` and `n` starts from the image, which is swept by its label at the end."""
        image = docker("commit", self.env.container_id).strip()
        return [self.world.start({}, image) for _ in range(n)]

    def settle(self) -> MiniBox:
        """A container whose files belong to its image, so that `docker diff` leaves them out."""
        return self.fork(1)[0]

    def changed(self) -> int:
        """Lines of `docker diff`: the names alone, without contents."""
        return len(docker("diff", self.env.container_id).splitlines())

    def close(self) -> None:
        """Remove the container."""
        container, self.env.container_id = self.env.container_id, None
        docker("rm", "-f", container)


class MiniBubblewrap:
    """mini-swe-agent's Bubblewrap environment: the host's files, a new box for each command."""

    name = "mini-bwrap"

    def __init__(self, **_: Any) -> None:
        from minisweagent.environments.extra.bubblewrap import BubblewrapEnvironment

        if not shutil.which(os.environ.get("MSWEA_BUBBLEWRAP_EXECUTABLE", "bwrap")):
            raise RuntimeError("no bwrap on PATH; install bubblewrap")
        self.make = BubblewrapEnvironment

    def start(self, files: dict[str, str]) -> BubblewrapBox:
        """A work directory; there is nothing to start."""
        box = BubblewrapBox(self.make())
        for script in writing(files):
            box.run(script)
        return box


class BubblewrapBox:
    """One work directory."""

    def __init__(self, env: Any) -> None:
        self.env = env

    def run(self, script: str) -> str:
        """One bwrap process."""
        done = self.env.execute({"command": script})
        return checked("mini-bwrap", script, done["returncode"], done["output"])

    def close(self) -> None:
        """Remove the work directory."""
        self.env.cleanup()


class Rex:
    """SWE-ReX's DockerDeployment by `execute()`. Its server's packages are mounted into the image, which need not hold them.

    It reaches the server by a published port; without a bridge network on this host, by the host's network instead.
    """

    name = "rex-execute"
    session = False

    def __init__(self, image: str, label: str, bridge: bool, python: str, **_: Any) -> None:
        from swerex.deployment.docker import DockerDeployment

        if python != (own := f"{sys.version_info[0]}.{sys.version_info[1]}"):
            raise RuntimeError(f"{image} has Python {python}, the peers' venv {own}: its server can't be mounted there")
        packages = Path(sys.modules["swerex"].__file__ or "").parents[1]
        tool = Path.cwd() / "swerex-remote"
        tool.write_text("#!/usr/bin/python3\nfrom swerex.server import main\nmain()\n")
        tool.chmod(0o755)
        self.args = ["--label", label, "-w", WORKDIR, "-e", "PYTHONPATH=/opt/swerex"]
        self.args += ["-v", f"{packages}:/opt/swerex:ro", "-v", f"{tool}:/usr/local/bin/swerex-remote:ro"]
        self.args += runtime_libraries()
        self.image = image
        self.deployment = DockerDeployment if bridge else on_host_network(DockerDeployment)
        self.args += [] if bridge else ["--network", "host"]

    def start(self, files: dict[str, str]) -> RexBox:
        """One container, its server answering."""
        loop = asyncio.new_event_loop()
        deployment = self.deployment(image=self.image, pull="never", docker_args=self.args, startup_timeout=60.0)
        loop.run_until_complete(deployment.start())
        box = RexBox(self, deployment, loop)
        if self.session:
            box.open_session()
        for script in writing(files):
            box.run(script)
        return box


class RexSession(Rex):
    """The same by its persistent shell session."""

    name = "rex-session"
    session = True


def runtime_libraries() -> list[str]:
    """Flags that mount the small libraries which the server's compiled packages need and a small image may lack."""
    import swerex.server  # noqa: F401, RUF100  (loads them)

    wanted = ("/libgcc_s", "/librt.", "/libdl.", "/libpthread.", "/libutil.")
    lines = Path("/proc/self/maps").read_text().splitlines()
    loaded = {line.split()[-1] for line in lines if any(name in line for name in wanted)}
    flags = [f"{path}:/opt/lib/{Path(path).name}:ro" for path in sorted(loaded)]
    return [item for flag in flags for item in ("-v", flag)] + ["-e", "LD_LIBRARY_PATH=/opt/lib"]


def on_host_network(deployment: Any) -> Any:
    """The deployment whose server listens on the chosen port itself, for no port is published on the host's network."""

    class OnHostNetwork(deployment):  # type: ignore[misc,valid-type,unused-ignore]
        def _get_swerex_start_cmd(self, token: str) -> list[str]:
            return [
                "/bin/sh",
                "-c",
                f"exec swerex-remote --auth-token {token} --host 127.0.0.1 --port {self._config.port}",
            ]

    return OnHostNetwork


class RexBox:
    """One deployment, driven from whichever thread has it."""

    def __init__(self, world: Rex, deployment: Any, loop: Any) -> None:
        self.world, self.deployment, self.loop = world, deployment, loop

    def open_session(self) -> None:
        """The default shell session."""
        from swerex.runtime.abstract import CreateBashSessionRequest

        self.loop.run_until_complete(self.deployment.runtime.create_session(CreateBashSessionRequest()))

    def run(self, script: str) -> str:
        """One request to the server."""
        from swerex.runtime.abstract import BashAction, Command

        runtime = self.deployment.runtime
        if self.world.session:
            done = self.loop.run_until_complete(runtime.run_in_session(BashAction(command=script, timeout=60)))
            return checked(self.world.name, script, done.exit_code, done.output)
        command = Command(command=["bash", "-c", script], timeout=60, cwd=WORKDIR)
        done = self.loop.run_until_complete(runtime.execute(command))
        return checked(self.world.name, script, done.exit_code, done.stdout + done.stderr)

    def close(self) -> None:
        """Stop the deployment."""
        self.loop.run_until_complete(self.deployment.stop())
        self.loop.close()


WORLDS = {world.name: world for world in (MiniDocker, MiniBubblewrap, Rex, RexSession)}


def main() -> int:
    """Answer requests until the input ends; nothing is left then, even if whoever asked was killed."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the peers print is no answer
    options = json.loads(sys.argv[1])
    benches: dict[str, Bench] = {}
    for line in sys.stdin:
        request = json.loads(line)
        name = request["world"]
        try:
            if name not in benches:
                benches[name] = Bench(WORLDS[name](**options))
            reply = {"ok": getattr(benches[name], request["call"])(**request["args"]) if request["call"] else {}}
        except Exception as error:
            reply = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()
    sweep(options["label"])
    shutil.rmtree(Path.cwd(), ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
