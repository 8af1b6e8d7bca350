"""Recipes: every committed one loads, its resolved form is the same run, and mistakes are one line with a remedy."""

import pytest

from rl.config import ROOT, dump, load

RECIPES = sorted([*(ROOT / "rl" / "recipes").glob("*.toml"), *(ROOT / "examples").glob("*.toml")])


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_committed_recipes_load_and_resolve(path, tmp_path):
    config = load(path)
    assert (config.model / "tokenizer.json").is_file() or config.policy.engine == "vllm"
    again = tmp_path / "recipe.toml"
    again.write_text(dump(config))
    assert load(again) == config


def test_overrides():
    config = load(
        RECIPES[-1],
        ["steps=3", "learn.lr=1e-5", "env.split=validation", 'eval.splits=["train"]', "env.kwargs.reward=cwm"],
    )
    assert (config.steps, config.learn.lr, config.env.split, config.eval.splits) == (3, 1e-5, "validation", ("train",))
    assert config.env.kwargs["reward"] == "cwm"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("learn.learning_rate=1", r"unknown key 'learning_rate'; remove it"),
        ("lern.lr=1", r"unknown key 'lern'.*Did you mean 'learn'"),
        ("learn.lr=fast", r"learn: lr='fast' must be float, not str"),
        ("steps=2.5", r"steps=2.5 must be int"),
        ("rollout.spawn=process", r"spawn='process' is none of ray, threads"),
        ("steps=0", r"steps=0 is too small; give at least 1"),
        ("rollout.workers=-1", r"rollout.workers=-1 is too small"),
        ("rollout.group_size=1", r"group_size=1 is too small; give at least 2"),
        ("eval.tasks=0", r"eval.tasks=0 is too small"),
        ("learn.algorithm=grpoo", r"learn: algorithm='grpoo' is unknown; .*Did you mean 'grpo'"),
        ("learn.critic_warmup_steps=5", r"learn.critic_warmup_steps=5: learn.algorithm='cwm' has no critic; leave"),
        ("learn.overrides.bound=clips", r"learn: algorithm 'cwm': bound='clips' is none of clip, clip_weight"),
        ("name=a/b", r"name='a/b' is no directory name"),
        ("steps", r"override 'steps' is not of the form"),
        ("admission.kv_tokens=700", r"kv_tokens=700 holds no episode of policy.max_context=768 tokens; raise it"),
        ("admission.load=2", r"admission.load=2.0 is a share of the turns"),
        (
            "format=2",
            r"tiny.toml has format=2, this codeworld reads 1; run it with the codeworld that it was written for",
        ),
        ("restarts=-1", r"restarts=-1 is too small; give at least 0"),
        (
            "deterministic=true",
            r"rollout.in_flight=96, learn.max_staleness=2 weights depend on time; give --rollout.wor",
        ),
        ("learn.ranks=0", r"learn.ranks=0 is too small; give at least 1"),
        ("learn.sequence_parallel=2", r"learn.sequence_parallel=2 does not divide learn.ranks=1; give a divisor"),
        (
            "learn.max_tokens=700",
            r"learn.max_tokens=700 is less than policy.max_context=768: one trajectory might not fit",
        ),
        ("steps.x=1", r"'steps' is a value, not a section"),
    ],
)
def test_mistakes_are_one_line(override, said):
    with pytest.raises(ValueError, match=said) as error:
        load(ROOT / "rl/recipes/tiny.toml", [override])
    assert "\n" not in str(error.value)


def test_a_missing_or_broken_recipe(tmp_path):
    with pytest.raises(ValueError, match=r"no recipe at .*; committed ones are"):
        load(tmp_path / "none.toml")
    bad = tmp_path / "bad.toml"
    bad.write_text("steps = = 3")
    with pytest.raises(ValueError, match="is not TOML"):
        load(bad)


def test_another_environment_starts_without_the_recipes_arguments():
    tiny = ROOT / "rl/recipes/tiny.toml"
    assert load(tiny, ["env.id=codeworld/SWE-v0"]).env.kwargs["reward"] == "binary"
    assert load(tiny, ["env.id=mine:Echo"]).env.kwargs == {}
    assert load(tiny, ["env.id=mine:Echo", "env.kwargs.word=1"]).env.kwargs == {"word": 1}


def test_staleness_is_the_recipes_or_the_presets():
    tiny = ROOT / "rl/recipes/tiny.toml"
    assert load(tiny, ["learn.max_staleness=5", "learn.overrides.max_staleness=9"]).learn.row().max_staleness == 5
    own = load(ROOT / "examples/reading_list.toml", ["learn.overrides.filter_stale=7"]).learn
    assert (own.max_staleness, own.row().max_staleness, own.row().filter_stale) == (None, 2, 7)


def test_the_laptop_run_keeps_32_episodes_in_flight():
    assert load(ROOT / "rl/recipes/tiny.toml").rollout.in_flight >= 32


def test_threads_have_no_ranks():
    with pytest.raises(ValueError, match=r"learn.ranks=2 are processes, and rollout.spawn='threads' has none; [^\n]*$"):
        load(ROOT / "rl/recipes/tiny.toml", ["learn.ranks=2", "rollout.spawn=threads"])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["policy.parity=0"], r"policy.parity=[0.]+ is no difference"),
        (["policy.share_gpu=true"], "policy.share_gpu=true is for one engine on one card"),
        (["policy.share_gpu=true", "policy.device=cuda"], "there is no one card to share"),
        (["rollout.address=auto", "rollout.spawn=threads"], "rollout.address='auto' is a Ray cluster"),
    ],
)
def test_places_that_contradict_one_another(overrides, said):
    with pytest.raises(ValueError, match=said) as error:
        load(ROOT / "rl/recipes/tiny.toml", overrides)
    assert "\n" not in str(error.value)


def test_gpus_that_are_not_there_are_refused_before_anything_starts():
    from rl.train import _check_gpus

    with pytest.raises(ValueError, match=r"needs 8 GPUs \(engines 1 x 4, learner 1 x 4\), and torch sees 0 here"):
        _check_gpus(load(ROOT / "rl/recipes/swe_grpo_8b_1node.toml"))
    _check_gpus(load(ROOT / "rl/recipes/tiny.toml"))
