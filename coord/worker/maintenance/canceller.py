"""Which of the jobs that run here somebody has cancelled."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import select

from coord.jobs.ledger import JobState, cancellations, jobs
from coord.worker.maintenance.loops import Loop

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from coord.worker.running import RunningJobs


class Canceller(Loop):
    """Looks once a second, and when it is told that something was cancelled. `engine` commits each statement."""

    def __init__(self, engine: AsyncEngine, running: RunningJobs) -> None:
        super().__init__()
        self._engine = engine
        self._running = running

    def rung(self) -> None:
        """Somebody has cancelled a job: perhaps one that runs here."""
        self.wake()

    listening = rung

    async def round(self) -> None:
        ids = [running.message.id for running in self._running]
        if not ids:
            return
        ended = select(jobs.c.id).where(jobs.c.id.in_(ids), jobs.c.state == JobState.CANCELLED)
        wished = select(cancellations.c.job_id).where(cancellations.c.job_id.in_(ids))
        async with self._engine.connect() as connection:
            unwanted = list(await connection.scalars(ended.union_all(wished)))
        for job_id in unwanted:
            self._running.cancel(job_id)
