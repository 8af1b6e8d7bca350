"""Every case of the attack suite on both backends, and proof that the suite can fail."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from envs.__main__ import main
from envs.attacks import GROUPS, Breach, Case, NotRun, Stage, run_case, run_suite, select
from envs.errors import InfraError, Unsupported, user_errors
from envs.sandbox import Backend, Sandbox, cgroups, make_backend
from envs.swe.grading import Verdict

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = [pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("native", "docker")]
CASES = select()
QUICK_DOCKER = ("C16", "C20", "F2")
"""Of the grading group on docker, what is run with the quick tests: a container starts in a tenth of a second and more."""


@pytest.fixture(scope="module", params=BACKENDS)
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    backend = make_backend(request.param)
    made = Stage(backend)
    yield made
    made.close()
    backend.close()


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_contained(stage: Stage, case: Case) -> None:
    if case in GROUPS["grading"] and stage.backend.name == "docker" and case.id not in QUICK_DOCKER:
        pytest.skip("a slow test: see below")
    check(stage, case)


@pytest.mark.slow
@pytest.mark.docker
def test_grading_on_docker_too() -> None:
    backend = make_backend("docker")
    stage = Stage(backend)
    try:
        for case in GROUPS["grading"]:
            check(stage, case)
    finally:
        stage.close()
        backend.close()


def check(stage: Stage, case: Case) -> None:
    outcome = run_case(case, stage)
    if outcome.verdict == "not run" and case.id == "B8" and cgroups.hierarchy() is None:
        pytest.skip(outcome.why)
    assert (outcome.verdict, outcome.case) == ("contained", case), outcome.why
    assert outcome.why and "\n" not in outcome.why


def test_the_list_is_whole() -> None:
    ids = [case.id for case in CASES]
    expected = [f"A{n}" for n in range(1, 13)] + [f"B{n}" for n in range(1, 15)]
    expected += [f"C{n}" for n in range(1, 21)] + [f"F{n}" for n in range(1, 4)] + [f"I{n}" for n in range(1, 8)]
    assert ids == expected + [f"D{n}" for n in range(1, 9)] + [f"E{n}" for n in range(1, 13)]
    assert all(case.title and case.expectation and "\n" not in case.expectation for case in CASES)
    assert list(GROUPS) == ["isolation", "resources", "grading", "leakage", "tools"]


# ---- the suite can fail ----


def beside(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


leaky, naive = beside("leaky"), beside("naive")
OPEN = ("A1", "A6", "A7", "D4", "D6", "D7", "B12")
"""Harmless cases that an unisolated backend must fail."""


def test_a_leaky_backend_is_breached_and_nothing_dangerous_runs_on_it() -> None:
    assert all(case.harmless for case in select(ids=OPEN))
    outcomes = {outcome.case.id: outcome for outcome in run_suite(leaky.LeakyBackend(), ids=OPEN)}
    assert {name: outcome.verdict for name, outcome in outcomes.items()} == dict.fromkeys(OPEN, "breached")
    assert "file was changed" in outcomes["A1"].why and "host heard" in outcomes["D4"].why, outcomes


def test_dangerous_cases_do_not_run_where_the_host_is_in_sight() -> None:
    ran: list[str] = []

    def attack(stage: Stage) -> str:
        ran.append("dangerous")
        return "done"

    def guarded(stage: Stage) -> str:
        stage.isolated()
        return attack(stage)

    stage = Stage(leaky.LeakyBackend())
    for harmless, function in ((False, attack), (True, guarded)):
        case = Case(id="X1", title="t", expectation="e", attack=function, harmless=harmless)
        outcome = run_case(case, stage)
        assert outcome.verdict == "not run" and "files and processes" in outcome.why and not ran
    stage.close()
    for case in select():
        if not case.harmless:
            assert run_case(case, Stage(_Blind())).verdict == "not run"


class _Blind(leaky.LeakyBackend):  # type: ignore[misc, name-defined]
    """A backend whose sandboxes run nothing at all: what can't be looked at is not attacked."""

    def create(self, **options: object) -> object:
        sandbox = super().create()
        sandbox.run = lambda script, **_: leaky.Result(exit=1, cause="exit", head=b"")
        return sandbox


PAID = ("C1", "C2", "C3", "C4", "C5", "C8", "C10", "C12", "C13", "F1", "F2", "F3", "I3", "I5")
"""Cases whose first patch a text-trusting grader in the agent's box pays."""


