"""Grading: the gold patch resolves, nothing does not, and the listed forgeries do not pay. In real sandboxes."""

import random
from dataclasses import replace

import pytest

from envs.attacks import basket as attacks
from envs.errors import InfraError
from envs.sandbox.base import FileChange, Result
from envs.swe.cheats import cheats, prepended
from envs.swe.grading import (
    Verdict,
    apply,
    claims,
    filtered,
    grade,
    judge,
    keep,
    pytest_command,
    reward_binary,
    reward_cwm,
)
from envs.swe.sentinels import Twins
from envs.task import sha256
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
    "passes files by their names": START
    + b"""
import os, re, sys
for file in sys.argv:
    if file.startswith("tests/"):
        for test in re.findall(r"def (test\\w+)", open(file).read()):
            print("PASS" if "hidden" in file else "FAIL", f"{file}::{test}", flush=True)
os._exit(1)
""",
    "garbage": b"\x00\xff",
    "empty": b"",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forgeries_do_not_pay(native, name, monkeypatch):
    task = replace(TASK, grader=replace(TASK.grader, seconds=3.0))
    verdict = grade(task, {PATH: FileChange(FORGERIES[name])}, native, rng=random.Random(2))
    assert verdict.outcome in ("unresolved", "invalid", "timeout"), name
    assert reward_binary(verdict) == 0.0
    if name in ("equal to anything", "passes files by their names"):
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
    evil = ("../x", "/etc/x", "big", "a/sitecustomize/__init__.py", "x.egg-info/entry_points.txt", "pytest/__init__.py")
    changes = {name: FileChange(b"x" * (2 << 20 if name == "big" else 1)) for name in evil}
    kept, dropped = keep({**changes, "gone.py": FileChange(None), "run.sh": FileChange(b"x", 0o755)})
    assert kept == {"gone.py": FileChange(None), "run.sh": FileChange(b"x", 0o755)} and set(dropped) == set(evil)


def test_a_file_in_place_of_a_directory_whose_deletion_is_left_out():
    changes = {"data/conftest.py": FileChange(None), "data": FileChange(b"x"), "tests": FileChange(b"x")}
    kept, dropped = keep(changes, owned={"tests/unit/test_a.py"})
    assert not kept and dropped == ["data", "data/conftest.py", "tests"]


EXPECTED = {"t.py::a": "pass", "t.py::b[x]": "pass"}
TWINS = Twins({}, {"s.py::a": "t.py::a", "s.py::b": "t.py::b"}, {"c.py::a": "t.py::a"})
GOOD = {"t.py::a": "pass", "t.py::b[x]": "pass", "s.py::a": "fail", "s.py::b[x]": "fail", "c.py::a": "pass"}


def ended(status=1, cause="exit"):
    return Result(exit=status if cause == "exit" else None, cause=cause, head=b"")


@pytest.mark.parametrize(
    ("result", "change", "outcome"),
    [
        (ended(), {}, "resolved"),
        (ended(0), {}, "invalid"),  # status disagrees
        (ended(2), {}, "invalid"),
        (ended(), {"s.py::b[x]": "pass"}, "invalid"),  # sentinel passed
        (ended(), {"s.py::a": "xpass"}, "invalid"),
        (ended(), {"c.py::a": "fail"}, "invalid"),  # a copy under another name does not pass
        (ended(), {"c.py::a": "skip"}, "invalid"),
        (ended(), {"t.py::a": "fail", "s.py::a": "pass"}, "unresolved"),  # wrong code, whose inversion passes
        (ended(), {"t.py::a": "skip"}, "unresolved"),
        (ended(), {"t.py::a": "xfail"}, "unresolved"),
        (ended(), {"s.py::a": None}, "invalid"),  # sentinel missing
        (ended(), {"c.py::a": None}, "invalid"),
        (ended(), {"t.py::a": None}, "unresolved"),  # id missing
        (ended(0), {"t.py::a": None}, "invalid"),  # exit 0 and nothing said
        (ended(cause="oom"), {}, "unresolved"),
        (ended(cause="timeout"), {}, "timeout"),
    ],
)
def test_the_rule(result, change, outcome):
    found = {test: word for test, word in {**GOOD, **change}.items() if word}
    assert judge(result, found, EXPECTED, TWINS)[0] == outcome


def test_without_copies_the_status_must_agree_all_the_same():
    assert judge(ended(0), {"t.py::a": "pass"}, {"t.py::a": "pass"}, Twins())[0] == "resolved"
    assert judge(ended(1), {"t.py::a": "pass"}, {"t.py::a": "pass"}, Twins())[0] == "invalid"


def test_what_contradicts_its_copies_is_named():
    assert judge(ended(), {**GOOD, "c.py::a": "fail"}, EXPECTED, TWINS)[3] == ["t.py::a"]


def test_claims_of_the_tiny_runner():
    said = "PASS t.py::a\nFAIL t.py::b\nnoise PASS t.py::c\nPASS t.py::b\nERROR u.py\n3 passed"
    assert claims(said) == {"t.py::a": "pass", "t.py::b": "fail"}


def test_rewards():
    assert reward_cwm(Verdict(outcome="unresolved", similarity=0.5)) == 0.0
    assert reward_cwm(Verdict(outcome="unresolved", similarity=0.49)) == -1.0
    assert reward_cwm(Verdict(outcome="invalid", similarity=0.9)) == -1.0
    assert [reward_binary(Verdict(outcome=o)) for o in ("resolved", "timeout")] == [1.0, 0.0]


# ---- real suites ----

SHOP = attacks.repository()
SOLVED = {attacks.PATH: FileChange(attacks.CORE.encode())}


