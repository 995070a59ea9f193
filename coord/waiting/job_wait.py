"""A wait's job: it ends the wait when it is over."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import UUID

from coord.database.target import Target
from coord.errors import JobCancelledError, JobFailedError, RowNotFoundError
from coord.jobs.model import Job, JobState, job_mapper
from coord.waiting.handed import HandedWaiter

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

    from coord.database.schemas import Schemas
    from coord.waiting.waiter import Waiter
    from coord.waiting.watcher import Watcher

_NO_JOB = nullcontext()


class JobWaiter(HandedWaiter[Job]):
    """Waits for the job's row on behalf of another waiter, whose end it may be."""

    __slots__ = ("_owner",)
    counts = 0
    reads_at_first = False

    def __init__(self, owner: Waiter[Any], *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._owner = owner
        owner.job = self

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

    def on_subscribed(self) -> None:
        """If it awaits a message, it knows that the job is unchanged."""
        self.has_read = self.has_read or self.awaits_message
        self.awaits_message = False

    def defers_to_owner(self) -> bool:
        """The job's commit is its effect's as well, and that mostly ends the wait."""
        self._owner.read_before(self)
        return True

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


def job_waiter(
    watcher: Watcher, owner: Waiter[Any], job_id: UUID | None, schemas: Schemas, *, reads: bool
) -> AbstractContextManager[object]:
    """To be left when the wait ends. Nothing, for a wait without a job, and unless the shared read `reads` it.

    Rows of the ledger depend on no session's settings.
    """
    if job_id is None or not reads:
        return _NO_JOB
    return watcher.register(
        job_target(job_id),
        schemas,
        {"state": JobState.QUEUED},
        settings=(),
        interval=owner.interval,
        awaits_message=watcher.is_job_pending(job_id),
        make=partial(JobWaiter, owner),
        counts=False,
    )


def job_id_of(job: Job | UUID) -> UUID:
    if isinstance(job, Job):
        return job.id
    if isinstance(job, UUID):
        return job
    raise ValueError(f"job is what enqueue returned, or its id, a UUID; not {job!r}")
