"""A wait's job: it ends the wait when it is over."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import UUID

from coord.errors import JobCancelledError, JobFailedError, RowNotFoundError
from coord.jobs.ledger import Job, JobState, job_mapper
from coord.target import Target
from coord.waiting.waiter import Waiter

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

    from coord.postgresql.schemas import Schemas
    from coord.waiting.watcher import Watcher

_NO_JOB = nullcontext()


class JobWaiter(Waiter[Job]):
    """Waits for the job's row on behalf of another waiter, whose end it may be."""

    __slots__ = ("_owner",)
    counts = 0
    curious = False

    def __init__(self, owner: Waiter[Any], *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._owner = owner
        owner.job = self

    def tell(self, row: Job | None, values: Mapping[str, Any] | None, *, alone: bool) -> None:
        self.looked = True
        if row is None or values is None:
            self._owner.fail(RowNotFoundError(f"{self.target} not found"))
            return
        self.baseline = {"state": values["state"]}
        match row.state:
            case JobState.DONE:
                self._owner.conclude()
            case JobState.FAILED:
                reason = " ".join((row.error or "no reason was recorded").split())
                self._owner.fail(JobFailedError(job_id=row.id, reason=reason))
            case JobState.CANCELLED:
                self._owner.fail(JobCancelledError(job_id=row.id))

    def heard(self) -> None:
        """A patient one knows that the job is as it was."""
        self.looked = self.looked or self.patient
        self.patient = False

    def passes_on(self) -> bool:
        """The job's commit is its effect's as well, which is all that a wait mostly wants to know."""
        self._owner.look_first(self)
        return True

    def has_looked_last(self) -> None:
        """If it was a look after the owner's last, and not one that came in between."""
        if not self._owner.concluding and self._owner.then is None:
            self._owner.give_up()

    def fail(self, error: BaseException) -> None:
        self._owner.fail(error)


def job_waiter(
    watcher: Watcher, owner: Waiter[Any], job_id: UUID | None, schemas: Schemas
) -> AbstractContextManager[object]:
    """To be left when the wait ends; for a wait without a job there is nothing to leave."""
    if job_id is None:
        return _NO_JOB
    target = Target(job_mapper, (job_id,), ("state",))
    baseline = {"state": JobState.QUEUED}
    return watcher.register(
        target,
        schemas,
        baseline,
        interval=owner.interval,
        patient=watcher.holds(job_id),
        make=partial(JobWaiter, owner),
    )


def job_id_of(job: Job | UUID) -> UUID:
    if isinstance(job, Job):
        return job.id
    if isinstance(job, UUID):
        return job
    raise ValueError(f"job is what enqueue returned, or its id, a UUID; not {job!r}")
