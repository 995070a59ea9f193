"""What a dead worker leaves: transactions that hold locks, and jobs whose attempt will not end by itself."""

from __future__ import annotations

import logging
import random
from collections import Counter
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import column, delete, func, select, table, text, tuple_, update
from sqlalchemy.exc import DBAPIError

from coord.jobs.job_transaction import CLASS
from coord.jobs.model import JobState, cancellations, is_queued, jobs, workers
from coord.observation import tell_rescued
from coord.queue.handover import push
from coord.worker.finalizer import HANDED_BACK, MAX_HAND_BACKS
from coord.worker.maintenance.loops import Loop
from coord.worker.maintenance.registry import named
from coord.worker.maintenance.rows import remaining

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from uuid import UUID

    from redis.asyncio import Redis
    from sqlalchemy import Row
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from coord.queue.keys import QueueKeys
    from coord.worker.maintenance.registry import WorkerRegistry

logger = logging.getLogger("arq.coord")

DIED = "the worker that ran it died"
PAUSE_SECONDS = (1.0, 60.0)
"""Before the attempt after a second death, and before any later one at most; after the first there is none."""
TERMINATE_MILLISECONDS = 2_000
"""For a backend to end."""

_locks = table(
    "pg_locks",
    *map(column, ("pid", "locktype", "classid", "objid", "objsubid", "database")),
    schema="pg_catalog",
)
_databases = table("pg_database", column("oid"), column("datname"), schema="pg_catalog")


class Rescuer(Loop):
    """Works only while this worker leads. `ended` is told of jobs that have come to their end by it."""

    interval = 0.5
    limit = 30.0

    def __init__(
        self,
        engine: AsyncEngine,
        redis: Redis,
        keys: QueueKeys,
        registry: WorkerRegistry,
        is_leader: Callable[[], bool],
        attempts_of: Callable[[str], int],
        ended: Callable[[Iterable[UUID]], None],
    ) -> None:
        super().__init__()
        self._engine = engine
        self._redis: Any = redis
        self._keys = keys
        self._registry = registry
        self._is_leader = is_leader
        self._attempts_of = attempts_of
        self._ended = ended

    async def round(self) -> None:
        for worker, seen in dict(self._registry.dead).items():
            if self._is_leader():
                await self._rescue(worker, seen.beats)

    async def _rescue(self, worker: UUID, beats: int) -> None:
        """Take a dead worker off the list, unless its heart has beaten after all, and give its jobs to others."""
        gone = delete(workers).where(workers.c.id == worker, workers.c.beats == beats)
        async with self._engine.connect() as connection, connection.begin():
            # A leader that is stopped in the middle must not keep the rows.
            await connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = '5s'"))
            dead = (await connection.execute(gone.returning(workers.c.jobs, workers.c.stopping))).one_or_none()
            if dead is None:
                return
            await _end_transactions(connection, worker)
            rows = await _aboard(connection, dead.jobs)
            changes = self._judged(rows, stopping=dead.stopping)
            for row in rows:
                await connection.execute(update(jobs).where(jobs.c.id == row.id).values(changes[row.id]))
            again = [job_id for job_id, change in changes.items() if change["state"] is JobState.QUEUED]
            waiting = (await connection.execute(_following.where(jobs.c.id.in_(again)))).all() if again else []
        states = Counter(str(change["state"]) for change in changes.values())
        logger.warning("Worker %s is dead; its jobs: %s", worker, dict(states) or "none")
        tell_rescued(len(rows))
        command = push(self._keys, [(row, float(row.remaining)) for row in waiting])
        if command is not None:
            await self._redis.execute_command(*command)
        self._ended(job_id for job_id, change in changes.items() if change["state"] is not JobState.QUEUED)

    def _judged(self, rows: Sequence[Row[Any]], *, stopping: bool) -> dict[UUID, dict[str, Any]]:
        """What becomes of each. A suspect aboard is to blame alone, otherwise all are; of a stop nobody is."""
        suspects = {row.id for row in rows if row.deaths}
        changes = {}
        for row in rows:
            to_blame = not stopping and (row.id in suspects or not suspects)
            if row.is_unwanted:
                changes[row.id] = _end(JobState.CANCELLED, DIED)
            elif to_blame:
                changes[row.id] = self._counted(row)
            elif stopping and row.hand_backs >= MAX_HAND_BACKS:
                changes[row.id] = _end(JobState.FAILED, HANDED_BACK)
            else:
                uncounted = {"uncounted": row.uncounted + 1, "hand_backs": row.hand_backs + stopping}
                changes[row.id] = _next(row, 0.0) | uncounted
        return changes

    def _counted(self, row: Row[Any]) -> dict[str, Any]:
        """A job that kills its workers must come to an end, and leave the others room until then."""
        deaths = row.deaths + 1
        used, limit = row.attempt - row.uncounted, row.max_attempts or self._attempts_of(row.task)
        if used >= limit:
            return _end(JobState.FAILED, f"{DIED} (attempt {used} of {limit})") | {"deaths": deaths}
        pause = min(PAUSE_SECONDS[0] * 2 ** min(deaths - 2, 30), PAUSE_SECONDS[1]) if deaths > 1 else 0.0
        return _next(row, pause * random.uniform(0.5, 1.0)) | {"deaths": deaths}


_following = select(jobs, remaining)


def lock_of(worker: UUID) -> int:
    """The second half of the advisory lock that a worker's job transactions share: 32 random bits of its id."""
    return int.from_bytes(worker.bytes[-4:], signed=True)


async def _aboard(connection: AsyncConnection, told: Mapping[str, Any]) -> Sequence[Row[Any]]:
    """The jobs that a heartbeat has named, as far as they are still unfinished in that attempt, locked."""
    unwanted = select(cancellations.c.job_id).where(cancellations.c.job_id == jobs.c.id).exists().label("is_unwanted")
    here = tuple_(jobs.c.id, jobs.c.attempt).in_([*named(told)])
    rows = select(jobs, unwanted).where(is_queued, here).with_for_update(of=jobs, skip_locked=True)
    return (await connection.execute(rows)).all() if told else []


def _next(row: Row[Any], pause: float) -> dict[str, Any]:
    due = func.clock_timestamp() + timedelta(seconds=pause)
    return {"state": JobState.QUEUED, "attempt": row.attempt + 1, "scheduled_at": due, "error": DIED, "traceback": None}


def _end(state: JobState, error: str) -> dict[str, Any]:
    return {"state": state, "finished_at": func.clock_timestamp(), "error": error, "traceback": None}


async def _end_transactions(connection: AsyncConnection, worker: UUID) -> None:
    """End the backends of a worker's open job transactions; they are told apart by the advisory lock they hold.

    A role may do that to itself (`pg_terminate_backend`, section 9.28.2 of PostgreSQL's manual). Without it the
    transactions end when they have been idle for too long.
    """
    here = select(_databases.c.oid).where(_databases.c.datname == func.current_database()).scalar_subquery()
    statement = select(func.pg_terminate_backend(_locks.c.pid, TERMINATE_MILLISECONDS)).where(
        _locks.c.locktype == "advisory",
        _locks.c.classid == CLASS,
        _locks.c.objid == lock_of(worker) % 2**32,
        _locks.c.objsubid == 2,
        _locks.c.database == here,
    )
    try:
        async with connection.begin_nested():
            ended = list(await connection.scalars(statement))
    except DBAPIError as error:
        logger.warning("The transactions of worker %s cannot be ended: %s", worker, error.orig)
    else:
        if ended:
            logger.warning("Ended %d transactions of worker %s", len(ended), worker)
