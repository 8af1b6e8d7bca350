"""Trajectories: parallel lists, the token-exactness assertion, JSON there and back."""

import pytest

from agents.trajectory import Group, Segment, Trajectory
from policy.completion import Completion, digest


def completion(ids, prompt, versions=None):
    return Completion(
        token_ids=ids,
        logprobs=[-0.5] * len(ids),
        versions=versions or [3] * len(ids),
        finish="stop",
        prompt_digest=digest(prompt),
    )


def test_two_turns_by_hand():
    segment = Segment()
    segment.observe([5, 6])
    segment.act(completion([17, 2], [5, 6], [4, 5]))
    segment.observe([8])
    segment.act(completion([9], [5, 6, 17, 2, 8], [5]))
    assert segment.token_ids == [5, 6, 17, 2, 8, 9]
    assert segment.loss_mask == [0, 0, 1, 1, 0, 1]
    assert segment.logprobs == [0, 0, -0.5, -0.5, 0, -0.5]
    assert segment.versions == [-1, -1, 4, 5, -1, 5]
    trajectory = Trajectory(task_id="t", segments=[segment], reward=1.0)
    assert (trajectory.action_tokens, trajectory.oldest_version, trajectory.newest_version) == (3, 4, 5)
    assert trajectory.trainable
    assert Trajectory.from_json(trajectory.to_json()) == trajectory


@pytest.mark.parametrize("read", [[5], [5, 7], [5, 6, 6], [6, 5]])
def test_token_drift_is_caught(read):
    segment = Segment()
    segment.observe([5, 6])
    with pytest.raises(AssertionError, match="token drift"):
        segment.act(completion([1], read))


def test_unequal_lists_are_refused():
    with pytest.raises(AssertionError):
        Segment([1, 2], [0], [0.0, 0.0], [-1, -1]).check()
    with pytest.raises(AssertionError):
        Completion(token_ids=[1], logprobs=[], versions=[0], finish="stop", prompt_digest=0)


def test_without_a_reward_nothing_is_trained():
    assert not Trajectory(task_id="t", segments=[Segment([1, 2], [0, 1], [0.0, -1.0], [-1, 0])]).trainable
    assert not Trajectory(task_id="t", reward=1.0, segments=[Segment([1], [0], [0.0], [-1])]).trainable
    assert Group("g", "t").oldest_version == -1
