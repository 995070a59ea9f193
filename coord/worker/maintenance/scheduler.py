"""Jobs that come near: from the ledger to Redis a minute before their time, and there into the feed when it is come."""

from __future__ import annotations

import asyncio
import time
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Row, func, literal, select

from coord.jobs.model import jobs
from coord.queue.scripts import MOVE, NEAR_SECONDS
from coord.worker.maintenance.loops import Loop
from coord.worker.maintenance.rows import QueuedJobs
from coord.worker.state import WorkerState

POLL_SECONDS = 0.25
"""Between two looks whether something has come due; less if it is known to come before."""
EXPECTED_SECONDS = 0.02
"""For what is expected to be there."""
READ_SECONDS = 10.0
"""Between two looks into the ledger."""
OVERLAP_SECONDS = 5.0
"""Of what is read from the ledger: a transaction may commit later than it has said now()."""
NEAREST_SECONDS = 1.0
"""Before its time, from which on a job is left to who has enqueued it, or to the reconciler: it may have run before
what was read of it is handed over."""
MOVED = 500


class Scheduler(Loop):
    """Every worker moves what is due; the leader reads the ledger."""

    def __init__(self, state: WorkerState) -> None:
        super().__init__(state)
        self._queued = QueuedJobs(state)
        self._keys = state.keys
        self._redis: Any = state.redis
        self._read_at = 0.0
        self._after: Row[Any] | None = None
        """How far the look that is under way has come."""
        self._reads_until: datetime | None = None
        """And up to which time it goes."""
        self._until: datetime | None = None
        """Up to which time, by PostgreSQL's clock, the ledger was read."""

    def start_over(self) -> None:
        """Redis has forgotten what it was given."""
        self._until = self._after = None
        self._read_at = 0.0
        self.wake()

    def expect(self, seconds: float) -> None:
        """Something is being handed over that is due then."""
        if seconds < NEAR_SECONDS:
            asyncio.get_running_loop().call_later(seconds + EXPECTED_SECONDS, self.wake)

    async def round(self) -> float:
        wait = await self._redis.execute_command("EVAL", MOVE, 2, self._keys.feed, self._keys.soon, MOVED)
        if not self._state.is_leader:
            self._until = self._after = None
        elif time.monotonic() >= self._read_at:
            await self._read()
        return min(POLL_SECONDS, wait / 1000 if wait >= 0 else POLL_SECONDS)

    async def _read(self) -> None:
        """What is due until a minute from now and was not due a minute after the last look; a page at a time.

        A wave of jobs takes many pages, between which what has come due is moved.
        """
        near = func.now() + literal(timedelta(seconds=NEAR_SECONDS))
        nearest = func.now() + literal(timedelta(seconds=NEAREST_SECONDS))
        since: Any = nearest if self._until is None else self._until - timedelta(seconds=OVERLAP_SECONDS)
        if self._after is None:
            ((self._reads_until,),) = await self._state.read(select(near))
        in_time = jobs.c.scheduled_at > since, jobs.c.scheduled_at <= self._reads_until
        page = await self._queued.ids(*in_time, after=self._after)
        async for rows in self._queued.rows(page):
            await self._state.hand_over(rows, least=0.001)
        self._after = page[-1] if page else None
        if self._after is None:
            self._until, self._read_at = self._reads_until, time.monotonic() + READ_SECONDS
        else:
            self.wake()
