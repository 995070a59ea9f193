"""Enqueue: one ledger row in the caller's transaction, and nothing else until that has committed."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, overload

from arq.worker import Function
from sqlalchemy import JSON, DateTime, Interval, Row, RowMapping, Text, bindparam, cast, func, inspect, select
from sqlalchemy.dialects.postgresql import insert as insert_into
from sqlalchemy.orm import Session

from coord.cancellation import interruptible
from coord.database.engine import AnySession, session_of
from coord.database.transaction import connection_mutex, expect_commit
from coord.errors import UniqueKeyConflictError
from coord.jobs.arguments import as_it_arrives, check_call, is_same
from coord.jobs.ids import new_id
from coord.jobs.model import Job, JobState, execute, is_queued, job_mapper, jobs, ledger_engine
from coord.jobs.options import DEFAULT_QUEUE, P, Task, TaskOptions
from coord.notify.changes import collect, warn_if_uncoordinated
from coord.telemetry import sending

options_given = ("id", "task", "queue", "max_attempts", "timeout", "unique_key", "priority", "one_at_a_time", "trace")
"""What is stored of a job as `values_of` has it."""
# The text itself, which was made to see that it can be: the claim compares it.
_text = cast(bindparam("text", type_=Text), JSON)
_LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)
"""What is due before is due now; the driver does not know every time that Python does."""
_now = func.statement_timestamp()
"""By PostgreSQL's clock, whatever this process's is."""
_moment = func.greatest(func.coalesce(bindparam("moment", type_=DateTime(timezone=True)), _now), _now)
_times = {"created_at": _now, "scheduled_at": _moment + bindparam("delay", type_=Interval)}
_values: dict[str, Any] = {name: bindparam(name) for name in options_given} | {"arguments": _text, **_times}
stored_columns = (
    jobs.c.created_at,
    jobs.c.scheduled_at,
    func.extract("epoch", jobs.c.scheduled_at - _now).label("due_in"),
)
is_unfinished = is_queued & jobs.c.unique_key.is_not(None)
_insert = insert_into(jobs).values(_values)
_insert_stored = _insert.returning(*stored_columns)
_insert_unique = _insert.on_conflict_do_nothing(
    index_elements=[jobs.c.task, jobs.c.unique_key], index_where=is_unfinished
).returning(*stored_columns)
_find_unique = select(jobs).where(
    is_unfinished, jobs.c.task == bindparam("task"), jobs.c.unique_key == bindparam("unique_key")
)


@overload
async def enqueue(session: AnySession, task: str | Function, /, *args: Any, **kwargs: Any) -> Job: ...
@overload
async def enqueue(session: AnySession, task: Task[P] | TaskOptions[P], /, *args: P.args, **kwargs: P.kwargs) -> Job: ...
async def enqueue(session: AnySession, task: Any, /, *args: Any, **kwargs: Any) -> Job:
    """Have `task(ctx, *args, **kwargs)` run once this session's transaction has committed; the caller commits.

    Writes one row of the ledger in the caller's transaction (in its savepoint, if it is in one): rolled back, there is
    no job; committed, there is one, whatever happens to this process or to Redis next. Nothing pending is flushed. The
    job is handed to a worker right after the commit by this process's `Coordinator`, else within five seconds by a
    worker's reconciler. Delivery is at least once; see `job_transaction` for effects that apply once.

        job = await enqueue(session, fulfil_order, order_id)
        await session.commit()

    Returns a copy of the row in no session, whose `id` is readable after the commit too. A task may be given by its
    name. With `task_options(task, unique_key=…)` it may be an unfinished job that was there (`job.joined`), or a
    `UniqueKeyConflictError` if that has other arguments. Arguments that JSON changes are a `TypeError` before any SQL,
    and so are those that the function does not take; of a task that is given by its name, only its worker knows.
    """
    session = session_of(session)
    ledger_engine(session)
    options = task if isinstance(task, TaskOptions) else TaskOptions(task)
    values = values_of(options)
    check_call(values["task"], options.task, args, kwargs)
    text, arguments = as_it_arrives(f"{values['task']}: the arguments", [[*args], kwargs])
    with sending(values["task"], values["queue"], values["id"]) as values["trace"]:
        given = values | due_of(options) | {"text": text}
        async with connection_mutex(session):
            if options.unique_key is None:
                stored: Row[Any] = (await interruptible(session.run_sync(execute, _insert_stored, given))).one()
            else:
                found = await interruptible(session.run_sync(_join, given, text))
                if isinstance(found, Job):
                    return found
                stored = found
    job = job_of(given, arguments, stored)
    warn_if_uncoordinated()
    collect(session.sync_session, (job_mapper, (job.id,)), job)
    expect_commit(session.sync_session, job)
    return job


def values_of(options: TaskOptions[Any]) -> dict[str, Any]:
    return {
        "id": new_id(),
        "task": options.name,
        "queue": options.queue or DEFAULT_QUEUE,
        "max_attempts": options.max_attempts,
        "timeout": options.timeout,
        "unique_key": options.unique_key,
        "priority": options.priority,
        "one_at_a_time": options.one_at_a_time,
    }


def due_of(options: TaskOptions[Any]) -> dict[str, Any]:
    if isinstance(options.delay, datetime):
        return {"moment": max(options.delay, _LONG_AGO), "delay": timedelta()}
    return {"moment": None, "delay": timedelta(seconds=options.delay or 0)}


def _join(session: Session, values: dict[str, Any], text: str) -> Job | Row[Any]:
    """The unfinished job with the same unique key; or what was stored of the new one."""
    # Looked for first: to an insert, a job that runs just now is a conflict to wait for.
    while (found := execute(session, _find_unique, values).mappings().one_or_none()) is None:
        stored = execute(session, _insert_unique, values).one_or_none()
        if stored is not None:
            return stored
    return joined(found, json.loads(text))


def job_of(values: Mapping[str, Any], arguments: Any, stored: Row[Any]) -> Job:
    """As it is in the ledger now."""
    made = {"arguments": arguments, "state": JobState.QUEUED, "attempt": 1, "deaths": 0}
    times = {"created_at": stored.created_at, "scheduled_at": stored.scheduled_at}
    job = Job()
    inspect(job).dict.update({name: values[name] for name in options_given}, **made, **times)  # a quarter of the time
    job.due_in, job.due_said_at = float(stored.due_in), time.monotonic()
    return job


def joined(found: RowMapping, arguments: Any) -> Job:
    """The unfinished job that was there, if its arguments are the same."""
    job = Job(**found)
    if not is_same(job.arguments, arguments):
        raise UniqueKeyConflictError(
            f"{job} is unfinished under the unique key {job.unique_key!r} with the arguments {job.arguments}"
        )
    job.joined = True
    return job
