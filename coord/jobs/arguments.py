"""A task's arguments: refused before any SQL if it does not take them, or if JSON would change them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from arq.worker import Function

MAX_DEPTH = 100
"""Of nested lists and objects; the reader may have less stack left than the writer had."""

MAX_ARGUMENT_BYTES = 1 << 20
"""Of arguments, results and progress: what is queued lies in Redis, and what is read at once has a limit."""

_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
"""Made once, as `json.dumps` does not."""


def signature_of(task: object) -> inspect.Signature | None:
    """Of a task as workers call it, the context first; None of one that is known by its name only."""
    function = task.coroutine if isinstance(task, Function) else task
    if isinstance(function, str):
        return None
    try:
        return _signature(function)
    except TypeError:  # it has no hash
        return inspect.signature(function)  # type: ignore[arg-type]


_signature = lru_cache(maxsize=1_000)(inspect.signature)


def check_call(
    name: str, task: object, args: Sequence[Any], kwargs: Mapping[str, Any], *, partial: bool = False
) -> None:
    """`TypeError` if the task cannot be called with these after its context; with `partial` some may be missing."""
    signature = signature_of(task)
    if signature is None:
        return
    try:
        (signature.bind_partial if partial else signature.bind)(None, *args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{name}{_bare(signature)} does not take these arguments after the context: {error}") from None


def _bare(signature: inspect.Signature) -> inspect.Signature:
    """Without annotations."""
    empty = inspect.Signature.empty
    bare = [parameter.replace(annotation=empty) for parameter in signature.parameters.values()]
    return signature.replace(parameters=bare, return_annotation=empty)


def to_json(value: Any) -> str:
    """ASCII without spaces, and the same again for what is read back from it; raises `TypeError` or `ValueError`."""
    return _ENCODER.encode(value)


def as_it_arrives(what: str, value: Any) -> tuple[str, Any]:
    """`value` as JSON, and a copy as it is read from that; a `TypeError` if the copy is not equal."""
    try:
        text = to_json(value)
        arriving = json.loads(text)
        equal = is_same(value, arriving)
        depth = depth_of(arriving)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"{what} must be JSON: {error}") from error
    if not equal:
        raise TypeError(f"{what} would arrive as {arriving!r} and not as {value!r}: JSON has no tuples and text keys")
    if len(text) > MAX_ARGUMENT_BYTES:
        raise TypeError(
            f"{what} must be JSON of at most {MAX_ARGUMENT_BYTES} bytes, not {len(text)}: store it, and pass its key"
        )
    if depth > MAX_DEPTH:
        raise TypeError(f"{what} must be JSON that is at most {MAX_DEPTH} lists and objects deep, not {depth}")
    return text, arriving


def is_same(value: Any, arriving: Any) -> bool:
    """Equal, and of the same types: a member of a `StrEnum` equals the text that arrives in its place."""
    if type(value) is not type(arriving):
        return False
    match arriving:
        case list():
            return len(value) == len(arriving) and all(map(is_same, value, arriving))
        case dict():
            return value.keys() == arriving.keys() and all(
                type(key) is str and is_same(each, arriving[key]) for key, each in value.items()
            )
    return bool(value == arriving)


def depth_of(value: Any) -> int:
    """How many lists and dictionaries are within one another."""
    match value:
        case list():
            return 1 + max(map(depth_of, value), default=0)
        case dict():
            return 1 + max(map(depth_of, value.values()), default=0)
    return 0
