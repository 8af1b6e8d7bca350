"""CWM's tokenizer: which of Llama-3's special tokens mean what, and CWM's chat layout as a template.

CWM reads text with Llama-3's tokenizer and gives names of its own to some of the 256 tokens behind its vocabulary, most of
which Llama-3 only reserves. Ids below are relative to `<|begin_of_text|>`, 128,000 in Llama-3, so that a smaller tokenizer
of the same layout has them too.

Sources: facebookresearch/cwm `cwm/text/tokenizers.py` and `PROMPTING_GUIDE.md`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from tokenizers import Tokenizer

from policy.renderer import BEGIN

CHAT = {
    "<|begin_of_text|>": 0,
    "<|end_of_text|>": 1,
    "<|start_header_id|>": 6,
    "<|end_header_id|>": 7,
    "<|eom_id|>": 8,
    "<|eot_id|>": 9,
}
"""Tokens of the chat layout."""
TRACE = {
    "<|frame_sep|>": 100,
    "<|action_sep|>": 101,
    "<|return_sep|>": 102,
    "<|call_sep|>": 103,
    "<|line_sep|>": 104,
    "<|exception_sep|>": 105,
    "<|arg_sep|>": 106,
    "<|trace_context_start|>": 107,
}
"""Tokens of execution traces."""
REASONING = {"<|reasoning_thinking_start|>": 120, "<|reasoning_thinking_end|>": 121}
"""Around thoughts in supervised training; reinforcement learning has `<think>` and `</think>` as plain text."""
SPECIAL = CHAT | TRACE | REASONING
_RESERVED = re.compile(r"<\|reserved_special_token_\d+\|>")

CHAT_TEMPLATE = """\
{{- '<|begin_of_text|>' }}
{%- for message in messages %}
{{- '<|start_header_id|>' + ('tool: ' + message.name if message.role == 'tool' else message.role) + '<|end_header_id|>\\n\\n' }}
{{- message.content + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' + ('<think>\\n' if enable_thinking else '') }}
{%- endif %}"""
"""The layout of `policy.renderer.CwmRenderer` for other software: a `chat_template.jinja` beside the tokenizer. Thoughts of
earlier turns stay. `enable_thinking` begins an answer with `<think>`; a tool's message needs its `name`."""


def as_cwm(tokenizer: str | Path) -> Tokenizer:
    """A Llama-3 `tokenizer.json` with CWM's names for its special tokens; ids and merges stay.

    Raises `ValueError` where a token of `SPECIAL` would take the place of one that is neither it nor reserved.

    Example: `as_cwm("Meta-Llama-3-8B/tokenizer.json").save("my-model/tokenizer.json")`
    """
    raw = json.loads(Path(tokenizer).read_text())
    by_id = {token["id"]: token for token in raw["added_tokens"]}
    first = next((i for i, token in by_id.items() if token["content"] == BEGIN), None)
    if first is None:
        raise ValueError(f"tokenizer {tokenizer} has no {BEGIN}; give Llama-3's tokenizer.json")
    for name, offset in SPECIAL.items():
        there = by_id.get(first + offset, {"content": "nothing"})
        if there["content"] != name and not _RESERVED.fullmatch(there["content"]):
            raise ValueError(
                f"tokenizer {tokenizer} has {there['content']} at id {first + offset}, where CWM has {name}; give Llama-3's "
                "tokenizer.json"
            )
        if there["content"] in raw["model"]["vocab"]:
            raw["model"]["vocab"][name] = raw["model"]["vocab"].pop(there["content"])
        there["content"] = name
    return Tokenizer.from_str(json.dumps(raw))
