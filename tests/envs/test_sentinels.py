"""Sentinels fail where their originals pass, controls pass; only forms are altered of which that is certain."""

import ast
import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from envs.swe import reporter
from envs.swe.sentinels import base_id, twins

LAUNCH = Path(reporter.__file__)


def run(root, args, *flags, module=True, only=()):
    """Exit status and records of one run of the launcher, not isolated: the tests are ours."""
    key, records = bytes(range(32)), root / "records"
    job = {"key": key.hex(), "records": str(records), "args": args, "only": list(only), "module": module}
    done = subprocess.run(
        [sys.executable, LAUNCH, "-q", "-p", "no:hypothesispytest", "-p", "no:anyio", "--rootdir", root, *flags],
        cwd=root,
        input=json.dumps(job).encode(),
        capture_output=True,
    )
    found = reporter.read(records.read_bytes(), key)
    return done.returncode, found, done.stdout.decode()


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text.encode() if isinstance(text, str) else text)


FORMS = '''import asyncio, unittest
from unittest import mock
import pytest

TABLE = [(1, 1), (2, 2)]
EMPTY = []

def test_loop():
    for a, b in TABLE:
        if a < b:
            continue
        assert a == b

def test_no_loop():
    for a, b in EMPTY:
        assert a == b

def test_left_loop():
    for a in (1, 2):
        break
    assert a == 1

def test_skipping_loop():
    for a in (1, 2):
        if a:
            continue
        assert a == 0

def test_anything():
    assert mock.ANY == 3
from unittest import mock
import os

HERE = os.path.basename(__file__)

@pytest.fixture
def seven():
    yield 7

def helper(x):
    return x

def test_literal(seven):
    assert helper(seven) == 7, "with a message"

def test_left(): assert 7 == helper(7)

def test_text():
    assert helper("a\\nb") == """a
b"""

def test_float():
    assert helper(-0.5) == -0.5

def test_none():
    assert helper(None) == None

def test_name(seven):
    want = 7
    assert helper(seven) == want

def test_same_name(seven):
    assert helper(seven) == seven

def test_negated():
    assert not helper(0)

def test_in_with(tmp_path):
    with open(tmp_path / "x", "w") as f, mock.patch("os.sep", "+"):
        f.write("x")
        assert os.sep in "+-"

def test_raises():
    with pytest.raises(ValueError, match="no"):
        raise ValueError("no")

def test_raises_call():
    pytest.raises(ZeroDivisionError, lambda: 1 / 0)

@pytest.mark.parametrize("a, b", [(1, 2), (3, 4)])
def test_many(a, b):
    for _ in ():
        assert 0
    assert a + 1 == b

def test_early(seven):
    """Says why."""
    if seven:
        return
    assert seven == 0

def test_loop():
    for i in range(2):
        assert i < 2
    # the end

def test_try():
    try:
        assert 0
    except AssertionError:
        pass; x = 1

def test_pass(): pass

class TestGroup:
    kind = 3

    def test_method(self):
        assert self.kind == 3 ; assert self.kind

    class TestInner:
        def test_deep(self):
            assert (helper(1) ==
                    1)

class Case(unittest.TestCase):
    def setUp(self):
        self.x = [1]

    def test_equal(self):
        self.assertEqual(self.x, [1])

    def test_equal_names(self):
        y = list(self.x)
        self.assertEqual(self.x, y, "message")

    def test_true(self):
        self.assertTrue(self.x)

    def test_in(self):
        self.assertIn(1, self.x)

    def test_raises(self):
        with self.assertRaises(IndexError):
            self.x[3]

    def test_unknown(self):
        self.assertCountEqual(self.x, [1])

class Async(unittest.IsolatedAsyncioTestCase):
    async def test_awaits(self):
        await asyncio.sleep(0)
        assert await self.one() == 1

    async def one(self):
        return 1
'''


def collected(tree, prefix):
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield from collected(node, f"{prefix}::{node.name}")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test"):
            yield f"{prefix}::{node.name}"


def test_every_form_fails_and_every_control_passes(tmp_path):
    path = "tests/test_forms.py"
    tests = list(collected(ast.parse(FORMS), path))
    made = twins({path: FORMS.encode()}, tests, random.Random(0), most=100)
    assert set(made.sentinels.values()) == set(tests) - {f"{path}::test_pass"}
    assert set(made.controls.values()) == set(tests)
    write(tmp_path, {path: FORMS, **made.files})
    status, found, text = run(tmp_path, [path, *made.sentinels, *made.controls])
    said = {record["id"]: record["outcome"] for record in found if "id" in record}
    assert status == found[-1]["end"] == 1
    assert {base_id(test) for test in said} == {*tests, *made.sentinels, *made.controls}
    wrong = {test for test, word in said.items() if (word == "fail") != (base_id(test) in made.sentinels)}
    assert not wrong, text


