"""Patch similarity against values by hand, and in bounded time."""

import difflib
import random
import time

import pytest

from envs.swe.similarity import diffs, hunks, patch_similarity

OLD = {"a.py": b"one\ntwo\nthree\n", "b.py": b"x\n"}
GOLD = {"a.py": b"one\nTWO\nthree\n"}


def test_by_hand():
    assert patch_similarity(OLD, GOLD, GOLD) == 1.0
    assert patch_similarity(OLD, {}, GOLD) == 0.0
    assert patch_similarity(OLD, {"b.py": b"y\n"}, GOLD) == 0.0  # another file
    assert patch_similarity(OLD, {"a.py": OLD["a.py"]}, GOLD) == 0.0  # an empty side
    near = difflib.SequenceMatcher(None, " one\n-two\n+TOO\n three", " one\n-two\n+TWO\n three", autojunk=False).ratio()
    assert patch_similarity(OLD, {"a.py": b"one\nTOO\nthree\n"}, GOLD) == pytest.approx(near)
    both = {**GOLD, "b.py": b"y\n"}
    assert patch_similarity(OLD, GOLD, both) == 0.5
    assert patch_similarity(OLD, GOLD, {}) == 0.0


def test_deleted_and_new_files():
    assert patch_similarity(OLD, {"b.py": None}, {"b.py": None}) == 1.0
    assert patch_similarity(OLD, {"new.py": b"z\n"}, {"new.py": b"z\n"}) == 1.0


PATCH = """diff --git a/a.py b/a.py
index 1..2 100644
--- a/a.py
+++ b/a.py
@@ -1,3 +1,3 @@ def f():
 one
-two
+TWO
 three
diff --git a/b.py b/b.py
deleted file mode 100644
--- a/b.py
+++ /dev/null
@@ -1 +0,0 @@
-x
diff --git a/c.py b/c.py
--- /dev/null
+++ b/c.py
@@ -0,0 +1,2 @@
+--- not a header
+
"""


def test_a_unified_diff_is_the_same_as_files():
    after = {**GOLD, "b.py": None, "c.py": b"--- not a header\n\n"}
    found = diffs(PATCH)
    assert list(found) == ["a.py", "b.py", "c.py"]
    assert all(found[path] == hunks(OLD.get(path), data) for path, data in after.items())
    assert patch_similarity(OLD, after, PATCH) == 1.0


def test_bounded_time():
    began, rng = time.process_time(), random.Random(0)
    huge = {"a.py": b"a" * (1 << 20)}
    assert 0 <= patch_similarity(OLD, huge, {"a.py": b"a" * 20_000}) < 0.8  # by lines, one of which differs
    assert patch_similarity({}, {"a.py": b"\n" * (1 << 20)}, {"a.py": b"\n" * 20_000}) == 0.0
    tangled = [{"a.py": bytes(rng.choice(b"ab") for _ in range(3000))} for _ in range(2)]
    assert 0 < patch_similarity(OLD, *tangled) < 0.5
    assert time.process_time() - began < 30
