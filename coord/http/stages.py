"""The stages of a job as a stream tells them: the ledger's, and between them whether a worker says that it runs."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from coord.jobs import queries
from coord.jobs.model import JobState

if TYPE_CHECKING:
    from uuid import UUID

    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

    from coord.jobs.model import Job

logger = logging.getLogger("coord.http")

BEAT = 2.0
"""Seconds between two looks at the workers' heartbeats, which are as far apart."""
FRESH = 1.0
"""Seconds for which one look will do for all who ask."""


@dataclass(frozen=True, slots=True)
class JobStage:
    """A job as its streams tell it."""

    id: UUID
    task: str
    state: JobState
    attempt: int
    error: str | None

    @property
    def event_id(self) -> str:
        return f"{self.attempt}-{self.state}"


class Stages:
    """What the workers' heartbeats say, read once for all streams of a process."""

    def __init__(self, session_maker: async_sessionmaker[AsyncSession]) -> None:
        self._session_maker = session_maker
        self._running: set[tuple[UUID, int]] = set()
        self._stale = 0.0
        self._lock = asyncio.Lock()

    async def of(self, job: Job) -> JobStage:
        """As it is at the call: the instance may be brought up to date meanwhile.

        Reads the heartbeats only for an unfinished job, in a transaction of its own.
        """
        stage = JobStage(job.id, job.task, job.state, job.attempt, job.error)
        if stage.state.is_final:
            return stage
        async with self._lock:
            await self._look()
        return replace(stage, state=JobState.RUNNING) if (stage.id, stage.attempt) in self._running else stage

    async def _look(self) -> None:
        if (now := asyncio.get_running_loop().time()) < self._stale:
            return
        self._stale = now + FRESH
        try:
            async with self._session_maker() as session:
                self._running = {(beat.id, beat.attempt) for beat in await queries.heartbeats(session)}
        except Exception as error:  # noqa: BLE001 - what was known stays known until it can be read again
            logger.debug("The workers' heartbeats cannot be read: %s", error)
