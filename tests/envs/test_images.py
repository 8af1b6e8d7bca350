"""Task images, end to end: a package that builds itself, without network."""

import json
from dataclasses import replace

import pytest

from envs.sandbox import make_backend
from envs.sandbox.capture import Entry
from envs.sandbox.imagestore import ImageStore
from envs.swe.discovery import COMMAND, LIMITS, Discovery, Run, _note, _summary, discover, run_suite
from envs.swe.images import at_commit, environment, repository, task_image
from envs.swe.install import Refused, missing_modules, modules
from envs.swe.sources import Source, fetch
from tests.envs.gitrepo import commit
from tests.envs.wheelhouse import TESTING, TINY, rewheel, simple

pytestmark = pytest.mark.docker  # the base is the engine's


@pytest.fixture(scope="module")
def world(tmp_path_factory, native):
    """A store with the base, a directory of wheels, and a cache."""
    pytest.importorskip("pip", reason="pip fetches the wheels")
    root = tmp_path_factory.mktemp("images")
    wheels = root / "wheels"
    wheels.mkdir()
    for name in TESTING:
        rewheel(name, wheels)
    simple(wheels, "needed", "1.5", {"needed.py": b"", "leaf.py": b""}, ("leaf",))
    simple(wheels, "leaf", "2.0", {"leaf_of.py": b""})
    simple(wheels, "helper", "1.0", {"helper.py": b""})
    simple(wheels, "surprise", "3.0", {"surprise.py": b""})
    simple(wheels, "lint", "1.0", {"lint.py": b""})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(wheels))
        patch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
        store = ImageStore(root / "set" / "images")
        yield root, store, store.add_base("codeworld-base"), wheels


def build(world, native, source, **options):
    root, store, base, _ = world
    return environment(store, base, source, native, cache=root / "cache", **options)


def of(tree: dict[str, bytes], name="tiny") -> Source:
    return Source(name, "1.0", "", name, None, lambda _: {path: Entry(data) for path, data in tree.items()})


@pytest.fixture(scope="module")
def tiny(world, native, tmp_path_factory):
    """The tiny package as a git repository of two commits, and its environment at the second."""
    path = tmp_path_factory.mktemp("tiny")
    first = commit(path, {**TINY, "src/tiny/old.py": b"was = 1\n"}, tag="v0.9")
    commit(path, {"src/tiny/old.py": None, "src/tiny/new.py": b"now = 1\n"}, tag="v1.7")
    source = fetch(str(path), world[0] / "cache")
    return source, first, build(world, native, source)


def test_the_environment_has_what_the_package_and_its_tests_need(tiny):
    _, _, env = tiny
    assert env.packages.keys() >= {"tiny", "needed", "leaf", "helper", "surprise", "pytest"}
    assert not {"lint", "pip", "absent-everywhere"} & env.packages.keys()
    assert len(env.dropped) == 1 and "absent-everywhere" in env.dropped[0]
    assert env.python.startswith("3.") and env.seconds > 0 and not env.plain


def test_its_source_is_in_the_work_directory_alone(tiny, world, native):
    source, _, env = tiny
    assert env.made["src/tiny/version.txt"].data == b"1.7"  # of the tag before the commit
    assert not any(path.startswith("build/") or path.endswith(".pyc") for path in env.made)
    assert repository(world[1], env.digest) == {**source.tree(), **env.made}
    with native.create(base=env.digest, workdir="/testbed") as box:
        found = box.run("grep -rl 'return 2 \\* x' / --include=* -s --exclude-dir=proc --exclude-dir=sys", timeout=60)
        assert found.text().split() == ["/testbed/src/tiny/__init__.py"]
        assert (
            box.run("ls /tmp /root/.cache; python -c 'import tiny; print(tiny.double(4))'", timeout=60)
            .text()
            .endswith("8\n")
        )
        assert not box.changes()


def test_what_the_store_has_is_not_built_again(tiny, world, native):
    source, _, env = tiny
    again = build(world, native, source)
    assert again.digest == env.digest and again.made == env.made and again.seconds == 0


def test_another_commit_shares_all_but_the_repository(tiny, world, native):
    source, first, env = tiny
    store = world[1]
    other = at_commit(store, env, source.tree(first))
    assert store.layers(other)[:-1] == store.layers(env.digest)[:-1] == store.layers(env.installed)
    assert store.size(other, beyond=env.digest) < 40_000
    with native.create(base=other, workdir="/testbed") as box:
        assert box.run("python -c 'import tiny.old; print(tiny.old.was)'; ls src/tiny", timeout=60).text() == (
            "1\n__init__.py\nold.py\nversion.txt\n"
        )


