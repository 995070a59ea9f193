"""Which failures pass by themselves: asked of what a real server, and a missing one, have really answered."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
from sqlalchemy import make_url, select, text, update
from sqlalchemy.exc import DBAPIError, InvalidRequestError, NotSupportedError, PendingRollbackError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from coord import (
    DeadlockError,
    JobFailedError,
    LockTimeoutError,
    UniqueKeyConflictError,
    WaitTimeoutError,
    enqueue,
    job_transaction,
    lock_tables,
    task_options,
)
from coord.retryable import is_retryable, is_server_away
from tests.ledger import a_task, committed, delivered
from tests.models import Item, User
from tests.serving import engine_at, eventually
from tests.shop import waiting_for_locks

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from asyncpg import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine

    from coord import Job

    SessionMaker = async_sessionmaker[AsyncSession]

pytestmark = pytest.mark.usefixtures("tables", "ledger")


@pytest.fixture
async def rows(tables: None, observer: Connection) -> None:
    await observer.execute("INSERT INTO users VALUES (1, ''), (2, '')")


@contextlib.contextmanager
def closed_port() -> Any:
    """A port that nobody listens on, kept from everybody else."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


async def rename(session: AsyncSession, user_id: int, *, orm: bool = False) -> None:
    if orm:
        user = await session.get_one(User, user_id)
        user.name += "!"
        await session.flush()
    else:
        await session.execute(update(User).where(User.id == user_id).values(name="x"))


@contextlib.asynccontextmanager
async def deadlock(session_maker: SessionMaker, observer: Connection) -> AsyncIterator[AsyncSession]:
    """A session in whose next change of the second user PostgreSQL finds a deadlock."""
    async with session_maker() as victim, session_maker() as other:
        await victim.execute(text("SET LOCAL deadlock_timeout = '10ms'"))
        await other.execute(text("SET LOCAL deadlock_timeout = '1min'"))
        await rename(victim, 1)
        await rename(other, 2)
        waiting = asyncio.create_task(rename(other, 1))
        await eventually(lambda: waiting_for_locks(observer, "UPDATE users"))
        yield victim
        await victim.rollback()
        await waiting


# Transient


async def test_a_deadlock_is(session_maker: SessionMaker, observer: Connection, rows: None) -> None:
    async with deadlock(session_maker, observer) as session:
        with pytest.raises(DBAPIError, match="deadlock detected") as caught:
            await rename(session, 2)
        assert is_retryable(caught.value)


@pytest.mark.parametrize("goes_on", [False, True])
async def test_a_deadlock_that_a_job_swallows_is(
    session_maker: SessionMaker, observer: Connection, rows: None, goes_on: bool, job: Job
) -> None:
    """SQLAlchemy says what had failed in words alone, or says nothing."""
    async with session_maker() as other:
        await other.execute(text("SET LOCAL deadlock_timeout = '1min'"))
        await rename(other, 2)
        with pytest.raises(InvalidRequestError) as caught:
            async with job_transaction(delivered(job, session_maker)) as session:
                await session.execute(text("SET LOCAL deadlock_timeout = '10ms'"))
                await rename(session, 1)
                waiting = asyncio.create_task(rename(other, 1))
                await eventually(lambda: waiting_for_locks(observer, "UPDATE users"))
                with contextlib.suppress(DBAPIError):
                    await rename(session, 2, orm=True)
                if goes_on:
                    await session.execute(select(User))
        await waiting
    assert is_retryable(caught.value)


async def test_another_error_that_a_job_swallows_is_not(session_maker: SessionMaker, rows: None, job: Job) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        async with job_transaction(delivered(job, session_maker)) as session:
            session.add(User(id=1))
            with contextlib.suppress(DBAPIError):
                await session.flush()
    assert not is_retryable(caught.value)


