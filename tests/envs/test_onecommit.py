"""The repository of one commit, judged by git itself."""

import os

from envs.sandbox.capture import TIME, Entry, Tree
from envs.swe.onecommit import one_commit
from tests.envs.gitrepo import git

TREE: Tree = {
    "a.py": Entry(b"a = 1\n"),
    "a-b/x": Entry(b"same\n"),
    "a.b": Entry(b"same\n"),  # git sorts directories as if they ended in a slash: a-b, a.b, a/
    "a/run.sh": Entry(b"#!/bin/sh\n", 0o755),
    "deep/er/and/deeper": Entry(bytes(range(256)) * 900),
    "empty": Entry(),
    "link": Entry(link="a/run.sh"),
    "n\u00e4me \udcff": Entry(b"odd"),
    ".gitignore": Entry(b"ignored.py\n"),
    "ignored.py": Entry(b"there all the same"),
}


def write(tree, path):
    for name, entry in {**tree, **{f".git/{name}": Entry(data) for name, data in one_commit(tree).items()}}.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        if entry.link is not None:
            (path / name).symlink_to(entry.link)
        else:
            (path / name).write_bytes(entry.data)
            (path / name).chmod(entry.mode)
            os.utime(path / name, (TIME, TIME))


def test_git_finds_one_commit_of_exactly_the_tree(tmp_path):
    write(TREE, tmp_path)
    assert git(tmp_path, "status", "--porcelain", "--ignored") == ""
    assert git(tmp_path, "fsck", "--strict", "--full", "--lost-found", "--unreachable") == ""
    assert git(tmp_path, "rev-list", "--all", "--count") == "1"
    listed = git(tmp_path, "-c", "core.quotePath=false", "ls-tree", "-r", "-z", "--name-only", "HEAD")
    assert len(listed.rstrip("\0").split("\0")) == len(TREE)
    kept = git(tmp_path, "cat-file", "--batch-all-objects", "--batch-check=%(objecttype)").split()
    assert (kept.count("commit"), kept.count("tree"), kept.count("blob")) == (1, 6, len(TREE) - 1)
    assert git(tmp_path, "rev-list", "--objects", "--all").count("\n") + 1 == len(kept)
    assert git(tmp_path, "for-each-ref").endswith("refs/heads/main")
    assert not list((tmp_path / ".git").rglob("*hook*")) and not (tmp_path / ".git/logs").exists()


def test_work_goes_on_in_it(tmp_path):
    write(TREE, tmp_path)
    (tmp_path / "a.py").write_bytes(b"a = 2\n")  # as long as before
    (tmp_path / "empty").unlink()
    assert git(tmp_path, "status", "--porcelain").split() == ["M", "a.py", "D", "empty"]
    git(tmp_path, "commit", "-qam", "more")
    assert git(tmp_path, "gc", "-q") == "" and git(tmp_path, "fsck", "--strict") == ""
    git(tmp_path, "checkout", "-q", "HEAD~1")
    assert (tmp_path / "a.py").read_bytes() == b"a = 1\n"


def test_equal_trees_give_equal_bytes():
    assert one_commit(TREE) == one_commit(dict(reversed(TREE.items())))
    assert one_commit({**TREE, "a.py": Entry(b"b")})["refs/heads/main"] != one_commit(TREE)["refs/heads/main"]


def test_a_tree_of_nothing(tmp_path):
    write({}, tmp_path)
    assert git(tmp_path, "status", "--porcelain") == "" and git(tmp_path, "ls-files") == ""
