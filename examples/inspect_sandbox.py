"""codeworld's sandboxes for Inspect AI: import this module where a task is defined, then `Task(sandbox="codeworld", ...)`.

`sandbox=SandboxEnvironmentSpec("codeworld", Options(backend="docker", base="codeworld-base"))` chooses more. A sandbox has
one user: a command as another one is refused. At a command's timeout every process in its sandbox is killed.
"""

import errno
import shlex
import threading

from anyio import to_thread
from inspect_ai import util
from inspect_ai.util import SandboxEnvironmentLimits as Most
from pydantic import BaseModel

from envs.sandbox import Limits, SandboxDead
from envs.sandbox.clocks import TIMEOUT_MAX
from envs.swe.env import shared_backend

OWN = "/tmp/.inspect"


class Options(BaseModel, frozen=True):
    """What a sandbox is made with."""

    backend: str = "auto"
    base: str = "host"
    limits: Limits = Limits(memory_mb=2048, disk_mb=1024, pids=256)


@util.sandboxenv(name="codeworld")
class CodeworldSandbox(util.SandboxEnvironment):
    """One sandbox of any backend."""

    def __init__(self, box):
        super().__init__()
        self.box, self.turn = box, threading.Lock()

    @classmethod
    async def sample_init(cls, task_name, config, metadata):
        how = config or Options()
        make = lambda: shared_backend(how.backend).create(base=how.base, limits=how.limits)  # noqa: E731
        return {"default": cls(await to_thread.run_sync(make))}

    @classmethod
    def config_deserialize(cls, config):
        return Options(**config)

    @classmethod
    async def sample_cleanup(cls, task_name, config, environments, interrupted):
        for environment in environments.values():
            await to_thread.run_sync(environment.as_type(cls).box.close)

    async def exec(self, cmd, input=None, cwd=None, env=None, user=None, timeout=None, *retry, **concurrency):
        if user not in (None, "agent"):
            raise util.SandboxUserUnsupportedError(f"user {user!r}: a codeworld sandbox has one user, agent")
        exports = "".join(f"export {name}={shlex.quote(value)}; " for name, value in (env or {}).items())
        command = f"(cd -- {shlex.quote(cwd or '.')} && {exports}exec -- {shlex.join(cmd)})"
        return await self._call(self._exec, command, input or "", timeout)

    def _exec(self, command, data, timeout):
        self._write(f"{OWN}/in", data)
        self._write(f"{OWN}/script", f"/bin/rm -f {OWN}/out {OWN}/err; {command} <{OWN}/in >{OWN}/out 2>{OWN}/err")
        result = self.box.run(f". {OWN}/script", timeout=timeout or TIMEOUT_MAX)
        if result.cause == "timeout":
            raise TimeoutError(f"the command ran longer than {timeout} seconds")
        most = Most.MAX_EXEC_OUTPUT_SIZE, Most.MAX_EXEC_OUTPUT_SIZE_STR
        out, err = (self._read(f"{OWN}/{name}", *most).decode(errors="replace") for name in ("out", "err"))
        if result.exit == 126 and "Permission denied" in err:
            raise PermissionError(err)
        return util.ExecResult(result.ok, 137 if result.exit is None else result.exit, out, err + result.text())

    async def write_file(self, file, contents):
        await self._call(self._write, file, contents)

    async def read_file(self, file, text=True):
        data = await self._call(self._read, file, Most.MAX_READ_FILE_SIZE, Most.MAX_READ_FILE_SIZE_STR)
        return data.decode() if text else data

    def _write(self, file, contents):
        self.box.write(file, contents.encode() if isinstance(contents, str) else contents)

    def _read(self, file, most, most_text):
        try:
            return self.box.read(file, limit=most)
        except OSError as error:
            raise util.OutputLimitExceededError(most_text, None) if error.errno == errno.EFBIG else error from None

    async def _call(self, act, *args):
        def in_turn():
            with self.turn:  # a sandbox answers one request at a time
                return act(*args)

        try:
            return await to_thread.run_sync(in_turn, abandon_on_cancel=True)
        except SandboxDead as error:
            raise util.SandboxUnavailableError(str(error)) from error
