"""Pruning: jobs that have ended long ago leave the ledger, in batches small enough for nobody to notice."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from uuid import UUID

from sqlalchemy import delete, select

from coord.jobs.ledger import is_queued, jobs

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

EVERY = 60.0
"""Seconds between two prunings."""
BATCH = 1_000
BATCHES = 20
"""At once; what is left waits for the next time."""


class Pruning:
    """Deletes jobs that ended `keep` seconds ago. Ids are ordered by time, so the primary key finds the eldest.

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
        await self.prune()

    async def prune(self) -> int:
        """How many jobs it has deleted."""
        limit = datetime.now(UTC) - self._keep
        old = (
            select(jobs.c.id)
            .where(jobs.c.id < _first_id_of(limit), ~is_queued, jobs.c.finished_at < limit)
            .order_by(jobs.c.id)
            .limit(BATCH)
            .with_for_update(skip_locked=True)
            .cte()  # or the plan may have the limit begin anew with each row
        )
        deleted = 0
        for _ in range(BATCHES):
            async with self._engine.connect() as connection:
                gone = (await connection.execute(delete(jobs).where(jobs.c.id.in_(select(old.c.id))))).rowcount
            deleted += gone
            if gone < BATCH:
                break
        return deleted


def _first_id_of(moment: datetime) -> UUID:
    return UUID(int=int(moment.timestamp() * 1000) << 80)
