"""Visible test files lack the tests that decide, and nothing else."""

import pytest

from envs.swe.hiding import without_tests

SOURCE = b'''"""Doc."""
import pytest   # kept


# about b
@pytest.mark.parametrize("x", [1,  2])
def test_b(x):
    assert x


def helper():
    def test_b():
        pass
    return 1


class TestC:
    """Only one."""

    @staticmethod
    def test_d():
        pass


class TestE(object):
    y = 1

    def test_d(self):  # odd   format
        assert helper( )

    def test_f(self): pass


test_g = helper

if True:
    def test_h():
        pass
'''


def test_one_function_goes_with_its_decorators_and_comment():
    left = without_tests(SOURCE, ["tests/test_x.py::test_b[1-2]", "tests/test_x.py::test_b[2]"])
    start, stop = SOURCE.index(b"\n\n# about b"), SOURCE.index(b"\n\ndef helper")
    assert left == SOURCE[:start] + SOURCE[stop:]


def test_a_method_goes_from_its_own_class_only():
    left = without_tests(SOURCE, ["TestE::test_d"])
    gone = b"\n    def test_d(self):  # odd   format\n        assert helper( )\n"
    assert left == SOURCE.replace(gone, b"")


def test_an_empty_class_goes():
    left = without_tests(SOURCE, ["TestC::test_d"])
    assert b"TestC" not in left and b"TestE" in left and b"Only one" not in left


def test_names_bound_and_blocks():
    left = without_tests(SOURCE, ["test_g", "test_h"])
    assert b"test_g" not in left and b"if True:\n    pass" in left
    compile(left, "x", "exec")


def test_nothing_named_changes_nothing():
    assert without_tests(SOURCE, ["test_zzz", "TestC::test_f", "test_d"]) == SOURCE
    assert without_tests(SOURCE.replace(b"\n", b"\r\n"), []) == SOURCE.replace(b"\n", b"\r\n")


def test_a_file_without_tests_goes():
    assert without_tests(b"import x\n\ndef test_a():\n    pass\n\ndef helper():\n    pass\n", ["test_a"]) is None
    unit = b"import unittest\n\nclass A(unittest.TestCase):\n    def setUp(self):\n        pass\n\n    def test_a(self):\n        pass\n"
    assert without_tests(unit, ["A::test_a"]) is None
    assert without_tests(unit, []) == unit


def test_inherited_methods_go_where_they_are():
    source = b"class Base:\n    def test_a(self):\n        pass\n\n    def test_b(self):\n        pass\n\n\nclass TestX(Base):\n    z = 1\n"
    left = without_tests(source, ["t.py::TestX::test_a"])
    assert left == source.replace(b"    def test_a(self):\n        pass\n", b"", 1).replace(
        b"class Base:\n\n", b"class Base:\n\n"
    )
    foreign = b"class TestX(other.Base):\n    z = 1\n"
    assert without_tests(foreign, ["TestX::test_a"]) == foreign


def test_what_is_no_python_is_refused():
    with pytest.raises(ValueError, match="can't be parsed"):
        without_tests(b"def (", ["test_a"])
