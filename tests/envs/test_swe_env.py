"""`codeworld/SWE-v0` played by hand and by scripts, and the checker over every registered id."""

import pytest

import envs
from envs.errors import InfraError
from envs.swe.env import SWEEnv
from envs.tiny import repairs
from envs.tiny.experts import SUBMIT, bash, edit

TASK = repairs.task("train", 3)
P = TASK.provenance
INDENT = next(
    line for line in TASK.files(TASK.setup)[P["module"]].decode().split("\n") if line.strip() == P["line"].strip()
)


@pytest.fixture
def env(native):
    env = SWEEnv(backend=native, reward="binary", context_lines=0)
    yield env
    env.close()


def fix():
    return edit(P["module"], INDENT, INDENT.replace(P["line"].strip(), P["fix"].strip()))


@pytest.mark.parametrize("name", envs.registered())
def test_every_registered_id_keeps_the_contract(name, native):
    envs.check_env(envs.make(name))


def test_an_episode_by_hand(env):
    statement, info = env.reset(seed=3, options={"split": "train"})
    assert statement == TASK.prompt and info["task_id"] == TASK.id
    text, reward, terminated, truncated, info = env.step(bash(f"cat {P['module']}"))
    assert text.encode() == TASK.files(TASK.setup)[P["module"]]
    assert (reward, terminated, truncated, info["tool"]) == (0.0, False, False, "bash")
    assert "failed" in env.step(bash(TASK.grader.command))[0]
    assert env.step(fix())[0].startswith(f"Edited {P['module']} at line")
    assert "failed" not in env.step(bash(TASK.grader.command))[0]
    text, reward, terminated, truncated, info = env.step(SUBMIT)
    assert (reward, terminated, truncated, info["stop"], info["outcome"]) == (1.0, True, False, "submitted", "resolved")
    with pytest.raises(RuntimeError, match="reset"):
        env.step(SUBMIT)


@pytest.mark.docker
def test_an_episode_in_docker():
    from envs.sandbox.docker import DockerBackend

    backend = DockerBackend()
    env = SWEEnv(backend=backend, reward="binary", context_lines=0)
    try:
        for repair, reward in ((True, 1.0), (False, 0.0)):
            env.reset(options={"task": TASK})
            assert env.step(bash(f"cat {P['module']}"))[0].encode() == TASK.files(TASK.setup)[P["module"]]
            if repair:
                env.step(fix())
            assert ("failed" in env.step(bash(TASK.grader.command))[0]) is not repair
            assert env.step(SUBMIT)[1] == reward
    finally:
        env.close()
        backend.close()


def test_submitting_nothing_pays_nothing(env):
    env.reset(options={"task": TASK})
    _, reward, terminated, _, info = env.step(SUBMIT)
    assert (reward, terminated, info["outcome"]) == (0.0, True, "unresolved")


def test_the_budget_ends_an_episode_and_what_was_done_counts(env):
    env.reset(options={"task": TASK})
    env.step(fix())
    for _ in range(TASK.budget.turns - 2):
        assert not env.step(bash("true"))[3]
    _, reward, terminated, truncated, info = env.step(bash("true"))
    assert (reward, terminated, truncated, info["stop"]) == (1.0, False, True, "turn_limit")


def test_malformed_actions_end_an_episode_as_failed(env):
    env.reset(options={"task": TASK})
    env.step(fix())
    assert env.step("hello")[0].startswith("Error: expected one tool call")
    _, reward, _, truncated, info = env.step("hello")
    assert (reward, truncated, info["stop"]) == (0.0, True, "format_error")


def test_state_is_kept_between_turns_and_not_between_episodes(env):
    env.reset(options={"task": TASK})
    env.step(bash("cd tests; export X=1; touch mark"))
    assert env.step(bash("pwd; echo $X; ls mark"))[0] == "/repo/tests\n1\nmark\n"
    env.reset(options={"task": TASK})
    assert env.step(bash("pwd; echo $X; ls mark 2>&1"))[0].startswith("/repo\n\n")


def test_hidden_tests_are_not_in_the_world(env):
    env.reset(options={"task": TASK})
    assert "hidden" not in env.step(bash("grep -rl hidden . / --include=*.py -s 2>/dev/null | grep -v /usr | head"))[0]


def test_blind_hides_what_tools_say(native):
    env = SWEEnv(backend=native, reward="binary", blind=True)
    env.reset(options={"task": TASK})
    assert env.step(bash("echo hi"))[0] == ""
    env.close()


def test_fork_goes_on_independently(env):
    env.reset(options={"task": TASK})
    env.step(bash("cd tests"))
    one, two = env.fork(2)
    assert one.step(bash("cd ..; pwd"))[0] == "/repo\n"
    one.step(fix())
    assert one.step(SUBMIT)[1] == 1.0
    assert two.step(bash("pwd"))[0] == "/repo/tests\n"
    assert two.step(SUBMIT)[1] == 0.0
    assert env.step(SUBMIT)[1] == 0.0


def test_a_dead_sandbox_is_infrastructure_not_a_reward(env):
    env.reset(options={"task": TASK})
    env._sandbox.close()
    with pytest.raises(InfraError):
        env.step(bash("true"))


def test_mistakes_are_one_line():
    with pytest.raises(ValueError, match=r"unknown environment 'codeworld/SWE-v1'.*Did you mean 'codeworld/SWE-v0'"):
        envs.make("codeworld/SWE-v1")
    with pytest.raises(ValueError, match="unknown reward 'binry'.*Did you mean 'binary'"):
        envs.make("codeworld/SWE-v0", reward="binry")
    with pytest.raises(ValueError, match="unknown task set 'tiny-repair'"):
        envs.make("codeworld/SWE-v0", tasks="tiny-repair")
    with pytest.raises(ValueError, match="no module 'nowhere'"):
        envs.make("nowhere:Env")
    with pytest.raises(ValueError, match="does not take these arguments"):
        envs.make("codeworld/SWE-v0", colour="red")


class Broken(envs.Env):
    """Breaks one rule of the contract, chosen by name."""

    def __init__(self, how):
        self.how = how

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.n = getattr(self, "n", 0) + 1
        return f"say a {self.n if self.how == 'statement' else ''}", {}

    def step(self, action):
        reward = float("nan") if self.how == "reward" else 0.0
        return "", reward, self.how != "endless", False, {"stop": "tired"} if self.how == "stop" else {}


@pytest.mark.parametrize(
    ("how", "said"), [("statement", "reset"), ("reward", "reward"), ("endless", "no end"), ("stop", "tired")]
)
def test_the_checker_names_the_broken_rule(how, said):
    with pytest.raises(ValueError, match=f"(?i){said}"):
        envs.check_env(Broken(how))


def test_episodes_that_start_at_once_share_one_backend(monkeypatch):
    import time
    from concurrent.futures import ThreadPoolExecutor

    from envs.swe import env as module

    made = []

    def slow(name):
        time.sleep(0.05)
        made.append(name)
        return object()

    monkeypatch.setattr(module, "make_backend", slow)
    monkeypatch.setattr(module, "_BACKENDS", {})
    with ThreadPoolExecutor(16) as pool:
        assert len(set(map(id, pool.map(module.shared_backend, ["auto"] * 16)))) == 1
    assert made == ["auto"]
