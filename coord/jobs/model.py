"""The ledger: a job exists because its row is committed, and is done because its row says so with its effect."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import (
    JSON,
    CheckConstraint,
    ColumnElement,
    Connection,
    CursorResult,
    DateTime,
    Double,
    Enum,
    Executable,
    Index,
    MetaData,
    Text,
    TypeDecorator,
    cast,
    false,
    func,
    inspect,
    literal_column,
    text,
    type_coerce,
)
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, Mapper, Session, mapped_column

from coord.database.engine import bind_for_writes, engine_of
from coord.database.place import ledger_options
from coord.database.schemas import UNTRANSLATED
from coord.jobs.arguments import to_json
from coord.retryable import sqlstate_of


class JobState(StrEnum):
    """A job's state. `running` is never stored: it is a queued job that a living worker's heartbeat names."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self not in (JobState.QUEUED, JobState.RUNNING)


_QUEUED = text("state = 'queued'")
_IN_FEED = text("state = 'queued' AND turn IS DISTINCT FROM 0")
_HAS_TURN = text("state = 'queued' AND turn = attempt")
_WAITS = text("state = 'queued' AND turn = 0")
_HAS_KEY = text("state = 'queued' AND unique_key IS NOT NULL")
_Time = DateTime(timezone=True)


class _Json(TypeDecorator[Any]):
    """PostgreSQL's `json`, which keeps a text as it is; written and read by coord's rules and not the engine's."""

    impl = JSON
    cache_ok = True

    def bind_processor(self, dialect: Any) -> Callable[[Any], str | None]:
        return lambda value: None if value is None else to_json(value)

    def result_processor(self, dialect: Any, coltype: Any) -> Callable[[str | None], Any]:
        return lambda stored: None if stored is None else json.loads(stored)

    def column_expression(self, column: ColumnElement[Any]) -> ColumnElement[Any]:
        return type_coerce(cast(column, Text), self)

    def __repr__(self) -> str:
        return "JSON()"


_Json.__module__ = JSON.__module__  # so Alembic writes `sa.JSON()` into migrations, which do not import coord


class Ledger(DeclarativeBase):
    """The ledger's tables, apart from the application's. For Alembic: `target_metadata = [metadata, Job.metadata]`."""

    metadata = MetaData(info={UNTRANSLATED: True})


