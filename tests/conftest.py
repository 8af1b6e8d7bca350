"""Markers for what a machine may lack: such tests skip with a reason, or fail where `CODEWORLD_REQUIRE` lists the part.

CODEWORLD_REQUIRE=docker,root,native pytest     # as on a host that must have all three
"""

from __future__ import annotations

import functools
import os
import shutil

import pytest

PARTS = ("native", "docker", "root", "registry", "vllm")


@functools.cache
def missing(part: str) -> str:
    """Why this machine can't run tests of `part`; empty if it can."""
    if part == "root":
        return "" if os.geteuid() == 0 else "not started as root"
    if part == "registry":
        return "" if shutil.which("docker-registry") else "no docker-registry on PATH; apt-get install docker-registry"
    if part == "vllm":
        from benchmarks.systems.engine import vllm_python

        try:
            return "" if vllm_python() else "none"
        except ValueError as error:
            return str(error)
    from envs.sandbox import CodeworldError, make_backend

    try:
        make_backend(part).close()
    except CodeworldError as error:
        return str(error)
    return ""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "native: needs namespaces (root, or user namespaces for ordinary users)")
    config.addinivalue_line("markers", "registry: needs Debian's docker-registry")


def pytest_runtest_setup(item: pytest.Item) -> None:
    required = {part for part in os.environ.get("CODEWORLD_REQUIRE", "").replace(" ", "").split(",") if part}
    if unknown := required - set(PARTS) - {"gpu"}:
        pytest.fail(f"CODEWORLD_REQUIRE={','.join(sorted(unknown))}: known are {', '.join((*PARTS, 'gpu'))}")
    for part in PARTS:
        if item.get_closest_marker(part) and (reason := missing(part)):
            if part in required:
                pytest.fail(f"CODEWORLD_REQUIRE asks for {part}, which does not work here: {reason}", pytrace=False)
            pytest.skip(f"{part}: {reason}")
