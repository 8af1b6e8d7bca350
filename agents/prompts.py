"""What an agent says around an environment's words: system texts and the form of an observation, by name.

`plain` passes the environment's words on as they are (a tiny policy pays for every token). `cwm` follows the paper: a
system prompt with the environment's description, `<output>` around observations and a `<budget>` block behind them.
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


@dataclass(frozen=True)
class Style:
    """How an agent words things."""

    name: str
    budget: bool
    """Wrap observations in `<output>` and append what is left of turns and tokens."""

    def system(self, tools: Sequence[str]) -> str:
        """The system prompt; empty for `plain`."""
        if self.name == "plain" or not tools:
            return ""
        listed = "\n".join(f"- {TOOL_HELP.get(t, t)}" for t in tools)
        return (
            "You are a software engineer who repairs a repository.\n\n# Environment\n"
            "You are in the root of the repository, in a Linux sandbox with a persistent shell. Each turn is exactly one tool call:\n"
            f"<tool: NAME>\nBODY\n</tool>\n\nTools:\n{listed}"
        )

    def observation(self, text: str, turns_left: int, tokens_left: int) -> str:
        """An observation as the policy reads it."""
        if not self.budget:
            return text
        return f"<output>\n{text}\n</output>\n<budget>\nturns: {turns_left}\ntokens: {tokens_left}\n</budget>"


STYLES = {"plain": Style("plain", budget=False), "cwm": Style("cwm", budget=True)}
