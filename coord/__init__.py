"""Answer an HTTP request only after a background job's effect has landed.

Sessions commit before the first byte of the response, or the response is an error:

    get_db = create_db_dependency(session_maker=session_maker)

A handler enqueues a job in its own transaction, commits, and waits for its row without holding a connection:

    @app.post("/orders/{order_id}/fulfil")
    async def fulfil(order_id: int, session: AsyncSession = Depends(get_db)) -> str:
        order = await session.get_one(Order, order_id)
        job = await enqueue(session, fulfil_order, order_id)
        await session.commit()
        await wait_for_row_change(
            session=session, model=Order, pk_value=order_id, columns=[Order.status], timeout=25.0, job=job
        )
        return order.status

The job's effect and the note that it is done are one commit; its table locks come first, all in one call:

    async def fulfil_order(ctx: dict[str, Any], order_id: int) -> None:
        async with job_transaction(ctx) as session, lock_tables(session, [Stock, Order]):
            order = await session.get_one(Order, order_id)
            order.status = "fulfilled"

`arq worker.Settings` runs it:

    Settings = worker_settings([fulfil_order], session_maker=session_maker, redis="redis://localhost")

In each process a `Coordinator` publishes which rows its sessions commit and wakes its waits; without one they poll.
What is raised is in `coord.errors`; the pages in `docs/` say what can be relied on.
"""

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
from coord.jobs.batches import cancel_jobs, retry_jobs
from coord.jobs.bulk import Call, call, enqueue_many
from coord.jobs.enqueue import enqueue
from coord.jobs.job_transaction import JobSuperseded, job_transaction, set_progress, set_result
from coord.jobs.migrations import create_ledger
from coord.jobs.model import Job, JobState
from coord.jobs.options import TaskOptions, task_options
from coord.jobs.pauses import pause_queue, resume_queue
from coord.jobs.periodic import Periodic, periodic
from coord.jobs.queries import AttemptReport, JobReport, cancel_job, get_job, list_attempts, list_jobs, retry_job
from coord.locks import LockMode, advisory_lock, lock_tables
from coord.notify.sentinel import redis_from_url
from coord.session import create_db_context, create_db_dependency, get_transaction
from coord.timings import WaitTimings, wait_timings
from coord.waiting.wait import wait_for_row_change, watch_row
from coord.worker.settings import worker_settings

__all__ = [
    "AttemptReport",
    "Call",
    "CoordError",
    "Coordinator",
    "DeadlockError",
    "Job",
    "JobCancelledError",
    "JobFailedError",
    "JobReport",
    "JobState",
    "JobSuperseded",
    "LockHolder",
    "LockMode",
    "LockTimeoutError",
    "Periodic",
    "RowNotFoundError",
    "TaskOptions",
    "TooManyWaitersError",
    "UncommittedChangesError",
    "UniqueKeyConflictError",
    "WaitTimeoutError",
    "WaitTimings",
    "advisory_lock",
    "call",
    "cancel_job",
    "cancel_jobs",
    "create_db_context",
    "create_db_dependency",
    "create_ledger",
    "enqueue",
    "enqueue_many",
    "get_job",
    "get_transaction",
    "job_transaction",
    "list_attempts",
    "list_jobs",
    "lock_tables",
    "pause_queue",
    "periodic",
    "redis_from_url",
    "resume_queue",
    "retry_job",
    "retry_jobs",
    "set_progress",
    "set_result",
    "task_options",
    "wait_for_row_change",
    "wait_timings",
    "watch_row",
    "worker_settings",
]
