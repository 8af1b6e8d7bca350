"""The house: packages resolve here, `docker/` holds no Python, no module takes a standard-library name."""

import importlib
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("envs", "policy", "agents", "rl", "benchmarks")


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_resolve_inside_the_repository(name):
    assert Path(importlib.import_module(name).__file__).is_relative_to(ROOT)


def test_docker_holds_no_python():
    assert not list((ROOT / "docker").rglob("*.py"))


def test_no_module_is_named_like_the_standard_library():
    taken = [p for name in PACKAGES for p in (ROOT / name).rglob("*.py") if p.stem in sys.stdlib_module_names]
    assert not taken


def test_one_file_knows_vllm():
    files = [p for name in PACKAGES for p in (ROOT / name).rglob("*.py")]
    knows = [p for p in files if re.search(r"^\s*(from|import) vllm\b", p.read_text(), re.MULTILINE)]
    assert [str(p.relative_to(ROOT)) for p in knows] == ["policy/vllm_engine.py"]


@pytest.mark.parametrize(
    "module",
    [
        "envs",
        "agents.episode",
        "agents.play",
        "policy.endpoint",
        "policy.serve",
        "policy.template",
        "policy.scripted",
        "envs.swe.env",
    ],
)
def test_the_light_half_imports_nothing_heavy(module):
    code = f"import {module}, sys; print([m for m in ('torch', 'ray', 'vllm', 'transformers', 'trl', 'docker') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "command",
    [
        ["rl/train.py"],
        ["-m", "rl"],
        ["-m", "rl", "sft"],
        ["-m", "rl", "bootstrap"],
        ["-m", "envs"],
        ["-m", "envs", "play"],
        ["-m", "agents", "play"],
        ["-m", "policy", "serve"],
        ["-m", "benchmarks"],
    ],
)
def test_every_command_has_help_with_an_example(command, tmp_path, monkeypatch, capsys):
    if command[0] != "-m":  # a script runs from anywhere
        first = [sys.executable, str(ROOT / command[0]), "--help"]
        done = subprocess.run(first, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and "example" in done.stdout
        return
    monkeypatch.setattr(sys, "argv", [*command[1:], "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(command[1], run_name="__main__")
    assert not end.value.code and "example" in capsys.readouterr().out
