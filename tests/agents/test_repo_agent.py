"""RepoAgent on a package whose plain build fails, with a scripted policy, real sandboxes and wheels made here."""

from dataclasses import replace
from importlib import import_module

import pytest

from agents.repo_agent import RepoAgent, RepoEnv, hints_of
from envs.__main__ import main
from envs.sandbox.capture import Entry
from envs.sandbox.imagestore import ImageStore
from envs.swe import images
from envs.swe.discovery import Discovery, discover
from envs.swe.install import Refused
from envs.swe.setup import named
from envs.swe.sources import fetch
from envs.task import load_tasks
from policy.completion import Sampling
from policy.renderer import CwmRenderer
from policy.scripted import ScriptedPolicy, replies
from tests.envs.gitrepo import commit
from tests.envs.wheelhouse import TESTING, rewheel, simple

pytestmark = pytest.mark.docker  # the base image is the Docker engine's

FILES = {
    "README.md": "# ledger\nBefore the tests run `python tools/rates.py` and export LEDGER_HOME, a directory with a book.\n",
    "ledger.py": "import quill\nfrom ledger_rates import RATES\n\n\ndef cost(n):\n    return quill.ink(n) * RATES['ink']\n",
    "tools/rates.py": "open('ledger_rates.py', 'w').write('RATES = {\"ink\": 3}\\n')\n",
    "tests/test_ledger.py": """import os
import pathlib

import pytest

import ledger


@pytest.mark.parametrize("n", range(12))
def test_cost(n):
    assert ledger.cost(n) == 6 * n


def test_book():
    assert pathlib.Path(os.environ["LEDGER_HOME"], "book").exists()


def test_moon():
    assert pathlib.Path("/moon").exists()
""",
}
PYTEST = "<tool: bash>\npython -m pytest -q -p no:cacheprovider 2>&1 | tail -3\n</tool>"
INK = "<tool: fetch>\nquill-ink>=1\n</tool>"
RATES = "<tool: bash>\n/tmp/pip.sh install -q quill-ink && python tools/rates.py\n</tool>"
HOME = "<tool: bash>\nmkdir -p /opt/ledger; touch /opt/ledger/book; export LEDGER_HOME=/opt/ledger\n</tool>"
SUBMIT = "<tool: submit>\n</tool>"


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A store with the base image, a repository whose plain build fails, and wheels without a network."""
    from envs.sandbox.native import NativeBackend

    pytest.importorskip("pip", reason="pip fetches the wheels")
    where = tmp_path_factory.mktemp("repo-agent")
    (where / "wheels").mkdir()
    for name in TESTING:
        rewheel(name, where / "wheels")
    simple(where / "wheels", "quill_ink", "1.0", {"quill.py": b"def ink(n):\n    return 2 * n\n"})
    commit(where / "ledger", {path: text.encode() for path, text in FILES.items()})
    store = ImageStore(where / "images")
    base, backend = store.add_base("codeworld-base:latest"), NativeBackend()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(where / "wheels"))
        patch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
        yield store, base, fetch(str(where / "ledger"), where / "cache"), backend, where / "cache"
    backend.close()


@pytest.fixture
def renderer(pytestconfig):
    return CwmRenderer(pytestconfig.rootpath / "policy" / "cwm_tiny")


def agent(renderer, *actions):
    return RepoAgent(ScriptedPolicy(renderer, replies(*actions)), renderer, Sampling(max_tokens=4000))


@pytest.fixture
def env(setting):
    store, base, source, backend, cache = setting
    env = RepoEnv([source], store=store, base=base, backend=backend, cache=cache)
    yield env
    env.close()


@pytest.mark.slow
def test_a_policy_makes_the_tests_run_where_the_plain_build_does_not(setting, renderer):
    store, base, source, backend, cache = setting
    plain = images.environment(store, base, source, backend, cache=cache)
    with pytest.raises(Refused, match="none could be collected.*quill"):
        discover(backend, plain.digest)
    setup = agent(renderer, PYTEST, INK, RATES, HOME, PYTEST, SUBMIT)
    made, found = setup.environment(store, base, source, backend, cache=cache)
    assert [t.outcome for t in setup.played] == ["resolved"] and setup.played[0].turns == 6
    assert len(found.passing) == 13 and found.tests["tests/test_ledger.py::test_moon"] == "fail"
    assert made.packages["quill_ink"] == "1.0" and "pip" not in made.packages
    assert made.made["ledger_rates.py"] == Entry(b'RATES = {"ink": 3}\n')
    again = discover(backend, made.digest)
    assert again.tests == found.tests
    at = images.at_commit(store, made, source.tree())
    with backend.create(base=at, workdir=images.TESTBED) as box:
        assert box.run("echo $LEDGER_HOME; ls /opt/ledger /tmp; cat ledger_rates.py", timeout=60).text() == (
            '/opt/ledger\n/opt/ledger:\nbook\n\n/tmp:\nRATES = {"ink": 3}\n'
        )


SETUP = """
from agents.repo_agent import RepoAgent
from policy.completion import Sampling
from policy.renderer import CwmRenderer
from policy.scripted import ScriptedPolicy, replies

