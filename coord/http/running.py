"""Which jobs run: the heartbeats of the workers say so, read once for all event streams of a process."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from coord.http.jobs import JobStatus
from coord.jobs import operations
from coord.jobs.ledger import JobState

if TYPE_CHECKING:
    from uuid import UUID

    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

    from coord.jobs.ledger import Job

logger = logging.getLogger("coord.http")

HEARTBEAT_INTERVAL_SECONDS = 2.0
"""Between two heartbeats of a worker, and between two reads of them for a stream."""
MAX_AGE_SECONDS = 1.0
"""For which one read will do for all streams."""


class RunningJobs:
    """What the workers' last heartbeats said."""

    def __init__(self, session_maker: async_sessionmaker[AsyncSession]) -> None:
        self._session_maker = session_maker
        self._running: set[tuple[UUID, int]] = set()
        self._expires = 0.0
        self._lock = asyncio.Lock()

    async def status_of(self, job: Job) -> JobStatus:
        """As it is at the call: the instance may be brought up to date meanwhile.

        Reads the heartbeats only for an unfinished job, in a transaction of its own.
        """
        status = JobStatus.model_validate(job)
        if not status.state.is_final:
            async with self._lock:
                await self._read()
            if (status.id, status.attempt) in self._running:
                status.state = JobState.RUNNING
        return status

    async def _read(self) -> None:
        if (now := asyncio.get_running_loop().time()) < self._expires:
            return
        self._expires = now + MAX_AGE_SECONDS
        try:
            async with self._session_maker() as session:
                self._running = {(beat.id, beat.attempt) for beat in await operations.heartbeats(session)}
        except Exception as error:  # noqa: BLE001 - what was known stays known until it can be read again
            logger.debug("The workers' heartbeats cannot be read: %s", error)
