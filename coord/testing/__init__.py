"""For your own tests: real servers, a transaction that is rolled back, and jobs that run when the test says so.

`coord[testing]` brings fixtures for pytest: `coord_servers`, `coord_database`, `coord_session_maker`, `coord_session`,
and `coord_schema`, which you override. What is here needs no pytest:

    async def test_an_order_is_fulfilled(coord_session):
        order = Order()
        coord_session.add(order)
        await enqueue(coord_session, fulfil_order, order.id)
        await coord_session.commit()
        await assert_enqueued(coord_session, fulfil_order, order.id)
        assert await drain_jobs([fulfil_order], session=coord_session) == Drained(done=1)
        await coord_session.refresh(order)
        assert order.status == "fulfilled"

`docs/testing.md` says what each proves, and what only a committed round trip with `run_worker` does.
"""

from __future__ import annotations

from coord.testing.drain import Drained, drain_jobs
from coord.testing.expectation import assert_enqueued, refute_enqueued
from coord.testing.perform import perform
from coord.testing.rollback import rolled_back
from coord.testing.servers import Servers
from coord.testing.worker import run_worker

__all__ = [
    "Drained",
    "Servers",
    "assert_enqueued",
    "drain_jobs",
    "perform",
    "refute_enqueued",
    "rolled_back",
    "run_worker",
]
