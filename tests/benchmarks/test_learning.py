"""The learning proof keeps its finished parts, and never mixes those of two recipes."""

from __future__ import annotations

from argparse import Namespace

import pytest

from benchmarks.systems.learning import Lab, by_kind, distinct
from envs.tiny import repairs


def test_a_finished_part_is_made_once(tmp_path):
    args = Namespace(out=tmp_path, recipe="rl/recipes/tiny.toml", tasks=4)
    assert Lab(args).once("part", lambda: [1.0]) == [1.0]
    assert Lab(args).once("part", lambda: pytest.fail("made twice")) == [1.0]


def test_parts_of_another_measurement_are_refused(tmp_path):
    Lab(Namespace(out=tmp_path, recipe="rl/recipes/tiny.toml", tasks=4))
    with pytest.raises(ValueError, match="another recipe.*delete it"):
        Lab(Namespace(out=tmp_path, recipe="rl/recipes/tiny.toml", tasks=5))


def test_tasks_are_distinct_by_source_and_counted_by_kind():
    found = distinct("validation", 40)
    assert len({repairs.task("validation", i).provenance["normalised"] for i in found}) == len(found) == 40
    after = [1.0] * 40
    kinds = by_kind(40, [0.0] * 40, after)
    assert sum(share for share, _, _ in kinds.values()) == pytest.approx(1, abs=1e-3)
    assert all(old == 0.0 and new == 1.0 for _, old, new in kinds.values())
