"""What an agent says around an environment's words: system texts and the form of an observation, by name.

`plain` passes the environment's words on as they are (a tiny policy pays for every token). `cwm` follows the paper: a
system prompt with the environment's description, `<output>` around observations and a `<budget>` block behind them. `think`
is `cwm` with thoughts, as in the paper's reinforcement learning: every turn begins with `<think>`, and what follows
`</think>` is the action. Thoughts of earlier turns stay in the context, unless a model's own chat template drops them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

TOOL_HELP = {
    "bash": "bash: run non-interactive commands in a persistent shell",
    "edit": "edit: a path, then one SEARCH/REPLACE block; the SEARCH lines must occur verbatim and once",
    "create": "create: a path, then the content of a new file",
    "fetch": "fetch: bring wheels into the sandbox, one requirement a line",
    "submit": "submit: end the episode; the repository as it is now is graded",
}
THOUGHTS = "Reason first, between <think> and </think>. What follows </think> is what you do.\n\n"


@dataclass(frozen=True)
class Style:
    """How an agent words things."""

    name: str
    budget: bool
    """Wrap observations in `<output>` and append what is left of turns and tokens."""
    think: bool = False
    """Put `<think>` into the policy's mouth at the beginning of every turn."""

    def system(self, tools: Sequence[str]) -> str:
        """The system prompt; empty for `plain`."""
        if self.name == "plain" or not tools:
            return ""
        listed = "\n".join(f"- {TOOL_HELP.get(t, t)}" for t in tools)
        return (
            "You are a software engineer who repairs a repository.\n\n"
            f"{THOUGHTS if self.think else ''}# Environment\n"
            "You are in the root of the repository, in a Linux sandbox with a persistent shell. Each turn is exactly one tool call:\n"
            f"<tool: NAME>\nBODY\n</tool>\n\nTools:\n{listed}"
        )

    def observation(self, text: str, turns_left: int, tokens_left: int) -> str:
        """An observation as the policy reads it."""
        if not self.budget:
            return text
        return f"<output>\n{text}\n</output>\n<budget>\nturns: {turns_left}\ntokens: {tokens_left}\n</budget>"


STYLES = {
    "plain": Style("plain", budget=False),
    "cwm": Style("cwm", budget=True),
    "think": Style("think", budget=True, think=True),
}


def spoken(message: str) -> str:
    """What an environment hears of a message: not what was thought at its beginning (`<think>` … `</think>`), and nothing
    of a thought that did not end."""
    if not message.lstrip().startswith("<think>"):
        return message
    return message.partition("</think>")[2].lstrip("\n")
