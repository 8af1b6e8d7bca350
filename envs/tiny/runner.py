"""A minimal test runner over pytest-form test files: plain `test_*` functions with bare asserts.

It is the default runner of the tiny task family because a bare interpreter with it takes a twentieth of pytest's CPU
time on two trivial tests; `tests/envs/test_runner.py` asserts that it agrees with pytest. It is copied into each
repository as `runner.py` and known to the agent by that name. It knows no fixtures, marks or plugins.

    python3 runner.py [--verdicts] [FILE ...]      default: tests/test_*.py

Prints a line per failing test and a summary; with `--verdicts` one `PASS id`, `FAIL id` or `ERROR file` line each.
Exit status as pytest's: 0 all passed, 1 some failed, 2 a file could not be imported, 5 no tests.
"""

import os
import sys


def main(argv):
    """Run the files; return the exit status."""
    verdicts = "--verdicts" in argv
    root = os.path.dirname(os.path.abspath(__file__))
    sys.path[:0] = [root]
    files = [a for a in argv if not a.startswith("--")]
    if not files:
        files = sorted(
            "tests/" + n for n in os.listdir(os.path.join(root, "tests")) if n.startswith("test_") and n.endswith(".py")
        )
    passed = failed = errors = 0
    for name in files:
        space = {"__name__": "test", "__file__": name}
        try:
            with open(os.path.join(root, name), encoding="utf-8") as handle:
                source = handle.read()
            exec(compile(source, name, "exec"), space)
        except BaseException as error:
            errors += 1
            print("ERROR", name) if verdicts else print(f"ERROR {name}: {type(error).__name__}: {error}")
            continue
        for test, function in list(space.items()):
            if not test.startswith("test") or not callable(function):
                continue
            try:
                function()
            except BaseException as error:
                failed += 1
                print("FAIL", f"{name}::{test}") if verdicts else print(f"FAIL {test}: {why(error, name, source)}")
            else:
                passed += 1
                if verdicts:
                    print("PASS", f"{name}::{test}")
    parts = [f"{n} {word}" for n, word in ((failed, "failed"), (passed, "passed"), (errors, "errors")) if n]
    print(", ".join(parts) or "no tests")
    sys.stdout.flush()
    return 2 if errors else 1 if failed else 0 if passed else 5


def why(error, name, source):
    """The failing assert, or the exception with its line."""
    line, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == name:
            line = trace.tb_lineno
        trace = trace.tb_next
    text = source.splitlines()[line - 1].strip() if line else ""
    return text if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
