"""What a run leaves behind: its directory, and everything that is written there.

    runs/<name>/  recipe.toml      the resolved recipe
                  journal.sqlite   what became of every group
                  metrics.jsonl, tensorboard/ or wandb/ (`track`)
                  trajectories/    step-000012.jsonl: every trajectory of the batch, with ids, masks, log-probs, versions
                  evaluations/     validation-000010.jsonl
                  checkpoints/     step-000040/: the learner's whole state
                  model/           the policy as it is at the end
                  report.html      curves, ledger, summary

The loop decides; this file only writes, counts and shows. A run directory is locked while a run uses it.
"""

from __future__ import annotations

import errno
import shutil
import sqlite3
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from envs.errors import InfraError
from policy import renderer
from policy.torch_engine import COUNTS
from rl import checkpoint
from rl.batch import BatchReport
from rl.config import Config, dump
from rl.journal import Journal, RunLock
from rl.ledger import Account, bottleneck, busy_share, relabel, summary
from rl.metrics import Sink, by_source, read, truncate
from rl.parts import Parts
from rl.report import write_report
from rl.view import View

_FULL = (errno.ENOSPC, errno.EDQUOT)

if TYPE_CHECKING:
    from agents.trajectory import Group
    from rl.loop import Loop, _Evaluation


def full_disk(error: BaseException, directory: Path) -> InfraError | None:
    """What to say where the run failed because its disk is full, which may show as any error; None where it isn't."""
    seen: BaseException | None = error
    full = False
    while seen is not None and not full:
        full = getattr(seen, "errno", None) in _FULL or getattr(seen, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
        seen = seen.__cause__ or seen.__context__
    probe = directory / "probe"
    try:
        probe.write_bytes(bytes(checkpoint.PROBE))
    except OSError as failed:
        full = full or failed.errno in _FULL
    finally:
        probe.unlink(missing_ok=True)
    free = shutil.disk_usage(directory if directory.exists() else "/").free / 1e6
    return InfraError(f"the disk of {directory} is full ({free:.1f} MB free): make room there") if full else None


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
        self.renderer = renderer.load(config.model)
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
        aside = self.directory / "recipe.tmp"  # one rename, as a kill may come at any time
        aside.write_text(dump(self.config))
        aside.rename(self.directory / "recipe.toml")
        self.sink = self._held.enter_context(
            closing(Sink(self.directory, self.config.track, behind=self.surviving_step))
        )
        slots = self.config.rollout.in_flight // self.config.rollout.workers
        self.accounts = {
            name: Account(self.began, slots if name == "episodes" else 1)
            for name in ("engine", "episodes", "learner", "loop")
        }
        self._ask()
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
            "branches": report.branches,
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
        row |= self._busy(loop)
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
        with loop.ledger.spend("checkpoint"):
            checkpoint.write(
                self.checkpoints,
                loop.step,
                lambda path: learner.ask("save", str(path), timeout=300),
                keep=self.config.keep_checkpoints,
            )
        self.journal.forget(checkpoint.steps(self.checkpoints)[0])

    # ------------------------------------------------------------------ ledger and end

    def _ask(self) -> dict[str, Any]:
        """Let every part say where its time went; returns the engine's statistics."""
        stats = self.parts.stats()
        for name, (said, when) in stats.items():
            self.accounts["episodes" if name.startswith("worker") else name].tell(
                name, said["seconds"], when, said.get("pid", 0)
            )
        return stats["engine"][0] if "engine" in stats else {}

    def ledgers(self, loop: Loop) -> dict[str, dict[str, float]]:
        """Seconds by component and label. A component's labels sum to the run's wall clock (episodes: one clock per slot);
        `wait_start` is what passed before it was there."""
        self.counts = self._ask()
        self.accounts["loop"].tell("loop", loop.ledger.snapshot(), time.monotonic())
        found = {name: account.seconds() for name, account in self.accounts.items()}
        found["episodes"] = relabel(found["episodes"], "idle", "wait_staleness", loop.vacant.read())
        unproven = loop.stage.snapshot()["publish"] - found["learner"].get("publish", 0.0)
        found["learner"] = relabel(found["learner"], "idle", "wait_publish", unproven)
        return found

    @property
    def unexplained(self) -> float:
        """Largest share of any component's wall clock that has no label."""
        return max(account.unexplained() for account in self.accounts.values())

    def _busy(self, loop: Loop) -> dict[str, float]:
        now = self.ledgers(loop)
        change = {
            part: {k: v - self._last.get(part, {}).get(k, 0.0) for k, v in labels.items()}
            for part, labels in now.items()
        }
        self._last = now
        env = change["episodes"].get("reset", 0.0) + change["episodes"].get("env", 0.0)
        total = sum(change["episodes"].values())
        return {
            "engine_busy": round(busy_share(change["engine"]), 4),
            "env_busy": round(env / total * self.config.rollout.in_flight, 4) if total else 0.0,
            "learner_busy": round(busy_share(change["learner"]), 4),
            "unexplained": round(self.unexplained, 6),
            "decoded_tokens": int(self.counts.get("decoded_tokens", 0) + self.before.get("decoded_tokens", 0)),
        }

    def finish(self, loop: Loop) -> str:
        """Export the model, write the report, and return the summary, whose last line names the bottleneck."""
        self.parts.learner.ask("export", str(self.directory / "model"), timeout=300)
        renderer.copy_files(self.config.model, self.directory / "model")
        ledgers = self.ledgers(loop)
        steps = [r for r in read(self.directory / "metrics.jsonl") if r["kind"] == "step"]
        trained = sum(r["trajectories"] for r in steps)
        mixed = sum(round(r["mixed"] * r["trajectories"]) for r in steps)
        lines = [
            f"{trained} trajectories trained, token ids asserted on every one; {mixed} hold tokens of two or more versions",
            f"engine and learner agreed within {max(r['parity'] for r in steps):.1e} nats after every publish (allowed 1e-4)",
            f"groups: {self.journal.counts()}; episodes lost to infrastructure: {loop.infra}",
            summary(ledgers),
            f"labels miss the wall clock by {self.unexplained:.2%} at most",
            bottleneck(ledgers),
        ]
        text = "\n".join(lines)
        self.sink.write(
            "end",
            {
                "step": loop.step,
                "wall": round(time.monotonic() - self.began, 3),
                "ledgers": ledgers,
                "counts": {k: self.counts.get(k, 0) for k in COUNTS},
                "paces": self.counts.get("paces", []),
                "unexplained": round(self.unexplained, 6),
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
