"""Public SWE training sets as tasks: rows of SWE-bench, SWE-smith, SWE-Gym, R2E-Gym, SWE-rebench; Harbor task directories.

Each importer is a function of one row (or directory) and of the place to name in errors; a row that it can't take is a
`ValueError` there and a `Refused` in `load_rows`, which goes on. Nothing of a row is executed. Images are only named: a task
whose image is not here can't be played until `swe_bench.with_image` gives it one. A SWE-smith row is a *bug* for its image's
repository; `plant` makes the task of it.
"""

from __future__ import annotations

import glob
import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from envs.errors import nearest
from envs.sandbox.base import Backend, FileChange
from envs.swe import patches
from envs.swe.harbor import harbor
from envs.swe.log_parsers import parser_name
from envs.swe.log_parsers import r2e as r2e_log
from envs.swe.rowfiles import read_rows
from envs.swe.swe_bench import REPOSITORIES, ids, log_task, script_of, task_of
from envs.task import Task, sha256

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A row that is no task."""

    row: int
    """Its number, from 1."""
    id: str
    why: str


def _need(row: Row, where: str, *columns: str) -> list[Any]:
    """The values of columns that must be there. Raises `ValueError`."""
    if missing := [name for name in columns if row.get(name) is None]:
        raise ValueError(f"{where}: no column {', '.join(missing)}; such a row has {', '.join(columns)}")
    return [row[name] for name in columns]


def _json(value: Any, where: str) -> Any:
    """A value, or what it is as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: bad JSON ({error})") from None


# ---- the sets ----


def swe_gym(row: Row, where: str) -> Task:
    """A SWE-Gym row: SWE-bench's classic columns, of other repositories. Source: SWE-Gym/SWE-Gym (dataset card, harness)."""
    name, repo, patch, tests, fail, keeps = _need(
        row, where, "instance_id", "repo", "patch", "test_patch", "FAIL_TO_PASS", "PASS_TO_PASS"
    )
    where = f"{where} ({name})"
    failing = ids(fail, f"{where}: FAIL_TO_PASS")
    command = "pytest -rA"
    if repo == "python/mypy":  # its cases lie in data files and are chosen by name
        command += " -k " + shlex.quote(" or ".join(test.rpartition("::")[2] for test in failing))
    return log_task(
        row,
        where,
        name=str(name),
        base=str(row.get("image") or f"xingyaoww/sweb.eval.x86_64.{str(name).replace('__', '_s_').lower()}"),
        script=with_files(tests, command, where),
        parser="pytest",
        gold=patch,
        fail=failing,
        keeps=ids(keeps, f"{where}: PASS_TO_PASS"),
        protected=patches.globs(tests),
        provenance={"source": "swe_gym", "repo": repo, "commit": str(row.get("base_commit") or "")},
    )


def swe_rebench(row: Row, where: str) -> Task:
    """A SWE-rebench row: classic columns and `install_config` with the test command and parser. Source: nebius/SWE-rebench."""
    name, repo, patch, tests, fail, keeps, config = _need(
        row, where, "instance_id", "repo", "patch", "test_patch", "FAIL_TO_PASS", "PASS_TO_PASS", "install_config"
    )
    where = f"{where} ({name})"
    config = _json(config, f"{where}: install_config")
    if not isinstance(config, Mapping) or not isinstance(config.get("test_cmd"), str):
        raise ValueError(f"{where}: install_config has no test_cmd")
    try:
        parser = parser_name(str(config.get("log_parser")))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return log_task(
        row,
        where,
        name=str(name),
        base=str(row.get("docker_image") or row.get("image_name") or ""),
        script=with_files(tests, config["test_cmd"], where),
        parser=parser,
        gold=patch,
        fail=ids(fail, f"{where}: FAIL_TO_PASS"),
        keeps=ids(keeps, f"{where}: PASS_TO_PASS"),
        protected=patches.globs(tests),
        provenance={"source": "swe_rebench", "repo": repo, "commit": str(row.get("base_commit") or "")},
    )


