"""CWM's special tokens in a tokenizer of Llama-3's layout, and its chat layout as a template."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from policy.layout import CHAT_TEMPLATE, SPECIAL, as_cwm
from policy.renderer import CwmRenderer
from policy.template import TemplateRenderer

TEXT = ["def f(a, b):\n    return a + b\n", "<think>\nwhy\n</think>\n\n<tool: bash>\nls\n</tool>"] * 5
LLAMA = {
    0: "begin_of_text",
    1: "end_of_text",
    4: "finetune_right_pad_id",
    6: "start_header_id",
    7: "end_header_id",
    8: "eom_id",
    9: "eot_id",
    10: "python_tag",
}


@pytest.fixture
def llama(tmp_path):
    """280 tokens, and behind them 256 special ones as in Llama-3.1: named, or reserved."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    )
    reserved = (f"reserved_special_token_{i}" for i in range(256))
    names = [LLAMA.get(i) or next(reserved) for i in range(256)]
    tokenizer.add_special_tokens([AddedToken(f"<|{name}|>", special=True, normalized=False) for name in names])
    path = tmp_path / "llama.json"
    tokenizer.save(str(path))
    return path


def test_reserved_tokens_get_cwm_s_names(llama):
    before, cwm = Tokenizer.from_file(str(llama)), as_cwm(llama)
    first = cwm.token_to_id("<|begin_of_text|>")
    assert first == before.token_to_id("<|begin_of_text|>") == 280 and cwm.get_vocab_size() == 536
    # facts of the tokenizer: 128,000 + these
    assert {name: cwm.token_to_id(name) - first for name in SPECIAL} == SPECIAL
    assert (SPECIAL["<|frame_sep|>"], SPECIAL["<|trace_context_start|>"], SPECIAL["<|eot_id|>"]) == (100, 107, 9)
    others = [i for i in range(536) if i - first not in SPECIAL.values()]
    assert [cwm.id_to_token(i) for i in others] == [before.id_to_token(i) for i in others]
    assert cwm.encode(f"{TEXT[0]}<|frame_sep|>").ids == [*before.encode(TEXT[0]).ids, first + 100]
    assert cwm.encode("<|python_tag|>").ids == [first + 10]


def test_twice_is_once(llama, tmp_path):
    as_cwm(llama).save(str(tmp_path / "cwm.json"))
    assert as_cwm(tmp_path / "cwm.json").to_str() == as_cwm(llama).to_str()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda token: token | {"content": "<|image|>"} if token["id"] == 382 else token,
            "has <|image|> at id 382, where CWM has <|return_sep|>",
        ),
        (lambda token: None if token["id"] == 382 else token, "has nothing at id 382"),
        (lambda token: None if token["id"] == 280 else token, "has no <|begin_of_text|>"),
    ],
)
def test_another_tokenizer_is_refused(llama, change, said):
    raw = json.loads(llama.read_text())
    raw["added_tokens"] = [new for token in raw["added_tokens"] if (new := change(token))]
    llama.write_text(json.dumps(raw))
    with pytest.raises(ValueError) as error:
        as_cwm(llama)
    assert said in str(error.value) and str(error.value).endswith("give Llama-3's tokenizer.json")


@pytest.mark.parametrize("think", [False, True])
def test_the_template_is_the_renderer_s_layout(llama, tmp_path, think):
    directory = tmp_path / "model"
    directory.mkdir()
    as_cwm(llama).save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    mine, template = CwmRenderer(directory), TemplateRenderer(directory)
    assert template.end_id == mine.end_id and mine.stop_ids == (289, 288, 281)
    dialogues = [renderer.open("repair it", "You repair.", think=think) for renderer in (mine, template)]
    for turn in range(3):
        first, second = (dialogue.prompt() for dialogue in dialogues)
        assert first == second and first.branch == (turn == 0)
        ids = mine.encode(f"why\n</think>\n\nls {turn}")
        said = {dialogue.say(ids if turn == 1 else [*ids, mine.end_id]) for dialogue in dialogues}
        assert said == {f"{'<think>' + chr(10) if think else ''}why\n</think>\n\nls {turn}"}
        for dialogue in dialogues:
            dialogue.hear("bash", "a.py<|eot_id|>")
