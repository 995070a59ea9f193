"""What a dead worker leaves: transactions that hold locks, and jobs whose attempt will not end by itself."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from sqlalchemy import case, column, exists, func, select, table, tuple_, update
from sqlalchemy.exc import DBAPIError

from coord.jobs.model import JobState, cancellations, is_queued, jobs
from coord.jobs.transaction import CLASS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from sqlalchemy import Row
    from sqlalchemy.ext.asyncio import AsyncEngine

    from coord.worker.keeper import Identity
    from coord.worker.reconciler import Missing

logger = logging.getLogger("arq.coord")

DIED = "the worker that ran it died"

_locks = table(
    "pg_locks",
    *map(column, ("pid", "locktype", "classid", "objid", "objsubid", "database")),
    schema="pg_catalog",
)
_databases = table("pg_database", column("oid"), column("datname"), schema="pg_catalog")


def lock_of(worker: UUID) -> int:
    """The second half of the advisory lock that a worker's job transactions share: 32 random bits of its id."""
    return int.from_bytes(worker.bytes[-4:], signed=True)


async def end_transactions(engine: AsyncEngine, worker: UUID) -> None:
    """End the backends of a worker's open job transactions; they are told apart by the advisory lock they hold.

    A role may do that to itself (`pg_terminate_backend`, section 9.28.2 of PostgreSQL's manual). Without it the
    transactions end when they have been idle for too long.
    """
    here = select(_databases.c.oid).where(_databases.c.datname == func.current_database()).scalar_subquery()
    statement = select(func.pg_terminate_backend(_locks.c.pid)).where(
        _locks.c.locktype == "advisory",
        _locks.c.classid == CLASS,
        _locks.c.objid == lock_of(worker) % 2**32,
        _locks.c.objsubid == 2,
        _locks.c.database == here,
    )
    try:
        async with engine.connect() as connection:
            ended = list(await connection.scalars(statement))
    except DBAPIError as error:
        logger.warning("The transactions of worker %s cannot be ended: %s", worker, error.orig)
    else:
        if ended:
            logger.warning("Ended %d transactions of worker %s", len(ended), worker)


async def next_attempts(engine: AsyncEngine, orphans: Sequence[Missing], identity: Identity) -> Sequence[Row[Any]]:
    """Raise the attempt of each of these jobs, or end it, if it is still as it was found and nobody has locked it.

    One statement, which commits by itself: nothing stays locked if this worker dies in the middle of it.
    """
    found = tuple_(jobs.c.id, jobs.c.attempt).in_([(job.id, job.attempt) for job in orphans])
    free = select(jobs.c.id).where(is_queued, found).with_for_update(skip_locked=True)
    unwanted = exists().where(cancellations.c.job_id == jobs.c.id)
    usual = case(identity.tries, value=jobs.c.task, else_=identity.attempts) if identity.tries else identity.attempts
    most = func.coalesce(jobs.c.attempts, usual)
    last = ~unwanted & (jobs.c.attempt >= most)
    counted = func.concat(DIED, " (attempt ", jobs.c.attempt, " of ", most, ")")
    raised = (
        update(jobs)
        .where(jobs.c.id.in_(free))
        .values(
            state=case((unwanted, JobState.CANCELLED), (last, JobState.FAILED), else_=JobState.QUEUED),
            attempt=case((unwanted | last, jobs.c.attempt), else_=jobs.c.attempt + 1),
            due_at=func.now(),
            finished_at=case((unwanted | last, func.now())),
            error=case((last, counted), else_=DIED),
            traceback=None,
        )
        .returning(jobs)
    )
    async with engine.connect() as connection:
        rows: Sequence[Row[Any]] = (await connection.execute(raised)).all()
    return rows
