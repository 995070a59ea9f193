"""One job: what is known of it, its timeline, and where its time went."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import Float, Text, cast, func, select

from coord.blocking import blocking
from coord.http.problem import public_reason
from coord.jobs.model import JobState, execute, jobs, workers
from coord.jobs.queries import RETRYABLE_STATES, get_job, list_attempts
from coord.telemetry import ids_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy.ext.asyncio import AsyncSession

    from coord.blocking import Backend
    from coord.console.timings import Spent
    from coord.jobs.queries import AttemptReport, JobReport

MAX_SHOWN_CHARACTERS = 20_000
"""Of arguments, a result, a progress."""
ORDER = ("retries", "queue", "lock", "task", "wake")
"""Of the parts, as they come one after another."""
OF_NOTE_SECONDS = 0.001
"""A part that took less is not where the time went."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What the ledger has of a job, and what of its locks PostgreSQL knows now."""

    report: JobReport
    more: Mapping[str, Any]
    """Columns that a report has not."""
    now: datetime
    """By PostgreSQL's clock."""
    attempts: Sequence[AttemptReport]
    where: str | None
    """Host and pid of the worker that runs it."""
    backend: Backend | None
    """Its transaction, if that holds a lock of note or waits for one."""
    others: Mapping[int, Backend]
    """By pid, those that are in its way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """An entry of the timeline."""

    at: datetime
    kind: str
    """A state's name, or `step`."""
    title: str
    text: str = ""
    traceback: str | None = None
    order: int = 0
    """Among those of one moment."""


@dataclass(frozen=True, slots=True)
class Part:
    """Where some of the time went."""

    name: str
    seconds: float
    share: float
    """Of the whole, 0 to 1."""
    note: str = ""


async def find_job(session: AsyncSession, job_id: UUID) -> Found:
    """`RowNotFoundError` if there is none. Joins the session's transaction, and only reads."""
    report = await get_job(session, job_id)
    names = ("max_attempts", "uncounted", "deaths", "hand_backs", "priority", "one_at_a_time", "timeout", "trace")
    due_in = cast(func.extract("epoch", jobs.c.scheduled_at - func.clock_timestamp()), Float).label("due_in")
    columns = (*(jobs.c[name] for name in names), due_in, func.clock_timestamp().label("now"))
    row = (await session.run_sync(execute, select(*columns).where(jobs.c.id == job_id))).mappings().one()
    backends = await blocking(session) if report.state is JobState.RUNNING else []
    own = next((each for each in backends if each.job is not None and each.job.id == job_id), None)
    where = None
    if report.worker is not None:
        place = select(workers.c.host + ":" + cast(workers.c.pid, Text)).where(workers.c.id == report.worker)
        where = (await session.run_sync(execute, place)).scalar()
    return Found(
        report=report,
        more={**row, "trace_id": None, "request_id": None, **ids_of(row["trace"])},
        now=row["now"],
        attempts=await list_attempts(session, job_id),
        where=where,
        backend=own,
        others={each.pid: each for each in backends if own is not None and each.pid in own.blocked_by},
    )


def actions_of(report: JobReport) -> Sequence[str]:
    """What can be done about it."""
    return [
        *(["cancel"] if not report.state.is_final else []),
        *(["retry"] if report.state in RETRYABLE_STATES else []),
    ]


def timeline(found: Found, spent: Spent | None, *, full: bool) -> Sequence[Moment]:
    """From its `enqueue` on. A reader's has no tracebacks, and errors only as any client may read them."""
    report = found.report
    request = found.more.get("request_id")
    said = f"in the queue {report.queue}" + (f", by the request {request}" if request else "")
    moments = [Moment(at=report.created_at, kind="queued", title="Enqueued", text=said)]
    if report.scheduled_at > report.created_at:
        title = "Due" if found.more["due_in"] <= 0 else "Will be due"
        again = "the time of the attempt that counts now" if found.attempts else "it was enqueued for then"
        moments.append(Moment(at=report.scheduled_at, kind="queued", title=title, text=again, order=2))
    for tried in found.attempts:
        moments += _attempt(tried, full=full)
    if report.state is JobState.RUNNING:
        moments.append(_running(found))
    elif report.state.is_final:
        told = any((each.number, each.outcome) == (report.attempt, report.state) for each in found.attempts)
        moments += [] if told else _end(report, spent, full=full)
    return sorted(moments, key=lambda moment: (moment.at, moment.order))


