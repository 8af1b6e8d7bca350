"""Messages → tokens, by extension only: the one place that owns the chat layout. No torch here.

The layout is CWM's (Llama-3's headers; facebookresearch/cwm `PROMPTING_GUIDE.md`)::

    <|begin_of_text|><|start_header_id|>user<|end_header_id|>\\n\\n STATEMENT <|eot_id|>
    <|start_header_id|>assistant<|end_header_id|>\\n\\n ACTION <|eot_id|>
    <|start_header_id|>tool: bash<|end_header_id|>\\n\\n OUTPUT <|eot_id|> …

A tokenizer may hold a whole header as one token (the tiny one does); the text is the same. Message content never becomes a
control token: it is encoded with special tokens switched off, so a file that contains `<|eot_id|>` can't end a turn.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

BEGIN, END = "<|begin_of_text|>", "<|eot_id|>"
ROLES = ("system", "user", "assistant", "tool: bash", "tool: edit", "tool: create", "tool: submit", "tool: error")
MARKERS = (
    "<tool: bash>\n",
    "<tool: edit>\n",
    "<tool: create>\n",
    "<tool: submit>\n</tool>",
    "\n</tool>",
    "\n<<<<<<< SEARCH\n",
    "\n=======\n",
    "\n>>>>>>> REPLACE\n</tool>",
)


def header(role: str) -> str:
    """The text that opens a message of a role."""
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


class Renderer:
    """Encodes new messages only; what was sampled is kept as the ids that were sampled."""

    def __init__(self, directory: str | Path) -> None:
        """Load `tokenizer.json` of a model directory."""
        path = Path(directory) / "tokenizer.json"
        if not path.is_file():
            raise ValueError(
                f"no tokenizer at {path}; give a model directory with tokenizer.json, or rebuild it with `python -m rl sft`"
            )
        self._layout = Tokenizer.from_file(str(path))
        self._content = Tokenizer.from_file(str(path))
        self._content.encode_special_tokens = True
        end = self._layout.token_to_id(END)
        if end is None or self._layout.token_to_id(BEGIN) is None:
            raise ValueError(f"tokenizer {path} lacks {BEGIN} or {END}; use one with CWM's or Llama-3's special tokens")
        self.end_id: int = end
        self._layout_ids: dict[str, list[int]] = {}

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return int(self._layout.get_vocab_size())

    def _special(self, text: str) -> list[int]:
        if text not in self._layout_ids:
            self._layout_ids[text] = list(self._layout.encode(text, add_special_tokens=False).ids)
        return self._layout_ids[text]

    def encode(self, content: str) -> list[int]:
        """Content → ids; never a control token."""
        content = content.encode("utf-8", "replace").decode("utf-8")
        return list(self._content.encode(content, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        """Ids → text; the end token is left out."""
        return str(self._layout.decode([i for i in ids if i != self.end_id], skip_special_tokens=False))

    def start(self, statement: str, system: str = "") -> list[int]:
        """Ids of the first prompt: the statement, and the assistant's header."""
        ids = list(self._special(BEGIN))
        if system:
            ids += self.message("system", system)
        return ids + self.message("user", statement) + self._special(header("assistant"))

    def message(self, role: str, content: str) -> list[int]:
        """Ids of one whole message."""
        return [*self._special(header(role)), *self.encode(content), self.end_id]

    def extend(self, last_sampled: int, role: str, content: str) -> list[int]:
        """Ids that follow a sampled action: its end token if the sampler stopped short of it, the observation, the next header."""
        closing = [] if last_sampled == self.end_id else [self.end_id]
        return [*closing, *self.message(role, content), *self._special(header("assistant"))]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer for a tiny policy: headers and protocol markers are single tokens, digits stay apart.

    Any text can be encoded and comes back exactly. Deterministic for equal texts.
    """
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?[A-Za-z_]+| ?\d| ?[^\sA-Za-z0-9_]{1,2}|[\n\t] *| {2,}|\s")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [BEGIN, END, *map(header, ROLES)]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in MARKERS])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special) - len(MARKERS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
