"""The minimal runner agrees with pytest: on every template with right and wrong code, and on 200 mutants."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from envs.tiny import repairs
from envs.tiny.templates import TEMPLATES

RUNNER = Path(repairs.__file__).parent / "runner.py"


def write(root: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def mini(root: Path) -> tuple[int, dict[str, str]]:
    done = subprocess.run([sys.executable, "-S", "runner.py", "--verdicts"], cwd=root, capture_output=True, text=True)
    words = [line.split(" ", 1) for line in done.stdout.splitlines() if "::" in line]
    return done.returncode, {test: word for word, test in words}


def by_pytest(root: Path) -> dict[str, dict[str, str]]:
    """Verdicts of pytest for many repositories in one run: repository → test id → PASS or FAIL."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-rA",
            "--tb=no",
            "-q",
            "-p",
            "no:cacheprovider",
            "--import-mode=importlib",
            ".",
        ],
        cwd=root,
        capture_output=True,
        text=True,
    )
    found: dict[str, dict[str, str]] = {}
    for word, repo, test in re.findall(r"^(PASSED|FAILED|ERROR) (\w+)/(\S+)", done.stdout, re.MULTILINE):
        found.setdefault(repo, {})[test] = {"PASSED": "PASS", "FAILED": "FAIL", "ERROR": "ERROR"}[word]
    return found


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """Every template right and wrong, and 200 mutants, each with its visible and its hidden tests."""
    root = tmp_path_factory.mktemp("repos")
    right, wrong = {}, []
    for split in ("train", "templates"):
        for index in range(1500):
            task = repairs.task(split, index)
            right.setdefault(task.provenance["template"], task)
            wrong += [task] if index < 100 else []
    assert set(right) == set(TEMPLATES) and len(wrong) == 200
    for number, (task, gold) in enumerate([*((t, True) for t in right.values()), *((t, False) for t in wrong)]):
        files = task.files(task.setup) | (task.files(task.grader.gold) if gold else {}) | task.files(task.grader.hidden)
        # pytest imports all repositories into one process: give each its own path, as a process of its own would.
        head = b"import sys, os; sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))\n"
        head += b"[sys.modules.pop(m, None) for m in %r]\n" % (list(repairs.MODULES),)
        write(root / f"r{number}", {k: head + v if k.startswith("tests/") else v for k, v in files.items()})
    return root


@pytest.mark.slow
def test_agrees_with_pytest_on_every_template_and_200_mutants(repositories):
    verdicts = by_pytest(repositories)
    assert len(verdicts) == 200 + len(TEMPLATES)
    failures = 0
    for repo, theirs in verdicts.items():
        status, ours = mini(repositories / repo)
        assert ours == theirs
        assert status == (1 if "FAIL" in theirs.values() else 0)
        failures += status
    assert failures == 200


@pytest.mark.parametrize(
    ("source", "status"),
    [
        ("def test_a():\n    assert 1 == 1\n", 0),
        ("def test_a():\n    assert 1 == 2\n", 1),
        ("def test_a():\n    raise ValueError('x')\n", 1),
        ("def test_a():\n    import sys; sys.exit(0)\n", 1),
        ("def helper():\n    pass\n", 5),
    ],
)
def test_exit_status_is_pytests(tmp_path, source, status):
    write(tmp_path, {"runner.py": RUNNER.read_bytes(), "tests/test_x.py": source.encode()})
    assert mini(tmp_path)[0] == status
    theirs = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"], cwd=tmp_path, capture_output=True
    )
    assert theirs.returncode == status


def test_says_what_failed(tmp_path):
    write(tmp_path, {"runner.py": RUNNER.read_bytes(), "tests/test_x.py": b"def test_a():\n    assert 1 + 1 == 3\n"})
    done = subprocess.run([sys.executable, "-S", "runner.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "FAIL test_a: assert 1 + 1 == 3\n1 failed\n"