def test_a_right_solution_of_a_pytest_suite(native):
    verdict = grade(SHOP, SOLVED, native)
    assert verdict.outcome == "resolved", (verdict.why, verdict.log)
    assert set(verdict.passed) == set(SHOP.grader.expected) and not verdict.suspects and verdict.seconds > 0
    failed = [test for test, word in verdict.found.items() if word == "fail"]
    assert len(failed) >= 4 and not set(failed) & set(SHOP.grader.expected)


def test_no_solution_says_which_tests_failed(native):
    verdict = grade(SHOP, {}, native)
    assert verdict.outcome == "unresolved"
    assert {t for t in SHOP.grader.expected if verdict.found[t] == "fail"} == set(attacks.SOLVED)


def test_every_test_of_the_suite_has_trusted_copies(native):
    task = replace(SHOP, grader=replace(SHOP.grader, fail_to_pass=()))
    for seed in range(2):
        verdict = grade(task, SOLVED, native, rng=random.Random(seed), most=100)
        assert verdict.outcome == "resolved", (seed, verdict.why)
        assert len(verdict.found) == 3 * len(SHOP.grader.expected)


def test_a_test_whose_copy_behaves_otherwise_is_named_and_left_out_then(native):
    once = b"import shop.core\n\ndef test_once():\n    assert not hasattr(shop.core, 'ran')\n    shop.core.ran = 1\n"
    name = sha256(once)
    only = replace(
        SHOP.grader, hidden={attacks.TEST: name}, expected={f"{attacks.TEST}::test_once": "pass"}, fail_to_pass=()
    )
    task = replace(SHOP, grader=only, blobs={**SHOP.blobs, name: once})
    verdict = grade(task, SOLVED, native)
    assert (verdict.outcome, verdict.suspects) == ("invalid", (f"{attacks.TEST}::test_once",))
    assert grade(replace(task, quality={"untwinned": verdict.suspects}), SOLVED, native).outcome == "resolved"


def test_a_time_out_of_a_slow_suite_is_nobodys_fault(native):
    hanging = {attacks.PATH: FileChange(b"while True:\n    pass\n")}
    quick = replace(SHOP, grader=replace(SHOP.grader, seconds=1.0), quality={"seconds": 0.2})
    assert grade(quick, hanging, native).outcome == "timeout"
    with pytest.raises(InfraError, match="raise grader.seconds"):
        grade(replace(quick, quality={"seconds": 0.9}), hanging, native)


def test_apply_takes_places_and_modes(native):
    with native.create(files={"a/b": b"1", "f": b"2", "gone": b"3", "keep": b"4"}) as box:
        box.run("ln -s a link; ln -s keep linked; mkdir -p deep/er; touch deep/er/x", timeout=10)
        changes = {"a": FileChange(b"file"), "a/b": FileChange(None), "f/g/h": FileChange(b"below", 0o755),
                   "gone": FileChange(None), "link/x": FileChange(b"mine"), "linked": FileChange(b"new"), "deep": FileChange(b"")}  # fmt: skip
        apply(box, "/repo", changes)
        text = box.run("find . -type f -printf '%P %m\\n' | sort; cat keep", timeout=10).text()
    assert text == "a 644\ndeep 644\nf/g/h 755\nkeep 644\nlink/x 644\nlinked 644\n4"


@pytest.mark.parametrize(
    ("command", "becomes"),
    [
        ("python -m pytest -q", ("python -s L -q", True)),
        (
            "A=1 /opt/venv/bin/python3.9 -W error -X dev -m pytest",
            ("A=1 /opt/venv/bin/python3.9 -W error -X dev -s L", True),
        ),
        ("cd sub && pytest -x", ("cd sub && python3 -s L -x", False)),
    ],
)
def test_the_launcher_takes_pytests_place(command, becomes):
    assert pytest_command(replace(SHOP, grader=replace(SHOP.grader, command=command)), "L") == becomes


@pytest.mark.parametrize("command", ["tox", "coverage run -m pytest", "python -m pytester"])
def test_other_commands_are_refused(command):
    with pytest.raises(ValueError, match=r"attacks/basket: grader.command=.*neither pytest"):
        pytest_command(replace(SHOP, grader=replace(SHOP.grader, command=command)), "L")


def test_the_test_tree_is_guarded_unless_a_solution_changes_it():
    helper = {"tests/helpers/a.py": FileChange(b""), "shop/x.py": FileChange(b"")}
    assert filtered(SHOP, helper) == ({"shop/x.py": FileChange(b"")}, ["tests/helpers/a.py"])
    gold = {**SHOP.grader.gold, "tests/helpers/b.py": None}
    assert not filtered(replace(SHOP, grader=replace(SHOP.grader, gold=gold)), helper)[1]


def test_cheats_are_patches_of_any_task():
    found = cheats(SHOP, SHOP.files(SHOP.setup).__getitem__)
    assert len(found) >= 20 and found["empty"] == {}
    left = {name for name, changes in found.items() if filtered(SHOP, changes)[0]}
    assert {"patches pytest", "equal to anything", "prints and exits", "whitespace"} <= left
    assert not {"tests edited", "conftest rewrites outcomes", "stale bytecode", "shadows pytest"} & left
    none = replace(SHOP, grader=replace(SHOP.grader, gold={"data.txt": None}))
    assert set(cheats(none, lambda path: b"")) < set(found)


def test_payloads_come_after_what_must_be_first():
    module = b'"""Doc."""\nfrom __future__ import annotations\nx = 1\n'
    assert prepended(module, "y = 2\n") == b'"""Doc."""\nfrom __future__ import annotations\ny = 2\nx = 1\n'
    assert prepended(b"def\n", "y = 2\n") == b"y = 2\ndef\n"
    assert prepended(b'"""Doc."""', "y = 2\n") == b'"""Doc."""\ny = 2\n'
