"""A wait's job: it ends the wait when it is over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from coord.database.target import Target
from coord.errors import JobCancelledError, JobFailedError, RowNotFoundError
from coord.jobs.model import Job, JobState, job_mapper
from coord.waiting.waiter import Waiter
from coord.waiting.watcher import Watcher


class JobWaiter(Waiter[Job]):
    """Waits for the job's row on behalf of another waiter, whose end it may be.

    Always by the shared read: rows of the ledger depend on no session's settings.
    """

    __slots__ = ("_owner",)
    counts = 0
    fresh = 0

    def __init__(self, owner: Waiter[Any], job_id: UUID, watcher: Watcher) -> None:
        poller = watcher.poller(JobWaiter, job_mapper, (), ())
        pending, interval = watcher.is_job_pending(job_id), owner.interval
        super().__init__(
            poller, job_target(job_id), {"state": JobState.QUEUED}, interval=interval, awaits_message=pending
        )
        self._owner = owner
        owner.job = self

    def differs_in(self, values: Mapping[str, Any]) -> bool | None:
        return values["state"] is not self.baseline["state"] or None

    def on_unchanged(self) -> None:
        self.has_read = True

    def receive(self, row: Job | None, values: Mapping[str, Any] | None, *, alone: bool) -> None:
        self.has_read = True
        if row is None or values is None:
            self._owner.on_job_unreadable(job_not_found(self.target))
            return
        self.baseline = {"state": values["state"]}
        end = end_of(row)
        if end is not None:
            self._owner.fail(end)
        elif row.state is JobState.DONE:
            self._owner.conclude()

    def on_message(self, *, of_row: bool) -> bool:
        """The job's commit is its effect's as well, and that mostly ends the wait: the owner's row is read first."""
        if of_row:
            self._owner.read_before(self)
        return not of_row

    def on_last_read(self) -> None:
        """If it was a read after the owner's last, and not one that came in between."""
        if not self._owner.concluding and self._owner.then is None:
            self._owner.give_up()

    def fail(self, error: BaseException) -> None:
        self._owner.fail(error)

    def on_read_error(self, error: Exception) -> None:
        self.has_read = True
        self._owner.on_job_unreadable(error)


def end_of(job: Job) -> JobFailedError | JobCancelledError | None:
    """What a wait raises for a failed or cancelled job."""
    match job.state:
        case JobState.FAILED:
            reason = " ".join((job.error or "no reason was recorded").split())
            return JobFailedError(job_id=job.id, reason=reason)
        case JobState.CANCELLED:
            return JobCancelledError(job_id=job.id)
    return None


def job_target(job_id: UUID) -> Target[Job]:
    return Target(job_mapper, (job_id,), ("state",))


def job_not_found(target: Target[Job]) -> RowNotFoundError:
    return RowNotFoundError(f"{target} not found")


def job_id_of(job: Job | UUID) -> UUID:
    if isinstance(job, Job):
        return job.id
    if isinstance(job, UUID):
        return job
    raise ValueError(f"job is what enqueue returned, or its id, a UUID; not {job!r}")
