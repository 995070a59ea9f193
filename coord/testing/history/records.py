"""What a history consists of: what clients asked and were shown, what went wrong meanwhile, and what was left."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, get_args


class Outcome(StrEnum):
    """What an answer claims."""

    DONE = "done"
    """The effect that was asked for has landed."""
    PROMISED = "promised"
    """It will: 202, or the like."""
    READ = "read"
    """Nothing of an effect: only what the row is like."""
    UNKNOWN = "unknown"
    """There was no answer, or an error: the effect may have landed or not."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One request and its answer. Times are seconds on one monotonic clock, of whoever plays the clients."""

    number: int
    asked: str
    """For whoever reads a verdict, such as `POST /parcels`."""
    began: float
    """When it was sent; of an event of a stream, when the stream was asked for."""
    ended: float
    outcome: Outcome
    answer: str = ""
    """A status, or the error that came instead."""
    observer: str = ""
    """A client that asks one thing at a time, or one stream; what it is shown must not go back."""
    deadline: float | None = None
    """Seconds in which the answer was due; None if it may take its time."""
    effect: str | None = None
    """What was asked for, by a name that it has in the database as well."""
    saw: str | None = None
    """What the answer says of the effect: compared with `Effect.value`."""
    row: str | None = None
    version: int | None = None
    """The row that was shown, and its version; 0 if it was not there."""
    job: str | None = None
    """The job that the answer named."""
    calm: bool = True
    """Whether the API and all that it needs were up, from when it was sent until it was answered."""

    def __str__(self) -> str:
        shown = [] if self.saw is None else [f"saw {self.saw!r}"]
        shown += [] if self.version is None else [f"{self.row} in version {self.version}"]
        return (
            f"#{self.number} {self.observer} {self.asked}  {self.began:.3f}–{self.ended:.3f} s"
            f"  → {', '.join([self.answer or self.outcome, *shown])}"
        )


@dataclass(frozen=True, slots=True)
class Effect:
    """What the database has of an effect in the end."""

    effect: str
    value: str
    """What is true of it for good, and what an answer shows of it: its number, its outcome."""
    times: int = 1
    """How often it was applied; an effect that was not is no record."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row in the end; one that was deleted has no record."""

    row: str
    version: int


@dataclass(frozen=True, slots=True)
class LedgerJob:
    """A job in the end; times are seconds since 1970 by PostgreSQL's clock."""

    job: str
    effect: str | None
    """The effect that it is for; None if it is not looked at."""
    state: str
    created: float
    finished: float | None = None
    attempt: int = 1


@dataclass(frozen=True, slots=True)
class Number:
    """A number that was given out of a sequence that must run from 1 without a gap, and to what."""

    sequence: str
    number: int
    owner: str


@dataclass(frozen=True, slots=True)
class FaultSpan:
    """A fault, on the clock of the operations."""

    kind: str
    began: float
    ended: float
    stops_clients: bool = False
    """Whether it stopped the process that answers, so that its answers are as much later."""


@dataclass(frozen=True, slots=True)
class Calm:
    """When the last fault was over, in seconds since 1970 by PostgreSQL's clock."""

    at: float


@dataclass(frozen=True, slots=True)
class Complaint:
    """What an application's own check has found."""

    text: str
    rule: str = "invariant"
    """One of `RULES`; any other name is the application's own, and is told under `invariant`."""


Record = Operation | Effect | Row | LedgerJob | Number | FaultSpan | Calm | Complaint
_KINDS: dict[str, Any] = {kind.__name__: kind for kind in get_args(Record)}


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a verdict allows; durations are seconds."""

    late: float = 1.0
    """After its deadline, until an answer is late: the contract's second, and what the clients' machine may need."""
    final: float = 30.0
    """In which a job is final, after it was enqueued or the last fault was over."""
    served: float = 0.8
    """The part of the requests in the calm that are answered with their effect."""
    may_fail: bool = False
    """Whether a job may come to an end without its effect: tasks that raise on purpose, cancelled jobs."""


def to_line(record: Record) -> str:
    fields = {name: value for name, value in asdict(record).items() if value is not None}
    return json.dumps({"record": type(record).__name__, **fields})


def from_line(line: str) -> Record:
    """Raises `ValueError` for what is no record."""
    try:
        fields = json.loads(line)
        kind = _KINDS[fields.pop("record")]
        if kind is Operation:
            fields["outcome"] = Outcome(fields["outcome"])
        record: Record = kind(**fields)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"no record of a history: {line.strip()[:100]!r}") from error
    return record
