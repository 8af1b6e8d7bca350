"""SWE-bench rows, patches and grading by log, on a repository of three files that the host itself can run."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

from envs.sandbox.base import FileChange
from envs.swe import log_grading, patches, swe_bench
from envs.swe.env import SWEEnv
from envs.swe.grading import filtered, grade
from envs.swe.importers import Refused, load_rows
from envs.swe.log_parsers import END, START
from envs.task import sha256

FILES = {
    "calc.py": b'def add(a, b):\n    """Sum."""\n    return a - b\n\n\ndef double(a):\n    return 2 * a\n',
    "tests/test_calc.py": b"from calc import double\n# Tests.\ndef test_double():\n    assert double(2) == 4\n",
    "notes.txt": b"no newline at the end",
}
GOLD = """diff --git a/calc.py b/calc.py
--- a/calc.py
+++ b/calc.py
@@ -1,3 +1,3 @@
 def add(a, b):
     \"\"\"Sum.\"\"\"
-    return a - b
+    return a + b
"""
TESTS = """diff --git a/tests/test_calc.py b/tests/test_calc.py
--- a/tests/test_calc.py
+++ b/tests/test_calc.py
@@ -1,4 +1,8 @@
-from calc import double
+from calc import add, double
 # Tests.
 def test_double():
     assert double(2) == 4
+
+
+def test_add():
+    assert add(2, 3) == 5
"""
PYTEST = "PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 python3 -m pytest -rA -p no:cacheprovider"
COMMAND = f"{PYTEST} tests/test_calc.py"
F2P, P2P = "tests/test_calc.py::test_add", "tests/test_calc.py::test_double"


def row(**changed) -> dict:
    """A row of SWE-bench 5 for the repository above."""
    script = swe_bench.script_of(TESTS, COMMAND)
    made = {
        "instance_id": "me__calc-1",
        "repo": "me/calc",
        "base_commit": "0" * 40,
        "patch": GOLD,
        "test_patch": TESTS,
        "problem_statement": "add subtracts",
        "version": "1.0",
        "image": "host",
        "eval_script": script,
        "log_parser": "parse_log_pytest",
        "eval_type": "pass_and_fail",
        "FAIL_TO_PASS": json.dumps([F2P]),
        "PASS_TO_PASS": [P2P],
    }
    return {**made, **changed}


def task(files=FILES, **changed):
    made = swe_bench.task_of(row(**changed), "row 1")
    setup = {path: sha256(data) for path, data in files.items()}
    blobs = {**made.blobs, **{sha256(data): data for data in files.values()}}
    return replace(made, base="host", setup=setup, blobs=blobs, grader=replace(made.grader, seconds=60.0))


def changed(path: str, data: bytes | None, mode: int = 0o644) -> dict[str, FileChange]:
    return {path: FileChange(data, mode)}


RIGHT = changed("calc.py", FILES["calc.py"].replace(b"a - b", b"a + b"))


def test_gold_is_resolved_and_nothing_is_not(native):
    verdict = log_grading.grade_patch(task(), GOLD, native)
    assert (verdict.outcome, verdict.why, verdict.similarity) == ("resolved", "", 1.0)
    assert set(verdict.passed) == {F2P, P2P} and set(verdict.kept) == {"calc.py"}
    verdict = grade(task(), {}, native)
    assert verdict.outcome == "unresolved" and F2P in verdict.why and verdict.passed == (P2P,)


def test_similarity_tells_near_from_far(native):
    near = grade(task(), changed("calc.py", FILES["calc.py"].replace(b"a - b", b"b - a")), native)
    far = grade(task(), changed("calc.py", b"from os import path\n\nWIDTH = 80\n" * 9), native)
    assert near.outcome == far.outcome == "unresolved" and near.similarity > 0.5 > far.similarity


LINES = f"PASSED {F2P}\\nPASSED {P2P}\\n"
FORGED_LINES = f"print('{LINES}')"
OUTCOMES = """
import pytest
@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    result = yield
    result.get_result().outcome = "passed"
