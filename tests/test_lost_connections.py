"""A connection that the server has given up is lost, whatever the driver says of it, and worth another attempt."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from coord import create_db_context, enqueue, job_transaction, lock_tables
from coord.database.engine import prepare
from coord.retryable import is_retryable
from tests.ledger import delivered
from tests.models import User
from tests.proxy import Proxy
from tests.serving import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from asyncpg import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine

    from coord import Job

    SessionMaker = async_sessionmaker[AsyncSession]

pytestmark = pytest.mark.usefixtures("tables", "ledger")

TERMINATE = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'doomed'"
NAMED = {"server_settings": {"application_name": "doomed"}}


@contextlib.asynccontextmanager
async def doomed(url: str, size: int = 1) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(url, pool_size=size, max_overflow=0, connect_args=NAMED)
    prepare(engine)
    yield engine
    await engine.dispose()


async def terminate(observer: Connection) -> None:
    await observer.fetch(TERMINATE)
    gone = "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE application_name = 'doomed')"
    await eventually(lambda: observer.fetchval(gone))


async def a_statement(session: AsyncSession) -> None:
    await session.execute(text("SELECT 1"))


async def a_flush(session: AsyncSession) -> None:
    session.add(User(name="never"))
    await session.flush()


async def an_enqueue(session: AsyncSession) -> None:
    await enqueue(session, "a_task")


async def a_lock(session: AsyncSession) -> None:
    async with lock_tables(session, [User]):
        pass


async def a_commit(session: AsyncSession) -> None:
    await session.commit()


@pytest.mark.parametrize("what", [a_statement, a_flush, an_enqueue, a_lock, a_commit])
@pytest.mark.parametrize("farewell", ["and the end", "alone"])
async def test_in_the_middle_of_a_transaction_it_is_lost_wherever_that_surfaces(
    database_url: str, observer: Connection, what: Any, farewell: str
) -> None:
    """The server's last words come at once; the end of its TCP connection perhaps later."""
    async with Proxy(database_url).opened() as way, doomed(way.url) as engine:
        way.ends_later = 0.15 if farewell == "alone" else 0.0
        async with AsyncSession(engine) as session:
            await session.execute(text("INSERT INTO users (name) VALUES ('never')"))
            await terminate(observer)
            with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever it is, it is transient
                await what(session)
            assert is_retryable(caught.value), repr(caught.value)
        async with AsyncSession(engine) as session:
            assert await session.scalar(text("SELECT count(*) FROM users")) == 0


@pytest.mark.parametrize("farewell", ["and the end", "alone"])
async def test_a_job_whose_pooled_connections_have_died_applies_its_effect_at_its_first_attempt(
    database_url: str, observer: Connection, farewell: str, job: Job
) -> None:
    async with Proxy(database_url).opened() as way, doomed(way.url, size=3) as engine:
        way.ends_later = 0.15 if farewell == "alone" else 0.0
        sessions = [AsyncSession(engine) for _ in range(3)]
        for session in sessions:
            await session.execute(text("SELECT 1"))
        for session in sessions:
            await session.close()
        await terminate(observer)
        async with job_transaction(delivered(job, async_sessionmaker(engine))) as session:
            session.add(User(name="once"))
    assert await observer.fetchval("SELECT count(*) FROM users") == 1


async def test_under_load_every_error_of_terminated_backends_is_retryable(
    database_url: str, observer: Connection
) -> None:
    errors: list[BaseException] = []
    async with doomed(database_url, size=8) as engine:
        context = create_db_context(async_sessionmaker(engine))
        stop = asyncio.Event()

        async def work() -> None:
            while not stop.is_set():
                try:
                    async with context() as session:
                        session.add(User(name="many"))
                        await enqueue(session, "a_task")
                        async with lock_tables(session, [User], mode="ROW EXCLUSIVE"):
                            await session.execute(text("SELECT 1"))
                except Exception as error:  # noqa: BLE001 - they are looked at below
                    errors.append(error)

        workers = [asyncio.create_task(work()) for _ in range(8)]
        for _ in range(10):
            already = len(errors)
            await eventually(lambda: observer.fetch(TERMINATE), within=20)
            await eventually(lambda already=already: len(errors) > already, within=20)
        stop.set()
        await asyncio.wait(workers)
    assert [error for error in errors if not is_retryable(error)] == []


async def test_a_primary_that_was_demoted_is_left_and_its_errors_are_transient(
    database_url: str, observer: Connection
) -> None:
    """A server that only reads from now on says so with each write, for as long as the pool has connections to it."""
    name = make_url(database_url).database
    async with doomed(database_url) as engine:
        context = create_db_context(async_sessionmaker(engine))
        async with context() as session:
            pid = await session.scalar(text("SELECT pg_backend_pid()"))
        async with engine.connect() as connection:
            await connection.execute(text("SET default_transaction_read_only = on"))
            await connection.commit()
        with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever it is, it is transient
            async with context() as session:
                session.add(User(name="refused"))
        assert is_retryable(caught.value), repr(caught.value)
        async with context() as session:
            session.add(User(name="elsewhere"))
            assert await session.scalar(text("SELECT pg_backend_pid()")) != pid
    assert await observer.fetchval("SELECT count(*) FROM users") == 1
    assert name is not None


async def test_a_transaction_that_is_read_only_by_its_own_wish_is_no_server_that_is_away(database_url: str) -> None:
    async with doomed(database_url) as engine, AsyncSession(engine) as session:
        await session.execute(text("SET TRANSACTION READ ONLY"))
        with pytest.raises(Exception, match="read-only") as caught:
            await session.execute(text("INSERT INTO users (name) VALUES ('never')"))
        assert not is_retryable(caught.value)
        assert isinstance(caught.value.__cause__, BaseException)
        assert asyncpg.ReadOnlySQLTransactionError.sqlstate == "25006"
