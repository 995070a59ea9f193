"""Pruning: ended jobs and expired keys leave the ledger, in batches small enough for nobody to notice."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import delete, func, select, tuple_

from coord.jobs.model import is_queued, jobs, keys

if TYPE_CHECKING:
    from sqlalchemy import Delete, Select
    from sqlalchemy.ext.asyncio import AsyncEngine

EVERY = 60.0
"""Seconds between two prunings."""
SOON = 5.0
"""The same, when there was more than one may delete."""
BATCH = 1_000
BATCHES = 20
"""At once, of each table; what is left waits for the next time."""


class Pruning:
    """Deletes jobs that ended `keep` seconds ago, and idempotency keys that have expired.

    `engine` commits each statement.
    """

    def __init__(self, engine: AsyncEngine, *, keep: float) -> None:
        self._engine = engine
        self._keep = timedelta(seconds=keep)
        self._next = 0.0

    async def when_due(self) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + EVERY
        if await self.prune() >= BATCHES * BATCH:
            self._next = time.monotonic() + SOON

    async def prune(self) -> int:
        """How many rows it has deleted."""
        return sum([await self._delete(batch) for batch in (_ended(datetime.now(UTC) - self._keep), _expired())])

    async def _delete(self, batch: Delete) -> int:
        deleted = 0
        for _ in range(BATCHES):
            async with self._engine.connect() as connection:
                gone = (await connection.execute(batch)).rowcount
            deleted += gone
            if gone < BATCH:
                break
        return deleted


def _ended(limit: datetime) -> Delete:
    """Ids are ordered by time, so the primary key finds the eldest."""
    old = select(jobs.c.id).where(jobs.c.id < _first_id_of(limit), ~is_queued, jobs.c.finished_at < limit)
    found = _some(old.order_by(jobs.c.id)).cte()  # or the plan may have the limit begin anew with each row
    return delete(jobs).where(jobs.c.id.in_(select(found.c.id)))


def _expired() -> Delete:
    """A key that a request takes anew at this moment is skipped, as that has locked it."""
    old = select(keys.c.scope, keys.c.key).where(keys.c.expires_at < func.now())
    found = _some(old.order_by(keys.c.expires_at)).cte()
    return delete(keys).where(tuple_(keys.c.scope, keys.c.key).in_(select(found.c.scope, found.c.key)))


def _some(rows: Select[Any]) -> Select[Any]:
    return rows.limit(BATCH).with_for_update(skip_locked=True)


def _first_id_of(moment: datetime) -> UUID:
    return UUID(int=int(moment.timestamp() * 1000) << 80)
