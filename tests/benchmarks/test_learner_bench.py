"""The learner's measurement in small: both sides take the same step, and what it trains on is ragged."""

import pytest

from benchmarks.__main__ import main, parser
from benchmarks.systems import learner
from benchmarks.systems.learner_side import padded


@pytest.mark.slow
def test_both_sides_take_the_same_step():
    sizes = {"rows": 8, "context": 96, "width": 32, "vocabulary": 64, "steps": 1, "repeats": 1, "micro": 4}
    args = parser().parse_args(["systems", "learner", *(f"--{name}={value}" for name, value in sizes.items())])
    found = {row["what"]: row for row in learner.run(args)["rows"]}
    assert found["gradient norm of the first step"]["ratio"] == pytest.approx(1, abs=1e-3)
    assert found["trained tokens a second"]["ours"] > 0 and found["peak memory above the imports"]["peer"] > 1


def test_rows_are_ragged_and_padded_as_trl_pads():
    batch = learner.ragged(16, 200, 50)
    lengths = [len(r["token_ids"]) for r in batch]
    assert max(lengths) <= 200 and max(lengths) > 3 * min(lengths) and all(r["loss_mask"][-1] for r in batch)
    made = padded(batch)
    assert made["prompt_mask"].sum() + made["completion_mask"].sum() == sum(lengths)
    assert made["num_items_in_batch"] == sum(sum(r["loss_mask"]) for r in batch)
    ids = [int(t) for part in ("prompt", "completion") for t in made[f"{part}_ids"][3][made[f"{part}_mask"][3] > 0]]
    assert ids == batch[3]["token_ids"]


@pytest.mark.parametrize("option", ["--rows=12", "--micro=3", "--micro=0", "--steps=0"])
def test_sizes_that_cannot_be_divided_are_refused(option):
    with pytest.raises(ValueError, match=option.partition("=")[0]):
        main(["systems", "learner", option])
