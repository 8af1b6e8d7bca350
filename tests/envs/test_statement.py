"""Statements are written from a real pytest run, are stable, and give nothing away."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from envs.swe.candidate import Candidate
from envs.swe.failures import Failure, failures, node_id
from envs.swe.statement import MAX_SHOWN, leaks, stable, statement, words

LEAN = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
MODULE = b"""
def total(xs):
    return _add(xs, 0)

def _add(xs, start, step):
    return start

def half(x):
    return x / 2
"""
TESTS = b"""
import unittest

import pytest
from shop.sums import half, total

class TestTotal:
    def test_of_some(self):
        xs = [1]
        unused = 4
        xs.append(2)
        assert xs
        assert total(xs) == 3

@pytest.mark.parametrize("x, want", [(2, 1), (3, 2)])
def test_half_of_whole(tmp_path, x, want):
    for _ in range(2):
        assert half(x) == (
            want
        )

def test_half_refuses():
    with pytest.raises(ValueError):
        half(1)

class HalfTest(unittest.TestCase):
    def testOdd(self):
        self.assertEqual(half(5), 3)

class Base:
    def test_inherited(self):
        assert half(7) != 3.5

class TestChild(Base):
    pass

@pytest.fixture
def broken():
    return half("1")

def test_with_fixture(broken):
    pass
