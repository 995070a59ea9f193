"""Which of the jobs that run here were cancelled, or given to another worker."""

from __future__ import annotations

from sqlalchemy import select

from coord.jobs.model import JobState, cancellations, jobs
from coord.worker.maintenance.loops import Loop


class Canceller(Loop):
    """Reads the cancellations once a second, and when one is notified."""

    def on_message(self) -> None:
        """A job was cancelled: perhaps one that runs here."""
        self.wake()

    subscribed = on_message

    async def round(self) -> None:
        running = {job.message.id: job.message.attempt for job in self._state.running}
        if not running:
            return
        found = select(jobs.c.id, jobs.c.attempt, jobs.c.state).where(jobs.c.id.in_(running))
        wished = select(cancellations.c.job_id).where(cancellations.c.job_id.in_(running))
        unwanted = {job_id for (job_id,) in await self._state.read(wished)}
        for row in await self._state.read(found):
            if row.state is JobState.CANCELLED or row.attempt > running[row.id]:
                unwanted.add(row.id)
        for job_id in unwanted:
            self._state.running.cancel(job_id, running[job_id])
