"""coord: answer a request only after a background job's effect has landed."""

from __future__ import annotations

from coord.coordinator import Coordinator
from coord.errors import (
    CoordError,
    DeadlockError,
    JobCancelledError,
    JobFailedError,
    LockHolder,
    LockTimeoutError,
    RowNotFoundError,
    TooManyWaitersError,
    UncommittedChangesError,
    UniqueKeyConflictError,
    WaitTimeoutError,
)
from coord.locks import LockMode, advisory_lock, lock_tables
from coord.session import create_db_context, create_db_dependency, get_transaction
from coord.waiting import wait_for_row_change, watch_row

__all__ = [
    "CoordError",
    "Coordinator",
    "DeadlockError",
    "JobCancelledError",
    "JobFailedError",
    "LockHolder",
    "LockMode",
    "LockTimeoutError",
    "RowNotFoundError",
    "TooManyWaitersError",
    "UncommittedChangesError",
    "UniqueKeyConflictError",
    "WaitTimeoutError",
    "advisory_lock",
    "create_db_context",
    "create_db_dependency",
    "get_transaction",
    "lock_tables",
    "wait_for_row_change",
    "watch_row",
]