renderer = CwmRenderer({model!r})
agent = RepoAgent(ScriptedPolicy(renderer, replies(*{actions!r})), renderer, Sampling(max_tokens=4000))
environment = agent.environment
"""
WIDE = """import pytest
from ledger_rates import RATES

@pytest.mark.parametrize("n", range(14))
def test_rates(n):
    assert RATES["ink"] * n == 3 * n
"""


@pytest.mark.slow
@pytest.mark.proof
def test_build_takes_the_agents_images(setting, pytestconfig, tmp_path, monkeypatch, capsys):
    commit(tmp_path / "ledger", {path: text.encode() for path, text in {**FILES, "tests/test_rates.py": WIDE}.items()})
    model, actions = str(pytestconfig.rootpath / "policy" / "cwm_tiny"), (INK, RATES, HOME, SUBMIT)
    (tmp_path / "my_setup.py").write_text(SETUP.format(model=model, actions=actions))
    monkeypatch.syspath_prepend(tmp_path)
    command = ["build", "--from", str(tmp_path / "ledger"), "--tasks", "mutate:1", "--out", str(tmp_path / "set")]
    assert main(command) == 1 and "none could be collected" in capsys.readouterr().out
    for _ in range(2):  # the second goes on with the image of the first
        assert main([*command, "--setup", "my_setup:environment"]) == 0
        (task,) = load_tasks(tmp_path / "set")
        assert task.quality["valid"] and {t.partition("::")[0] for t in task.grader.fail_to_pass} == {
            "tests/test_ledger.py"
        }
    assert len(import_module("my_setup").agent.played) == 1


def test_a_setup_that_is_none_is_refused_in_one_line():
    for name, why in (
        ("nowhere:x", "no module 'nowhere'"),
        ("json", "module:callable"),
        ("sys:path", "can't be called"),
    ):
        with pytest.raises(ValueError, match=f"--setup {name}: .*{why}") as error:
            named(name)
        assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_repository_that_no_episode_sets_up_is_refused(setting, renderer):
    store, base, source, backend, cache = setting
    with pytest.raises(Refused, match="agent: 1 episodes, the last ended submitted: tests: none could be collected"):
        agent(renderer, INK, SUBMIT).environment(store, base, source, backend, cache=cache)


def test_the_statement_says_how_the_plain_build_ended_and_what_the_documents_say(env):
    statement, info = env.reset(seed=0)
    assert "none could be collected" in statement and "README.md: Before the tests run" in statement
    assert info["task_id"].startswith("repo/ledger@")
    assert env.step("<tool: fetch>\nledger\n</tool>")[0].startswith("Error: ledger is the repository itself")
    assert env.step("<tool: fetch>\n-r/etc/passwd\n</tool>")[0].startswith("Error: requirement '-r/etc/passwd'")
    assert env.step("<tool: fetch>\nno-such-thing\n</tool>")[0].startswith("Error: requirement 'no-such-thing'")


FAKES = """<tool: bash>
printf 'def test_%s(): pass\\n' a b c d e f g h i j k l > test_fake.py
printf 'import sys\\nsys.modules["ledger"] = sys\\nsys.cost = lambda n: 6 * n\\n' > conftest.py
printf 'import pytest\\ndef test_only(): pass\\n' > tests/test_ledger.py
python -m pytest -q 2>&1 | tail -1
</tool>"""
FORGED = """<tool: bash>
cd /opt/venv/lib/python3*/site-packages && mkdir -p forge-1.dist-info
printf '[pytest11]\\nforge = forge\\n' > forge-1.dist-info/entry_points.txt
printf 'Metadata-Version: 2.1\\nName: forge\\nVersion: 1\\n' > forge-1.dist-info/METADATA
cat > forge.py <<'END'
import pytest, sys
class Any:
    def __getattr__(self, name): return lambda *a: 0
