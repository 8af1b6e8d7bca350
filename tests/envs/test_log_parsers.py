"""Log parsers and the official rule: logs of our own with the verdicts they must get, and swebench 5.0.2 as the oracle.

SWE_LOGS=DIR[:DIR…] pytest tests/envs/test_log_parsers.py     # compares on every file below these directories, too
"""

from __future__ import annotations

import importlib.util
import os
import random
import time
from pathlib import Path

import pytest

from envs.swe import log_parsers
from envs.swe.log_parsers import END, EXIT, PARSERS, START, Report, official, parser_name

PIECES = """PASSED FAILED SKIPPED ERROR XFAIL XPASS ERRORS PASSED: ok OK F E [100%] [3] [31m \x1b[32m [0m - - ::
 tests/test_a.py::test_x tests/test_a.py::TestB::test_y[1-2] test_z[/tmp/a/b] test_z[//x] test_z[a*/b] test_w[log(photon
 test_w[log(photon)] ___ _ .py:test_q sympy/core/tests/test_a.py:test_q test_one test_two (admin.Tests) ... ...ok FAIL:
 ERROR: FAIL skipped MouseButton.LEFT MouseButton.RIGHT test_c[MouseButton.LEFT] silenced). silenced) [a[b]c] a:b
 test_d[x]tail"""
PHRASES = (
    " ... ok",
    " ...  OK",
    " ... FAIL",
    " ... ERROR",
    " ... skipped 'why'",
    " ... Testing against Django installed in '/x' silenced).\nok",
    " ... Internal Server Error: /admin/\nok",
    " ... System check identified no issues (0 silenced)\nok",
    "--version is equivalent to version ... ok",
    "Applying sites.0002_alter_domain_unique...test_no_migrations (x.Y) ... ok",
    "FAILED tests/test_a.py::test_x - assert 1 == 2",
    "PASSED tests/test_a.py::test_x",
    "tests/test_a.py::test_x PASSED [ 10%]",
    "\t",
    "\r",
    "\r\n",
    "\x0b",
    "\x85",
)


def fuzzed(rng: random.Random) -> str:
    """A log of lines that look like what some parser reads, with odd blanks between."""
    lines = []
    for _ in range(rng.randrange(12)):
        words = [rng.choice(PIECES.split() if rng.random() < 0.8 else PHRASES) for _ in range(rng.randrange(6))]
        lines.append(rng.choice(("", "", " ", "  ")) + rng.choice((" ", " ", " ", "  ", "")).join(words))
    return "\n".join(lines) + rng.choice(("", "\n"))


def marked(log: str, rng: random.Random) -> str:
    """The log between markers as a script prints them; sometimes torn."""
    parts = [
        "+ git apply -\n",
        f"+ : '{START}'\n",
        log,
        f"\n+ : '{END}'\n",
        f"{EXIT}: {rng.choice((0, 0, 1, 2, -9))}\n",
    ]
    if rng.random() < 0.3:
        parts[rng.randrange(5)] = rng.choice(
            ("", START, END, ">>>>> Tests Timed Out", f"{EXIT}: 0\n", "Tests:  3 passed")
        )
    return "".join(parts)


@pytest.fixture(scope="module")
def swebench():
    if not importlib.util.find_spec("swebench"):
        pytest.skip("swebench is not installed (pip install 'swebench==5.0.2'): no oracle")
    from swebench.harness import grading, log_parsers
    from swebench.types import TestSpec

    class Oracle:
        registry = log_parsers.PARSER_REGISTRY

        @staticmethod
        def parse(parser: str, log: str) -> dict[str, str] | None:
            try:
                return log_parsers.PARSER_REGISTRY["parse_log_" + parser](log, None)
            except IndexError:
                return None

        @staticmethod
        def verdict(path: Path, parser: str, f2p: list[str], p2p: list[str], kind: str) -> dict | None:
            spec = TestSpec("i", "", [], "", "", f2p, p2p, "parse_log_" + parser, kind)
            prediction = {"instance_id": "i", "model_patch": "x"}
            try:
                return grading.get_eval_report(spec, prediction, str(path), include_tests_status=True)["i"]
            except IndexError:
                return None

    return Oracle


def test_every_python_name_of_the_registry_is_known(swebench):
    for name, function in swebench.registry.items():
        if function.__module__.endswith(".python"):
            ours, theirs = parser_name(name), function.__name__.removeprefix("parse_log_")
            assert ours == theirs, name
        else:
            with pytest.raises(ValueError, match="unknown log parser"):
                parser_name(name)


@pytest.mark.parametrize("parser", PARSERS)
def test_parser_equals_swebench_on_fuzzed_logs(swebench, parser):
    rng = random.Random(parser)
    seen = set()
    for _ in range(1500):
        log = fuzzed(rng)
        theirs = swebench.parse(parser, log)
        assert PARSERS[parser](log) == (theirs or {}), repr(log)
        seen.update((theirs or {}).values())
    assert {"PASSED", "FAILED"} <= seen  # the fuzz reaches what it is for


