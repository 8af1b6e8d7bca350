"""A policy that plays a script: for tests, for debugging an environment, and for collecting expert trajectories.

It goes through the same tokens as a real engine (prompt ids in, sampled ids out), so an episode played by a script is a
trajectory like any other. Log-probs are 0: a script is certain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from policy.completion import Completion, Sampling, digest
from policy.renderer import Renderer

Script = Callable[[str, str], str]
"""(episode, text of the new observation) → action text."""


def replies(*actions: str) -> Script:
    """A script that says the given actions one after the other in every episode; the last one repeats."""
    turn: dict[str, int] = {}

    def script(episode: str, observation: str) -> str:
        at = turn.get(episode, 0)
        turn[episode] = at + 1
        return actions[min(at, len(actions) - 1)]

    return script


class ScriptedPolicy:
    """Answers each turn with what the script says, as tokens."""

    def __init__(self, renderer: Renderer, script: Script, version: int = 0) -> None:
        self._renderer, self._script = renderer, script
        self.version = version
        self._read: dict[str, list[int]] = {}

    def generate(self, token_ids: Sequence[int], sampling: Sampling, episode: str) -> Completion:
        """The script's answer to the tokens that are new since the episode's last turn; to all of them in a new branch."""
        known = self._read.get(episode, [])
        new = list(token_ids[len(known) :] if list(token_ids[: len(known)]) == known else token_ids)
        action = self._script(episode, self._renderer.decode(new))
        ids = [*self._renderer.encode(action), self._renderer.end_id][: sampling.max_tokens]
        self._read[episode] = [*token_ids, *ids]
        finish = "stop" if ids[-1] == self._renderer.end_id else "length"
        n = len(ids)
        return Completion(
            token_ids=ids,
            logprobs=[0.0] * n,
            versions=[self.version] * n,
            finish=finish,  # type: ignore[arg-type]
            prompt_digest=digest(token_ids),
        )

    def release(self, episode: str) -> None:
        """Forget the episode."""
        self._read.pop(episode, None)
