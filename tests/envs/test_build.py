"""From a repository to a task set that is proved: built, killed, gone on with, graded. Without network."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from envs.__main__ import main
from envs.sandbox import make_backend
from envs.sandbox.base import FileChange
from envs.sandbox.helper import cache_dir
from envs.swe import assemble
from envs.swe.assemble import chosen
from envs.swe.build import Plan, _Builder, build, parse_plan, parse_sources
from envs.swe.grading import grade
from envs.swe.ledger import Ledger
from envs.swe.validate import count, gold_changes, validate, validate_set
from envs.task import load_tasks, save_tasks
from tests.envs.gitrepo import commit, git
from tests.envs.wheelhouse import TESTING, rewheel

pytestmark = pytest.mark.docker  # the base is the engine's
ROOT = Path(__file__).parents[2]
SHOP = b'''"""Prices."""


def total(prices, discount=0):
    """The sum of prices, less a discount in percent, never below zero."""
    full = sum(prices)
    rest = full - full * discount / 100
    if rest < 0:
        return 0
    return rest


def cheapest(prices):
    best = None
    for price in prices:
        if best is None or price < best:
            best = price
    return best
'''
TESTS = b"""import shop


def test_total():
    assert shop.total([1, 2]) == 3


def test_discount():
    assert shop.total([100, 100], discount=10) == 180


def test_cheapest():
    assert shop.cheapest([3, 1, 2]) == 1


def test_nothing():
    assert shop.cheapest([]) is None
"""
LATER = TESTS + b"\n\ndef test_all_of_it():\n    assert shop.total([5], discount=150) == 0\n"


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """Wheels of pytest, and nothing else to be had."""
    pytest.importorskip("pip", reason="pip fetches the wheels")
    wheels = tmp_path_factory.mktemp("wheels")
    for name in TESTING:
        rewheel(name, wheels)
    settings = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_INDEX_URL": "http://127.0.0.1:9/simple"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A repository whose last commit repairs `total` and adds the test that shows it."""
    path = tmp_path_factory.mktemp("shop")
    broken = SHOP.replace(b"    if rest < 0:\n        return 0\n", b"")
    commit(path, {"shop.py": broken, "test_shop.py": TESTS, "README": b"a shop\n"})
    for name, data in {"shop.py": SHOP, "test_shop.py": LATER}.items():
        (path / name).write_bytes(data)
    git(path, "commit", "-qam", "Discounts above 100 percent gave negative totals\n\nSigned-off-by: t <t@t>")
    return path


@pytest.fixture(scope="module")
def built(offline, shop, tmp_path_factory):
    """The set of two mutants, by the command."""
    out = tmp_path_factory.mktemp("built")
    assert main(["build", "--from", str(shop), "--tasks", "mutate:2", "--out", str(out), "--json", str(out / "j")]) == 0
    return out


def test_every_task_is_proved(built):
    tasks = load_tasks(built)
    assert len(tasks) == 2
    for task in tasks:
        quality = task.quality
        assert (quality["valid"], quality["gold"], quality["no_op"]) == (True, 3, 3)
        assert quality["alone"] == len(task.grader.fail_to_pass) >= 1
        assert len(quality["cheats"]) >= 10 and "resolved" not in quality["cheats"].values()
        assert set(task.grader.fail_to_pass) < set(task.grader.expected)
    report = json.loads((built / "j").read_text())
    assert report["ok"] and sum(row["met"] for row in report["tasks"]) == 2
    assert {row["outcome"] for row in report["tasks"]} <= {"task", "unnoticed", "broad", "silent", "leak", "hangs"}


@pytest.mark.parametrize("name", ["native", "docker"])
def test_the_set_can_be_played_anywhere_it_is_carried_to(built, name, tmp_path):
    moved = tmp_path / "elsewhere"
    subprocess.run(["cp", "-r", built, moved], check=True)
    task = load_tasks(moved)[0]
    backend = make_backend(name)
    try:
        assert grade(task, gold_changes(task, backend), backend).outcome == "resolved"
        verdict = grade(task, {"README": FileChange(b"changed\n")}, backend)
        assert verdict.outcome == "unresolved"
    finally:
        backend.close()


def test_the_agent_sees_the_bug_and_neither_tests_nor_repair(built, native):
    for task in load_tasks(built):
        gold = task.files(task.grader.gold)["shop.py"]
        with native.create(base=task.base, workdir=task.workdir) as box:
            now = box.read("shop.py")
            assert now != gold == SHOP
            lost = [line for line in gold.splitlines() if line.strip() and line not in now.splitlines()]
            for line in lost:
                assert line.decode().strip() not in task.prompt
            for test in task.grader.fail_to_pass:
                name = test.rpartition("::")[2]
                assert b"test_cheapest" in box.read("test_shop.py") or b"test_total" in box.read("test_shop.py")
                assert name.encode() not in box.read("test_shop.py")
                assert box.run(f"grep -rl {name} /testbed /opt /tmp /root /home 2>/dev/null", timeout=60).text() == ""
            assert box.run("git status --porcelain; git log --format=%s | wc -l", timeout=60).text() == "1\n"
            assert box.run("python -m pytest -q 2>&1 | tail -1", timeout=60).text().count("failed") == 0