@pytest.mark.parametrize("parser", PARSERS)
def test_verdict_equals_swebench_on_fuzzed_logs(swebench, parser, tmp_path):
    rng, outcomes = random.Random(parser + "verdict"), set()
    path = tmp_path / "log.txt"
    for _ in range(400):
        log = marked(fuzzed(rng), rng)
        path.write_text(log, newline="")
        names = sorted(PARSERS[parser](log)) or ["test_x"]
        f2p = [rng.choice(names)[: rng.choice((99, 99, 99, 12))]]
        p2p = rng.sample(names, min(len(names), rng.randrange(3))) + (["absent"] if rng.random() < 0.1 else [])
        kind = rng.choice(log_parsers.EVAL_TYPES[:1] * 3 + log_parsers.EVAL_TYPES[1:])
        ours = official(log, fail_to_pass=f2p, pass_to_pass=p2p, parser=parser, eval_type=kind)
        theirs = swebench.verdict(path, parser, f2p, p2p, kind)
        if theirs is None or (theirs["patch_successfully_applied"] and not ours.status):
            assert not ours.resolved  # it raised; or it took a runner's summary for a run, and we don't
            continue
        assert ours.resolved == theirs["resolved"], repr((log, f2p, p2p, kind))
        assert ours.applied == theirs["patch_successfully_applied"]
        if ours.applied:
            tests = theirs["tests_status"].values()
            assert list(ours.passed) == [t for group in tests for t in group["success"]]
            assert list(ours.failed) == [t for group in tests for t in group["failure"]]
        outcomes.add((ours.applied, ours.resolved))
    assert outcomes == {(False, False), (True, False), (True, True)}


def test_equals_swebench_on_real_logs(swebench, tmp_path):
    roots = [Path(p) for p in os.environ.get("SWE_LOGS", "").split(":") if p]
    files = [path for root in roots for path in sorted(root.rglob("*")) if path.is_file()]
    if not files:
        pytest.skip("SWE_LOGS names no directory with logs of real gradings")
    found = 0
    for file in files:
        log = file.read_bytes().decode("utf-8", "replace")
        path = tmp_path / "log.txt"
        for parser in PARSERS:
            ours = PARSERS[parser](log.replace("\r\n", "\n").replace("\r", "\n"))
            theirs = swebench.parse(parser, log.replace("\r\n", "\n").replace("\r", "\n"))
            assert ours == (theirs or {}), (file, parser)
            found += len(ours)
            whole = log if START in log else f"{START}\n{log}\n{END}\n{EXIT}: 1\n"
            path.write_text(whole, newline="")
            f2p, p2p = list(ours)[:3], list(ours)[3:]
            theirs = swebench.verdict(path, parser, f2p, p2p, "pass_and_fail")
            mine = official(whole, fail_to_pass=f2p, pass_to_pass=p2p, parser=parser)
            assert mine.resolved == bool(theirs and theirs["resolved"]) or not f2p, (file, parser)
    assert found > 10 * len(files)


# ---- without swebench: our own logs ----

LOGS: dict[str, tuple[str, dict[str, str]]] = {
    "pytest": (
        "collected 5 items\ntests/test_a.py ..F\nPASSED tests/test_a.py::test_x\nFAILED tests/test_a.py::test_y - assert 1\n"
        "SKIPPED [2] tests/test_b.py:3: no network\nXFAIL tests/test_a.py::test_z - reason\nERROR tests/test_c.py\nPASSED\n",
        {
            "tests/test_a.py::test_x": "PASSED",
            "tests/test_a.py::test_y": "FAILED",
            "tests/test_a.py::test_z": "XFAIL",
            "tests/test_c.py": "ERROR",
        },
    ),
    "pytest_v2": (
        "\x1b[32mPASSED\x1b[0m tests/test_a.py::\x1b[1mtest_x[a b]\x1b[0m\ntests/test_a.py::test_old FAILED\n"
        "FAILED tests/test_a.py::test_y[1 2] - assert - no\n",
        {
            "tests/test_a.py::test_x[a b]": "PASSED",
            "tests/test_a.py::test_old": "FAILED",
            "tests/test_a.py::test_y[1 2]": "FAILED",
        },
    ),
    "pytest_options": (
        "PASSED t.py::test_x[/tmp/a/b.txt]\nPASSED t.py::test_x[//server/b]\nFAILED t.py::test_x[/a/*] - no\nPASSED t.py::test_y\n",
        {
            "t.py::test_x[/b.txt]": "PASSED",
            "t.py::test_x[//server/b]": "PASSED",
            "t.py::test_x[/a/*]": "FAILED",
            "t.py::test_y": "PASSED",
        },
    ),
    "matplotlib": (
        "PASSED t.py::test_x[MouseButton.LEFT]\nFAILED t.py::test_x[MouseButton.RIGHT]\n",
        {"t.py::test_x[1]": "PASSED", "t.py::test_x[3]": "FAILED"},
    ),
    "seaborn": (
        "PASSED t.py::test_x\nt.py::test_y PASSED [ 50%]\nFAILED t.py::test_z - no\nSKIPPED t.py::test_s\n",
        {"t.py::test_x": "PASSED", "t.py::test_y": "PASSED", "t.py::test_z": "FAILED"},
    ),
    "sympy": (
        "sympy/a/tests/test_a.py[3]\ntest_x ok\ntest_y F\ntest_z E   [FAIL]\ntest_w E\ntest_s s\n"
        "____ sympy/a/tests/test_a.py:test_y ____\n",
        {"test_x": "PASSED", "test_y": "FAILED", "test_w": "ERROR", "sympy/a/tests/test_a.py:test_y": "FAILED"},
    ),
    "django": (
        "test_x (app.T) ... ok\ntest_y (app.T) ... FAIL\ntest_z (app.T) ... ERROR\ntest_s (app.T) ... skipped 'no'\n"
        "test_p (app.T) ... printed\nmore\nok\n"
        "test_t (app.T) ... System check identified no issues (0 silenced)\nok\nFAIL: test_y (app.T)\n",
        {
            "test_x (app.T)": "PASSED",
            "test_y (app.T)": "FAILED",
            "test_z (app.T)": "ERROR",
            "test_s (app.T)": "SKIPPED",
            "test_p (app.T)": "PASSED",
            "test_t (app.T)": "PASSED",
            "test_y": "FAILED",
        },
    ),
}


