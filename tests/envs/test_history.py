"""Fix commits of a real repository whose configuration would run code if git read it."""

import json
import subprocess

import pytest

from envs.swe.candidate import Rejected
from envs.swe.history import from_message, mine, read_issues

OLD = b"def f(x):\n    return x + 1\n"
NEW = b"def f(x):\n    return x + 2\n"


class Repository:
    def __init__(self, root):
        self.root, self.time = root, 1_700_000_000
        root.mkdir()
        self.git("init", "-q", "-b", "main")

    def git(self, *words):
        self.time += 86_400
        date = f"{self.time} +0000"
        env = {"GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date, "PATH": "/usr/bin:/bin", "HOME": str(self.root)}
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", *who, *words], cwd=self.root, env=env, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def commit(self, message, **files):
        for name, data in files.items():
            path = self.root / name.replace("__", "/").replace("_py", ".py").replace("_c", ".c").replace("_md", ".md")
            path.parent.mkdir(exist_ok=True)
            path.unlink() if data is None else path.write_bytes(data)
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "--allow-empty-message", "-m", message)
        return self.git("rev-parse", "HEAD")


@pytest.fixture
def repository(tmp_path):
    made = Repository(tmp_path / "r")
    made.commit("Start", p__m_py=OLD, tests__test_m_py=b"def test(): pass\n")
    return made


def mined(repository, n=10, **options):
    rejected: list[Rejected] = []
    found = list(mine(repository.root, n=n, on_rejected=rejected.append, **options))
    return found, {r.id: r.reason for r in rejected}


TEST = b"from p.m import f\ndef test(): assert f(1) == 3\n"


def test_a_fix_becomes_a_candidate(repository):
    before = repository.git("rev-parse", "HEAD")
    name = repository.commit(
        "fix: Adding gives too little (#12)\n\nThree was expected, see abc1234def.\n\nSigned-off-by: A <a@b>",
        p__m_py=NEW, tests__test_m_py=TEST, NEWS_md=b"news\n", tests__x=b"data",
    )  # fmt: skip
    repository.git("gc", "-q")  # from a pack
    [found], rejected = mined(repository)
    assert found.id == f"history-{name[:12]}" and found.commit == before
    assert found.broken == {"p/m.py": OLD} and found.fixed == {"p/m.py": NEW}
    assert found.tests == {"tests/test_m.py": TEST, "tests/x": b"data"}
    assert found.statement == "Adding gives too little\n\nThree was expected, see ."
    assert found.provenance["commit"] == name and rejected == {before: "first commit"}


def test_files_come_and_go(repository):
    repository.commit(
        "Other modules are used from now on", p__m_py=None, q__n_py=NEW, tests__test_m_py=None, tests__test_n_py=TEST
    )
    [found], _ = mined(repository)
    assert found.broken == {"p/m.py": OLD, "q/n.py": None} and found.fixed == {"p/m.py": None, "q/n.py": NEW}
    assert found.tests == {"tests/test_m.py": None, "tests/test_n.py": TEST}


def test_what_is_left_out_has_a_reason(repository):
    good = "This repairs the sum of two"
    cases = {
        repository.commit(good, p__m_py=NEW): "no tests",
        repository.commit(good, tests__test_m_py=TEST): "no source",
        repository.commit(good, p__m_py=NEW + b"# comment\n", tests__test_m_py=b"1\n"): "no code changed",
        repository.commit("oops", p__m_py=b"a = 1\n", tests__test_m_py=b"2\n"): "message empty",
        repository.commit(good, p__m_py=b"a = 2\n", p__x_c=b"int x;", tests__test_m_py=b"3\n"): "not Python",
        repository.commit(good, p__m_py=b"a = 3\n" * 500, tests__test_m_py=b"4\n"): "too big",
        repository.commit(good, p__m_py=b"a = 4\n", tests__test_m_py=b"5\n", tests__d=b"\0"): "binary file",
        repository.commit("Wrong sum repaired in m.py", p__m_py=OLD, tests__test_m_py=b"7\n"): "message names the changed file",
        repository.commit("Now it does return x + 2 as wanted", p__m_py=NEW, tests__test_m_py=b"8\n"): "message quotes a changed line",
        repository.commit(good, p__m_py=b"def (\n", tests__test_m_py=b"6\n"): "not Python",
    }  # fmt: skip
    (repository.root / "p/l.py").symlink_to("m.py")
    cases[repository.commit(good, p__m_py=OLD, tests__test_m_py=b"9\n")] = "link or submodule"
    repository.git("checkout", "-q", "-b", "side")
    repository.commit(good, side_md=b"x")
    repository.git("checkout", "-q", "main")
    repository.git("merge", "-q", "--no-ff", "-m", good, "side")
    cases[repository.git("rev-parse", "HEAD")] = "merge"
    found, rejected = mined(repository)
    assert found == [] and {k: rejected[k] for k in cases} == cases


