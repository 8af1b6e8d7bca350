"""The recipe chooses the engine; what the loop drives behaves the same with either."""

import sys
from pathlib import Path
from typing import Any

import pytest

from envs.errors import InfraError, Unsupported
from policy import models, vllm_engine
from policy.completion import Sampling
from policy.torch_engine import EngineConfig
from policy.vllm_engine import VllmConfig
from policy.weights import state_of
from rl.config import dump, load
from rl.parts import EnginePart, check_engine, engine_settings
from tests.policy import fake_vllm

TINY = Path(__file__).resolve().parents[2] / "rl" / "recipes" / "tiny.toml"


def recipe(*changes: str) -> Any:
    return load(TINY, changes)


def test_the_recipe_chooses_the_engine() -> None:
    assert isinstance(engine_settings(recipe()), EngineConfig)
    config = recipe("policy.engine=vllm", "policy.vllm.kv_cache_gb=2", "policy.vllm.enforce_eager=true", "seed=5")
    settings = engine_settings(config)
    assert settings == VllmConfig(
        slots=96, max_context=768, seed=5, deadline_s=900.0, kv_cache_gb=2.0, enforce_eager=True
    )
    assert "vllm = {kv_cache_gb = 2, enforce_eager = true}" in dump(config)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["policy.engine=sglang"], "none of torch, vllm"),
        (["policy.vllm.kv_cache_gb=2"], "another engine than policy.engine='torch'"),
        (["policy.engine=vllm", "policy.vllm.kv_gb=2"], "unknown key 'kv_gb'"),
        (["policy.engine=vllm", "policy.vllm.slots=2"], "policy.vllm.slots follows from the rest of the recipe"),
        (["policy.engine=vllm", "policy.vllm.dtype=int4"], "'int4' is none of fp32, bf16"),
        (
            ["policy.engine=vllm", "deterministic=true", "rollout.episodes=1", "learn.max_staleness=0"],
            "policy.engine=vllm weights depend",
        ),
    ],
)
def test_what_an_engine_cannot_honour_is_one_line(changes: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        engine_settings(recipe(*changes))
    assert "\n" not in str(error.value)


def test_without_vllm_the_run_is_refused_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> str:
        raise vllm_engine.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(vllm_engine.metadata, "version", none)
    check_engine(recipe())
    with pytest.raises(Unsupported, match="not installed"):
        check_engine(recipe("policy.engine=vllm"))


def test_the_loops_engine_part_is_the_same_with_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", fake_vllm.sampling_params)
    monkeypatch.setattr(vllm_engine, "installed", lambda: ("0.32.0", True))
    config = recipe("policy.engine=vllm", "rollout.spawn=threads", "rollout.workers=2")
    check_engine(config)
    weights = state_of(models.load(config.model))
    part = EnginePart(config)
    try:
        part.check()
        assert part.generate([1, 2, 3], Sampling(max_tokens=8, seed=1), "e").versions == [0] * 8
        assert part.publish(1, weights) == 1 == part.generate([1, 2, 3], Sampling(max_tokens=1), "f").versions[0]
        assert len(part.score([[1, 2, 3]])[0]) == 3 and part.load() == 0.0
        stats = part.stats()
        assert stats["decoded_tokens"] == 9 and stats["parked"] == 0 and sum(stats["seconds"].values()) > 0
        assert stats["paces"]
        part.cancel("g")
        with pytest.raises(InfraError, match="cancelled"):
            part.generate([1], Sampling(), "g")
        part.release("e")
    finally:
        part.close()
