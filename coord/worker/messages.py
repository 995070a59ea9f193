"""Messages as arq is given them: JSON and nothing else, and of the types that arq takes for granted."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from coord.worker.claims import Claim

if TYPE_CHECKING:
    from collections.abc import Callable

LATEST = 32_503_680_000_000
"""Milliseconds since 1970, in the year 3000: arq makes a date of the time when a job was enqueued."""


def serialize(message: dict[str, Any]) -> bytes:
    """JSON: nothing that is read from Redis is ever unpickled. arq puts exceptions in results, as text here."""
    return json.dumps(message, default=str).encode()


def deserialized(read: Callable[[bytes], dict[str, Any]]) -> Callable[[bytes | Claim], dict[str, Any]]:
    """arq's `job_deserializer`: a claimed job was read already.

    What it raises fails the job; an unsound message that it lets pass would end the worker.
    """

    def deserialize(text: bytes | Claim) -> dict[str, Any]:
        if not isinstance(text, Claim):
            return _sound(read(text))
        message = text.message
        assert message is not None
        return {
            "f": message.task,
            "a": message.args,
            "k": message.kwargs,
            "t": message.attempt,
            "et": min(max(message.enqueued, 0), LATEST),
        }

    return deserialize


def _sound(message: dict[str, Any]) -> dict[str, Any]:
    types = {"f": str, "a": list | tuple, "k": dict, "t": int | None, "et": int}
    unsound = [name for name, kind in types.items() if not isinstance(message[name], kind)]
    if unsound or not 0 <= message["et"] <= LATEST:
        raise ValueError(f"not a job: {', '.join(unsound) or 'et'} is not what arq writes")
    return message
