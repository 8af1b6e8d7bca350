"""What a run leaves behind: its directory, and everything that is written there.

    runs/<name>/  recipe.toml      the resolved recipe
                  journal.sqlite   what became of every group
                  metrics.jsonl, tensorboard/
                  trajectories/    step-000012.jsonl: every trajectory of the batch, with ids, masks, log-probs, versions
                  evaluations/     validation-000010.jsonl
                  checkpoints/     step-000040/: the learner's whole state
                  model/           the policy as it is at the end
                  report.html      curves, ledger, summary

The loop decides; this file only writes, counts and shows. A run directory is locked while a run uses it.
"""

from __future__ import annotations

import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policy.renderer import Renderer
from rl import checkpoint
from rl.batch import BatchReport
from rl.config import Config, dump
from rl.journal import Journal, RunLock
from rl.ledger import bottleneck, busy_share, merge, summary
from rl.metrics import Sink, by_source, read, truncate
from rl.parts import Parts
from rl.report import write_report
from rl.view import View

if TYPE_CHECKING:
    from agents.trajectory import Group
    from rl.loop import Loop, _Evaluation


class Record:
    """The run directory of one run."""

    def __init__(self, config: Config, *, resume: bool = False) -> None:
        """Take the directory; nothing is written until `open`. `ValueError` where it is in use, holds a run and `resume` is
        off, or holds none and it is on."""
        self.config, self.directory = config, config.directory
        self._held = ExitStack()
        lock = self._held.enter_context(RunLock(self.directory))
        holds = (self.directory / "journal.sqlite").exists()
        if holds != resume:
            lock.release()
            raise ValueError(
                f"run directory {self.directory} holds a run; add --resume, choose another --name, or remove it"
                if holds
                else f"nothing to resume at {self.directory}; leave --resume out, or check --name and --runs"
            )
        self.surviving = checkpoint.latest(self.checkpoints) if resume else None
        self.renderer = Renderer(config.model)
        self.vocabulary = self.renderer.vocab_size
        self.screen = self._held.enter_context(closing(View(config)))
        self.began = time.monotonic()

    def open(self, parts: Parts) -> None:
        """The parts are up: begin the record, or go on with it behind the surviving checkpoint."""
        self.parts = parts
        for name in ("trajectories", "evaluations"):
            (self.directory / name).mkdir(exist_ok=True)
        self.journal = self._held.enter_context(closing(Journal(self.directory / "journal.sqlite")))
        metrics = self.directory / "metrics.jsonl"
        truncate(metrics, self.surviving_step)
        self.before: dict[str, Any] = (
            next((r for r in reversed(read(metrics)) if r["kind"] == "step"), {}) if metrics.exists() else {}
        )
        (self.directory / "recipe.toml").write_text(dump(self.config))
        self.sink = self._held.enter_context(closing(Sink(self.directory, behind=self.surviving_step)))
        self._last: dict[str, dict[str, float]] = {}
        self._row: dict[str, Any] = {}

    @property
    def checkpoints(self) -> Path:
        """Directory of checkpoints."""
        return self.directory / "checkpoints"

    @property
    def surviving_step(self) -> int:
        """Step of the checkpoint that a resumed run starts from; 0 without one."""
        return checkpoint.step_of(self.surviving) if self.surviving else 0

    def evaluated(self) -> set[int]:
        """Steps whose evaluation is on record for every split."""
        rows = [r for r in read(self.directory / "metrics.jsonl") if r["kind"] == "eval"]
        return {r["step"] for r in rows if sum(o["step"] == r["step"] for o in rows) >= len(self.config.evaluations)}

    # ------------------------------------------------------------------ what the loop reports

    def step(self, loop: Loop, groups: list[Group], report: BatchReport, step: dict[str, Any]) -> None:
        """A batch was trained: write its trajectories and begin its row of metrics (`parity` completes it)."""
        trajectories = [t for g in groups for t in g.trajectories]
        if self.config.keep_trajectories:
            path = self.directory / "trajectories" / f"step-{loop.step:06d}.jsonl"
            path.write_text("".join(t.to_json() + "\n" for t in trajectories))
        mixed = sum(t.oldest_version != t.newest_version for t in trajectories)
        metrics = step["metrics"]
        self._row = {
            "step": loop.step,
            "version": step["version"],
            "trajectories": len(trajectories),
            "reward": report.reward,
            "solve_rate": report.solve_rate,
            "live_groups": report.live_groups / max(1, report.groups),
            "kept": report.kept / max(1, report.trajectories),
            "turns": report.turns,
            "tokens": report.tokens,
            "action_tokens": report.action_tokens,
            "train_seconds": round(step["wall_seconds"], 4),
            "loss": step["loss"],
            "grad_norm": step["grad_norm"],
            **metrics,
            "staleness_max": report.staleness_max,
            "staleness_mean": report.staleness_mean,
            "mixed": mixed / max(1, len(trajectories)),
            "dropped": report.dropped,
            "stops": report.stops,
        }
        if self.config.envs:
            self._row |= by_source(groups, lambda group: loop.curriculum.picks[group].source)

    def parity(self, loop: Loop, parity: float) -> None:
        """The publish that followed the batch is proven: the row is complete."""
        row = {
            **self._row,
            "parity": parity,
            "infra": loop.infra,
            "dropped_groups": loop.dropped,
            "in_flight": loop.admission.in_flight,
        }
        if any(source.window for source in self.config.environments):
            row["outside"] = dict(loop.curriculum.outside)
        row["wall"] = round(time.monotonic() - self.began, 3)
        row |= self._busy()
        self.sink.write("step", row)
        self.screen.step(row)

    def evaluation(self, evaluation: _Evaluation) -> None:
        """An evaluation is complete."""
        done = evaluation.done
        path = self.directory / "evaluations" / f"{evaluation.split}-{evaluation.step:06d}.jsonl"
        path.write_text("".join(t.to_json() + "\n" for t in done))
        graded = [t for t in done if t.reward is not None]
        row = {
            "step": evaluation.step,
            "split": evaluation.split,
            "solve": sum(t.outcome == "resolved" for t in graded) / max(1, len(graded)),
            "reward": sum(t.reward or 0.0 for t in graded) / max(1, len(graded)),
            "n": len(graded),
            "wall": round(time.monotonic() - self.began, 3),
        }
        self.sink.write("eval", row)
        self.screen.evaluation(row)

    def view(self, loop: Loop) -> None:
        """Nothing ended for a while: show that the run is alive."""
        self.screen.alive(loop.step, loop.admission.in_flight, len(loop.ready))

    def checkpoint(self, loop: Loop) -> None:
        """Save the learner's state. The loop waits here: the state must be that of `loop.step`."""
        learner = self.parts.learner
        checkpoint.write(
            self.checkpoints,
            loop.step,
            lambda path: learner.ask("save", str(path), timeout=300),
            keep=self.config.keep_checkpoints,
        )
        self.journal.forget(checkpoint.steps(self.checkpoints)[0])

    # ------------------------------------------------------------------ ledger and end

    def ledgers(self) -> dict[str, dict[str, float]]:
        """Seconds by part and label. A part's labels sum to the run's wall clock (episodes: one clock per slot); "wait_start"
        is what passed before the part was there."""
        stats = self.parts.stats()
        found: dict[str, dict[str, float]] = {}
        if "engine" in stats:
            found["engine"] = {k: stats["engine"][k] for k in ("prefill", "decode", "swap", "score", "idle")}
        workers = [v["seconds"] for k, v in stats.items() if k.startswith("worker")]
        if workers:
            found["episodes"] = merge(workers)
        if "learner" in stats:
            found["learner"] = stats["learner"]
        for part, labels in found.items():
            clocks = self.config.rollout.in_flight if part == "episodes" else 1
            labels["wait_start"] = max(0.0, clocks * (time.monotonic() - self.began) - sum(labels.values()))
        self.counts = {
            k: stats.get("engine", {}).get(k, 0)
            for k in (
                "decoded_tokens",
                "prefilled_tokens",
                "reused_tokens",
                "shared_tokens",
                "swaps",
                "swaps_in_flight",
            )
        }
        self.paces = stats.get("engine", {}).get("paces", [])
        return found

    def _busy(self) -> dict[str, float]:
        now = self.ledgers()
        change = {
            part: {k: v - self._last.get(part, {}).get(k, 0.0) for k, v in labels.items()}
            for part, labels in now.items()
        }
        self._last = now
        slots = self.config.rollout.in_flight
        env = sum(change.get("episodes", {}).get(k, 0.0) for k in ("reset", "env"))
        total = sum(change.get("episodes", {}).values())
        return {
            "engine_busy": round(busy_share(change.get("engine", {})), 4),
            "env_busy": round(env / total * slots, 4) if total else 0.0,
            "learner_busy": round(busy_share(change.get("learner", {})), 4),
            "decoded_tokens": int(self.counts["decoded_tokens"] + self.before.get("decoded_tokens", 0)),
        }

    def finish(self, loop: Loop) -> str:
        """Export the model, write the report, and return the summary, whose last line names the bottleneck."""
        self.parts.learner.ask("export", str(self.directory / "model"), timeout=300)
        (self.directory / "model" / "tokenizer.json").write_bytes((self.config.model / "tokenizer.json").read_bytes())
        ledgers = self.ledgers()
        steps = [r for r in read(self.directory / "metrics.jsonl") if r["kind"] == "step"]
        trained = sum(r["trajectories"] for r in steps)
        mixed = sum(round(r["mixed"] * r["trajectories"]) for r in steps)
        lines = [
            f"{trained} trajectories trained, token ids asserted on every one; {mixed} hold tokens of two or more versions",
            f"engine and learner agreed within {max(r['parity'] for r in steps):.1e} nats after every publish (allowed 1e-4)",
            f"groups: {self.journal.counts()}; episodes lost to infrastructure: {loop.infra}",
            summary(ledgers),
            bottleneck(ledgers),
        ]
        text = "\n".join(lines)
        self.sink.write(
            "end",
            {
                "step": loop.step,
                "wall": round(time.monotonic() - self.began, 3),
                "ledgers": ledgers,
                "counts": self.counts,
                "paces": self.paces,
                "summary": text,
            },
        )
        write_report(self.directory, self.renderer)
        return text

    def interrupt(self, loop: Loop, *, whole: bool) -> None:
        """Ctrl-C: show what was done, and keep it where no update is half done."""
        if whole:
            self.checkpoint(loop)
        write_report(self.directory, self.renderer)

    def close(self) -> None:
        """Let go of the directory; may be called twice."""
        self._held.close()