"""


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    root = tmp_path_factory.mktemp("shop")
    for path, data in {"shop/sums.py": MODULE, "shop/__init__.py": b"", "tests/test_sums.py": TESTS}.items():
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_bytes(data)
    command = [sys.executable, "-m", "pytest", "-q", "-vv", "--junitxml=r.xml", "-o", "junit_family=xunit1", "tests"]
    subprocess.run([*command, "-p", "no:cacheprovider"], cwd=root, env=LEAN, capture_output=True, check=False)
    found = failures((root / "r.xml").read_bytes(), {"tests/test_sums.py": TESTS})
    return {f.test.removeprefix("tests/test_sums.py::"): f for f in found}


CANDIDATE = Candidate(
    id="x",
    broken={"shop/sums.py": MODULE},
    fixed={"shop/sums.py": MODULE.replace(b"_add(xs, 0)", b"_add(xs, 0, step=1)")},
    provenance={"function": "_add"},
)


def test_what_failed_is_read(failed):
    assert set(failed) == {
        "TestTotal::test_of_some", "test_half_of_whole[3-2]", "test_half_refuses", "HalfTest::testOdd",
        "TestChild::test_inherited", "test_with_fixture",
    } | {"Base::test_inherited"} & set(failed)  # fmt: skip
    some = failed["TestTotal::test_of_some"]
    assert some.code == "xs = [1]\nxs.append(2)\nassert total(xs) == 3"
    assert some.error == "TypeError" and "missing 1 required positional argument" in some.message
    assert some.source.startswith("def test_of_some(self):\n    xs")
    half = failed["test_half_of_whole[3-2]"]
    assert half.code == "for _ in range(2):\n    assert half(x) == (\n        want\n    )"
    assert half.arguments == "x = 3, want = 2" and half.error == "AssertionError"
    assert half.source.startswith("@pytest.mark.parametrize(")
    assert failed["test_half_refuses"].code == "with pytest.raises(ValueError):\n    half(1)"
    assert failed["TestChild::test_inherited"].code == "assert half(7) != 3.5"
    assert failed["test_with_fixture"].error == "TypeError" and failed["test_with_fixture"].code == ""


def test_statements_say_what_was_called_expected_and_got(failed):
    text = statement("shop", [failed["test_half_of_whole[3-2]"]])
    assert "**Half of whole**" in text and "with `x = 3, want = 2`" in text
    assert "Expected: `2`\nActual: `1.5`" in text
    assert "Expected: `3`\nActual: `2.5`" in statement("shop", [failed["HalfTest::testOdd"]])
    assert "**Odd (HalfTest)**" in statement("shop", [failed["HalfTest::testOdd"]])
    refused = statement("shop", [failed["test_half_refuses"]])
    assert "`ValueError` is expected here, but nothing is raised." in refused
    assert "It fails with\n\n```\nassert 3.5 != 3.5" in statement("shop", [failed["TestChild::test_inherited"]])
    assert "It raises `TypeError`:" in statement("shop", [failed["TestTotal::test_of_some"]])
    assert "It fails with\n\n```\nassert 1 == 2\n```" in statement(
        "shop", [Failure(test="t.py::test", message="assert 1 == 2")]
    )
    own = Failure(test="t.py::SmallCacheTest::test_len", code="assert self.make() == 1", message="assert 2 == 1")
    assert "**Len (SmallCacheTest)**" in statement("shop", [own])
    assert "The check does not hold." in statement("shop", [Failure(test="t.py::test", code="# none")])
    with pytest.raises(ValueError, match="needs a failed test"):
        statement("shop", [])


def test_what_would_give_the_fix_away_is_left_out(failed):
    some = failed["TestTotal::test_of_some"]
    told, kept = statement("shop", [some]), statement("shop", [some], CANDIDATE)
    assert "_add()" in told and leaks(told, CANDIDATE, [some]) == ["names the changed function: _add"]
    assert "It raises `TypeError`." in kept and "_add" not in kept and leaks(kept, CANDIDATE, [some]) == []


def test_leaks():
    def found(text, tests=(), **changes):
        return leaks(text, replace(CANDIDATE, **changes), tests)

    assert found("See shop/sums.py.") and found("in sums.py line 3") and found("module 'shop.sums' has no attribute")
    assert found("Call `_add` with a step") and found("use return _add(xs,  0,\n step=1) there")
    assert not found("The sums are wrong; total([1]) fails.")
    assert not found("it does not add up", provenance={"function": "C.add"}) and found(
        "use .add", provenance={"function": "C.add"}
    )
    assert not found("x.sums.py4") and not found("")
    calls = Failure(test="t", source="def test(): assert shop.sums._add([], 0, step=1) == 0")
    assert not found("shop.sums._add([], 0, step=1) fails", [calls])
    gone = {"broken": {"shop/__init__.py": b"a = 1\n"}, "fixed": {"shop/__init__.py": None}}
    assert not found("shop is empty", **gone, provenance={})


def test_long_and_many_are_bounded():
    many = [
        Failure(test=f"t.py::test_{i}", code=f"f({i})\n" * 2000, message="m" * 5000, error="a.b.KeyError", source="s")
        for i in range(9)
    ]
    text = statement("shop", many)
    assert len(text) < 6000 and text.count("**") == 2 * MAX_SHOWN and "6 more cases like these fail, too." in text
    assert text == statement("shop", many[::-1])


def test_the_same_test_is_shown_once():
    cases = [Failure(test=f"t.py::test_x[{i}]", code="f()") for i in range(3)]
    assert statement("shop", cases).count("**X**") == 1
    inherited = [Failure(test=f"t.py::Test{i}::test_x", code="f()") for i in range(3)]
    assert statement("shop", inherited).count("**X**") == 1


def test_stable():
    text = "<A object at 0x7fcdcee71890> in /tmp/pytest-of-root/p0/x.txt at 2026-01-02 03:04:05.678 after 0.123456 s"
    assert stable(text) == "<A object at 0x…> in … at … after …"
    assert stable("a/tmp/b 0x10 2026-01-02 1.5 s") == "a/tmp/b 0x10 2026-01-02 1.5 s"


def test_words():
    assert words("a.py::TestB::test_c_d[1-2]") == "c d" and words("a.py::C::testOddOne") == "Odd One"
    assert words("a.py::test") == "test" and words("tests/a.py") == "import"


def test_ids_are_found_again():
    sources = {"tests/test_a.py": b"", "tests/sub/test_b.py": b""}
    assert node_id("tests.test_a.TestX", "test_y[1.5]", sources) == "tests/test_a.py::TestX::test_y[1.5]"
    assert node_id("tests.sub.test_b", "test_y", sources) == "tests/sub/test_b.py::test_y"
    assert node_id("", "tests.test_a", sources) == "tests/test_a.py"


def test_a_file_that_can_t_be_imported():
    report = b"""<testsuites><testcase classname="" name="tests.test_sums" file="tests/test_sums.py"><error
      message="collection failure">x.py:1: in f
    y
E   NameError: name 'y' is not defined</error></testcase></testsuites>"""
    [found] = failures(report, {"tests/test_sums.py": TESTS})
    assert (found.test, found.error, found.message) == ("tests/test_sums.py", "NameError", "name 'y' is not defined")
    assert "**Import**\n\nIt raises `NameError`:" in statement("shop", [found])


@pytest.mark.parametrize("report", [b"", b"<a", b'<!DOCTYPE x [<!ENTITY a "b">]><x>&a;</x>'])
def test_bad_reports_are_one_line(report):
    with pytest.raises(ValueError, match="test report") as caught:
        failures(report, {})
    assert "\n" not in str(caught.value)
