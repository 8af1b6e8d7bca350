"""The bandit pays the share of words in its set, and a policy of random weights can say words at all."""

import pytest

import envs
from envs.checker import check_env
from envs.tiny.bandit import TokenBandit
from policy.renderer import CwmRenderer
from policy.words import word_tokenizer


def test_the_reward_is_the_share_of_words_in_the_set():
    env = envs.make("codeworld/TokenBandit-v0", share=0.25, length=8)
    inside = [w for w in map("w{}".format, range(400)) if env.member(w)]
    outside = [w for w in map("w{}".format, range(400)) if not env.member(w)]
    assert 70 < len(inside) < 130  # a quarter
    for hits, said in ((8, 8), (3, 8), (2, 2), (8, 16), (0, 0)):
        env.reset(seed=0)
        _, reward, terminated, _, _ = env.step(" ".join(inside[:hits] + outside[: said - hits]))
        assert terminated and reward == hits / max(8, said)


def test_it_is_a_whole_environment():
    check_env(TokenBandit())


@pytest.mark.parametrize("arguments", [{"share": 1.0}, {"length": 0}])
def test_bad_arguments_are_one_line(arguments):
    with pytest.raises(ValueError, match="give a share between 0 and 1"):
        TokenBandit(**arguments)


def test_ids_and_words_are_one_to_one(tmp_path):
    word_tokenizer(64).save(str(tmp_path / "tokenizer.json"))
    renderer = CwmRenderer(tmp_path)
    assert renderer.vocab_size == 64
    ids = [40, 12, 63, 12]
    text = renderer.decode([*ids, renderer.end_id])
    assert len(text.split()) == 4 and all(word.startswith("w") for word in text.split())
    assert renderer.encode(text) == ids


def test_too_few_words_are_refused():
    with pytest.raises(ValueError, match="vocab_size=11 leaves no words"):
        word_tokenizer(11)
