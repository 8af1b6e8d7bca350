"""Memory arithmetic: sizes of the 32B target by hand, and what torch really keeps for a backward pass."""

from dataclasses import replace

import pytest
import torch

from policy import models
from policy.models import ModelConfig
from rl.latencies import trained_token
from rl.losses import token_logprobs
from rl.memory import Layout, Shape, activations, engine, fit, gb, learner

BIG, TINY = Shape.named("cwm-32b"), Shape.named("cwm-tiny")


def test_parameters_of_the_presets() -> None:
    # q and o 2 x 6144 x 6144, k and v 2 x 6144 x 1024, MLP 3 x 6144 x 21504, norms 2 x 6144
    assert BIG.layer == 75_497_472 + 12_582_912 + 396_361_728 + 12_288 == 484_454_400
    assert BIG.parameters == 64 * 484_454_400 + 2 * 128_256 * 6144 + 6144 == 32_581_097_472
    assert BIG.parameters == models.parameters(ModelConfig(name="cwm-32b"))
    # 4 x (4 x 128 x 128 + 3 x 128 x 384 + 256) + 512 x 128 + 128: one matrix for embedding and head
    assert TINY.parameters == 4 * (65_536 + 147_456 + 256) + 65_536 + 128 == 918_656
    assert TINY.parameters == models.parameters(ModelConfig(name="cwm-tiny"))


def test_adapters_of_two_numbers_a_side() -> None:
    # q and o 128 + 128 each, k and v likewise, gate, up and down 128 + 384 each: 4 x 256 + 3 x 512 sides, rank 2, 4 layers
    assert TINY.adapters(2) == 2 * (1024 + 1536) * 4 == 20_480


def test_kv_of_an_episode() -> None:
    assert BIG.kv_bytes(1) == 64 * 4096 == 256 * 1024  # a key and a value of 8 x 128 in bf16, 64 layers
    assert BIG.kv_bytes(8192) == 8192 * 256 * 1024
    # beyond the window of 8192 only 16 of 64 layers grow: 16 x 4096 x 131072 + 48 x 4096 x 8192
    assert BIG.kv_bytes(131_072) == 8_589_934_592 + 1_610_612_736
    assert TINY.kv_bytes(1000, 4) == 2 * 128 * 4 * 4 * 1000


def test_activations_of_the_target_at_its_full_context() -> None:
    """One number of 6144 a layer and token in bf16: 103 GB a sequence, before the one layer that is computed again."""
    held = activations(BIG, 131_072, checkpoint=True, number=2)
    inputs = 64 * 6144 * 131_072 * 2
    assert gb(inputs) == "103.1 GB"
    layer = 8 * 6144 + 2 * 8 * 128 + 4 * 21_504 + 48 + 2  # 6 D and 2 H d are 8 D, as H d = D
    assert held == inputs + (layer + 3 * 6144 + 1 + 256) * 131_072 * 2
    assert activations(BIG, 131_072, checkpoint=False, number=2) > 20 * inputs


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_activations_are_what_torch_keeps(kv_heads: int) -> None:
    """Counted by autograd's own hooks, each storage once, weights and integers left out."""
    tokens, seen = 48, {}
    size = ModelConfig(vocab_size=64, hidden_size=32, layers=3, heads=4, kv_heads=kv_heads, intermediate_size=80)
    model = models.build(size).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights and value.is_floating_point():
            seen[storage.data_ptr()] = storage.nbytes()
        return value

    ids = torch.arange(tokens)[None] % 64
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        logprobs, _ = token_logprobs(hidden, model.lm_head.weight, ids, torch.ones_like(ids))
    logits = tokens * 64 * 4
    assert sum(seen.values()) == activations(Shape.of(model.config.to_dict()), tokens, checkpoint=False) + logits
    assert logprobs.requires_grad


