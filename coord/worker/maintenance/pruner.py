"""Pruning: ended jobs and expired keys leave the ledger, in batches small enough for nobody to notice."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Delete, Select, delete, func, select, tuple_

from coord.jobs.model import attempts, cancellations, is_queued, jobs, keys, schedules
from coord.worker.maintenance.loops import Loop

SOON_SECONDS = 5.0
"""Until the next pruning, when there was more than one may delete."""
FOLLOWER_SECONDS = 1.0
"""Between two looks whether this worker leads."""
BATCH = 1_000
VANISHED = timedelta(days=7)
"""Since a schedule was last seen: workers may have been away for as long, and catch up."""
BATCHES = 20
"""At once, of each table; what is left waits for the next time."""


class Pruner(Loop):
    """While this worker leads: deletes old jobs, expired keys, wishes to cancel what has ended, and old schedules."""

    interval = 60.0
    limit = 60.0

    async def round(self) -> float | None:
        if not self._state.is_leader:
            return FOLLOWER_SECONDS
        return SOON_SECONDS if await self.prune() >= BATCHES * BATCH else None

    async def prune(self) -> int:
        """How many rows it has deleted."""
        since = max(0.0, time.time() - self._state.config.keep)  # 1970 is before any id
        ended = _ended(datetime.fromtimestamp(since, UTC))
        return sum([await self._delete(batch) for batch in (ended, _expired(), _fulfilled(), _vanished())])

    async def _delete(self, batch: Delete) -> int:
        deleted = 0
        for _ in range(BATCHES):
            gone = (await self._state.execute(batch)).rowcount
            deleted += gone
            if gone < BATCH:
                break
        return deleted


def _ended(limit: datetime) -> Delete:
    """Ids are ordered by time, so the primary key finds the eldest. What is known of their attempts goes with them."""
    first_id = UUID(int=int(limit.timestamp() * 1000) << 80)
    old = select(jobs.c.id).where(jobs.c.id < first_id, ~is_queued, jobs.c.finished_at < limit)
    found = _some(old.order_by(jobs.c.id)).cte("old")  # or the plan may have the limit begin anew with each row
    history = delete(attempts).where(attempts.c.job_id.in_(select(found.c.id))).cte("history")
    return delete(jobs).where(jobs.c.id.in_(select(found.c.id))).add_cte(history)


def _expired() -> Delete:
    """A key that a request takes anew at this moment is skipped, as that has locked it."""
    old = select(keys.c.scope, keys.c.key).where(keys.c.expires_at < func.now())
    found = _some(old.order_by(keys.c.expires_at)).cte()
    return delete(keys).where(tuple_(keys.c.scope, keys.c.key).in_(select(found.c.scope, found.c.key)))


def _fulfilled() -> Delete:
    joined = cancellations.outerjoin(jobs, jobs.c.id == cancellations.c.job_id)
    over = select(cancellations.c.job_id).select_from(joined).where(jobs.c.id.is_(None) | ~is_queued).limit(BATCH)
    return delete(cancellations).where(cancellations.c.job_id.in_(over))


def _vanished() -> Delete:
    """Schedules that no worker has had in its settings for long."""
    return delete(schedules).where(schedules.c.seen_at < func.now() - VANISHED)


def _some(rows: Select[Any]) -> Select[Any]:
    return rows.limit(BATCH).with_for_update(skip_locked=True)
