"""The examples keep the contract, and stay as short as the README says."""

import ast
from pathlib import Path

import envs

ROOT = Path(__file__).resolve().parents[1]


def test_reading_list_keeps_the_contract_and_pays_in_parts():
    envs.check_env(envs.make("examples.reading_list:ReadingList"))
    env = envs.make("examples.reading_list:ReadingList")
    statement, _ = env.reset(seed=1)
    names = statement.removeprefix("Read ").removesuffix(".").split(", ")
    text, reward, terminated, truncated, _ = env.step(f"<tool: bash>\ncat {names[1]}\n</tool>")
    assert (reward, terminated, truncated) == (1 / 3, False, False) and text.split() == [names[0], names[2]]
    assert env.step("nothing")[1] == 0.0
    env.step(f"cat {names[0]}\n")
    _, reward, terminated, _, info = env.step(f"cat {names[2]}\n")
    assert (reward, terminated, info["outcome"]) == (1 / 3, True, "resolved")


def test_an_environment_is_at_most_30_lines_of_code():
    source = (ROOT / "examples" / "reading_list.py").read_text()
    doc = ast.get_docstring(ast.parse(source), clean=False)
    code = [line for line in source.replace(f'"""{doc}"""', "").splitlines() if line.strip()]
    assert len(code) <= 30


def test_a_sandbox_provider_is_at_most_80_lines_in_all():
    assert len((ROOT / "examples" / "inspect_sandbox.py").read_text().splitlines()) <= 80
