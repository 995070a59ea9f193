"""The transaction in which a job applies its effect: its first statement says that the job is done."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

from sqlalchemy import JSON, Integer, Text, bindparam, cast, event, exists, func, update
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction, async_sessionmaker
from sqlalchemy.orm import Session

from coord.cancellation import cleaned_up, interruptible, leaving
from coord.database.engine import AnySession, last_failure, session_of
from coord.database.transaction import connections_in_use
from coord.errors import message_of
from coord.jobs.arguments import as_it_arrives
from coord.jobs.attempt import ATTEMPT, Attempt
from coord.jobs.model import JobState, cancellations, execute, is_queued, job_mapper, jobs
from coord.notify.changes import collect
from coord.retryable import sqlstate_of
from coord.session import closed
from coord.timings import ATTEMPT_TIMINGS

WORKER_LOCK_CLASS = 0x636F6F72
"""The first half of the advisory lock that a job's transaction shares with the others of its worker; spells "coor"."""
CONNECTION_CHECK_SECONDS = 1.0
"""Until the backend of a killed worker notices, also while it waits for a lock."""
MAX_DEAD_CONNECTIONS = 3
"""Which one attempt may find before its first statement."""
FAILED_TRANSACTION = "25P02"
APPLIED_NOTHING = "job_transaction has applied nothing: its transaction had failed or was ended."


class JobSuperseded(BaseException):
    """This attempt may not apply its effect: the job is done, cancelled, or another attempt's."""


@asynccontextmanager
async def job_transaction(ctx: Mapping[str, Any]) -> AsyncIterator[AsyncSession]:
    """A session whose commit, at the end of the block, makes the task's effect and the job's completion true together.

    The first statement claims, fences and completes: it marks the job done if this attempt is the one that may run it,
    with the ledger's arguments. Whatever is delivered twice, crashes or comes too late applies nothing. It also bounds
    what a dead worker leaves, for this transaction alone: `client_connection_check_interval` 1 s, and
    `idle_in_transaction_session_timeout` 60 s (`worker_settings(idle_limit=…)`): between two statements the task may
    not do anything else for longer. While it is open no other transaction writes the job's row.

        async def fulfil_order(ctx, order_id):
            async with job_transaction(ctx) as session, lock_tables(session, [Stock, Order]):
                ...

    One block an attempt; a second is a `RuntimeError`, and so is a task that `worker_settings` does not run. A block
    whose transaction was rolled back inside it, by `rollback()` or by a failed flush, is an `InvalidRequestError` of
    SQLAlchemy's. Raises `JobSuperseded`, which is for the worker and not to be caught. Lock timeouts, deadlocks,
    serialization failures and lost connections run the whole task again.
    """
    attempt = ctx.get(ATTEMPT)
    if not isinstance(attempt, Attempt):
        raise RuntimeError("job_transaction needs a job of the ledger, run by worker_settings.")  # noqa: TRY004 - of its context
    if attempt.entered:
        raise RuntimeError("An attempt has one job_transaction, and this is a second.")
    attempt.entered = True
    try:
        session, transaction = await _claimed(attempt)
        failure, returned = None, False
        try:
            async with leaving(transaction):
                try:
                    yield session
                    returned = True
                finally:
                    failure = _swallowed(session)
            if not attempt.applied:  # SQLAlchemy leaves the block without an error
                raise InvalidRequestError(APPLIED_NOTHING)
        except InvalidRequestError as error:
            error.__cause__ = error.__cause__ or failure
            raise
        except DBAPIError as error:
            # A refused commit says only that something had failed; any other error of the commit speaks for itself.
            if returned and failure is not None and sqlstate_of(error) == FAILED_TRANSACTION:
                raise InvalidRequestError(APPLIED_NOTHING) from failure
            raise
        finally:
            del session.info[ATTEMPT]
            await closed(session)
    except BaseException as error:
        attempt.failure = error  # whether or not the task lets it through
        raise


async def _claimed(attempt: Attempt) -> tuple[AsyncSession, AsyncSessionTransaction]:
    """A session whose transaction has begun and claimed the job.

    A pooled connection may have died since it was last used. Nothing was executed on it, so another one is taken; the
    first that is found dead has SQLAlchemy give up all that are as old.
    """
    left = MAX_DEAD_CONNECTIONS
    while True:
        left -= 1
        # Used after the block, a closed session would begin another transaction.
        options = {"close_resets_only": False} if isinstance(attempt.session_maker, async_sessionmaker) else {}
        session: AsyncSession = attempt.session_maker(**options)
        session.info[ATTEMPT], session.info[ATTEMPT_TIMINGS] = attempt, attempt.timings
        transaction = session.begin()
        try:
            await transaction.__aenter__()
            await interruptible(_claim(session, attempt))
        except BaseException as error:
            await cleaned_up(transaction.__aexit__(type(error), error, error.__traceback__))
            await closed(session)
            if not left or not isinstance(error, DBAPIError) or not error.connection_invalidated:
                raise
        else:
            return session, transaction


