"""Any model's own chat template (Jinja, as `transformers` keeps it in a model directory) → exact tokens. No torch here.

A template is a function of a whole dialogue, so what it makes of a longer one need not begin with what it made of a shorter
one, let alone with what was sampled. Before each turn the dialogue is rendered in full, and compared as text with what the
tokens so far say::

    tokens so far, as text    <|im_start|>user … <|im_end|>\\n<|im_start|>assistant\\nls<|im_end|>
    the template's rendering  <|im_start|>user … <|im_end|>\\n<|im_start|>assistant\\nls<|im_end|>\\n<|im_start|>user …
                                                                          only this is encoded   └──────────────── …

Where the rendering begins with the text, the rest of it is encoded and follows. Where it doesn't (a template that drops the
thoughts of earlier turns, or a policy that wrote what the template words otherwise) the rendering is encoded from its
beginning, as a branch. Whitespace alone is no difference: many templates trim what a message begins or ends with, and the
tokens then keep what was sampled. (Tokens say what was encoded as far as their tokenizer does not normalise it.)

Control tokens in messages. Before a template sees a message, the first character of every control token in it is replaced by
a noncharacter (U+FDD0 and on, which Unicode keeps for uses within a program); the rendering is cut behind these, and they
are put back: no piece that is encoded holds a control token of a message. In what was read that goes for all special tokens
and for every added token that the template names; in what the policy said for special tokens, without the tags of thoughts,
by which templates find them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from policy.renderer import THINK, Prompt, Renderer, sound

Message = dict[str, Any]
"""`role`, `content` (a text, or a list of parts), and `name` of a tool's."""

TAGS = ("<think>", "</think>")
_OPENED = re.compile(r"<think>\s*(?:</think>\s*)?\Z")
"""What a prompt puts into the policy's mouth: a thought that is begun, or none."""
_FIRST = 0xFDD0
_PLACES = 32
"""Noncharacters from U+FDD0 on."""
_NONE = re.compile(r"(?!)")
_REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
"""How templates refuse what they don't know: some raise, others stumble."""


def settings_of(directory: str | Path, name: str = "tokenizer_config.json") -> dict[str, Any]:
    """The values of a JSON file of a model directory; none where it isn't there."""
    path = Path(directory) / name
    if not path.is_file():
        return {}
    try:
        values: dict[str, Any] = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} can't be read ({error}); copy it again from the model") from None
    return values


