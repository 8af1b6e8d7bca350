"""SWE-bench: rows become tasks, predictions are read and written. `envs/swe/log_grading.py` grades.

row ─► Task (grader "swe_bench": evaluation script, parser, expected ids)
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from envs.sandbox.base import Backend, Changes, Limits
from envs.swe import patches
from envs.swe.log_parsers import END, START, parser_name
from envs.task import Grader, Task, sha256

LIMITS = Limits(memory_mb=4096, pids=512, disk_mb=1024, cpus=1.0)
SECONDS = 1800.0
"""Wall clock of one evaluation script. Source: SWE-bench 5.0.2, `swebench eval --timeout`."""
CLASSIC = (
    "instance_id",
    "repo",
    "base_commit",
    "patch",
    "test_patch",
    "problem_statement",
    "version",
    "FAIL_TO_PASS",
    "PASS_TO_PASS",
)
"""Columns that a classic row must have."""
COMPLETE = (
    "instance_id",
    "repo",
    "patch",
    "problem_statement",
    "eval_script",
    "log_parser",
    "FAIL_TO_PASS",
    "PASS_TO_PASS",
)
"""Columns that a row of SWE-bench 5 must have; it may also have `image`, `eval_type`, `test_patch`, `base_commit`."""


@dataclass(frozen=True)
class Repository:
    """How the tests of one repository of SWE-bench Verified are run and read."""

    parser: str
    command: str = "pytest -rA"
    python: tuple[tuple[str, str], ...] = (("0", "3.9"),)
    """(version of the repository, Python that the benchmark runs it on from there), ascending."""
    needs: tuple[str, ...] = ()
    """What its tests need beside what it declares, as requirements."""
    older: tuple[str, str] = ("0", "")
    """(version, test command of what is older)."""
    runner: tuple[str, ...] = ()
    """Files of the repository that run its tests: not an attempt's to change, unless gold does."""


REPOSITORIES = {
    "astropy/astropy": Repository(
        "pytest_v2",
        python=(("0", "3.6"), ("3.0", "3.9"), ("5.3", "3.10")),
        older=("3.0", "pytest -rA -vv -o console_output_style=classic --tb=no"),
    ),
    "django/django": Repository(
        "django",
        "./tests/runtests.py --verbosity 2 --settings=test_sqlite --parallel 1",
        (("0", "3.5"), ("3.0", "3.6"), ("4.0", "3.8"), ("4.1", "3.9"), ("5.0", "3.11")),
        runner=("tests/runtests.py",),
    ),
    "matplotlib/matplotlib": Repository(
        "matplotlib", python=(("0", "3.5"), ("3.0", "3.7"), ("3.1", "3.8"), ("3.5", "3.11"))
    ),
    "mwaskom/seaborn": Repository(
        "seaborn",
        "pytest --no-header -rA",
        needs=("numpy==1.25.2", "pandas==2.0.0", "matplotlib==3.7.2", "scipy==1.11.2", "pytest<9"),
    ),
    "pallets/flask": Repository(
        "pytest",
        python=(("0", "3.9"), ("2.1", "3.10"), ("2.2", "3.11")),
        needs=("Werkzeug==2.3.7", "click==8.1.3", "pytest<8"),
    ),
    "psf/requests": Repository("pytest_options", needs=("pytest<8",)),
    "pydata/xarray": Repository(
        "pytest",
        python=(("0", "3.10"),),
        needs=("numpy==1.23.5", "pandas==1.5.3", "scipy==1.11.1", "pytest==7.4.0", "setuptools<69"),
    ),
    "pylint-dev/pylint": Repository("pytest_options", needs=("pytest<8", "setuptools<69")),
    "pytest-dev/pytest": Repository(
        "pytest",
        needs=(
            "attrs==23.1.0",
            "iniconfig==2.0.0",
            "packaging==23.1",
            "pluggy<1.4",
            "py==1.11.0",
            "toml",
            "more-itertools",
        ),
    ),
    "scikit-learn/scikit-learn": Repository("pytest_v2", python=(("0", "3.6"), ("1.3", "3.9"))),
    "sphinx-doc/sphinx": Repository(
        "pytest_v2",
        python=(("0", "3.9"), ("8.0", "3.10")),
        needs=("pytest<8", "html5lib", "Jinja2==3.0.3", "setuptools<69"),
    ),
    "sympy/sympy": Repository(
        "sympy",
        "PYTHONWARNINGS='ignore::UserWarning,ignore::SyntaxWarning' bin/test -C --verbose",
        needs=("mpmath==1.3.0",),
        runner=("bin/test", "sympy/testing/runtests.py", "sympy/utilities/runtests.py"),
    ),
}
"""Facts of the benchmark, for rows that don't carry their own script. Source: SWE-bench 4.1.0, `harness/constants/python.py`
(parsers: 5.0.2); Sphinx is run by pytest itself rather than through tox, which prints the same lines."""
_NO_TESTS = (".json", ".png", "csv", ".txt", ".md", ".jpg", ".jpeg", ".pkl", ".yml", ".yaml", ".toml")
"""Ends of files in test patches that are not given to the runner."""