def worker_lock_key(worker: UUID) -> int:
    """The second half of the advisory lock that a worker's job transactions share: 32 random bits of its id."""
    return int.from_bytes(worker.bytes[-4:], signed=True)


def _swallowed(session: AsyncSession) -> BaseException | None:
    """What has failed in the transaction and the task has not let through: it may be a deadlock."""
    failures = map(last_failure, connections_in_use(session.sync_session))
    return next((failure for failure in failures if failure is not None), None)


@event.listens_for(Session, "after_commit")
def _note_commit(session: Session) -> None:
    """SQLAlchemy calls this at a savepoint's release as well."""
    attempt = session.info.get(ATTEMPT)
    if attempt is not None and not session.in_nested_transaction():
        attempt.applied = True


async def set_result(session: AnySession, value: Any) -> None:
    """Keep `value`, JSON, as the job's result, in the `job_transaction` of this session; one more statement in it.

    Raises `TypeError` for what JSON would change, `RuntimeError` in any other session.
    """
    session = session_of(session)
    attempt = session.info.get(ATTEMPT)
    if not isinstance(attempt, Attempt):
        raise RuntimeError("set_result needs the session of a job_transaction.")  # noqa: TRY004 - of its context
    text, _ = as_it_arrives("the result", value)
    await interruptible(session.run_sync(execute, _set_result, {"job": attempt.job_id, "text": text}))


def set_progress(ctx: Mapping[str, Any], value: Any) -> None:
    """Record the task's progress, as JSON: `get_job` shows it from the next heartbeat on, as long as the job runs.

    Writes nothing itself. `TypeError` for what is not JSON, `RuntimeError` outside a job of the ledger.
    """
    attempt = ctx.get(ATTEMPT)
    if not isinstance(attempt, Attempt):
        raise RuntimeError("set_progress needs the ctx of a job of the ledger.")  # noqa: TRY004 - of its context
    _, attempt.progress = as_it_arrives("progress", value)


def ours(attempt: Attempt) -> dict[str, Any]:
    """The parameters of `is_ours`."""
    return {
        "job": attempt.job_id,
        "task_name": attempt.task,
        "number": attempt.number,
        "given": attempt.arguments,
        "limit": attempt.timeout,
    }


is_ours = (
    (jobs.c.id == bindparam("job"))
    & is_queued
    & (jobs.c.attempt == bindparam("number"))
    & (jobs.c.task == bindparam("task_name"))
    & (cast(jobs.c.arguments, Text) == bindparam("given"))
    & jobs.c.timeout.is_not_distinct_from(bindparam("limit"))
)
"""Whether a row is the unfinished job that an attempt is for: the message is from Redis, which may hold anything."""

is_unwanted = exists().where(cancellations.c.job_id == jobs.c.id)
"""Whether somebody has asked to cancel it."""
_its_turn = jobs.c.one_at_a_time.is_(None) | (jobs.c.turn == jobs.c.attempt)
_done = (
    update(jobs)
    .where(is_ours, ~is_unwanted, _its_turn)
    .values(state=bindparam("state"), started_at=bindparam("began"), finished_at=func.now())
    .returning(
        func.set_config("client_connection_check_interval", bindparam("check"), True),
        func.set_config("idle_in_transaction_session_timeout", bindparam("idle"), True),
        func.pg_advisory_xact_lock_shared(bindparam("class", type_=Integer), bindparam("lock", type_=Integer)),
    )
)
_set_result = update(jobs).where(jobs.c.id == bindparam("job")).values(result=cast(bindparam("text", type_=Text), JSON))


async def _claim(session: AsyncSession, attempt: Attempt) -> None:
    settings = {
        "began": attempt.began,
        "check": f"{CONNECTION_CHECK_SECONDS:g}s",
        "idle": f"{attempt.idle_limit * 1000:.0f}ms",
        "lock": attempt.worker_lock,
        "state": JobState.DONE,
        "class": WORKER_LOCK_CLASS,
    }
    try:
        claimed = (await session.run_sync(execute, _done, ours(attempt) | settings)).all()
    except OSError as error:  # a missing socket, or a time-out; neither is retryable when a task itself raises it
        raise ConnectionError(f"PostgreSQL cannot be reached: {message_of(error)}") from error
    attempt.claimed = bool(claimed)
    if not claimed:
        raise JobSuperseded(f"attempt {attempt.number} of job {attempt.job_id} is not the one to apply it")
    collect(session.sync_session, (job_mapper, (attempt.job_id,)))
