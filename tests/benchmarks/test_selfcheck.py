"""Rows of the self-check: a check is excused only where it fails as it must."""

import pytest

from benchmarks.systems import selfcheck


@pytest.mark.parametrize(
    ("name", "error", "unit", "goal", "met"),
    [
        ("test_exec_output", "", "pass", ">=1", True),
        ("test_exec_output", "AssertionError: x", "FAIL", ">=1", False),
        ("test_exec_output", f"{selfcheck.ONE_USER}: x", "FAIL", ">=1", False),
        ("test_exec_as_user", f"{selfcheck.ONE_USER}: x", "can't apply", "", None),
        ("test_exec_as_user", "TimeoutError: x", "FAIL", ">=1", False),
        ("test_exec_as_user", "", "pass", ">=1", True),
    ],
)
def test_a_row_per_check_and_their_sum(name, error, unit, goal, met):
    found = [{"name": name, "error": error}, {"name": "test_other", "error": ""}]
    first, other, total = selfcheck.rows("native", found)
    assert (first["unit"], first["goal"], first["met"]) == (unit, goal, met)
    assert bool(first["spread"]) == bool(error) and other["met"] and first["backend"] == "native"
    assert total["met"] is (met is not False) and total["n"] == 2 and total["ours"] == 1 + (not error)


def test_what_fails_inside_is_one_line(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho trace >&2\necho 'Unsupported: no engine' >&2\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(ValueError, match=r"^self-check of docker: Unsupported: no engine; [^\n]*--backend$"):
        selfcheck.ask(python, "docker")
