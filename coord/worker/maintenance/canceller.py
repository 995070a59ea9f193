"""Which of the jobs that run here were cancelled, or given to another worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import select

from coord.jobs.model import JobState, cancellations, jobs
from coord.worker.maintenance.loops import Loop

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from coord.worker.running import RunningJobs


class Canceller(Loop):
    """Reads the cancellations once a second, and when one is notified. `engine` commits each statement."""

    def __init__(self, engine: AsyncEngine, running: RunningJobs) -> None:
        super().__init__()
        self._engine = engine
        self._running = running

    def on_message(self) -> None:
        """A job was cancelled: perhaps one that runs here."""
        self.wake()

    subscribed = on_message

    async def round(self) -> None:
        running = {job.message.id: job.message.attempt for job in self._running}
        if not running:
            return
        found = select(jobs.c.id, jobs.c.attempt, jobs.c.state).where(jobs.c.id.in_(running))
        wished = select(cancellations.c.job_id).where(cancellations.c.job_id.in_(running))
        async with self._engine.connect() as connection:
            rows = (await connection.execute(found)).all()
            unwanted = {*await connection.scalars(wished)}
        unwanted |= {row.id for row in rows if row.state is JobState.CANCELLED or row.attempt > running[row.id]}
        for job_id in unwanted:
            self._running.cancel(job_id, running[job_id])
