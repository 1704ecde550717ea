"""JSON: that of strangers read within bounds, our own written so that every reader takes it."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from .opening import CheckpointError, open_regular, read_exactly

_MAX_FILE = 100_000_000  # bytes
_BYTES_OF_A_VALUE = 120  # a JSON value as a Python object takes at most about this
_ALLOWANCE = 16_000_000


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} stands there twice")
        found[name] = value
    return found


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not a number of JSON")


def parse_json(text: bytes, size: int) -> Any:
    """JSON of a stranger, from a file of `size` bytes. Raises ValueError, also for a name given twice or far too many values."""
    values = text.count(b",") + text.count(b"[") + text.count(b"{")
    if values * _BYTES_OF_A_VALUE > 2 * size + _ALLOWANCE:
        raise ValueError(f"{values} values in {len(text)} bytes")
    try:
        return json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path, what: str = "a JSON file") -> Any:
    """The content of a JSON file; raises CheckpointError, saying that it is not `what`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > _MAX_FILE:
            raise CheckpointError(f"{path}: not {what}: {size} bytes, expected at most {_MAX_FILE}")
        text = read_exactly(file, size)
    try:
        return parse_json(text, size)
    except ValueError as error:
        raise CheckpointError(f"{path}: not {what} ({error})") from None


def dump_json(content: Any, **options: Any) -> str:
    """JSON as the standard has it, which browsers read: a number that is not finite becomes null; options go to json.dumps."""
    return json.dumps(_finite(content), allow_nan=False, **options)


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return content
