"""The measurement of a card, tried on a CPU: every part runs, and a failing one is a row with its reason."""

import pytest

from benchmarks.__main__ import main, parser
from benchmarks.systems import gpu

SMALL = [
    *("--device=cpu", "--engine=torch", "--presets=cwm-tiny", "--episodes=4", "--prompt=16", "--tokens=8", "--turns=2"),
    *("--steps=8", "--repeats=1", '--model-size={"layers": 2, "hidden_size": 64, "heads": 2, "kv_heads": 2, "vocab_size": 96}'),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.timeout(900)
def test_every_part_runs():
    args = parser().parse_args(["systems", "gpu", *SMALL, "--contexts", "64", "4096"])
    found = {row["what"]: row for row in gpu.run(args)["rows"]}
    assert found["cwm-tiny: tokens sampled a second, 4 episodes at once"]["spread"]["reused_tokens"] > 0
    assert found["cwm-tiny: log-probs of engine and learner apart"]["ours"] < 1e-4
    assert found["cwm-tiny: longest context of the learner that fitted"]["ours"] == 64
    assert "policy.max_context=4096" in found["cwm-tiny: rows of 4096 tokens"]["why"]
    assert found["cwm-tiny: reward of the run, last quarter − first"]["n"] == 8


def test_a_rise_has_an_interval():
    gain, half = gpu.rise([[0.0, 1.0], [9.0], [9.0], [9.0], [9.0], [9.0], [9.0], [1.0, 2.0]])
    # Quarters are two steps: {0, 1, 9} and {9, 1, 2}; means 10/3 and 4; variances 73/3 and 19.
    assert gain == pytest.approx(2 / 3) and half == pytest.approx(1.959964 * (73 / 9 + 19 / 3) ** 0.5)


def test_mistakes_are_one_line():
    with pytest.raises(ValueError, match="torch sees no GPU here"):
        main(["systems", "gpu"])
    with pytest.raises(ValueError, match="--model-size '{' is no JSON"):
        main(["systems", "gpu", "--device=cpu", "--model-size={"])