def test_a_second_run_decides_nothing_again(built, shop):
    tasks, ledger = (built / "tasks.jsonl").read_bytes(), (built / "ledger.jsonl").read_bytes()
    began = time.monotonic()
    assert main(["build", "--from", str(shop), "--tasks", "mutate:2", "--out", str(built)]) == 0
    after = (built / "ledger.jsonl").read_bytes()
    assert (built / "tasks.jsonl").read_bytes() == tasks and after.startswith(ledger)
    # Candidates that the first run had not begun when its tasks were there may be decided now, but none twice.
    decided = [json.loads(row)["candidate"] for row in after.splitlines()]
    assert len(decided) == len(set(decided))
    assert time.monotonic() - began < 60


def test_a_task_is_in_the_set_as_soon_as_it_is_proved(built, shop, tmp_path, native, monkeypatch):
    subprocess.run(["cp", "-r", f"{built}/.", tmp_path], check=True)
    whole = load_tasks(built)
    (tmp_path / "tasks.jsonl").unlink()
    fates = _Builder._fates

    def killed(self, name, repository):
        for fate in fates(self, name, repository):
            yield fate
            if fate.task:
                raise KeyboardInterrupt

    monkeypatch.setattr(_Builder, "_fates", killed)
    plan = Plan(maker="mutate", count=2)
    with pytest.raises(KeyboardInterrupt):
        build([str(shop)], plan, tmp_path, native, cache=cache_dir() / "sources")
    assert load_tasks(tmp_path) == whole[:1]
    with pytest.raises(KeyboardInterrupt):  # nor does a set lose what it had when it is built again
        save_tasks(whole, tmp_path)
        build([str(shop)], plan, tmp_path, native, cache=cache_dir() / "sources")
    assert load_tasks(tmp_path) == whole


def test_a_set_shrinks_and_grows_and_survives_a_source_that_fails(built, shop, native, tmp_path, capsys):
    subprocess.run(["cp", "-r", f"{built}/.", tmp_path], check=True)

    def again(sources, count):
        assert main(["build", "--from", sources, "--tasks", f"mutate:{count}", "--out", str(tmp_path)]) == 0
        return load_tasks(tmp_path)

    assert len(again(str(shop), 1)) == 1
    whole = again(f"./nowhere,{shop}", 2)
    assert whole == load_tasks(built) and "./nowhere: './nowhere': no such directory" in capsys.readouterr().out
    for task in whole:
        with native.create(base=task.base, workdir=task.workdir) as box:
            assert box.read("shop.py") != SHOP
    (shop / ".git").rename(shop / "gone")
    try:
        assert again(f"./nowhere,{shop}", 2) == whole
    finally:
        (shop / "gone").rename(shop / ".git")


@pytest.mark.slow
def test_a_killed_build_goes_on(built, shop, tmp_path):
    command = [
        sys.executable,
        "-m",
        "envs",
        "build",
        "--from",
        str(shop),
        "--tasks",
        "mutate:2",
        "--out",
        str(tmp_path),
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 120
    while not (tmp_path / "ledger.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with (tmp_path / "ledger.jsonl").open("ab") as file:
        file.write(b'{"source": "half a ro')
    assert main(command[3:]) == 0
    assert [task.id for task in load_tasks(tmp_path)] == [task.id for task in load_tasks(built)]
    assert [task.base for task in load_tasks(tmp_path)] == [task.base for task in load_tasks(built)]


@pytest.mark.slow
def test_a_fix_in_history_becomes_a_task(offline, shop, tmp_path, native, capsys):
    assert main(["build", "--from", str(shop), "--tasks", "history:5", "--out", str(tmp_path)]) == 0
    (task,) = load_tasks(tmp_path)
    assert (
        task.prompt.startswith("Discounts above 100 percent gave negative totals") and "Signed-off" not in task.prompt
    )
    assert task.grader.fail_to_pass == ("test_shop.py::test_all_of_it",)
    assert "1 tasks of 1 sources" in capsys.readouterr().out
    with native.create(base=task.base, workdir=task.workdir) as box:
        assert box.read("test_shop.py") == TESTS


def test_validation_finds_what_is_wrong_with_a_task(built, native, tmp_path):
    subprocess.run(["cp", "-r", f"{built}/.", tmp_path], check=True)
    rows = [json.loads(line) for line in (tmp_path / "tasks.jsonl").read_text().splitlines()]
    solved = json.loads(json.dumps(rows[0])) | {"id": "solved"}
    solved["grader"]["fail_to_pass"], solved["grader"]["expected"] = [], {"test_shop.py::test_nothing": "pass"}
    impossible = json.loads(json.dumps(rows[0])) | {"id": "impossible"}
    impossible["grader"]["expected"]["test_shop.py::test_that_is_not_there"] = "pass"
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (rows[0], solved, impossible)))
    findings = validate_set(tmp_path, native, k=1)
    assert [finding.fault for finding in findings] == ["", "no-op", "gold"]
    assert count(findings) == "1 valid; 1 gold, 1 no-op refused"
    assert [task.id for task in load_tasks(tmp_path)] == [rows[0]["id"]]
    assert {row["task"]["id"] for row in Ledger(tmp_path / "quarantine.jsonl").rows()} == {"solved", "impossible"}
    assert [finding.ok for finding in validate_set(tmp_path, native, k=1)] == [True]


