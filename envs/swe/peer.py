"""swebench itself as the peer: its grader on our logs, and its command line on our images, each in a child process.

It stays out of this process because it lowers the process's limits, imports half a gigabyte and writes below the current
directory.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from envs.sandbox.bases import find_base
from envs.sandbox.engine import engine_image
from envs.swe.swe_bench import Prediction, save_predictions
from envs.task import Task

_GRADER = """
import json, os, sys, tempfile
from swebench.harness.grading import get_eval_report
from swebench.types import TestSpec
given = json.load(sys.stdin)
spec = TestSpec(given["id"], "", [], "", "", given["f2p"], given["p2p"], "parse_log_" + given["parser"], "pass_and_fail")
answers = []
for log in given["logs"]:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(log)
        file.flush()
        made = get_eval_report(spec, {"instance_id": given["id"], "model_patch": "x"}, file.name, include_tests_status=False)
    answers.append(made[given["id"]]["resolved"])
print(json.dumps(answers))
"""


def regrade(task: Task, logs: Mapping[str, tuple[str, bool]], python: str) -> str:
    """Whether swebench's own grader says of logs what the official rule says here: "same", "differs" or "skipped: why".

    logs: name → (log, resolved here). python: an interpreter that has swebench; "": this one.
    """
    grader = task.grader
    keeps = [t for t in grader.expected if t not in set(grader.fail_to_pass)]
    given = {"id": task.id, "f2p": grader.fail_to_pass, "p2p": keeps, "parser": grader.parser}
    try:
        done = _child(
            [python or sys.executable, "-c", _GRADER],
            json.dumps({**given, "logs": [log for log, _ in logs.values()]}),
            300.0,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"skipped: {error}"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        return f"skipped: {last[:150]}"
    answers = json.loads(done.stdout.splitlines()[-1])
    return "same" if answers == [resolved for _, resolved in logs.values()] else "differs"


def _child(
    command: Sequence[str], given: str, seconds: float, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """A child process of its own: swebench lowers its process's limits and writes below its directory."""
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH",)}
    return subprocess.run(list(command), input=given, capture_output=True, text=True, timeout=seconds, cwd=cwd, env=env)


NOTHING = "diff --git a/nothing.txt b/nothing.txt\nnew file mode 100644\n--- /dev/null\n+++ b/nothing.txt\n@@ -0,0 +1 @@\n+nothing\n"
"""A patch that repairs nothing: an empty one is not run by swebench."""


def official_eval(
    tasks: Iterable[Task],
    predictions: Iterable[Prediction],
    *,
    python: str = "",
    seconds: float = 1800.0,
    jobs: int = 1,
    directory: Path | None = None,
) -> dict[str, str]:
    """Run `swebench eval` on tasks' images and scripts; returns id → "resolved", "unresolved" or "error: why".

    Args:
        tasks: whose base is an image of a local Docker engine, or is offered to it; those without a prediction are left out.
        predictions: one for each id.
        python: an interpreter that has swebench 5; "": this one. Raises `ValueError` where it has none.
        seconds: of one script. directory: where swebench's own logs are kept; None: nowhere.
    """
    made = {p.instance_id: p for p in predictions}
    chosen = [task for task in tasks if task.id in made]
    with tempfile.TemporaryDirectory(prefix="codeworld-swebench-") as scratch, _Engine() as images:
        place = directory or Path(scratch)
        place.mkdir(parents=True, exist_ok=True)
        rows = [row_of(task, images.bring(task.base)) for task in chosen]
        (place / "rows.json").write_text(json.dumps(rows))
        save_predictions(place / "predictions.jsonl", [made[task.id] for task in chosen])
        run = f"codeworld{os.getpid()}"
        command = [python or sys.executable, "-c", "from swebench.cli.cli import app; app()", "eval", "rows.json"]
        command += ["-p", "predictions.jsonl", "--run-id", run, "-j", str(jobs), "-t", str(int(seconds))]
        done = _child(command, "", seconds * (len(chosen) + 1), place)
        if "No module named 'swebench'" in done.stderr:
            raise ValueError(
                f"{command[0]} has no swebench; pip install 'swebench==5.0.2' there, or name another Python"
            )
        last = (done.stderr.strip().splitlines() or ["no word"])[-1][:150]
        found = {}
        for task in chosen:
            reports = list(place.glob(f"logs/run_evaluation/{run}/*/{task.id}/report.json"))
            answer = json.loads(reports[0].read_text())[task.id] if reports else None
            found[task.id] = f"error: {last}" if answer is None else "resolved" if answer["resolved"] else "unresolved"
        return found


def row_of(task: Task, image: str) -> dict[str, object]:
    """A task as a row of SWE-bench 5."""
    grader = task.grader
    return {
        "instance_id": task.id,
        "repo": task.provenance.get("repo", ""),
        "version": task.provenance.get("version", ""),
        "image": image,
        "eval_script": task.blob(grader.script, "script").decode(),
        "log_parser": f"parse_log_{grader.parser}",
        "eval_type": "pass_and_fail",
        "FAIL_TO_PASS": list(grader.fail_to_pass),
        "PASS_TO_PASS": [t for t in grader.expected if t not in set(grader.fail_to_pass)],
        "patch": task.blob(grader.gold_patch, "gold patch").decode() if grader.gold_patch else "",
        "problem_statement": task.prompt,
    }


class _Engine:
    """The local Docker engine; what was brought into it is removed at the end."""

    def __enter__(self) -> _Engine:
        import docker

        self.client = docker.from_env()
        self.known = {image["Id"] for image in self.client.api.images(all=True)}
        self.brought: set[str] = set()
        return self

    def bring(self, base: str) -> str:
        """The engine's name for a base, which is loaded where it is not there."""
        name = str(engine_image(self.client, base, find_base(base)).id)
        self.brought |= {name} - self.known
        return name

    def __exit__(self, *_: object) -> None:
        for name in self.brought:
            with contextlib.suppress(Exception):  # in use, or gone already
                self.client.images.remove(name)
        self.client.close()


def disagreements(official: Mapping[str, str], ours: Mapping[str, str]) -> list[str]:
    """Ids on which swebench and we differ, where ours counts `invalid` and `timeout` as not resolved."""
    return [name for name, word in official.items() if (word == "resolved") != (ours.get(name) == "resolved")]