async def test_a_deadlock_of_table_locks_is(session_maker: SessionMaker, observer: Connection, rows: None) -> None:
    async with session_maker() as victim, session_maker() as other:
        await victim.execute(text("SET LOCAL deadlock_timeout = '10ms'"))
        await other.execute(text("SET LOCAL deadlock_timeout = '1min'"))
        await victim.execute(text("LOCK TABLE items"))
        await other.execute(text("LOCK TABLE users"))
        waiting = asyncio.create_task(other.execute(text("LOCK TABLE items")))
        await eventually(lambda: waiting_for_locks(observer, "LOCK TABLE items"))
        with pytest.raises(DeadlockError) as caught:
            async with lock_tables(victim, [User]):
                pass
        assert is_retryable(caught.value)
        await victim.rollback()
        await waiting


async def test_a_lock_that_timed_out_is(session_maker: SessionMaker, rows: None) -> None:
    async with session_maker() as holder, session_maker() as session:
        await holder.execute(select(User).with_for_update())
        await holder.execute(text("LOCK TABLE items"))
        with pytest.raises(LockTimeoutError) as coords:
            async with lock_tables(session, [Item], timeout=0.01):
                pass
        assert is_retryable(coords.value)
        await session.execute(text("SET LOCAL lock_timeout = '10ms'"))
        for statement in (update(User).values(name="x"), select(User).with_for_update(nowait=True)):
            async with session.begin_nested() as savepoint:
                with pytest.raises(DBAPIError) as caught:
                    await session.execute(statement)
                assert is_retryable(caught.value)
                await savepoint.rollback()


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
async def test_a_serialization_failure_is(
    engine: AsyncEngine, session_maker: SessionMaker, rows: None, level: str
) -> None:
    async with async_sessionmaker(engine.execution_options(isolation_level=level))() as session:
        await session.execute(select(User))
        async with session_maker() as other:
            await rename(other, 1)
            await other.commit()
        with pytest.raises(DBAPIError, match="could not serialize") as caught:
            await rename(session, 1)
        assert is_retryable(caught.value)


@pytest.mark.parametrize("swallowed", [False, True])
async def test_a_terminated_backend_is_also_if_the_task_goes_on(
    session_maker: SessionMaker, observer: Connection, rows: None, swallowed: bool
) -> None:
    async with session_maker() as session:
        pid = await session.scalar(text("SELECT pg_backend_pid()"))
        await observer.execute("SELECT pg_terminate_backend($1, 5000)", pid)
        if swallowed:
            with contextlib.suppress(DBAPIError):
                await session.execute(select(User))
        with pytest.raises((DBAPIError, PendingRollbackError)) as caught:
            await session.execute(select(User))
        assert is_retryable(caught.value)


async def test_a_backend_terminated_in_the_middle_of_a_statement_is(
    session_maker: SessionMaker, observer: Connection
) -> None:
    async with session_maker() as session:
        pid = await session.scalar(text("SELECT pg_backend_pid()"))
        asleep = asyncio.create_task(session.execute(text("SELECT pg_sleep(60)")))
        working = "SELECT count(*) FROM pg_stat_activity WHERE pid = $1 AND wait_event = 'PgSleep'"
        await eventually(lambda: observer.fetchval(working, pid))
        await observer.execute("SELECT pg_terminate_backend($1)", pid)
        with pytest.raises(DBAPIError) as caught:
            await asleep
        assert is_retryable(caught.value)


@pytest.mark.parametrize(
    "setting", ["idle_in_transaction_session_timeout", "transaction_timeout", "idle_session_timeout"]
)
async def test_a_session_that_was_ended_for_idling_is(database_url: str, observer: Connection, setting: str) -> None:
    connect_args = {"server_settings": {setting: "500ms"}}  # SQLAlchemy's first statements are one transaction
    async with engine_at(database_url, connect_args=connect_args) as engine, async_sessionmaker(engine)() as session:
        pid = await session.scalar(text("SELECT pg_backend_pid()"))
        if setting == "idle_session_timeout":
            await session.rollback()
        gone = "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1)"
        await eventually(lambda: observer.fetchval(gone, pid))
        with pytest.raises(DBAPIError) as caught:
            await session.execute(select(User))
        assert is_retryable(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "no-such-host.invalid"])