@pytest.mark.native
def test_a_naive_grader_is_breached() -> None:
    backend = make_backend("native")
    try:
        outcomes = run_suite(backend, ["grading"], ids=PAID, grade=naive.grade)
        refusing = run_suite(backend, ["grading"], ids=("F1",), grade=lambda *_: Verdict(outcome="unresolved"))
    finally:
        backend.close()
    assert {o.case.id: o.verdict for o in outcomes} == dict.fromkeys(PAID, "breached"), outcomes
    assert all("resolved, reward 1" in o.why for o in outcomes)
    assert refusing[0].verdict == "breached" and "the right solution is graded unresolved" in refusing[0].why


class _Broken:
    """The native backend with one promise broken: it ignores `limits`, or `kill_all` and `close` do nothing."""

    name = "broken"

    def __init__(self, backend: Backend, promise: str) -> None:
        self.backend, self.promise = backend, promise

    def create(self, **options: Any) -> Sandbox:
        if self.promise == "limits":
            return self.backend.create(**{**options, "limits": None})
        sandbox: Any = self.backend.create(**options)
        sandbox.kill_all = sandbox.close = lambda: None
        return cast("Sandbox", sandbox)

    def close(self) -> None:
        self.backend.close()


@pytest.mark.native
@pytest.mark.root
@pytest.mark.parametrize(
    ("promise", "ids", "said"),
    [
        ("limits", ("B1", "B3", "B5"), ("with a limit of 16", "limit of 8 MiB", "other bytes")),
        ("close", ("B7", "B13"), ("left after kill_all", "left after close")),
    ],
)
def test_a_broken_promise_is_a_breach(
    promise: str, ids: tuple[str, ...], said: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("envs.attacks.resources.GRACE", 1.0)  # what is waited for does not come
    broken = _Broken(make_backend("native"), promise)
    try:
        outcomes = run_suite(broken, ids=ids)
    finally:
        broken.close()
    assert [outcome.verdict for outcome in outcomes] == ["breached"] * len(ids), outcomes
    assert all(text in outcome.why for text, outcome in zip(said, outcomes, strict=True)), outcomes


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (Breach("open"), "breached"),
        (NotRun("no kernel"), "not run"),
        (Unsupported("no limit"), "not run"),
        (InfraError("dead"), "breached"),
        (KeyError("x"), "breached"),
        (None, "contained"),
    ],
)
def test_outcomes(error: Exception | None, verdict: str) -> None:
    undone: list[int] = []

    def attack(stage: Stage) -> str:
        stage.after(lambda: undone.append(1))
        if error:
            raise error
        return "seen"

    case = Case(id="X1", title="t", expectation="e", attack=attack, harmless=True)
    outcome = run_case(case, Stage(leaky.LeakyBackend()))
    assert outcome.verdict == verdict and undone == [1]
    row = outcome.to_json()
    assert row["expected"] == "e" and row["met"] is {"contained": True, "breached": False}.get(verdict)
    assert row["outcome"] == (f"skipped: {outcome.why}" if verdict == "not run" else verdict)


# ---- the command ----


@pytest.mark.native
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "attack.json"
    assert main(["attack", "--backend", "native", "--case", "A2", "E12", "--json", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[1].startswith("A2 ") and "contained" in lines[1]
    assert lines[-1].startswith("2 cases on native") and "2 contained, 0 breached, 0 not run" in lines[-1]
    found = json.loads(file.read_text())
    assert found["ok"] and [row["id"] for row in found["cases"]] == ["A2", "E12"] and found["cases"][0]["met"]


def test_a_breach_is_status_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("envs.sandbox.make_backend", lambda name: leaky.LeakyBackend())
    assert main(["attack", "--case", "D6"]) == 1
    assert "1 breached" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--group", "isolatoin"], "Did you mean 'isolation'"),
        (["--group", "reward"], "known are isolation, resources, grading, leakage, tools"),
        (["--case", "A99"], "no such case"),
        (["--group", "tools", "--case", "A1"], "no such case in tools"),
        (["--backend", "dokcer"], "Did you mean 'docker'"),
    ],
)
def test_bad_use_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert user_errors(lambda: main(["attack", *arguments])) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1


def test_help_has_an_example() -> None:
    done = subprocess.run([sys.executable, "-m", "envs", "attack", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "example" in done.stdout and "--group" in done.stdout
