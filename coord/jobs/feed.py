"""The feed: how a job is written in Redis, under arq's own keys, and how that is read again."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from arq.constants import default_queue_name, job_key_prefix

from coord.jobs.arguments import DEEPEST, depth_of, to_json
from coord.jobs.options import LONGEST, name_of
from coord.notify.publisher import notice

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

    from sqlalchemy import Row

    from coord.jobs.model import Job
    from coord.notify.client import Commands

DEFAULT_QUEUE = "default"
NAMESPACE = "coord"
KEPT = 7 * 86_400_000
"""Milliseconds after its time that Redis keeps a job nobody runs; the ledger keeps it longer."""
SKEW = 1_000
"""Milliseconds by which a job that is due counts as due longer, so that no difference of clocks delays it."""


def queue_key(namespace: str, queue: str) -> str:
    """The sorted set of a queue. The default one is arq's, so that what arq itself enqueues is run as well."""
    if (namespace, queue) == (NAMESPACE, DEFAULT_QUEUE):
        return default_queue_name
    return f"{default_queue_name}:{namespace}:{queue}"


def queue_bell(key: str) -> bytes:
    """The channel that says that a queue has something new."""
    return f"{key}:bell".encode()


@dataclass(frozen=True, slots=True)
class Message:
    """What Redis holds of a job: enough to run it, and the number of the attempt that it is for."""

    task: str
    args: list[Any]
    kwargs: dict[str, Any]
    attempt: int
    attempts: int | None
    timeout: float | None
    trace: dict[str, str] | None
    enqueued: int
    """Milliseconds since 1970."""
    unknown_since: int | None = None
    """When a worker first did not know the task, in milliseconds since 1970."""

    @classmethod
    def of(cls, job: Job | Row[Any]) -> Message:
        args, kwargs = job.arguments
        created = milliseconds(job.created_at)
        return cls(job.task, args, kwargs, job.attempt, job.attempts, job.timeout, job.trace, created)

    @classmethod
    def read(cls, text: bytes) -> Message | None:
        """None of what arq has enqueued without a ledger; `ValueError` if it is not a job at all."""
        try:
            found = json.loads(text, parse_constant=_refuse, parse_float=_finite)
            if found.get("c") is None:
                return None
            attempts, timeout, trace = found["c"]
            message = cls(
                task=found["f"],
                args=found["a"],
                kwargs=found["k"],
                attempt=found["t"],
                attempts=attempts,
                timeout=timeout,
                trace=trace,
                enqueued=found["et"],
                unknown_since=found.get("u"),
            )
            message._check()
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"not a job: {text[:80]!r}") from error
        return message

    def text(self) -> str:
        """As arq's JSON would have it, and under "c" what the ledger adds."""
        own = [self.attempts, self.timeout, self.trace]
        fields = {"t": self.attempt, "f": self.task, "a": self.args, "k": self.kwargs, "et": self.enqueued, "c": own}
        return to_json(fields if self.unknown_since is None else fields | {"u": self.unknown_since})

    @property
    def arguments(self) -> str:
        """As the ledger has them."""
        return to_json([self.args, self.kwargs])

    def _check(self) -> None:
        """Whoever can write to Redis may have written anything; PostgreSQL is asked only about what a job may be."""
        trace = {} if self.trace is None else self.trace
        sound = (
            isinstance(self.args, list)
            and isinstance(self.kwargs, dict)
            and depth_of([self.args, self.kwargs]) <= DEEPEST
            and type(self.attempt) is int
            and 0 < self.attempt < 2**31
            and type(self.enqueued) is int
            and abs(self.enqueued) < 2**53
            and isinstance(self.attempts, int | None)
            and (self.timeout is None or 0 < self.timeout <= LONGEST)
            and isinstance(trace, dict)
            and all(isinstance(part, str) for part in trace.values())
            and isinstance(self.unknown_since, int | None)
        )
        if not isinstance(self.task, str) or name_of(self.task) != self.task or not sound:
            raise ValueError("not of the types, or beyond the limits, of a job")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text} is too large")
    return number


def hand_over(jobs: Iterable[Job], namespace: str) -> dict[Hashable, Commands]:
    """What gives new jobs, or new attempts of old ones, to the workers of their queues."""
    now = milliseconds(datetime.now(UTC))
    batch: dict[Hashable, Commands] = {}
    bells: dict[Hashable, Commands] = {}
    for job in jobs:
        due, key = milliseconds(job.due_at), queue_key(namespace, job.queue)
        keep = ("SET", f"{job_key_prefix}{job.id}", Message.of(job).text(), "PX", max(0, due - now) + KEPT)
        batch[job.id] = [keep, ("ZADD", key, score(due, now), str(job.id))]
        bells[queue_bell(key)] = [notice(queue_bell(key))]
    return batch | bells


def score(due: int, now: int) -> int:
    return due if due > now else due - SKEW


def milliseconds(moment: datetime) -> int:
    return int(moment.timestamp() * 1000)


def id_of(text: str) -> UUID | None:
    """The id of a job of the ledger, or of a worker, if it can be one: arq's own have no dashes, or are names."""
    try:
        found = UUID(text)
    except ValueError:
        return None
    return found if str(found) == text else None
