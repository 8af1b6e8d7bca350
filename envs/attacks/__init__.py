"""An attack suite for sandboxes and graders: every backend of the protocol, this suite's or a third party's, and every
function that judges attempts can be put through it.

>>> from envs.attacks import run_suite                                     # doctest: +SKIP
>>> from envs.sandbox import make_backend                                  # doctest: +SKIP
>>> [o.verdict for o in run_suite(make_backend("native"), ["isolation"])]  # doctest: +SKIP
['contained', ...]

A case attacks from inside (bash, small programs) and is judged from the host where that is possible. What an unisolated
backend would turn against this host is not run on it (`Stage.exposed`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from envs.attacks import grading, incidents, isolation, leakage, protocol, resources, tools
from envs.attacks.stage import Breach, Case, NotRun, Outcome, Stage
from envs.errors import InfraError, Unsupported, nearest
from envs.sandbox.base import Backend
from envs.swe.grading import Grade, grade

GROUPS: dict[str, list[Case]] = {
    "isolation": isolation.CASES,
    "resources": resources.CASES,
    "grading": grading.CASES + incidents.CASES,
    "leakage": leakage.CASES,
    "tools": tools.CASES + protocol.CASES,
}
"""Group name → its cases, in the order of the list."""


def select(groups: Sequence[str] | None = None, ids: Sequence[str] | None = None) -> list[Case]:
    """The cases of these groups with these ids (None: all). Raises `ValueError` for a name that there is not."""
    for name in groups or ():
        if name not in GROUPS:
            raise ValueError(f"--group {name}: known are {', '.join(GROUPS)}.{nearest(name, GROUPS)}")
    known = {case.id: case for name, cases in GROUPS.items() for case in cases if not groups or name in groups}
    for name in ids or ():
        if name not in known:
            raise ValueError(
                f"--case {name}: no such case in {', '.join(groups or GROUPS)}; known are {', '.join(known)}"
            )
    return [case for name, case in known.items() if not ids or name in ids]


def run_case(case: Case, stage: Stage) -> Outcome:
    """Run one case. Never raises for what the backend does: an error that a case does not expect is a breach."""
    began = time.perf_counter()
    try:
        if not case.harmless:
            stage.isolated()
        verdict, why = "contained", case.attack(stage)
    except Breach as error:
        verdict, why = "breached", str(error)
    except (NotRun, Unsupported) as error:
        verdict, why = "not run", str(error)
    except InfraError as error:
        verdict, why = "breached", f"the sandbox failed: {error}"
    except Exception as error:  # a backend that breaks is not one that contains
        verdict, why = "breached", f"{type(error).__name__}: {error}"
    finally:
        stage.end_case()
    return Outcome(case=case, verdict=verdict, why=" ".join(why.split()), seconds=time.perf_counter() - began)  # type: ignore[arg-type]


def run_suite(
    backend: Backend,
    groups: Sequence[str] | None = None,
    *,
    ids: Sequence[str] | None = None,
    grade: Grade = grade,
    report: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Run the cases of `groups` (None: all) with these `ids` (None: all) against `backend`, which stays open.

    grade: the grader under attack in group "grading". `report` is called with each outcome as it comes. Raises `ValueError` for an unknown group or id.
    """
    stage, outcomes = Stage(backend, grade), []
    try:
        for case in select(groups, ids):
            outcomes.append(run_case(case, stage))
            report(outcomes[-1])
    finally:
        stage.close()
    return outcomes


__all__ = ["GROUPS", "Breach", "Case", "NotRun", "Outcome", "Stage", "run_case", "run_suite", "select"]
