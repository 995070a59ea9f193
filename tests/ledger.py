"""The ledger under test: its tables, attempts at its jobs without a worker, and what goes over the wire for them."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event

from coord import Job, create_ledger, enqueue
from coord.jobs.attempt import ATTEMPT, Attempt
from coord.jobs.model import Ledger
from coord.queue.message import Message
from tests.models import empty

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

    SessionMaker = async_sessionmaker[AsyncSession]

WORKER_LOCK = 77_777


@pytest.fixture
async def ledger(engine: AsyncEngine) -> AsyncIterator[None]:
    """The ledger's tables, empty; emptied again afterwards, which also shows that a test left no lock behind."""
    async with engine.begin() as connection:
        await create_ledger(connection)
    await empty(engine, Ledger.metadata)
    yield
    await empty(engine, Ledger.metadata)


async def a_task(ctx: Any, *args: Any, **kwargs: Any) -> None:
    """Never run: these tests are about the ledger."""


async def committed(session_maker: SessionMaker, task: Any = a_task, *args: Any, **kwargs: Any) -> Job:
    """A job that is in the ledger."""
    async with session_maker() as session:
        job = await enqueue(session, task, *args, **kwargs)
        await session.commit()
    return job


@pytest.fixture
async def job(ledger: None, session_maker: SessionMaker) -> Job:
    """One that nobody runs."""
    return await committed(session_maker)


def delivered(job: Job, session_maker: SessionMaker, *, idle_limit: float = 8.0, **changes: Any) -> dict[str, Any]:
    """What a task's ctx is when a worker has taken the job out of Redis; `changes` are what Redis says otherwise."""
    job_id = changes.pop("job_id", job.id)
    message = replace(Message.of(job), **changes)
    attempt = Attempt(
        job_id=job_id,
        task=message.task,
        number=message.attempt,
        arguments=message.arguments,
        timeout=message.timeout,
        session_maker=session_maker,
        max_attempts=10,
        worker_lock=WORKER_LOCK,
        idle_limit=idle_limit,
    )
    return {ATTEMPT: attempt}


@contextlib.contextmanager
def executed(engine: AsyncEngine) -> Iterator[list[str]]:
    """What the engine's connections execute until the block ends, for SQLAlchemy or as coord tells the driver."""
    seen: list[str] = []
    drivers: set[Any] = set()

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        seen.append(statement)

    def note_driver(query: Any) -> None:
        seen.append(query.query)

    def listen(connection: Any, *_: Any) -> None:
        drivers.add(connection.driver_connection)
        connection.driver_connection.add_query_logger(note_driver)

    event.listen(engine.sync_engine, "before_cursor_execute", note)
    event.listen(engine.sync_engine, "checkout", listen)
    try:
        yield seen
    finally:
        event.remove(engine.sync_engine, "before_cursor_execute", note)
        event.remove(engine.sync_engine, "checkout", listen)
        for driver in drivers:
            driver.remove_query_logger(note_driver)


@contextlib.asynccontextmanager
async def statements(engine: AsyncEngine) -> AsyncIterator[list[str]]:
    """What the connection of an engine with one is told to execute, but for where transactions begin and end.

    The driver is asked as well, which logs what SQLAlchemy has not prepared: coord's hottest statements pass that by.
    """
    seen: list[str] = []

    def note(query: Any) -> None:
        if query.query.split()[0].rstrip(";") not in ("BEGIN", "COMMIT", "ROLLBACK"):
            seen.append(query.query)

    def note_cursor(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        seen.append(statement)

    async with engine.connect() as connection:
        driver: Any = (await connection.get_raw_connection()).driver_connection
    driver.add_query_logger(note)
    event.listen(engine.sync_engine, "before_cursor_execute", note_cursor)
    try:
        yield seen
        await asyncio.sleep(0)  # asyncpg tells its loggers a turn of the event loop later
    finally:
        event.remove(engine.sync_engine, "before_cursor_execute", note_cursor)
        driver.remove_query_logger(note)
