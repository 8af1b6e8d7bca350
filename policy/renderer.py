"""Messages → tokens: the one place that decides what a policy reads. No torch here.

`load` gives the renderer of a model directory: that of its own chat template (`policy.template`), or CWM's layout. A
renderer opens a `Dialogue` for each episode, which says before every turn what the policy has to read (`Prompt`). What was
sampled stays the ids that were sampled; only what is new is encoded. Where what is to be read does not begin with the tokens
so far, it is read from its beginning, in a new branch of the trajectory.

CWM's layout (Llama-3's headers; facebookresearch/cwm `PROMPTING_GUIDE.md`) only ever grows::

    <|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n STATEMENT <|eot_id|>
    <|start_header_id|>assistant<|end_header_id|>\n\n ACTION <|eot_id|>
    <|start_header_id|>tool: bash<|end_header_id|>\n\n OUTPUT <|eot_id|> …

A tokenizer may hold a whole header as one token (the tiny one does); the text is the same. Message content never becomes a
control token: it is encoded with special tokens switched off, so a file that contains `<|eot_id|>` can't end a turn.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

BEGIN, END = "<|begin_of_text|>", "<|eot_id|>"
ENDS = (END, "<|eom_id|>", "<|end_of_text|>")
"""What ends a sampled turn, of those that a tokenizer has: CWM's list in config.json."""
THINK = "<think>\n"
"""What a turn begins with whose policy is to reason first."""
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
FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "generation_config.json"),
)
"""Files of a model directory that a renderer reads."""


def header(role: str) -> str:
    """The text that opens a message of a role."""
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


@dataclass(frozen=True)
class Prompt:
    """What a policy has to read before its next turn."""

    token_ids: list[int]
    branch: bool
    """False: they follow what it has read and sampled so far. True: they are everything, and begin a new branch; so does
    the first prompt of an episode."""


class Dialogue(Protocol):
    """One episode as messages. In turns: `prompt`, `say`, `hear`, `prompt`, …"""

    def prompt(self) -> Prompt:
        """What is to be read before the next turn."""

    def say(self, token_ids: Sequence[int]) -> str:
        """Take what was sampled; the message that it is, with what the prompt had put into the policy's mouth."""

    def hear(self, tool: str, content: str) -> None:
        """Take an observation, of a tool of that name."""


class Renderer(ABC):
    """The tokenizer of a model directory, and how dialogues are laid out with it."""

    end_id: int
    """Ends a turn."""
    stop_ids: tuple[int, ...]
    """Whatever a sampled turn may end with, `end_id` among them."""

    def __init__(self, directory: str | Path) -> None:
        """Load `tokenizer.json`. `ValueError` where the directory does not fit this renderer."""
        self.path = Path(directory) / "tokenizer.json"
        if not self.path.is_file():
            raise ValueError(
                f"no tokenizer at {self.path}; give a model directory with tokenizer.json (`hf download NAME --local-dir DIR`), or "
                "rebuild it with `python -m rl sft`"
            )
        self._layout = _tokenizer(self.path)

    @cached_property
    def _content(self) -> Tokenizer:
        tokenizer = _tokenizer(self.path)
        tokenizer.encode_special_tokens = True
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return int(self._layout.get_vocab_size())

    def encode(self, content: str) -> list[int]:
        """Content → ids; never a control token."""
        return list(self._content.encode(sound(content), add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids → text; tokens that end a turn are left out."""
        return str(self._layout.decode([i for i in ids if i not in self.stop_ids], skip_special_tokens=False))

    @abstractmethod
    def open(self, statement: str, system: str = "", *, think: bool = False) -> Dialogue:
        """Begin an episode. `think`: the policy's turns begin with `THINK`."""


def _tokenizer(path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no other class
        raise ValueError(f"tokenizer {path} can't be read ({error}); copy it again") from None
    tokenizer.no_truncation()  # a file may ask for both
    tokenizer.no_padding()
    return tokenizer


def sound(text: str) -> str:
    """Text that can be written as UTF-8: lone surrogates become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def load(directory: str | Path) -> Renderer:
    """The renderer of a model directory: by its chat template where it has one, else CWM's layout. `ValueError` where it has
    neither a template nor CWM's special tokens."""
    from policy.template import TemplateRenderer, template_of

    return TemplateRenderer(directory) if template_of(directory) else CwmRenderer(directory)


def copy_files(source: Path, target: Path) -> None:
    """Give a model directory the files of another that its renderer reads."""
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


class CwmRenderer(Renderer):
    """CWM's layout. It has no branches."""

    def __init__(self, directory: str | Path) -> None:
        super().__init__(directory)
        end = self._layout.token_to_id(END)
        if end is None or self._layout.token_to_id(BEGIN) is None:
            raise ValueError(
                f"tokenizer {self.path} lacks {BEGIN} or {END}, and there is no chat template beside it; use one with CWM's or "
                "Llama-3's special tokens, or add the model's chat_template.jinja"
            )
        self.end_id = end
        self.stop_ids = tuple(i for i in map(self._layout.token_to_id, ENDS) if i is not None)
        self._layout_ids: dict[str, list[int]] = {}

    def _special(self, text: str) -> list[int]:
        if text not in self._layout_ids:
            self._layout_ids[text] = list(self._layout.encode(text, add_special_tokens=False).ids)
        return self._layout_ids[text]

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

    def open(self, statement: str, system: str = "", *, think: bool = False) -> Dialogue:
        """See `Renderer.open`."""
        return _Growing(self, self.start(statement, system), THINK if think else "")


class _Growing:
    """A dialogue in CWM's layout: each prompt follows the last."""

    def __init__(self, renderer: CwmRenderer, first: list[int], mouth: str) -> None:
        self._renderer, self._new, self._mouth = renderer, first, mouth
        self._began = False

    def prompt(self) -> Prompt:
        prompt = Prompt([*self._new, *self._renderer.encode(self._mouth)], branch=not self._began)
        self._began = True
        return prompt

    def say(self, token_ids: Sequence[int]) -> str:
        self._last = token_ids[-1]
        return self._mouth + self._renderer.decode(token_ids)

    def hear(self, tool: str, content: str) -> None:
        self._new = self._renderer.extend(self._last, f"tool: {tool}", content)


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
