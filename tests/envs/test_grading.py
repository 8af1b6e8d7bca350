"""Grading: the gold patch resolves, nothing does not, and the listed forgeries do not pay. In real sandboxes."""

import random

import pytest

from envs.sandbox.base import FileChange, Result
from envs.swe.grading import claims, grade, judge, keep, patch_similarity, reward_binary, reward_cwm, sentinels
from envs.tiny import repairs

TASK = repairs.task("train", 3)
PATH = TASK.provenance["module"]
START = TASK.files(TASK.setup)[PATH]
GOLD = TASK.files(TASK.grader.gold)[PATH]


def attempt(native, **files):
    return grade(TASK, {k: FileChange(v) for k, v in files.items()}, native, rng=random.Random(1))


def test_gold_resolves_and_pays(native):
    for index in range(5):
        task = repairs.task("train", index)
        gold = {k: FileChange(v) for k, v in task.files(task.grader.gold).items()}
        verdict = grade(task, gold, native)
        assert verdict.outcome == "resolved", verdict.why
        assert set(verdict.passed) == set(task.grader.expected)
        assert (reward_binary(verdict), reward_cwm(verdict)) == (1.0, 1.0)


def test_nothing_does_not(native):
    verdict = attempt(native)
    assert verdict.outcome == "unresolved" and "not as expected" in verdict.why
    assert reward_binary(verdict) == 0.0 and reward_cwm(verdict) == -1.0


def test_gold_under_pytest_resolves_too(native):
    task = repairs.task("train", 3, runner="pytest")
    gold = {k: FileChange(v) for k, v in task.files(task.grader.gold).items()}
    assert grade(task, gold, native).outcome == "resolved"
    assert grade(task, {}, native).outcome == "unresolved"


FORGERIES = {
    "exit 0 at import": START + b"\nimport os\nos._exit(0)\n",
    "exit 1 at import": START + b"\nimport os\nos._exit(1)\n",
    "SystemExit at import": START + b"\nraise SystemExit(0)\n",
    "prints every pass": START + b"\nprint(%s)\n" % repr("\n".join(f"PASS {t}" for t in TASK.grader.expected)).encode(),
    "prints every pass, then exits 1": START
    + b"\nimport os\nprint(%s, flush=True)\nos._exit(1)\n"
    % repr("\n".join(f"PASS {t}" for t in TASK.grader.expected)).encode(),
    "equal to anything": START
    + b"\nclass A(int):\n    __eq__ = lambda s, o: True\n    __hash__ = None\n"
    + b"".join(b"\n%s = lambda *a: A()\n" % n.encode() for n in ("share", "load")),
    "asserts switched off": START + b"\nimport sys\nsys.flags\n__debug__\n",
    "hangs": START + b"\nwhile True:\n    pass\n",
    "patches the runner": START
    + b"\nimport sys\nframe = sys._getframe()\nwhile frame:\n    if 'failed' in frame.f_locals:\n        frame.f_locals['failed'] = 0\n    frame = frame.f_back\n",
    "garbage": b"\x00\xff",
    "empty": b"",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forgeries_do_not_pay(native, name, monkeypatch):
    from dataclasses import replace

    task = replace(TASK, grader=replace(TASK.grader, seconds=3.0))
    verdict = grade(task, {PATH: FileChange(FORGERIES[name])}, native, rng=random.Random(2))
    assert verdict.outcome in ("unresolved", "invalid", "timeout"), name
    assert reward_binary(verdict) == 0.0
    if name == "equal to anything":
        assert verdict.outcome == "invalid"
    if name == "hangs":
        assert verdict.outcome == "timeout"


def test_what_the_filter_drops(native):
    evil = b"import sys\nsys.exit(0)\n"
    names = [
        "runner.py",
        f"tests/test_{PATH}",
        "conftest.py",
        "sub/conftest.py",
        "sitecustomize.py",
        "x.pth",
        "a/__pycache__/b.pyc",
        ".git/hooks/x",
    ]
    verdict = attempt(native, **dict.fromkeys(names, evil), **{PATH: GOLD})
    assert verdict.outcome == "resolved"
    assert sorted(verdict.dropped) == sorted(names)


def test_a_shadowing_module_does_not_help(native):
    for name in ("os.py", "sys.py", "ast.py"):
        assert attempt(native, **{name: b"raise SystemExit(0)\n"}).outcome != "resolved"


def test_keep_refuses_paths_outside_and_huge_patches():
    kept, dropped = keep(
        {
            "../x": FileChange(b""),
            "/etc/x": FileChange(b""),
            "big": FileChange(b"x" * (2 << 20)),
            "gone.py": FileChange(None),
        }
    )
    assert kept == {"gone.py": None} or set(dropped) >= {"../x", "/etc/x", "big"}


def test_sentinels_expect_another_value():
    files, ids = sentinels(
        {"tests/test_a.py": b"X = 1\ndef test_one():\n    assert X == 1\n    assert X == 2\n"}, random.Random(0)
    )
    ((path, source),) = files.items()
    ((twin, original),) = ids.items()
    assert twin.startswith(f"{path}::test_") and original == "tests/test_a.py::test_one"
    assert b"assert X == 2" in source and source.count(b"assert") == 1 and b"test_one" not in source
    files, _ = sentinels({"tests/test_a.py": b"def test_one():\n    assert f(1) is g(2)\n"}, random.Random(0))
    assert b"assert not f(1) is g(2)" in next(iter(files.values()))


EXPECTED = {"t.py::a": "pass", "t.py::b": "pass"}


def said(text, exit_status=1, cause="exit"):
    return Result(exit=exit_status if cause == "exit" else None, cause=cause, head=text.encode())


@pytest.mark.parametrize(
    ("result", "outcome"),
    [
        (said("PASS t.py::a\nPASS t.py::b\nFAIL s.py::x"), "resolved"),
        (said("PASS t.py::a\nPASS t.py::b\nFAIL s.py::x", 0), "invalid"),  # status disagrees
        (said("PASS t.py::a\nPASS t.py::b\nPASS s.py::x"), "invalid"),  # sentinel passed
        (
            said("FAIL t.py::a\nPASS t.py::b\nPASS s.py::x"),
            "unresolved",
        ),  # wrong code fails a test, so its inversion passes
        (said("PASS t.py::a\nPASS t.py::b"), "invalid"),  # sentinel missing
        (said("PASS t.py::a\nFAIL s.py::x"), "unresolved"),  # id missing
        (said("PASS t.py::a\nPASS t.py::b\nFAIL t.py::b\nFAIL s.py::x"), "unresolved"),  # said both ways
        (said("", 0), "invalid"),  # exit 0 and nothing said
        (said("", 2), "unresolved"),
        (said("PASS t.py::a\nPASS t.py::b\nFAIL s.py::x", cause="oom"), "unresolved"),
        (said("PASS t.py::a\nPASS t.py::b\nFAIL s.py::x", cause="timeout"), "timeout"),
    ],
)
def test_the_rule(result, outcome):
    assert judge(result, EXPECTED, {"s.py::x": "t.py::a"})[0] == outcome


def test_claims_reads_pytest_too():
    assert claims("PASSED t.py::a\nFAILED t.py::b - assert 1 == 2\nnoise PASS t.py::c") == {
        "t.py::a": "pass",
        "t.py::b": "fail",
    }


def test_patch_similarity_by_hand():
    assert patch_similarity(TASK, {PATH: GOLD}) == 1.0
    assert patch_similarity(TASK, {}) == 0.0
    near = GOLD.replace(b"def ", b"def  ", 1)
    assert 0.3 < patch_similarity(TASK, {PATH: near}) < 1.0
