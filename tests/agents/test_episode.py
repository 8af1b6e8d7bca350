"""One episode: the tokens are what was sampled, limits end it, infrastructure is data."""

import pytest

import envs
from agents.episode import run_episode
from agents.prompts import spoken
from envs.errors import InfraError
from policy.completion import Sampling
from policy.renderer import CwmRenderer, load, train_tokenizer
from policy.scripted import ScriptedPolicy, replies


class Count(envs.Env):
    """Ends when told to stop; the return counts turns."""

    context_tokens = 60

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return f"task {seed} of {(options or {}).get('split')}", {"task_id": f"count/{seed}"}

    def step(self, action):
        if action == "crash":
            raise InfraError("the sandbox died")
        return f"you said {action}", 1.0, action == "stop", False, {"tool": "bash"}


class Long(Count):
    context_tokens = 4000
    tools = ("bash", "submit")


@pytest.fixture(scope="module")
def renderer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["go on stop you said task of train crash"] * 10, 400).save(str(path / "tokenizer.json"))
    return CwmRenderer(path)


def play(renderer, *actions, env=None, **kwargs):
    policy = ScriptedPolicy(renderer, replies(*actions), version=7)
    return run_episode(
        env or Count(),
        policy,
        renderer,
        Sampling(max_tokens=20),
        episode="e",
        seed=3,
        options={"split": "train"},
        **kwargs,
    )


def test_tokens_are_the_messages_and_nothing_else(renderer):
    trajectory = play(renderer, "go on", "stop")
    (segment,) = trajectory.segments
    expected = renderer.start("task 3 of train")
    first = [*renderer.encode("go on"), renderer.end_id]
    expected += (
        first + renderer.extend(first[-1], "tool: bash", "you said go on") + [*renderer.encode("stop"), renderer.end_id]
    )
    assert segment.token_ids == expected
    assert [i for i, m in zip(segment.token_ids, segment.loss_mask, strict=True) if m] == first + [
        *renderer.encode("stop"),
        renderer.end_id,
    ]
    assert (trajectory.reward, trajectory.turns, trajectory.stop, trajectory.outcome) == (
        2.0,
        2,
        "submitted",
        "resolved",
    )
    assert (trajectory.task_id, trajectory.oldest_version, trajectory.newest_version) == ("count/3", 7, 7)


def test_the_context_ends_an_episode(renderer):
    trajectory = play(renderer, "go on")
    assert trajectory.stop == "context_limit" and trajectory.outcome == "unresolved"
    assert sum(len(s) for s in trajectory.segments) <= 60 + 20


def test_a_tighter_bound_of_the_run_ends_it_sooner(renderer):
    assert [play(renderer, "go on", max_turns=n).turns for n in (1, 2, 0)] == [1, 2, play(renderer, "go on").turns]
    cut = play(renderer, "go on", max_turns=2)
    assert (cut.stop, cut.outcome, cut.reward) == ("turn_limit", "unresolved", 2.0)
    assert play(renderer, "go on", "stop", max_turns=2).stop == "submitted"
    short = play(renderer, "go on", max_context=40)
    assert short.stop == "context_limit" and sum(len(s) for s in short.segments) <= 40 + 20
    assert play(renderer, "go on", max_context=4000).segments == play(renderer, "go on").segments


def test_infrastructure_is_data_without_a_reward(renderer):
    trajectory = play(renderer, "go on", "crash")
    assert (trajectory.reward, trajectory.outcome, trajectory.stop) == (None, "infra", "infra")
    assert trajectory.info["why"] == "the sandbox died" and not trajectory.trainable


def test_the_cwm_style_wraps_and_counts(renderer):
    policy = ScriptedPolicy(renderer, replies("go on", "stop"))
    trajectory = run_episode(Long(), policy, renderer, Sampling(max_tokens=20), episode="e", seed=0, style="cwm")
    text = renderer.decode(trajectory.segments[0].token_ids)
    assert "<output>\nyou said go on\n</output>\n<budget>\nturns: " in text and "# Environment" in text


def test_the_clock_hears_what_time_goes_into(renderer):
    heard = []
    play(renderer, "go on", "stop", clock=heard.append)
    assert heard == ["reset", "wait_policy", "env", "wait_policy", "env", "env"]  # the last is the environment's end


def test_thoughts_are_the_policy_s_own(renderer):
    policy = ScriptedPolicy(renderer, replies("first I go</think>\n\ngo on", "I never end", "enough</think>stop"))
    trajectory = run_episode(Long(), policy, renderer, Sampling(max_tokens=30), episode="e", seed=0, style="think")
    (segment,) = trajectory.segments
    text = renderer.decode(segment.token_ids)
    assert text.count("<think>\n") == 3 and "Reason first, between <think> and </think>." in text
    assert "you said go on\n" in text and "you said \n" in text and trajectory.stop == "submitted"
    said = renderer.decode([i for i, m in zip(segment.token_ids, segment.loss_mask, strict=True) if m])
    assert (
        said == "first I go</think>\n\ngo onI never endenough</think>stop"
    )  # what was put into its mouth is not trained


@pytest.mark.parametrize(
    ("message", "heard"),
    [
        ("ls", "ls"),
        ("<think>\nwhy\n</think>\n\nls", "ls"),
        ("\n<think>why</think>echo '</think>'", "echo '</think>'"),
        ("<think>\nls", ""),
        ("echo '</think>'", "echo '</think>'"),
    ],
)
def test_an_environment_hears_no_thoughts(message, heard):
    assert spoken(message) == heard


def test_a_template_that_drops_thoughts_makes_branches(tmp_path):
    """Each turn's tokens are trained in the branch in which they were sampled, and read by the next as the template has them."""
    train_tokenizer(["go on stop you said task of train", "user assistant"] * 10, 400).save(
        str(tmp_path / "tokenizer.json")
    )
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}<|begin_of_text|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|begin_of_text|>assistant\n{% endif %}"
    )
    renderer = load(tmp_path)
    trajectory = play(renderer, "<think>a</think>go on", "go on", "<think>b</think>stop", env=Long())
    first, second = trajectory.segments
    said = [
        renderer.decode([i for i, m in zip(s.token_ids, s.loss_mask, strict=True) if m]) for s in trajectory.segments
    ]
    assert said == ["<think>a</think>go on", "go on<think>b</think>stop"]
    assert renderer.decode(second.token_ids).startswith(
        renderer.decode(first.token_ids).split("<think>")[0] + "go on<|begin_of_text|>tool\nyou said go on"
    )
    assert (trajectory.turns, trajectory.reward, trajectory.action_tokens) == (
        3,
        3.0,
        sum(map(sum, (first.loss_mask, second.loss_mask))),
    )
