"""One way to start a part of the loop: as a Ray actor, or as an object whose calls run on threads of this process.

    engine = spawn(TorchEngine, …, mode="ray", concurrency=64)
    engine.call("publish", 3, weights)        → concurrent.futures.Future
    engine.ask("generate", ids, sampling, episode, timeout=60)   → the answer

The parts are plain classes that know nothing of this. A part that died, or whose answer is late, is `PartGone`.
Parts that only work together (learner ranks) are one `JointHandle`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, Literal, Protocol

from envs.errors import InfraError
from rl.config import ROOT

Mode = Literal["ray", "threads"]


@dataclass(frozen=True, kw_only=True)
class Place:
    """What a part needs of its node. Matters on a cluster; a Ray of its own has one node."""

    gpus: float = 0
    """Ray shows the part these cards alone; parts with a share of a card share it."""
    resource: str = ""
    """A custom resource of Ray, of which the part takes one; "": any node will do."""


ANYWHERE = Place()


class PartGone(InfraError):
    """A part of the loop died, or its answer is late."""


class Handle(Protocol):
    """A part of the loop, wherever it runs. Handles of Ray actors may be given to other actors."""

    name: str

    def call(self, method: str, *args: Any) -> Future[Any]:
        """Start a method call; the future holds its answer, its exception, or `PartGone`."""

    def ask(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        """Call and wait."""

    def kill(self) -> None:
        """End the part's process at once, without asking it; its calls end in `PartGone`. Threads can't be killed."""

    def stop(self) -> None:
        """End the part; running calls are lost."""


class ThreadHandle:
    """Calls run on `concurrency` threads of this process."""

    def __init__(self, name: str, make: Callable[[], Any], concurrency: int) -> None:
        self.name, self.part = name, make()
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix=name)

    def call(self, method: str, *args: Any) -> Future[Any]:
        """See `Handle.call`."""
        return self._pool.submit(getattr(self.part, method), *args)

    def ask(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        """On the caller's own thread, so that a debugger sees one stack from the env to the engine."""
        return getattr(self.part, method)(*args)

    def kill(self) -> None:
        """See `Handle.kill`."""
        raise NotImplementedError("threads can't be killed")

    def stop(self) -> None:
        """Close the part if it can be closed, then the threads."""
        close = getattr(self.part, "close", None)
        if close is not None:
            close()
        self._pool.shutdown(wait=False, cancel_futures=True)


