"""A task's arguments as JSON: refused before any SQL if they would arrive as something else."""

from __future__ import annotations

import json
from typing import Any


def to_json(value: Any) -> str:
    """ASCII without spaces, and the same again for what is read back from it; raises `TypeError` or `ValueError`."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def encoded(task: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """`[args, kwargs]` as JSON; a `TypeError` if the task would not be called with equal ones."""
    given = [[*args], kwargs]
    return _as_it_arrives(f"{task}: the arguments", given)


def encoded_value(what: str, value: Any) -> str:
    return _as_it_arrives(what, value)


def _as_it_arrives(what: str, value: Any) -> str:
    try:
        text = to_json(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"{what} must be JSON: {error}") from error
    arriving = json.loads(text)
    if arriving != value:
        raise TypeError(f"{what} would arrive as {arriving!r} and not as {value!r}: JSON has no tuples and text keys")
    return text