async def test_a_server_that_cannot_be_reached_is(database_url: str, host: str) -> None:
    with closed_port() as port:
        async with engine_at(make_url(database_url).set(host=host, port=port)) as engine:
            with pytest.raises(OSError, match=r"Connect|Name|resol") as caught:
                async with engine.connect():
                    pass
    assert is_retryable(caught.value)


async def test_an_exhausted_pool_is(database_url: str) -> None:
    async with engine_at(database_url, pool_size=1, max_overflow=0, pool_timeout=0.01) as engine:
        async with engine.connect():
            with pytest.raises(PoolTimeoutError) as caught:
                async with engine.connect():
                    pass
    assert is_retryable(caught.value)


async def test_too_many_connections_are(database_url: str, observer: Connection) -> None:
    name = make_url(database_url).database
    await observer.execute(f'ALTER DATABASE "{name}" CONNECTION LIMIT 0')
    await observer.execute("CREATE ROLE visitor LOGIN")
    try:
        async with engine_at(make_url(database_url).set(username="visitor")) as engine:
            with pytest.raises(Exception, match="too many connections") as caught:
                async with engine.connect():
                    pass
    finally:
        await observer.execute(f'ALTER DATABASE "{name}" CONNECTION LIMIT -1')
        await observer.execute("DROP ROLE visitor")
    assert is_retryable(caught.value)


@contextlib.asynccontextmanager
async def silent_server() -> AsyncIterator[int]:
    """A port where somebody accepts, and never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        yield listener.getsockname()[1]


async def test_a_server_that_does_not_answer_is_to_a_job(database_url: str, job: Job) -> None:
    """The driver says it with a plain `TimeoutError`, which a task's own may not be taken for."""
    async with silent_server() as port:
        url = make_url(database_url).set(port=port)
        async with engine_at(url, connect_args={"timeout": 0.05}) as engine:
            with pytest.raises(ConnectionError, match="PostgreSQL") as caught:
                async with job_transaction(delivered(job, async_sessionmaker(engine))):
                    pass
    assert is_retryable(caught.value)


async def test_a_socket_that_is_not_there_is_to_a_job(job: Job) -> None:
    async with engine_at("postgresql+asyncpg:///x?host=/nowhere") as engine:
        with pytest.raises(ConnectionError) as caught:
            async with job_transaction(delivered(job, async_sessionmaker(engine))):
                pass
    assert is_retryable(caught.value)


@pytest.mark.parametrize(
    "number", [errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN, errno.ECONNRESET, errno.EPIPE]
)
def test_a_network_that_is_down_is(number: int) -> None:
    assert is_retryable(OSError(number, "as asyncio raises it"))


def test_a_host_of_which_no_address_answers_is() -> None:
    """As asyncio says it of `localhost` when that has two addresses."""
    assert is_retryable(OSError("Multiple exceptions: [Errno 111] Connect call failed ('::1', 5432, 0, 0), …"))


@pytest.mark.parametrize(
    "error",
    [
        asyncpg.AdminShutdownError,
        asyncpg.CrashShutdownError,
        asyncpg.CannotConnectNowError,
        asyncpg.IdleSessionTimeoutError,
        asyncpg.IdleInTransactionSessionTimeoutError,
        asyncpg.PostgresConnectionError,
        asyncpg.ConnectionDoesNotExistError,
        asyncpg.TooManyConnectionsError,
        asyncpg.OutOfMemoryError,
    ],
    ids=lambda kind: kind.__name__,
)
def test_what_the_driver_says_of_a_server_that_has_ended_a_session_is(error: type[Exception]) -> None:
    """When it says so and when it only finds the connection closed is a matter of microseconds."""
    assert is_retryable(error("x"))


# Not transient


async def test_a_unique_violation_is_not(session_maker: SessionMaker, rows: None) -> None:
    async with session_maker() as session:
        session.add(User(id=1))
        with pytest.raises(DBAPIError) as caught:
            await session.flush()
        assert not is_retryable(caught.value)


