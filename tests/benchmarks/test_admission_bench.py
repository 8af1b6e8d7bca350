"""The admission measurement in small: the arms differ by what is prefilled again, and bad sizes are refused."""

import pytest

from benchmarks.__main__ import main, parser
from benchmarks.systems import admission


def test_only_an_engine_without_admission_prefills_again():
    sizes = {"episodes": 8, "turns": 5, "observation": 24, "sampled": 8, "tool": 0, "width": 32, "repeats": 1}
    args = parser().parse_args(["systems", "admission", *(f"--{name}={value}" for name, value in sizes.items())])
    found = {row["what"]: row for row in admission.run(args)["rows"]}
    off, on = found["prefilled tokens, admission off"], found["prefilled tokens, admission on"]
    # With nothing lost: 8 episodes, 24 tokens first, then four times 24 new ones and the last sampled one, not fed before.
    assert off["peer"] == on["peer"] == on["ours"] == 8 * (24 + 4 * 25)
    assert on["met"] and off["ours"] > 1.5 * off["peer"]


@pytest.mark.parametrize(("option", "why"), [("--episodes=6", "multiple of 4"), ("--turns=0", "at least 1")])
def test_sizes_that_say_nothing_are_refused(option, why):
    with pytest.raises(ValueError, match=f"{option.replace('=', ' ')}: .*{why}"):
        main(["systems", "admission", option])
