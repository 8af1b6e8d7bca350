"""The grading measurement: its toy instance is what it says, and its rows are whole. swebench itself is not run here."""

import json
import subprocess
from argparse import Namespace

import pytest

from benchmarks.systems import grading


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.docker
@pytest.mark.native
def test_it_measures_a_toy_instance_that_is_resolved() -> None:
    found = grading.run(Namespace(backend=["native"], repeats=1, peer_repeats=1, no_peers=True, rows=None))
    rows = {row["what"]: row for row in found["rows"]}
    assert set(rows) == {f"native: one grading, {what}" for what in ("gold", "no-op")} | {
        f"native: gradings a minute, {n} at once" for n in (1, 2, 4)
    }
    assert all(row["ours"] > 0 and not row["goal"] for row in rows.values())
    assert not any(row["spread"] for what, row in rows.items() if "minute" in what)  # every grading was resolved


def test_the_toy_instance_is_a_row_of_swe_bench(tmp_path) -> None:
    row = grading.instance()
    assert {"image", "eval_script", "log_parser", "FAIL_TO_PASS", "PASS_TO_PASS"} <= row.keys() and json.dumps(row)
    (tmp_path / "toy.py").write_text(grading._BROKEN)
    subprocess.run(["git", "apply"], input=row["patch"], text=True, cwd=tmp_path, check=True)
    assert (tmp_path / "toy.py").read_text() == grading._FIXED
