"""Which tests a leg runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

FAST = ("-m", "not slow and not alone")

CORE = (
    "tests/test_cancellation.py",
    "tests/test_changes.py",
    "tests/test_coordinator.py",
    "tests/test_engine.py",
    "tests/test_enqueue.py",
    "tests/test_http_disconnect.py",
    "tests/test_http_problem.py",
    "tests/test_job_transaction.py",
    "tests/test_migrations.py",
    "tests/test_locks.py",
    "tests/test_publisher.py",
    "tests/test_reading.py",
    "tests/test_running.py",
    "tests/test_seed.py",
    "tests/test_session.py",
    "tests/test_transaction.py",
    "tests/test_retryable.py",
)
"""What stands closest on SQLAlchemy, asyncpg, redis-py and FastAPI, in a minute or so."""

POOLED = (
    "tests/test_changes.py",
    "tests/test_coordinator.py",
    "tests/test_enqueue.py",
    "tests/test_job_transaction.py",
    "tests/test_locks.py",
    "tests/test_queries.py",
    "tests/test_publisher.py",
    "tests/test_session.py",
    "tests/test_transaction.py",
    "tests/test_waiting.py",
)
"""What goes through PgBouncer: files whose engine is that of tests/conftest.py, which is told of the pooler.

Engines that a test makes for itself, and observers, go to the server: they look at what the pooler leaves there.
"""

NOT_POOLED = {
    "tests/test_session.py::test_clients_that_leave_leave_nothing_behind": "has an engine of its own",
    "tests/test_coordinator.py::test_a_waiter_takes_eight_kib_with_its_session_row_and_task": "weighs its process",
}
"""Tests of those files that say nothing about a pooler in transaction mode, each with its reason."""


def arguments(part: str, tests: Sequence[str] = (), *, pooled: bool = False) -> list[str]:
    """pytest's, for `fast` or `core`, or for the given tests."""
    within = CORE if part == "core" else ()
    if not pooled:
        return [*FAST, *(tests or within)]
    chosen = [file for file in POOLED if not within or file in within]
    return [*FAST, *(tests or chosen), *(f"--deselect={test}" for test in NOT_POOLED)]
