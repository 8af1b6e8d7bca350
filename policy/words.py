"""A tokenizer whose tokens are words, one to one with their ids: what a model with random weights says can be read back."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from policy.renderer import BEGIN, END, ROLES, header

UNKNOWN = "w?"


def word_tokenizer(vocab_size: int) -> Tokenizer:
    """`vocab_size` tokens: the control tokens of `policy.renderer`, then words "w0", "w1", …; other words are "w?"."""
    special = [BEGIN, END, *map(header, ROLES)]
    words = [UNKNOWN, *(f"w{i}" for i in range(vocab_size - len(special) - 1))]
    if len(words) < 2:
        raise ValueError(f"vocab_size={vocab_size} leaves no words beside {len(special)} control tokens; raise it")
    ids = {token: i for i, token in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer
