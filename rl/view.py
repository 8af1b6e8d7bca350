"""The live view of a run: one table on a terminal, plain lines elsewhere (and under `--spawn threads`, where a debugger
may want the terminal)."""

from __future__ import annotations

import sys
from typing import Any

from rl.config import Config

COLUMNS = {
    "step": "step",
    "wall": "wall s",
    "reward": "reward",
    "solve_rate": "solved",
    "live_groups": "live",
    "turns": "turns",
    "entropy": "entr",
    "mismatch_kl": "kl",
    "staleness_max": "stale",
    "engine_busy": "engine",
    "learner_busy": "learn",
}
"""What is shown of a step, and its heading: the table fits 80 columns."""


class View:
    """Shows steps and evaluations as they come."""

    def __init__(self, config: Config) -> None:
        self.steps = config.steps
        self.rows: list[dict[str, Any]] = []
        self.evals: list[dict[str, Any]] = []
        self.live: Any = None
        self.status = "starting"
        if sys.stdout.isatty() and config.rollout.spawn == "ray":
            from rich.live import Live

            self.live = Live(refresh_per_second=2)
            self.live.start()

    def step(self, row: dict[str, Any]) -> None:
        """A step ended."""
        self.rows.append(row)
        self.status = f"step {row['step']}/{self.steps}, {row['in_flight']} episodes in flight"
        self._show(
            "  ".join(
                [
                    f"step {row['step']}/{self.steps}",
                    *(f"{k} {_short(row[k])}" for k in COLUMNS if k in row and k != "step"),
                ]
            )
        )

    def evaluation(self, row: dict[str, Any]) -> None:
        """An evaluation ended."""
        self.evals.append(row)
        self._show(
            f"evaluation at step {row['step']}: {row['split']} solved {row['solve']:.1%} of {row['n']} (reward {row['reward']:.3f})"
        )

    def alive(self, step: int, in_flight: int, ready: int) -> None:
        """Nothing ended for a second."""
        self.status = f"step {step}/{self.steps}, {in_flight} episodes in flight, {ready} groups ready"
        if self.live is not None:
            self.live.update(self._table())

    def _show(self, line: str) -> None:
        if self.live is None:
            print(line, flush=True)
        else:
            self.live.update(self._table())

    def _table(self) -> Any:
        from rich.box import SIMPLE
        from rich.console import Group
        from rich.table import Table

        table = Table(*COLUMNS.values(), title=self.status, box=None, padding=(0, 1, 0, 0), header_style="bold")
        for row in self.rows[-12:]:
            table.add_row(*(_short(row.get(k, "")) for k in COLUMNS))
        evals = Table("step", "split", "solved", "n", title="held-out tasks", box=SIMPLE)
        for row in self.evals[-6:]:
            evals.add_row(str(row["step"]), row["split"], f"{row['solve']:.1%}", str(row["n"]))
        return Group(table, evals)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.live is not None:
            self.live.stop()
            self.live = None


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