@pytest.mark.parametrize("name", ["native", "docker"])
def test_a_task_has_one_commit_of_what_the_agent_finds(tiny, world, name):
    source, _, env = tiny
    store, tree = world[1], {**source.tree(), **env.made}
    broken = {"src/tiny/__init__.py": b"broken = 1\n", "src/tiny/new.py": None, "src/tiny/more/x.py": b"", "none": None}
    digest = task_image(store, env.digest, tree, broken)
    assert store.layers(digest)[:-1] == store.layers(env.digest)
    backend = make_backend(name)
    try:
        with backend.create(base=digest, workdir="/testbed") as box:

            def run(script):
                return box.run(script, timeout=60).text()

            assert run("git status --porcelain; git fsck --strict --full --lost-found; git remote; git reflog") == ""
            now = sorted((set(tree) | {"src/tiny/more/x.py"}) - {"src/tiny/new.py"})
            assert run("git ls-files; git log --all --format=%s | wc -l").split() == [*now, "1"]
            kept = run("git rev-list --objects --all | wc -l").strip()
            assert run("git cat-file --batch-all-objects --batch-check | wc -l").strip() == kept
            assert run("git cat-file --batch-all-objects --batch | grep -ac broken").strip() == "1"
            assert (
                run("git cat-file --batch-all-objects --batch | grep -a 'return 2'; grep -rl 'return 2 [*]' . /opt")
                == ""
            )
            run("echo x >> backend.py; git commit -qam more --author 'a <a@a>'")
            assert "backend.py" in box.changes()
    finally:
        backend.close()


def test_a_task_without_git(tiny, world, native):
    source, _, env = tiny
    digest = task_image(world[1], env.digest, {**source.tree(), **env.made}, {"backend.py": None}, git=False)
    assert world[1].size(digest, beyond=env.digest) <= 10240
    with native.create(base=digest, workdir="/testbed") as box:
        assert box.run("ls -A", timeout=60).text().split() == ["pyproject.toml", "src", "tests"]


def test_discovery_runs_the_suite_and_keeps_what_passes(tiny, native):
    found = discover(native, tiny[2].digest)
    file = "tests/test_tiny.py::test_"
    assert found.tests == {
        f"{file}double": "pass", f"{file}each[1]": "pass", f"{file}each[2]": "pass", f"{file}wrong": "fail", f"{file}skipped": "skip",
    }  # fmt: skip
    assert found.passing == (f"{file}double", f"{file}each[1]", f"{file}each[2]")
    timed = {"tests/test_tiny.py", *(f"{file}{name}" for name in ("double", "each", "wrong", "skipped"))}
    assert found.seconds.keys() == timed and 0 < sum(found.seconds.values()) < found.wall
    with native.create(base=tiny[2].digest, workdir="/testbed") as box:  # what is recorded is enough, from any file
        result = box.run(f"{found.command} -q tests/test_tiny.py", timeout=60)
        assert "3 passed" in result.text() or ("3 passed, 1 skipped" in result.text() and "1 failed" in result.text())


def test_only_what_every_run_agrees_on_is_kept():
    def run(**outcomes):
        made = Run(ended=True)
        for test, outcome in outcomes.items():
            _note(made, json.dumps({"what": "start", "id": f"t.py::{test}", "doctest": test == "doc"}))
            for phase in ("pass", outcome, "pass"):
                _note(made, json.dumps({"what": "phase", "id": f"t.py::{test}", "outcome": phase}))
            _note(made, json.dumps({"what": "spent", "id": f"t.py::{test}[1]", "seconds": 0.75}))
        _note(made, "garbage")
        _note(made, json.dumps({"what": "spent", "id": "t.py", "seconds": 0.5}))
        _note(made, json.dumps({"what": "spent", "id": "t.py::x", "seconds": "much"}))
        return made

    runs = [run(a="pass", b="pass", c="fail", doc="pass", d="pass"), run(a="pass", b="fail", c="fail", doc="pass")]
    found = _summary("python -m pytest", runs)
    assert found.tests == {"t.py::a": "pass", "t.py::c": "fail"} and found.unstable == ("t.py::b", "t.py::d")
    assert found.doctests == 1 and isinstance(found, Discovery) and found.seconds == {
        "t.py": 0.5, "t.py::a": 0.75, "t.py::b": 0.75, "t.py::c": 0.75, "t.py::doc": 0.75, "t.py::d": 0.375,
    }  # fmt: skip


@pytest.mark.parametrize("junit", [False, True])
def test_one_test_that_hangs_ends_a_suite_sooner_than_many_that_take_time(tiny, native, junit):
    source = "import time\n" + "".join(f"def test_{i}(): time.sleep({{}})\n" for i in range(6))
    with native.create(base=tiny[2].digest, workdir="/testbed", limits=LIMITS) as box:
        box.write("/testbed/tests/test_slow.py", source.format(*[0.5] * 6).encode())
        run = run_suite(box, COMMAND, 60.0, silence=2.5, tests=["tests/test_slow.py"], junit=junit)
        assert len(run.outcomes) == 6 and run.wall > 3
        box.write("/testbed/tests/test_slow.py", source.format(0, 0, 30, 0, 0, 0).encode())
        with pytest.raises(
            Refused, match="timeout after [2-9] s, the last test that started is tests/test_slow.py::test_2"
        ):
            run_suite(box, COMMAND, 60.0, silence=2.5, tests=["tests/test_slow.py"], junit=junit)


