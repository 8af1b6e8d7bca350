"""A model directory from nothing, by the command."""

import pytest

from policy import __main__ as command
from policy import models, renderer


def test_a_random_model_is_read_by_what_reads_models(tmp_path, capsys):
    out = tmp_path / "model"
    given = ["random", "cwm-tiny", "--out", str(out), "--vocab-size", "64", "--dtype", "fp32"]
    assert command.main(given) == 0
    model = models.load(out)
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters in fp32" in capsys.readouterr().out
    assert model.config.vocab_size == renderer.load(out).vocab_size == 64
    with pytest.raises(ValueError, match="is there already"):
        command.main(given)
    with pytest.raises(ValueError, match="'cwm-2b' is no preset"):
        command.main(["random", "cwm-2b", "--out", str(tmp_path / "other")])
    for device in ("cuda:7", "gpu7"):
        with pytest.raises(ValueError, match=f"device='{device}' is none that torch has here"):
            command.main(["random", "cwm-tiny", "--out", str(tmp_path / "other"), "--device", device])
    assert not (tmp_path / "other").exists()
