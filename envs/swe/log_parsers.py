"""SWE-bench's log parsers and its rule for a verdict, re-implemented.

    log ─► text between the markers ─► parser ─► test id → status word ─► official rule ─► Report

The rule decides by text alone, which the tested code can print; `envs/swe/swe_bench.py` says what is asked beyond it. What
is read how is a fact of the benchmark: SWE-bench 5.0.2 (`swebench/harness/log_parsers/python.py`, `harness/grading.py`),
with which `tests/envs/test_log_parsers.py` compares every function here. Differences: a log on which that harness ends with an
exception has no verdicts here, and an empty log of a fail-only row is "not applied" whatever else is in it; both are
unresolved.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

Parser = Callable[[str], dict[str, str]]

START = ">>>>> Start Test Output"
END = ">>>>> End Test Output"
EXIT = ">>>>> Test Exit Code"
_GIVEN_UP = (">>>>> Patch Apply Failed", ">>>>> Reset Failed", ">>>>> Tests Errored", ">>>>> Tests Timed Out")
STATUS = ("FAILED", "PASSED", "SKIPPED", "ERROR", "XFAIL")
PASSING = frozenset({"PASSED", "XFAIL"})
FAILING = frozenset({"FAILED", "ERROR"})
EVAL_TYPES = ("pass_and_fail", "fail_only")


def _summary(lines: Iterable[str], rename: Callable[[str], str] = str) -> dict[str, str]:
    """Lines of pytest's short summary: `STATUS id …`, where an id ends at the first blank."""
    found = {}
    for line in lines:
        if not line.startswith(STATUS):
            continue
        words = (line.replace(" - ", " ") if line.startswith("FAILED") else line).split()
        if len(words) > 1 and not _counts(words):
            found[rename(words[1])] = words[0]
    return found


def _counts(words: list[str]) -> bool:
    """`SKIPPED [3] file:line: reason` counts tests and names none."""
    return words[0] == "SKIPPED" and re.match(r"\[\d+\]$", words[1]) is not None


def pytest(log: str) -> dict[str, str]:
    """The short summary of pytest."""
    return _summary(log.split("\n"))


def matplotlib(log: str) -> dict[str, str]:
    """As `pytest`; mouse buttons by number, as older enumerations printed them."""
    return pytest(log.replace("MouseButton.LEFT", "1").replace("MouseButton.RIGHT", "3"))


def pytest_options(log: str) -> dict[str, str]:
    """As `pytest`; a parameter that is an absolute path is cut to its last part, so that ids don't depend on directories."""

    def rename(test: str) -> str:
        head, bracket, rest = test.partition("[")
        option, closed, _ = rest.rpartition("]")
        if not bracket or not closed:
            return test
        if option.startswith("/") and not option.startswith("//") and "*" not in option:
            option = "/" + option.rpartition("/")[2]
        return f"{head}[{option}]"

    return _summary(log.split("\n"), rename)


_CONTROL = dict.fromkeys(range(1, 32))


def pytest_v2(log: str) -> dict[str, str]:
    """pytest's summary with blanks in ids, without colours; else the progress lines `id STATUS` of older versions."""
    found = {}
    for line in log.split("\n"):
        line = re.sub(r"\[\d+m", "", line).translate(_CONTROL)
        if line.startswith(STATUS):
            words = (line.partition(" - ")[0] if line.startswith("FAILED") else line).split()
            if len(words) > 1 and not _counts(words):
                found[" ".join(words[1:])] = words[0]
        elif line.endswith(STATUS):
            words = line.split()
            if len(words) > 1:
                found[" ".join(words[:-1])] = words[-1]
    return found


def seaborn(log: str) -> dict[str, str]:
    """Passes and failures only, from the summary or from progress lines."""
    found = {}
    for line in log.split("\n"):
        words = line.split()
        if len(words) < 2:
            continue
        if line.startswith("FAILED"):
            found[words[1]] = "FAILED"
        elif " PASSED " in line:
            if words[1] == "PASSED":
                found[words[0]] = "PASSED"
        elif line.startswith("PASSED"):
            found[words[1]] = "PASSED"
    return found


