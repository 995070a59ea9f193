"""What a dead worker leaves: transactions that hold locks, and jobs whose attempt will not end by itself."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Row, delete, func, select, text, tuple_, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.orm import Mapper

from coord.database.place import ledger_options
from coord.jobs.job_transaction import WORKER_LOCK_CLASS, is_unwanted, worker_lock_key
from coord.jobs.model import Job, JobState, attempts, is_queued, job_mapper, jobs, workers
from coord.observation import tell_rescued
from coord.worker.failure import backoff
from coord.worker.finalizer import HANDED_BACK, MAX_HAND_BACKS
from coord.worker.maintenance.loops import Loop
from coord.worker.maintenance.registry import WorkerRegistry, named
from coord.worker.maintenance.rows import remaining
from coord.worker.state import WorkerState

Publish = Callable[[Mapper[Job], Iterable[UUID]], None]

logger = logging.getLogger("arq.coord")

DIED = "the worker that ran it died"
DEATH_PAUSE_SECONDS = (1.0, 60.0)
"""Before the attempt after a second death, and before any later one at most; after the first there is none."""
TERMINATE_MILLISECONDS = 2_000
"""For a backend to end."""

_limits = select(
    # A leader that is stopped in the middle must not keep the rows, nor who has locked them keep the leader.
    func.set_config("idle_in_transaction_session_timeout", "5s", True),
    func.set_config("lock_timeout", "1s", True),
)
_end_backends = text("""
    SELECT pg_terminate_backend(pid, :milliseconds) FROM pg_locks
    WHERE locktype = 'advisory' AND (classid, objid, objsubid) = (:class, :worker, 2)
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
""")


class Rescuer(Loop):
    """Works only while this worker leads. `publish` notifies of jobs that have come to their end by it."""

    interval = 0.5
    limit = 30.0

    def __init__(self, state: WorkerState, registry: WorkerRegistry, publish: Publish) -> None:
        super().__init__(state)
        self._registry = registry
        self._publish = publish
        self._tried_at: dict[UUID, float] = {}
        """When each dead worker's rescue was begun at last, on the monotonic clock."""

    async def round(self) -> None:
        """One whose rescue fails, or takes all the time there is, keeps no other one from theirs."""
        dead, failures = dict(self._registry.dead), []
        self._tried_at = {worker: self._tried_at.get(worker, 0.0) for worker in dead}
        for worker in sorted(dead, key=self._tried_at.__getitem__):
            if self._state.is_leader:
                self._tried_at[worker] = time.monotonic()
                try:
                    await self._rescue(worker, dead[worker].beats)
                except Exception as error:  # noqa: BLE001 - the loop is told of it below
                    failures.append(error)
        for failure in failures[1:]:
            self.failed(failure)
        if failures:
            raise failures[0]

    async def _rescue(self, worker: UUID, beats: int) -> None:
        """Take a dead worker off the list, unless its heart has beaten after all, and give its jobs to others."""
        gone = delete(workers).where(workers.c.id == worker, workers.c.beats == beats).returning(workers)
        async with self._state.engine.begin() as connection:
            await connection.execution_options(**await connection.run_sync(ledger_options))
            await connection.execute(_limits)
            dead = (await connection.execute(gone)).one_or_none()
            if dead is None:
                return
            await end_transactions(connection, worker=worker)
            # What it had handed back may run elsewhere by now, as the same attempt.
            aboard = await _aboard(connection, named(dead.jobs) - self._registry.held_beside(worker))
            after = await self._judge(connection, aboard, stopping=dead.stopping)
            if after:
                await connection.execute(_record(dead, aboard, after))
        logger.warning(
            "Worker %s is dead; its jobs: %s", worker, dict(Counter(str(row.state) for row in after)) or "none"
        )
        tell_rescued(after)
        await self._state.hand_over([row for row in after if row.state is JobState.QUEUED])
        self._publish(job_mapper, [row.id for row in after if row.state is not JobState.QUEUED])

    async def _judge(
        self, connection: AsyncConnection, aboard: Sequence[Row[Any]], *, stopping: bool
    ) -> Sequence[Row[Any]]:
        """The rows afterwards. A suspect aboard is to blame alone, otherwise all are; of a stop nobody is."""
        suspects = {row.id for row in aboard if row.deaths}
        after = []
        for row in aboard:
            to_blame = not stopping and (row.id in suspects or not suspects)
            if row.is_unwanted:
                change = _end(JobState.CANCELLED, DIED)
            elif to_blame:
                change = self._counted(row)
            elif stopping and row.hand_backs >= MAX_HAND_BACKS:
                change = _end(JobState.FAILED, HANDED_BACK)
            else:
                uncounted = {"uncounted": row.uncounted + 1, "hand_backs": row.hand_backs + stopping}
                change = _next(row, 0.0) | uncounted
            changed = update(jobs).where(jobs.c.id == row.id).values(change).returning(jobs, remaining)
            after.append((await connection.execute(changed)).one())
        return after

    def _counted(self, row: Row[Any]) -> dict[str, Any]:
        """A job that kills its workers must come to an end, and leave the others room until then."""
        deaths = row.deaths + 1
        used, limit = row.attempt - row.uncounted, row.max_attempts or self._state.config.attempts_of(row.task)
        if used >= limit:
            return _end(JobState.FAILED, f"{DIED} (attempt {used} of {limit})") | {"deaths": deaths}
        pause = backoff(deaths - 1, DEATH_PAUSE_SECONDS) if deaths > 1 else 0.0
        return _next(row, pause) | {"deaths": deaths}


