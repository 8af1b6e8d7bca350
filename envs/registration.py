"""One registry, Gymnasium's: `register` by id and `module:Class`, `make` by id, the nearest id suggested on a miss.

Other packages register through the entry-point group `codeworld.envs` (name = id, value = `module:Class`). A recipe may
also name a `module:Class` itself, which needs no registration at all.
"""

from __future__ import annotations

import importlib
import inspect
from importlib.metadata import entry_points
from typing import Any, cast

import gymnasium

from envs.errors import nearest

BUILT_IN = {
    "codeworld/SWE-v0": "envs.swe.env:SWEEnv",
    "codeworld/SWE-testgen-v0": "envs.swe.testgen:SWETestgenEnv",
    "codeworld/TokenBandit-v0": "envs.tiny.bandit:TokenBandit",
}


def register(id: str, entry_point: str, **kwargs: Any) -> None:  # noqa: A002 (Gymnasium's own name)
    """Register an environment class under `Namespace/Name-vN`; `kwargs` are its default constructor arguments."""
    gymnasium.register(id=id, entry_point=entry_point, kwargs=kwargs, order_enforce=False, disable_env_checker=True)


def registered() -> list[str]:
    """Every id of this suite and of installed plug-ins."""
    _load()
    return sorted(k for k, spec in gymnasium.registry.items() if k in BUILT_IN or k in _PLUGINS or _is_text(spec))


_PLUGINS: set[str] = set()


def _is_text(spec: Any) -> bool:
    return str(spec.namespace or "") in ("codeworld", "examples")


def _load() -> None:
    for name, target in BUILT_IN.items():
        if name not in gymnasium.registry:
            register(name, target)
    for point in entry_points(group="codeworld.envs"):
        if point.name not in gymnasium.registry:
            register(point.name, point.value)
            _PLUGINS.add(point.name)


def make(id: str, **kwargs: Any) -> gymnasium.Env[str, str]:  # noqa: A002 (Gymnasium's own name)
    """Build an environment from a registered id or from `module:Class`; unknown names are a one-line `ValueError`."""
    if ":" in id:
        return _from_path(id, kwargs)
    _load()
    if id not in gymnasium.registry:
        raise ValueError(
            f"unknown environment {id!r}; register it, or give module:Class.{nearest(id, gymnasium.registry)}"
        )
    try:
        return cast("gymnasium.Env[str, str]", gymnasium.make(id, **kwargs).unwrapped)
    except TypeError as error:
        raise ValueError(f"environment {id!r} does not take these arguments: {error}") from None


def _from_path(path: str, kwargs: dict[str, Any]) -> gymnasium.Env[str, str]:
    module, _, name = path.partition(":")
    try:
        cls = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"environment {path!r}: no module {error.name!r}; run from the folder that holds it, or install it"
        ) from None
    except AttributeError:
        known = [n for n in vars(importlib.import_module(module)) if not n.startswith("_")]
        raise ValueError(f"environment {path!r}: module {module!r} has no {name!r}.{nearest(name, known)}") from None
    try:
        inspect.signature(cls).bind(**kwargs)
    except TypeError as error:
        raise ValueError(
            f"environment {path!r} does not take the arguments {kwargs!r}: {error}; change env.kwargs, or the class"
        ) from None
    return cast("gymnasium.Env[str, str]", cls(**kwargs))
