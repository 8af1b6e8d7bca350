"""Plain values → dataclasses, strictly: how tasks and recipes are read.

Unknown keys, missing keys and wrong types are one-line `ValueError`s that name the place, the value and the remedy.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from envs.errors import nearest

T = TypeVar("T")


def build(cls: type[T], raw: Any, where: str) -> T:
    """An instance of a dataclass from a mapping of plain values; nested dataclasses, mappings to dataclasses and tuples of
    dataclasses from nested mappings and lists.

    where: names the place in messages, such as "recipe.toml" or "tasks.jsonl row 3".
    """
    assert is_dataclass(cls)
    if not isinstance(raw, Mapping):
        raise ValueError(f"{where}: expected a table of {cls.__name__} fields, found {raw!r}")
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls) if f.metadata.get("plain", True)}
    for key in raw:
        if key not in known:
            raise ValueError(
                f"{where}: unknown key {key!r}; remove it, known are {', '.join(known)}.{nearest(str(key), known)}"
            )
    for name, field in known.items():
        if name not in raw and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{where}: {name!r} is missing; add it")
    values = {key: _value(hints[key], value, f"{where}: {key}") for key, value in raw.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, choices = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return build(hint, value, where)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        if value is None and type(None) in choices:
            return None
        return _value(next(c for c in choices if c is not type(None)), value, where)
    if origin is Literal:
        if value not in choices:
            raise ValueError(
                f"{where}={value!r} is none of {', '.join(map(str, choices))}.{nearest(str(value), map(str, choices))}"
            )
        return value
    if origin is tuple and isinstance(value, list | tuple):
        if is_dataclass(choices[0]):
            return tuple(_value(choices[0], item, f"{where}[{at}]") for at, item in enumerate(value))
        return tuple(value)
    if origin is Mapping and is_dataclass(choices[1]) and isinstance(value, Mapping):
        return {key: _value(choices[1], item, f"{where}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    plain = origin or hint
    wrong = isinstance(plain, type) and (
        not isinstance(value, plain) or (plain in (int, float) and isinstance(value, bool))
    )
    if wrong:
        raise ValueError(f"{where}={value!r} must be {getattr(plain, '__name__', plain)}, not {type(value).__name__}")
    return value
