"""`codeworld/SWE-v0` on an image with a real pytest suite, on both backends: nothing of the repository is in `setup`."""

from __future__ import annotations

import importlib.util
import io
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from envs.attacks import basket as attacks
from envs.sandbox import Backend, make_backend
from envs.sandbox.base import FileChange
from envs.swe.env import SWEEnv
from envs.swe.grading import grade
from envs.task import Task
from envs.tiny.experts import SUBMIT, bash, edit

PACKAGES = ("pytest", "_pytest", "py", "pluggy", "iniconfig", "packaging", "pygments")
RECIPE = "FROM codeworld-base:latest\nCOPY site /opt/site\nCOPY testbed /testbed\nENV PYTHONPATH=/opt/site\n"
pytestmark = pytest.mark.docker


@pytest.fixture(scope="module")
def image() -> Iterator[str]:
    """An image with the attack suite's repository at /testbed and pytest, by its id."""
    import docker

    client, context = docker.from_env(), io.BytesIO()
    with tarfile.open(fileobj=context, mode="w") as tar:
        files = {"Dockerfile": RECIPE, **{f"testbed/{path}": text for path, text in attacks.START.items()}}
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text.encode())
            tar.addfile(entry, io.BytesIO(text.encode()))
        for package in PACKAGES:
            spec = importlib.util.find_spec(package)
            assert spec and spec.origin
            path = Path(spec.origin) if spec.submodule_search_locations is None else Path(spec.origin).parent
            tar.add(path, f"site/{path.name}")
    context.seek(0)
    made, _ = client.images.build(fileobj=context, custom_context=True, rm=True)
    yield made.id
    client.images.remove(made.id, force=True)
    client.close()


@pytest.fixture(scope="module", params=["docker", pytest.param("native", marks=pytest.mark.native)])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    made = make_backend(request.param)
    yield made
    made.close()


@pytest.fixture
def task(image: str) -> Task:
    made = attacks.repository()
    grader = replace(made.grader, command="python3 -m pytest")
    return replace(made, base=image, workdir="/testbed", setup={}, grader=grader)


def episode(backend: Backend, task: Task, *actions: str) -> tuple[list[str], float, dict[str, Any]]:
    env = SWEEnv(backend=backend, reward="cwm")
    try:
        env.reset(options={"task": task})
        texts = [env.step(action)[0] for action in actions]
        end, reward, terminated, _, info = env.step(SUBMIT)
        assert terminated
        return [*texts, end], reward, info
    finally:
        env.close()


FIX = edit(attacks.PATH, "    return total - percent", "    return total - total * percent / 100")


def test_a_repair_pays_and_what_the_agent_reads_has_nothing_of_the_grading(backend: Backend, task: Task) -> None:
    look = "git log --all 2>&1 | head -3; grep -rlE 'test_discount|attacks/basket' / --include=*.py --include=*.json 2>/dev/null"
    swap = "chmod +x shop/core.py; rm -r notes; echo x >notes; echo 'def test_whole(): pass' >tests/test_core.py; touch conftest.py"
    texts, reward, info = episode(backend, task, bash(f"{look} | grep -v ^/usr/lib"), FIX, bash(swap))
    assert (reward, info["outcome"]) == (1.0, "resolved"), info["why"]
    assert info["dropped"] == ["conftest.py", "tests/test_core.py"] and info["similarity"] == 1.0
    assert texts[-1] == "" and not any("test_discount" in text or "attacks/basket" in text for text in texts)


def test_no_repair_pays_nothing(backend: Backend, task: Task) -> None:
    _, reward, info = episode(backend, task)
    assert (reward, info["outcome"], info["similarity"]) == (-1.0, "unresolved", 0.0)


def test_similarity_counts_from_the_files_of_the_image(backend: Backend, task: Task) -> None:
    near = edit(attacks.PATH, "    return total - percent", "    return total - total * percent / 10")
    _, reward, info = episode(backend, task, near)
    assert (reward, info["outcome"]) == (0.0, "unresolved") and 0.9 < info["similarity"] < 1


def test_deletions_and_hidden_files_that_are_none(backend: Backend, task: Task) -> None:
    right = {attacks.PATH: FileChange(attacks.CORE.encode()), "shop/__init__.py": FileChange(None)}
    hidden = {**task.grader.hidden, "tests/conftest.py": None}
    only = {f"{attacks.TEST}::test_whole": "pass", f"{attacks.TEST}::TestBasket::test_negative": "pass"}
    grader = replace(task.grader, hidden=hidden, expected=only, fail_to_pass=())
    verdict = grade(replace(task, grader=grader), right, backend)
    assert verdict.outcome == "unresolved" and verdict.passed == (
        f"{attacks.TEST}::test_whole",
    )  # no conftest, no fixture
    assert verdict.found[f"{attacks.TEST}::TestBasket::test_negative"] == "error"
