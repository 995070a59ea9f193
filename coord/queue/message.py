"""A job as Redis holds it: JSON that is made from its row and from nothing else, so that two of the same are equal."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Row

from coord.jobs.arguments import MAX_DEPTH, depth_of, to_json
from coord.jobs.model import Job
from coord.jobs.options import MAX_SPAN_SECONDS, name_of

SHOWN_CHARACTERS = 80
"""Of a message that is none, in the log."""
_OPTIONAL = ("timeout", "deaths", "trace", "one_at_a_time")
"""What is left out of a message where it says nothing."""


@dataclass(frozen=True, slots=True)
class Message:
    """What a worker has to know to run one attempt of a job."""

    id: UUID
    attempt: int
    task: str
    args: list[Any]
    kwargs: dict[str, Any]
    timeout: float | None = None
    """Seconds; None leaves it to the worker."""
    deaths: int = 0
    trace: dict[str, str] | None = None
    one_at_a_time: str | None = None

    @classmethod
    def of(cls, job: Job | Row[Any]) -> Message:
        args, kwargs = job.arguments
        rest = job.timeout, job.deaths, job.trace, job.one_at_a_time
        return cls(job.id, job.attempt, job.task, args, kwargs, *rest)

    @classmethod
    def read(cls, text: bytes) -> Message:
        """`ValueError` if it is not one: Redis may hold anything."""
        try:
            found = json.loads(text, parse_constant=_finite, parse_float=_finite)
            args, kwargs = found["arguments"]
            rest = {name: found[name] for name in _OPTIONAL if name in found}
            message = cls(UUID(found["id"]), found["attempt"], found["task"], args, kwargs, **rest)
            message._check()
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"not a job: {text[:SHOWN_CHARACTERS]!r}") from error
        return message

    def text(self) -> str:
        fields = {"id": str(self.id), "attempt": self.attempt, "task": self.task, "arguments": [self.args, self.kwargs]}
        rest = {name: getattr(self, name) for name in _OPTIONAL}
        return to_json(fields | {name: value for name, value in rest.items() if value})

    @property
    def key(self) -> tuple[UUID, int]:
        """Which attempt of which job."""
        return self.id, self.attempt

    @property
    def arguments(self) -> str:
        """As the ledger has them."""
        return to_json([self.args, self.kwargs])

    def _check(self) -> None:
        """Only what may be a job is compared with the ledger."""
        trace = {} if self.trace is None else self.trace
        sound = (
            isinstance(self.args, list)
            and isinstance(self.kwargs, dict)
            and depth_of([self.args, self.kwargs]) <= MAX_DEPTH
            and type(self.attempt) is int
            and 0 < self.attempt < 2**31
            and type(self.deaths) is int
            and (self.timeout is None or 0 < self.timeout <= MAX_SPAN_SECONDS)
            and isinstance(self.one_at_a_time, str | None)
            and isinstance(trace, dict)
            and all(isinstance(part, str) for part in trace.values())
        )
        if not isinstance(self.task, str) or name_of(self.task) != self.task or not sound:
            raise ValueError("not of the types, or beyond the limits, of a job")


def _finite(text: str) -> float:
    """Also of what is no JSON, `NaN` say."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no number of JSON's")
    return number
