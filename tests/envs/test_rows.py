"""Rows validated from files: built, graded, resumed, compared with swebench where it is.

CODEWORLD_SWE_ROWS=verified.parquet CODEWORLD_SWE_REPOS=DIR [CODEWORLD_SWE_IDS=a,b] [CODEWORLD_SWEBENCH=PYTHON] pytest tests/envs/test_rows.py
    # also builds and grades real instances, from clones in DIR; by default two that install on Python 3.11 in a minute
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from envs.errors import SandboxDead
from envs.sandbox.archives import offer
from envs.sandbox.capture import Entry, tree_layer
from envs.sandbox.imagestore import ImageStore
from envs.swe import log_grading, peer, rows, swe_bench
from envs.swe.log_parsers import END, START
from envs.task import sha256
from tests.envs.images import docker_archive, system, tar

GOLD = "--- a/add.sh\n+++ b/add.sh\n@@ -1 +1 @@\n-echo $(($1 - $2))\n+echo $(($1 + $2))\n"
CHECK = "for t in 'two 1 1 2' 'zero 0 0 0'; do set -- $t; [ $(bash add.sh $2 $3) = $4 ] && echo PASSED $1 || { echo FAILED $1; false; }; done\n"
ROW = {
    "instance_id": "me__add-1",
    "repo": "me/add",
    "version": "1",
    "patch": GOLD,
    "problem_statement": "It subtracts.",
    "eval_script": f"set -x\n: '{START}'\nbash check.sh\n: '{END}'\n",
    "log_parser": "parse_log_pytest",
    "FAIL_TO_PASS": ["two"],
    "PASS_TO_PASS": ["zero"],
}
FILES = {"testbed/add.sh": b"echo $(($1 - $2))\n", "testbed/check.sh": CHECK.encode()}


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> str:
    """An image of bash, patch and a repository of two files; it has neither git nor Python."""
    entries = system()
    path = shutil.which("patch")
    assert path, "the tests need patch"
    entries["bin/patch"] = Path(path).read_bytes()
    libraries = subprocess.run(["ldd", path], capture_output=True, text=True).stdout.split()
    entries |= {word.lstrip("/"): Path(word).read_bytes() for word in libraries if word.startswith("/")}
    layers = [tar(entries), tar({"testbed": None, **FILES})]
    return str(docker_archive(tmp_path_factory.mktemp("image") / "image.tar", layers))


def test_rows_are_graded_counted_and_not_graded_again(native, tmp_path, image, monkeypatch):
    bad = {**ROW, "instance_id": "bad", "log_parser": "parse_log_jest"}
    wrong = {**ROW, "instance_id": "wrong", "patch": GOLD.replace("+ $2", "* $2")}
    unfit = {**ROW, "instance_id": "unfit", "patch": GOLD.replace("-echo $(($1 - $2))", "-nothing")}
    lost = {**ROW, "instance_id": "lost", "image": str(tmp_path / "none.tar")}
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"image": image, **row}) + "\n" for row in (ROW, bad, wrong, unfit, lost)))
    said: list[str] = []

    def run():
        found = rows.validate_rows(file, tmp_path, tmp_path / "out", native, python="/bin/false", report=said.append)
        return {record["id"]: record for record in found}

    first = run()
    good = first["me__add-1"]
    assert (
        good["met"]
        and good["outcome"] == good["expected"] == rows.EXPECTED
        and good["seconds"].keys() >= {"build", "gold", "no-op"}
    )
    assert (
        good["peer"].startswith("skipped") and (tmp_path / "out/logs/me__add-1.gold.txt").read_text().count(START) == 1
    )
    assert [first[name]["met"] for name in ("bad", "wrong", "unfit", "lost")] == [False] * 4
    assert (
        "unknown log parser" in first["bad"]["why"] and first["wrong"]["outcome"] == "gold unresolved, no-op unresolved"
    )
    assert "does not apply" in first["unfit"]["why"] and "none.tar" in first["lost"]["why"]
    assert "1 as expected, 1 gold unresolved, no-op unresolved, 3 refused of 5 rows" in said[-1]
    results = tmp_path / "out" / "results.jsonl"
    whole = results.read_bytes()
    monkeypatch.setattr(log_grading, "evaluate", lambda *_: pytest.fail("graded again"))
    assert run() == first and results.read_bytes() == whole
    monkeypatch.undo()
    results.write_bytes(whole[:-20])  # as a kill may leave it
    assert run().keys() == first.keys() and results.read_bytes().count(b"\n") == 5


def test_a_sandbox_that_fails_is_tried_again(native, tmp_path, image, monkeypatch):
    (tmp_path / "rows.json").write_text(json.dumps([{**ROW, "image": image}] * 2))

    def fails(*_):
        raise SandboxDead("gone")

    def run():
        return rows.validate_rows(
            tmp_path / "rows.json", tmp_path, tmp_path / "out", native, python="/bin/false", report=lambda _: None
        )

    monkeypatch.setattr(log_grading, "evaluate", fails)
    assert [(r["id"], r["outcome"], r["met"]) for r in run()] == [
        ("me__add-1", "infra", False),
        ("row 2 me__add-1", "refused", False),
    ]
    monkeypatch.undo()
    assert [(r["id"], r["met"]) for r in run()] == [("me__add-1", True), ("row 2 me__add-1", False)]


def test_swebench_must_really_agree_and_ids_are_directory_names(native, tmp_path, image, monkeypatch):
    outside = {**ROW, "instance_id": "../outside"}
    (tmp_path / "rows.json").write_text(json.dumps([{**row, "image": image} for row in (ROW, outside)]))

    def run(official, word=""):
        monkeypatch.setattr(rows, "_command_line", lambda *_: word)
        return rows.validate_rows(
            tmp_path / "rows.json",
            tmp_path,
            tmp_path / "out",
            native,
            python="/bin/false",
            official=official,
            report=lambda _: None,
        )

    record, refused = run(True, "error: no word")
    assert not record["met"] and "swebench eval: error: no word" in record["why"]
    assert refused["outcome"] == "refused" and "an id names a directory" in refused["why"]
    assert run(False)[0]["met"]  # asked for less: what the other run found does not count


def test_what_can_not_be_built_is_a_line(native, tmp_path):
    classic = {**{k: v for k, v in ROW.items() if k != "eval_script"}, "repo": "pallets/flask", "base_commit": "0" * 40}
    classic["test_patch"] = (
        "diff --git a/t.py b/t.py\nnew file mode 100644\n--- /dev/null\n+++ b/t.py\n@@ -0,0 +1 @@\n+x\n"
    )
    (tmp_path / "rows.json").write_text(json.dumps([classic]))
    (record,) = rows.validate_rows(tmp_path / "rows.json", tmp_path, tmp_path / "out", native, report=lambda _: None)
    assert record["outcome"] == "refused" and f"clone it to {tmp_path / 'pallets__flask'}" in record["why"]
    with pytest.raises(ValueError, match="no row nowhere"):
        rows.validate_rows(
            tmp_path / "rows.json", tmp_path, tmp_path / "out", native, ids=["nowhere"], report=lambda _: None
        )


def test_where_ours_and_theirs_differ():
    official = {"a": "resolved", "b": "unresolved", "c": "error: x", "d": "resolved"}
    ours = {"a": "resolved", "b": "timeout", "c": "unresolved", "d": "invalid"}
    assert peer.disagreements(official, ours) == ["d"]


def test_the_same_grader_on_the_same_logs():
    if not importlib.util.find_spec("swebench"):
        pytest.skip("swebench is not installed (pip install 'swebench==5.0.2')")
    task = swe_bench.task_of(ROW, "row 1")
    logs = {
        code: (f"{START}\nPASSED two\n{word} zero\n{END}\n>>>>> Test Exit Code: {code}\n", ours)
        for code, word, ours in ((0, "PASSED", True), (1, "FAILED", False))
    }
    assert peer.regrade(task, logs, sys.executable) == "same"
    assert peer.regrade(task, {**logs, 0: (logs[0][0], False)}, sys.executable) == "differs"


@pytest.mark.docker
def test_docker_grades_the_same():
    from envs.sandbox.docker import DockerBackend

    backend = DockerBackend()
    try:
        made = {path.partition("/")[2]: data for path, data in FILES.items()}
        task = swe_bench.task_of({**ROW, "image": "codeworld-base"}, "row 1")
        blobs = {**task.blobs, **{sha256(data): data for data in made.values()}}
        task = replace(task, setup={path: sha256(data) for path, data in made.items()}, blobs=blobs)
        assert log_grading.grade_patch(task, GOLD, backend).outcome == "resolved"
        assert log_grading.grade_patch(task, peer.NOTHING, backend).outcome == "unresolved"
    finally:
        backend.close()


@pytest.mark.docker
@pytest.mark.slow
def test_the_command_line_of_swebench_agrees(native, tmp_path):
    if not importlib.util.find_spec("swebench"):
        pytest.skip("swebench is not installed (pip install 'swebench==5.0.2')")
    import docker

    store = ImageStore(tmp_path / "images")
    offer(store.directory)
    layer = tree_layer({path.partition("/")[2]: Entry(data) for path, data in FILES.items()}, "/testbed")
    digest = store.extend(store.add_base("codeworld-base"), [layer], workdir="/testbed")
    task = swe_bench.task_of({**ROW, "image": digest}, "row 1")
    for patch, word in ((GOLD, "resolved"), (peer.NOTHING, "unresolved")):
        made = swe_bench.Prediction(instance_id=task.id, model_patch=patch)
        theirs = peer.official_eval([task], [made], directory=tmp_path / word)
        ours = {task.id: log_grading.grade_patch(task, patch, native).outcome}
        assert theirs == ours == {task.id: word} and not peer.disagreements(theirs, ours)
    with pytest.raises(docker.errors.ImageNotFound):
        docker.from_env().images.get(digest)  # it was brought in for the run alone


def test_real_instances(native, tmp_path):
    file, clones = os.environ.get("CODEWORLD_SWE_ROWS"), os.environ.get("CODEWORLD_SWE_REPOS")
    if not file or not clones:
        pytest.skip("CODEWORLD_SWE_ROWS and CODEWORLD_SWE_REPOS name no rows and clones of SWE-bench")
    ids = os.environ.get("CODEWORLD_SWE_IDS", "sympy__sympy-24661,pallets__flask-5014").split(",")
    found = rows.validate_rows(file, clones, tmp_path, native, ids=ids, python=os.environ.get("CODEWORLD_SWEBENCH", ""))
    assert [record["id"] for record in found if not record["met"]] == []
    assert all(record["peer"] == "same" or record["peer"].startswith("skipped") for record in found)
