"""The reconciler: compares the ledger with Redis, and hands over again what Redis does not have or a dead worker had.

Run by one worker of a queue at a time, the eldest. What it does is right also if two do it: rows are changed only as
they were found, and Redis only where nobody has claimed the job meanwhile.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import Uuid, bindparam, delete, inspect, select

from coord.jobs.feed import Message, id_of, milliseconds, queue_bell, score
from coord.jobs.ledger import Job, is_queued, jobs, workers
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
FIRST = UUID(int=0)

_page = (
    select(jobs)
    .where(is_queued, jobs.c.id > bindparam("after", type_=Uuid), jobs.c.queue == bindparam("name"))
    .order_by(jobs.c.id)
    .limit(PAGE)
)


@dataclass(frozen=True, slots=True)
class Missing:
    """A job that nobody can be expected to run, and what Redis says of its claim."""

    row: Row[Any]
    claim: str


class Reconciler:
    def __init__(self, identity: Identity, engine: AsyncEngine, redis: Any) -> None:
        self._identity = identity
        self._engine = engine
        self._redis = redis
        self._pruning = Pruning(engine, keep=identity.keep)
        self._missing: dict[UUID, float] = {}
        """Since when, by this process's clock."""

    async def look_after(self, census: Census) -> None:
        """One round over everything that is queued."""
        for id_, seen in census.dead.items():
            await self._bury(id_, seen.beats)
        found: dict[UUID, float] = {}
        after = FIRST
        while True:
            async with self._engine.connect() as connection:
                rows = (await connection.execute(_page, {"after": after, "name": self._identity.queue})).all()
            if rows:
                await self._compare(rows, census, found)
                after = rows[-1].id
            if len(rows) < PAGE:
                break
        self._missing = found
        await self._pruning.when_due()

    async def _bury(self, worker: UUID, beats: int) -> None:
        """Take a dead worker off the list, unless its heart has beaten after all, and free the locks it holds."""
        async with self._engine.begin() as connection:
            dead = await connection.execute(
                delete(workers).where(workers.c.id == worker, workers.c.beats == beats).returning(workers.c.jobs)
            )
            if (row := dead.one_or_none()) is None:
                return
        logger.warning("Worker %s is dead, with %d jobs", worker, len(row.jobs))
        await end_transactions(self._engine, worker)

    async def _compare(self, rows: Sequence[Row[Any]], census: Census, found: dict[UUID, float]) -> None:
        answers = await look.run(self._redis, self._identity.key, *(str(row.id) for row in rows))
        claims = {row.id: claim.decode() for row, (_, claim) in zip(rows, answers, strict=True)}
        there = {row.id for row, (in_queue, _) in zip(rows, answers, strict=True) if in_queue}
        living = await self._living({claim for claim in claims.values() if claim})
        orphans, lost = [], []
        now, held = time.monotonic(), census.held
        for row in rows:
            claim = claims[row.id]
            if claim and claim not in living:
                orphans.append(Missing(row, claim))
            elif (row.id not in there or claim) and (str(row.id), row.attempt) not in held:
                since = found[row.id] = self._missing.get(row.id, now)
                if now - since > PATIENCE and census.all_heard_since(since):
                    lost.append(Missing(row, claim))
        if orphans:
            await self._rescue(orphans)
        if lost:
            logger.warning("%d jobs were not to be found in Redis, and are handed over again", len(lost))
            await self._hand_over([(missing.claim, missing.row) for missing in lost])

    async def _living(self, claims: set[str]) -> set[str]:
        """Of those who claim jobs, the ones on the list; asked after their claims were seen, as they enrol before."""
        ids = [id_ for claim in claims if (id_ := id_of(claim)) is not None]
        if not ids:
            return set()
        async with self._engine.connect() as connection:
            return {str(id_) for id_ in await connection.scalars(select(workers.c.id).where(workers.c.id.in_(ids)))}

    async def _rescue(self, orphans: Sequence[Missing]) -> None:
        """A dead worker's attempts count: a job that kills its workers must come to an end."""
        claims = {missing.row.id: missing.claim for missing in orphans}
        raised = await next_attempts(self._engine, [missing.row for missing in orphans], self._identity.attempts)
        if not raised:
            return
        logger.warning("Jobs of dead workers: %s", dict(Counter(str(row.state) for row in raised)))
        await self._hand_over([(claims[row.id], row) for row in raised if not row.state.is_final])
        await self._ended([row.id for row in raised if row.state.is_final])

    async def _hand_over(self, found: Sequence[tuple[str, Row[Any]]]) -> None:
        now = time.time_ns() // 1_000_000
        arguments: list[Any] = []
        for claim, row in found:
            arguments += [str(row.id), claim, Message.of(row).text(), score(milliseconds(row.due_at), now)]
        await give_back.run(self._redis, self._identity.key, *arguments)
        await self._redis.publish(queue_bell(self._identity.key), b"")

    async def _ended(self, ids: Sequence[UUID]) -> None:
        if ids:
            await drop.run(self._redis, self._identity.key, *map(str, ids))
        for id_ in ids:
            await self._redis.publish(self._identity.channels.row(inspect(Job), (), (id_,)), b"")