"""
XFAIL = """
import pytest
def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.xfail(run=False))
"""


def shout(text: str, then: str) -> str:
    """Code that writes past pytest's capture, to whatever descriptor the log is, and then does something."""
    return f"""
import os, signal
def shout():
    for fd in range(1, 30):
        try:
            os.write(fd, b'{text}')
        except OSError:
            pass
    {then}
"""


def inside(code: str, call: str = "\nshout()\n") -> dict[str, FileChange]:
    """The module with code at its end."""
    return changed("calc.py", FILES["calc.py"] + code.encode() + call.encode())


CLOSE = f"{END}\\n>>>>> Test Exit Code: 0\\n"
FORGERIES = {
    "printed lines in conftest.py": changed("conftest.py", f"import os\n{FORGED_LINES}\nos._exit(0)\n".encode()),
    "outcomes rewritten in conftest.py": changed("conftest.py", OUTCOMES.encode()),
    "xfail without a run in conftest.py": changed("tests/conftest.py", XFAIL.encode()),
    "printed lines at import": inside(shout(LINES, "os._exit(0)")),
    "printed lines at the call": changed(
        "calc.py", FILES["calc.py"].replace(b"    return a - b", b"    shout()") + shout(LINES, "os._exit(0)").encode()
    ),
    "outcomes rewritten from the code": inside(
        """
from _pytest.reports import TestReport
old = TestReport.from_item_and_call.__func__
def new(cls, item, call):
    call.excinfo = None
    return old(cls, item, call)
TestReport.from_item_and_call = classmethod(new)
""",
        "",
    ),
    "xfail from the code": inside(
        "\nimport pytest\nfrom _pytest import python\npython.Function.runtest = lambda self: pytest.xfail('no')\n", ""
    ),
    "an end marker before the results": inside(shout(LINES + CLOSE, "pass")),
    "the script's shell killed": inside(shout(LINES + CLOSE, "os.kill(os.getppid(), 9); os._exit(0)")),
    "tests edited": changed("tests/test_calc.py", b"def test_add(): pass\ndef test_double(): pass\n"),
    "a module in the place of pytest": changed("pytest.py", f"{FORGED_LINES}\n".encode()),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_no_forgery_is_resolved(native, forgery):
    verdict = grade(task(), FORGERIES[forgery], native)
    assert verdict.outcome in ("invalid", "unresolved"), verdict
    if "conftest" in forgery:
        assert verdict.outcome == "unresolved" and verdict.dropped  # it had no effect at all
    elif forgery != "tests edited" and "module" not in forgery:
        assert verdict.outcome == "invalid", verdict


@pytest.mark.parametrize(
    "forgery", ["printed lines at import", "outcomes rewritten from the code", "xfail from the code"]
)
def test_the_control_is_what_finds_these(native, forgery, monkeypatch):
    monkeypatch.setattr(log_grading, "control_files", lambda files, tests: {})
    monkeypatch.setattr(log_grading, "test_files", lambda task, backend: {"x": b"xfail"})
    assert grade(task(), FORGERIES[forgery], native).outcome == "resolved"  # as SWE-bench's own rule has it


def test_runner_configuration_that_gold_touches_is_kept(native):
    both = (
        GOLD
        + "diff --git a/conftest.py b/conftest.py\nnew file mode 100644\n--- /dev/null\n+++ b/conftest.py\n@@ -0,0 +1 @@\n+X = 1\n"
    )
    verdict = grade(task(patch=both), {**RIGHT, **changed("conftest.py", b"X = 1\n")}, native)
    assert verdict.outcome == "resolved" and "conftest.py" in verdict.kept and not verdict.dropped


def test_a_file_at_a_path_of_the_test_patch_is_dropped(native):
    new = TESTS.replace("test_calc", "test_new").replace("--- a/tests/test_new.py", "--- /dev/null")
    new = "diff --git a/tests/test_new.py b/tests/test_new.py\nnew file mode 100644\n--- /dev/null\n+++ b/tests/test_new.py\n@@ -0,0 +1,4 @@\n+from calc import add\n+\n+def test_add():\n+    assert add(2, 3) == 5\n"
    ids = {"FAIL_TO_PASS": ["tests/test_new.py::test_add"], "PASS_TO_PASS": []}
    script = swe_bench.script_of(new, f"{PYTEST} tests/test_new.py")
    made = task(test_patch=new, eval_script=script, **ids)
    mine = changed("tests/test_new.py", b"def test_add(): pass\n")
    verdict = grade(made, mine, native)
    assert verdict.outcome == "unresolved" and verdict.dropped == ("tests/test_new.py",)
    assert grade(made, {**mine, **RIGHT}, native).outcome == "resolved"


def test_tests_that_hang_are_a_timeout(native):
    hang = changed("calc.py", b"import time\ntime.sleep(600)\n")
    made = task()
    verdict = grade(replace(made, grader=replace(made.grader, seconds=1.0)), hang, native)
    assert verdict.outcome == "timeout"


def test_changes_are_applied_whole(native):
    mine = {
        **RIGHT,
        **changed("notes.txt", None),
        **changed("run.sh", b"#!/bin/sh\n", 0o755),
        **changed("a b/ü.txt", b"\xff\x00"),
    }
    script = f": '{START}'\n[ ! -e notes.txt ] && [ -x run.sh ] && [ -f 'a b/ü.txt' ] && python3 -c 'import calc; assert calc.add(1, 1) == 2' && echo PASSED all\n: '{END}'\n"
    made = task(eval_script="set -x\n" + script, FAIL_TO_PASS=["all"], PASS_TO_PASS=[])
    assert grade(made, mine, native).outcome == "resolved"
    assert grade(made, {p: c for p, c in mine.items() if p != "notes.txt"}, native).outcome == "unresolved"


def test_an_episode_ends_with_the_verdict(native):
    env = SWEEnv(tasks=[task()], backend=native, reward="binary")
    try:
        prompt, _ = env.reset(seed=0)
        assert prompt == "add subtracts"
        env.step(
            "<tool: bash>\nsed -i 's/a - b/a + b/' calc.py; printf 'import os; os._exit(0)' > conftest.py\n</tool>"
        )
        _, reward, terminated, _, info = env.step("<tool: submit>\n</tool>")
        assert (reward, terminated, info["outcome"], info["dropped"]) == (1.0, True, "resolved", ["conftest.py"])
    finally:
        env.close()


def test_a_task_whose_log_could_not_be_read_is_one_line(native):
    made = task()
    with pytest.raises(ValueError, match="its parser 'none' is none of pytest, "):
        grade(replace(made, grader=replace(made.grader, parser="none")), {}, native)


# ---- patches ----


def test_changes_become_a_patch_that_makes_the_same_changes(native):
    mine = {
        **changed("calc.py", b"x = 1"),
        **changed("tests/test_calc.py", None),
        **changed("new dir/n\u00e4\x83me.py", b"a\r\nb\n"),
        **changed("run.sh", b"#!/bin/sh\n", 0o755),
        **changed("notes.txt", b"no newline at the end", 0o755),
        **changed("blob.bin", bytes(range(256))),
        **changed("latin.txt", b"caf\xe9\n"),
        **changed("empty.py", b""),
        **changed(".gitattributes", b"*.py -diff\n*.bin text\n"),
    }
    patch = patches.patch_of(task(), mine, native)
    assert "GIT binary patch" in patch and "new mode 100755" in patch and "\\ No newline" in patch
    assert patches.patch_changes(task(), patch, native).changes == dict(sorted(mine.items()))
    assert set(patches.paths(patch)) == set(mine)
    assert patches.patch_of(task(), {}, native) == ""


NO_PATCH = {
    "empty": (" \n", "empty"),
    "words": ("please change add\n", "names no file"),
    "context that is not there": (GOLD.replace("return a - b", "return a * b"), "does not apply"),
    "cut": (GOLD[:-40], "does not apply"),
    "a binary patch of garbage": ("diff --git a/x.bin b/x.bin\nnew file mode 100644\nGIT binary patch\nliteral 10\nzzz\n\n", "does not apply"),
    "10 MB": (GOLD + "+" * (10 << 20), "bytes; at most"),
    "out of the repository": (GOLD.replace("calc.py", "../calc.py"), "outside"),
    "into .git": (GOLD.replace("calc.py", ".git/config"), "outside"),
    "surrogates": (GOLD + "\ud800", "no text"),
    "a NUL": (GOLD.replace("a + b", "a \0 b"), ""),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_PATCH)
def test_a_patch_that_can_not_be_applied_is_unresolved(native, case):
    patch, why = NO_PATCH[case]
    verdict = log_grading.grade_patch(task(), patch, native)
    assert verdict.outcome == "unresolved" and why in verdict.why


def test_a_patch_is_applied_with_fuzz_where_git_refuses(native):
    patch = GOLD.replace('     """Sum."""', '     """Total."""')
    assert "Total" in patch
    assert patches.patch_changes(task(), patch, native).changes == RIGHT


def test_sections_read_headers_only():
    patch = (
        'diff --git "a/n\\303\\244 me.py" "b/n\\303\\244 me.py"\n--- "a/n\\303\\244 me.py"\n+++ "b/n\\303\\244 me.py"\n'
        "@@ -1,2 +1,2 @@\n--- a/not.py\n+++ b/not.py\n x\n"
        "diff --git a/old name.py b/new name.py\nsimilarity index 100%\nrename from old name.py\nrename to new name.py\n"
        "diff --git a/gone.py b/gone.py\ndeleted file mode 100644\n--- a/gone.py\n+++ /dev/null\n@@ -1 +0,0 @@\n-x\n"
        "diff --git a/mode.sh b/mode.sh\nold mode 100644\nnew mode 100755\n"
        "--- a/plain.py\t2020-01-01\n+++ b/plain.py\t2020-01-02\n@@ -0,0 +1 @@\n+x\n"
    )
    found = [(s.old, s.new) for s in patches.sections(patch)]
    assert found == [
        ("nä me.py", "nä me.py"),
        ("old name.py", "new name.py"),
        ("gone.py", None),
        ("mode.sh", "mode.sh"),
        ("plain.py", "plain.py"),
    ]
    assert patches.sections(patch)[0].lines == ["--- a/not.py", "+++ b/not.py", " x"]


# ---- rows ----


def test_classic_rows_get_a_script_of_ours():
    names = ("instance_id", "base_commit", "patch", "test_patch", "problem_statement", "FAIL_TO_PASS", "PASS_TO_PASS")
    classic = {name: row()[name] for name in names} | {"repo": "django/django", "version": "3.2", "image": None}
    made = swe_bench.task_of(classic, "row 1")
    script = made.blob(made.grader.script, "script").decode()
    assert "--parallel 1 test_calc\n" in script and made.grader.parser == "django" and made.base == ""
    assert script.index("git apply") < script.index(START) < script.index(END)
    assert made.grader.protected == ("tests/test_calc.py", "tests/runtests.py") and made.grader.fail_to_pass == (F2P,)
    assert [swe_bench.python_of("django/django", v) for v in ("1.11", "3.2", "4.0", "4.2", "5.0")] == [
        "3.5",
        "3.6",
        "3.8",
        "3.9",
        "3.11",
    ]


REFUSED = {
    "no column": ({"patch": None}, "no column patch"),
    "ids that are no JSON": ({"FAIL_TO_PASS": "[oops"}, "FAIL_TO_PASS: bad JSON"),
    "ids that are no list": ({"PASS_TO_PASS": '{"a": 1}'}, "PASS_TO_PASS: .* no list of test ids"),
    "no fail-to-pass": ({"FAIL_TO_PASS": []}, "no fail-to-pass test"),
    "unknown parser": ({"log_parser": "parse_log_jest"}, "unknown log parser 'parse_log_jest'"),
    "fail only": ({"eval_type": "fail_only"}, "only pass_and_fail"),
    "a patch that leaves the repository": ({"patch": GOLD.replace("calc.py", "../calc.py")}, "outside the repository"),
    "no markers": ({"eval_script": "pytest"}, "prints no markers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_broken_row_is_refused_with_its_place(case):
    change, why = REFUSED[case]
    with pytest.raises(ValueError, match=f"^row 7.*{why}"):
        swe_bench.task_of(row(**change), "row 7")


def test_a_batch_goes_on_past_broken_rows(tmp_path):
    rows = [row(), row(instance_id="b", log_parser="nope"), row(), row(instance_id="c")]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([json.dumps(rows[0]), "{broken", "[]", "", *map(json.dumps, rows[1:])]))
    said: list[str] = []
    found = load_rows(path, report=said.append)
    assert [r.id for r in found if not isinstance(r, Refused)] == ["me__calc-1", "c"]
    refused = {r.row: r.why for r in found if isinstance(r, Refused)}
    assert refused.keys() == {2, 3, 4, 5} and "bad JSON" in refused[2] and "a list, not a row" in refused[3]
    assert "unknown log parser 'nope'" in refused[4] and "row 4 (b)" in refused[4] and "occurs twice" in refused[5]
    assert "2 tasks, 4 rows refused" in said[0]


def test_rows_from_every_kind_of_file(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [row(), row(instance_id="b")]
    (tmp_path / "a.json").write_text(json.dumps({r["instance_id"]: r for r in rows}))
    (tmp_path / "b.json").write_text(json.dumps(rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    for name in ("a.json", "b.json", "c.parquet"):
        assert load_rows(tmp_path / name, report=lambda _: None) == [swe_bench.task_of(r, "") for r in rows]


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("x.json", "{", "bad JSON"),
        ("x.parquet", "no", "not a readable parquet file"),
        ("x.csv", "a,b", "neither a .json, .jsonl or .parquet file nor a hub id"),
        ("missing.jsonl", None, "No such file"),
    ],
)
def test_a_file_that_can_not_be_read_is_one_line(tmp_path, name, text, why):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=why) as caught:
        load_rows(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("module", "source"), [("pyarrow", "x.parquet"), ("datasets", "owner/name:test")])
def test_what_is_not_installed_is_named_with_its_remedy(monkeypatch, module, source):
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"needs {module}; pip install {module}"):
        load_rows(source, report=lambda _: None)


def test_runner_scripts_are_not_an_attempts_to_change():
    names = ("instance_id", "base_commit", "test_patch", "problem_statement", "FAIL_TO_PASS", "PASS_TO_PASS")
    classic = {name: row()[name] for name in names} | {"repo": "sympy/sympy", "version": "1.12", "patch": GOLD}
    mine = {**changed("bin/test", b"print('test_add ok')"), **RIGHT}
    kept, dropped = filtered(swe_bench.task_of(classic, "row"), mine)
    assert set(kept) == {"calc.py"} and dropped == ["bin/test"]
    classic["patch"] = GOLD.replace("calc.py", "bin/test")
    assert not filtered(swe_bench.task_of(classic, "row"), mine)[1]


# ---- predictions ----


def test_predictions_are_written_and_read(tmp_path, native):
    mine = swe_bench.prediction(task(), RIGHT, native, model="m")
    other = swe_bench.Prediction(instance_id="other", model_patch="", model_name_or_path="m")
    for name in ("p.json", "p.jsonl"):
        swe_bench.save_predictions(tmp_path / name, [mine, other])
        assert swe_bench.read_predictions(tmp_path / name) == [mine, other]
    assert log_grading.grade_patch(task(), mine.model_patch, native).outcome == "resolved"
    (tmp_path / "q.json").write_text(json.dumps({"x": {"instance_id": "x", "model_patch": None}}))
    assert swe_bench.read_predictions(tmp_path / "q.json")[0].model_patch == ""


def test_predictions_that_can_not_be_meant(tmp_path):
    one = swe_bench.Prediction(instance_id="a", model_patch="")
    with pytest.raises(ValueError, match="two predictions for a"):
        swe_bench.save_predictions(tmp_path / "p.jsonl", [one, one])
    with pytest.raises(ValueError, match=r"\.json or \.jsonl"):
        swe_bench.save_predictions(tmp_path / "p.csv", [one])
    (tmp_path / "p.jsonl").write_text('{"instance_id": "a", "model_patch": "x"}\n{"model_patch": 3}\n')
    with pytest.raises(ValueError, match="row 2: no instance_id"):
        swe_bench.read_predictions(tmp_path / "p.jsonl")
