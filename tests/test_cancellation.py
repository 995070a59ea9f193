"""Cancelled anywhere, once or twice, by asyncio or by anyio: nothing lost without an error, nothing left behind."""

from __future__ import annotations

import asyncio
import gc
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

import coord.cancellation
from coord import LockTimeoutError, create_db_context, enqueue, lock_tables, wait_for_row_change
from coord.cancellation import cleaned_up, interruptible, uninterrupted
from coord.retryable import is_retryable
from tests.models import Item, User
from tests.proxy import Proxy
from tests.serving import eventually
from tests.waits import iterations

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from asyncpg import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine

pytestmark = pytest.mark.usefixtures("tables")


@pytest.fixture
def sessions(single: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    return async_sessionmaker(single, expire_on_commit=False)


@pytest.fixture
async def locked(tables: None, ledger: None, engine: AsyncEngine) -> AsyncIterator[None]:
    """Somebody holds the tables of items and of jobs."""
    async with engine.begin() as holder:
        await holder.execute(text("LOCK TABLE items, coord_jobs IN EXCLUSIVE MODE"))
        yield


async def waits(observer: Connection) -> None:
    """Return once somebody waits for a lock."""
    question = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    await eventually(lambda: observer.fetchval(question))


async def enqueue_one(session: AsyncSession) -> None:
    await enqueue(session, "a_task")


async def lock_items(session: AsyncSession) -> None:
    async with lock_tables(session, [Item]):
        pass


@pytest.mark.usefixtures("locked")
@pytest.mark.parametrize("what", [enqueue_one, lock_items])
async def test_who_goes_on_after_a_cancelled_statement_does_not_commit_what_has_failed(
    sessions: async_sessionmaker[AsyncSession],
    observer: Connection,
    what: Callable[[AsyncSession], Coroutine[Any, Any, None]],
) -> None:
    """PostgreSQL would answer the COMMIT with a ROLLBACK and no error: a 201, and no order."""
    with pytest.raises(PendingRollbackError):
        async with create_db_context(sessions)() as session:
            session.add(User(name="Ada"))
            await session.flush()
            waiting = asyncio.create_task(what(session))
            await waits(observer)
            waiting.cancel()
            await asyncio.wait([waiting])
    assert await observer.fetchval("SELECT count(*) FROM users") == 0
    async with create_db_context(sessions)() as session:
        session.add(User(name="Grace"))
    assert await observer.fetchval("SELECT name FROM users") == "Grace"


@pytest.mark.usefixtures("locked")
async def test_a_lock_is_refused_in_its_own_words_though_its_holders_cannot_be_asked_about(
    sessions: async_sessionmaker[AsyncSession], observer: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coord.database.acquisition._HOLDERS", "SELECT 1/0 WHERE true")
    async with create_db_context(sessions)() as session:
        await session.execute(text("INSERT INTO users (name) VALUES ('Ada')"))
        with pytest.raises(LockTimeoutError) as caught:
            async with lock_tables(session, [Item], timeout=0.05):
                pass
        assert caught.value.holders == ()
    assert await observer.fetchval("SELECT count(*) FROM users") == 1


@pytest.mark.usefixtures("locked")
@pytest.mark.parametrize("what", [enqueue_one, lock_items])
async def test_a_backend_terminated_while_it_waits_is_a_lost_connection(
    sessions: async_sessionmaker[AsyncSession],
    observer: Connection,
    what: Callable[[AsyncSession], Coroutine[Any, Any, None]],
) -> None:
    async with sessions() as session:
        waiting = asyncio.create_task(what(session))
        await waits(observer)
        await observer.fetch(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )
        with pytest.raises(DBAPIError) as caught:
            await waiting
    assert caught.value.connection_invalidated
    assert is_retryable(caught.value)


@pytest.mark.usefixtures("locked")
@pytest.mark.parametrize("turns", range(4))
async def test_who_is_cancelled_twice_leaves_a_connection_as_good_as_new(
    sessions: async_sessionmaker[AsyncSession], observer: Connection, turns: int
) -> None:
    """Two deadlines, or a forced stop after a stop."""

    async def work() -> None:
        async with create_db_context(sessions)() as session:
            await session.execute(text("INSERT INTO users (name) VALUES ('Ada')"))
            async with lock_tables(session, [Item]):
                pass

    task = asyncio.create_task(work())
    await waits(observer)
    task.cancel()
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with sessions() as session:
        assert await session.scalar(select(User.name)) is None
    await eventually(lambda: observer.fetchval("SELECT count(*) = 0 FROM pg_locks WHERE mode = 'RowExclusiveLock'"))


async def test_an_error_is_not_told_otherwise_because_the_rollback_fails_too(
    database_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A lock that was not to be had is worth another attempt; what the cleanup says is not."""
    monkeypatch.setattr(coord.cancellation, "CLEANUP_TIMEOUT_SECONDS", 0.2)
    async with Proxy(database_url).opened() as way:
        engine = create_async_engine(way.url, pool_size=1, max_overflow=0)
        with pytest.raises(LockTimeoutError):
            async with create_db_context(async_sessionmaker(engine))() as session:
                await session.execute(text("SELECT 1"))
                way.flows.clear()
                raise LockTimeoutError("of the block's own")
        way.flows.set()
        async with create_db_context(async_sessionmaker(engine))() as session:
            assert await session.scalar(text("SELECT 1")) == 1
        await engine.dispose()
    assert "Cleaning up" in caplog.text


async def test_cleaning_up_swallows_no_cancellation() -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        begun.set()
        await go_on.wait()
        raise OSError("of the cleanup")

    task = asyncio.create_task(cleaned_up(work()))
    await begun.wait()
    task.cancel()
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_work_whose_time_is_up_has_stopped_before_its_caller_goes_on() -> None:
    stopped = False

    async def work() -> None:
        nonlocal stopped
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            stopped = True

    with pytest.raises(TimeoutError):
        await interruptible(work(), limit=0.01)
    assert stopped


@pytest.mark.parametrize("seen_to_end", [interruptible, uninterrupted])
async def test_an_error_of_the_works_leaves_nothing_to_the_garbage_collector(seen_to_end: Any) -> None:
    class Request:
        pass

    async def work() -> None:
        raise OSError

    async def caller() -> weakref.ref[Request]:
        request = Request()
        with suppress(OSError):
            await seen_to_end(work())
        return weakref.ref(request)

    gc.disable()
    try:
        request = await caller()
        await iterations()  # the work's task has callbacks to run
        assert request() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("what", ["enqueue", "lock_tables"])
@pytest.mark.usefixtures("ledger")
async def test_who_shares_a_connection_takes_turns_on_it(engine: AsyncEngine, user: int, what: str) -> None:
    """As the sessions of a test do that is rolled back at its end: one waits, and reads, while another writes."""
    async with engine.connect() as connection:
        await connection.begin()

        def session() -> AsyncSession:
            return AsyncSession(connection, join_transaction_mode="create_savepoint", expire_on_commit=False)

        async with session() as waiting, session() as writing:
            task = asyncio.create_task(wait_for_row_change(waiting, User, user, interval=0.001))
            for _ in range(50):
                if what == "enqueue":
                    await enqueue(writing, "a_task")
                else:
                    async with lock_tables(writing, [Item]):
                        pass
                await asyncio.sleep(0)
            assert not task.done()
            task.cancel()
            readers = [each for each in asyncio.all_tasks() if each.get_name().startswith("coord waits")]
            await asyncio.wait([task, *readers])


@pytest.fixture
async def user(observer: Connection, tables: None) -> int:
    found: int = await observer.fetchval("INSERT INTO users (name) VALUES ('before') RETURNING id")
    return found


async def test_work_that_is_cancelled_before_its_first_step_is_closed() -> None:
    """As by a loop that ends: Python would warn of a coroutine that was never awaited."""
    began = False

    async def work() -> None:
        nonlocal began
        began = True

    own = asyncio.current_task()
    caller = asyncio.create_task(interruptible(work()))
    await asyncio.sleep(0)
    for task in asyncio.all_tasks() - {own, caller}:
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert not began
    gc.collect()
