"""Sandboxes whose files are layers: a base that nobody writes, and above it all that one sandbox wrote, its *store*.

A snapshot freezes the store, and what starts from it has it as one more layer, so a fork copies nothing, and `changes()`
looks only at what was touched. How the layers are mounted and the processes started is the backend's business.
"""

from __future__ import annotations

import functools
import itertools
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import IO

from envs.errors import InfraError, Unsupported
from envs.sandbox import cgroups, layers
from envs.sandbox.base import Changes, Limits, Snapshot
from envs.sandbox.bases import Base
from envs.sandbox.brokered import BrokeredSandbox, Start
from envs.sandbox.capture import capture
from envs.sandbox.channel import Channel
from envs.sandbox.walk import overlay_changes

FIRST_UID = 1_500_000_000
"""Above the users of any host."""
NUMBERS = itertools.count()
"""Numbers the stores, cgroups and sandboxes of this process, whichever backend makes them."""


class Store:
    """What one sandbox wrote: freed when neither it nor any that started from it needs it."""

    def __init__(self, number: int, free: Callable[[], None]) -> None:
        self.number, self.upper = number, -1
        self._free, self._users, self._lock = free, 1, threading.Lock()

    def hold(self) -> None:
        """Count one more user."""
        with self._lock:
            self._users += 1

    def drop(self) -> None:
        """Count one user less."""
        with self._lock:
            self._users -= 1
            if self._users:
                return
        if self.upper >= 0:
            os.close(self.upper)
        self._free()


def host_uid(number: int) -> int:
    """A host uid for a sandbox, so that the kernel's limits per user are its own, too."""
    return FIRST_UID + (os.getpid() % 32768) * 16384 + number % 16384


def store_options(limits: Limits) -> str:
    """With which a store's tmpfs is mounted."""
    return f"size={limits.disk_mb}m,nr_inodes={max(4096, limits.disk_mb * 256)},mode=755"


@dataclass(frozen=True)
class World:
    """What a new sandbox stands on."""

    base: Base
    owner: int
    """A number that a fork has of its parent, whose files it goes on with."""
    frozen: tuple[Store, ...] = ()
    """Stores of those it started from, the newest first."""

    def hold(self) -> None:
        """Count one more user of each store and of the base's layers, which somebody holds already."""
        if not layers.hold(self.base.layers):
            raise InfraError("sandbox start: a layer has left the cache; was it removed by hand, or the cache moved?")
        for store in self.frozen:
            store.hold()

    def drop(self) -> None:
        """Count one user less of each store and layer."""
        for store in self.frozen:
            store.drop()
        layers.release(self.base.layers)


@dataclass
class Live:
    """A started sandbox: its broker, and descriptors of its files and of those that it started with."""

    channel: Channel
    root: int
    origin: int | None
    store: Store
    world: World
    workdir: str
    """The work directory, below `root`, `origin` and the stores' upper directories."""
    group: cgroups.Group | None
    stop: Callable[[], None]
    """Ends its processes; never raises."""
    ended: bool = False

    def end(self) -> None:
        """End its processes; its store is still there. May be called twice."""
        if self.ended:
            return
        self.ended = True
        self.stop()
        if self.group:
            self.group.close()
        for fd in (self.root, self.origin, self.channel.proc):
            if fd is not None:
                os.close(fd)