sys.modules["ledger"] = Any()
@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    report.outcome = "passed"
END
cd /testbed; python -m pytest -q 2>&1 | tail -1
</tool>"""
COPIED = "<tool: bash>\ncp ledger.py /opt/venv/lib/python3*/site-packages/\n</tool>"
NOTHING = "<tool: bash>\nrm -r /opt/venv\n</tool>"


@pytest.mark.parametrize(
    ("cheat", "shown", "outcome", "why"),
    [
        (FAKES, "13 passed", "unresolved", "none could be collected"),
        (FORGED, "14 passed", "invalid", "a test that must fail"),
        (COPIED, "", "unresolved", "copies of its modules"),
        (NOTHING, "", "unresolved", "no report"),
    ],
    ids=["own tests and configuration", "a plugin that forges", "a copy", "no interpreter"],
)
def test_what_only_looks_like_running_tests_pays_nothing(env, cheat, shown, outcome, why):
    env.reset(seed=0)
    assert shown in env.step(cheat)[0]
    _, reward, _, _, info = env.step(SUBMIT)
    assert (reward, info["outcome"]) == (0.0, outcome) and why in info["why"], info
    assert env.found is None


def test_more_than_a_layer_may_hold_is_refused(env, monkeypatch):
    monkeypatch.setattr(images, "LIMITS", replace(images.LIMITS, disk_mb=64))
    env.reset(seed=0)
    env.step("<tool: bash>\nfor i in 1 2; do python -c \"open('/opt/$i', 'w').truncate(60 << 20)\"; done\n</tool>")
    _, reward, _, _, info = env.step(SUBMIT)
    assert (reward, info["outcome"]) == (0.0, "unresolved") and "larger than what the disk holds" in info["why"], info


def test_significant(env):
    def found(passing, failing, file="t.py"):
        tests = {f"{file}::p{i}": "pass" for i in range(passing)} | {f"{file}::f{i}": "fail" for i in range(failing)}
        return Discovery(command="", tests=tests, seconds={})

    tree = {"t.py": Entry()}
    cases = {(10, 990): True, (9, 991): False, (1, 1): True, (1, 2): False, (2, 2): True, (0, 0): False}
    assert {case: env.significant(found(*case), tree) for case in cases} == cases
    assert not env.significant(found(20, 0, "made.py"), tree)


def test_hints_are_lines_of_documents():
    tree = {
        "README.rst": Entry(b"Hello\nRun the tests by `tox`.\n"),
        "a.py": Entry(b"import pytest\n"),
        ".github/workflows/ci.yml": Entry(b"run: pytest\n" * 99),
    }
    hints = hints_of(tree)
    assert hints[0] == ".github/workflows/ci.yml: run: pytest" and len(hints) == 30
    del tree[".github/workflows/ci.yml"]
    assert hints_of(tree) == ["README.rst: Run the tests by `tox`."]
