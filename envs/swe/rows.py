"""Rows of SWE-bench built, graded and compared: gold must be resolved, nothing must not, and swebench must say the same.

    row ─► image of its repository at its commit ─► gold, no-op ─► logs ─► swebench's own grader, swebench's own command line

Rows and clones are given by path. The repository's files are read from the clone's objects; its image gets a `.git` of one
commit. Results are appended to `OUT/results.jsonl`, one line a row, so a run that was killed goes on where it was.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from envs.errors import CodeworldError, InfraError
from envs.sandbox.archives import offer
from envs.sandbox.base import Backend
from envs.sandbox.imagestore import ImageStore
from envs.swe import images, log_grading, patches, peer, sources, swe_bench
from envs.swe.importers import Refused, load_rows
from envs.task import Task

EXPECTED = "gold resolved, no-op unresolved"


def validate_rows(
    rows: str | Path,
    repos: str | Path,
    out: str | Path,
    backend: Backend,
    *,
    ids: Iterable[str] | None = None,
    base: str = "codeworld-base",
    python: str = "",
    official: bool = False,
    report: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Build, grade and compare every row of a file; returns a record of each.

    Args:
        rows: file or hub id, as `load_rows` takes it.
        repos: directory of clones, named `owner__name`, `owner+name` or `name`, bare or not.
        out: directory for images, logs and `results.jsonl`.
        backend: native; images are built and rows graded in it.
        ids: only these rows; None: all.
        base: Docker image or archive that images are built on; it needs bash, git and Python with `venv`.
        python: one that has swebench 5, which grades the same logs; "": this one, where it has it.
        official: also run `swebench eval` on the images, in a Docker engine, for gold and no-op.

    Rows that can't be a task or built are "refused", those whose sandbox failed "infra", which the next run tries again.
    A record has id, expected, outcome, met, why (as `python -m envs validate --json`), `seconds` of each part, `peer`:
    "same", "differs" or "skipped: why", and where asked for `official`: "same", or what else came of it, which is not met.
    Records of another base or of other checks don't count. Raises `ValueError` for files that can't be read.
    """
    out, wanted = Path(out), set(ids) if ids is not None else None
    found = load_rows(rows, "swe_bench", report)
    if wanted and (missing := wanted - {row.id for row in found}):
        raise ValueError(f"{rows}: no row {', '.join(sorted(missing))}; see the ids in it")
    (out / "logs").mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    asked = [base, python, official]
    done = {record["id"]: record for record in _read(results) if record.get("asked") == asked}
    store, builder = ImageStore(out / "images"), _Builder(Path(repos), out, backend, base)
    offer(store.directory)
    tasks = {row.id for row in found if isinstance(row, Task)}
    records = []
    for row in found:
        if wanted is not None and row.id not in wanted:
            continue
        name = f"row {row.row} {row.id}".strip() if isinstance(row, Refused) and row.id in tasks | {""} else row.id
        if name not in done:
            if isinstance(row, Refused):
                done[name] = _refused(name, row.why)
            else:
                done[name] = _validated(row, builder, backend, out, python, official)
            done[name]["asked"] = asked
            if done[name]["outcome"] != "infra":  # else it is tried again by the next run
                with results.open("a") as file:
                    file.write(json.dumps(done[name]) + "\n")
            report(_line(done[name]))
        records.append(done[name])
    report(f"{_counts(records)} of {len(records)} rows; logs in {out / 'logs'}")
    return records


def _counts(records: Sequence[Mapping[str, Any]]) -> str:
    """How many rows ended in which way."""
    counts: dict[str, int] = {}
    for record in records:
        kind = "as expected" if record["met"] else str(record["outcome"])
        counts[kind] = counts.get(kind, 0) + 1
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())) or "0"


def _read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a results file; one that a kill cut is left out, and cut off."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        path.write_bytes(whole)
    return [json.loads(line) for line in whole.splitlines()]


def _line(record: Mapping[str, Any]) -> str:
    spent = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in record["seconds"].items())
    return f"{'ok' if record['met'] else 'NOT'} {record['id']}: {record['outcome']}; peer {record['peer']}; {spent}{'; ' if record['why'] else ''}{record['why']}"


def _refused(name: str, why: str) -> dict[str, Any]:
    return {
        "id": name,
        "expected": EXPECTED,
        "outcome": "refused",
        "met": False,
        "why": why,
        "peer": "skipped: refused",
        "seconds": {},
    }


