"""The helper in C: what Python tells it agrees with the system's headers, and it stays small."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from envs.errors import Unsupported
from envs.sandbox import helper, syscalls
from envs.sandbox.helper import SOURCES
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


def code_lines(source: str) -> list[str]:
    """The lines that hold anything but white space and comments."""
    token = re.compile(r"""("(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')|/\*.*?\*/|//[^\n]*""", re.DOTALL)
    bare = token.sub(lambda found: found[1] or "\n" * found[0].count("\n"), source)
    return [line for line in bare.splitlines() if line.strip()]


def test_the_helper_stays_small() -> None:
    """All of its code, headers too, in lines of at most 120 columns that hold more than comments: at most 600."""
    sample = 'a = "/* b */"; // c\n\n/* d\n e */ f();\n  \nchar *g = "\\"//"; /* h */\n'
    assert code_lines(sample) == ['a = "/* b */"; ', " f();", 'char *g = "\\"//"; ']
    lines = [line for path in SOURCES for line in code_lines(path.read_text())]
    assert len(lines) <= 600 and max(map(len, lines)) <= 120


def test_a_new_helper_replaces_those_that_nobody_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helper, "_place", lambda: tmp_path / "helper-new")
    monkeypatch.setattr(helper, "_build", Path.touch)
    for name, age in (("helper-old", 8), ("helper-recent", 6), ("other-old", 8)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, time.time() - age * 24 * 3600))
    helper.helper_path()
    assert {path.name for path in tmp_path.iterdir()} == {"helper-new", "helper-recent", "other-old"}
    (tmp_path / "helper-new").chmod(0o755)
    os.utime(tmp_path / "helper-new", (0, 0))
    helper.helper_path()
    assert time.time() - (tmp_path / "helper-new").stat().st_mtime < 60, "its use is its age"