def python_of(repo: str, version: str) -> str:
    """The Python that the benchmark runs this version of a repository on."""
    return [python for since, python in REPOSITORIES[repo].python if _number(since) <= _number(version)][-1]


def command_of(repo: str, version: str) -> str:
    """The test command of this version of a repository."""
    known = REPOSITORIES[repo]
    return known.older[1] if _number(version) < _number(known.older[0]) else known.command


def _number(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


# ---- rows → tasks ----


def task_of(row: Mapping[str, Any], where: str) -> Task:
    """A task from a classic row (12 or 13 columns) or one of SWE-bench 5. Raises `ValueError` naming `where`.

    A row of SWE-bench 5 has its image as `base`; for a classic one it is empty, to be set by `with_image`.
    """
    complete = "eval_script" in row
    wanted = COMPLETE if complete else CLASSIC
    if missing := [name for name in wanted if row.get(name) is None]:
        raise ValueError(f"{where}: no column {', '.join(missing)}; a SWE-bench row has {', '.join(wanted)}")
    name, repo = str(row["instance_id"]), str(row["repo"])
    where = f"{where} ({name})"
    fail, keeps = (ids(row[column], f"{where}: {column}") for column in ("FAIL_TO_PASS", "PASS_TO_PASS"))
    if row.get("eval_type", "pass_and_fail") != "pass_and_fail":
        raise ValueError(f"{where}: eval_type {row['eval_type']!r}; only pass_and_fail logs are read here")
    test_patch = str(row.get("test_patch") or "")
    if complete:
        script = str(row["eval_script"])
        if START not in script or END not in script:
            raise ValueError(f"{where}: its eval_script prints no markers, so its log could not be read")
        parser = _named(str(row["log_parser"]), where)
    else:
        if repo not in REPOSITORIES:
            known = ", ".join(REPOSITORIES)
            raise ValueError(f"{where}: unknown repository {repo!r}; a classic row is of {known}")
        script, parser = evaluation(repo, str(row["version"]), test_patch, where), REPOSITORIES[repo].parser
    gold = str(row["patch"])
    runner = REPOSITORIES[repo].runner if repo in REPOSITORIES else ()
    return log_task(
        row,
        where,
        name=name,
        base=str(row.get("image") or ""),
        script=script,
        parser=parser,
        gold=gold,
        fail=fail,
        keeps=keeps,
        protected=[*patches.globs(test_patch or script), *(path for path in runner if path not in patches.paths(gold))],
        provenance={
            "source": "swe_bench",
            "repo": repo,
            "commit": str(row.get("base_commit") or ""),
            "version": str(row.get("version") or ""),
        },
    )


def log_task(
    row: Mapping[str, Any],
    where: str,
    *,
    name: str,
    script: str,
    parser: str,
    gold: str,
    fail: list[str],
    keeps: list[str],
    **fields: Any,
) -> Task:
    """A task whose script's log is graded; `fields` are those of `Task` and, by `hidden` and `protected`, of its grader."""
    if not fail:
        raise ValueError(f"{where} ({name}): no fail-to-pass test, so nothing tells a solution from none")
    if bad := next((path for path in patches.paths(gold) if patches.unsafe(path)), None):
        raise ValueError(f"{where} ({name}): its patch touches {bad!r}, outside the repository or in .git")
    hidden: dict[str, bytes] = fields.pop("hidden", {})
    blobs = {sha256(data): data for data in (script.encode(), gold.encode(), *hidden.values())}
    grader = Grader(
        kind="swe_bench",
        command="",
        expected=dict.fromkeys([*fail, *keeps], "pass") | dict.fromkeys(fields.pop("failing", ()), "fail"),
        fail_to_pass=tuple(fail),
        gold_patch=sha256(gold.encode()) if gold else "",
        script=sha256(script.encode()),
        parser=parser,
        hidden={path: sha256(data) for path, data in hidden.items()},
        protected=tuple(fields.pop("protected", ())),
        seconds=SECONDS,
    )
    prompt = fields.pop("prompt", None) or str(row.get("problem_statement") or "")
    values: dict[str, Any] = {"id": name, "workdir": "/testbed", "limits": LIMITS, "grader": grader, "blobs": blobs}
    return Task(**(values | {"prompt": prompt} | fields))


def ids(value: Any, where: str) -> list[str]:
    """Test ids from a list, or from one as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"{where}: bad JSON ({error}); expected a list of test ids") from None
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) and item for item in value):
        raise ValueError(f"{where}: {str(value)[:60]!r} is no list of test ids")
    return list(dict.fromkeys(value))


def _named(parser: str, where: str) -> str:
    try:
        return parser_name(parser)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def with_image(task: Task, base: str) -> Task:
    """The task on an image in which its repository lies at `task.workdir`."""
    return replace(task, base=base)


def evaluation(repo: str, version: str, test_patch: str, where: str) -> str:
    """The evaluation script of a classic row: reset the test files, apply the test patch, run the tests, reset again.

    A test patch that holds no file of tests, but their data, runs all tests.
    """
    sections = patches.sections(test_patch)
    files = [s.path for s in sections if s.new and not s.path.endswith(_NO_TESTS)]
    if not sections:
        raise ValueError(f"{where}: its test_patch names no file")
    if repo == "django/django":
        files = [f.removesuffix(".py").removeprefix("tests/").replace("/", ".") for f in files]
    command = " ".join([command_of(repo, version), *map(shlex.quote, files)])
    return script_of(test_patch, command)


def script_of(test_patch: str, command: str) -> str:
    """A script that applies a test patch and runs `command` between the markers. The repository's one commit is its base."""
    sections = patches.sections(test_patch)
    old = " ".join(shlex.quote(s.old) for s in sections if s.old)
    new = " ".join(shlex.quote(s.new) for s in sections if s.new and not s.old)
    reset = [f"git checkout HEAD -- {old}"] * bool(old) + [f"rm -f -- {new}"] * bool(new)
    word = "EOF_" + sha256(test_patch.encode())[:16]
    patch = [f"git apply -v - <<'{word}'\n{test_patch.rstrip(chr(10))}\n{word}"] * bool(sections)
    lines = ["#!/bin/bash", "set -uxo pipefail", *reset, *patch, f": '{START}'", command, f": '{END}'", *reset]
    return "\n".join(lines) + "\n"


# ---- predictions ----


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One attempt, as SWE-bench's command line reads it."""

    instance_id: str
    model_patch: str
    model_name_or_path: str = "codeworld"


def prediction(task: Task, changes: Changes, backend: Backend, model: str = "codeworld") -> Prediction:
    """The prediction that an episode's changes are. Raises `InfraError`."""
    return Prediction(
        instance_id=task.id, model_patch=patches.patch_of(task, changes, backend), model_name_or_path=model
    )


def save_predictions(path: str | Path, rows: Iterable[Prediction]) -> None:
    """Write predictions as `.jsonl` or `.json`. One for each id: SWE-bench grades only the last of several."""
    path, seen = Path(path), set()
    plain = []
    for row in rows:
        if row.instance_id in seen:
            raise ValueError(
                f"{path}: two predictions for {row.instance_id}, of which SWE-bench grades one; write two files"
            )
        seen.add(row.instance_id)
        plain.append(dict(vars(row)))
    if path.suffix not in (".json", ".jsonl"):
        raise ValueError(f"{path}: predictions are .json or .jsonl; rename it")
    text = json.dumps(plain, indent=1) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in plain)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.rename(path)


def read_predictions(path: str | Path) -> list[Prediction]:
    """Read predictions: `.jsonl`, or `.json` with a list or an id → prediction table. Raises `ValueError` with the row."""
    from envs.swe.rowfiles import read_rows

    found = []
    for number, row in enumerate(read_rows(path), 1):
        where = f"{path} row {number}"
        if not isinstance(row, dict):
            raise ValueError(f"{where}: {row}")
        if not isinstance(row.get("instance_id"), str):
            raise ValueError(f"{where}: no instance_id; a prediction has instance_id, model_name_or_path, model_patch")
        patch = row.get("model_patch")
        if not isinstance(patch, str | None):
            raise ValueError(f"{where}: model_patch is {type(patch).__name__}; it is a unified diff as text")
        found.append(
            Prediction(
                instance_id=row["instance_id"],
                model_patch=patch or "",
                model_name_or_path=str(row.get("model_name_or_path") or ""),
            )
        )
    return found
