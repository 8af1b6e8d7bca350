"""codeworld's sandboxes for Inspect AI: import this where a task is defined, then `Task(sandbox="codeworld", ...)`, or with
`SandboxEnvironmentSpec("codeworld", Options(backend="docker"))`. A timeout ends every process of its sandbox."""

import errno
import shlex
import threading

from anyio import to_thread
from inspect_ai import util
from pydantic import BaseModel

from envs.sandbox import Limits, SandboxDead
from envs.swe.env import shared_backend


class Options(BaseModel, frozen=True):
    backend: str = "auto"
    base: str = "host"
    limits: Limits = Limits(memory_mb=2048, disk_mb=1024, pids=256)


@util.sandboxenv(name="codeworld")
class CodeworldSandbox(util.SandboxEnvironment):
    config_deserialize = Options.model_validate

    def __init__(self, box):
        super().__init__()
        self.box, self.turn = box, threading.Lock()

    @classmethod
    async def sample_init(cls, task_name, config, metadata):
        how = config or Options()
        box = await to_thread.run_sync(lambda: shared_backend(how.backend).create(base=how.base, limits=how.limits))
        return {"default": cls(box)}

    @classmethod
    async def sample_cleanup(cls, task_name, config, environments, interrupted):
        await to_thread.run_sync(environments["default"].as_type(cls).box.close)

    async def exec(self, cmd, input=None, cwd=None, env=None, user=None, timeout=None, *retry, **concurrency):
        if user not in (None, "agent"):
            raise util.SandboxUserUnsupportedError(f"user {user!r}: a codeworld sandbox has one user, agent")
        exports = "".join(f"export {name}={shlex.quote(value)}; " for name, value in (env or {}).items())
        command = f"(cd -- {shlex.quote(cwd or '.')} && {exports}exec -- {shlex.join(cmd)})"
        return await self._in_turn(self._exec, command, input or b"", timeout)

    def _exec(self, command, data, timeout):
        self.box.write("/tmp/.in", data.encode() if isinstance(data, str) else data)
        self.box.write("/tmp/.sh", f"rm -f /tmp/.out /tmp/.err; {command} </tmp/.in >/tmp/.out 2>/tmp/.err".encode())
        result = self.box.run(". /tmp/.sh", timeout=timeout or float("inf"))
        if result.cause == "timeout":
            raise TimeoutError(f"the command ran longer than {timeout} seconds")
        out, err = (self._read(file, "EXEC_OUTPUT").decode(errors="replace") for file in ("/tmp/.out", "/tmp/.err"))
        if result.exit == 126 and "Permission denied" in err:
            raise PermissionError(err)
        return util.ExecResult(result.ok, 137 if result.exit is None else result.exit, out, err + result.text())

    async def write_file(self, file, contents):
        await self._in_turn(self.box.write, file, contents.encode() if isinstance(contents, str) else contents)

    async def read_file(self, file, text=True):
        data = await self._in_turn(self._read, file, "READ_FILE")
        return data.decode() if text else data

    def _read(self, file, what):
        most, text = (getattr(util.SandboxEnvironmentLimits, f"MAX_{what}_SIZE{form}") for form in ("", "_STR"))
        try:
            return self.box.read(file, limit=most)
        except OSError as error:
            raise util.OutputLimitExceededError(text, None) if error.errno == errno.EFBIG else error from None

    async def _in_turn(self, act, *args):
        def alone():
            with self.turn:  # a sandbox answers one request at a time
                return act(*args)

        try:
            return await to_thread.run_sync(alone, abandon_on_cancel=True)
        except SandboxDead as error:
            raise util.SandboxUnavailableError(str(error)) from error
