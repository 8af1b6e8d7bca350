"""The live view on a terminal of 80 columns."""

import io

from rich.console import Console

from rl.config import ROOT, load
from rl.view import COLUMNS, View


def row(step):
    wide = {"wall": 1234.567, "mismatch_kl": 0.000784, "entropy": 0.1234, "reward": 0.987}
    return {"in_flight": 96, **dict.fromkeys(COLUMNS, 0.5), **wide, "step": step}


def test_every_heading_and_number_fits(capsys):
    view = View(load(ROOT / "rl/recipes/tiny.toml"))
    for step in range(1, 15):
        view.step(row(step))
    view.evaluation({"step": 10, "split": "validation", "solve": 0.5, "reward": 0.5, "n": 64})
    console = Console(width=80, file=io.StringIO())
    console.print(view._table())
    shown = console.file.getvalue()
    assert "…" not in shown and all(heading in shown for heading in COLUMNS.values())
    assert "0.000784" in shown and "step 14/60" in shown and "50.0%" in shown
    lines = capsys.readouterr().out.splitlines()  # no terminal: plain lines
    assert len(lines) == 15 and lines[0].startswith("step 1/60  wall 1235  reward 0.987")