async def test_a_statement_that_takes_too_long_is_not(session_maker: SessionMaker) -> None:
    async with session_maker() as session:
        await session.execute(text("SET LOCAL statement_timeout = '10ms'"))
        with pytest.raises(DBAPIError, match="statement timeout") as caught:
            await session.execute(text("SELECT pg_sleep(60)"))
        assert not is_retryable(caught.value)
        with pytest.raises(DBAPIError, match="transaction is aborted") as caught:
            await session.execute(select(User))
        assert not is_retryable(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"),
        TimeoutError(),
        FileNotFoundError(errno.ENOENT, "no such file"),
        PermissionError(errno.EACCES, "no"),
        OSError(errno.ENOSPC, "disk full"),
        OSError("of somebody's own"),
        UniqueKeyConflictError(),
        WaitTimeoutError(model=User, pk_value=1, waited=1.0),
        JobFailedError(job_id=None, reason="deadlock detected"),  # type: ignore[arg-type]
        RuntimeError("connection"),
        asyncio.CancelledError(),
    ],
    ids=repr,
)
def test_what_a_task_may_raise_otherwise_is_not(error: BaseException) -> None:
    assert not is_retryable(error)


# What others have made of it


async def test_an_error_is_what_it_was_raised_from_but_not_what_it_was_raised_beside() -> None:
    cause = LockTimeoutError()
    with pytest.raises(RuntimeError) as caught:
        raise RuntimeError from cause
    assert is_retryable(caught.value)
    with pytest.raises(RuntimeError) as caught:
        try:
            raise cause
        except LockTimeoutError:
            raise RuntimeError  # noqa: B904 - the point
    assert not is_retryable(caught.value)


async def test_a_conflict_of_unique_keys_is_not_though_it_was_found_by_waiting(session_maker: SessionMaker) -> None:
    await committed(session_maker, task_options(a_task, unique_key="k"), 1)
    async with session_maker() as session:
        with pytest.raises(UniqueKeyConflictError) as caught:
            await enqueue(session, task_options(a_task, unique_key="k"), 2)
    assert not is_retryable(caught.value)


async def test_a_group_is_if_all_of_it_is() -> None:
    passing, final = LockTimeoutError(), KeyError("x")
    assert is_retryable(ExceptionGroup("", [passing, ConnectionResetError()]))
    assert is_retryable(ExceptionGroup("", [ExceptionGroup("", [passing]), passing]))
    assert not is_retryable(ExceptionGroup("", [passing, final]))
    assert not is_retryable(ExceptionGroup("", [ExceptionGroup("", [final]), passing]))
    with pytest.raises(RuntimeError) as caught:
        raise RuntimeError from ExceptionGroup("", [passing])
    assert is_retryable(caught.value)


async def test_causes_that_go_round_in_a_circle_come_to_an_end() -> None:
    one, other = KeyError(), KeyError()
    one.__cause__, other.__cause__ = other, one
    assert not is_retryable(one)


async def test_a_read_of_a_table_that_was_altered_may_be_repeated(database_url: str, observer: Connection) -> None:
    read = text("SELECT * FROM altered")
    await observer.execute("CREATE TABLE altered (id int)")
    try:
        async with engine_at(database_url) as engine, engine.connect() as connection:
            await connection.execute(read)
            await connection.rollback()
            await observer.execute("ALTER TABLE altered ADD COLUMN name text")
            with pytest.raises(NotSupportedError) as caught:
                await connection.execute(read)
    finally:
        await observer.execute("DROP TABLE altered")
    assert is_server_away(caught.value)
    assert not is_retryable(caught.value)


@pytest.mark.parametrize(
    ("statement", "away"),
    [
        ("SET LOCAL statement_timeout = 50; SELECT pg_sleep(10)", True),
        ("SELECT pg_terminate_backend(pg_backend_pid())", True),
        ("SELECT 1 / 0", False),
        ("SELECT nothing", False),
    ],
)
async def test_a_read_may_be_repeated_unless_the_statement_or_its_values_were_refused(
    database_url: str, statement: str, away: bool
) -> None:
    async with engine_at(database_url) as engine, engine.connect() as connection:
        with pytest.raises(DBAPIError) as caught:
            for part in statement.split("; "):
                await connection.execute(text(part))
    assert is_server_away(caught.value) is away