def template_of(directory: str | Path) -> str | None:
    """The chat template of a model directory: `chat_template.jinja`, or that in `tokenizer_config.json` (of several, the one
    called "default"); None where there is none."""
    path = Path(directory) / "chat_template.jinja"
    if path.is_file():
        return path.read_text()
    template = settings_of(directory).get("chat_template")
    if isinstance(template, list):
        template = next((t["template"] for t in template if t["name"] == "default"), None)
    return template


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}` marks what a model says, for fine-tuning; it renders what is in it."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own attribute)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def compiled(source: str, directory: str | Path) -> Template:
    """A template as `transformers` would run it (`apply_chat_template`): its settings, filters and functions, in Jinja's
    sandbox. "Now" is when it was compiled: an episode over midnight has one date."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    now = datetime.now()

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=refuse, strftime_now=now.strftime)
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise ValueError(
            f"chat template of {directory} is no Jinja (line {error.lineno}: {error.message}); copy it again"
        ) from None


@dataclass(frozen=True)
class Form:
    """What a template makes of messages, found out by trying."""

    parts: bool
    """Content is a list of parts instead of a text, as in templates of models that see."""
    system: bool
    """It shows a system message; else its text goes in front of the first question."""
    tool: bool
    """It shows a tool's message behind an assistant's text; else observations come from the user."""
    apart: bool
    """It shows a thought that a message has apart from its content (`reasoning_content`) between tags."""
    before: str
    """What it puts between its prompt and an answer without thoughts, and the policy has to say itself."""
    after: str
    """What it puts behind an answer."""


class TemplateRenderer(Renderer):
    """A model's own chat template, with the text protocol of `envs.tools` for tools.

    Observations are messages of the role `tool` where the template shows such, else of `user`.
    """

    def __init__(self, directory: str | Path) -> None:
        super().__init__(directory)
        self.directory = Path(directory)
        source = template_of(directory)
        if source is None:
            raise ValueError(f"no chat template in {directory}; add the model's chat_template.jinja")
        self._template = compiled(source, directory)
        settings = settings_of(directory, "special_tokens_map.json") | settings_of(directory)
        self._names = {k: text for k, v in settings.items() if k.endswith("_token") and (text := _text(v))}
        added = self._layout.get_added_tokens_decoder()
        special = [t.content for t in added.values() if t.special]
        if not special:
            raise ValueError(f"tokenizer {self.path} has no special tokens; give the one that the model was made with")
        named = [t.content for t in added.values() if not t.special and t.content.strip() and t.content in source]
        self._mask = _Mask([*special, *named])
        self._read, self._said = _any_of([*special, *named]), _any_of([t for t in special if t not in TAGS])
        # What is encoded and decoded stands behind a control token, as it does in a dialogue: at the beginning of a text
        # some tokenizers add or drop a space. Tokens that take the space behind them along come last.
        self._context_id, token = min(added.items(), key=lambda one: (not one[1].special, one[1].rstrip))
        self._context = str(token.content)
        self.form = self._probe()
        self._ends()

    def render(self, messages: Sequence[Message], think: bool = False, prompt: bool = True) -> str:
        """What the template makes of messages, and where `prompt` of the beginning of an answer. `ValueError` where it refuses."""
        wanted = {"enable_thinking": True} if think else {}
        try:
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=prompt, **self._names, **wanted
            )
        except _REFUSALS as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"chat template of {self.directory} refuses a dialogue ({why[:200]})") from None

    def open(self, statement: str, system: str = "", *, think: bool = False) -> Rendered:
        """See `Renderer.open`. Templates that know `enable_thinking` are told so."""
        return Rendered(self, statement, system, think)

    def message(self, role: str, content: str, **more: str) -> Message:
        """A message in the form that the template takes, without control tokens."""
        content = self._mask.on(sound(content), self._said if role == "assistant" else self._read)
        return _message(role, content, self.form.parts) | more

    def answered(self, text: str) -> Message:
        """The message that the policy wrote, with its thought where the template wants that."""
        thought, closed, answer = text.partition(TAGS[1])
        if not (self.form.apart and closed and thought.lstrip().startswith(TAGS[0])):
            return self.message("assistant", text)
        thought = self._mask.on(thought.lstrip().removeprefix(TAGS[0]).strip("\n"), self._said)
        return self.message("assistant", answer.lstrip("\n"), reasoning_content=thought)

    def ids(self, masked: str) -> list[int]:
        """Ids of a part of a rendering."""
        found = []
        for piece in self._mask.pieces(masked):
            first, *others = self._layout.encode(self._context + piece, add_special_tokens=False).ids
            assert first == self._context_id, f"{self._context!r} is not a token of its own"
            found += others
        return found

    def plain(self, masked: str) -> str:
        """The text of a part of a rendering."""
        return self._mask.off(masked)

    def text(self, ids: Sequence[int]) -> str:
        """Ids → text, control tokens included."""
        return str(self._layout.decode([self._context_id, *ids], skip_special_tokens=False))[len(self._context) :]

    def answer(self, ids: Sequence[int]) -> str:
        """What was said in a sampled turn: without the token that ended it, and without what the template will add."""
        ended = bool(ids) and ids[-1] in self.stop_ids
        text, before = self.text(ids[:-1] if ended else ids), self.form.before
        return text.rpartition(before)[2] if self._read.search(before) else text.removeprefix(before)

    def _probe(self) -> Form:
        asked, said, more = ("user", "question1"), ("assistant", "answer2"), ("user", "question3")
        parts = next((p for p in (False, True) if self._shows(p, asked, said, more)), None)
        if parts is None:
            raise ValueError(
                f"chat template of {self.directory} shows no dialogue of user and assistant; give a model made for chat, or one "
                "with CWM's special tokens and no template"
            )
        question, answer = _message(*asked, parts), _message(*said, parts)
        answered = self.render([question, answer], prompt=False)
        thoughtful = self.render([question, answer | {"reasoning_content": "thought6"}], prompt=False)
        at = answered.rindex(said[1])
        both = zip(self.render([question]), answered[:at], strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))
        before = answered[same:at]
        return Form(
            parts=parts,
            system=self._shows(parts, ("system", "order0"), asked),
            tool=self._shows(parts, asked, said, ("tool", "result3"), ("assistant", "answer4"), ("tool", "result5")),
            apart=re.search(r"<think>\s*thought6\s*</think>", thoughtful) is not None,
            before="" if any(tag in before for tag in TAGS) else before,
            after=answered[at + len(said[1]) :],
        )

    def _shows(self, parts: bool, *said: tuple[str, str]) -> bool:
        """Whether all of these messages can be seen in what the template makes of them."""
        try:
            text = self.render([_message(role, word, parts) | {"name": "bash"} for role, word in said])
        except ValueError:
            return False
        return all(word in text for _, word in said)

    def _ends(self) -> None:
        """Which tokens end a turn: the one that the template puts behind an answer, and those that the model's files name."""
        named = [
            settings_of(self.directory, name).get("eos_token_id") for name in ("generation_config.json", "config.json")
        ]
        ids = [i for found in named for i in (found if isinstance(found, list) else [found])]
        ids.append(self._layout.token_to_id(self._names.get("eos_token", "")))
        closing = self._read.search(self.form.after)
        if closing is not None:
            ids.insert(0, self._layout.token_to_id(closing.group()))
        self.stop_ids = tuple(dict.fromkeys(i for i in ids if isinstance(i, int) and i < self.vocab_size))
        if not self.stop_ids:
            raise ValueError(
                f"nothing ends a turn in {self.directory}: its chat template closes an answer with no special token, and no "
                "eos_token is named in tokenizer_config.json; add one"
            )
        self.end_id = self.stop_ids[0]


class Rendered:
    """A dialogue that is rendered by a template before each turn."""

    def __init__(self, renderer: TemplateRenderer, statement: str, system: str, think: bool) -> None:
        self._renderer, self._think = renderer, think
        self.messages: list[Message] = []
        self.text = ""
        """What the tokens of the branch say. Up to whitespace in sampled turns it is how the template's rendering of
        `messages` begins."""
        if system and renderer.form.system:
            self.messages.append(renderer.message("system", system))
        elif system:
            statement = f"{system}\n\n{statement}"
        self.messages.append(renderer.message("user", statement))
        self._mouth = ""

    def rendering(self) -> str:
        """The whole dialogue with the beginning of the next answer, control tokens in messages masked."""
        masked = self._renderer.render(self.messages, self._think)
        opened = _OPENED.search(masked)
        return masked if not self._think or (opened and TAGS[1] not in opened.group()) else masked + THINK

    def prompt(self) -> Prompt:
        """See `Dialogue.prompt`."""
        masked = self.rendering()
        full = self._renderer.plain(masked)
        at = follows(full, self.text)
        start = at if at and at < len(full) else 0
        self.text = self.text + full[start:] if start else full
        opened = _OPENED.search(full)
        self._mouth = opened.group() if opened else ""
        return Prompt(self._renderer.ids(masked[start:]), branch=not start)

    def say(self, token_ids: Sequence[int]) -> str:
        """See `Dialogue.say`."""
        self.text += self._renderer.text(token_ids)
        said = self._mouth + self._renderer.answer(token_ids)
        self.messages.append(self._renderer.answered(said))
        return said

    def hear(self, tool: str, content: str) -> None:
        """See `Dialogue.hear`."""
        role = {"role": "tool", "name": tool} if self._renderer.form.tool else {"role": "user"}
        self.messages.append(self._renderer.message(**role, content=content))


def follows(full: str, said: str) -> int | None:
    """Where in `full` that begins which follows `said`; None where `full` does not begin with it, whitespace aside."""
    if full.startswith(said):
        return len(said)
    letters, at = "".join(said.split()), 0
    for run in re.finditer(r"\S+", full):
        same = min(len(run.group()), len(letters) - at)
        if run.group()[:same] != letters[at : at + same]:
            return None
        at += same
        if at == len(letters):
            return run.start() + same
    return None


class _Mask:
    """Texts in which the first character of a control token is a noncharacter of its own."""

    def __init__(self, controls: Iterable[str]) -> None:
        firsts = sorted({control[0] for control in controls})
        assert len(firsts) <= _PLACES, f"control tokens begin with {len(firsts)} characters"
        self._on = {first: chr(_FIRST + i) for i, first in enumerate(firsts)}
        self._off = {ord(mask): first for first, mask in self._on.items()}
        self._cut = re.compile(f"(?<=[{''.join(self._on.values())}])")

    def on(self, text: str, controls: re.Pattern[str]) -> str:
        """Hide control tokens; noncharacters that were there become U+FFFD."""
        text = text.translate({_FIRST + i: 0xFFFD for i in range(_PLACES)})
        while controls.search(text):
            text = controls.sub(lambda found: self._on[found.group()[0]] + found.group()[1:], text)
        return text

    def off(self, masked: str) -> str:
        """The text; as long as what it is made of."""
        return masked.translate(self._off)

    def pieces(self, masked: str) -> list[str]:
        """The text in pieces, so that none holds what was hidden."""
        return [self.off(piece) for piece in self._cut.split(masked)]


def _message(role: str, content: str, parts: bool) -> Message:
    return {"role": role, "content": [{"type": "text", "text": content}] if parts else content}


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    longest = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest))) if longest else _NONE


def _text(token: Any) -> str:
    """A special token of `tokenizer_config.json`: a text, or the settings of an added token."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""