def test_nothing_of_the_repository_runs(repository, tmp_path):
    repository.commit("This repairs the sum of two", p__m_py=NEW, tests__test_m_py=TEST)
    trap = tmp_path / "trap.sh"
    trap.write_text(f"#!/bin/sh\ntouch {tmp_path}/sprung\ncat\n")
    trap.chmod(0o755)
    for key in (
        "core.fsmonitor",
        "diff.external",
        "core.sshCommand",
        "filter.x.smudge",
        "diff.x.textconv",
        "core.pager",
    ):
        repository.git("config", key, str(trap))
    (repository.root / ".git/info/attributes").write_text("*.py filter=x diff=x\n")
    for hook in ("post-checkout", "reference-transaction", "post-index-change"):
        (repository.root / ".git/hooks").mkdir(exist_ok=True)
        (repository.root / ".git/hooks" / hook).symlink_to(trap)
    repository.git("status")
    (tmp_path / "sprung").unlink()  # git has just stepped on it
    [found], _ = mined(repository)
    assert found.fixed["p/m.py"] == NEW and not (tmp_path / "sprung").exists()


def test_bounds(repository):
    for i in range(4):
        repository.commit(f"This is repair number {i}", p__m_py=b"a = %d\n" % i, tests__test_m_py=b"# %d\n" % i)
    found, _ = mined(repository, n=2)
    assert [c.statement for c in found] == ["This is repair number 3", "This is repair number 2"]
    assert found == mined(repository, n=2)[0]
    late, rejected = mined(repository, since="2023-11-25")
    assert len(late) == 2 and rejected == {}


def test_issue_texts_take_the_message_s_place(repository, tmp_path):
    name = repository.commit("Fixes #7", p__m_py=NEW, tests__test_m_py=TEST)
    issues = tmp_path / "issues.jsonl"
    issues.write_text(json.dumps({"id": 7, "text": "Adding one gives the wrong sum."}) + "\n")
    assert mined(repository, issues=issues)[0][0].statement == "Adding one gives the wrong sum."
    issues.write_text(json.dumps({"id": name[:10], "text": "The sum of one is wrong."}))
    assert mined(repository, issues=issues)[0][0].statement == "The sum of one is wrong."
    issues.write_text('{"id": 7, "text": "x"}\n{"id": 8}\n')
    with pytest.raises(ValueError, match="row 2"):
        read_issues(issues)


def test_bad_input_is_one_line(tmp_path):
    for make, options in ((lambda p: None, {}), (lambda p: Repository(p), {}), (lambda p: None, {"since": "soon"})):
        make(tmp_path / "r")
        with pytest.raises(ValueError, match="git repository|history") as caught:
            list(mine(tmp_path / "r", n=1, **options))
        assert "\n" not in str(caught.value)


def test_messages_lose_what_names_the_fix():
    message = """Fix #12: Crash when a list is empty (gh-13)

It came with 0123abc; see https://example.org/pull/3 for more.
- empty lists are allowed
@@ -1 +1 @@
-    return x
+    return x or y

Fixes: #12
Co-authored-by: B <b@c>
(cherry picked from commit deadbeefdeadbeef)
"""
    assert (
        from_message(message)
        == "Crash when a list is empty\n\nIt came with ; see  for more.\n- empty lists are allowed"
    )
    assert from_message("Fixes crash on start\r\n") == "Fixes crash on start"