def sympy(log: str) -> dict[str, str]:
    """SymPy's own runner: `test_x ok|F|E`, and the headings `___ file.py:test_x ___` of failures."""
    found = {}
    lines = log.split("\n")
    for line in lines:
        name = line.partition(" ")[2].rpartition(" ")
        if name[1] and ".py:" in name[0]:
            found[name[0]] = "FAILED"
    words = {" ok": "PASSED", " F": "FAILED", " E": "ERROR"}
    for line in map(str.strip, lines):
        if line.startswith("test_"):
            for end, status in words.items():
                if line.endswith(end):
                    found[line.split()[0]] = status
    return found


_DJANGO_ENDS = ((" ... FAIL", "FAIL:", "FAILED"), (" ... ERROR", "ERROR:", "ERROR"))
_DJANGO_TORN = "Applying sites.0002_alter_domain_unique...test_no_migrations"
_DJANGO_SPLIT = (
    (r"Testing against Django installed in (?s:.*?) silenced\)\.", " silenced).\nok"),
    (r"Internal Server Error: /.*/", "/\nok"),
    (r"System check identified no issues \(0 silenced\)", " silenced)\nok"),
)
"""What Django may print between a test's name and its "ok" on the next line; and how that ends."""


def django(log: str) -> dict[str, str]:
    """Django's runner: `name (class) ... ok|FAIL|ERROR|skipped`, also where other output stands between name and result."""
    found: dict[str, str] = {}
    last = None
    for line in map(str.strip, log.split("\n")):
        if "--version is equivalent to version" in line:
            found["--version is equivalent to version"] = "PASSED"
        if " ... " in line:
            last = line.partition(" ... ")[0]
        if end := next((e for e in (" ... ok", " ... OK", " ...  OK") if line.endswith(e)), ""):
            if line.startswith(_DJANGO_TORN):
                line = line.partition("...")[2].strip()
            found[line.rpartition(end)[0] if end in line else line] = "PASSED"
        if " ... skipped" in line:
            found[line.partition(" ... skipped")[0]] = "SKIPPED"
        for end, heading, status in _DJANGO_ENDS:
            if line.endswith(end):
                found[line.partition(end)[0]] = status
            if line.startswith(heading):
                words = line.split()
                if len(words) < 2:
                    return {}  # the benchmark's harness fails on it
                found[words[1]] = status
        if line.startswith("ok") and last is not None:
            found[last] = "PASSED"
    for middle, end in _DJANGO_SPLIT:
        ends = [match.end() for match in re.finditer(re.escape(end) + "$", log, re.MULTILINE)]
        whole = (
            log[: ends[-1] + 1] if ends else ""
        )  # behind the last end every search is in vain, and takes quadratic time
        for match in re.finditer(rf"^(.*?)\s\.\.\.\s{middle}\nok$", whole, re.MULTILINE):
            found[match[1]] = "PASSED"
    return found


PARSERS: dict[str, Parser] = {
    "pytest": pytest,
    "pytest_v2": pytest_v2,
    "pytest_options": pytest_options,
    "django": django,
    "sympy": sympy,
    "matplotlib": matplotlib,
    "seaborn": seaborn,
}
"""The seven that SWE-bench Verified uses: log (text between the markers) → test id → status word."""


def swe_smith(log: str) -> dict[str, str]:
    """pytest's verbose progress lines, `id STATUS`. Source: SWE-smith, `swesmith/harness/log_parsers.py`."""
    return {m[1]: m[2] for m in re.finditer(rf"^(\S+)[^\S\n]+({'|'.join(STATUS)})", log, re.MULTILINE)}


def r2e(log: str) -> dict[str, str]:
    """pytest's short summary, ids without their file and with dots. Source: R2E-Gym, `repo_analysis/execution_log_parser.py`."""
    found = {}
    for line in re.sub(r"\x1b\[\d+m", "", log).partition("short test summary info")[2].split("\n"):
        if status := next((word for word in ("PASSED", "FAILED", "ERROR") if word in line), ""):
            found[".".join(line.split("::")[1:]).partition(" - ")[0]] = status
    return found