TEST = b"def test_it():\n    assert 1\n"
REFUSED = {
    "no tests": ({"a.py": b""}, "has none that pytest finds"),
    "nothing passes": ({"test_a.py": b"def test_a():\n    assert 0\n"}, "none passes every time: 1 fail"),
    "broken": (
        {"test_a.py": b"import a.b.c\n", "a.py": b""},
        "none could be collected; test_a.py: ModuleNotFoundError",
    ),
    "hangs": (
        {"test_a.py": b"def test_a():\n    while 1: pass\n"},
        " s, the last test that started is test_a.py::test_a",
    ),
    "exits": ({"test_a.py": TEST, "conftest.py": b"import os\nos._exit(0)\n"}, "no report"),
}


@pytest.fixture(scope="module")
def plain(world, native):
    env = build(world, native, of({"one.py": b""}, "plain"))
    assert env.plain and not env.made
    return env


def test_equal_builds_give_equal_images(plain, world, native, tmp_path):
    other = ImageStore(tmp_path / "images")
    source, base = of({"one.py": b""}, "plain"), other.add_base("codeworld-base")
    again = environment(other, base, source, native, cache=world[0] / "cache")
    assert again.digest == plain.digest and again.seconds > 0


@pytest.mark.parametrize("case", REFUSED)
def test_suites_that_are_of_no_use_are_refused(world, native, plain, case):
    tree, why = REFUSED[case]
    env = replace(plain, digest=at_commit(world[1], plain, {path: Entry(data) for path, data in tree.items()}))
    with pytest.raises(Refused, match="^tests: ") as told:
        discover(native, env.digest, timeout=3)
    assert why in str(told.value) and "\n" not in str(told.value) and told.value.step == "tests"


def test_installations_that_fail_are_refused(world, native):
    def refused(tree, step, why):
        with pytest.raises(Refused) as told:
            build(world, native, of(tree))
        assert told.value.step == step and why in str(told.value) and "\n" not in str(told.value)

    refused(
        {"setup.py": b"", "pyproject.toml": b'[build-system]\nrequires=["nowhere-at-all"]\n'},
        "install",
        "nowhere-at-all",
    )
    refused({**TINY, "backend.py": b"raise OSError('no build today')"}, "install", "no build today")
    vendor = {"_vendor/tiny/__init__.py": b"def double(x): ...\n", "needed.py": b""}
    simple(world[3], "holder", "1.0", vendor)
    copied = TINY["backend.py"].replace(b"Requires-Dist: needed>=1", b"Requires-Dist: needed\nRequires-Dist: holder")
    refused(
        {**TINY, "backend.py": copied}, "audit", "1 copies of its modules lie in the environment, first _vendor/tiny"
    )
    with pytest.raises(Refused, match="^base: .*python9 does not run there"):
        build(world, native, of(TINY), python="python9")


def test_a_release_of_the_package_itself_does_not_replace_it(world, native):
    """A dependency that wants another release than the repository is: the repository stays what is imported."""
    simple(world[3], "tiny", "4.0", {"tiny/__init__.py": b"def double(x):\n    return x << 1\n"})
    simple(world[3], "circle", "1.0", {"circle.py": b""}, ("tiny>=4",))
    needs = TINY["backend.py"].replace(b"Requires-Dist: needed>=1", b"Requires-Dist: needed\nRequires-Dist: circle")
    env = build(world, native, of({**TINY, "backend.py": needs}))
    assert env.packages["tiny"] == "1.0" and env.packages["circle"] == "1.0"
    with native.create(base=env.digest, workdir="/testbed") as box:
        assert "/testbed/src" in box.run("python -c 'import tiny; print(tiny.__file__)'", timeout=60).text()
        assert box.run("grep -rl 'x << 1' /opt /testbed", timeout=60).text() == ""


def test_images_are_built_in_native_sandboxes_only(world):
    backend = make_backend("docker")
    try:
        with pytest.raises(ValueError, match="use the native backend"):
            environment(world[1], world[2], of({"b.py": b""}), backend, cache=world[0], python="/usr/bin/python3")
    finally:
        backend.close()


def test_what_pytest_says_is_missing():
    output = """E   ModuleNotFoundError: No module named 'yaml.x'
pytest: error: unrecognized arguments: --cov=tiny --cov-report -n 4
ERROR: Missing required plugins: pytest-foo, pytest-bar
E       fixture 'mocker' not found
E       fixture 'own' not found"""
    assert missing_modules(output) >= {"yaml", "--cov", "-n", "pytest-foo", "pytest-bar", "fixture mocker"}
    assert "fixture own" not in missing_modules(output)


def test_which_modules_an_installed_copy_would_have():
    files = (
        "setup.py",
        "one.py",
        "src/pkg/__init__.py",
        "src/pkg/a.py",
        "loose/b.py",
        "tests/__init__.py",
        "tests/test_a.py",
    )
    assert modules(dict.fromkeys(files, Entry())) == ["one.py", "pkg/__init__.py", "pkg/a.py"]