class _Builder:
    """Makes the images of rows, from clones."""

    def __init__(self, repos: Path, out: Path, backend: Backend, base: str) -> None:
        self.repos, self.out, self.backend, self._name, self._base = repos, out, backend, base, ""
        self.store = ImageStore(out / "images")

    def clone(self, repo: str) -> Path:
        """The clone of a repository. Raises `ValueError`."""
        names = [repo.replace("/", "__"), repo.replace("/", "+"), repo.rpartition("/")[2]]
        for name in names:
            for path in (self.repos / name, self.repos / name / "repo", self.repos / f"{name}.git"):
                if (path / "HEAD").is_file() or (path / ".git").exists():
                    return path
        raise ValueError(f"{self.repos}: no clone of {repo}; clone it to {self.repos / names[0]}")

    def image(self, task: Task) -> tuple[str, str]:
        """The image of a row, and what could not be installed. Raises `ValueError`, one line."""
        repo, commit = task.provenance["repo"], task.provenance["commit"]
        known = swe_bench.REPOSITORIES.get(repo)
        if known is None:
            raise ValueError(f"no recipe for {repo}; rows of {', '.join(swe_bench.REPOSITORIES)} can be built")
        source = sources.fetch(f"{self.clone(repo)}@{commit}", self.out / "cache")
        self._base = self._base or self.store.add_base(self._name)
        env = images.environment(
            self.store, self._base, source, self.backend, cache=self.out / "cache", needs=known.needs
        )
        digest = images.task_image(self.store, env.digest, {**source.tree(), **env.made}, {})
        return digest, "; ".join(env.dropped)


def _validated(
    task: Task, builder: _Builder, backend: Backend, out: Path, python: str, official: bool
) -> dict[str, Any]:
    record: dict[str, Any] = _refused(task.id, "")
    seconds: dict[str, float] = record["seconds"]
    begun = time.monotonic()

    def lap(what: str) -> None:
        nonlocal begun
        seconds[what], begun = round(time.monotonic() - begun, 2), time.monotonic()

    try:
        if not task.base:
            base, record["dropped"] = builder.image(task)
            task = swe_bench.with_image(task, base)
        lap("build")
        gold = patches.patch_changes(task, task.blob(task.grader.gold_patch, "gold patch").decode(), backend)
        if gold.why:
            raise ValueError(f"gold: {gold.why}")
        log_grading.test_files(task, backend)
        lap("prepare")
        made = {}
        for name, changes in (("gold", gold.changes), ("no-op", {})):
            made[name] = log_grading.evaluate(task, changes, backend)
            lap(name)
            (out / "logs" / f"{task.id}.{name}.txt").write_text(made[name][0].log)
    except (ValueError, CodeworldError) as error:
        outcome = "infra" if isinstance(error, InfraError) else "refused"
        return {**record, "outcome": outcome, "why": " ".join(str(error).split())}
    outcomes = {name: verdict.outcome for name, (verdict, _) in made.items()}
    record["outcome"] = ", ".join(f"{name} {outcome}" for name, outcome in outcomes.items())
    record["peer"] = peer.regrade(
        task, {name: (verdict.log, report.resolved) for name, (verdict, report) in made.items()}, python
    )
    right = {"gold": "resolved", "no-op": "unresolved"}
    wrong = [f"{name}: {verdict.why}" for name, (verdict, _) in made.items() if outcomes[name] != right[name]]
    if wrong and record.get("dropped"):
        wrong.append(f"not installed: {record['dropped']}")
    record["why"] = "; ".join(wrong)
    record["image"] = task.base
    if official:
        found = {name: report.resolved for name, (_, report) in made.items()}
        record["official"] = _command_line(task, found, out, python, seconds)
        if record["official"] != "same":
            record["why"] = "; ".join([*wrong, f"swebench eval: {record['official']}"])
    agreed = record["peer"] != "differs" and record.get("official", "same") == "same"
    record["met"] = record["outcome"] == EXPECTED and agreed
    return record


def _command_line(task: Task, ours: Mapping[str, bool], out: Path, python: str, seconds: dict[str, float]) -> str:
    """Whether `swebench eval` says of gold and of nothing what the official rule says here; what it took goes into `seconds`."""
    tried = {"gold": task.blob(task.grader.gold_patch, "gold patch").decode(), "no-op": peer.NOTHING}
    for name, patch in tried.items():
        prediction = swe_bench.Prediction(instance_id=task.id, model_patch=patch, model_name_or_path=name)
        place, began = out / "official" / f"{task.id}.{name}", time.monotonic()
        try:
            word = peer.official_eval(
                [task], [prediction], python=python, seconds=task.grader.seconds, directory=place
            )[task.id]
        except (ValueError, InfraError, subprocess.TimeoutExpired) as error:
            return f"skipped: {' '.join(str(error).split())[:150]}"
        seconds[f"swebench eval, {name}"] = round(time.monotonic() - began, 2)
        if word.startswith("error"):
            return word
        if (word == "resolved") != ours[name]:
            return "differs"
    return "same"