def test_a_learner_rank_by_hand() -> None:
    p = TINY.parameters
    alone = learner(TINY, Layout(tokens=1000))
    assert (alone.weights, alone.gradients, alone.moments, alone.gathered) == (4 * p, 4 * p, 8 * p, 0)
    assert alone.activations == activations(TINY, 1000, checkpoint=False)
    assert (
        alone.workspace == 4 * 1000 * 512 * 4
    )  # four tables of logits; a layer's gradients: 1000 x (3 x 384 + 4 x 128) x 4
    four = learner(TINY, Layout(tokens=1000, ranks=4, sequence_parallel=2, compute=2, checkpoint=True))
    assert (four.weights, four.gradients, four.moments) == (p, p, 2 * p)
    assert four.gathered == 2 * (2 * TINY.layer + 512 * 128 + 128)
    assert four.activations == activations(TINY, 500, checkpoint=True, number=2)
    critic = learner(TINY, Layout(tokens=1000, critic=True))
    assert (critic.weights, critic.moments, critic.activations) == (8 * p, 16 * p, alone.activations)
    assert critic.gradients == 4 * p  # of one model at a time
    lora = learner(TINY, Layout(tokens=1000, lora_rank=2))
    assert (lora.weights, lora.gradients, lora.moments) == (4 * (p + 20_480), 4 * 20_480, 8 * 20_480)
    both = learner(TINY, Layout(tokens=1000, ranks=2, critic=True, lora_rank=2))
    assert (both.weights, both.gradients, both.moments) == (4 * (p + 20_480), 2 * 20_480, 8 * 20_480)
    assert both.gathered == 4 * (2 * (TINY.layer + 20_480 // 4) + 512 * 128 + 128)


@pytest.mark.parametrize(
    ("layout", "operations"),
    [({}, 6), ({"checkpoint": True}, 8), ({"lora_rank": 8}, 4), ({"critic": True}, 14), ({"critic": True, "lora_rank": 8}, 10)],
)  # fmt: skip
def test_operations_of_a_trained_token(layout: dict[str, bool], operations: int) -> None:
    """Forward 2 P, backward 4 P; adapters spare the frozen weights' gradients; a critic: the same again, and 2 P for values."""
    assert trained_token(Layout(tokens=1, **layout)) == operations


def test_what_does_not_fit_says_what_would_help() -> None:
    fit(BIG, Layout(tokens=131_072, ranks=64, sequence_parallel=8, checkpoint=True, compute=2), 76e9)
    with pytest.raises(
        ValueError,
        match=r"^learn.max_tokens=131072 needs .* GB of activations.*76.0 GB; set learn.sequence_parallel above 1",
    ):
        fit(BIG, Layout(tokens=131_072, ranks=64, checkpoint=True, compute=2), 76e9)
    with pytest.raises(ValueError, match=r"set learn.checkpoint_activations=true"):
        fit(BIG, Layout(tokens=131_072, ranks=64, compute=2), 76e9)
    with pytest.raises(ValueError, match=r"alone take .* GB: raise learn.ranks or set learn.lora_rank"):
        fit(BIG, Layout(tokens=1024, ranks=2, checkpoint=True, compute=2), 76e9)


def test_episodes_of_a_replica() -> None:
    """Four GPUs of 80 GB: 4 x (0.9 x 80 - 3) - 65.2 = 210.8 GB for KV; 32 k tokens of a model without windows take 8.6."""
    plain = replace(BIG, windowed=0)
    full = engine(plain, tensor_parallel=4, memory=80e9, context=32_768)
    assert gb(full.kv) == "210.8 GB" and full.episodes == 24
    assert full.tokens == full.kv // (256 * 1024)
    assert (
        engine(BIG, tensor_parallel=4, memory=80e9, context=32_768).episodes == 56
    )  # 16 x 4096 x 32768 + 48 x 4096 x 8192
    assert engine(plain, tensor_parallel=1, memory=80e9, context=32_768).episodes == 0


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(ValueError, match="model cwm-33b is no directory with a config.json and no preset"):
        Shape.named("cwm-33b")
