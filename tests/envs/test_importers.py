"""Each public format: gold is resolved and nothing is not, on one small repository in that format; broken rows are refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from envs.swe import importers, log_grading, patches
from envs.swe.grading import grade
from envs.swe.harbor import harbor, harbor_solution
from envs.swe.importers import Refused, load_rows, plant
from envs.task import Task, sha256

BROKEN, RIGHT = b"def add(a, b):\n    return a - b\n", b"def add(a, b):\n    return a + b\n"
TEST = b"from calc import add\n\n\ndef test_add():\n    assert add(2, 3) == 5\n\n\ndef test_zero():\n    assert add(0, 0) == 0\n"
GOLD = "diff --git a/calc.py b/calc.py\n--- a/calc.py\n+++ b/calc.py\n@@ -1,2 +1,2 @@\n def add(a, b):\n-    return a - b\n+    return a + b\n"
BUG = GOLD.replace("-    return a - b\n+    return a + b", "-    return a + b\n+    return a - b")
TEST_PATCH = (
    "diff --git a/test_calc.py b/test_calc.py\nnew file mode 100644\n--- /dev/null\n+++ b/test_calc.py\n@@ -0,0 +1,9 @@\n"
    + "".join(f"+{line}\n" for line in TEST.decode().splitlines())
)
F2P, P2P = ["test_calc.py::test_add"], ["test_calc.py::test_zero"]
CLASSIC = {
    "instance_id": "me__calc-1",
    "repo": "me/calc",
    "base_commit": "0" * 40,
    "patch": GOLD,
    "test_patch": TEST_PATCH,
    "problem_statement": "add subtracts",
    "FAIL_TO_PASS": F2P,
    "PASS_TO_PASS": json.dumps(P2P),
}
COMMAND = "python3 -m pytest -rA"
DIFF = {
    "header": {"file": {"path": "calc.py"}},
    "old_file_content": BROKEN.decode(),
    "new_file_content": RIGHT.decode(),
}
ROWS = {
    "swe_gym": CLASSIC,
    "swe_rebench": CLASSIC | {"install_config": json.dumps({"test_cmd": COMMAND, "log_parser": "parse_log_pytest"}), "docker_image": "x"},
    "swe_smith": {
        "instance_id": "me__calc.1.lm__1",
        "repo": "me/calc",
        "patch": BUG,
        "problem_statement": "add subtracts",
        "FAIL_TO_PASS": F2P,
        "PASS_TO_PASS": [*P2P, "test_other.py::test_x"],
        "image_name": "swesmith.x",
    },
    "r2e_gym": {
        "repo_name": "calc",
        "commit_hash": "abc",
        "docker_image": "namanjain12/calc:abc",
        "problem_statement": "add subtracts",
        "expected_output_json": json.dumps({"test_add": "PASSED", "\x1b[1mtest_zero\x1b[0m": "PASSED", "test_odd": "FAILED"}),
        "execution_result_content": json.dumps(
            {
                "test_file_names": ["test_1.py"],
                "test_file_codes": [TEST.decode() + "\n\ndef test_odd():\n    assert add(1, 1) == 3\n"],
                "old_commit_res_stdout": "== short test summary info ==\nPASSED r2e_tests/test_1.py::test_zero\nFAILED r2e_tests/test_1.py::test_add - x\n",
            }
        ),
        "parsed_commit_content": json.dumps(
            {"file_diffs": [DIFF, {**DIFF, "header": {"file": {"path": "tests/test_calc.py"}}}]}
        ),
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def bare_pytest(monkeypatch):
    """`pytest` as a command of the host's interpreter, without plugins: what an image would have on its path."""
    monkeypatch.setattr(
        log_grading,
        "_ENVIRONMENT",
        log_grading._ENVIRONMENT + " PYTEST_DISABLE_PLUGIN_AUTOLOAD=1",
    )


def here(task: Task, files: dict[str, bytes], native) -> Task:
    """The task on this host instead of its image, with the repository's files."""
    script = task.blob(task.grader.script, "script").decode()
    script = script.replace("\npytest ", "\npython3 -m pytest ").replace(" python -W", " python3 -W").encode()
    blobs = {**task.blobs, sha256(script): script} | {sha256(data): data for data in files.values()}
    setup = {**{path: sha256(data) for path, data in files.items()}, **task.setup}
    grader = replace(task.grader, script=sha256(script), seconds=60.0)
    return replace(task, base="host", setup=setup, grader=grader, blobs=blobs)


def built(name: str, native) -> Task:
    task = importers.FORMATS[name](ROWS[name], "row 1")
    assert importers.format_of(ROWS[name]) == name
    if name == "swe_smith":
        assert task.base == "" and task.grader.expected.keys() == {*F2P, *P2P}
        task = here(task, {"calc.py": RIGHT, "test_calc.py": TEST}, native)
        return plant(task, "host", native)
    return here(task, {"calc.py": BROKEN}, native)


@pytest.mark.parametrize("name", ROWS)
def test_gold_is_resolved_and_nothing_is_not(native, name):
    task = built(name, native)
    assert task.prompt == "add subtracts" and task.provenance["source"] == name
    gold = task.blob(task.grader.gold_patch, "gold").decode()
    verdict = log_grading.grade_patch(task, gold, native)
    assert (verdict.outcome, verdict.why) == ("resolved", "")
    verdict = grade(task, {}, native)
    assert verdict.outcome == "unresolved" and "test_add" in verdict.why


