"""CWM's layout grows: what was sampled stays, what is new is encoded once, and content can't become control tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.completion import digest
from policy.renderer import BEGIN, END, MARKERS, CwmRenderer, header, train_tokenizer

CORPUS = [
    "<tool: bash>\ncat shop.py\n</tool>",
    "def f(a, b):\n    return a + b\n",
    "f(1, 2) in shop.py gives 3, not 2.",
] * 20


@pytest.fixture(scope="module")
def renderer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(CORPUS, 512).save(str(path / "tokenizer.json"))
    return CwmRenderer(path)


def test_an_episode_is_one_growing_list(renderer):
    ids = renderer.start("fix it")
    action = [*renderer.encode("<tool: bash>\nls\n</tool>"), renderer.end_id]
    after = ids + action + renderer.extend(action[-1], "tool: bash", "a.py\n")
    assert after[: len(ids)] == ids and after[len(ids) : len(ids) + len(action)] == action
    text = f"{BEGIN}{header('user')}fix it{END}{header('assistant')}<tool: bash>\nls\n</tool>{END}{header('tool: bash')}a.py\n{END}{header('assistant')}"
    assert renderer.decode(after) == text.replace(END, "")


def test_a_turn_cut_by_length_is_closed(renderer):
    cut = renderer.encode("abc")
    assert renderer.extend(cut[-1], "tool: bash", "x")[0] == renderer.end_id
    assert renderer.extend(renderer.end_id, "tool: bash", "x")[0] != renderer.end_id


def test_headers_and_markers_are_single_tokens(renderer):
    for marker in MARKERS:
        assert len(renderer.encode(marker)) == 1
    assert len(renderer.start("")) == 4  # begin, user header, end, assistant header


@pytest.mark.parametrize("control", [BEGIN, END, header("assistant"), header("tool: bash")])
def test_content_never_becomes_a_control_token(renderer, control):
    ids = renderer.encode(f"x{control}y")
    special = {renderer.start("")[0], renderer.end_id, renderer.start("")[1], renderer.start("")[-1]}
    assert not special & set(ids)
    assert renderer.decode(ids) == f"x{control}y"


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80))
def test_any_text_comes_back(renderer, text):
    clean = text.encode("utf-8", "replace").decode()
    assert renderer.decode(renderer.encode(text)) == clean


def test_digest_tells_lists_apart():
    assert digest([1, 2, 3]) == digest((1, 2, 3)) != digest([1, 3, 2])


def test_a_missing_tokenizer_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer at .*tokenizer.json; give a model directory"):
        CwmRenderer(tmp_path)


def test_a_dialogue_is_what_start_and_extend_give(renderer):
    dialogue = renderer.open("fix it", "You repair.")
    first = dialogue.prompt()
    assert first.branch and first.token_ids == renderer.start("fix it", "You repair.")
    action = [*renderer.encode("<tool: bash>\nls\n</tool>"), renderer.end_id]
    assert dialogue.say(action) == "<tool: bash>\nls\n</tool>"
    dialogue.hear("edit", "a.py\n")
    second = dialogue.prompt()
    assert not second.branch and second.token_ids == renderer.extend(action[-1], "tool: edit", "a.py\n")


def test_thoughts_begin_every_turn(renderer):
    dialogue = renderer.open("fix it", think=True)
    think = renderer.encode("<think>\n")
    assert dialogue.prompt().token_ids == renderer.start("fix it") + think
    cut = renderer.encode("why")
    assert dialogue.say(cut) == "<think>\nwhy"
    dialogue.hear("bash", "x")
    assert dialogue.prompt().token_ids == renderer.extend(cut[-1], "tool: bash", "x") + think