class RayHandle:
    """Calls run in an actor process."""

    def __init__(self, name: str, actor: Any) -> None:
        self.name, self.actor = name, actor

    def call(self, method: str, *args: Any) -> Future[Any]:
        """See `Handle.call`."""
        answer: Future[Any] = Future()

        def done(inner: Future[Any]) -> None:
            try:
                answer.set_result(inner.result())
            except BaseException as error:
                answer.set_exception(_translate(self.name, error))

        getattr(self.actor, method).remote(*args).future().add_done_callback(done)
        return answer

    def ask(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        """See `Handle.ask`."""
        import ray

        try:
            return ray.get(getattr(self.actor, method).remote(*args), timeout=timeout)
        except Exception as error:
            raise _translate(self.name, error) from None

    def kill(self) -> None:
        """See `Handle.kill`."""
        import ray

        ray.kill(self.actor)

    def stop(self) -> None:
        """Ask the part to close, then kill its process."""
        import ray

        try:
            ray.get(self.actor.close.remote(), timeout=10)
        except Exception:  # a dead or deaf part is killed all the same
            pass
        self.kill()


GRACE = 10.0
"""Seconds that the other parts of a `JointHandle` have to answer when one of them failed."""


class JointHandle:
    """Parts that only work together, as one: every call goes to all of them, and the first part's answer is the answer.

    When one fails, the others wait for it in vain: after `GRACE` all are killed, and the call ends in one error.
    """

    def __init__(self, name: str, parts: Sequence[Handle]) -> None:
        self.name, self.parts = name, list(parts)

    def call(self, method: str, *args: Any) -> Future[Any]:
        """See `Handle.call`. Calls reach every part in the order in which they are made."""
        calls = [part.call(method, *args) for part in self.parts]
        answer: Future[Any] = Future()

        def settle() -> None:
            try:
                answer.set_result(self._answer(calls))
            except BaseException as error:
                answer.set_exception(error)

        Thread(
            target=settle, name=f"{self.name} {method}", daemon=True
        ).start()  # the process may end without the answer
        return answer

    def _answer(self, calls: list[Future[Any]]) -> Any:
        done, others = wait(calls, return_when=FIRST_EXCEPTION)
        if all(call.exception() is None for call in done):
            return calls[0].result()
        wait(others, timeout=GRACE)
        errors = {p.name: c.exception() for p, c in zip(self.parts, calls, strict=True) if c.done() and c.exception()}
        silent = [p.name for p, c in zip(self.parts, calls, strict=True) if not c.done()]
        self.kill()
        for kind in (InfraError, ValueError, AssertionError):  # what the others say follows from these
            for error in errors.values():
                if isinstance(error, kind):
                    raise error
        name, error = next(iter(errors.items()))
        assert error is not None
        if not silent:
            raise error
        said = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise PartGone(f"{' and '.join(silent)} did not answer within {GRACE:g} seconds after {name} failed: {said}")

    def ask(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        """See `Handle.ask`."""
        try:
            return self.call(method, *args).result(timeout)
        except FutureTimeout:
            raise PartGone(f"{self.name} did not answer {method!r} within {timeout} seconds") from None

    def kill(self) -> None:
        """See `Handle.kill`."""
        for part in self.parts:
            part.kill()

    def stop(self) -> None:
        """All at once: leaving is a matter of all of them."""
        with ThreadPoolExecutor(len(self.parts)) as pool:
            list(pool.map(lambda part: part.stop(), self.parts))


def _translate(name: str, error: BaseException) -> BaseException:
    """Ray's wrappers → the exception that the part raised, or `PartGone`."""
    import ray.exceptions as rx

    if isinstance(error, rx.RayTaskError):
        return error.cause if isinstance(error.cause, InfraError | ValueError | AssertionError) else error
    if isinstance(error, rx.RayActorError | rx.GetTimeoutError | FutureTimeout):
        return PartGone(f"{name} is gone or late: {type(error).__name__}")
    return error


def start(mode: Mode, address: str = "") -> None:
    """Bring the substrate up: a Ray of its own with the repository on its workers' path, the cluster at `address`, or nothing
    for threads. `InfraError` where no cluster answers."""
    if mode == "threads":
        return
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves the loop on a shared machine
    import ray

    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"), str(Path.cwd()))))
    own: dict[str, Any] = {} if address else {"include_dashboard": False}
    environment = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    try:
        host, _, port = address.rpartition(":")
        if port.isdigit():  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), 10).close()
        ray.init(
            address=address or "local",  # never another run's cluster by chance
            logging_level="ERROR",
            log_to_driver=True,
            runtime_env={"env_vars": environment},
            **own,
        )
    except (OSError, RuntimeError, ValueError) as error:
        if not address:
            raise
        raise InfraError(
            f"no Ray cluster answers at rollout.address={address!r} ({type(error).__name__}); start one with `ray start --head`"
        ) from None


def spawn(cls: type[Any], *args: Any, mode: Mode, name: str, concurrency: int = 1, place: Place = ANYWHERE) -> Handle:
    """Start `cls(*args)`; `concurrency` calls run in it at once."""
    if mode == "threads":
        return ThreadHandle(name, lambda: cls(*args), concurrency)
    import ray

    actor = ray.remote(cls).options(
        max_concurrency=concurrency,
        num_cpus=0,
        num_gpus=place.gpus,
        resources={place.resource: 1} if place.resource else None,
    )
    return RayHandle(name, actor.remote(*args))


def stop(mode: Mode) -> None:
    """Take the substrate down."""
    if mode == "ray":
        import ray

        ray.shutdown()
