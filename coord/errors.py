"""What coord raises.

    CoordError
    ├── LockTimeoutError         retryable   a lock was not granted in time
    ├── DeadlockError            retryable   PostgreSQL chose this transaction as a deadlock's victim
    ├── RowNotFoundError         also LookupError
    ├── WaitTimeoutError         also TimeoutError
    ├── UncommittedChangesError  a wait that could never end was refused
    ├── TooManyWaitersError      this process waits for as many rows as it may
    ├── UniqueKeyConflictError   an unfinished job has the unique key, with other arguments
    ├── JobFailedError           the job a wait depends on has failed
    └── JobCancelledError        the job a wait depends on was cancelled

Misuse, which no retry can help (an unknown mode or column, a negative timeout), is a `ValueError` or a `TypeError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from uuid import UUID


class CoordError(Exception):
    """Something that sessions, locks, jobs and waits could not agree on."""

    retryable: ClassVar[bool] = False
    """Whether the same transaction, run again from its first statement, may well succeed."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or " ".join((type(self).__doc__ or "").split()))


@dataclass(frozen=True, slots=True)
class LockHolder:
    """A backend seen holding a conflicting lock just after a lock timed out; it may be gone by now."""

    table: str | None
    """The table as PostgreSQL spells it; None for an advisory lock."""
    mode: str
    pid: int
    application_name: str
    state: str | None
    transaction_age: float
    """Seconds since the backend's transaction began."""

    def __str__(self) -> str:
        who = f"pid {self.pid}" + (f" ({self.application_name})" if self.application_name else "")
        return f"{who} holds {self.mode}, {self.state}, transaction {self.transaction_age:.1f} s old"


class LockTimeoutError(CoordError):
    """The lock was not granted in time."""

    retryable = True

    def __init__(
        self, message: str | None = None, *, tables: Sequence[str] = (), holders: Sequence[LockHolder] = ()
    ) -> None:
        super().__init__(message)
        self.tables = tuple(tables)
        self.holders = tuple(holders)


class DeadlockError(CoordError):
    """PostgreSQL broke a deadlock by ending this attempt to lock."""

    retryable = True


class RowNotFoundError(CoordError, LookupError):
    """The row to wait for does not exist."""


class WaitTimeoutError(CoordError, TimeoutError):
    """No change was detected before the deadline."""

    def __init__(self, message: str | None = None, *, model: type[Any], pk_value: Any, waited: float) -> None:
        super().__init__(message)
        self.model = model
        self.pk_value = pk_value
        self.waited = waited
        """Seconds from the call to this error."""


class UncommittedChangesError(CoordError):
    """The caller's transaction has written or holds locks, so nobody else could make or see the awaited change.

    Commit first: `await session.commit()`, then `await wait_for_row_change(...)`.
    """


class TooManyWaitersError(CoordError):
    """This process already waits for as many rows as its Coordinator's max_waiters allows; try again shortly."""


class UniqueKeyConflictError(CoordError):
    """An unfinished job of this task has the same unique key and other arguments."""


class JobFailedError(CoordError):
    """The job failed, so the awaited change will not come."""

    def __init__(self, message: str | None = None, *, job_id: UUID, reason: str) -> None:
        super().__init__(message or f"Job {job_id} failed: {reason}")
        self.job_id = job_id
        self.reason = reason
        """One line."""


class JobCancelledError(CoordError):
    """The job was cancelled, so the awaited change will not come."""

    def __init__(self, message: str | None = None, *, job_id: UUID) -> None:
        super().__init__(message or f"Job {job_id} was cancelled")
        self.job_id = job_id


def message_of(error: BaseException) -> str:
    """What an error says, or its class if it says nothing, as a `TimeoutError` does."""
    return str(error) or type(error).__name__
