"""tiny-repairs: tasks are functions of (split, index), disjoint by normalised source, sound, and many."""

import random
import re
import subprocess

import pytest

from envs.tiny import repairs
from envs.tiny.experts import Expert, Noise, patch, variants
from envs.tiny.templates import HELD_OUT, TRAIN

N = 600


@pytest.fixture(scope="module")
def sets():
    return {split: [repairs.task(split, i) for i in range(N)] for split in repairs.SPLITS}


def test_the_same_index_is_the_same_task():
    assert repairs.task("train", 5).digest == repairs.task("train", 5).digest
    assert repairs.task("train", 5).digest != repairs.task("train", 6).digest


def test_splits_are_disjoint_by_normalised_source(sets):
    seen = {s: {t.provenance["normalised"] for t in tasks} for s, tasks in sets.items()}
    assert not seen["train"] & seen["validation"]
    assert not seen["train"] & seen["templates"]
    assert not seen["validation"] & seen["templates"]
    # The split is a function of the source, so the sets are disjoint at any size, not only at this one.
    for task in sets["validation"]:
        assert repairs.split_of(task.files(task.setup)[task.provenance["module"]].decode()) == "validation"


def test_held_out_templates_occur_nowhere_else(sets):
    assert {t.provenance["template"] for t in sets["templates"]} == set(HELD_OUT)
    assert {t.provenance["template"] for t in sets["train"] + sets["validation"]} <= set(TRAIN)
    assert not set(TRAIN) & set(HELD_OUT) and len(HELD_OUT) > 15 and len(TRAIN) > 80


def test_there_are_thousands_of_distinct_tasks():
    assert len({repairs.task("train", i).provenance["normalised"] for i in range(3000)}) > 2000


def test_normalised_forgets_names_and_docstrings_only():
    a = 'def f(a, b):\n    """x"""\n    out = a + 2\n    return out * b\n'
    b = "def g(m, w):\n    out = m + 2\n    return out * w\n"
    c = "def g(m, w):\n    out = w + 2\n    return out * m\n"
    assert repairs.normalised(a) == repairs.normalised(b) != repairs.normalised(c)


def test_what_is_hidden_is_not_in_the_repository(sets):
    for task in sets["train"][:50]:
        assert not set(task.setup) & set(task.grader.hidden)
        visible = b"".join(task.files(task.setup).values())
        assert task.provenance["fix"] != task.provenance["line"]
        for data in task.files(task.grader.hidden).values():
            assert data not in visible


def sed(action, text):
    """What the sandbox's own sed makes of a text."""
    command = re.fullmatch(r"<tool: bash>\nsed -i ('.*') \S+\n</tool>", action).group(1)
    return subprocess.run(f"sed {command}", shell=True, input=text, capture_output=True, text=True, check=True).stdout


def test_the_expert_without_noise_makes_the_gold_change(sets):
    perfect = Noise(right=1.0, miss=0.0, skip=0.0, detour=0.0, test=0.0)
    for task in sets["validation"][:100]:
        path = task.provenance["module"]
        text, gold = (task.files(files)[path].decode() for files in (task.setup, task.grader.gold))
        expert = Expert(task, random.Random(0), perfect)
        assert expert("") == f"<tool: bash>\ncat -n {path}\n</tool>"
        assert sed(expert(text), text) == gold
        assert expert("") == "<tool: submit>\n</tool>"


def test_a_patch_turns_any_variant_into_any_other(sets):
    rng = random.Random(0)
    for task in sets["train"][:100]:
        line = f"    {task.provenance['line']}\n"
        old, new = rng.sample([line, *variants(line)], 2)
        assert sed(patch("a.py", 2, old, new), f"{old}{old}") == f"{old}{new}", (old, new)


def test_a_patch_need_not_know_the_wrong_digit():
    assert "sed -i '4s/== ./== 2/' a.py" in patch("a.py", 4, "return out % 5 == 5", "return out % 5 == 2")


def test_unknown_split_and_runner_are_one_line():
    with pytest.raises(ValueError, match="unknown split 'test'"):
        repairs.task("test", 0)
    with pytest.raises(ValueError, match="unknown runner"):
        repairs.task("train", 0, runner="nose")
