import json

import numpy as np
import pytest
import torch

from policy import models, weights
from policy.models import ModelConfig

SMALL = ModelConfig(vocab_size=64, hidden_size=32, layers=2, heads=4, kv_heads=2, intermediate_size=48, max_context=128)


def one_line(error: pytest.ExceptionInfo[ValueError], *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text, text
    for part in parts:
        assert part in text, text


def test_the_32b_preset_has_the_published_size() -> None:
    config = models.describe(ModelConfig(name="cwm-32b"))
    assert models.parameters(ModelConfig(name="cwm-32b")) == pytest.approx(32.6e9, rel=2e-3)
    assert config.layer_types[:5] == ["full_attention", *["sliding_attention"] * 3, "full_attention"]
    assert (config.sliding_window, config.head_dim, config.rope_parameters["factor"]) == (8192, 128, 16.0)


def test_the_32b_preset_is_never_built() -> None:
    with pytest.raises(ValueError, match="cwm-tiny") as error:
        models.build(ModelConfig(name="cwm-32b"))
    one_line(error, "cwm-32b", "32.6")


def test_the_tiny_preset_takes_changes_and_has_no_window_or_scaled_rope() -> None:
    config = models.describe(ModelConfig(vocab_size=777, layers=3))
    assert (config.vocab_size, config.num_hidden_layers, config.hidden_size) == (777, 3, 128)
    assert config.rope_parameters["rope_type"] == "default"
    assert set(config.layer_types) == {"full_attention"} and config.sliding_window == 1024
    assert config.eos_token_id < config.vocab_size and config.bos_token_id < config.vocab_size


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"name": "cwm-tyni"}, ["cwm-tyni", "Did you mean 'cwm-tiny'?"]),
        ({"hidden_size": 100, "heads": 3}, ["heads=3", "hidden_size=100"]),
        ({"kv_heads": 3}, ["kv_heads=3", "heads=4"]),
        ({"hidden_size": 12, "heads": 4}, ["odd head size"]),
    ],
)
def test_a_wrong_config_is_one_line(change: dict[str, object], parts: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        models.build(ModelConfig(**change))  # type: ignore[arg-type]
    one_line(error, *parts)


def test_build_is_seeded_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = (weights.checksum(weights.state_of(models.build(SMALL, seed))) for seed in (3, 3, 4))
    assert first == again != other
    assert torch.equal(before, torch.get_rng_state())


def test_save_and_load_give_the_same_model_back(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = models.build(SMALL, 1)
    models.save(model, tmp_path / "m")
    loaded = models.load(tmp_path / "m")
    ids = torch.arange(20)[None]
    assert weights.checksum(weights.state_of(model)) == weights.checksum(weights.state_of(loaded))
    assert torch.equal(model(ids).logits, loaded(ids).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_skeleton_has_no_weights_and_is_filled_as_the_model(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """In several files, in bf16; head and embedding apart; what the directory does not have is 0."""
    model = models.build(ModelConfig(**{**SMALL.__dict__, "tie_embeddings": False}), 1).bfloat16()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model*.safetensors"))) > 1
    skeleton = models.skeleton(tmp_path)
    assert all(p.is_meta for p in skeleton.parameters()) and not any(b.is_meta for b in skeleton.buffers())
    skeleton.more = torch.nn.Linear(2, 3, device="meta")
    models.fill(skeleton, tmp_path)
    assert not skeleton.more.weight.any() and skeleton.more.weight.requires_grad
    for name, p in model.named_parameters():
        found = skeleton.get_parameter(name)
        assert torch.equal(found, p.float()) and found.dtype == torch.float32 and found.requires_grad
    for (name, b), (_, other) in zip(model.named_buffers(), skeleton.named_buffers(), strict=True):
        assert b.float().allclose(other, rtol=1e-2), name


def test_a_weight_that_is_no_number_is_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = models.build(SMALL, 1)
    model.model.norm.weight.data[3] = float("nan")
    models.save(model, tmp_path)
    with pytest.raises(ValueError, match="'model.norm.weight' holds NaN") as error:
        models.load(tmp_path)
    one_line(error, str(tmp_path))


def test_a_broken_checkpoint_is_one_line(tmp_path) -> None:  # type: ignore[no-untyped-def]
    def broken(*parts: str) -> None:
        with pytest.raises(ValueError) as error:
            models.load(tmp_path / "m")
        one_line(error, str(tmp_path / "m"), *parts)

    broken("config.json")
    models.save(models.build(SMALL, 1), tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    broken("can't be read")
    file.write_bytes(b"not tensors at all")
    broken("can't be read")
    file.unlink()
    broken("model*.safetensors")
    file.write_bytes(whole)
    config = tmp_path / "m" / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"hidden_size": 64}))
    broken("shape")
    config.write_text("{")
    broken("can't be read")
    config.write_text(json.dumps(settings | {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}))
    broken("names missing")


def test_state_holds_a_tied_matrix_once_and_is_a_copy() -> None:
    model = models.build(SMALL, 1)
    state = weights.state_of(model)
    assert "model.embed_tokens.weight" in state and "lm_head.weight" not in state
    assert all(value.dtype == np.float32 for value in state.values())
    state["model.norm.weight"][:] = 7
    assert float(model.model.norm.weight.detach()[0]) == 1.0
    untied = models.build(ModelConfig(**{**SMALL.__dict__, "tie_embeddings": False}), 1)
    assert "lm_head.weight" in weights.state_of(untied)


def test_checksum_sees_names_shapes_and_values_but_not_the_order() -> None:
    one = {"a": np.arange(6, dtype=np.float32), "b": np.ones(2, np.float32)}
    assert weights.checksum(one) == weights.checksum(dict(reversed(one.items())))
    assert weights.checksum(one) == weights.checksum({k: torch.from_numpy(v) for k, v in one.items()})
    seen = {
        weights.checksum(other)
        for other in (
            one,
            {**one, "a": one["a"].reshape(2, 3)},
            {**one, "a": one["a"] + 1e-6},
            {"c": one["a"], "b": one["b"]},
        )
    }
    assert len(seen) == 4


def test_what_does_not_fit_is_named() -> None:
    model = models.build(SMALL, 1)
    state, shapes = weights.state_of(model), {name: p.shape for name, p in model.named_parameters()}
    weights.check_fit(state, shapes, "version 1")
    name = "model.layers.0.mlp.up_proj.weight"
    wrong = {
        "missing": {k: v for k, v in state.items() if k != name},
        "unknown": {**state, "extra": state[name]},
        "shape": {**state, name: state[name].T},
        "NaN": {**state, name: np.full_like(state[name], np.nan)},
    }
    for part, bad in wrong.items():
        with pytest.raises(ValueError) as error:
            weights.check_fit(bad, shapes, "version 1")
        one_line(error, part)