class StackedSandbox(BrokeredSandbox):
    """A sandbox on layers."""

    def __init__(self, name: str, live: Live, start: Start, limits: Limits, backend: StackedBackend) -> None:
        super().__init__(name, live.channel, live.root, start, limits)
        self._live, self._backend = live, backend
        live.world.hold()

    def changes(self) -> Changes:
        """What differs in the work directory from its origin."""
        self._check_open()
        live, origin = self._live, self._start.origin
        uppers = [store.upper for store in (live.store, *live.world.frozen)]
        budget = (self.limits.disk_mb << 20) * len(uppers)  # each store may be full
        return overlay_changes(live.root, uppers, live.origin, live.workdir, origin, budget)

    def layer(self, out: IO[bytes], keep: Callable[[str], bool]) -> None:
        """Write what this sandbox wrote, whatever directory it is in, to `out` as a layer of an image.

        Every process but the broker ends for it. keep: see `capture`; paths begin at the sandbox's root, or, where
        the backend caps only some directories (docker), at their numbers. Raises `Unsupported` for a sandbox that started
        from a snapshot, whose files lie in several stores.
        """
        self.kill_all()
        if self._live.world.frozen:
            raise Unsupported("layer: this sandbox goes on from a snapshot; take the layer of one that doesn't")
        capture(self._live.store.upper, out, keep, self.limits.disk_mb << 20)

    def snapshot(self) -> Snapshot:
        """The file system and the shell's state. Every process of this sandbox ends for it."""
        frozen, go_on = self._freeze()
        try:
            go_on()
        except BaseException:
            frozen.close()
            raise
        return frozen

    def _freeze(self) -> tuple[Snapshot, Callable[[], None]]:
        """End every process; also returns what lets this sandbox go on from the snapshot."""
        self._check_open()
        exports, live = self._exports(), self._live
        start = replace(self._start, files={}, cwd=self._cwd, exports=exports)
        world = replace(live.world, frozen=(live.store, *live.world.frozen))
        world.hold()  # for the snapshot
        live.end()

        def go_on() -> None:
            try:
                self._adopt(self._backend.start(start, self.limits, world))
                self.boot(world.base.env, start)
            except BaseException:
                self.close()
                raise

        launch = functools.partial(self._backend.launch, start, self.limits, world)
        return Snapshot(self._cwd, exports, launch, world.drop), go_on

    def _adopt(self, live: Live) -> None:
        """Go on as another sandbox."""
        live.world.hold()
        self._free()
        self._live, self._channel, self._disk = live, live.channel, live.root
        self._cpu, self._ooms, self._refusals = None, 0, 0

    def _free(self) -> None:
        self._live.store.drop()
        self._live.world.drop()

    def _end(self) -> None:
        self._live.end()
        self._free()

    def _counters(self, *, limits_hit: bool) -> cgroups.Counters:
        group = self._live.group
        return group.read(limits_hit=limits_hit) if group else cgroups.Counters()


class StackedBackend(ABC):
    """Makes sandboxes on layers."""

    name: str
    kind: type[StackedSandbox] = StackedSandbox

    def __init__(self) -> None:
        layers.cap()  # a wrong one is told at once
        self._live: weakref.WeakValueDictionary[str, StackedSandbox] = weakref.WeakValueDictionary()
        self._proven: set[str] = set()

    @abstractmethod
    def start(self, start: Start, limits: Limits, world: World) -> Live:
        """Start a sandbox: a broker that answers, nothing booted yet."""

    def first(self, start: Start, limits: Limits, world: World) -> StackedSandbox:
        """`launch` for a new world. A base's shell is tried once: one that can't run would fail every command."""
        sandbox = self.launch(start, limits, world)
        if world.base.image and start.base not in self._proven:
            result = sandbox.run(":", timeout=60.0)
            if not result.ok:
                sandbox.close()
                raise Unsupported(
                    f"base={start.base!r}: its bash does not run here ({result.cause} {result.exit}); is it whole, and an"
                    " image for this machine?"
                )
            self._proven.add(start.base)
        return sandbox

    def launch(self, start: Start, limits: Limits, world: World) -> StackedSandbox:
        """Start a sandbox, ready for commands."""
        live = self.start(start, limits, world)
        sandbox = self.kind(f"{self.name}-{os.getpid()}-{live.store.number}", live, start, limits, self)
        try:
            sandbox.boot(world.base.env)
        except BaseException:
            sandbox.close()
            raise
        self._live[sandbox.id] = sandbox
        return sandbox

    def close(self) -> None:
        """Close every sandbox."""
        for sandbox in list(self._live.values()):
            sandbox.close()
