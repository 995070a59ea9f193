"""What is told of locks, waits, attempts and hints: to observers (metrics), to the log, and to spans.

Nothing here costs a statement or a command, and without observers little more than a clock.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from types import TracebackType
from typing import Any

from coord import telemetry
from coord.errors import JobCancelledError, JobFailedError, RowNotFoundError, WaitTimeoutError
from coord.timings import ATTEMPT_TIMINGS, WAIT_TIMINGS, AttemptTimings, WaitTimings, wait_timings_of

waits, jobs = logging.getLogger("coord.waiting"), logging.getLogger("arq.coord")
_PLAIN = re.compile(r"[^\s\"=]+")

OUTCOMES = {
    WaitTimeoutError: "timeout",
    JobFailedError: "failed",
    JobCancelledError: "cancelled",
    RowNotFoundError: "not found",
}
PUT_OFF = "put off"
"""The outcome of an attempt that cannot be made here: its task is not known, or does not take the arguments."""
_LEVELS = {"failed": logging.ERROR, PUT_OFF: logging.DEBUG}
MISSED_SECONDS = 0.1
"""A wait that took longer and was answered without a hint has missed it, or there was none: its writer has no bell."""


class Observer:
    """Told of what happens in this process; each method may be called from any of its event loops."""

    def lock_waited(self, tables: Sequence[str], mode: str, seconds: float) -> None:
        """A lock was granted, or was not in time."""

    def waiters(self, change: int) -> None:
        """So many more waits, or fewer."""

    def wait_ended(self, outcome: str, seconds: float) -> None:
        """Outcomes are those of `OUTCOMES`, `changed` and `error`."""

    def wait_answered(self, task: str | None, timings: WaitTimings) -> None:
        """Where the time of a wait went that was answered, or whose job, of this task, has failed."""

    def hints(self, kind: str, count: int = 1) -> None:
        """`published`, `heard` (it has ended a wait) and `missed`."""

    def attempt_ended(self, task: str, outcome: str, timings: AttemptTimings) -> None: ...

    def rescued(self, jobs: int) -> None:
        """So many jobs of a dead worker have another attempt, or have ended."""


observers: list[Observer] = []
"""Of this process, as its log handlers are."""


def tell_waiters(change: int) -> None:
    for observer in observers:
        observer.waiters(change)


def tell_rescued(rows: Sequence[Any]) -> None:
    """A dead worker's jobs, as they are now."""
    for observer in observers:
        observer.rescued(len(rows))
    for row in rows:
        fields = {"job": row.id, "task": row.task, "attempt": row.attempt, "state": row.state, "deaths": row.deaths}
        log(jobs, logging.WARNING, "job rescued", **fields, **telemetry.ids_of(row.trace))


def tell_committed(made: Iterable[Any]) -> None:
    """Jobs whose enqueue, retry or end is committed."""
    now = monotonic()
    for job in made:
        if job is not None:
            job.committed_at = now
            if jobs.isEnabledFor(logging.DEBUG):
                fields = {"job": job.id, "task": job.task, "queue": job.queue, "attempt": job.attempt}
                log(jobs, logging.DEBUG, f"job {job.state}", **fields, **telemetry.ids_of(job.trace))


@contextmanager
def lock_wait(session: Any, acquisition: Any) -> Iterator[None]:
    """The block takes a lock; `session` is SQLAlchemy's own."""
    tables, mode = acquisition.tables, acquisition.mode
    began = monotonic()
    try:
        with telemetry.internal(f"lock {', '.join(tables) or 'advisory'}") as span:
            telemetry.note(span, {"lock.mode": mode})
            yield
    finally:
        seconds = monotonic() - began
        timings = session.info.get(ATTEMPT_TIMINGS)
        if timings is not None:
            timings.add_lock(acquisition.subject, seconds)
        for observer in observers:
            observer.lock_waited(tables, mode, seconds)


class ObservedWait:
    """The block is the wait; at its end the session's `info` has its timings. No generator: thousands are open.

    `waiter` is a `Waiter` of `coord/waiting/`, and `session` SQLAlchemy's own.
    """

    __slots__ = ("_job", "_scope", "_session", "_span", "_waiter")

    def __init__(self, session: Any, waiter: Any, job: Any) -> None:
        self._session, self._waiter, self._job = session, waiter, job
        self._scope = telemetry.internal(f"wait {waiter.target.mapper.class_.__name__}")

    def __enter__(self) -> None:
        self._span = self._scope.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        ended = (known for each, known in OUTCOMES.items() if isinstance(error, each))
        try:
            self._note("changed" if error is None else next(ended, "error"))
        finally:
            self._scope.__exit__(kind, error, traceback)

    def _note(self, outcome: str) -> None:
        waiter, began = self._waiter, self._waiter.began
        message = (waiter.job.last_message() if waiter.job is not None else None) or waiter.last_message()
        if message is not None and self._job is None and message[1] < began:
            message = None  # about a change before this wait
        timings = self._session.info[WAIT_TIMINGS] = wait_timings_of(self._job, message, began=began)
        if self._span is not None:
            noted = {"wait.outcome": outcome, "wait.job_id": timings.job_id, **_seconds(timings)}
            telemetry.note(self._span, noted)
        seconds = monotonic() - began
        for observer in observers:
            observer.wait_ended(outcome, seconds)
            if outcome in ("changed", "failed"):
                observer.wait_answered(getattr(self._job, "task", None), timings)
            if message is not None:
                observer.hints("heard")
            elif outcome == "changed" and seconds > MISSED_SECONDS:
                observer.hints("missed")
        if waits.isEnabledFor(logging.DEBUG):
            log(waits, logging.DEBUG, f"wait {outcome}", job=timings.job_id, **_seconds(timings), **telemetry.ids())


@contextmanager
def observed_attempt(queue: str, message: Any, timings: AttemptTimings) -> Iterator[None]:
    """The block runs the task."""
    with telemetry.processing(message.task, queue, message.id, attempt=message.attempt, trace=message.trace) as span:
        try:
            yield
        finally:
            telemetry.note(span, _spent(timings) if span is not None else {})


def attempt_ended(message: Any, outcome: str, timings: AttemptTimings, reason: str | None) -> None:
    """The one line that an attempt has."""
    spent = _spent(timings)
    for observer in observers:
        observer.attempt_ended(message.task, outcome, timings)
    level = _LEVELS.get(outcome, logging.INFO)
    if jobs.isEnabledFor(level):
        fields = {"job": message.id, "task": message.task, "attempt": message.attempt, "reason": reason}
        log(jobs, level, f"job {outcome}", **fields, **spent, **telemetry.ids_of(message.trace))


def _spent(timings: AttemptTimings) -> dict[str, object]:
    if not timings.task:  # it has committed nothing
        timings.stop()
    seconds = {"queue_s": timings.queue, "lock_s": timings.lock, "task_s": timings.task}
    return {**seconds, "locked": timings.locked or None}


def _seconds(timings: WaitTimings) -> dict[str, object]:
    named = {f"{name}_s": seconds for name, seconds in timings.parts().items()}
    return {**named, "total_s": timings.total, "locked": timings.locked or None}


def log(logger: logging.Logger, level: int, event: str, **fields: object) -> None:
    """One line, `event key=value …`; a handler that writes JSON finds the fields in the record's `coord`."""
    found = {name: value for name, value in fields.items() if value is not None}
    text = " ".join(f"{name}={_quoted(value)}" for name, value in found.items())
    logger.log(level, "%s %s", event, text, extra={"coord": {"event": event, **found}}, stacklevel=2)


def _quoted(value: object) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)
