"""Which of the jobs that run here were cancelled, or given to another worker."""

from __future__ import annotations

from sqlalchemy import select

from coord.jobs.job_transaction import is_unwanted
from coord.jobs.model import JobState, jobs
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
        found = select(jobs.c.id, jobs.c.attempt, jobs.c.state, is_unwanted.label("is_unwanted"))
        for row in await self._state.read(found.where(jobs.c.id.in_(running))):
            if row.is_unwanted or row.state is JobState.CANCELLED or row.attempt > running[row.id]:
                self._state.running.cancel(row.id, running[row.id])
