"""Rows of data sets, from files and from the hub, without a word about what they mean."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_rows(source: str | Path) -> Iterator[dict[str, Any] | str]:
    """The rows of a .json (a list, or a table by id), .jsonl or .parquet file, or of a set on the hub ("owner/name" or
    "owner/name:split"); a line that is no row is its own error text. Raises `ValueError` where the whole can't be read."""
    path = Path(source)
    if path.suffix == ".parquet":
        yield from _parquet(path)
    elif path.suffix in (".json", ".jsonl"):
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}; give a readable file") from None
        lines = text.split("\n") if path.suffix == ".jsonl" else _items(text, path)
        for line in lines:
            if isinstance(line, str) and not line.strip():
                continue
            try:
                row = json.loads(line) if isinstance(line, str) else line
            except (ValueError, RecursionError) as error:
                row = f"bad JSON ({error})"
            yield row if isinstance(row, dict | str) else f"a {type(row).__name__}, not a row"
    elif re.fullmatch(r"[\w.-]+/[\w.-]+(:\w+)?", str(source)) and not path.exists():
        yield from _hub(str(source))
    else:
        raise ValueError(f"{source}: neither a .json, .jsonl or .parquet file nor a hub id such as owner/name:split")


def _items(text: str, path: Path) -> list[Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: bad JSON ({error}); repair it") from None
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            f"{path}: reading parquet needs pyarrow; pip install pyarrow (it is in codeworld[bench])"
        ) from None
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(256):
            yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path}: not a readable parquet file ({' '.join(str(error).split())[:120]})") from None


def _hub(name: str) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{name}: reading from the hub needs datasets; pip install datasets (it is in codeworld[bench]), or give a file"
        ) from None
    identity, _, split = name.partition(":")
    try:
        rows = datasets.load_dataset(identity, split=split or "test")
    except Exception as error:
        raise ValueError(
            f"{name}: {' '.join(str(error).split())[:200]}; give a file, or check the network and the split"
        ) from None
    yield from (dict(row) for row in rows)
