"""The user's commands: a model served by one process and played by another; mini-swe-agent driving a served policy."""

import json
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from agents.episode import run_episode
from agents.trajectory import Trajectory
from benchmarks.systems import lanes
from envs.registration import make
from policy import models
from policy.completion import Sampling
from policy.renderer import CwmRenderer, train_tokenizer
from policy.scripted import ScriptedPolicy, replies
from policy.serve import ServeConfig, Server
from policy.torch_engine import EngineConfig, TorchEngine

ROOT = Path(__file__).resolve().parents[2]
MODEL = "policy/cwm_tiny"
MINI = """
import json, sys
from minisweagent.agents.default import DefaultAgent
from minisweagent.config import get_config_from_spec
from minisweagent.environments.local import LocalEnvironment
from minisweagent.models.litellm_model import LitellmModel

url, work = sys.argv[1:]
config = get_config_from_spec("mini.yaml")
kwargs = {"api_base": url, "api_key": "none", "drop_params": True}
model = config["model"] | {"model_name": "openai/tiny", "model_kwargs": kwargs, "cost_tracking": "ignore_errors"}
fields = {k: v for k, v in config["agent"].items() if k.endswith("template")}
agent = DefaultAgent(LitellmModel(**model), LocalEnvironment(cwd=work), **fields, step_limit=8)
print(json.dumps(agent.run("Make add() add.") | {"roles": [m["role"] for m in agent.messages]}))
"""


@pytest.mark.slow
@pytest.mark.native
def test_a_served_model_plays_as_it_does_here(tmp_path):
    serve = [sys.executable, "-m", "policy", "serve", MODEL, "--port", "0", "--slots", "4", "--max-context", "768"]
    with subprocess.Popen(serve, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            said = server.stdout.readline()
            assert said.startswith("cwm_tiny, 768 tokens of context: http://127.0.0.1:")
            url = said.split(": ")[1].split()[0]
            play = [sys.executable, "-m", "agents", "play", "--endpoint", url, "--tokenizer", MODEL, "--style", "plain"]
            play += ["--tasks", "3", "--episodes", "3", "--out", str(tmp_path), "--json", str(tmp_path / "found.json")]
            done = subprocess.run(play, cwd=ROOT, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
        finally:
            server.send_signal(signal.SIGINT)
            status = server.wait(30)
    assert status == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["ok"] and found["played"] == 3 and "of 3 resolved" in done.stdout
    far = {t.task_id: t for t in map(Trajectory.from_json, (tmp_path / "trajectories.jsonl").read_text().splitlines())}
    assert len(far) == 3
    for number in range(3):
        here = play_here(number)
        assert far[here.task_id].segments[0].token_ids == here.segments[0].token_ids
        assert (far[here.task_id].outcome, far[here.task_id].reward) == (here.outcome, here.reward)


def play_here(index):
    with TorchEngine(models.load(ROOT / MODEL), EngineConfig(slots=1, max_context=768)) as engine:
        seed = zlib.crc32(f"0/validation/{index}/0".encode()) & 0x7FFFFFFF
        sampling = Sampling(max_tokens=4096, seed=seed)
        env = make("codeworld/SWE-v0")
        renderer, options = CwmRenderer(ROOT / MODEL), {"split": "validation"}
        return run_episode(env, engine, renderer, sampling, episode="e", seed=index, options=options, max_context=768)


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (["policy", "serve", "nowhere"], "no tokenizer at nowhere/tokenizer.json"),
        (["agents", "play", "--endpoint", "localhost"], "endpoint 'localhost' is no base URL"),
        (["agents", "play", "--endpoint", "http://host", "--extra", "[]"], "--extra '[]' is no JSON object"),
    ],
)
@pytest.mark.slow
def test_what_cannot_be_run_is_one_line(command, why):
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and why in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_mini_swe_agent_drives_a_served_policy(tmp_path):
    try:
        python = lanes.install()
    except lanes.Failed as why:
        pytest.skip(f"mini-swe-agent can't be installed here: {why}")
    (tmp_path / "sum.py").write_text("def add(a, b):\n    return a - b\n")
    train_tokenizer(["def add return <tool: bash>"] * 10, 400).save(str(tmp_path / "tokenizer.json"))
    renderer = CwmRenderer(tmp_path)
    actions = (
        "I look.\n<tool: bash>\ncat sum.py\n</tool>",
        "no call at all",
        "<tool: bash>\nsed -i 's/a - b/a + b/' sum.py\n</tool>",
        "<tool: bash>\necho COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT; cat sum.py\n</tool>",
    )
    seen, said = [], replies(*actions)

    def script(episode, observation):
        seen.append((episode, observation))
        return said(episode, observation)

    config = ServeConfig(model="tiny", max_context=100_000, port=0)
    (tmp_path / "home").mkdir()
    with Server(ScriptedPolicy(renderer, script), renderer, config) as server:
        done = subprocess.run(
            [str(python), "-c", MINI, server.url, str(tmp_path)],
            cwd=tmp_path,
            env={
                "PATH": "/usr/bin:/bin",
                "MSWEA_SILENT_STARTUP": "1",
                "MSWEA_GLOBAL_CONFIG_DIR": str(tmp_path / "home"),
            },
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["exit_status"] == "Submitted" and found["submission"] == "def add(a, b):\n    return a + b\n"
    assert "a + b" in (tmp_path / "sum.py").read_text()
    assert len(seen) == 4 and len({episode for episode, _ in seen}) == 1  # one conversation, one episode
    assert "Make add() add." in seen[0][1] and "the body is its command" in seen[0][1]
    assert seen[1][1].startswith("<|start_header_id|>tool: bash<|end_header_id|>") and "return a - b" in seen[1][1]
    assert "MUST include at least one tool call" in seen[2][1]