@pytest.mark.parametrize("parser", LOGS)
def test_own_logs(parser, tmp_path):
    log, expected = LOGS[parser]
    assert PARSERS[parser](log) == expected
    assert LOGS.keys() == PARSERS.keys()


def log_of(body: str, code: int | str = 0) -> str:
    return f"+ : '{START}'\n{body}\n+ : '{END}'\n{EXIT}: {code}\n"


RULE = {
    "gold": (log_of("PASSED a\nPASSED b"), "pass_and_fail", True),
    "expected failure counts for fail-to-pass": (log_of("XFAIL a\nPASSED b"), "pass_and_fail", True),
    "skipped is kept but not repaired": (log_of("PASSED a\nSKIPPED b"), "pass_and_fail", True),
    "skipped fail-to-pass": (log_of("SKIPPED a\nPASSED b"), "pass_and_fail", False),
    "absent": (log_of("PASSED a"), "pass_and_fail", False),
    "absent in a fail-only row": (log_of("PASSED a"), "fail_only", True),
    "nothing in a fail-only row": (log_of("Executed 3 of 3"), "fail_only", False),
    "exit status without a failure": (log_of("PASSED a\nPASSED b", 1), "pass_and_fail", False),
    "exit status with another failure": (log_of("PASSED a\nPASSED b\nFAILED c", 1), "pass_and_fail", True),
    "exit status beyond numbers": (log_of("PASSED a\nPASSED b", "0" * 5000), "pass_and_fail", False),
    "no end": (f"{START}\nPASSED a\nPASSED b", "pass_and_fail", False),
    "results outside the markers": (log_of("") + "PASSED a\nPASSED b\n", "pass_and_fail", True),
    "given up": (log_of("PASSED a\nPASSED b") + ">>>>> Patch Apply Failed", "pass_and_fail", False),
    "carriage returns end lines": (log_of("x\rPASSED a\r\nPASSED b"), "pass_and_fail", True),
}


@pytest.mark.parametrize("case", RULE)
def test_official_rule(case):
    log, kind, resolved = RULE[case]
    report = official(log, fail_to_pass=["a"], pass_to_pass=["b"], parser="pytest", eval_type=kind)
    assert report.resolved is resolved
    assert report.applied or not report.passed


def test_ids_cut_in_a_parameter_stand_for_all_that_begin_so_if_these_agree():
    rule = {"pass_to_pass": [], "parser": "pytest"}
    both = "PASSED t.py::x[log(a)]\n{} t.py::x[log(b)]"
    assert official(log_of(both.format("XFAIL")), fail_to_pass=["t.py::x[log("], **rule).resolved
    assert not official(log_of(both.format("FAILED")), fail_to_pass=["t.py::x[log("], **rule).resolved
    assert not official(log_of(both.format("PASSED")), fail_to_pass=["t.py::x"], **rule).resolved


def test_a_word_that_is_no_status_is_told_apart():
    report = official(log_of("PASSED: a\nPASSED b"), fail_to_pass=["a"], pass_to_pass=["b"], parser="pytest")
    assert isinstance(report, Report) and report.ignored == ("a",) and report.resolved  # as the harness has it


@pytest.mark.parametrize("parser", PARSERS)
def test_hostile_logs_take_linear_time(parser):
    started = time.monotonic()
    for line in (
        "x ... Testing against Django installed in y\n",
        "_ a.py:b _ ",
        "PASSED [a[b]c] - - \n",
        "a ...\n... System check identified no issues (0 silenced)\n",
        " ... " * 50,
        "_" * 100,
    ):
        log = line * (1_000_000 // len(line))
        PARSERS[parser](log + " silenced).\nokay")
        PARSERS[parser](log + "\nx ... Testing against Django installed in y silenced).\nok")
    assert time.monotonic() - started < 20


def test_unknown_parser_is_named():
    with pytest.raises(ValueError, match="unknown log parser 'parse_log_jest'; known are pytest"):
        parser_name("parse_log_jest")
