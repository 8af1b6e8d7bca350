"""A pool gives sandboxes that answer, each once, never more than its limit, and says why when it can't."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from envs.errors import InfraError, SandboxDead, Unsupported
from envs.sandbox import Sandbox, make_backend
from envs.sandbox.pool import Pool

BACKENDS = [pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("native", "docker")]


class Watched:
    """A real backend that remembers what it made, and fails when told to."""

    def __init__(self, name: str) -> None:
        self._backend = make_backend(name)
        self.name = name
        self.made: list[Sandbox] = []
        self.failure: Exception | None = None
        self.most = 0

    def create(self, **options: Any) -> Sandbox:
        if self.failure:
            raise self.failure
        self.made.append(self._backend.create(**options))
        self.most = max(self.most, len(self.alive))
        return self.made[-1]

    @property
    def alive(self) -> list[Sandbox]:
        return [sandbox for sandbox in self.made if not sandbox._closed]  # type: ignore[attr-defined]

    def close(self) -> None:
        self._backend.close()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[Watched]:
    made = Watched(request.param)
    yield made
    assert not made.alive
    made.close()


@pytest.fixture
def native() -> Iterator[Watched]:
    made = Watched("native")
    yield made
    assert not made.alive
    made.close()


def eventually(check: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not check() and time.monotonic() < deadline:
        time.sleep(0.01)
    return check()


def test_a_taken_sandbox_was_ready_and_another_takes_its_place(backend: Watched) -> None:
    with Pool(backend, 2, files={"a": b"1\n"}) as pool:
        assert eventually(lambda: len(backend.made) == 2)
        ready = {sandbox.id for sandbox in backend.made}
        with pool.take() as one, pool.take() as two:
            assert {one.id, two.id} == ready
            assert one.run("cat a; echo 2 > a; cd /tmp; export X=1", timeout=20).text() == "1\n"
            assert set(one.changes()) == {"a"}
            assert eventually(lambda: len(backend.made) == 4)
        with pool.take() as third:
            assert third.id not in ready
            assert third.run("pwd; cat a; echo $X", timeout=20).text() == "/repo\n1\n\n"


def test_dead_ones_are_thrown_away(backend: Watched) -> None:
    with Pool(backend, 2, limit=2) as pool:
        assert eventually(lambda: len(backend.alive) == 2)
        for sandbox in backend.made:
            sandbox.close()
        with pool.take() as sandbox:
            assert sandbox.id not in {dead.id for dead in backend.made[:2]}
            assert sandbox.run("echo alive", timeout=20).text() == "alive\n"


@pytest.mark.native
def test_the_limit_holds_back_takers_and_starters(native: Watched) -> None:
    with Pool(native, 1, limit=2, starters=3) as pool:
        one, two = pool.take(), pool.take()
        with pytest.raises(InfraError, match=r"none in 0.2 s \(2 of at most 2 in use.*raise limit") as caught:
            pool.take(timeout=0.2)
        assert "\n" not in str(caught.value)
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(pool.take)
            time.sleep(0.05)
            assert not waiting.done() and len(native.made) == 2
            one.close()
            one.close()  # frees one place, not two
            three = waiting.result(timeout=20)
        with pytest.raises(InfraError, match="none in"):
            pool.take(timeout=0.1)
        two.close()
        three.close()
    assert native.most == 2


@pytest.mark.native
def test_one_that_is_dropped_frees_its_place(native: Watched) -> None:
    with Pool(native, 1, limit=1) as pool:
        first = pool.take().id
        with pool.take(timeout=20) as second:
            assert second.id != first


@pytest.mark.native
def test_many_takers(native: Watched) -> None:
    with Pool(native, 2, limit=4) as pool:

        def episode(number: int) -> str:
            with pool.take() as sandbox:
                assert sandbox.run("ls", timeout=20).text() == ""
                sandbox.write("n", b"%d" % number)
                return sandbox.run("cat n", timeout=20).text()

        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(episode, range(40))) == [str(number) for number in range(40)]
    assert native.most <= 4


@pytest.mark.native
def test_a_failed_start_is_the_takers_and_is_tried_again(native: Watched) -> None:
    native.failure = error = RuntimeError("engine on fire")
    with Pool(native, 1) as pool:
        for _ in range(2):
            with pytest.raises(InfraError, match="a start failed: .*engine on fire") as caught:
                pool.take(timeout=20)
            assert caught.value.__cause__ is error
        native.failure = SandboxDead("died at birth")
        with pytest.raises(SandboxDead, match="died at birth"):
            pool.take(timeout=20)
        native.failure = None
        with pool.take(timeout=20) as sandbox:
            assert sandbox.run("true", timeout=20).ok
    with Pool(native, 1, base="nowhere") as pool, pytest.raises(Unsupported, match="base='nowhere'"):
        pool.take()


@pytest.mark.native
def test_close_ends_what_is_ready_and_leaves_what_is_taken(native: Watched) -> None:
    pool = Pool(native, 2, limit=3)
    taken = [pool.take() for _ in range(3)]
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(pool.take, 60)
        time.sleep(0.05)
        pool.close()
        with pytest.raises(InfraError, match="closed"):
            waiting.result(timeout=20)
    pool.close()
    assert len(native.alive) == 3 and taken[0].run("true", timeout=20).ok
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pool-")]
    for sandbox in taken:
        sandbox.close()
    with pytest.raises(InfraError, match="closed"):
        pool.take()


@pytest.mark.parametrize(("wrong", "cause"), [({"size": 0}, "size=0"), ({"size": 3, "limit": 2}, "limit=2 is below")])
def test_impossible_pools_are_one_line(wrong: dict[str, int], cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        Pool(None, **wrong)  # type: ignore[arg-type]