class Job(Ledger):
    """One call of a task, from the commit that made it on. What `enqueue` returns is a snapshot, in no session."""

    __tablename__ = "coord_jobs"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    """Ordered by time, so that new rows lie together."""
    task: Mapped[str] = mapped_column(Text)
    queue: Mapped[str] = mapped_column(Text)
    """The sorted set in Redis that it is handed to."""
    arguments: Mapped[Any] = mapped_column(_Json)
    """`[args, kwargs]`, as text: an attempt that was given others applies nothing."""
    state: Mapped[JobState] = mapped_column(
        Enum(JobState, native_enum=False, values_callable=lambda states: [state.value for state in states], length=9),
        server_default=JobState.QUEUED.value,
    )
    attempt: Mapped[int] = mapped_column(server_default="1")
    """The number of the attempt that may apply its effect; a retry and a rescue raise it."""
    max_attempts: Mapped[int | None]
    """How many attempts may count; None leaves it to the worker."""
    uncounted: Mapped[int] = mapped_column(server_default="0")
    """Attempts that were begun and do not count: a neighbour killed their worker, PostgreSQL was away."""
    deaths: Mapped[int] = mapped_column(server_default="0")
    """Workers that died while they ran it and no job more suspect; with one or more the job is a suspect."""
    hand_backs: Mapped[int] = mapped_column(server_default="0")
    """How often a worker that was stopping has given it back unfinished."""
    unknown_seconds: Mapped[float] = mapped_column(Double, server_default="0")
    """Seconds that it was put off for by workers that do not know its task, or refuse its arguments."""
    priority: Mapped[int] = mapped_column(server_default="0")
    """-100 to 100; of the jobs that are due, those of a higher one are taken first."""
    one_at_a_time: Mapped[str | None] = mapped_column(Text)
    """A key: of the jobs that have it, in whatever queue, one runs at a time."""
    turn: Mapped[int | None]
    """Of a job with such a key: 0 while it waits for another one, and the attempt whose turn it is."""
    timeout: Mapped[float | None] = mapped_column(Double)
    """Seconds an attempt may take; None leaves it to the worker."""
    unique_key: Mapped[str | None] = mapped_column(Text)
    scheduled_at: Mapped[datetime] = mapped_column(_Time, server_default=func.now())
    """Before which it does not start, by PostgreSQL's clock."""
    created_at: Mapped[datetime] = mapped_column(_Time, server_default=func.now())
    started_at: Mapped[datetime | None] = mapped_column(_Time)
    """When the attempt that ended it began, by the worker's clock."""
    finished_at: Mapped[datetime | None] = mapped_column(_Time)
    """Of a job done in a `job_transaction`, when that began: nothing is written between its effect and its commit."""
    error: Mapped[str | None] = mapped_column(Text)
    """The last failure in one line, also of a job that was done afterwards."""
    traceback: Mapped[str | None] = mapped_column(Text)
    result: Mapped[Any] = mapped_column(_Json, nullable=True)
    trace: Mapped[dict[str, str] | None] = mapped_column(_Json)
    """The trace context of its `enqueue`, as OpenTelemetry's propagators write it."""

    due_in = 0.0
    """Seconds until it is due, as known when it was read: not by comparing clocks."""
    due_said_at = committed_at = 0.0  # When that was so, and when this process committed it, on the monotonic clock.
    joined = False
    """Whether `enqueue` found this job, unfinished under the same unique key, instead of making one."""

    __table_args__ = (
        CheckConstraint("state IN ('queued', 'done', 'failed', 'cancelled')", name="coord_jobs_state"),
        Index("coord_jobs_queued", "id", postgresql_where=_QUEUED),
        Index("coord_jobs_due", "queue", "scheduled_at", "id", postgresql_where=_IN_FEED),
        Index("coord_jobs_turn", "one_at_a_time", unique=True, postgresql_where=_HAS_TURN),
        Index("coord_jobs_waiting", "one_at_a_time", priority.desc(), "scheduled_at", "id", postgresql_where=_WAITS),
        Index("coord_jobs_failed", "id", postgresql_where=text("state = 'failed'")),
        Index("coord_jobs_unique", "task", "unique_key", unique=True, postgresql_where=_HAS_KEY),
    )

    def __repr__(self) -> str:
        return f"<Job {self.id} {self.task} {self.state}>"


class Worker(Ledger):
    """A living worker's heartbeat, and the jobs it runs: the only record of that, since their rows are locked."""

    __tablename__ = "coord_workers"
    id: Mapped[UUID] = mapped_column(primary_key=True)
    queue: Mapped[str] = mapped_column(Text)
    host: Mapped[str] = mapped_column(Text)
    pid: Mapped[int]
    started_at: Mapped[datetime] = mapped_column(_Time, server_default=func.now())
    beat_at: Mapped[datetime] = mapped_column(_Time, server_default=func.now())
    beats: Mapped[int] = mapped_column(server_default="1")
    jobs: Mapped[dict[str, Any]] = mapped_column(_Json)
    """By job id: `{"attempt": 1, "progress": …}`."""
    tasks: Mapped[dict[str, str]] = mapped_column(_Json, server_default="{}")
    """What it can run: the signature of each task by its name."""
    stopping: Mapped[bool] = mapped_column(server_default=false())
    """Whether it is stopping: if it dies now, no job is to blame."""
    dead: Mapped[bool] = mapped_column(server_default=false())
    """Whether its heartbeat has seen it die."""


class Queue(Ledger):
    """What concerns a whole queue."""

    __tablename__ = "coord_queues"

    name: Mapped[str] = mapped_column(Text, primary_key=True)
    paused_at: Mapped[datetime | None] = mapped_column(_Time)
    """Since when workers take nothing of it."""
    leader: Mapped[UUID | None]
    """The worker that does the maintenance of the queue."""
    leader_until: Mapped[datetime | None] = mapped_column(_Time)


