"""The helper in C: what Python tells it agrees with the system's headers, and it stays small."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess

import pytest

from envs.errors import Unsupported
from envs.sandbox import syscalls
from envs.sandbox.seccomp import seccomp_filter


def numbers(source: str) -> dict[str, int]:
    """What the C preprocessor makes of the names of system calls, where it knows them."""
    program = source + "".join(f"\n@{name} __NR_{name}" for name in syscalls.NUMBERS)
    out = subprocess.run(["cc", "-E", "-P", "-"], input=program, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"^@(\w+) (\d+)$", out, re.M)}


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize("machine", syscalls.MACHINES)
def test_numbers_of_system_calls_are_those_of_the_headers(machine: str) -> None:
    """aarch64 has the generic numbers, whose header every machine has."""
    if machine == "x86_64" != platform.machine():
        pytest.skip("needs an x86_64 compiler")
    known = numbers("#include <asm/unistd.h>" if machine == "x86_64" else "#include <asm-generic/unistd.h>")
    ours = {name: both[syscalls.MACHINES.index(machine)] for name, both in syscalls.NUMBERS.items()}
    missing = {name for name, number in ours.items() if number is None}
    assert len(known) > 50 and not missing & known.keys()
    assert known == {name: number for name, number in ours.items() if name in known}


def test_another_machine_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    for cached in (syscalls.machine, syscalls.number, seccomp_filter):
        cached.cache_clear()
    try:
        with pytest.raises(Unsupported, match=r"^[^\n]*riscv64[^\n]*$"):
            seccomp_filter(strict=False)
    finally:
        syscalls.machine.cache_clear()