def with_files(test_patch: str, command: str, where: str) -> str:
    """The script that runs `command` on the test files of a patch."""
    files = [s.path for s in patches.sections(test_patch) if s.new and s.path.endswith((".py", ".test"))]
    if not files:
        raise ValueError(f"{where}: its test_patch names no test file")
    named = [shlex.quote(path) for path in files if path.endswith(".py")] if "-k" not in command else []
    return script_of(test_patch, " ".join([command, *named]))


def swe_smith(row: Row, where: str) -> Task:
    """A SWE-smith row: a patch that breaks the image's repository. Its base is empty until `plant`; Source: SWE-bench/SWE-smith.

    As there, the files of the fail-to-pass tests are run, and of the pass-to-pass ones those in these files count.
    """
    name, bug, fail, keeps, image = _need(
        row, where, "instance_id", "patch", "FAIL_TO_PASS", "PASS_TO_PASS", "image_name"
    )
    where = f"{where} ({name})"
    failing, keeping = ids(fail, f"{where}: FAIL_TO_PASS"), ids(keeps, f"{where}: PASS_TO_PASS")
    files = list(dict.fromkeys(test.partition("::")[0] for test in failing))
    if not patches.paths(bug):
        raise ValueError(f"{where}: its patch names no file")
    quoted = " ".join(map(shlex.quote, files))
    return log_task(
        row,
        where,
        name=str(name),
        base="",
        script=script_of("", f"pytest --disable-warnings --color=no --tb=no --verbose {quoted}"),
        parser="swe_smith",
        gold=bug,
        fail=failing,
        keeps=[test for test in keeping if test.partition("::")[0] in files],
        protected=[glob.escape(path) for path in files],
        provenance={"source": "swe_smith", "repo": str(row.get("repo") or ""), "image": str(image)},
    )


def plant(task: Task, base: str, backend: Backend) -> Task:
    """The task of a SWE-smith row on an image of its repository: the bug is put in, and its undoing is the gold patch.

    Raises `ValueError` where the bug doesn't apply.
    """
    bug = task.blob(task.grader.gold_patch, "gold_patch").decode()
    task = replace(task, base=base)
    made = patches.patch_changes(task, bug, backend)
    if made.why or any(change.data is None for change in made.changes.values()):
        raise ValueError(f"{task.id}: its bug can't be planted on {base[:40]}: {made.why or 'it removes a file'}")
    with patches.pristine(task, backend) as sandbox:
        before = patches.originals(sandbox, list(made.changes))
    gold = patches.to_patch(made.changes, {path: before.get(path, FileChange(None)) for path in made.changes}).encode()
    files = {path: change.data or b"" for path, change in made.changes.items()}
    blobs = {**task.blobs, sha256(gold): gold} | {sha256(data): data for data in files.values()}
    setup = {path: sha256(data) for path, data in files.items()}
    return replace(
        task, setup={**task.setup, **setup}, grader=replace(task.grader, gold_patch=sha256(gold)), blobs=blobs
    )


def r2e_gym(row: Row, where: str) -> Task:
    """An R2E-Gym row: every test's word with a right solution, tests and commit as JSON. Source: R2E-Gym/R2E-Gym-Subset."""
    repo, commit, image, expected, ran, parsed = _need(
        row, where, "repo_name", "commit_hash", "docker_image", "expected_output_json", "execution_result_content",
        "parsed_commit_content",
    )  # fmt: skip
    name = f"{repo}-{commit}"
    where = f"{where} ({name})"
    ran, parsed = (
        _json(value, f"{where}: {what}")
        for value, what in ((ran, "execution_result_content"), (parsed, "parsed_commit_content"))
    )
    try:
        words = {
            re.sub(r"\x1b\[\d+m", "", test).partition(" - ")[0]: word
            for test, word in _json(expected, f"{where}: expected_output_json").items()
        }
        tests = dict(zip(ran["test_file_names"], ran["test_file_codes"], strict=True))
        was = r2e_log(str(ran.get("old_commit_res_stdout") or ""))
        sides: list[dict[str, FileChange]] = [{}, {}]
        for diff in parsed["file_diffs"]:
            path = diff["header"]["file"]["path"]
            if not re.search(r"(^|/)([Tt]ests?/|test_[^/]*$)|_test\.py$", path):
                for side, text in zip(sides, (diff["old_file_content"], diff["new_file_content"]), strict=True):
                    side[path] = FileChange(text.encode() if text else None)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: its commit or its tests are not of the known shape ({error!r})") from None
    right = [test for test, word in words.items() if word == "PASSED"]
    return log_task(
        row,
        where,
        name=name,
        base=str(image),
        script=script_of("", 'PATH="$PWD/.venv/bin:$PATH" python -W ignore -m pytest -rA r2e_tests'),
        parser="r2e",
        gold=patches.to_patch(*sides),
        fail=[test for test in right if was.get(test) != "PASSED"],
        keeps=[test for test in right if was.get(test) == "PASSED"],
        failing=[test for test, word in words.items() if word != "PASSED"],
        hidden={f"r2e_tests/{Path(path).name}": code.encode() for path, code in tests.items()},
        provenance={"source": "r2e_gym", "repo": repo, "commit": commit},
    )