def test_neither_what_follows_nor_a_loop_hides_a_forger(tmp_path):
    source = """class Any:
    def __eq__(self, other): return True
TABLE = [(1, 2)]
def test_a():
    expected = "x"
    assert Any() == expected
    assert Any() == "-" + expected
def test_b():
    for a, b in TABLE:
        assert Any() == b
def test_c():
    for b in (1, 2):
        assert Any() == b
"""
    for seed in range(4):  # whichever assertion is altered
        made = twins({"test_a.py": source.encode()}, [f"test_a.py::test_{x}" for x in "abc"], random.Random(seed))
        write(tmp_path / str(seed), made.files)
        assert run(tmp_path / str(seed), list(made.sentinels))[0] == 0


def test_tests_beside_those_that_must_pass_fill_up_what_is_left():
    a, b = b"def test_a(): assert 1\ndef test_b(): assert 1\ndef test_c(): assert 1\n", b"def test_d(): assert 1\n"
    also = ["t/a.py::test_b", "t/a.py::test_c", "t/b.py::test_d"]
    made = twins({"t/a.py": a, "t/b.py": b}, ["t/a.py::test_a"], random.Random(0), most=2, also=also)
    assert "t/a.py::test_a" in made.sentinels.values() and len(made.sentinels) == len(made.controls) == 2
    whole = twins({"t/a.py": a, "t/b.py": b}, ["t/a.py::test_a"], random.Random(0), also=also)
    assert set(whole.sentinels.values()) == {"t/a.py::test_a", "t/a.py::test_b", "t/a.py::test_c"}


def test_it_is_another_draw_each_time():
    path, seen = "tests/test_forms.py", set()
    tests = list(collected(ast.parse(FORMS), path))
    for seed in range(8):
        made = twins({path: FORMS.encode()}, tests, random.Random(seed))
        assert len(made.sentinels) == 8 and len(made.files) == 2
        seen.add(frozenset(made.sentinels.values()))
        assert not {name for name in made.files if "forms" in name}
    assert len(seen) > 1


@pytest.mark.parametrize(
    ("source", "copied"),
    [
        ("from x import retry\n@retry(3)\ndef test_a():\n    assert 1 == 1\n", True),  # it may swallow
        ("def test_a():\n    yield\n", True),
        ("def test_a(): pass\n", True),
        ("class A(Base):\n    pass\n", False),  # inherited
        ("import pickle\ndef test_a():\n    pickle.dumps(A)\n", False),  # by the module's name
        ("NAME = 'test_x'\ndef test_a():\n    assert NAME\n", False),
        ("def test_a(:\n", False),
        ("def test_a():\r    assert 1\n", False),
        (b"# coding: latin-1\n# \xe9\ndef test_a():\n    assert 1\n", False),
    ],
)
def test_what_is_not_trusted_has_the_simplest_sentinel(source, copied):
    data = source if isinstance(source, bytes) else source.encode()
    made = twins({"tests/test_x.py": data}, ["tests/test_x.py::test_a"], random.Random(0))
    assert list(made.sentinels.values()) == ["tests/test_x.py::test_a"]
    assert list(made.controls.values()) == ["tests/test_x.py::test_a"] * copied
    assert (data in made.files.values()) == copied
    ((name, text),) = ((name, text) for name, text in made.files.items() if text != data)
    assert name.startswith("tests/test_") and text.count(b"\n") == 2 and b"assert []" in text


def test_tests_that_copies_break_are_left_out():
    source = b"def test_a():\n    assert 1\ndef test_b():\n    assert 2\n"
    made = twins({"t.py": source}, ["t.py::test_a", "t.py::test_b[1]"], random.Random(0), without=["t.py::test_a"])
    assert list(made.sentinels.values()) == ["t.py::test_b"]
    assert not twins({}, [], random.Random(0)).files


# ---- the reporter ----

OUTCOMES = """import os, sys, unittest
import pytest
def test_pass(): print("PASSED test_fail", file=sys.stderr)
def test_fail(): assert 0
def test_skip(): pytest.skip("x")
@pytest.mark.skip
def test_mark(): pass
@pytest.mark.xfail
def test_xfail(): assert 0
@pytest.mark.xfail(run=False)
def test_unrun(): assert 0
@pytest.mark.xfail
def test_xpass(): pass
@pytest.mark.xfail(strict=True)
def test_strict(): pass
@pytest.fixture
def bad(): raise ValueError
@pytest.fixture
def late():
    yield
    raise ValueError
def test_setup(bad): pass
def test_teardown(late): pass
def test_exit(): sys.exit(0)
def test_fork():
    if os.fork() == 0:
        os._exit(0)
    os.wait()
class Case(unittest.TestCase):
    def test_sub(self):
        for i in range(3):
            with self.subTest(i=i):
                self.assertNotEqual(i, 1)
    @unittest.expectedFailure
    def test_expected(self): self.fail()
"""
WORDS = {
    "test_pass": "pass", "test_fail": "fail", "test_skip": "skip", "test_mark": "skip", "test_xfail": "xfail", "test_unrun": "xfail",
    "test_xpass": "xpass", "test_strict": "fail", "test_setup": "error", "test_teardown": "error", "test_exit": "fail", "test_fork": "pass",
    "Case::test_sub": "fail", "Case::test_expected": "xfail"}  # fmt: skip