class AttemptRecord(Ledger):
    """An attempt that did not succeed; the one that does costs no row of its own."""

    __tablename__ = "coord_attempts"

    job_id: Mapped[UUID] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    worker: Mapped[UUID | None]
    host: Mapped[str | None] = mapped_column(Text)
    pid: Mapped[int | None]
    began: Mapped[datetime | None] = mapped_column(_Time)
    """By the worker's clock."""
    ended: Mapped[datetime] = mapped_column(_Time, server_default=func.now())
    outcome: Mapped[str] = mapped_column(Text)
    error: Mapped[str | None] = mapped_column(Text)
    traceback: Mapped[str | None] = mapped_column(Text)


class Schedule(Ledger):
    """A periodic task, and how far it has come."""

    __tablename__ = "coord_schedules"

    name: Mapped[str] = mapped_column(Text, primary_key=True)
    queue: Mapped[str] = mapped_column(Text)
    slot: Mapped[datetime] = mapped_column(_Time, server_default=func.now())
    """The last one that was dealt with; of a new schedule, when it was first seen."""
    job_id: Mapped[UUID | None]
    """The last job that was made for it."""
    seen_at: Mapped[datetime] = mapped_column(_Time, server_default=func.now())
    """When a worker last had it in its settings."""


class Cancellation(Ledger):
    """A request to cancel a job whose row its worker has locked; deleted with the job's end."""

    __tablename__ = "coord_cancellations"

    job_id: Mapped[UUID] = mapped_column(primary_key=True)
    id: Mapped[UUID] = mapped_column(primary_key=True, server_default=func.gen_random_uuid())
    requested_at: Mapped[datetime] = mapped_column(_Time, server_default=func.now())


class IdempotencyKey(Ledger):
    """A key that a client has sent with a request, and the job it was for."""

    __tablename__ = "coord_idempotency_keys"
    __table_args__ = (Index("coord_idempotency_keys_expiry", "expires_at"),)

    scope: Mapped[str] = mapped_column(Text, primary_key=True)
    """A digest of the caller and the route."""
    key: Mapped[str] = mapped_column(Text, primary_key=True)
    fingerprint: Mapped[str] = mapped_column(Text)
    """A digest of the request."""
    job_id: Mapped[UUID | None]
    expires_at: Mapped[datetime] = mapped_column(_Time)


Ledger.registry.configure()  # or the first snapshot would come before SQLAlchemy has
job_mapper: Mapper[Job] = inspect(Job)
jobs = Job.metadata.tables[Job.__tablename__]
"""For statements that are no business of the unit of work's."""
is_queued = jobs.c.state == literal_column("'queued'")
"""Written out, since a parameter would hide from PostgreSQL that a partial index will do (section 11.8)."""
is_in_feed = is_queued & jobs.c.turn.is_distinct_from(literal_column("0"))
"""Of the unfinished jobs, those that do not wait for another one with their key."""
workers = Worker.metadata.tables[Worker.__tablename__]
queues = Queue.metadata.tables[Queue.__tablename__]
attempts = AttemptRecord.metadata.tables[AttemptRecord.__tablename__]
cancellations = Cancellation.metadata.tables[Cancellation.__tablename__]
schedules = Schedule.metadata.tables[Schedule.__tablename__]
keys = IdempotencyKey.metadata.tables[IdempotencyKey.__tablename__]

MISSING = "The ledger's tables are missing: `coord schema --apply` makes them, and so does `create_ledger`."


def ledger_engine(source: async_sessionmaker[Any] | AsyncSession) -> AsyncEngine:
    """The engine by which sessions write jobs."""
    return engine_of(source, **bind_for_writes(job_mapper))


def ledger_connection(session: Session) -> Connection:
    """Of the session's transaction, the one by which it writes jobs."""
    return session.connection(bind_arguments=dict(bind_for_writes(job_mapper)))


def execute(session: Session, statement: Executable, values: dict[str, Any] | None = None) -> CursorResult[Any]:
    """In the session's transaction, where the ledger is; nothing pending is flushed. To be called by `run_sync`."""
    connection = ledger_connection(session)
    try:
        return connection.execute(statement, values, execution_options=ledger_options(connection))
    except ProgrammingError as error:
        if sqlstate_of(error) == "42P01":
            error.add_note(MISSING)
        raise
