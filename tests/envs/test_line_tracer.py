"""The lines that a real pytest run executes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import envs.swe

MODULE = b"""import threading

def used(x):
    if x:
        return 1
    return 2

def unused():
    return 3

def in_thread():
    return [
        used(i)
        for i in range(3)
    ]
"""
TESTS = b"""import threading
from pkg.m import in_thread, used

def test_used():
    assert used(1) == 1

def test_thread():
    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
"""


def test_lines_that_ran(tmp_path):
    for path, data in {"pkg/m.py": MODULE, "tests/test_m.py": TESTS}.items():
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_bytes(data)
    plugin = str(Path(envs.swe.__file__).parent)
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([plugin, str(tmp_path)]),
        "CODEWORLD_LINES": "lines.json",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "line_tracer", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    lines = json.loads((tmp_path / "lines.json").read_text())
    assert set(lines) == {"pkg/m.py", "tests/test_m.py"}
    ran = set(lines["pkg/m.py"])
    assert {1, 3, 4, 5, 6, 8, 11, 12, 13, 14} >= ran >= {1, 3, 4, 5, 6, 8, 11, 13, 14} and 9 not in ran