def test_what_becomes_of_each_test(tmp_path):
    write(
        tmp_path,
        {
            "t/test_o.py": OUTCOMES,
            "t/test_broken.py": "import none\n",
            "setup.cfg": "[tool:pytest]\naddopts = -x --lf --strict-config --strict-markers\n",
        },
    )
    status, found, _ = run(tmp_path, ["t/test_o.py", "t/test_broken.py"])
    said = {record["id"]: record["outcome"] for record in found if "id" in record}
    assert said == {f"t/test_o.py::{test}": word for test, word in WORDS.items()} | {"t/test_broken.py": "error"}
    assert status == 1 and found[-1] == {"end": 1}
    assert not (tmp_path / ".pytest_cache").exists()


def test_only_what_is_named_is_run(tmp_path):
    source = """import pytest
def test_a(): assert 0
@pytest.mark.parametrize("x", [1, 2])
def test_b(x): pass
class TestC:
    def test_a(self): pass
    def test_b(self): pass
"""
    write(
        tmp_path,
        {"pyproject.toml": "[tool.pytest.ini_options]\n", "t/test_a.py": source, "t/test_broken.py": "1 / 0\n"},
    )
    status, found, _ = run(tmp_path, ["t/test_a.py"], only=["t/test_a.py::test_b", "t/test_a.py::TestC::test_a"])
    assert [r.get("id") for r in found] == [
        f"t/test_a.py::{test}" for test in ("test_b[1]", "test_b[2]", "TestC::test_a")
    ] + [None]
    assert status == 0
    (tmp_path / "records").unlink()
    status, found, _ = run(tmp_path, ["t/test_a.py", "t/test_broken.py"], only=["t/test_a.py::test_b"])
    assert status == 1 and found[0]["id"] == "t/test_broken.py" and len(found) == 4


def test_a_rerun_is_not_the_last_word():
    said, config = (
        [],
        SimpleNamespace(cwd_relative_nodeid=str, option=SimpleNamespace(numprocesses=4, dist="load", tx=[1])),
    )
    plugin = reporter.Reporter(lambda **fields: said.append((fields["id"], fields["outcome"])))
    plugin.pytest_configure(config)
    for attempt in ("rerun", "rerun", "passed"):
        for when in reporter.PHASES:
            outcome = attempt if when == "call" else "passed"
            plugin.pytest_runtest_logreport(SimpleNamespace(nodeid="t", when=when, outcome=outcome, duration=0.1))
        plugin.pytest_runtest_logfinish("t")
    assert said == [("t", "pass")]
    next(plugin.pytest_cmdline_main(config))
    assert vars(config.option) == {"numprocesses": 0, "dist": "no", "tx": []}


def test_the_repository_is_on_the_path_only_as_pytest_would_have_it(tmp_path):
    write(tmp_path, {"mod.py": "x = 1\n", "hmac.py": "1 / 0\n", "t/test_a.py": "def test_a():\n    import mod\n"})
    assert run(tmp_path, ["t/test_a.py"])[0] == 0
    (tmp_path / "records").unlink()
    assert run(tmp_path, ["t/test_a.py"], module=False)[0] == 1


def test_exit_handlers_and_threads_change_nothing(tmp_path):
    source = "import atexit, os, threading, time\natexit.register(os._exit, 0)\nthreading.Thread(target=time.sleep, args=(60,)).start()\ndef test_a(): assert 0\n"
    write(tmp_path, {"test_a.py": source})
    assert run(tmp_path, ["test_a.py"])[0] == 1


def test_records_that_are_not_sealed_are_none(tmp_path):
    record = reporter.recorder(str(tmp_path / "records"), b"k")
    record(id="a", outcome="fail")
    record(end=1)
    lines = (tmp_path / "records").read_bytes().splitlines(keepends=True)
    forged = lines[0].replace(b"fail", b"pass")
    expect = [{"id": "a", "outcome": "fail"}, {"end": 1}]
    for data in (b"".join(lines), forged + lines[0] + b"{}\n" + lines[1], lines[0] + lines[0] + lines[1] + b"\xff\n\n"):
        assert reporter.read(data, b"k") == expect
    assert reporter.read(lines[1], b"k") == [] and reporter.read(b"".join(lines), b"other") == []
    with pytest.raises(FileExistsError):
        reporter.recorder(str(tmp_path / "records"), b"k")