READERS: dict[str, Parser] = PARSERS | {"swe_smith": swe_smith, "r2e": r2e}
"""Every parser that a task may name: those of SWE-bench and of sets that read logs in their own way."""

_ALIASES = {
    "pytest": "astroid flask marshmallow pvlib pyvista sqlfluff xarray",
    "pytest_options": "pydicom requests pylint",
    "pytest_v2": "astropy scikit sphinx",
}


def parser_name(name: str) -> str:
    """The key of `PARSERS` for what a row calls its parser (`parse_log_flask` → "pytest"). Raises `ValueError`."""
    short = name.removeprefix("parse_log_")
    for key in PARSERS:
        if short == key or short in _ALIASES.get(key, "").split():
            return key
    raise ValueError(f"unknown log parser {name!r}; known are {', '.join(PARSERS)}")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the official rule makes of a log."""

    applied: bool
    """The log shows a test run; False: "not applied", and nothing passed."""
    resolved: bool = False
    passed: tuple[str, ...] = ()
    """Expected ids that count as passed."""
    failed: tuple[str, ...] = ()
    """Expected ids that don't: failed, skipped (fail-to-pass only) or absent."""
    ignored: tuple[str, ...] = ()
    """Expected ids whose word is no status (`ERRORS`, `PASSED:`): the official rule counts them on neither side."""
    status: Mapping[str, str] | None = None
    """Every id in the log → its status word."""
    exit: int | None = None
    """The first exit status that the log tells."""


def status_of(test: str, status: Mapping[str, str]) -> str | None:
    """The status word of an expected id, None where the log has none.

    Ids that were cut in a parameter when the benchmark was made (`test_x[log(photon`) stand for all that begin so, if these
    agree on passing. Source: SWE-bench 5.0.2, `grading._resolve_case`.
    """
    if test in status or test.count("[") <= test.count("]"):
        return status.get(test)
    found = [word for name, word in status.items() if name.startswith(test)]
    return found[0] if found and len({word in PASSING for word in found}) == 1 else None


def official(
    log: str,
    *,
    fail_to_pass: Iterable[str],
    pass_to_pass: Iterable[str],
    parser: str,
    eval_type: str = "pass_and_fail",
) -> Report:
    """SWE-bench's verdict on the output of an evaluation script. Pure; raises for nothing that is in the log.

    Args:
        log: what the script printed, with the marker lines; `\\r` ends a line, as where a text file is read.
        parser: key of `READERS`.
        eval_type: "pass_and_fail", or "fail_only" where a runner names failures alone: an id without verdict has passed.
    """
    log = log.replace("\r\n", "\n").replace("\r", "\n")
    if any(word in log for word in _GIVEN_UP) or START not in log or END not in log:
        return Report(applied=False)
    code = re.search(re.escape(EXIT) + r":\s*(-?\d+)", log)
    if code and len(code[1]) > 20:
        return Report(applied=False)
    left = int(code[1]) if code else None
    parse = READERS[parser]
    status = parse(log.split(START)[1].partition(END)[0]) or parse(log)
    if not status or (left and FAILING.isdisjoint(status.values())):
        return Report(applied=False, status=status, exit=left)
    passed: list[str] = []
    failed: list[str] = []
    ignored: list[str] = []
    for tests, good in ((fail_to_pass, PASSING), (pass_to_pass, PASSING | {"SKIPPED"})):
        for test in tests:
            if eval_type == "fail_only":
                (failed if status.get(test) == "FAILED" else passed).append(test)
                continue
            word = status_of(test, status)
            (passed if word in good else ignored if word and word not in STATUS else failed).append(test)
    return Report(
        applied=True,
        resolved=not failed,
        passed=tuple(passed),
        failed=tuple(failed),
        ignored=tuple(ignored),
        status=status,
        exit=left,
    )
