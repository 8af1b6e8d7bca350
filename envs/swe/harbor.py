"""Harbor task directories as tasks: task.toml, instruction.md, environment/, tests/, solution/. Read, never built."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from envs.sandbox.base import Backend, Changes
from envs.swe import patches
from envs.swe.log_parsers import END, START
from envs.swe.swe_bench import LIMITS, SECONDS, log_task
from envs.task import Task

_HARBOR = ".harbor"
_REWARD = """for file in reward.txt reward.json; do [ -f "$HOLD/logs/$file" ] && REWARD=$(cat "$HOLD/logs/$file") && break; done
case ${REWARD:-} in 1|1.0|1.00|'{"reward": 1'*|'{"reward":1'*) echo "PASSED reward";; *) echo "FAILED reward";; esac"""


def harbor(directory: str | Path, where: str = "") -> Task:
    """A Harbor task directory (task.toml, instruction.md, environment/, tests/, solution/), read and not run.

    Its `tests/test.sh` runs at grading, and the reward that it writes must be 1. `/tests` and `/logs/verifier` lie in the work
    directory here, so the files of `tests/` are read with these names replaced. The image is `environment.docker_image`, or the one
    that a Dockerfile without build steps is `FROM`; nothing is built. Source: harborframework.com/docs/tasks.
    """
    root = Path(directory)
    where = where or str(root)
    for part in ("task.toml", "instruction.md", "tests/test.sh"):
        if not (root / part).is_file():
            raise ValueError(
                f"{where}: no {part}; a Harbor task has task.toml, instruction.md, environment/ and tests/test.sh"
            )
    try:
        config = tomllib.loads((root / "task.toml").read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: task.toml: {error}") from None
    base, workdir = _harbor_image(root, config, where)
    place = f"{workdir}/{_HARBOR}"
    files = {}
    for part in ("tests", "solution"):
        for path in sorted((root / part).rglob("*")):
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise ValueError(f"{where}: {path.relative_to(root)} is no regular file")
            if path.is_file():
                files[f"{_HARBOR}/{path.relative_to(root)}"] = _moved(path.read_bytes(), place)
    script = "\n".join(
        ["#!/bin/bash", f"HOLD={shlex.quote(place)}", 'mkdir -p "$HOLD/logs"', f"echo '{START}'", 'bash "$HOLD/tests/test.sh"',
         "CODE=$?", _REWARD, "(exit $CODE)", f"echo '{END}'"]
    )  # fmt: skip
    verifier, limits = config.get("verifier", {}), config.get("environment", {})
    task = log_task(
        {}, where, name=str(config.get("task", {}).get("name") or root.resolve().name), script=script + "\n", parser="pytest", gold="",
        fail=["reward"], keeps=[], hidden=files, protected=[f"{_HARBOR}/*"], base=base, workdir=workdir,
        prompt=(root / "instruction.md").read_text(),
        limits=replace(LIMITS, memory_mb=int(limits.get("memory_mb") or LIMITS.memory_mb), cpus=float(limits.get("cpus") or 1)),
        provenance={"source": "harbor"},
    )  # fmt: skip
    return replace(task, grader=replace(task.grader, seconds=float(verifier.get("timeout_sec") or SECONDS)))


def _harbor_image(root: Path, config: Mapping[str, Any], where: str) -> tuple[str, str]:
    """Image and work directory."""
    recipe = root / "environment" / "Dockerfile"
    lines = recipe.read_text().replace("\\\n", " ").splitlines() if recipe.is_file() else []
    steps = [line.split(None, 1) for line in lines if line.strip() and not line.lstrip().startswith("#")]
    last = {words[0].upper(): words[1].strip() for words in steps if len(words) == 2}
    named = config.get("environment", {}).get("docker_image")
    if not named:
        if built := [
            words[0] for words in steps if words[0].upper() not in ("FROM", "WORKDIR", "ENV", "LABEL", "CMD", "USER")
        ]:
            raise ValueError(
                f"{where}: environment/Dockerfile has a step {built[0]}, and images are not built here; build it and name it in [environment] docker_image"
            )
        if "FROM" not in last:
            raise ValueError(f"{where}: neither [environment] docker_image nor an environment/Dockerfile")
        named = last["FROM"].split()[0]
    return str(named), last.get("WORKDIR", "/app").rstrip("/") or "/app"


def _moved(data: bytes, place: str) -> bytes:
    """A file with Harbor's fixed directories renamed; binary ones as they are."""
    if b"\0" in data:
        return data
    for old, new in ((b"/logs/verifier", b"/logs"), (b"/tests", b"/tests"), (b"/solution", b"/solution")):
        data = re.sub(rb"(?<![\w./}-])" + old + rb"(?=[/\s\"');]|$)", place.encode() + new, data)
    return data


def harbor_solution(task: Task, backend: Backend) -> Changes:
    """What a Harbor task's `solution/solve.sh` changes, run in a pristine sandbox of it. Raises `ValueError` without one."""
    files = {p: d for p, d in task.files(task.grader.hidden).items() if p.startswith(f"{_HARBOR}/solution/")}
    if f"{_HARBOR}/solution/solve.sh" not in files:
        raise ValueError(f"{task.id}: no solution/solve.sh, so there is no gold to try")
    with patches.pristine(task, backend) as sandbox:
        for path, data in files.items():
            sandbox.write(path, data)
        sandbox.run(f"bash {_HARBOR}/solution/solve.sh", timeout=task.grader.seconds)
        return {p: c for p, c in sandbox.changes().items() if not p.startswith(f"{_HARBOR}/")}
