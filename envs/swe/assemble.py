"""A candidate whose image is made becomes a task: which tests count, and what the task says of itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from envs.sandbox.base import Limits
from envs.swe.candidate import Candidate
from envs.swe.install import TESTBED
from envs.swe.sentinels import base_id
from envs.swe.sources import Source
from envs.task import Grader, Task, sha256

LIMITS = Limits(memory_mb=1024, disk_mb=256, pids=128)
"""Of a task's sandbox."""
SECONDS = 30.0
"""Wall clock after which a grading hangs; it takes one to two seconds."""
SUITE_SECONDS = 0.3
"""Wall clock of the tests of one grading that notice the bug, the quickest first, one at least; and as much of other tests."""


def chosen(failing: Sequence[str], kept: Sequence[str], seconds: Mapping[str, float]) -> tuple[list[str], list[str]]:
    """Of the failing tests those that a repair has to make pass, and of the kept ones, of the same files first, those that it
    must not break: the quickest ones that fit.

    seconds: test function → wall clock of its tests; test file → that of collecting it (`Discovery.seconds`).
    """

    def file(test: str) -> str:
        return test.partition("::")[0]

    def rank(function: str) -> tuple[bool, float, str, float, str]:
        path = file(function)
        return path not in first, seconds.get(path, 0.0), path, seconds.get(function, 0.0), function

    spent, broken = 0.0, set[str]()
    for function in sorted(
        {base_id(test) for test in failing}, key=lambda function: (seconds.get(function, 0.0), function)
    ):
        spent += seconds.get(function, 0.0)
        if broken and spent > SUITE_SECONDS:
            break
        broken.add(function)
    first = {file(function) for function in broken}
    spent, functions, files = 0.0, set(broken), set(first)
    for function in sorted({base_id(test) for test in kept} - {base_id(test) for test in failing}, key=rank):
        path = file(function)
        more = seconds.get(function, 0.0) + (0.0 if path in files else seconds.get(path, 0.0))
        if spent + more <= SUITE_SECONDS:
            spent += more
            functions.add(function)
            files.add(path)
    return [t for t in failing if base_id(t) in broken], [t for t in kept if base_id(t) in functions]


def make_task(
    source: Source,
    candidate: Candidate,
    text: str,
    base: str,
    command: str,
    kept: Sequence[str],
    failing: Sequence[str],
    hidden: Mapping[str, bytes | None],
) -> Task:
    """The task of a candidate whose image is made."""
    contents = [data for data in (*hidden.values(), *candidate.fixed.values()) if data is not None]
    grader = Grader(
        command=command,
        expected=dict.fromkeys(sorted([*failing, *kept]), "pass"),
        seconds=SECONDS,
        fail_to_pass=tuple(sorted(failing)),
        hidden={path: None if data is None else sha256(data) for path, data in hidden.items()},
        gold={path: None if data is None else sha256(data) for path, data in candidate.fixed.items()},
    )
    return Task(
        id=f"{source.name}-{candidate.id}".replace("/", "__"),
        prompt=text,
        base=base,
        workdir=TESTBED,
        limits=LIMITS,
        grader=grader,
        provenance={"source": source.origin, "version": source.version, "commit": candidate.commit or source.commit}
        | dict(candidate.provenance),
        blobs={sha256(data): data for data in contents},
    )
