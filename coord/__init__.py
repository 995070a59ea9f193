"""Answer an HTTP request only after a background job's effect has landed.

Sessions commit before the first byte of the response, or the response is an error:

    get_db = create_db_dependency(session_maker=session_maker)

    @app.post("/orders/{order_id}/fulfil")
    async def fulfil(order_id: int, session: AsyncSession = Depends(get_db)): ...

A job takes its table locks first, all in one call, and holds them until its transaction ends:

    async def fulfil_order(ctx, order_id):
        async with db_context() as session, lock_tables(session, [Stock, Order]):
            order = await session.get(Order, order_id)
            order.status = "fulfilled"

The handler commits, enqueues (arq's own `enqueue_job`, for now), and waits for its row without holding a connection:

        order = await session.get(Order, order_id)
        await session.commit()
        await queue.enqueue_job("fulfil_order", order_id)
        order = await wait_for_row_change(
            session=session, model=Order, pk_value=order_id, columns=[Order.status], timeout=25.0
        )

In each process a `Coordinator` rings for the rows that its sessions commit and wakes its waits; without one they poll.
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