def test_a_task_can_be_proved_again_and_what_can_not_be_graded_is_named(built, native):
    task = load_tasks(built)[0]
    first, finding = validate(replace(task, quality={"untwinned": list(task.grader.expected)}), native, k=1)
    assert finding.ok and "untwinned" not in first.quality and validate(first, native, k=1)[1].ok
    odd = replace(task, grader=replace(task.grader, command="make test"))
    assert (validate(odd, native, k=1)[1].fault, validate(replace(task, blobs={}), native, k=1)[1].fault) == (
        "task",
        "task",
    )


def test_a_bug_that_takes_long_to_notice_is_no_task(offline, shop, tmp_path, monkeypatch):
    monkeypatch.setattr("envs.swe.build.MOST_SECONDS", -1.0)
    assert (
        main(
            [
                "build",
                "--from",
                str(shop),
                "--tasks",
                "mutate:1",
                "--out",
                str(tmp_path / "t"),
                "--json",
                str(tmp_path / "j"),
            ]
        )
        == 1
    )
    outcomes = {row["outcome"] for row in json.loads((tmp_path / "j").read_text())["tasks"]}
    assert "slow" in outcomes and "task" not in outcomes


@pytest.mark.slow
def test_slow_tests_are_neither_run_nor_expected_nor_shown(offline, tmp_path, native, monkeypatch, capsys):
    """With the bug the slow test would fail, too: whoever could see it would be told what the statement does not say."""
    monkeypatch.setattr("envs.swe.discovery.SLOW", 1.5)
    slow = b"\n\ndef test_slow():\n    import time\n\n    time.sleep(3)\n    assert shop.total([2, 3]) == 5 and shop.cheapest([2, 3]) == 2\n"
    commit(tmp_path / "shop", {"shop.py": SHOP, "test_shop.py": TESTS + slow})
    command = ["build", "--from", str(tmp_path / "shop"), "--tasks", "mutate:1", "--out", str(tmp_path / "t")]
    assert main(command) == 0 and "1 slow left out" in capsys.readouterr().out
    (task,) = load_tasks(tmp_path / "t")
    assert not [test for test in task.grader.expected if "test_slow" in test]
    with native.create(base=task.base, workdir=task.workdir) as box:
        assert b"test_slow" not in box.read("test_shop.py") and b"def test_" in box.read("test_shop.py")


def test_flaky_tests_of_a_suite_are_written_down_once(tmp_path):
    builder = object.__new__(_Builder)
    builder.out = tmp_path
    for _ in range(2):
        assert builder._quarantine("pypi:a", "sha256:0", ["t.py::a"]) == ", 1 flaky left out"
    assert builder._quarantine("pypi:b", "sha256:0", []) == ""
    assert [row["tests"] for row in Ledger(tmp_path / "quarantine.jsonl").rows()] == [["t.py::a"]]


def test_sources_and_plans_as_they_are_written() -> None:
    assert parse_sources("pypi:a,b-c,./d,pypi:e") == ["pypi:a", "pypi:b-c", "./d", "pypi:e"]
    assert parse_plan("history:7") == ("history", 7)
    for text in ("mutate:0", "mutate:x", "invent:3", ""):
        with pytest.raises(ValueError, match="--tasks"):
            parse_plan(text)
    with pytest.raises(ValueError, match="--from"):
        parse_sources(",")


def test_the_quickest_tests_are_expected_while_they_fit(monkeypatch):
    monkeypatch.setattr(assemble, "SUITE_SECONDS", 0.41)
    failing = ["a.py::slow[1]", "a.py::slow[2]", "d.py::slower", "a.py::slow3"]
    kept = [
        "a.py::long",
        "a.py::quick[x]",
        "a.py::quick[y]",
        "b.py::one",
        "b.py::two",
        "c.py::three",
        "a.py::slow[3]",
        "d.py::x",
    ]
    seconds = {"a.py": 9.0, "a.py::slow": 0.1, "a.py::slow3": 0.2, "d.py": 0.1, "d.py::slower": 0.3, "d.py::x": 0.1,
               "a.py::long": 0.4, "a.py::quick": 0.1, "b.py": 0.1, "b.py::one": 0.05, "b.py::two": 0.2, "c.py": 0.2}  # fmt: skip
    same = ["a.py::quick[x]", "a.py::quick[y]", "b.py::one", "a.py::slow[3]"]
    assert chosen(failing, kept, seconds) == ([failing[0], failing[1], failing[3]], same)
    assert chosen(failing, kept, seconds | {"a.py::slow": 9.0, "a.py::slow3": 8.0})[0] == ["d.py::slower"]
    assert chosen(failing, [], {}) == (failing, [])
