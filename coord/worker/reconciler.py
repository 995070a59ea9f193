"""The reconciler: compares the ledger with Redis, and hands over again what Redis does not have or a dead worker had.

Run by one worker of a queue at a time, the eldest. What it does is right also if two do it: rows are changed only as
they were found, and Redis only where nobody has claimed the job meanwhile.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from arq.constants import job_key_prefix
from sqlalchemy import Uuid, bindparam, delete, select

from coord.jobs.feed import Message, id_of, milliseconds, queue_bell, score
from coord.jobs.model import cancellations, is_queued, job_mapper, jobs, workers
from coord.worker.pruning import Pruning
from coord.worker.rescue import end_transactions, next_attempts
from coord.worker.scripts import drop, give_back, look

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Row
    from sqlalchemy.ext.asyncio import AsyncEngine

    from coord.worker.census import Census
    from coord.worker.keeper import Identity

logger = logging.getLogger("arq.coord")

PAGE = 1_000
"""Jobs compared at once."""
PATIENCE = 2.5
"""Seconds that a job must be missing: it may be on its way, or have begun since the last heartbeat."""
SECOND_LOOK = 0.4
"""Seconds after which a claim by somebody who is not on the list is that of a dead worker: it may just be thawing."""
FIRST = UUID(int=0)

_page = (
    select(jobs.c.id, jobs.c.attempt)
    .where(is_queued, jobs.c.id > bindparam("after", type_=Uuid), jobs.c.queue == bindparam("name"))
    .order_by(jobs.c.id)
    .limit(PAGE)
)
_ended_unwanted = (
    select(cancellations.c.job_id, jobs.c.queue)
    .outerjoin_from(cancellations, jobs, jobs.c.id == cancellations.c.job_id)
    .where(jobs.c.id.is_(None) | (~is_queued & (jobs.c.queue == bindparam("name"))))
    .limit(PAGE)
)


class Missing(NamedTuple):
    """A job that nobody can be expected to run, and what Redis says of its claim."""

    id: UUID
    attempt: int
    claim: str


class Reconciler:
    """`engine` commits each statement."""

    def __init__(self, identity: Identity, engine: AsyncEngine, redis: Any) -> None:
        self._identity = identity
        self._engine = engine
        self._redis = redis
        self._pruning = Pruning(engine, keep=identity.keep)
        self._buried: set[str] = set()
        self._missing: dict[Missing, float] = {}
        """Since when, by this process's clock."""

    async def look_after(self, census: Census) -> bool:
        """One round over everything that is queued; True when it is done."""
        for id_, seen in census.dead.items():
            await self._bury(id_, seen.beats)
        found: dict[Missing, float] = {}
        after = FIRST
        while True:
            rows = await self._all(_page, {"after": after, "name": self._identity.queue})
            if rows:
                await self._compare(rows, census, found)
                after = rows[-1].id
            if len(rows) < PAGE:
                break
        self._missing = found
        await self._forget_unwanted()
        await self._pruning.when_due()
        return True

    async def _all(self, statement: Any, parameters: Any = None) -> Sequence[Row[Any]]:
        async with self._engine.connect() as connection:
            result = await connection.execute(statement, parameters)
            return result.all() if result.returns_rows else ()

    async def _bury(self, worker: UUID, beats: int) -> None:
        """Take a dead worker off the list, unless its heart has beaten after all, and free the locks it holds."""
        dead = delete(workers).where(workers.c.id == worker, workers.c.beats == beats).returning(workers.c.jobs)
        for row in await self._all(dead):
            logger.warning("Worker %s is dead, with %d jobs", worker, len(row.jobs))
            self._buried.add(str(worker))
            await end_transactions(self._engine, worker)

    async def _compare(self, rows: Sequence[Row[Any]], census: Census, found: dict[Missing, float]) -> None:
        answers = await look.run(self._redis, self._identity.key, *(str(row.id) for row in rows))
        living = await self._living({claim.decode() for _, claim in answers if claim})
        orphans, lost = [], []
        now, held = time.monotonic(), census.held
        for row, (is_there, claim) in zip(rows, answers, strict=True):
            job = Missing(row.id, row.attempt, claim.decode())
            is_orphan = job.claim != "" and job.claim not in living
            if not is_orphan and ((is_there and not job.claim) or (str(job.id), job.attempt) in held):
                continue
            since = found[job] = self._missing.get(job, now)
            if is_orphan and (job.claim in self._buried or now - since >= SECOND_LOOK):
                orphans.append(job)
            elif not is_orphan and now - since > PATIENCE and census.all_heard_since(since):
                lost.append(job)
        if orphans:
            await self._rescue(orphans)
        if lost:
            logger.warning("%d jobs were not to be found in Redis, and are handed over again", len(lost))
            await self._hand_over(lost)

    async def _living(self, claims: set[str]) -> set[str]:
        """Of those who claim jobs, the ones on the list; asked after their claims were seen, as they enrol before."""
        ids = [id_ for claim in claims if (id_ := id_of(claim)) is not None]
        if not ids:
            return set()
        return {str(row.id) for row in await self._all(select(workers.c.id).where(workers.c.id.in_(ids)))}

    async def _rescue(self, orphans: Sequence[Missing]) -> None:
        """A dead worker's attempts count: a job that kills its workers must come to an end.

        Not those of who has left in good order and could not tell Redis, or was never a worker; nor those that were
        counted by who died before he could hand the next one over.
        """
        dead = [job for job in orphans if job.claim in self._buried]
        messages = await self._redis.mget([f"{job_key_prefix}{job.id}" for job in dead]) if dead else []
        counted = [job for job, text in zip(dead, messages, strict=True) if _attempt(text, job.attempt) >= job.attempt]
        raised = await next_attempts(self._engine, counted, self._identity) if counted else []
        if raised:
            logger.warning("Jobs of dead workers: %s", dict(Counter(str(row.state) for row in raised)))
        claims = {job.id: job.claim for job in orphans}
        again = [Missing(row.id, row.attempt, claims[row.id]) for row in raised if not row.state.is_final]
        await self._hand_over([*again, *(job for job in orphans if job not in counted)])
        await self._ended({row.id: claims[row.id] for row in raised if row.state.is_final})

    async def _hand_over(self, missing: Sequence[Missing]) -> None:
        claims = {job.id: job.claim for job in missing}
        now = time.time_ns() // 1_000_000
        arguments: list[Any] = []
        for row in await self._all(select(jobs).where(jobs.c.id.in_(list(claims)), is_queued)):
            due = score(milliseconds(row.due_at), now)
            arguments += [str(row.id), claims[row.id], Message.of(row).text(), due]
        if arguments:
            await give_back.run(self._redis, self._identity.key, *arguments)
            await self._redis.publish(queue_bell(self._identity.key), b"")

    async def _ended(self, claims: dict[UUID, str]) -> None:
        await self._drop(claims)
        for id_ in claims:
            await self._redis.publish(self._identity.channels.row(job_mapper, (), (id_,)), b"")

    async def _drop(self, claims: dict[UUID, str]) -> None:
        if claims:
            arguments = [part for id_, claim in claims.items() for part in (str(id_), claim)]
            await drop.run(self._redis, self._identity.key, *arguments)

    async def _forget_unwanted(self) -> None:
        """Cancelled jobs that have ended leave Redis, so that no worker begins them, and the wish is forgotten."""
        rows = await self._all(_ended_unwanted, {"name": self._identity.queue})
        if not rows:
            return
        await self._drop({row.job_id: "" for row in rows if row.queue is not None})
        await self._all(delete(cancellations).where(cancellations.c.job_id.in_([row.job_id for row in rows])))


def _attempt(text: bytes | None, default: int) -> int:
    """Which attempt a message in Redis is for."""
    try:
        message = None if text is None else Message.read(text)
    except ValueError:
        message = None
    return default if message is None else message.attempt
