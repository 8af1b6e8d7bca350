"""What makes a repository's image: what the repository declares, or something that a user names, such as a policy.

python -m envs build … --setup my_setup:agent        my_setup.py: agent = RepoAgent(policy, renderer, sampling).environment
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Protocol, cast

from envs.sandbox.base import Backend
from envs.sandbox.imagestore import ImageStore
from envs.swe import images
from envs.swe.discovery import Discovery, discover
from envs.swe.images import Environment
from envs.swe.ledger import Ledger
from envs.swe.sources import Source


class Setup(Protocol):
    """Makes the image of a repository and says what its tests do there; `agents.repo_agent.RepoAgent.environment` is one."""

    def __call__(
        self, store: ImageStore, base: str, source: Source, backend: Backend, *, cache: Path
    ) -> tuple[Environment, Discovery]:
        """Arguments and errors as `envs.swe.images.environment`."""


def declared(
    store: ImageStore, base: str, source: Source, backend: Backend, *, cache: Path
) -> tuple[Environment, Discovery]:
    """The `Setup` that installs what the repository declares."""
    env = images.environment(store, base, source, backend, cache=cache)
    return env, discover(backend, env.digest)


def named(name: str) -> Setup:
    """ "my_setup:agent" → that object; "" → `declared`. `ValueError`, one line, where there is none."""
    if not name:
        return declared
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--setup {name}: no module {error.name!r}; run from the folder that holds it, or install it"
        ) from None
    except (AttributeError, ValueError):
        raise ValueError(f"--setup {name}: nothing of that name; give module:callable, e.g. my_setup:agent") from None
    if not callable(found):
        raise ValueError(f"--setup {name}: {type(found).__name__} can't be called; give a RepoAgent's `environment`")
    return cast("Setup", found)


def set_up(
    name: str, ledger: Ledger, store: ImageStore, base: str, source: Source, backend: Backend, *, cache: Path
) -> tuple[Environment, Discovery]:
    """What the setup `name` makes of a repository, or made of it earlier by `ledger`: a policy would not do the same again."""
    key = {"setup": name, "base": base, "source": source.name, "at": source.commit or source.version}
    made = {row["image"] for row in ledger.rows() if {**key, "image": row.get("image")} == row} & store.images().keys()
    if made:
        env = images.remembered(store, min(made), source.tree())
        return env, discover(backend, env.digest)
    env, found = named(name)(store, base, source, backend, cache=cache)
    if name:
        ledger.append({**key, "image": env.digest})
    return env, found
