"""Episodes over messages, and many of them: the same endings as over tokens, over real HTTP."""

import json
import re

import pytest

import envs
from agents.chat import run_chat_episode
from agents.episode import run_episode
from agents.play import Plan, player, run, summary
from envs.errors import InfraError
from examples.reading_list import ReadingList
from policy.completion import Sampling
from policy.endpoint import ChatPolicy, Endpoint, EndpointConfig
from policy.meter import OverBudget, Prices
from policy.renderer import CwmRenderer, train_tokenizer
from policy.scripted import ScriptedPolicy, replies
from policy.serve import ServeConfig, Server

READING = "examples.reading_list:ReadingList"


class Count(envs.Env):
    """Ends when told to stop; the return counts turns."""

    tools = ("bash", "submit")
    context_tokens, turn_tokens, turns = 4000, 40, 9

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.actions = []
        return f"task {seed} of {(options or {}).get('split')}", {"task_id": f"count/{seed}"}

    def step(self, action):
        self.actions.append(action)
        if "crash" in action:
            raise InfraError("the sandbox died")
        return f"you said {action}", 1.0, "stop" in action, False, {"tool": "bash"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    texts = ["go on stop you said task of train crash", "cat shop.py\n cat bank.py\n cat game.py\n farm trip mill"]
    train_tokenizer(texts * 10, 420).save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def renderer(directory):
    return CwmRenderer(directory)


def serving(renderer, script, **config):
    script = replies(*script) if isinstance(script, tuple) else script
    fields = {"model": "tiny", "max_context": 2048, "port": 0} | config
    return Server(ScriptedPolicy(renderer, script, version=7), renderer, ServeConfig(**fields))


def play(renderer, *actions, env=None, endpoint=None, server=None, **kwargs):
    with serving(renderer, actions, **(server or {})) as server:
        policy = ChatPolicy(Endpoint(EndpointConfig(url=server.url, retries=0, **(endpoint or {}))))
        kwargs = {"style": "plain", "options": {"split": "train"}} | kwargs
        return run_chat_episode(env or Count(), policy, Sampling(max_tokens=40), episode="e", seed=3, **kwargs)


def test_an_episode_in_text(renderer):
    trajectory = play(renderer, "go on", "stop")
    assert trajectory.info["messages"] == [
        {"role": "user", "content": "task 3 of train"},
        {"role": "assistant", "content": "go on"},
        {"role": "user", "content": "you said go on"},
        {"role": "assistant", "content": "stop"},
    ]
    assert (trajectory.reward, trajectory.turns, trajectory.stop, trajectory.outcome) == (
        2.0,
        2,
        "submitted",
        "resolved",
    )
    assert trajectory.task_id == "count/3" and trajectory.segments == [] and not trajectory.trainable
    first = len(renderer.start("task 3 of train"))
    said = [[*renderer.encode(text), renderer.end_id] for text in ("go on", "stop")]
    second = first + len(said[0]) + len(renderer.extend(said[0][-1], "tool: bash", "you said go on"))
    assert trajectory.info["usage"] == {
        "prompt": first + second,
        "completion": len(said[0]) + len(said[1]),
        "cached": 0,
    }


def test_an_episode_with_the_servers_own_tool_calls(renderer):
    env = Count()
    trajectory = play(
        renderer, "<tool: bash>\ngo on\n</tool>", "hm", "<tool: bash>\nstop\n</tool>", env=env, calling="json"
    )
    assert env.actions == ["<tool: bash>\ngo on\n</tool>", "hm", "<tool: bash>\nstop\n</tool>"]
    system, _, first, result, second, told, third = trajectory.info["messages"]
    assert system["role"] == "system" and "<tool:" not in system["content"]
    call = first["tool_calls"][0]
    assert json.loads(call["function"]["arguments"]) == {"command": "go on"}
    assert result == {"role": "tool", "tool_call_id": call["id"], "content": "you said <tool: bash>\ngo on\n</tool>"}
    assert second == {"role": "assistant", "content": "hm"} and told["role"] == "user" and third["tool_calls"]
    assert trajectory.reward == 3.0


def test_the_cwm_style_tells_of_tools_and_of_what_is_left(renderer):
    messages = play(renderer, "go on", "stop", style="cwm").info["messages"]
    assert "<tool: NAME>" in messages[0]["content"] and "submit" in messages[0]["content"]
    assert "<output>\nyou said go on\n</output>\n<budget>\nturns: 8\ntokens: " in messages[3]["content"]


def test_limits_end_it(renderer):
    cut = play(renderer, "go on", max_turns=2)
    assert (cut.stop, cut.outcome, cut.turns, cut.reward) == ("turn_limit", "unresolved", 2, 2.0)
    counted = play(renderer, "go on", max_context=80)
    assert counted.stop == "context_limit" and 1 < counted.turns < 9
    full = play(renderer, "go on", server={"max_context": 40})  # the server says that it is full
    assert full.stop == "context_limit" and full.turns >= 1
    with pytest.raises(ValueError, match="maximum context length is 4 tokens"):
        play(renderer, "go on", server={"max_context": 4})  # nothing could ever be played


def test_infrastructure_is_data_without_a_reward(renderer):
    crashed = play(renderer, "go on", "crash")
    assert (crashed.reward, crashed.outcome, crashed.stop) == (None, "infra", "infra")
    assert crashed.info["why"] == "the sandbox died" and crashed.info["messages"][-1]["content"] == "crash"

    def dead(episode, observation):
        raise InfraError("the engine is closed")

    with serving(renderer, dead) as server:
        policy = ChatPolicy(Endpoint(EndpointConfig(url=server.url, retries=0)))
        lost = run_chat_episode(Count(), policy, Sampling(), episode="e", seed=0)
    assert lost.outcome == "infra" and "status 503 (the engine is closed engine)" in lost.info["why"]


def test_money_ends_it(renderer):
    with pytest.raises(OverBudget, match="max_cost=1 is spent"):
        play(renderer, "go on", endpoint={"prices": Prices(prompt=1e6), "max_cost": 1})


def reader(episode, observation):
    """Reads the first file that is left."""
    return f"cat {re.search(r'[a-z]+[.]py', observation).group()}\n"


def plan(**fields):
    return Plan(
        **{"env": READING, "style": "plain", "tasks": 4, "samples": 2, "episodes": 3, "max_tokens": 24} | fields
    )


@pytest.mark.parametrize("level", ["chat", "tokens"])
def test_many_are_played_and_counted(renderer, directory, level, tmp_path):
    lines = []
    with serving(renderer, reader) as server:
        endpoint = Endpoint(EndpointConfig(url=server.url))
        tokenizer = str(directory) if level == "tokens" else ""
        found = run(plan(tokenizer=tokenizer), endpoint, tmp_path / "out", lines.append)
    assert found["ok"] and (found["planned"], found["played"], found["resolved"], found["rate"]) == (8, 8, 8, 1.0)
    assert found["usage"]["calls"] == 24 and found["level"] == level  # three files each
    assert sorted((row["task_id"], row["sample"]) for row in found["episodes"]) == [
        (f"validation/{index}", sample) for index in range(4) for sample in range(2)
    ]
    assert len(lines) == 8 and lines[-1].startswith("[8/8] validation/")
    assert summary(found).startswith("tiny: 8 of 8 resolved (100.0%); 24 calls, 0 retries")
    kept = [json.loads(line) for line in (tmp_path / "out/trajectories.jsonl").read_text().splitlines()]
    assert len(kept) == 8 and all(bool(row["segments"]) == (level == "tokens") for row in kept)


def test_what_ends_early_keeps_what_was_played(renderer):
    with serving(renderer, reader) as server:
        endpoint = Endpoint(EndpointConfig(url=server.url, prices=Prices(completion=1e6), max_cost=60))
        found = run(plan(episodes=1), endpoint, None, lambda line: None)
        assert not found["ok"] and "max_cost=60 is spent" in found["error"] and 0 < found["played"] < 8
        assert found["played"] == found["resolved"] and f"{8 - found['played']} not played" in summary(found)
        with pytest.raises(OverBudget):  # nothing at all was played
            run(plan(episodes=1), endpoint, None, lambda line: None)


def test_lost_episodes_are_played_again(renderer):
    failed = set()

    def once(episode, observation):
        if ".0" in episode and episode not in failed:
            failed.add(episode)
            raise InfraError("a moment")
        return reader(episode, observation)

    with serving(renderer, once) as server:
        endpoint = Endpoint(EndpointConfig(url=server.url, retries=0))
        found = run(plan(retries=1), endpoint, None, lambda line: None)
        assert found["ok"] and found["resolved"] == 8 and len(failed) == 8
        failed.clear()
        lost = run(plan(retries=0), endpoint, None, lambda line: None)
    assert not lost["ok"] and lost["outcomes"] == {"infra": 8} and "8 lost to infrastructure" in summary(lost)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"tasks": 0}, "--tasks 0: must be at least 1"),
        ({"max_turns": -1}, "--max-turns -1: must not be negative"),
        ({"style": "cwn"}, "--style 'cwn': one of .* Did you mean 'cwm'"),
        ({"tokenizer": "x", "calling": "json"}, "only messages have tool calls"),
    ],
)
def test_a_bad_plan_is_refused(fields, why):
    with pytest.raises(ValueError, match=why):
        plan(**fields)


def test_tokens_over_http_are_the_tokens_of_an_episode_here(renderer, directory):
    with serving(renderer, reader) as server:
        play = player(plan(tokenizer=str(directory)), Endpoint(EndpointConfig(url=server.url)))
        found = play(2, 0, 0)
    policy = ScriptedPolicy(renderer, reader, version=7)
    here = run_episode(
        ReadingList(), policy, renderer, Sampling(max_tokens=24), episode="e", seed=2, options={"split": "validation"}
    )
    assert found.segments == here.segments and found.trainable