# ---- batches ----

FORMATS: dict[str, Callable[[Row, str], Task]] = {
    "swe_bench": task_of,
    "swe_smith": swe_smith,
    "swe_gym": swe_gym,
    "swe_rebench": swe_rebench,
    "r2e_gym": r2e_gym,
}


def format_of(row: Row) -> str:
    """Which of `FORMATS` a row is, by the columns that only it has."""
    marks = {
        "eval_script": "swe_bench",
        "expected_output_json": "r2e_gym",
        "install_config": "swe_rebench",
        "image_name": "swe_smith",
    }
    found = next((name for column, name in marks.items() if column in row), "")
    return found or ("swe_gym" if "test_patch" in row and row.get("repo") not in REPOSITORIES else "swe_bench")


_ID = re.compile(r"\w[\w.+:@-]{0,199}")


def load_rows(
    source: str | Path,
    format: str | None = None,  # noqa: A002
    report: Callable[[str], None] = print,
) -> list[Task | Refused]:
    """Every row of a file (.json, .jsonl, .parquet), of a set on the hub (its id), or every directory below a Harbor one.

    A row that is refused, or whose id was there before, is in the result as `Refused`, and `report` gets a line at the end with
    how many were. format: a key of `FORMATS` or "harbor"; None: seen from each row. Raises `ValueError` where nothing can be read.
    """
    if format is not None and format not in (*FORMATS, "harbor"):
        raise ValueError(
            f"unknown format {format!r}; known are {', '.join(FORMATS)}, harbor.{nearest(format, FORMATS)}"
        )
    found: list[Task | Refused] = []
    seen: set[str] = set()
    for number, (where, row) in enumerate(_rows(source, format), 1):
        name = str(row.get("instance_id") or "") if isinstance(row, Mapping) else ""
        try:
            if isinstance(row, str):
                raise ValueError(f"{where}: {row}")
            task = harbor(row, where) if isinstance(row, Path) else FORMATS[format or format_of(row)](row, where)
            if not _ID.fullmatch(task.id):
                raise ValueError(
                    f"{where}: id {task.id!r}; an id names a directory: letters, digits and any of _ - + . : @"
                )
            if task.id in seen:
                raise ValueError(f"{where}: {task.id} occurs twice; only the first is taken")
            seen.add(task.id)
            found.append(task)
        except (ValueError, TypeError, AttributeError) as error:
            why = " ".join(str(error).split())
            found.append(Refused(row=number, id=name, why=why if why.startswith(where) else f"{where}: {why}"))
    refused = [row for row in found if isinstance(row, Refused)]
    report(
        f"{source}: {len(found) - len(refused)} tasks, {len(refused)} rows refused"
        + "".join(f"\n  {r.why}" for r in refused[:20])
    )
    return found


def _rows(source: str | Path, format: str | None) -> Iterator[tuple[str, Row | Path | str]]:  # noqa: A002
    path = Path(source)
    if format == "harbor" or (path.is_dir() and format is None):
        folders = [path] if (path / "task.toml").is_file() else sorted(p.parent for p in path.glob("*/task.toml"))
        if not folders:
            raise ValueError(f"{source}: no Harbor task in it; such a directory has a task.toml")
        yield from ((str(folder), folder) for folder in folders)
    else:
        yield from ((f"{source} row {number}", row) for number, row in enumerate(read_rows(source), 1))