async def _aboard(connection: AsyncConnection, told: set[tuple[UUID, int]]) -> Sequence[Row[Any]]:
    """Of these attempts the jobs that are still unfinished in them, locked."""
    here = tuple_(jobs.c.id, jobs.c.attempt).in_(told)
    rows = select(jobs, is_unwanted.label("is_unwanted")).where(is_queued, here)
    locked = rows.with_for_update(of=jobs, skip_locked=True)
    return (await connection.execute(locked)).all() if told else []


def _next(row: Row[Any], pause: float) -> dict[str, Any]:
    due = func.clock_timestamp() + timedelta(seconds=pause)
    return {"state": JobState.QUEUED, "attempt": row.attempt + 1, "scheduled_at": due, "error": DIED, "traceback": None}


def _end(state: JobState, error: str) -> dict[str, Any]:
    return {"state": state, "finished_at": func.clock_timestamp(), "error": error, "traceback": None}


def _record(dead: Row[Any], aboard: Sequence[Row[Any]], after: Sequence[Row[Any]]) -> Any:
    """The attempts that have died with their worker."""
    who = {"worker": dead.id, "host": dead.host, "pid": dead.pid, "outcome": "died"}
    rows = []
    for row, changed in zip(aboard, after, strict=True):
        began = dead.jobs[str(row.id)].get("began")
        at = None if began is None else datetime.fromtimestamp(began, UTC)
        rows.append({**who, "job_id": row.id, "number": row.attempt, "began": at, "error": changed.error})
    return insert(attempts).values(rows).on_conflict_do_nothing()


async def end_transactions(connection: AsyncConnection, *, worker: UUID) -> None:
    """End the backends of a worker's open job transactions; they are told apart by the advisory lock they hold.

    A role may do that to itself (`pg_terminate_backend`, section 9.28.2 of PostgreSQL's manual). Without it the
    transactions end when they have been idle for too long.
    """
    which = {
        "class": WORKER_LOCK_CLASS,
        "worker": worker_lock_key(worker) % 2**32,
    }
    try:
        async with connection.begin_nested():
            parameters = which | {"milliseconds": TERMINATE_MILLISECONDS}
            ended = (await connection.scalars(_end_backends, parameters)).all()
    except DBAPIError as error:
        logger.warning("The transactions of worker %s cannot be ended: %s", worker, error.orig)
    else:
        if ended:
            logger.warning("Ended %d transactions of worker %s", len(ended), worker)
