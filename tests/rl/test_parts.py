"""Parts that don't start are reported, not waited for."""

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from envs.errors import InfraError
from rl.parts import await_start


def part(name: str, answer: Future[Any]) -> Any:
    return SimpleNamespace(name=name, call=lambda method: answer)


def test_a_part_that_does_not_start_is_named():
    ready: Future[Any] = Future()
    ready.set_result({})
    with pytest.raises(InfraError, match=r"^worker-1 did not start within 0\.1 seconds; [^\n]*$"):
        await_start((part("worker-0", ready), part("worker-1", Future())), deadline=0.1)


def test_what_a_constructor_raised_passes_through():
    broken: Future[Any] = Future()
    broken.set_exception(ValueError("no such model"))
    with pytest.raises(ValueError, match="no such model"):
        await_start((part("engine", broken),))
