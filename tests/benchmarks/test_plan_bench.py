"""The planner's check: its arithmetic by hand, and what it refuses."""

import pytest

from benchmarks.__main__ import main
from benchmarks.systems.plan import ASYNC, SYNC, speed_rows


def test_a_forecast_is_off_by_its_ratio_to_the_median_pair():
    pairs = [{SYNC: s, ASYNC: a} for s, a in ((6.0, 3.0), (9.0, 3.0), (5.0, 2.0))]  # 2, 3 and 2.5 times
    found = {r["what"]: r for r in speed_rows({SYNC: 5.5, ASYNC: 2.0}, pairs)}
    assert found["async:sync, forecast"]["ratio"] == pytest.approx(2.75 / 2.5)
    off = found["async:sync, forecast off by"]
    assert (off["ours"], off["met"]) == (pytest.approx(10.0), True)
    assert found["seconds a step, sync, forecast"]["peer"] == 6.0
    assert not {r["what"]: r for r in speed_rows({SYNC: 6.0, ASYNC: 2.0}, pairs)}["async:sync, forecast off by"]["met"]


@pytest.mark.parametrize("options", [["--pairs", "-1"], ["--steps", "2"]])
def test_what_measures_nothing_is_refused(options):
    with pytest.raises(ValueError, match=options[0]):
        main(["systems", "plan", *options])