def _attempt(tried: AttemptReport, *, full: bool) -> Sequence[Moment]:
    on = f"by {tried.host}:{tried.pid}" if tried.host else ""
    began = [] if tried.began is None else [tried.began]
    error = tried.error if full else public_reason(tried.error)
    kind = tried.outcome if tried.outcome in ("failed", "cancelled") else "retried"
    took = f" after {(tried.ended - tried.began).total_seconds():.3f} s" if tried.began else ""
    return [
        *(Moment(at=at, kind="step", title=f"Attempt {tried.number} taken", text=on, order=3) for at in began),
        Moment(
            at=tried.ended,
            kind=kind,
            title=f"Attempt {tried.number}: {tried.outcome}{took}",
            text=error or "",
            traceback=tried.traceback if full else None,
            order=4,
        ),
    ]


def _running(found: Found) -> Moment:
    said, backend = f"by {found.where or 'a worker'}", found.backend
    if backend is not None and backend.waits_for is not None:
        said += f"; waits {backend.waiting_seconds or 0:.1f} s for {backend.waits_for}"
    elif backend is not None:
        said += "; holds " + ", ".join(str(lock) for lock in backend.holds if lock.is_strong)
    return Moment(at=found.now, kind="running", title=f"Attempt {found.report.attempt} runs", text=said, order=9)


def _end(report: JobReport, spent: Spent | None, *, full: bool) -> Sequence[Moment]:
    moments, ended = [], report.finished_at
    if report.started_at is not None:
        moments.append(Moment(at=report.started_at, kind="step", title=f"Attempt {report.attempt} taken", order=3))
    title, text = {
        JobState.DONE: ("Done", "of a job_transaction, when that began; it committed with its effect"),
        JobState.FAILED: ("Failed", (report.error if full else public_reason(report.error)) or ""),
        JobState.CANCELLED: ("Cancelled", ""),
    }[report.state]
    if report.started_at is not None and spent is not None and report.state is JobState.DONE:
        took = spent.parts.get("lock", 0) + spent.parts.get("task", 0)
        ended, title, text = report.started_at + timedelta(seconds=took), "Committed", "done, together with its effect"
        if spent.parts.get("lock", 0) >= OF_NOTE_SECONDS:
            lock = f"{spent.parts['lock'] * 1000:.1f} ms for {spent.locked or 'its locks'}"
            moments.append(Moment(at=report.started_at, kind="step", title="Waited for a lock", text=lock, order=4))
    if ended is not None:
        traceback = report.traceback if full else None
        moments.append(Moment(at=ended, kind=str(report.state), title=title, text=text, traceback=traceback, order=8))
    return moments


def parts_of(found: Found, spent: Spent | None) -> Sequence[Part]:
    """Where its time went: as told to this process, or else as far as the ledger and its locks can tell."""
    report, backend = found.report, found.backend
    seconds: dict[str, float] = {}
    if spent is not None and report.state.is_final:
        seconds = {name: value for name, value in spent.parts.items() if value > 0 or name != "retries"}
    else:
        before = [each for each in found.attempts if each.number < report.attempt]
        due = max(report.scheduled_at, report.created_at, *(each.ended for each in before))
        if report.started_at is not None:
            seconds["queue"] = max(0.0, (report.started_at - due).total_seconds())
        elif report.state is JobState.QUEUED:
            seconds["queue"] = max(0.0, (found.now - due).total_seconds())
        if before and before[0].began is not None:
            seconds["retries"] = max(0.0, (due - before[0].began).total_seconds())
        if report.state is JobState.FAILED and report.started_at and report.finished_at:
            seconds["task"] = max(0.0, (report.finished_at - report.started_at).total_seconds())
        if backend is not None and backend.waits_for is not None:
            seconds["lock"] = backend.waiting_seconds or 0.0
    lock = str(backend.waits_for) if backend is not None and backend.waits_for is not None else ""
    notes = {"lock": spent.locked if spent is not None and spent.locked else lock}
    whole = sum(seconds.values()) or 1.0
    known = [(name, seconds[name]) for name in ORDER if name in seconds]
    return [Part(name, value, value / whole, notes.get(name, "")) for name, value in known]


def largest(parts: Sequence[Part]) -> Part | None:
    """Where most of it went."""
    found = max(parts, key=lambda part: part.seconds, default=None)
    return found if found is not None and found.seconds >= OF_NOTE_SECONDS else None


def as_text(value: Any) -> str:
    """JSON as a person reads it."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    if len(text) <= MAX_SHOWN_CHARACTERS:
        return text
    return f"{text[:MAX_SHOWN_CHARACTERS]}\n… {len(text) - MAX_SHOWN_CHARACTERS:,} characters more"
