import json
import threading

import numpy as np
import pytest
import torch

from policy import models, weights
from policy.models import ModelConfig
from rl.memory import Shape

SMALL = ModelConfig(vocab_size=64, hidden_size=32, layers=2, heads=4, kv_heads=2, intermediate_size=48, max_context=128)


def one_line(error: pytest.ExceptionInfo[ValueError], *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text, text
    for part in parts:
        assert part in text, text


def test_the_32b_preset_is_the_published_model() -> None:
    config = models.describe(ModelConfig(name="cwm-32b"))
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (64, 6144, 21_504)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (48, 8, 128)
    assert (config.vocab_size, config.max_position_embeddings, config.sliding_window) == (128_256, 131_072, 8192)
    assert config.layer_types == [*["full_attention"], *["sliding_attention"] * 3] * 16
    rope = {"rope_type": "llama3", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 8192}
    assert config.rope_parameters == rope | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert (config.rms_norm_eps, config.hidden_act, config.mlp_bias) == (1e-5, "silu", False)
    assert (config.bos_token_id, config.eos_token_id) == (128_000, [128_001, 128_008, 128_009])
    assert not config.tie_word_embeddings


@pytest.mark.parametrize(
    ("name", "layers", "hidden", "count"),
    # A layer of hidden size D: q and o 2 D D, k and v 2 D 1024, MLP 3 D 3.5 D, norms 2 D; outside 2 V D + D.
    [
        ("cwm-1b", 16, 2048, 1_431_373_824),
        ("cwm-8b", 32, 4096, 8_030_261_248),
        ("cwm-32b", 64, 6144, 32_581_097_472),
    ],
)
def test_the_family(name: str, layers: int, hidden: int, count: int) -> None:
    layer = 2 * hidden * hidden + 2 * hidden * 1024 + 3 * hidden * hidden * 7 // 2 + 2 * hidden
    assert count == layers * layer + 2 * 128_256 * hidden + hidden
    assert models.parameters(ModelConfig(name=name)) == Shape.named(name).parameters == count
    small, big = (models.describe(ModelConfig(name=n)).to_dict() for n in (name, "cwm-32b"))
    sizes = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "layer_types")
    assert {k: v for k, v in small.items() if k not in sizes} == {k: v for k, v in big.items() if k not in sizes}
    assert small["hidden_size"] // small["num_attention_heads"] == small["head_dim"] == 128
    assert small["layer_types"] == big["layer_types"][:layers]


def test_what_memory_does_not_hold_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_free", lambda place: 20_000_000_000)
    with pytest.raises(ValueError) as error:
        models.build(ModelConfig(name="cwm-8b"))
    one_line(error, "cwm-8b", "takes 32.1 GB in float32, and 20.0 GB are free on cpu", "bfloat16", "cwm-1b")
    with pytest.raises(ValueError, match=r"takes 65.2 GB in bfloat16"):
        models.build(ModelConfig(name="cwm-32b"), dtype=torch.bfloat16)


def test_free_memory_is_that_of_this_host() -> None:
    assert 1e8 < models._free(torch.device("cpu")) < 1e13


def test_a_small_one_with_local_layers() -> None:
    config = ModelConfig(**{**SMALL.__dict__, "layers": 5, "window": 8})
    hf = models.describe(config)
    assert hf.layer_types == ["full_attention", *["sliding_attention"] * 3, "full_attention"]
    assert (hf.sliding_window, hf.rope_parameters["original_max_position_embeddings"]) == (8, 8)
    # One local layer: the first token is seen by the eighth and no longer by the ninth.
    hf = models.describe(ModelConfig(**{**SMALL.__dict__, "layers": 1, "window": 8}))
    hf.layer_types = ["sliding_attention"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = models.CwmForCausalLM(hf).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        change = (model(ids).logits - model(torch.cat([ids[:, :1] + 40, ids[:, 1:]], 1)).logits).abs().amax(-1)[0]
    assert bool((change[:8] > 0).all()) and not bool(change[8:].any())


def test_build_in_another_type() -> None:
    halves = models.build(SMALL, 3, dtype=torch.bfloat16)
    assert {p.dtype for p in halves.parameters()} == {torch.bfloat16} and torch.get_default_dtype() == torch.float32
    assert halves.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="gpu: torch sees none")
def test_build_on_a_gpu() -> None:
    before = torch.cuda.get_rng_state()
    first, again = (models.build(SMALL, 3, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    assert {p.device.type for p in first.parameters()} == {"cuda"}
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert torch.equal(before, torch.cuda.get_rng_state())


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
        ({"window": 1024}, ["window=1024", "max_context=1024"]),
        ({"window": -1}, ["window=-1"]),
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


def test_big_models_are_saved_in_shards(tmp_path) -> None:  # type: ignore[no-untyped-def]
    for tied in (True, False):
        model = models.build(ModelConfig(**{**SMALL.__dict__, "tie_embeddings": tied}), 1)
        models.save(model, tmp_path / f"{tied}", shard="20KB")
        files = sorted(p.name for p in (tmp_path / f"{tied}").glob("*.safetensors"))
        assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
        state = weights.state_of(models.load(tmp_path / f"{tied}"))
        assert weights.checksum(state) == weights.checksum(weights.state_of(model))
    (tmp_path / "False" / files[1]).unlink()
    with pytest.raises(ValueError) as error:
        models.load(tmp_path / "False")
    one_line(error, "names missing")


def test_loading_touches_no_random_state_and_no_other_thread(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = models.build(SMALL, 1)
    models.save(model, tmp_path / "m")
    before, built = torch.get_rng_state(), []
    with models._Unfilled():
        other = threading.Thread(target=lambda: built.append(models.build(SMALL, 1)))
        other.start()
        other.join()
    assert weights.checksum(weights.state_of(built[0])) == weights.checksum(weights.state_of(model))
    models.load(tmp_path / "m")
    assert torch.equal(before, torch.get_rng_state())


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


def test_load_into_copies_and_refuses_what_does_not_fit() -> None:
    source, target = models.build(SMALL, 1), models.build(SMALL, 2)
    state = weights.state_of(source)
    for value in state.values():
        value.flags.writeable = False  # as Ray's object store hands them out
    weights.load_into(target, state)
    assert weights.checksum(weights.state_of(target)) == weights.checksum(state)
    name = "model.layers.0.mlp.up_proj.weight"
    wrong = {
        "missing": {k: v for k, v in state.items() if k != name},
        "unknown": {**state, "extra": state[name]},
        "shape": {**state, name: state[name].T},
        "NaN": {**state, name: np.full_like(state[name], np.nan)},
    }
    for part, bad in wrong.items():
        with pytest.raises(ValueError) as error:
            weights.load_into(target, bad)
        one_line(error, part)