def test_a_test_that_fails_with_a_right_solution_must_fail(native):
    task = built("r2e_gym", native)
    odd = {"calc.py": patches.FileChange(b"def add(a, b):\n    return 3 if a == b == 1 else a + b\n")}
    verdict = grade(task, odd, native)
    assert verdict.outcome == "unresolved" and "test_odd does not fail" in verdict.why


def test_a_bug_that_does_not_fit_is_one_line(native):
    task = importers.swe_smith(ROWS["swe_smith"], "row 1")
    with pytest.raises(ValueError, match=r"its bug can't be planted on host: the patch does not apply"):
        plant(here(task, {"calc.py": b"pass\n"}, native), "host", native)


BAD = {
    "swe_gym": [({"test_patch": None}, "no column test_patch"), ({"test_patch": ""}, "names no test file"), ({"FAIL_TO_PASS": "["}, "bad JSON")],
    "swe_rebench": [
        ({"install_config": "{"}, "install_config: bad JSON"),
        ({"install_config": {"test_cmd": "x", "log_parser": "parse_log_gotest"}}, "unknown log parser"),
        ({"install_config": {}}, "has no test_cmd"),
    ],
    "swe_smith": [({"patch": None}, "no column patch"), ({"patch": "x"}, "names no file"), ({"FAIL_TO_PASS": []}, "no fail-to-pass test")],
    "r2e_gym": [
        ({"expected_output_json": "{"}, "bad JSON"),
        ({"expected_output_json": "[]"}, "not of the known shape"),
        ({"parsed_commit_content": '{"file_diffs": [{}]}'}, "not of the known shape"),
        ({"execution_result_content": "3"}, "not of the known shape"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("name", "number"), [(name, i) for name in BAD for i in range(len(BAD[name]))])
def test_a_broken_row_is_refused_by_number_and_the_batch_goes_on(tmp_path, name, number):
    change, why = BAD[name][number]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**ROWS[name], **change}) + "\n" + json.dumps(ROWS[name]) + "\n")
    said: list[str] = []
    refused, task = load_rows(path, name, said.append)
    assert isinstance(refused, Refused) and refused.row == 1 and why in refused.why and "row 1" in refused.why
    assert isinstance(task, Task) and "1 tasks, 1 rows refused" in said[0]


def test_an_unknown_format_is_named(tmp_path):
    with pytest.raises(ValueError, match="unknown format 'swe_smiht'.*Did you mean 'swe_smith'"):
        load_rows(tmp_path, "swe_smiht")


# ---- Harbor ----


def directory(root, toml: str = "", dockerfile: str = "FROM host\nWORKDIR /app\n"):
    files = {
        "task.toml": f'version = "1.0"\n[verifier]\ntimeout_sec = 60.0\n[environment]\nmemory_mb = 1024\n{toml}',
        "instruction.md": "Write the sum of 2 and 3 to /app/sum.txt.\n",
        "environment/Dockerfile": dockerfile,
        "tests/test.sh": "#!/bin/bash\nif python3 /tests/check.py; then echo 1 > /logs/verifier/reward.txt; else echo 0 > /logs/verifier/reward.txt; fi\n",
        "tests/check.py": "import sys\nsys.exit(open('sum.txt').read().strip() != '5')\n",
        "solution/solve.sh": "echo $((2 + 3)) > /app/sum.txt\n",
    }
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def test_harbor_solution_is_resolved_and_nothing_is_not(native, tmp_path):
    (task,) = load_rows(directory(tmp_path / "sum"), report=lambda _: None)
    assert isinstance(task, Task) and (task.id, task.base, task.workdir, task.limits.memory_mb) == (
        "sum",
        "host",
        "/app",
        1024,
    )
    changes = harbor_solution(task, native)
    assert set(changes) == {"sum.txt"}
    assert grade(task, changes, native).outcome == "resolved"
    assert grade(task, {}, native).outcome == "unresolved"
    forged = {".harbor/logs/reward.txt": patches.FileChange(b"1"), ".harbor/tests/check.py": patches.FileChange(b"")}
    verdict = grade(task, forged, native)
    assert verdict.outcome == "unresolved" and set(verdict.dropped) == set(forged)


HARBOR_BAD = {
    "no instruction": (lambda root: (root / "instruction.md").unlink(), "no instruction.md"),
    "bad toml": (lambda root: (root / "task.toml").write_text("x = ["), "task.toml: "),
    "build steps": (
        lambda root: directory(root, dockerfile="FROM x\nRUN make\n"),
        "has a step RUN, and images are not built here",
    ),
    "no image": (lambda root: (root / "environment/Dockerfile").unlink(), "neither .* docker_image nor"),
    "a link": (lambda root: (root / "tests/x").symlink_to("/etc/passwd"), "is no regular file"),
}


@pytest.mark.parametrize("case", HARBOR_BAD)
def test_a_broken_harbor_directory_is_refused(tmp_path, case):
    damage, why = HARBOR_BAD[case]
    damage(directory(tmp_path / "bad"))
    with pytest.raises(ValueError, match=why):
        harbor(tmp_path / "bad")
    directory(tmp_path / "good", 'docker_image = "some:image"\n', "FROM x\nRUN make\n")
    refused, task = load_rows(tmp_path, report=lambda _: None)
    assert isinstance(refused, Refused) and isinstance(task, Task) and task.base == "some:image"
